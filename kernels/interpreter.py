"""Mends Triton's interpreter, which runs kernels on the CPU under ``TRITON_INTERPRET=1``.

Triton 3.6 and 3.9 do arithmetic on the raw bits of bf16 there and truncate what they round to it;
both are silently wrong. Here bf16 operands become fp32, and results round to nearest even. A tensor
of one element is also made an index again, which numpy 2.4 refuses.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
ARITHMETIC = ("binary_op", "unary_op", "ternary_op", "create_fma", "create_fabs")


def is_bf16(x: Any) -> bool:
    """Whether x is a block of bf16."""
    return isinstance(x, Handle) and x.dtype.scalar == tl.bfloat16


def widened(x: Any) -> Any:
    """A block of bf16, kept as 16-bit integers, as fp32; anything else as it is."""
    if not is_bf16(x):
        return x
    return Handle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def rounded(x: np.ndarray) -> Any:
    """fp32 numbers as a block of bf16, rounded to nearest even; NaN stays NaN."""
    x = np.ascontiguousarray(x, np.float32)
    bits = x.view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return Handle(np.where(np.isnan(x), np.uint16(0x7FC0), nearest), tl.bfloat16)


def mend() -> None:
    """Replace what is wrong; once."""
    if getattr(Builder, "mended", False):
        return
    Builder.mended = True
    for name in ARITHMETIC:
        setattr(Builder, name, in_fp32(getattr(Builder, name)))
    dot, cast, convert = Builder.create_dot, Builder.cast_impl, Builder.create_fp_to_fp

    def honest_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    def honest_cast(self: Any, source: Any, target: Any) -> Any:
        if target.scalar == tl.bfloat16 and not is_bf16(source):
            return rounded(source.data)
        if is_bf16(source) and target.scalar == tl.float32:
            return widened(source)
        if is_bf16(source) and target.scalar != tl.bfloat16:
            return cast(self, widened(source), target)
        return cast(self, source, target)

    def honest_conversion(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if target.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32:
            return rounded(source.data)
        return convert(self, source, target, rounding)

    Builder.create_dot = honest_dot
    Builder.cast_impl = honest_cast
    Builder.create_fp_to_fp = honest_conversion

    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor: Any, *rest: Any) -> Any:
        result = patch(tensor, *rest)
        tensor.__index__ = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])
        return result

    interpreter._patch_lang_tensor = patch_with_index


def in_fp32(operation: Any) -> Any:
    """The operation with bf16 operands widened, and a result of fp32 rounded back to bf16."""

    def wide(self: Any, *args: Any) -> Any:
        if not any(is_bf16(x) for x in args):
            return operation(self, *args)
        result = operation(self, *(widened(x) for x in args))
        return rounded(result.data) if result.dtype.scalar == tl.float32 else result

    return wide
