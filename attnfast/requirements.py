"""The single requirements of arguments; checks.py says which call has which.

Each function takes the public function's name first, for the message, and raises
``function: name must be requirement, got value``.
"""

from __future__ import annotations

import numbers
from typing import Any, NoReturn

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ALIGNMENTS = {"top_left": False, "bottom_right": True}
MAX_FP32 = 3.4028234663852886e38
MIN_FP32 = 1.1754943508222875e-38  # the smallest normal number
MAX_POSITION = 2**31 - 1  # of windows, offsets and lengths


def fail(
    function: str, name: str, requirement: str, got: object, error: type[Exception] = ValueError
) -> NoReturn:
    """Raise ``function: name must be requirement, got value``."""
    raise error(f"{function}: {name} must be {requirement}, got {got}")


def qkv_tensors(function: str, names: tuple[str, ...], *tensors: object) -> None:
    """Check that q, k and v are dense strided tensors."""
    for name, x in zip(names, tensors, strict=False):
        if not isinstance(x, Tensor):
            fail(function, name, "a Tensor", type(x).__name__, TypeError)
        if x.layout is not torch.strided or x.is_nested:
            fail(function, name, "a dense strided Tensor", f"layout {x.layout}", TypeError)


def dense_sizes(
    function: str, names: tuple[str, ...], q: Tensor, k: Tensor, v: Tensor
) -> tuple[int, int, int, int, int]:
    """B, H, T, D and S of (B, H, T, D), (B, H_kv, S, D) and (B, H_kv, S, D_v)."""
    if q.dim() != 4:
        fail(function, names[0], "(B, H, T, D)", tuple(q.shape))
    B, H, T, D = q.shape
    if k.dim() != 4 or k.shape[0] != B or k.shape[3] != D:
        fail(function, names[1], f"(B, H_kv, S, D) = ({B}, *, *, {D})", tuple(k.shape))
    _, H_kv, S, _ = k.shape
    if v.dim() != 4 or v.shape[:3] != k.shape[:3]:
        fail(function, names[2], f"(B, H_kv, S, D_v) = ({B}, {H_kv}, {S}, *)", tuple(v.shape))
    heads(function, names, H, H_kv, D, v.shape[3])
    return B, H, T, D, S


def packed_sizes(
    function: str, names: tuple[str, ...], q: Tensor, k: Tensor, v: Tensor
) -> tuple[int, int]:
    """H and D of (total_q, H, D), (total_k, H_kv, D) and (total_k, H_kv, D_v)."""
    if q.dim() != 3:
        fail(function, names[0], "(total_q, H, D)", tuple(q.shape))
    _, H, D = q.shape
    if k.dim() != 3 or k.shape[2] != D:
        fail(function, names[1], f"(total_k, H_kv, D) = (*, *, {D})", tuple(k.shape))
    total_k, H_kv, _ = k.shape
    if v.dim() != 3 or v.shape[:2] != k.shape[:2]:
        fail(function, names[2], f"(total_k, H_kv, D_v) = ({total_k}, {H_kv}, *)", tuple(v.shape))
    heads(function, names, H, H_kv, D, v.shape[2])
    return H, D


def paged_sizes(
    function: str, names: tuple[str, ...], q: Tensor, k: Tensor, v: Tensor
) -> tuple[int, int, int, int, int]:
    """B, H, T, D and the page size of (B, H, T, D) and pages (P, page, H_kv, D | D_v)."""
    if q.dim() != 4:
        fail(function, names[0], "(B, H, T, D)", tuple(q.shape))
    B, H, T, D = q.shape
    if k.dim() != 4 or k.shape[3] != D or k.shape[1] == 0:
        requirement = f"pages (P, page, H_kv, D) = (*, *, *, {D}), page of 1 or more"
        fail(function, names[1], requirement, tuple(k.shape))
    pages, page_size, H_kv, _ = k.shape
    if v.dim() != 4 or v.shape[:3] != k.shape[:3]:
        requirement = f"pages (P, page, H_kv, D_v) = ({pages}, {page_size}, {H_kv}, *)"
        fail(function, names[2], requirement, tuple(v.shape))
    heads(function, names, H, H_kv, D, v.shape[3])
    return B, H, T, D, page_size


def heads(function: str, names: tuple[str, ...], H: int, H_kv: int, D: int, D_v: int) -> None:
    """Check head counts and head dims."""
    if H < 1:
        fail(function, names[0], "of 1 head or more", f"H = {H}")
    if H_kv < 1 or H % H_kv:
        fail(function, names[1], f"of a number of heads that divides H = {H}", f"H_kv = {H_kv}")
    if D < 1:
        fail(function, names[0], "of head dim 1 or more", f"D = {D}")
    if D_v < 1:
        fail(function, names[2], "of head dim 1 or more", f"D_v = {D_v}")


