"""What a call may be: every argument checked once, and brought into the form that backends take.

The wrong kind of thing is a TypeError, a wrong shape, device or number a ValueError;
requirements.py has each requirement and its message.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from . import requirements as require
from .block_index import dense
from .block_mask import BlockMask
from .call import DecodeInputs, DecodeOptions, Inputs, Options, Sequences
from .flex_mask import from_flex, is_block_mask
from .reference import autocast_available
from .requirements import fail
from .sizes import assume_shape, certain
from .subclasses import PLAIN, is_causal_bias, is_dtensor

NAMES = ("q", "k", "v", "mask", "bias")
CACHE_NAMES = ("q", "k_cache", "v_cache")
COMPLAINT = re.compile(r"\b(?:decode_)?attention: (\w+) (must .*)")  # native code's of a value
STATS: dict[Any, int] = {False: 0, True: 1, "received": 2}
WEIGHTS: dict[Any, int] = {False: 0, "mean": 1, True: 2}
NO_BLOCKS: tuple[Tensor | None, ...] = (None, None, None)
ORDINARY = (*PLAIN, BlockMask, type(None))  # types of most masks and biases


def attention_call(
    function: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    bias: Tensor | None,
    causal: bool,
    window: tuple[int | None, int | None] | Tensor | None,
    align: str | int | Tensor,
    scores: tuple[float | None, ...],
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    return_stats: bool | str,
    return_weights: bool | str,
    deterministic: bool | None,
    sequences: Sequences | None = None,
    names: tuple[str, ...] = NAMES,
    indices: Tensor | None = None,
) -> tuple[Inputs, Options]:
    """The canonical form of a call of ``attention``, or of ``varlen_attention`` with ``sequences``.

    ``function`` is the public function's name and ``names`` what it calls q, k, v, mask and bias,
    for messages; ``scores`` are its `SCORE_OPTIONS`, and the others are its arguments.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or value.
    """
    require.qkv_tensors(function, names, q, k, v)
    if torch.compiler.is_compiling():
        assume_sizes(q, k, v, align, alibi_slopes, sequences, indices=indices)
    q, k, v = autocast(function, names, q, k, v)
    cu_seqlens_q = cu_seqlens_k = None
    max_seqlen_q = max_seqlen_k = 0
    if sequences is None:
        B, H, T, D, S = require.dense_sizes(function, names, q, k, v)
    else:
        H, D = require.packed_sizes(function, names, q, k, v)
        cu_seqlens_q = require.boundaries(function, "cu_seqlens_q", sequences.cu_seqlens_q, q)
        cu_seqlens_k = require.boundaries(function, "cu_seqlens_k", sequences.cu_seqlens_k, q)
        B = cu_seqlens_q.shape[0] - 1
        if cu_seqlens_k.shape[0] != cu_seqlens_q.shape[0]:
            requirement = f"as long as cu_seqlens_q, {B + 1}"
            fail(function, "cu_seqlens_k", requirement, cu_seqlens_k.shape[0])
        T = max_seqlen_q = require.longest(function, "max_seqlen_q", sequences.max_seqlen_q)
        S = max_seqlen_k = require.longest(function, "max_seqlen_k", sequences.max_seqlen_k)
    require.same_kind(function, names, q, k, v)
    q, k, v = (
        dense_rows(q, function, names[0]),
        dense_rows(k, function, names[1]),
        dense_rows(v, function, names[2]),
    )

    bool_mask, blocks = None, NO_BLOCKS
    if mask is not None or bias is not None:
        if sequences is None and not (type(mask) in ORDINARY and type(bias) in ORDINARY):
            aligned = not isinstance(align, str) or align != "top_left"
            by_position = aligned or window is not None or alibi_slopes is not None
            for name, x in zip(names[3:], (mask, bias), strict=True):
                if is_causal_bias(x):
                    align = require.causal_bias(function, name, x, T, S, causal, by_position)
                    causal, by_position = True, True
            mask, bias = (None if is_causal_bias(x) else x for x in (mask, bias))
        full = (B if sequences is None else 1, H, T, S)
        what = "(B, H, T, S)" if sequences is None else "(1, H, max_seqlen_q, max_seqlen_k)"
        if mask is not None and type(mask) not in PLAIN and is_block_mask(mask):
            blocks = block_mask(function, names[3], mask, q, (B, H, T, S))
        elif mask is not None:
            bool_mask = require.mask_like(function, names[3], mask, q, full, what)
        if bias is not None:
            bias = require.bias_like(function, names[4], bias, q, full, what)
    if alibi_slopes is not None:
        alibi_slopes = require.slopes(function, alibi_slopes, q, B, H)
    if sinks is not None:
        sinks = require.sink_logits(function, sinks, q, H)
    if dropout_seed is not None:
        dropout_seed = require.seed(function, dropout_seed, q)
    if indices is not None:
        indices = require.chosen_keys(function, indices, q, k.shape[1])

    align_tensor, align_offset, bottom_right = None, 0, False
    if not isinstance(align, str) or align != "top_left":
        align_tensor, align_offset, bottom_right = require.alignment(function, align, q, B)
    windows, window_left, window_right = None, -1, -1
    if window is not None:
        windows, window_left, window_right = require.window(function, window, q, H)
    if causal is not False:
        require.flag(function, "causal", causal, (True, False))
    if type(dropout_p) is not float or dropout_p != 0.0:
        dropout_p = require.number(function, "dropout_p", dropout_p, 0.0, 1.0, "in [0, 1]")
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    else:
        require.flag(function, "deterministic", deterministic, (None, True, False))
    weights = stats = 0
    if return_weights is not False:
        weights = require.choice(function, "return_weights", return_weights, WEIGHTS)
    if return_stats is not False:
        stats = require.choice(function, "return_stats", return_stats, STATS)
    if indices is not None:
        others = {names[3]: mask, names[4]: bias, "alibi_slopes": alibi_slopes}
        require.alone_with_indices(function, others, dropout_p, return_stats, return_weights)
        require.one_window(function, windows)

    if sequences is not None:
        q, k, v = (
            require.view(function, name, x, None).transpose(1, 2)
            for name, x in zip(names, (q, k, v), strict=False)
        )
    return (
        Inputs._make(  # by position: names would cost a microsecond
            (
                q,
                k,
                v,
                bool_mask,
                bias,
                alibi_slopes,
                sinks,
                align_tensor,
                dropout_seed,
                cu_seqlens_q,
                cu_seqlens_k,
                indices,
                windows,
                *blocks,
            )
        ),
        Options(
            *require.score_options(function, D, scores),
            causal,
            window_left,
            window_right,
            align_offset,
            bottom_right,
            dropout_p,
            weights,
            stats,
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
    window: tuple[int | None, int | None] | Tensor | None,
    scores: tuple[float | None, ...],
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    mask: Any,
    return_received: bool = False,
) -> tuple[DecodeInputs, DecodeOptions]:
    """The canonical form of a call of ``decode_attention``.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or value, or requires a gradient.
    """
    require.qkv_tensors(function, CACHE_NAMES, q, k_cache, v_cache)
    if torch.compiler.is_compiling():
        assume_sizes(q, k_cache, v_cache, cache_seqlens, alibi_slopes, page_table=page_table)
    q, k_cache, v_cache = autocast(function, CACHE_NAMES, q, k_cache, v_cache)
    if page_table is None:
        B, H, T, D, S = require.dense_sizes(function, CACHE_NAMES, q, k_cache, v_cache)
    else:
        table = (q.shape[0] if q.dim() else None, None)
        page_table = require.indices(function, "page_table", page_table, q, table, "(B, n)")
        B, H, T, D, page_size = require.paged_sizes(function, CACHE_NAMES, q, k_cache, v_cache)
        S = page_table.shape[1] * page_size
    require.same_kind(function, CACHE_NAMES, q, k_cache, v_cache)
    cache_seqlens = require.indices(function, "cache_seqlens", cache_seqlens, q, (B,), "(B,)")
    if bias is not None:
        bias = require.bias_like(function, "bias", bias, q, (B, H, T, S), "(B, H, T, S)")
    if mask is not None and is_block_mask(mask):
        starts, index, bits = block_mask(function, "mask", mask, q, (B, H, T, T))
        mask = dense(starts, index, bits, slice(0, T), T)
    elif mask is not None:
        mask = require.mask_like(function, "mask", mask, q, (B, H, T, T), "(B, H, T, T)")
    if alibi_slopes is not None:
        alibi_slopes = require.slopes(function, alibi_slopes, q, B, H)
    if sinks is not None:
        sinks = require.sink_logits(function, sinks, q, H)
    windows, window_left, window_right = None, -1, -1
    if window is not None:
        windows, window_left, window_right = require.window(function, window, q, H)
    if torch.is_grad_enabled():
        given = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "bias": bias, "sinks": sinks}
        for name, x in given.items():
            if x is not None:
                why = "decoding has none (detach it, or run under torch.no_grad())"
                require.without_gradient(function, name, x, why)
    numbers = require.score_options(function, D, scores)
    if return_received is not False:
        require.flag(function, "return_received", return_received, (True, False))
    options = DecodeOptions(*numbers, window_left, window_right, return_received)
    inputs = DecodeInputs(  # by position: names would cost a microsecond
        dense_rows(q, function, "q"),
        dense_rows(k_cache, function, "k_cache"),
        dense_rows(v_cache, function, "v_cache"),
        cache_seqlens,
        page_table,
        bias,
        alibi_slopes,
        sinks,
        mask,
        windows,
    )
    return inputs, options


def block_mask(
    function: str, name: str, mask: Any, q: Tensor, full: tuple[int, int, int, int]
) -> tuple[Tensor, ...]:
    """The tensors of a `BlockMask`, or of torch's, that fits the scores; varlen: of sequences."""
    mask = mask if type(mask) is BlockMask else from_flex(mask)
    if not require.fits(mask.shape[:2], full[:2]) or any(
        certain(size != whole) for size, whole in zip(mask.shape[2:], full[2:], strict=True)
    ):
        fail(function, name, f"a BlockMask that broadcasts to (B, H, T, S) = {full}", mask.shape)
    if mask.device != q.device:
        fail(function, name, f"on q's device, {q.device}", mask.device)
    return replicated((mask.starts, mask.index, mask.bits), q)


