"""Context parallel attention: every rank has some rows of the sequence."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import checks, dispatch
from ..call import Inputs, Options, Outputs
from ..functional import attention_problem, results_of, run
from ..requirements import choice, fail, nothing_else, truth
from .collectives import Gather, Scatter, Shared
from .heads import Heads, Rows
from .layout import PARTS, Chunk, Layout, group_of
from .pieces import FULL, Piece, Sight, call_of, last_step
from .ring import Ring, RingFunction

FUNCTION = "context_parallel_attention"
PLACED = ("cpu", "reference")  # backends that drop what one process would
MOST_ALIGN = 2**28  # kernels are given it and the distance of chunks in one
METHODS = {"auto": 0, "ring": 1, "all_to_all": 2, "all_gather": 3, "2d": 4}


def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mesh: Any,
    *,
    layout: str = "zigzag",
    method: str = "auto",
    lengths: tuple[int, int] | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    align: str | int | Tensor = "top_left",
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    indices: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
    return_stats: bool | str = False,
    return_weights: bool | str = False,
    deterministic: bool | None = None,
    backend: str = "auto",
    **other: Any,
) -> Any:
    """`attnfast.attention` of sequences whose rows are cut over the P ranks of a mesh.

    Every rank calls it with its own shards, as `shard` cuts them, and has its own rows of what
    ``attnfast.attention`` returns for the whole sequences.

    Args:
        q: ``(B, H, T / P, D)``, this rank's queries; see `attnfast.attention`.
        k: ``(B, H_kv, S / P, D)``, its keys.
        v: ``(B, H_kv, S / P, D_v)``.
        mesh: a DeviceMesh, ``mesh["cp"]`` for example, or a process group.
        layout: how sequences are cut, see `shard`: "zigzag" or "contiguous".
        method: "ring": keys and values travel from rank to rank, the next while one block is
            computed, only as far as ``causal`` and ``window`` let anybody attend them, in O(T / P)
            memory (arXiv:2310.01889); "all_to_all": heads are exchanged for rows, and every rank
            attends whole sequences with some of the heads (arXiv:2309.14509); "all_gather": every
            rank has all keys; "auto": see ``choose_method``.
        lengths: T and S where `shard` has padded: what lies past them is nothing. By default all
            rows of all ranks.
        mask: bool, broadcastable to ``(B, H, T / P, S)``: of this rank's queries and all keys.
        bias: the same, added. Where it is the same for all queries, its gradient is the sum over
            the ranks, on every rank.
        causal: see `attnfast.attention`, as for all that follow; positions are those of the whole
            sequence.
        window: see `attnfast.attention`.
        align: see `attnfast.attention`; up to 2**28 either way.
        scale: see `attnfast.attention`.
        softcap: see `attnfast.attention`.
        alibi_slopes: see `attnfast.attention`.
        sinks: see `attnfast.attention`; the gradient is the sum over the ranks, on every rank.
        indices: ``(B, T / P, K)``, keys of the whole sequence; "all_gather" takes them.
        dropout_p: see `attnfast.attention`; on the CPU, whose kernels can count from another row
            than their own first. What is dropped is what one process would drop.
        dropout_seed: see `attnfast.attention`; by default drawn by the first rank, for all.
        return_lse: see `attnfast.attention`.
        return_stats: see `attnfast.attention`; with "received" a rank has the sums of its own keys,
            and "all_to_all" and "all_gather" find them.
        return_weights: must be False: weights are T x S.
        deterministic: see `attnfast.attention`. Sums over ranks have a fixed order in any case.
        backend: see `attnfast.attention`.
        other: none, see `attnfast.attention`.

    Returns:
        As `attnfast.attention`, of this rank's rows; zeros past the end of the sequence, with an
        lse of -inf (the sink, where there is one). Ranks of equal shards must give equal options.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or value; or the method or backend does
            not take the call.
        RuntimeError: There is no process group; or a rank has ended, within the group's timeout.
    """
    if other:
        nothing_else(FUNCTION, other)
    return_lse = truth(FUNCTION, "return_lse", return_lse)
    group = group_of(FUNCTION, mesh)
    choice(FUNCTION, "method", method, METHODS)
    choice(FUNCTION, "layout", layout, PARTS)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dim() != 4:
            fail(FUNCTION, name, "a 4-D Tensor", getattr(x, "shape", type(x).__name__))
    queries, keys = layouts(q, k, layout, lengths, dist.get_world_size(group))
    every_key = k.detach()[:, :, :1].expand(-1, -1, keys.length, -1)
    every_value = v.detach()[:, :, :1].expand(-1, -1, keys.length, -1)
    if keys.rows == 0 or v.shape[2] != keys.rows:
        fail(FUNCTION, "k and v", "of equally many rows, at least one", (k.shape, v.shape))
    inputs, options = checks.attention_call(
        FUNCTION,
        q,
        every_key,
        every_value,
        mask,
        bias,
        causal,
        window,
        align,
        (scale, softcap),
        alibi_slopes,
        sinks,
        dropout_p,
        dropout_seed,
        return_stats,
        return_weights,
        deterministic,
        indices=indices,
    )
    k, v = checks.autocast(FUNCTION, ("k", "v"), k, v)
    inputs = inputs._replace(k=k, v=v)
    if options.align_bottom_right:
        offset = keys.length - queries.length
        options = options._replace(align_offset=offset, align_bottom_right=False)
    meshed = getattr(mesh, "ndim", 1) == 2
    if method == "2d" and not meshed:
        fail(FUNCTION, "mesh", "of two dimensions with method='2d'", "one")
    if method == "auto" and meshed:
        method = "2d"
    if method == "auto":
        method, _ = choose_method(inputs, options, queries, keys)
    refuse(method, inputs, options)
    if options.dropout_p > 0:
        inputs = inputs._replace(dropout_seed=seed_of_all(inputs, options, group, backend))
    if method == "2d":
        outer, inner = (mesh.get_group(d) for d in (0, 1))
        outputs = by_heads(inputs, options, queries, keys, inner, backend, outer)
    else:
        outputs = METHOD_CALLS[method](inputs, options, queries, keys, group, backend)
    if not (return_lse or return_stats):
        return outputs.out
    return results_of(outputs, return_lse, options)


def layouts(
    q: Tensor, k: Tensor, name: str, lengths: tuple[int, int] | None, ranks: int
) -> tuple[Layout, Layout]:
    """How queries and keys are cut, from the rows of a shard."""
    if lengths is None:
        lengths = q.shape[2] * ranks, k.shape[2] * ranks
    if not isinstance(lengths, (tuple, list)) or len(lengths) != 2:
        fail(FUNCTION, "lengths", "(T, S), of the whole sequences", lengths, TypeError)
    found = []
    for what, x, length in zip(("q", "k"), (q, k), lengths, strict=True):
        layout = Layout.of_sequence(length, ranks, name)
        if x.shape[2] != layout.rows:
            requirement = f"of {layout.rows} rows ({length} over {ranks} ranks, {name}, see shard)"
            fail(FUNCTION, what, requirement, x.shape[2])
        found.append(layout)
    return found[0], found[1]


def seed_of_all(inputs: Inputs, options: Options, group: dist.ProcessGroup, backend: str) -> Tensor:
    """The dropout seed of all ranks, drawn by the first where none is given, with a place."""
    row = dispatch.select(attention_problem(inputs, options), backend, function=FUNCTION)
    if row.name not in PLACED:
        requirement = f"0 on the backend {row.name!r}, which counts from its own first row"
        fail(FUNCTION, "dropout_p", requirement, options.dropout_p)
    seed = inputs.dropout_seed
    if seed is None:
        seed = torch.randint(1 << 32, (2,), dtype=torch.int64, device=inputs.q.device)
        dist.broadcast(seed, group=group, group_src=0)
    return torch.cat((seed, seed.new_tensor([inputs.q.shape[1], 0, 0, 0])))


def refuse(method: str, inputs: Inputs, options: Options) -> None:
    """Raise where a method does not take a call."""
    if options.weights:
        fail(FUNCTION, "return_weights", "False: weights are T x S, on no rank whole", True)
    if abs(options.align_offset) > MOST_ALIGN:
        fail(FUNCTION, "align", f"at most {MOST_ALIGN} either way", options.align_offset)
    if inputs.block_bits is not None:
        fail(
            FUNCTION,
            "mask",
            "a bool Tensor: a BlockMask's blocks end where no rank's rows do",
            "one",
        )
    if inputs.indices is not None and method != "all_gather":
        fail(
            FUNCTION,
            "indices",
            "given with method='all_gather', where all keys are at hand",
            method,
        )
    if options.stats == 2 and method in ("ring", "2d"):
        fail(FUNCTION, "return_stats", "True: 'received' needs another way round the ring", "it")


def choose_method(
    inputs: Inputs, options: Options, queries: Layout, keys: Layout
) -> tuple[str, str]:
    """The method that ``auto`` takes, and why.

    What a rank sends decides: with "all_to_all" (P - 1) / P of its q, k, v and out; with "ring"
    its k and v as many times as a block goes on. All keys at once, "all_gather", only where the
    others refuse.
    """
    if inputs.indices is not None:
        return "all_gather", "indices may be of any keys"
    ranks, (_, H, _, D), H_kv, D_v = keys.ranks, inputs.q.shape, *inputs.v.shape[1::2]
    if options.stats == 2:
        return "all_gather", "received sums over all queries"
    copies = sum(map(len, Heads.over(ranks, H, H_kv).keys))
    own = queries.rows * H * (D + D_v) + keys.rows * copies * (D + D_v)
    exchanged = own * (ranks - 1) // ranks
    sight = Sight.of(inputs, options)
    steps = max(last_step(queries, keys, sight, owner) for owner in range(ranks))
    travelled = keys.rows * H_kv * (D + D_v) * steps
    said = f"{travelled} numbers round the ring, {exchanged} to exchange heads for rows"
    if exchanged < travelled and H % ranks == 0:
        return "all_to_all", said
    return "ring", said


def by_ring(
    inputs: Inputs,
    options: Options,
    queries: Layout,
    keys: Layout,
    group: dist.ProcessGroup,
    backend: str,
) -> Outputs:
    """Keys travel."""
    row = dispatch.select(attention_problem(inputs, options), backend, function=FUNCTION)
    if row.ops is None:
        return by_gather(inputs, options, queries, keys, group, backend)
    q, k, v, bias, sinks = inputs.q, inputs.k, inputs.v, shared_bias(inputs, queries, group), None
    if inputs.sinks is not None:
        sinks = Shared.apply(inputs.sinks, group)
    ring = Ring(group, queries, keys, row.ops, without_data(inputs), options)
    out, lse, stats = RingFunction.apply(ring, q, k, v, bias, sinks)
    return Outputs(out, lse, stats=stats)


def without_data(inputs: Inputs) -> Inputs:
    """A call's tensors but those that the ring is given."""
    nothing = inputs.q.detach().new_empty(0)
    return inputs._replace(q=nothing, k=nothing, v=nothing, bias=None, sinks=None)