def same_kind(function: str, names: tuple[str, ...], q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check that q, k and v share one device and one supported dtype."""
    dtype, device = q.dtype, q.device
    if dtype not in DTYPES:
        fail(function, names[0], "float32, bfloat16, float16 or float64", dtype, TypeError)
    for name, x in ((names[1], k), (names[2], v)):
        if x.dtype is not dtype:
            fail(function, name, f"of {names[0]}'s dtype {dtype}", x.dtype, TypeError)
        if x.device != device:
            fail(function, name, f"on {names[0]}'s device {device}", x.device)


def on_device(function: str, name: str, x: object, q: Tensor, what: str) -> Tensor:
    """Return x if it is a tensor on q's device."""
    if not isinstance(x, Tensor):
        fail(function, name, what, type(x).__name__, TypeError)
    if x.device != q.device:
        fail(function, name, f"on q's device {q.device}", x.device)
    return x


def mask_like(
    function: str, name: str, x: Tensor, q: Tensor, full: tuple[int, ...], what: str
) -> Tensor:
    """A bool mask, 4-D, broadcastable to the scores."""
    x = on_device(function, name, x, q, f"a Tensor broadcastable to {what}")
    if x.dtype is not torch.bool:
        requirement = "bool, True = attend (what is to be added to the scores is a bias)"
        fail(function, name, requirement, x.dtype, TypeError)
    return broadcastable(function, name, x, full, what)


def bias_like(
    function: str, name: str, x: Tensor, q: Tensor, full: tuple[int, ...], what: str
) -> Tensor:
    """A float bias, 4-D, broadcastable to the scores."""
    x = on_device(function, name, x, q, f"a Tensor broadcastable to {what}")
    if x.dtype not in DTYPES:
        requirement = "float32, bfloat16, float16 or float64 (what is True or False is a mask)"
        fail(function, name, requirement, x.dtype, TypeError)
    return broadcastable(function, name, x, full, what)


def broadcastable(function: str, name: str, x: Tensor, full: tuple[int, ...], what: str) -> Tensor:
    """Give x leading dimensions of size 1 up to four, if it broadcasts to the scores' sizes."""
    dims = x.dim()
    if dims > 4 or any(
        size != 1 and size != whole for size, whole in zip(x.shape, full[4 - dims :], strict=True)
    ):
        sizes = f"({', '.join(map(str, full))})"
        fail(function, name, f"broadcastable to {what} = {sizes}", tuple(x.shape))
    return x if dims == 4 else x[(None,) * (4 - dims)]


def slopes(function: str, x: Tensor, q: Tensor, B: int, H: int) -> Tensor:
    """ALiBi slopes as (1 | B, H) fp32."""
    x = on_device(function, "alibi_slopes", x, q, "a Tensor (H,) or (B, H)")
    if x.dtype is not torch.float32:
        fail(function, "alibi_slopes", "float32", x.dtype, TypeError)
    if x.shape != (H,) and x.shape != (B, H):
        fail(function, "alibi_slopes", f"(H,) = ({H},) or (B, H) = ({B}, {H})", tuple(x.shape))
    without_gradient(function, "alibi_slopes", x, "slopes have none (detach them; a bias has one)")
    return x if x.dim() == 2 else x[None]


def sink_logits(function: str, x: Tensor, q: Tensor, H: int) -> Tensor:
    """Sinks (H,)."""
    x = on_device(function, "sinks", x, q, "a Tensor (H,)")
    if x.dtype not in DTYPES:
        fail(function, "sinks", "float32, bfloat16, float16 or float64", x.dtype, TypeError)
    if x.shape != (H,):
        fail(function, "sinks", f"(H,) = ({H},)", tuple(x.shape))
    return x


def without_gradient(function: str, name: str, x: Tensor, why: str) -> None:
    """Check that no gradient is asked for where there is none."""
    if x.requires_grad and torch.is_grad_enabled():
        fail(function, name, f"without gradient, as {why}", "requires_grad=True")


def seed(function: str, x: Tensor, q: Tensor) -> Tensor:
    """A dropout seed (2,) int64."""
    x = on_device(function, "dropout_seed", x, q, "an int64 Tensor (seed, offset)")
    if x.dtype is not torch.int64:
        fail(function, "dropout_seed", "int64", x.dtype, TypeError)
    if x.shape != (2,):
        fail(function, "dropout_seed", "(seed, offset), of shape (2,)", tuple(x.shape))
    return x


def indices(
    function: str, name: str, x: Tensor, q: Tensor, shape: tuple[int | None, ...], what: str
) -> Tensor:
    """An int32 tensor of a shape whose None may be anything; int64 is converted."""
    x = on_device(function, name, x, q, f"an int32 Tensor {what}")
    if x.dtype is not torch.int32 and x.dtype is not torch.int64:
        fail(function, name, "int32", x.dtype, TypeError)
    if x.dim() != len(shape) or any(
        size != whole for size, whole in zip(x.shape, shape, strict=True) if whole is not None
    ):
        sizes = ", ".join("*" if size is None else str(size) for size in shape)
        sizes = f"({sizes},)" if len(shape) == 1 else f"({sizes})"
        fail(function, name, f"{what} = {sizes}", tuple(x.shape))
    return x if x.dtype is torch.int32 else x.to(torch.int32)


def boundaries(function: str, name: str, x: Tensor, q: Tensor) -> Tensor:
    """cu_seqlens (sequences + 1,) int32."""
    x = indices(function, name, x, q, (None,), "(sequences + 1,)")
    if x.shape[0] < 1:
        fail(function, name, "(sequences + 1,), of 1 or more entries", tuple(x.shape))
    return x


def alignment(
    function: str, align: str | int | Tensor, q: Tensor, B: int
) -> tuple[Tensor | None, int, bool]:
    """``align`` as a (B,) int32 tensor or None, an offset, and whether it is bottom-right."""
    if isinstance(align, Tensor):
        return indices(function, "align", align, q, (B,), "(B,)"), 0, False
    if isinstance(align, str) and align in ALIGNMENTS:
        return None, 0, ALIGNMENTS[align]
    if isinstance(align, str) or not is_integer(align):
        requirement = "'top_left', 'bottom_right', an int or an int Tensor (B,)"
        error = ValueError if isinstance(align, str) else TypeError
        fail(function, "align", requirement, repr(align), error)
    return None, integer(function, "align", align, low=-MAX_POSITION), False


def window_sides(function: str, window: object) -> tuple[int, int]:
    """``window`` as two numbers, -1 where it is unbounded."""
    if not isinstance(window, (tuple, list)):
        requirement = "None or (left, right), each None or an int"
        fail(function, "window", requirement, repr(window), TypeError)
    if len(window) != 2:
        fail(function, "window", "(left, right)", f"{len(window)} entries")
    left, right = (
        -1 if side is None else integer(function, f"window's {name} side", side, low=0)
        for name, side in zip(("left", "right"), window, strict=True)
    )
    return left, right


def is_integer(x: object) -> bool:
    """Whether x is an int (of Python, numpy or a traced size) and not a bool."""
    return isinstance(x, (int, torch.SymInt, numbers.Integral)) and not isinstance(x, bool)


def integer(function: str, name: str, x: Any, *, low: int) -> Any:
    """Return x as an int from ``low`` on."""
    if not is_integer(x):
        fail(function, name, "an int", repr(x), TypeError)
    if not low <= x <= MAX_POSITION:
        fail(function, name, f"from {low} to {MAX_POSITION}", x)
    return x if isinstance(x, (int, torch.SymInt)) else int(x)


def number(function: str, name: str, x: Any, low: float, high: float, requirement: str) -> float:
    """Return x as a float from ``low`` to ``high``."""
    numeric = isinstance(x, (float, int, torch.SymFloat, numbers.Real))
    if not numeric or isinstance(x, bool):
        fail(function, name, f"a number {requirement}", repr(x), TypeError)
    if not low <= x <= high:
        fail(function, name, f"a number {requirement}", x)
    return float(x)


def scale_factor(function: str, scale: Any) -> float:
    """``scale``, finite in fp32."""
    requirement = "that is finite in float32"
    return number(function, "scale", scale, -MAX_FP32, MAX_FP32, requirement)


def softcap_limit(function: str, softcap: Any) -> float:
    """``softcap``, finite and positive in fp32."""
    requirement = "above 0 and finite in float32, or None for no cap"
    return number(function, "softcap", softcap, MIN_FP32, MAX_FP32, requirement)


def flag(function: str, name: str, value: object, choices: tuple[object, ...]) -> None:
    """Check that a value is one of a few singletons."""
    if not any(value is choice for choice in choices):
        fail(function, name, " or ".join(map(str, choices)), repr(value), TypeError)


def choice(function: str, name: str, value: Any, choices: dict[Any, int]) -> int:
    """The number that stands for a value, among a few."""
    if not isinstance(value, (bool, str)):
        fail(function, name, f"one of {list(choices)}", repr(value), TypeError)
    if value not in choices:
        fail(function, name, f"one of {list(choices)}", repr(value))
    return choices[value]