def replicated(tensors: tuple[Tensor, ...], like: Tensor) -> tuple[Tensor, ...]:
    """Tensors that every process has whole, as DTensors where ``like`` is one."""
    if type(like) in PLAIN or not is_dtensor(like):
        return tensors
    from torch.distributed.tensor import DTensor, Replicate

    mesh: Any = getattr(like, "device_mesh")  # noqa: B009 - a DTensor's, not a Tensor's
    everywhere = [Replicate()] * mesh.ndim
    return tuple(DTensor.from_local(x, mesh, everywhere, run_check=False) for x in tensors)


def assume_sizes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    per_entry: object,
    alibi_slopes: object,
    sequences: Sequences | None = None,
    page_table: object = None,
    indices: object = None,
) -> None:
    """Have a traced program check when it runs which sizes are equal, where it leaves some open.

    ``per_entry`` has one element per batch entry or sequence: align, or cache_seqlens.
    """
    if q.dim() < 3 or k.dim() != (3 if sequences is not None else 4):
        return
    B, D = q.shape[0], q.shape[-1]
    assume_shape(v, *k.shape[:-1], None)
    if sequences is not None:
        ends_q, ends_k, *_ = sequences
        assume_shape(k, None, None, D)
        if isinstance(ends_q, Tensor) and ends_q.dim() == 1:
            assume_shape(ends_k, ends_q.shape[0])
            B = ends_q.shape[0] - 1
    elif page_table is not None:
        assume_shape(k, None, None, None, D)
        assume_shape(page_table, B, None)
    else:
        assume_shape(k, B, None, None, D)
    assume_shape(indices, B, q.shape[-2], None)
    assume_shape(indices, B, k.shape[1], q.shape[-2], None)
    assume_shape(per_entry, B)
    assume_shape(alibi_slopes, B, None)


