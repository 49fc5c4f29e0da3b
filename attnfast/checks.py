"""What a call may be: every argument checked once, and brought into the form that backends take.

Messages read ``function: name must be requirement, got value``. The wrong kind of thing is a TypeError,
a wrong shape, device or number a ValueError.
"""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .options import Inputs, Options

NAMES = ("q", "k", "v", "mask", "bias")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TOP_LEFT = "top_left"
ALIGNMENTS = {TOP_LEFT: False, "bottom_right": True}
STATS: dict[Any, int] = {False: 0, True: 1, "received": 2}
WEIGHTS: dict[Any, int] = {False: 0, "mean": 1, True: 2}
MAX_FP32 = 3.4028234663852886e38
MIN_FP32 = 1.1754943508222875e-38  # the smallest normal number
MAX_POSITION = 2**31 - 1  # of windows and offsets


class Sequences(NamedTuple):
    """What a varlen call has beside the arguments of a dense one."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


def attention_call(
    function: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    align: str | int | Tensor,
    scale: float | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    return_stats: bool | str,
    return_weights: bool | str,
    deterministic: bool | None,
    sequences: Sequences | None = None,
    names: tuple[str, ...] = NAMES,
) -> tuple[Inputs, Options]:
    """The canonical form of a call of ``attention``, or of ``varlen_attention`` with ``sequences``.

    ``function`` is the public function's name and ``names`` what it calls q, k, v, mask and bias, for
    messages; the others are its arguments.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or value.
    """
    q, k, v = check_tensors(function, q, k, v, names)
    cu_seqlens_q = cu_seqlens_k = None
    max_seqlen_q = max_seqlen_k = 0
    if sequences is None:
        B, H, T, D, S = dense_sizes(function, q, k, v, names)
    else:
        q, k, v, H, D = packed_heads(function, q, k, v)
        cu_seqlens_q = offsets(function, "cu_seqlens_q", sequences.cu_seqlens_q, q)
        cu_seqlens_k = offsets(function, "cu_seqlens_k", sequences.cu_seqlens_k, q)
        B = cu_seqlens_q.shape[0] - 1
        if cu_seqlens_k.shape[0] != B + 1:
            fail(
                function,
                "cu_seqlens_k",
                f"(sequences + 1,) = {(B + 1,)}",
                tuple(cu_seqlens_k.shape),
            )
        T = max_seqlen_q = integer(function, "max_seqlen_q", sequences.max_seqlen_q, low=0)
        S = max_seqlen_k = integer(function, "max_seqlen_k", sequences.max_seqlen_k, low=0)
    same_kind(function, q, k, v, names)

    if mask is not None or bias is not None:
        full = (B if sequences is None else 1, H, T, S)
        what = "(B, H, T, S)" if sequences is None else "(1, H, max_seqlen_q, max_seqlen_k)"
        if mask is not None:
            mask = mask_like(function, names[3], mask, q, full, what)
        if bias is not None:
            bias = bias_like(function, names[4], bias, q, full, what)
    if alibi_slopes is not None:
        alibi_slopes = slopes(function, alibi_slopes, q, B, H)
    if sinks is not None:
        sinks = sink_logits(function, sinks, q, H)
    if dropout_seed is not None:
        dropout_seed = seed(function, dropout_seed, q)

    align_tensor = None
    align_offset, bottom_right = 0, False
    if not isinstance(align, str) or align != TOP_LEFT:
        align_tensor, align_offset, bottom_right = alignment(function, align, q, B)
    window_left = window_right = -1
    if window is not None:
        window_left, window_right = window_sides(function, window)
    if causal is not True and causal is not False:
        fail(function, "causal", "True or False", causal, TypeError)
    if type(dropout_p) is not float or not 0 <= dropout_p <= 1:
        dropout_p = number(function, "dropout_p", dropout_p, 0.0, 1.0, "in [0, 1]")
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    elif deterministic is not True and deterministic is not False:
        fail(function, "deterministic", "None, True or False", deterministic, TypeError)

    return (
        Inputs(
            q,
            k,
            v,
            mask,
            bias,
            alibi_slopes,
            sinks,
            align_tensor,
            dropout_seed if dropout_p > 0 else None,
            cu_seqlens_q,
            cu_seqlens_k,
        ),
        Options(
            D**-0.5 if scale is None else scale_factor(function, scale),
            causal,
            window_left,
            window_right,
            align_offset,
            bottom_right,
            0.0 if softcap is None else softcap_limit(function, softcap),
            dropout_p,
            0
            if return_weights is False
            else choice(function, "return_weights", return_weights, WEIGHTS),
            0 if return_stats is False else choice(function, "return_stats", return_stats, STATS),
            deterministic,
            max_seqlen_q,
            max_seqlen_k,
        ),
    )


def decode_call(
    function: str,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    page_table: Tensor | None,
    scale: float | None,
    window: tuple[int | None, int | None] | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    bias: Tensor | None,
) -> tuple[tuple[Tensor | None, ...], Options]:
    """The canonical form of a call of ``decode_attention``: tensors in the operator's order, and options.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or value, or a gradient is asked for.
    """
    names = ("q", "k_cache", "v_cache")
    q, k_cache, v_cache = check_tensors(function, q, k_cache, v_cache, names)
    if page_table is None:
        B, H, T, D, S = dense_sizes(function, q, k_cache, v_cache, names)
    else:
        B, H, T, D, page_size = paged_sizes(function, q, k_cache, v_cache)
        page_table = indices(function, "page_table", page_table, q, (B, None), "(B, n)")
        S = page_table.shape[1] * page_size
    same_kind(function, q, k_cache, v_cache, names)
    cache_seqlens = indices(function, "cache_seqlens", cache_seqlens, q, (B,), "(B,)")
    if bias is not None:
        bias = bias_like(function, "bias", bias, q, (B, H, T, S), "(B, H, T, S)")
    if alibi_slopes is not None:
        alibi_slopes = slopes(function, alibi_slopes, q, B, H)
    if sinks is not None:
        sinks = sink_logits(function, sinks, q, H)
    window_left = window_right = -1
    if window is not None:
        window_left, window_right = window_sides(function, window)
    if torch.is_grad_enabled():
        given = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "bias": bias, "sinks": sinks}
        for name, x in given.items():
            if x is not None and x.requires_grad:
                fail(
                    function,
                    name,
                    "without gradient, as decoding has none (detach it, or run under torch.no_grad())",
                    "requires_grad=True",
                )
    options = Options(
        D**-0.5 if scale is None else scale_factor(function, scale),
        True,
        window_left,
        window_right,
        softcap=0.0 if softcap is None else softcap_limit(function, softcap),
    )
    return (q, k_cache, v_cache, cache_seqlens, page_table, bias, alibi_slopes, sinks), options


def fail(
    function: str, name: str, requirement: str, got: object, error: type[Exception] = ValueError
) -> NoReturn:
    """Raise ``function: name must be requirement, got value``."""
    raise error(f"{function}: {name} must be {requirement}, got {got}")


def check_tensors(
    function: str, q: Tensor, k: Tensor, v: Tensor, names: tuple[str, ...] = NAMES
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v if they are strided tensors, in autocast's dtype where that is enabled."""
    for name, x in zip(names, (q, k, v), strict=False):
        if not isinstance(x, Tensor):
            fail(function, name, "a Tensor", type(x).__name__, TypeError)
        if x.layout is not torch.strided or x.is_nested:
            fail(function, name, "a dense strided Tensor", f"layout {x.layout}", TypeError)
    if torch._C._is_any_autocast_enabled():
        return autocast(q), autocast(k), autocast(v)
    return q, k, v


