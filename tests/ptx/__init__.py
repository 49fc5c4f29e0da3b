"""Compiled GPU kernels on CPU tensors: Triton's and nvcc's PTX, executed by csrc/emulator/ptx."""