def autocast(function: str, names: tuple[str, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in the autocast dtype of their device, by the rule of torch's own matrix products."""
    if not torch._C._is_any_autocast_enabled():
        return tensors
    device = tensors[0].device.type
    if not (autocast_available(device) and torch.is_autocast_enabled(device)):
        return tensors
    for name, x in zip(names, tensors, strict=False):
        require.memory(function, name, x)
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x.to(dtype) if x.is_floating_point() and x.dtype is not torch.float64 else x
        for x in tensors
    )


def dense_rows(x: Tensor, function: str = "attention", name: str = "a gradient") -> Tensor:
    """Return x with stride 1 in its last dimension, copied only if it is not."""
    if x.stride(-1) == 1 or x.shape[-1] == 1:
        return x
    require.memory(function, name, x)
    return x.contiguous()


def contiguous(x: Tensor | None) -> Tensor | None:
    """X without gaps, copied only if it has any."""
    return None if x is None else x.contiguous()


def memory(function: str, inputs: Inputs | DecodeInputs, names: tuple[str, ...] = NAMES) -> None:
    """Check that every tensor has its memory, where no operator does."""
    called = dict(zip(NAMES, names, strict=True))
    for field, x in zip(inputs._fields, inputs, strict=True):
        if x is not None:
            require.memory(function, called.get(field, field), x)


def sequence_values(function: str, inputs: Inputs, options: Options) -> None:
    """Check the values of cu_seqlens and max_seqlen, where no operator does."""
    assert inputs.cu_seqlens_q is not None
    assert inputs.cu_seqlens_k is not None
    for side, boundaries, total, longest in (
        ("q", inputs.cu_seqlens_q, inputs.q.shape[2], options.max_seqlen_q),
        ("k", inputs.cu_seqlens_k, inputs.k.shape[2], options.max_seqlen_k),
    ):
        name, ends = f"cu_seqlens_{side}", boundaries.tolist()
        if ends[0] != 0:
            raise ValueError(f"{function}: {name} must start with 0, got {ends[0]}")
        for i in range(1, len(ends)):
            if ends[i] < ends[i - 1]:
                got = f"{ends[i]} after {ends[i - 1]} at index {i}"
                raise ValueError(f"{function}: {name} must not decrease, got {got}")
        if ends[-1] > total:
            where = f"within the {total} rows of {side}"
            raise ValueError(f"{function}: {name} must end {where}, got {ends[-1]}")
        length = max((ends[i] - ends[i - 1] for i in range(1, len(ends))), default=0)
        if length > longest:
            requirement = f"at least the longest sequence ({length})"
            fail(function, f"max_seqlen_{side}", requirement, longest)


def index_values(function: str, inputs: Inputs) -> None:
    """Check the values of indices, where no operator does."""
    indices, S = inputs.indices, inputs.k.shape[2]
    assert indices is not None
    if torch.compiler.is_compiling():  # the reference takes what is outside for no key
        return
    outside = ((indices < -1) | (indices >= S)).nonzero()
    if len(outside):
        b, h, t, j = outside[0].tolist()
        where = f"{int(indices[b, h, t, j])} for query {t} of batch entry {b}"
        raise ValueError(f"{function}: indices must lie in [-1, {S}), got {where}")


def window_values(function: str, windows: Tensor | None) -> None:
    """Check the values of each head's window, where no operator does."""
    if windows is None or torch.compiler.is_compiling():  # less than -1 is unbounded too
        return
    outside = (windows < -1).nonzero()
    if len(outside):
        h, side = outside[0].tolist()
        where = f"{int(windows[h, side])} for head {h}"
        raise ValueError(f"{function}: window must hold -1, for no bound, or more, got {where}")


def cache_values(function: str, inputs: DecodeInputs) -> None:
    """Check the values of cache_seqlens and page_table, where no operator does."""
    pages, page_size, _, _ = inputs.k_cache.shape
    table = None if inputs.page_table is None else inputs.page_table.tolist()
    S = inputs.k_cache.shape[2]
    if inputs.page_table is not None:
        S = inputs.page_table.shape[1] * page_size
    for b, length in enumerate(inputs.cache_seqlens.tolist()):
        if not 0 <= length <= S:
            requirement = f"lie in [0, {S}], the capacity of the cache, got {length} at index {b}"
            raise ValueError(f"{function}: cache_seqlens must {requirement}")
        used = [] if table is None else table[b][: -(-length // page_size)]
        for i, page in enumerate(used):
            if not 0 <= page < pages:
                requirement = f"hold pages in [0, {pages}), got {page} at ({b}, {i})"
                raise ValueError(f"{function}: page_table must {requirement}")


def complaint(
    function: str, error: RuntimeError, names: tuple[str, ...] = NAMES
) -> ValueError | None:
    """A native operator's complaint about an argument's values; None if it is another error.

    A launch that fails, memory that runs out: those are no fault of an argument's, and stay what
    they are.
    """
    found = COMPLAINT.search(str(error))
    if found is None or type(error) is not RuntimeError:
        return None
    name, rest = found.groups()
    return ValueError(f"{function}: {dict(zip(NAMES, names, strict=True)).get(name, name)} {rest}")