def autocast(x: Tensor) -> Tensor:
    """x in the autocast dtype of its device, by the rule of torch's own matrix products."""
    device = x.device.type
    eligible = x.is_floating_point() and x.dtype != torch.float64
    if eligible and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def dense_sizes(
    function: str, q: Tensor, k: Tensor, v: Tensor, names: tuple[str, ...] = NAMES
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


def packed_heads(
    function: str, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """(total, heads, D) tensors viewed as (1, heads, total, D), with H and D."""
    if q.dim() != 3:
        fail(function, "q", "(total_q, H, D)", tuple(q.shape))
    _, H, D = q.shape
    if k.dim() != 3 or k.shape[2] != D:
        fail(function, "k", f"(total_k, H_kv, D) = (*, *, {D})", tuple(k.shape))
    if v.dim() != 3 or v.shape[:2] != k.shape[:2]:
        total_k, H_kv, _ = k.shape
        fail(function, "v", f"(total_k, H_kv, D_v) = ({total_k}, {H_kv}, *)", tuple(v.shape))
    heads(function, NAMES, H, k.shape[1], D, v.shape[2])
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return q, k, v, H, D


def paged_sizes(
    function: str, q: Tensor, k_cache: Tensor, v_cache: Tensor
) -> tuple[int, int, int, int, int]:
    """B, H, T, D and the page size of (B, H, T, D) and pages (P, page, H_kv, D | D_v)."""
    if q.dim() != 4:
        fail(function, "q", "(B, H, T, D)", tuple(q.shape))
    B, H, T, D = q.shape
    if k_cache.dim() != 4 or k_cache.shape[3] != D or k_cache.shape[1] == 0:
        requirement = f"pages (P, page, H_kv, D) = (*, *, *, {D}), page >= 1"
        fail(function, "k_cache", requirement, tuple(k_cache.shape))
    pages, page_size, H_kv, _ = k_cache.shape
    if v_cache.dim() != 4 or v_cache.shape[:3] != k_cache.shape[:3]:
        requirement = f"pages (P, page, H_kv, D_v) = ({pages}, {page_size}, {H_kv}, *)"
        fail(function, "v_cache", requirement, tuple(v_cache.shape))
    heads(function, ("q", "k_cache", "v_cache"), H, H_kv, D, v_cache.shape[3])
    return B, H, T, D, page_size


def heads(function: str, names: tuple[str, ...], H: int, H_kv: int, D: int, D_v: int) -> None:
    """Check head counts and head dims."""
    if H < 1:
        fail(function, names[0], "of at least 1 head", f"H = {H}")
    if H_kv < 1 or H % H_kv:
        fail(function, names[1], f"of a number of heads that divides H = {H}", f"H_kv = {H_kv}")
    if D < 1:
        fail(function, names[0], "of head dim 1 or more", f"D = {D}")
    if D_v < 1:
        fail(function, names[2], "of head dim 1 or more", f"D_v = {D_v}")


def same_kind(
    function: str, q: Tensor, k: Tensor, v: Tensor, names: tuple[str, ...] = NAMES
) -> None:
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
    """x if it is a tensor on q's device."""
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
    """x with leading dimensions of size 1 up to four, if it broadcasts to the scores' sizes."""
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
    if x.requires_grad and torch.is_grad_enabled():
        requirement = "without gradient, as there is none by the slopes (detach it; a bias has one)"
        fail(function, "alibi_slopes", requirement, "requires_grad=True")
    return (x if x.dim() == 2 else x[None]).contiguous()


def sink_logits(function: str, x: Tensor, q: Tensor, H: int) -> Tensor:
    """Sinks (H,)."""
    x = on_device(function, "sinks", x, q, "a Tensor (H,)")
    if x.dtype not in DTYPES:
        fail(function, "sinks", "float32, bfloat16, float16 or float64", x.dtype, TypeError)
    if x.shape != (H,):
        fail(function, "sinks", f"(H,) = ({H},)", tuple(x.shape))
    return x.contiguous()


def seed(function: str, x: Tensor, q: Tensor) -> Tensor:
    """A dropout seed (2,) int64."""
    x = on_device(function, "dropout_seed", x, q, "an int64 Tensor (seed, offset)")
    if x.dtype is not torch.int64:
        fail(function, "dropout_seed", "int64", x.dtype, TypeError)
    if x.shape != (2,):
        fail(function, "dropout_seed", "(seed, offset), of shape (2,)", tuple(x.shape))
    return x.contiguous()


def indices(
    function: str, name: str, x: Tensor, q: Tensor, shape: tuple[int | None, ...], names: str
) -> Tensor:
    """An int32 tensor of a shape whose None may be anything; int64 is converted."""
    x = on_device(function, name, x, q, f"an int32 Tensor {names}")
    if x.dtype is not torch.int32 and x.dtype is not torch.int64:
        fail(function, name, "int32", x.dtype, TypeError)
    if x.dim() != len(shape) or any(
        size != whole for size, whole in zip(x.shape, shape, strict=True) if whole is not None
    ):
        sizes = ", ".join("*" if size is None else str(size) for size in shape)
        fail(function, name, f"{names} = ({sizes}{',' * (len(shape) == 1)})", tuple(x.shape))
    return x.to(torch.int32).contiguous()


def offsets(function: str, name: str, x: Tensor, q: Tensor) -> Tensor:
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


def integer(function: str, name: str, x: Any, *, low: int) -> int:
    """x as an int from ``low`` on."""
    if not is_integer(x):
        fail(function, name, "an int", repr(x), TypeError)
    if not low <= x <= MAX_POSITION:
        fail(function, name, f"from {low} to {MAX_POSITION}", x)
    return x if isinstance(x, (int, torch.SymInt)) else int(x)


def number(function: str, name: str, x: Any, low: float, high: float, requirement: str) -> float:
    """x as a float from ``low`` to ``high``."""
    if isinstance(x, bool) or not isinstance(x, (float, int, torch.SymFloat, numbers.Real)):
        fail(function, name, f"a number {requirement}", repr(x), TypeError)
    if not low <= x <= high:
        fail(function, name, f"a number {requirement}", x)
    return x if isinstance(x, torch.SymFloat) else float(x)


def scale_factor(function: str, scale: Any) -> float:
    """``scale``, finite in fp32."""
    return number(function, "scale", scale, -MAX_FP32, MAX_FP32, "that is finite in float32")


def softcap_limit(function: str, softcap: Any) -> float:
    """``softcap``, finite and positive in fp32."""
    requirement = "above 0 and finite in float32, or None for no cap"
    return number(function, "softcap", softcap, MIN_FP32, MAX_FP32, requirement)


def choice(function: str, name: str, value: Any, choices: dict[Any, int]) -> int:
    """The number that stands for a value, among a few."""
    if not isinstance(value, (bool, str)):
        fail(function, name, f"one of {list(choices)}", repr(value), TypeError)
    if value not in choices:
        fail(function, name, f"one of {list(choices)}", repr(value))
    return choices[value]


def sequence_values(function: str, inputs: Inputs, options: Options) -> None:
    """Check the values of cu_seqlens, where no operator does."""
    for name, ends, total, longest in (
        ("q", inputs.cu_seqlens_q, inputs.q.shape[2], options.max_seqlen_q),
        ("k", inputs.cu_seqlens_k, inputs.k.shape[2], options.max_seqlen_k),
    ):
        values = ends.tolist()
        lengths = [end - start for start, end in zip(values[:-1], values[1:], strict=True)]
        if values[0] != 0:
            fail(function, f"cu_seqlens_{name}[0]", "0", values[0])
        if any(length < 0 for length in lengths):
            fail(function, f"cu_seqlens_{name}", "non-decreasing", values)
        if values[-1] > total:
            fail(function, f"cu_seqlens_{name}[-1]", f"at most total_{name} = {total}", values[-1])
        if lengths and max(lengths) > longest:
            requirement = f"at least the longest sequence, {max(lengths)}"
            fail(function, f"max_seqlen_{name}", requirement, longest)


def cache_values(
    function: str,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    page_table: Tensor | None,
) -> None:
    """Check the values of cache_seqlens and page_table, where no operator does."""
    lengths = cache_seqlens.tolist()
    S = k_cache.shape[2] if page_table is None else page_table.shape[1] * k_cache.shape[1]
    for b, length in enumerate(lengths):
        if not 0 <= length <= S:
            fail(function, f"cache_seqlens[{b}]", f"from 0 to the cache's length {S}", length)
    if page_table is not None:
        pages, page_size = k_cache.shape[:2]
        for b, (length, row) in enumerate(zip(lengths, page_table.tolist(), strict=True)):
            for i, page in enumerate(row[: -(-length // page_size)]):
                if not 0 <= page < pages:
                    requirement = f"from 0 to P - 1 = {pages - 1}"
                    fail(function, f"page_table[{b}, {i}]", requirement, page)


def value_error(function: str, error: RuntimeError) -> Exception:
    """A native operator's complaint about values as a ValueError; any other error as it is."""
    for line in str(error).splitlines():
        for prefix in ("varlen_attention: ", "decode_attention: ", "attention: "):
            if line.startswith(prefix):
                return ValueError(f"{function}: {line.removeprefix(prefix)}")
    return error
