"""The single requirements of arguments; checks.py says which call has which.

Each function takes the public function's name first, for the message, and raises
``function: name must be requirement, got value``.
"""

from __future__ import annotations

import numbers
import os
from typing import Any, NoReturn

import torch
from torch import Tensor

from .sizes import certain
from .subclasses import LAZY, PLAIN, is_at_hand, is_lower_right, refusal

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ALIGNMENTS = {"top_left": False, "bottom_right": True}
MAX_FP32 = 3.4028234663852886e38
MIN_FP32 = 1.1754943508222875e-38  # the smallest normal number
MAX_POSITION = 2**31 - 1  # of windows and lengths
MAX_OFFSET = 2**29  # of align; with up to 2**28 rows no sum of positions leaves 32 bits
OTHER_NAMES = {  # torch's and flash-attn's, by what is to be given instead
    "attn_mask": "given as mask= (bool, True = attend) or bias= (float, added to the scores)",
    "attn_bias": "given as bias=",
    "key_padding_mask": "given as mask=~key_padding_mask[:, None, None]",
    "is_causal": "given as causal=",
    "dropout": "given as dropout_p=",
    "softmax_scale": "given as scale=",
    "window_size": "given as window=(left, right), None where it is unbounded",
    "s_aux": "given as sinks=",
    "enable_gqa": "left out: keys may always have fewer heads",
    "need_weights": "given as return_weights=",
    "return_attn_probs": "given as return_weights= or return_lse=",
    "return_softmax_lse": "given as return_lse=",
    "block_table": "given as page_table=",
    "indices": "left out: only attention() takes them, for sequences of one length",
}
INT32 = torch.iinfo(torch.int32)


def fail(
    function: str, name: str, requirement: str, got: object, error: type[Exception] = ValueError
) -> NoReturn:
    """Raise ``function: name must be requirement, got value``."""
    raise error(f"{function}: {name} must be {requirement}, got {got}")


def nothing_else(function: str, arguments: dict[str, Any]) -> NoReturn:
    """Refuse keywords that a function does not have; those of torch and flash-attn by ours."""
    name = next(iter(arguments))
    if name not in OTHER_NAMES:
        raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
    fail(function, name, OTHER_NAMES[name], f"{name}=", TypeError)


def environment(name: str, *choices: str) -> str:
    """An environment variable's value, one of a few or "" where it is not set."""
    value = os.environ.get(name, "")
    if value and value not in choices:
        fail("attnfast", name, " or ".join(map(repr, choices)), repr(value))
    return value


def shown(x: object) -> str:
    """A value in a few words on one line: of an array its type and shape, never its values."""
    if isinstance(x, Tensor) and (x.is_nested or isinstance(x, LAZY)):
        return type(x).__name__
    if isinstance(x, Tensor) or (hasattr(x, "__array__") and not isinstance(x, numbers.Number)):
        return f"{type(x).__name__} of shape {tuple(getattr(x, 'shape', ()))}"
    text = " ".join(repr(x).split())
    return text if len(text) <= 60 else f"{text[:56]} ..."


def tensor(function: str, name: str, x: Any, what: str = "a Tensor") -> Tensor:
    """Return x if it is a dense strided tensor."""
    if type(x) not in PLAIN:
        if not isinstance(x, Tensor):
            fail(function, name, what, type(x).__name__, TypeError)
        reason = refusal(x)
        if reason is not None:
            fail(function, name, reason, type(x).__name__, TypeError)
    if x.layout is not torch.strided or x.is_nested:
        got = "a nested one" if x.layout is torch.strided else f"layout {x.layout}"
        fail(function, name, "a dense strided Tensor", got, TypeError)
    checked: Tensor = x
    return checked


def memory(function: str, name: str, x: Tensor) -> None:
    """Check that x's memory was not given back, before torch reads it; kernels look themselves."""
    if type(x) not in PLAIN or torch.compiler.is_compiling() or not torch._C._has_storage(x):
        return
    if x.is_contiguous():
        elements = x.numel()
    else:
        elements = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    size = x.untyped_storage().nbytes()
    if size < (x.storage_offset() + elements) * x.element_size() and x.numel():
        fail(function, name, "in memory", f"a storage of {size} bytes")


def view(function: str, name: str, x: Tensor, *index: Any) -> Tensor:
    """Return x[index]; torch makes no views of a tensor without its memory, nor names it."""
    try:
        return x[index]
    except RuntimeError:
        if type(x) in PLAIN and not torch.compiler.is_compiling():
            size = x.untyped_storage().nbytes()
            fail(function, name, "in memory", f"a storage of {size} bytes")
        raise


