"""The specification: every option of attention in plain, differentiable PyTorch.

    s   = softcap(scale * q k^T) + bias - slope * |j - t'|   -inf where t may not attend j
    lse = log(sum_j exp(s_j) + exp(sink))
    p   = exp(s - lse)
    out = (p * kept / (1 - dropout_p)) v

Every backend has to agree with this file, and second derivatives are taken through it. It holds all
T x S scores at once and runs on any device and dtype. docs/math.md derives the gradients that the
fused kernels compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from .block_index import with_dense_mask
from .call import (
    BY_DISTANCE,
    DISTANCES,
    LARGEST,
    DecodeInputs,
    DecodeOptions,
    DecodeOutputs,
    Inputs,
    Options,
    Outputs,
)
from .sizes import memory_order

NEG_INF = float("-inf")
AUTOCAST_DEVICES = frozenset(
    device
    for device in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "maia", "xla")
    if torch.amp.autocast_mode.is_autocast_available(device)
)


def reference_attention(
    inputs: Inputs,
    options: Options,
    *,
    row_start: int = 0,
    batch_start: int = 0,
    compute_dtype: torch.dtype | None = None,
) -> Outputs:
    """Attention with every option, in operations that autograd can differentiate at any order.

    Args:
        inputs: The tensors of the call, dense or varlen.
        options: Everything that is not a tensor.
        row_start: q (with mask and bias, where they have T rows) may be the rows of a larger dense
            call from this index on; positions and the dropout counter then use the index in that
            call. T is the slice's here, so the caller replaces ``align_bottom_right`` by
            ``align_offset = S - T`` of the whole call.
        batch_start: The same for batch entries, of which only the dropout counter takes note.
        compute_dtype: What everything is computed and ``out`` and ``weights`` are returned in. None
            computes in fp64 for fp64 inputs and in fp32 for all others, and returns q's dtype.

    Returns:
        ``Outputs``; ``lse``, ``stats`` and ``received`` are fp32, or fp64 where the computation is.
        Of the statistics only the entropy is differentiable. Query rows past the last sequence of a
        varlen call are rows without keys and without a sink.
    """
    inputs = _without_blocks(inputs, options)
    if inputs.cu_seqlens_q is not None:
        return _varlen(inputs, options, compute_dtype)
    q, k, v = inputs.q, inputs.k, inputs.v
    (B, H, T, _), S = q.shape, k.shape[2]
    dtype = compute_dtype or (torch.float64 if q.dtype == torch.float64 else torch.float32)
    stat_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    t = positions(inputs, options, row_start)
    distance = torch.arange(S, device=q.device) - t  # [B|1, 1, T, S]
    seen = allowed(inputs, options, distance)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
    # What no query may see is zeroed, because NaN and Inf there would survive as 0 * NaN.
    k, v = (torch.where(seen.any(-2)[..., None], x, 0) for x in (k, v))
    q = torch.where(seen.any(-1)[..., None], q, 0)
    # NaN in a query is added to its scores: ds^T q would take it to keys that it must not see.
    has_nan = q.isnan().any(-1, keepdim=True)
    poison = torch.where(has_nan, q, 0).sum(-1, keepdim=True)
    q = torch.where(has_nan, 0, q)

    with without_autocast(q.device.type):
        s = scores(q @ k.transpose(-2, -1), inputs, options, distance)
        s = (s + poison).masked_fill(~seen, NEG_INF)
        p, lse, entropy = probabilities(s, inputs.sinks)
        w = p
        if options.dropout_p > 0:
            assert inputs.dropout_seed is not None
            start = {"row_start": row_start, "batch_start": batch_start}
            kept = dropout_mask(inputs.dropout_seed, B, H, T, S, options.dropout_p, **start)
            w = torch.where(kept, p, 0) / (1 - options.dropout_p if options.dropout_p < 1 else 1)
        # Likewise the gradient of a query without keys, and NaN probabilities of unseen keys.
        out = torch.where(seen.any(-1, keepdim=True), torch.where(seen, w, 0) @ v, 0)

    stats = received = weights = None
    if options.stats:
        max_logit = F.pad(s.detach(), (0, 1), value=NEG_INF).amax(-1)
        reach = (p.detach() * distance.abs().to(dtype)).sum(-1)
        focus = F.pad(p.detach(), (0, 1)).amax(-1)
        stats = torch.stack([max_logit, entropy, reach, focus]).to(stat_dtype)
    if options.stats == 2:
        received = p.detach().sum(-2).to(stat_dtype)
    if options.weights:
        weights = (w.mean(1) if options.weights == 1 else w).to(compute_dtype or inputs.q.dtype)
    out = _ordered_like(out, inputs.q).to(compute_dtype or inputs.q.dtype)
    return Outputs(out, lse.to(stat_dtype), None, stats, received, weights)


def reference_decode(inputs: DecodeInputs, options: DecodeOptions) -> DecodeOutputs:
    """Attention of a few new queries over a cache: causal from t' = cache_seqlens[b] - T + t on.

    Slots of the cache past cache_seqlens, and entries of page_table, may hold anything, NaN
    included. With pages, S = n * page and page i of entry b is ``k_cache[page_table[b, i]]``.
    ``window_right`` is of no effect, because no key stands after t'.
    """
    k, v = inputs.k_cache, inputs.v_cache
    if inputs.page_table is not None:
        pages = inputs.page_table.long().clamp(0, k.shape[0] - 1)
        k, v = (x[pages].flatten(1, 2).transpose(1, 2) for x in (k, v))  # [B, H_kv, n * page, D]
    T = inputs.q.shape[2]
    first = inputs.cache_seqlens - T  # of the last T keys
    whole = inputs.as_inputs(k, v, align=first)
    if inputs.mask is not None:
        S = k.shape[2]
        place = torch.arange(S, device=k.device) - first.long().view(-1, 1, 1, 1)  # [B, 1, 1, S]
        of_last = inputs.mask.expand(-1, -1, T, T).expand(len(place), -1, -1, -1)
        at = place.clamp(0, max(T - 1, 0)).expand(-1, *of_last.shape[1:3], S)
        found = of_last.gather(3, at) if T else at > 0
        whole = whole._replace(mask=((place < 0) | found) & (place < T))
        if inputs.windows is not None:  # the mask decides to the right
            whole = whole._replace(windows=F.pad(inputs.windows[:, :1], (0, 1), value=-1))
    outputs = reference_attention(whole, options.as_options(inputs.mask is not None))
    received = outputs.received
    if received is not None:  # a row with NaN is NaN at the keys in the cache
        slots = torch.arange(k.shape[2], device=k.device)
        received = torch.where(slots < inputs.cache_seqlens.view(-1, 1, 1), received, 0)
    return DecodeOutputs(outputs.out, outputs.lse, received)


def reference_pooled(
    inputs: Inputs,
    options: Options,
    kind: int,
    rows: int,
    columns: int,
    tokens_q: Tensor | None = None,
    tokens_k: Tensor | None = None,
    real: Tensor | None = None,
    *,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Probabilities, before dropout, in few cells: see `Pooling`.

    Args:
        inputs: The tensors of the call, dense or varlen.
        options: Everything that is not a tensor; dropout is none.
        kind: MEAN, LARGEST or BY_DISTANCE.
        rows: Into how many rows the queries of each head and sequence are put.
        columns: Into how many columns the keys; with BY_DISTANCE these are DISTANCES.
        tokens_q: int32 ``(B, T)``, the token of each query, for the last column of BY_DISTANCE.
        tokens_k: int32 ``(B, S)``, the token of each key.
        real: Bool ``(B, H, T)``, the queries that count; of all others p is 0.
        compute_dtype: As for `reference_attention`.

    Returns:
        ``(B, H, rows, columns)``, of each sequence in varlen; fp32, or fp64 where the computation
        is.
    """
    dtype = compute_dtype or inputs.q.dtype
    dtype = torch.float64 if dtype == torch.float64 else torch.float32  # of the result
    inputs = _without_blocks(inputs, options)._replace(dropout_seed=None)
    if inputs.cu_seqlens_q is not None:
        parts = [inputs.q.new_zeros((0, inputs.q.shape[1], rows, columns), dtype=dtype)]
        for i, q_rows, k_rows in _sequences(inputs):
            sequence = _sequence(inputs, i, q_rows, k_rows)
            of_q = None if tokens_q is None else tokens_q[:, q_rows]
            of_k = None if tokens_k is None else tokens_k[:, k_rows]
            counted = None if real is None else real[:, :, q_rows]
            cells = (kind, rows, columns, of_q, of_k, counted)
            parts.append(reference_pooled(sequence, options, *cells, compute_dtype=compute_dtype))
        return torch.cat(parts)
    plain = options._replace(dropout_p=0.0, stats=0, weights=2)
    p = reference_attention(inputs, plain, compute_dtype=compute_dtype or dtype).weights
    assert p is not None
    if real is not None:
        p = torch.where(real[..., None], p, 0)
    if kind == BY_DISTANCE:
        p = _by_distance(p, positions(inputs, options), tokens_q, tokens_k)
        return _summed(p, 2, rows).to(dtype)
    if kind == LARGEST:
        return _largest(_largest(p, 2, rows), 3, columns).to(dtype)
    count = _summed(_summed(torch.ones_like(p[:1, :1]), 2, rows), 3, columns)
    return (_summed(_summed(p, 2, rows), 3, columns) / count.clamp(min=1)).to(dtype)