def shared_bias(inputs: Inputs, queries: Layout, group: dist.ProcessGroup) -> Tensor | None:
    """The bias, with a gradient summed over the ranks where they share it."""
    bias = inputs.bias
    if bias is None or bias.shape[2] > 1 or queries.rows == 1:
        return bias
    result: Tensor = Shared.apply(bias, group)
    return result


def by_gather(
    inputs: Inputs,
    options: Options,
    queries: Layout,
    keys: Layout,
    group: dist.ProcessGroup,
    backend: str,
) -> Outputs:
    """Every rank has all keys: an ordinary call for each of its chunks of queries."""
    real = real_rows(queries, dist.get_rank(group), inputs.q.device)
    if real is not None:
        inputs = without_keys(inputs, ~real[:, None])
    k, v = (Gather.apply(x, keys, group) for x in (inputs.k, inputs.v))
    sinks = None if inputs.sinks is None else Shared.apply(inputs.sinks, group)
    bias = shared_bias(inputs, queries, group)
    inputs = inputs._replace(k=k, v=v, sinks=sinks, bias=bias)
    sight, every_key, found = Sight.of(inputs, options), Chunk(0, keys.length, 0), []
    for chunk in queries.places(dist.get_rank(group)):
        piece = Piece(chunk, every_key, sight.scores(chunk, every_key) == FULL)
        found.append(run(FUNCTION, *call_of(piece, inputs, options), backend))
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