def qkv_tensors(function: str, names: tuple[str, ...], *tensors: object) -> None:
    """Check that q, k and v are dense strided tensors."""
    for name, x in zip(names, tensors, strict=False):
        tensor(function, name, x)


def dense_sizes(
    function: str, names: tuple[str, ...], q: Tensor, k: Tensor, v: Tensor
) -> tuple[int, int, int, int, int]:
    """B, H, T, D and S of (B, H, T, D), (B, H_kv, S, D) and (B, H_kv, S, D_v)."""
    of_q, of_k, of_v = q.shape, k.shape, v.shape
    if len(of_q) != 4:
        fail(function, names[0], "(B, H, T, D)", tuple(of_q))
    B, H, T, D = of_q
    if len(of_k) != 4 or of_k[0] != B or of_k[3] != D:
        fail(function, names[1], f"(B, H_kv, S, D) = ({B}, *, *, {D})", tuple(of_k))
    _, H_kv, S, _ = of_k
    if len(of_v) != 4 or of_v[:3] != of_k[:3]:
        fail(function, names[2], f"(B, H_kv, S, D_v) = ({B}, {H_kv}, {S}, *)", tuple(of_v))
    heads(function, names, H, H_kv, D, of_v[3], (T, S))
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


def heads(
    function: str,
    names: tuple[str, ...],
    H: int,
    H_kv: int,
    D: int,
    D_v: int,
    lengths: tuple[int, int] | None = None,
) -> None:
    """Check head counts and head dims; lengths T and S, if they could be them, are pointed out."""
    if H < 1:
        fail(function, names[0], "of 1 head or more", f"H = {H}")
    if H_kv < 1 or H % H_kv:
        got = f"H_kv = {H_kv}"
        if lengths is not None and lengths[1] > 0 and lengths[0] % lengths[1] == 0:
            swapped = ", ".join(f"{name}.transpose(1, 2)" for name in names[:3])
            got += f": if the tensors are (B, T, H, D), give {swapped}"
        fail(function, names[1], f"of a number of heads that divides H = {H}", got)
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
    x = tensor(function, name, x, what)
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
    if dims > 4 or not fits(x.shape, full[4 - dims :]):
        sizes = f"({', '.join(map(str, full))})"
        fail(function, name, f"broadcastable to {what} = {sizes}", tuple(x.shape))
    return x if dims == 4 else view(function, name, x, *(None,) * (4 - dims))


def fits(shape: tuple[int, ...], full: tuple[int, ...]) -> bool:
    """Whether every size is 1 or the scores'."""
    pairs = zip(shape, full, strict=True)
    if torch.compiler.is_compiling():
        return not any(certain(size != 1) and certain(size != whole) for size, whole in pairs)
    return all(size == 1 or size == whole for size, whole in pairs)


def causal_bias(
    function: str, name: str, bias: Any, T: int, S: int, causal: object, by_position: bool
) -> str:
    """The align with which ``causal=True`` is what a ``CausalBias`` says.

    ``by_position``: whether other arguments (align, window, ALiBi) count positions too.
    """
    if (bias.seq_len_q, bias.seq_len_kv) != (T, S):
        got = f"one for ({bias.seq_len_q}, {bias.seq_len_kv})"
        fail(function, name, f"a CausalBias for (T, S) = ({T}, {S})", got)
    if causal is not False or by_position:
        requirement = "a Tensor or None with causal, align, window or alibi_slopes"
        fail(function, name, requirement, "a CausalBias, which has an alignment of its own")
    return "bottom_right" if is_lower_right(bias) else "top_left"


def slopes(function: str, x: Tensor, q: Tensor, B: int, H: int) -> Tensor:
    """ALiBi slopes as (1 | B, H) fp32."""
    x = on_device(function, "alibi_slopes", x, q, "a Tensor (H,) or (B, H)")
    if x.dtype is not torch.float32:
        fail(function, "alibi_slopes", "float32", x.dtype, TypeError)
    if not has_shape(x, H) and not has_shape(x, B, H):
        fail(function, "alibi_slopes", f"(H,) = ({H},) or (B, H) = ({B}, {H})", tuple(x.shape))
    without_gradient(function, "alibi_slopes", x, "slopes have none (detach them; a bias has one)")
    return x if x.dim() == 2 else view(function, "alibi_slopes", x, None)