def _by_distance(p: Tensor, t: Tensor, tokens_q: Tensor | None, tokens_k: Tensor | None) -> Tensor:
    """The columns of BY_DISTANCE for every query, (B, H, T, DISTANCES); ``t`` as of `positions`."""
    S = p.shape[3]
    back = t - torch.arange(S, device=p.device)  # [B|1, 1, T, S]
    power = torch.frexp(back.double().abs())[1] - 1  # floor(log2 |d|)
    column = torch.where(back > 0, 33 + power, torch.where(back < 0, 31 - power, 32)).long()
    result = p.new_zeros((*p.shape[:3], DISTANCES)).scatter_add(3, column.expand(p.shape), p)
    result[..., 64:65] = p[..., :1].sum(3, keepdim=True)
    if tokens_q is not None and tokens_k is not None:
        same = (tokens_q[:, None, :, None] == tokens_k[:, None, None, :]) & (back != 0)
        result[..., 65] = torch.where(same, p, 0).sum(3)
    return result


def _summed(x: Tensor, dim: int, cells: int) -> Tensor:
    """Sums over what is in each of so many cells of a dimension."""
    shape = (*x.shape[:dim], cells, *x.shape[dim + 1 :])
    return x.new_zeros(shape).index_add(dim, _cell_of(x, dim, cells), x)


