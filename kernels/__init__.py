"""GPU kernels written in Triton, installed as ``attnfast.kernels``."""