def sink_logits(function: str, x: Tensor, q: Tensor, H: int) -> Tensor:
    """Sinks (H,)."""
    x = on_device(function, "sinks", x, q, "a Tensor (H,)")
    if x.dtype not in DTYPES:
        fail(function, "sinks", "float32, bfloat16, float16 or float64", x.dtype, TypeError)
    if not has_shape(x, H):
        fail(function, "sinks", f"(H,) = ({H},)", tuple(x.shape))
    return x


def has_shape(x: Tensor, *sizes: int) -> bool:
    """Whether x is of these sizes; the rank first, which tracing always knows."""
    return x.dim() == len(sizes) and x.shape == sizes


def without_gradient(function: str, name: str, x: Tensor, why: str) -> None:
    """Check that no gradient is asked for where there is none."""
    if x.requires_grad and torch.is_grad_enabled():
        fail(function, name, f"without gradient, as {why}", "requires_grad=True")


def seed(function: str, x: Tensor, q: Tensor) -> Tensor:
    """A dropout seed (2,) int64."""
    x = on_device(function, "dropout_seed", x, q, "an int64 Tensor (seed, offset)")
    if x.dtype is not torch.int64:
        fail(function, "dropout_seed", "int64", x.dtype, TypeError)
    if not has_shape(x, 2):
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
    return x if x.dtype is torch.int32 else narrowed(function, name, x)


def chosen_keys(function: str, x: Tensor, q: Tensor, H_kv: int) -> Tensor:
    """Indices as (B, 1 | H_kv, T, K) int32."""
    what = "(B, T, K) or (B, H_kv, T, K)"
    x = on_device(function, "indices", x, q, f"an int32 Tensor {what}")
    if x.dtype is not torch.int32 and x.dtype is not torch.int64:
        fail(function, "indices", "int32", x.dtype, TypeError)
    B, _, T, _ = q.shape
    if x.dim() not in (3, 4) or x.shape[:-1] not in ((B, T), (B, H_kv, T)):
        sizes = f"({B}, {T}, *) or ({B}, {H_kv}, {T}, *)"
        fail(function, "indices", f"{what} = {sizes}", tuple(x.shape))
    x = x if x.dtype is torch.int32 else narrowed(function, "indices", x)
    return x if x.dim() == 4 else view(function, "indices", x, slice(None), None)


def alone_with_indices(
    function: str,
    others: dict[str, Tensor | None],
    dropout_p: float,
    return_stats: bool | str,
    return_weights: bool | str,
) -> None:
    """Check that nothing is asked for that would take T x S numbers, or a walk over all keys."""
    for name, x in others.items():
        if x is not None:
            requirement = "None with indices, which alone say what a query attends"
            fail(function, name, requirement, f"a {type(x).__name__}")
    if dropout_p != 0.0:
        fail(function, "dropout_p", "0 with indices", shown(dropout_p))
    if return_stats == "received":
        requirement = "True or False with indices, whose kernels sum nothing by key in forward"
        fail(function, "return_stats", requirement, shown(return_stats))
    if return_weights is not False:
        requirement = "False with indices: weights are T x S numbers"
        fail(function, "return_weights", requirement, shown(return_weights))


def checks_values() -> bool:
    """Whether ``ATTNFAST_CHECK`` asks to look at lengths and pages on a GPU, and wait for it."""
    return environment("ATTNFAST_CHECK", "0", "1") == "1"


def narrowed(function: str, name: str, x: Tensor) -> Tensor:
    """An int64 tensor as int32.

    What does not fit raises if the values are at hand; else it is clamped, so that kernels see it
    out of range, instead of wrapping round.
    """
    memory(function, name, x)
    looks = x.is_cpu or checks_values()
    if looks and is_at_hand(x) and x.numel():
        for value in torch.stack(x.aminmax()).tolist():
            if not INT32.min <= value <= INT32.max:
                fail(function, name, f"from {INT32.min} to {INT32.max}", value)
    return x.clamp(INT32.min, INT32.max).to(torch.int32)


def boundaries(function: str, name: str, x: Tensor, q: Tensor) -> Tensor:
    """cu_seqlens (sequences + 1,) int32."""
    x = indices(function, name, x, q, (None,), "(sequences + 1,)")
    if certain(x.shape[0] < 1):
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
        fail(function, "align", requirement, shown(align), error)
    return None, integer(function, "align", align, low=-MAX_OFFSET, high=MAX_OFFSET), False