def _largest(x: Tensor, dim: int, cells: int) -> Tensor:
    """The largest of each cell, or 0."""
    shape = (*x.shape[:dim], cells, *x.shape[dim + 1 :])
    cell = _cell_of(x, dim, cells).view(-1, *[1] * (x.dim() - dim - 1)).expand(x.shape)
    return x.new_zeros(shape).scatter_reduce(dim, cell, x, "amax")


def _cell_of(x: Tensor, dim: int, cells: int) -> Tensor:
    """Of each place n of N in a dimension its cell, which begins at ``cell * N // cells``."""
    N = x.shape[dim]
    return ((torch.arange(N, device=x.device) + 1) * cells - 1) // max(N, 1)


def _without_blocks(inputs: Inputs, options: Options) -> Inputs:
    """The call with a block mask as a dense one."""
    if inputs.block_starts is None:
        return inputs
    if inputs.cu_seqlens_q is not None:
        return with_dense_mask(inputs, options.max_seqlen_q, options.max_seqlen_k)
    return with_dense_mask(inputs, inputs.q.shape[2], inputs.k.shape[2])


def positions(inputs: Inputs, options: Options, row_start: int = 0) -> Tensor:
    """t', where each query stands among the keys: t + align. int64 (B|1, 1, T, 1)."""
    q, k = inputs.q, inputs.k
    start = row_start + options.align_offset
    t = torch.arange(start, start + q.shape[2], device=q.device).view(1, 1, -1, 1)
    if options.align_bottom_right:
        t = t + (k.shape[2] - q.shape[2])
    return t if inputs.align is None else t + inputs.align.long().view(-1, 1, 1, 1)


def allowed(inputs: Inputs, options: Options, distance: Tensor) -> Tensor:
    """Which keys each query may attend, bool (B|1, H|1, T, S).

    Causal j <= t', window t' - left <= j <= t' + right (of all heads, or of this one), mask, bias
    above -inf, listed in indices: all must hold.
    ``distance`` is j - t', (B|1, 1, T, S).
    """
    seen = torch.ones_like(distance, dtype=torch.bool)
    if options.causal:
        seen = seen & (distance <= 0)
    if options.window_left >= 0:
        seen = seen & (distance >= -options.window_left)
    if options.window_right >= 0:
        seen = seen & (distance <= options.window_right)
    if inputs.windows is not None:
        left, right = inputs.windows.long()[..., None, None].unbind(1)  # [H, 1, 1]
        seen = seen & ((left < 0) | (distance >= -left)) & ((right < 0) | (distance <= right))
    if inputs.mask is not None:
        seen = seen & inputs.mask
    if inputs.bias is not None:
        seen = seen & (inputs.bias != NEG_INF)
    if inputs.indices is not None:
        seen = seen & chosen(inputs.indices, inputs.q.shape[1], distance.shape[-1])
    return seen


