"""The ways to compute a call over ranks: keys travel, keys are gathered, heads are exchanged."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import dispatch
from ..call import Inputs, Options, Outputs
from ..functional import attention_problem, run
from .collectives import Gather, Scatter, Shared
from .heads import Heads, Rows
from .layout import Chunk, Layout
from .pieces import FULL, Piece, Sight, call_of
from .ring import Ring, RingFunction


class Call(NamedTuple):
    """A checked call of this rank, of some heads or all of them."""

    function: str  # for messages
    inputs: Inputs  # q, k, v its shards, mask and bias of its queries and all keys
    options: Options
    queries: Layout
    keys: Layout
    sight: Sight
    group: dist.ProcessGroup
    backend: str

    @property
    def rank(self) -> int:
        """This rank's place in the group."""
        return dist.get_rank(self.group)


def by_ring(call: Call) -> Outputs:
    """Keys travel."""
    inputs, group = call.inputs, call.group
    problem = attention_problem(inputs, call.options)
    row = dispatch.select(problem, call.backend, function=call.function)
    if row.ops is None:
        return by_gather(call)
    inputs = with_shared(call)
    bare = call._replace(inputs=without_data(inputs))
    ring = Ring(group, call.queries, call.keys, call.sight, row.ops, bare.inputs, call.options)

    def gathered(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None) -> Any:
        again = bare.inputs._replace(q=q, k=k, v=v, bias=bias, sinks=sinks)
        found = by_gather(bare._replace(inputs=again), shared=False)
        return found.out, found.lse, found.stats

    tensors = (inputs.q, inputs.k, inputs.v, inputs.bias, inputs.sinks)
    out, lse, stats = RingFunction.apply(ring, gathered, *tensors)
    return Outputs(out, lse, stats=stats)


def without_data(inputs: Inputs) -> Inputs:
    """A call's tensors but those that the ring is given."""
    nothing = inputs.q.detach().new_empty(0)
    return inputs._replace(q=nothing, k=nothing, v=nothing, bias=None, sinks=None)


def with_shared(call: Call) -> Inputs:
    """The tensors, of which those that all ranks have get the sum of the ranks' gradients."""
    sinks = call.inputs.sinks
    sinks = None if sinks is None else Shared.apply(sinks, call.group)
    return call.inputs._replace(bias=shared_bias(call), sinks=sinks)


def shared_bias(call: Call) -> Tensor | None:
    """The bias, with a gradient summed over the ranks where they share it."""
    bias = call.inputs.bias
    of_rows = call.inputs.cu_seqlens_q is None and (
        bias is not None and (bias.shape[2] > 1 or call.queries.rows == 1)
    )
    if bias is None or of_rows:
        return bias
    result: Tensor = Shared.apply(bias, call.group)
    return result


def by_gather(call: Call, shared: bool = True) -> Outputs:
    """Every rank has all keys: an ordinary call for each of its chunks of queries.

    ``shared`` is whether gradients of what all ranks have are summed.
    """
    inputs, options, keys, group = call.inputs, call.options, call.keys, call.group
    inputs = with_shared(call) if shared else inputs
    real = real_rows(call.queries, call.rank, inputs.q.device)
    if real is not None and inputs.cu_seqlens_q is None:
        inputs = without_keys(inputs, ~real[:, None])
    k, v = (Gather.apply(x, keys, group) for x in (inputs.k, inputs.v))
    inputs = inputs._replace(k=k, v=v)
    every_key, found = Chunk(0, keys.length, 0), []
    for chunk in call.queries.places(call.rank):
        piece = Piece(chunk, every_key, call.sight.scores(chunk, every_key) == FULL)
        found.append(run(call.function, *call_of(piece, inputs, options), call.backend))
    out, lse, _, stats, received, _ = zip(*found, strict=True)
    sums = None
    if options.stats == 2:
        sums = Scatter.apply(sum(received)[..., None], keys, group)[..., 0]
    with_stats = torch.cat(stats, 3) if options.stats else None
    return Outputs(torch.cat(out, 2), torch.cat(lse, 2), None, with_stats, sums)


def without_keys(inputs: Inputs, rows: Tensor) -> Inputs:
    """The inputs with some rows ``(T, 1)`` of queries that attend nothing."""
    if inputs.indices is not None:
        return inputs._replace(indices=inputs.indices.masked_fill(rows, -1))
    mask = ~rows[None, None]
    return inputs._replace(mask=mask if inputs.mask is None else mask & inputs.mask)


