"""Pictures of the attention matrix, and of each row its largest entries, without the matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..block_index import dense
from ..call import BLOCK_FIELDS, LARGEST, MEAN, Inputs, Options
from ..pooled import pooled
from ..reference import allowed, positions, scores, without_autocast
from ..requirements import choice, fail
from ..requirements import integer as whole_number
from ..second_order import Block, blocks
from .calls import canonical, narrow
from .products import HEADS, widest

ELEMENTS, HEIGHT = 1 << 22, 64  # numbers in one block of rows, and its least rows
CELL = 16  # keys among which the largest probability is found first


def attention_map(
    q: Tensor,
    k: Tensor,
    rows: int = 512,
    columns: int = 512,
    reduce: str = "mean",
    *,
    heads: str = "each",
    **options: Any,
) -> Tensor:
    """A picture of the attention matrix: its probabilities pooled in cells, in linear memory.

    Cell (r, c) has the queries ``r * T // rows`` to ``(r + 1) * T // rows`` and the keys
    ``c * S // columns`` to ``(c + 1) * S // columns``, of each sequence its own T and S. A second
    pass over the scores, after the forward's.

    Args:
        q: ``(B, H, T, D)``, see `attnfast.attention`; packed ``(total_q, H, D)`` with
            ``cu_seqlens_q`` and its like, see `attnfast.varlen_attention`.
        k: ``(B, H_kv, S, D)``, or ``(total_k, H_kv, D)``.
        rows: cells along the queries; with more than T, T.
        columns: cells along the keys; with more than S, S.
        reduce: "mean" of a cell's probabilities, of which those of masked pairs are 0; or "max".
        heads: "each", or "mean" for the mean of the heads' cells.
        options: mask, bias, causal, window, align, scale, softcap, alibi_slopes, sinks, backend,
            as `attnfast.attention` has them.

    Returns:
        ``(B, H, rows, columns)`` fp32, or ``(B, rows, columns)``; packed, B is the number of
        sequences, and T and S are the longest.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or value.
    """
    function = "attention_map"
    inputs, call, backend = canonical(function, q, k, narrow(k), options)
    T, S = inputs.q.shape[2], inputs.k.shape[2]
    if inputs.cu_seqlens_q is not None:
        T, S = call.max_seqlen_q, call.max_seqlen_k
    rows = min(whole_number(function, "rows", rows, low=1), max(T, 1))
    columns = min(whole_number(function, "columns", columns, low=1), max(S, 1))
    kind = choice(function, "reduce", reduce, {"mean": MEAN, "max": LARGEST})
    mean = choice(function, "heads", heads, HEADS)
    found = pooled(function, inputs, call, kind, rows, columns, backend)
    return found.mean(1) if mean else found


def top_keys(q: Tensor, k: Tensor, n: int, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """For every query the keys that it attends most, in memory linear in T and S.

    The probabilities are computed in fp32 (fp64 for fp64 inputs), a block of at least 64 rows at a
    time. Of many keys a second pass over the scores, after the forward's, finds the largest in
    every 16; the n likeliest are among the n times 16 where these are largest.

    Args:
        q: ``(B, H, T, D)``, see `attnfast.attention`; packed ``(total_q, H, D)`` with
            ``cu_seqlens_q`` and its like, see `attnfast.varlen_attention`.
        k: ``(B, H_kv, S, D)``, or ``(total_k, H_kv, D)``.
        n: how many, from 1 to S.
        options: mask, bias, causal, window, align, scale, softcap, alibi_slopes, sinks, backend,
            as `attnfast.attention` has them.

    Returns:
        ``(indices, probabilities, left_out)``. Indices are ``(B, H, T, n)`` int64, packed
        ``(H, total_q, n)`` and counted within a sequence, the likeliest first, -1 where no further
        key is attended; probabilities of the same shape, fp32; left_out is ``(B, H, T)``, or
        ``(H, total_q)``: what all other keys have, a sink apart.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or value.
    """
    q, k = (x.detach() if isinstance(x, Tensor) else x for x in (q, k))
    q, k, _ = widest("top_keys", q, k, torch.zeros((), dtype=torch.float32), "k")
    inputs, call, backend = canonical("top_keys", q, k, narrow(k), options)
    longest = call.max_seqlen_k if inputs.cu_seqlens_k is not None else inputs.k.shape[2]
    n = whole_number("top_keys", "n", n, low=1)
    if n > longest:
        fail("top_keys", "n", f"at most the number of keys, {longest}", n)
    B, H, T, _ = inputs.q.shape
    indices = torch.full((B, H, T, n), -1, device=q.device)
    probabilities = inputs.q.new_zeros((B, H, T, n))
    left_out = inputs.q.new_zeros((B, H, T))

    def height(S: int) -> int:
        numbers = S if all_keys(n, S) else max(S // CELL, n * CELL * inputs.q.shape[3])
        return max(HEIGHT, ELEMENTS // max(B * H * numbers, 1))

    with torch.no_grad():
        for block, part, part_options in row_blocks(inputs, call, height):
            S = part.k.shape[2]
            if not S:
                continue
            if all_keys(n, S):
                weights = functional.run(
                    "top_keys", part, part_options._replace(weights=2), backend
                ).weights
                assert weights is not None
                keys, attended = None, weights.sum(3)
            else:
                keys, largest = likely_keys(part, part_options, n, backend)
                weights, attended = probabilities_of(part, part_options, keys, largest)
            top, place = weights.topk(min(n, S), 3)
            if keys is not None:
                place = keys.gather(3, place)
            rows = block.part("out", indices)
            found = (*rows, slice(top.shape[3]))
            indices[found] = torch.where(top == 0, -1, place)
            probabilities[found] = top
            left_out[rows] = (attended - top.sum(3)).clamp(min=0)
    if inputs.cu_seqlens_q is not None:
        return indices[0], probabilities[0], left_out[0]
    return indices, probabilities, left_out


def all_keys(n: int, S: int) -> bool:
    """Whether so many of S keys are rather sought among all."""
    return 4 * n * CELL > S


def likely_keys(inputs: Inputs, options: Options, n: int, backend: str) -> tuple[Tensor, Tensor]:
    """The keys of the n cells with the largest probabilities, -1: none; and the largest of all.

    (B, H, T, n * CELL), and (B, H, T, 1).
    """
    T, S = inputs.q.shape[2], inputs.k.shape[2]
    columns = -(-S // CELL)
    cells = pooled("top_keys", inputs, options, LARGEST, T, columns, backend)
    cell = cells.topk(n, 3, sorted=False).indices[..., None]
    keys = cell * S // columns + torch.arange(CELL, device=cell.device)
    keys = torch.where(keys < (cell + 1) * S // columns, keys, -1).flatten(3)
    return keys, cells.amax(3, keepdim=True)


def probabilities_of(
    inputs: Inputs, options: Options, keys: Tensor, largest: Tensor
) -> tuple[Tensor, Tensor]:
    """The probabilities of a few keys of each query, and what all keys have together.

    Of a query's keys the likeliest is among these: the others follow from its probability by what
    their scores are less, as a norm of all scores, in fp32, would be lost beside a large constant.

    Args:
        inputs: Those of a dense call.
        options: Its options.
        keys: (B, H, T, K), -1: none.
        largest: The largest probability of each query, (B, H, T, 1).

    Returns:
        (B, H, T, K), 0 where a key is none, and (B, H, T).
    """
    q, k = inputs.q, inputs.k
    (B, H, T, _), (_, H_kv, S, _) = q.shape, k.shape
    listed, keys = keys >= 0, keys.clamp(min=0)
    distance = keys - positions(inputs, options)

    def at(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.expand(B, H, T, S).gather(3, keys)

    inputs = inputs._replace(mask=at(inputs.mask), bias=at(inputs.bias))
    entry = torch.arange(B, device=k.device).view(-1, 1, 1, 1)
    head = torch.arange(H, device=k.device).view(-1, 1, 1) * H_kv // H
    with without_autocast(q.device.type):
        products = (k[entry, head, keys] @ q[..., None]).squeeze(4)
    seen = listed & allowed(inputs, options, distance)
    s = scores(products, inputs, options, distance).masked_fill(~seen, -torch.inf)
    m = s.amax(3, keepdim=True)
    p = torch.where(seen, largest * (s - m).exp(), 0)
    sinks = m.new_tensor([-torch.inf]) if inputs.sinks is None else inputs.sinks.to(m)
    left = 1 - largest * (sinks[:, None, None] - m).exp()  # by the sink
    return p, torch.where(largest == 0, 0, left).squeeze(3)


def row_blocks(
    inputs: Inputs, options: Options, height: Callable[[int], int]
) -> Iterator[tuple[Block, Inputs, Options]]:
    """A call cut into dense calls of a block of ``height(S)`` rows each."""
    for block in blocks(inputs, options, height):
        tensors = {
            name: x[block.part(name, x)]
            for name, x in inputs._asdict().items()
            if x is not None and not name.startswith("cu_seqlens") and name not in BLOCK_FIELDS
        }
        if inputs.block_starts is not None:
            assert inputs.block_index is not None
            assert inputs.block_bits is not None
            keys = block.k_rows.stop - block.k_rows.start
            starts = inputs.block_starts[block.part("block_starts", inputs.block_starts)]
            longest = options.max_seqlen_k or keys
            mask = dense(starts, inputs.block_index, inputs.block_bits, block.rows, longest)
            tensors["mask"] = mask[..., :keys]
        offset = block.options.align_offset
        if "align" in tensors:
            tensors["align"] = tensors["align"] + block.rows.start
        else:
            offset += block.rows.start
        yield (
            block,
            Inputs(**tensors),
            block.options._replace(align_offset=offset, max_seqlen_q=0, max_seqlen_k=0),
        )