def chosen(indices: Tensor, H: int, S: int) -> Tensor:
    """Which keys the lists hold, bool (B, 1|H, T, S): each once; what is not in [0, S) is none."""
    keys = torch.where((indices < 0) | (indices >= S), S, indices).long()
    seen = torch.zeros(*keys.shape[:3], S + 1, dtype=torch.bool, device=keys.device)
    seen = seen.scatter(-1, keys, True)[..., :S]
    heads = keys.shape[1]
    return seen if heads == 1 else seen.repeat_interleave(H // heads, dim=1)


def scores(products: Tensor, inputs: Inputs, options: Options, distance: Tensor) -> Tensor:
    """Scores s = softcap(scale * products) + bias - slope * |j - t'|, not masked."""
    s = products * options.scale
    if options.softcap > 0:
        s = options.softcap * torch.tanh(s / options.softcap)
    if inputs.bias is not None:
        s = s + inputs.bias.to(s.dtype)
    if inputs.alibi_slopes is not None:
        s = s - inputs.alibi_slopes.to(s.dtype)[:, :, None, None] * distance.abs().to(s.dtype)
    return s


def probabilities(s: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax p of s over the keys and the sink, the log of its denominator, and its entropy.

    The sink is one more column, -inf where there is none. With m the largest score and
    l = sum(exp(s - m)), entropy = log l - sum(p (s - m)), which stays exact where s itself is huge.
    Rows of nothing but -inf are replaced by zeros before, and their results after, so that neither
    they nor their derivatives are ever NaN.

    Returns:
        p (B, H, T, S) without the sink's column, lse and entropy (B, H, T).
    """
    sink = s.new_full((1,), NEG_INF) if sinks is None else sinks.to(s.dtype)
    s = torch.cat([s, sink.view(1, -1, 1, 1).expand(*s.shape[:2], s.shape[2], 1)], dim=-1)
    finite = s != NEG_INF
    some = finite.any(-1, keepdim=True)
    s = torch.where(some, s, 0)
    m = s.detach().amax(-1, keepdim=True)
    z = s - m
    p = torch.where(some, torch.softmax(s, -1), 0)
    log_l = torch.logsumexp(z, -1)
    entropy = log_l - (p * torch.where(finite, z, 0)).sum(-1)
    some = some.squeeze(-1)
    lse = torch.where(some, m.squeeze(-1) + log_l, NEG_INF)
    return p[..., :-1], lse, torch.where(some, entropy, 0)


def dropout_mask(
    seed: Tensor,
    B: int,
    H: int,
    T: int,
    S: int,
    p: float,
    *,
    row_start: int = 0,
    batch_start: int = 0,
) -> Tensor:
    """Which probabilities dropout keeps, bool (B, H, T, S): a function of position alone.

    Philox-4x32-10 with the 64-bit ``seed[0]`` as key and (s // 8, t, b * H + h, seed[1]), each
    modulo 2**32, as counter. Its four words, low half first, are eight 16-bit lanes; key s takes
    lane s % 8 and stays iff lane >= round(p * 65536).

    A seed of six numbers is of a part of a call: of how many heads that is, and the part's first
    head, query and key, which are added to h, t and s.
    """
    heads, head, query, first = seed[2:] if seed.shape[0] == 6 else seed.new_tensor([H, 0, 0, 0])

    def index(start: int, length: int) -> Tensor:
        return torch.arange(start, start + length, device=seed.device)

    key = (seed[0] & 0xFFFFFFFF, (seed[0] >> 32) & 0xFFFFFFFF)
    counter = (
        index(0, S // 8 + 2) + first // 8,
        index(row_start, T).view(-1, 1) + query,
        index(batch_start, B).view(B, 1, 1, 1) * heads + index(0, H).view(H, 1, 1) + head,
        seed[1] & 0xFFFFFFFF,
    )
    words = torch.stack(philox(counter, key), dim=-1)  # [B, H, T, S / 8, 4]
    lanes = torch.stack([words & 0xFFFF, words >> 16], dim=-1).flatten(-3)
    return lanes[..., index(0, S) + first % 8] >= round(p * 65536)


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox-4x32-10 (Salmon et al., SC 2011) of four counter and two key words held in int64."""

    def multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
        low = a * (b & 0xFFFF)
        high = a * (b >> 16) + (low >> 16)
        return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF

    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(10):
        high0, low0 = multiply(0xD2511F53, c0)
        high1, low1 = multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def _varlen(inputs: Inputs, options: Options, compute_dtype: torch.dtype | None) -> Outputs:
    """Each sequence as a dense call; then the rows past the last one, which have no keys."""
    parts, end = [], 0
    for i, q_rows, k_rows in _sequences(inputs):
        sequence = _sequence(inputs, i, q_rows, k_rows)
        part = reference_attention(sequence, options, batch_start=i, compute_dtype=compute_dtype)
        parts.append(part)
        end = q_rows.stop
    tail = Inputs(inputs.q[:, :, end:], inputs.k[:, :, :0], inputs.v[:, :, :0])
    no_keys = Options(options.scale, stats=options.stats)
    parts.append(reference_attention(tail, no_keys, compute_dtype=compute_dtype))

    stats = received = weights = None
    if options.stats:
        stats = torch.cat([part.stats for part in parts if part.stats is not None], dim=-1)
    if options.stats == 2:
        received = torch.cat([part.received for part in parts if part.received is not None], dim=-1)
        received = F.pad(received, (0, inputs.k.shape[2] - received.shape[-1]))
    if options.weights:
        longest = (options.max_seqlen_q, options.max_seqlen_k)
        shape = longest if options.weights == 1 else (inputs.q.shape[1], *longest)
        none = parts[0].out.new_zeros(0, *shape)
        weights = torch.cat([none, *(_padded(part, longest) for part in parts[:-1])])
    out = _ordered_like(torch.cat([part.out for part in parts], dim=2), inputs.q)
    lse = torch.cat([part.lse for part in parts], dim=-1)
    return Outputs(out, lse, None, stats, received, weights)


def _sequences(inputs: Inputs) -> Iterator[tuple[int, slice, slice]]:
    """The sequences of a varlen call: their numbers, and where their queries and keys lie."""
    assert inputs.cu_seqlens_q is not None
    assert inputs.cu_seqlens_k is not None
    q_ends, k_ends = inputs.cu_seqlens_q.tolist(), inputs.cu_seqlens_k.tolist()
    for i in range(len(q_ends) - 1):
        yield i, slice(*q_ends[i : i + 2]), slice(*k_ends[i : i + 2])


def _sequence(inputs: Inputs, i: int, q_rows: slice, k_rows: slice) -> Inputs:
    """Sequence i of a varlen call as a dense call; mask and bias are indexed by local positions."""

    def entry(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.shape[0] == 1 else x[i : i + 1]

    def corner(x: Tensor | None) -> Tensor | None:
        x = entry(x)
        if x is not None and x.shape[2] > 1:
            x = x[:, :, : q_rows.stop - q_rows.start]
        return x[..., : k_rows.stop - k_rows.start] if x is not None and x.shape[3] > 1 else x

    return Inputs(
        inputs.q[:, :, q_rows],
        inputs.k[:, :, k_rows],
        inputs.v[:, :, k_rows],
        corner(inputs.mask),
        corner(inputs.bias),
        entry(inputs.alibi_slopes),
        inputs.sinks,
        entry(inputs.align),
        inputs.dropout_seed,
        windows=inputs.windows,
    )


def _padded(part: Outputs, longest: tuple[int, int]) -> Tensor:
    """A sequence's weights (1, [H,] T, S) with zeros up to the longest sequence's T and S."""
    assert part.weights is not None
    T, S = part.weights.shape[-2:]
    return F.pad(part.weights, (0, longest[1] - S, 0, longest[0] - T))


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Autocast would compute the matrix products in its own dtype."""
    available = autocast_available(device)
    return torch.autocast(device, enabled=False) if available else nullcontext()


def autocast_available(device: str) -> bool:
    """Torch's answer, found before for what is compiled: torch 2.10 cannot trace the question."""
    if torch.compiler.is_compiling():
        return device in AUTOCAST_DEVICES
    return torch.amp.autocast_mode.is_autocast_available(device)


def _ordered_like(x: Tensor, q: Tensor) -> Tensor:
    """Return x (B, H, T, D_v) with its dimensions in memory in the order of q's."""
    order = [*memory_order(q), 3]
    return x.permute(order).contiguous().permute([order.index(d) for d in range(4)])