def by_heads(call: Call, outer: dist.ProcessGroup | None = None) -> Outputs:
    """Every rank has whole sequences for some of the heads: an ordinary call of those.

    With an ``outer`` group the ranks of the call's group have a shard together, and it goes round
    the ring of the groups.
    """
    inputs, options, group, rank = call.inputs, call.options, call.group, call.rank
    ranks = dist.get_world_size(group)
    number = rank if outer is None else dist.get_rank(outer) * ranks + rank
    device, heads = inputs.q.device, Heads.over(ranks, inputs.q.shape[1], inputs.k.shape[1])
    of_queries, of_keys = (
        Rows(
            group,
            x.rows,
            x.order(device)
            if outer is None
            else x.order_within(ranks, dist.get_rank(outer)).to(device),
        )
        for x in (call.queries, call.keys)
    )
    q = of_queries.to_heads(inputs.q, heads.queries)
    k, v = (of_keys.to_heads(x, heads.keys) for x in (inputs.k, inputs.v))
    shared = with_shared(call)
    mask, bias, sinks = inputs.mask, shared.bias, shared.sinks
    if inputs.cu_seqlens_q is None:
        mask, bias = (of_queries.scores_to_heads(x, heads.queries) for x in (mask, bias))
    own = heads.queries[rank]

    def of_own(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.shape[1] == 1 else x[:, own]

    if inputs.cu_seqlens_q is not None:  # by positions within the sequences, the same on all ranks
        mask, bias = of_own(mask), of_own(bias)
    sinks = sinks if sinks is None else sinks[own]
    if inputs.dropout_seed is not None:
        first_head = sum(map(len, heads.queries[:rank]))
        place = inputs.dropout_seed.new_tensor([0, 0, 0, first_head, 0, 0])
        inputs = inputs._replace(dropout_seed=inputs.dropout_seed + place)
    slopes = None if inputs.alibi_slopes is None else inputs.alibi_slopes[:, own]
    windows = None if inputs.windows is None else inputs.windows[own]
    mine = inputs._replace(
        q=q, k=k, v=v, mask=mask, bias=bias, alibi_slopes=slopes, sinks=sinks,
        windows=windows, block_starts=of_own(inputs.block_starts),
    )  # fmt: skip
    if not own:  # and yet a part of every exchange
        outputs = of_no_heads(q, k, v, bias, sinks, options)
    elif outer is None:
        outputs = run(call.function, mine, options, call.backend)
    else:
        shards = call.queries.merged(ranks), call.keys.merged(ranks)
        outputs = by_ring(call._replace(
            inputs=mine, queries=shards[0], keys=shards[1], group=outer
        ))  # fmt: skip
    numbers = [outputs.lse]
    if options.stats and outputs.stats is not None:
        numbers += outputs.stats.unbind(0)
    out = of_queries.to_rows(outputs.out, heads.queries)
    lse, *stats = of_queries.to_rows(torch.stack(numbers, 3), heads.queries).unbind(3)
    received = None
    if options.stats == 2 and outputs.received is not None:
        received = of_keys.to_rows(outputs.received[..., None], heads.queries)[..., 0]
    results = Outputs(out, lse, None, torch.stack(stats) if stats else None, received)
    return ended(results, inputs.sinks, real_rows(call.queries, number, device))


def of_no_heads(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None, options: Options
) -> Outputs:
    """Results without a head, whose gradients are a part of every exchange all the same."""
    given = [x for x in (q, k, v, bias, sinks) if x is not None]
    nothing = torch.stack([x.sum().float() for x in given]).sum()
    rows = q.sum(3).float() + nothing
    out = (q.new_zeros((*q.shape[:3], v.shape[3])) + nothing).to(v.dtype)
    stats = torch.stack([rows] * 4) if options.stats else None
    return Outputs(out, rows, None, stats, k.detach().sum(3).float())


def real_rows(layout: Layout, rank: int, device: torch.device) -> Tensor | None:
    """Which rows of a shard are rows of the sequence; None: all of them."""
    if layout.ranks * layout.rows == layout.length:
        return None
    real = torch.zeros(layout.rows, dtype=torch.bool)
    for _, length, row in layout.chunks(rank):
        real[row : row + length] = True
    return real.to(device)


def ended(outputs: Outputs, sinks: Tensor | None, real: Tensor | None) -> Outputs:
    """Results whose rows past the end of the sequence are those of queries without keys."""
    if real is None:
        return outputs
    without = -torch.inf if sinks is None else sinks.detach().to(outputs.lse.dtype)[:, None]
    stats = outputs.stats
    if stats is not None:
        of_none = stats.new_tensor([-torch.inf, 0.0, 0.0, 0.0])[:, None, None, None]
        stats = torch.where(real, stats, of_none)
    return outputs._replace(
        out=torch.where(real[:, None], outputs.out, 0),
        lse=torch.where(real, outputs.lse, without),
        stats=stats,
    )