def by_heads(
    inputs: Inputs,
    options: Options,
    queries: Layout,
    keys: Layout,
    group: dist.ProcessGroup,
    backend: str,
    outer: dist.ProcessGroup | None = None,
) -> Outputs:
    """Every rank has whole sequences for some of the heads: an ordinary call of those.

    With an ``outer`` group the ranks of ``group`` have a shard together, and it goes round the ring
    of the groups.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
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
        for x in (queries, keys)
    )
    q = of_queries.to_heads(inputs.q, heads.queries)
    k, v = (of_keys.to_heads(x, heads.keys) for x in (inputs.k, inputs.v))
    mask, bias = (
        of_queries.scores_to_heads(x, heads.queries)
        for x in (inputs.mask, shared_bias(inputs, queries, group))
    )
    slopes, sinks = inputs.alibi_slopes, inputs.sinks
    slopes = None if slopes is None else slopes[:, heads.queries[rank]]
    sinks = None if sinks is None else Shared.apply(sinks, group)[heads.queries[rank]]
    if inputs.dropout_seed is not None:
        first_head = sum(map(len, heads.queries[:rank]))
        place = inputs.dropout_seed.new_tensor([0, 0, 0, first_head, 0, 0])
        inputs = inputs._replace(dropout_seed=inputs.dropout_seed + place)
    mine = inputs._replace(q=q, k=k, v=v, mask=mask, bias=bias, alibi_slopes=slopes, sinks=sinks)
    if not heads.queries[rank]:  # and yet a part of every exchange
        outputs = of_no_heads(q, k, v, bias, sinks, options)
    elif outer is None:
        outputs = run(FUNCTION, mine, options, backend)
    else:
        shards = queries.merged(ranks), keys.merged(ranks)
        outputs = by_ring(mine, options, *shards, outer, backend)
    numbers = [outputs.lse]
    if options.stats and outputs.stats is not None:
        numbers += outputs.stats.unbind(0)
    out = of_queries.to_rows(outputs.out, heads.queries)
    lse, *stats = of_queries.to_rows(torch.stack(numbers, 3), heads.queries).unbind(3)
    received = None
    if options.stats == 2 and outputs.received is not None:
        received = of_keys.to_rows(outputs.received[..., None], heads.queries)[..., 0]
    results = Outputs(out, lse, None, torch.stack(stats) if stats else None, received)
    return ended(results, inputs.sinks, real_rows(queries, number, device))


def of_no_heads(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None, options: Options
) -> Outputs:
    """Results without a head, whose gradients are a part of every exchange all the same."""
    scores = q @ k.mT
    rows = q.sum(3).float()
    if bias is not None:
        scores = (scores + bias).to(v.dtype)
    if sinks is not None:
        rows = rows + sinks[:, None]
    stats = torch.stack([rows] * 4) if options.stats else None
    return Outputs(scores @ v, rows, None, stats, k.detach().sum(3).float())


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


METHOD_CALLS = {"ring": by_ring, "all_to_all": by_heads, "all_gather": by_gather}
