"""GPU kernels written in Triton, installed as ``attnfast.kernels``.

Importing this package does not import Triton: ``backend`` does, when the first call runs.
"""