def window(function: str, window: object, q: Tensor, H: int) -> tuple[Tensor | None, int, int]:
    """``window`` as that of each head (H, 2) int32 or None, and two numbers for all heads."""
    if isinstance(window, Tensor):
        return indices(function, "window", window, q, (H, 2), "(H, 2)"), -1, -1
    return None, *window_sides(function, window)


def one_window(function: str, windows: Tensor | None) -> None:
    """Check that heads have no windows of their own, beside indices."""
    if windows is not None:
        requirement = (
            "(left, right) or None with indices, of which heads that share keys read one list"
        )
        fail(function, "window", requirement, "a Tensor")


def window_sides(function: str, window: object) -> tuple[int, int]:
    """``window`` as two numbers, -1 where it is unbounded."""
    if not isinstance(window, (tuple, list)):
        requirement = "None, (left, right), each None or an int, or an int32 Tensor (H, 2)"
        if is_integer(window):
            requirement += f", ({window}, {window}) or ({window}, 0) for example"
        fail(function, "window", requirement, shown(window), TypeError)
    if len(window) != 2:
        fail(function, "window", "(left, right)", f"{len(window)} entries")
    left, right = (
        -1
        if side is None
        else integer(function, f"window's {name} side", side, low=0, other=UNBOUNDED)
        for name, side in zip(("left", "right"), window, strict=True)
    )
    return left, right


UNBOUNDED = ", or None for no bound"


def is_integer(x: object) -> bool:
    """Whether x is an int (of Python, numpy or a traced size) and not a bool."""
    return isinstance(x, (int, torch.SymInt, numbers.Integral)) and not isinstance(x, bool)


def integer(
    function: str, name: str, x: Any, *, low: int, high: int = MAX_POSITION, other: str = ""
) -> Any:
    """Return x as an int from ``low`` to ``high``; ``other`` says what else may be meant."""
    if not is_integer(x):
        fail(function, name, "an int" + other, shown(x), TypeError)
    if certain((x < low) | (x > high)):
        fail(function, name, f"from {low} to {high}{other}", shown(x))
    return x if isinstance(x, (int, torch.SymInt)) else int(x)


def longest(function: str, name: str, x: Any) -> Any:
    """max_seqlen as an int; of a 0-d tensor, as it comes from ``lengths.max()``, its value."""
    if isinstance(x, Tensor) and x.dtype in (torch.int32, torch.int64) and x.dim() == 0:
        x = tensor(function, name, x)
        memory(function, name, x)
        x = x.item()
    return integer(function, name, x, low=0)


def number(function: str, name: str, x: Any, low: float, high: float, requirement: str) -> float:
    """Return x as a float from ``low`` to ``high``."""
    numeric = isinstance(x, (float, int, torch.SymFloat, numbers.Real))
    if not numeric or isinstance(x, bool):
        fail(function, name, f"a number {requirement}", shown(x), TypeError)
    if not low <= x <= high:
        fail(function, name, f"a number {requirement}", shown(x))
    return float(x)


def score_options(function: str, D: int, given: tuple[float | None, ...]) -> tuple[float, float]:
    """Those of `call.SCORE_OPTIONS`, as numbers."""
    scale, softcap = given
    return (
        D**-0.5 if scale is None else scale_factor(function, scale),
        0.0 if softcap is None else softcap_limit(function, softcap),
    )


def scale_factor(function: str, scale: Any) -> float:
    """``scale``, finite in fp32."""
    requirement = "that is finite in float32"
    return number(function, "scale", scale, -MAX_FP32, MAX_FP32, requirement)


def softcap_limit(function: str, softcap: Any) -> float:
    """``softcap``, finite and positive in fp32."""
    requirement = "above 0 and finite in float32, or None for no cap"
    return number(function, "softcap", softcap, MIN_FP32, MAX_FP32, requirement)


def truth(function: str, name: str, x: object) -> bool:
    """What ``if x`` would take it for."""
    try:
        return bool(x)
    except (RuntimeError, TypeError, ValueError):
        fail(function, name, "True or False", shown(x), TypeError)


def flag(function: str, name: str, value: object, choices: tuple[object, ...]) -> None:
    """Check that a value is one of a few singletons."""
    if not any(value is choice for choice in choices):
        fail(function, name, " or ".join(map(str, choices)), shown(value), TypeError)


def choice(function: str, name: str, value: Any, choices: dict[Any, int]) -> int:
    """The number that stands for a value, among a few."""
    if not isinstance(value, (bool, str)):
        fail(function, name, f"one of {list(choices)}", shown(value), TypeError)
    if value not in choices:
        fail(function, name, f"one of {list(choices)}", shown(value))
    return choices[value]
