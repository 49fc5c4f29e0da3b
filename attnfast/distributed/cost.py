"""Which method a call over ranks takes, and what it sends."""

from __future__ import annotations

import functools

from torch import Tensor

from ..call import Inputs, Options
from .heads import Heads
from .layout import Layout
from .methods import Call
from .pieces import Sight, last_step

MOST_RANKS = 64  # of a ring that are looked at
MOST_WAIT = 1.25  # times the mean of scores that a rank may have before others would wait


def choose_method(call: Call, meshed: bool = False) -> tuple[str, str]:
    """The method that ``auto`` takes, and why.

    What a rank sends decides: with "all_to_all" (P - 1) / P of its q, k, v and out; with "ring"
    its k and v as many times as a block goes on. But where the ring would leave ranks waiting for
    one that has a quarter more scores than the mean, as contiguous chunks of causal scores do,
    heads are exchanged, if the ranks divide them: then all have alike many. All keys at once,
    "all_gather", only where the others refuse; "2d" wherever it may be, on a mesh of two dimensions
    (``meshed``).
    """
    inputs, options, keys = call.inputs, call.options, call.keys
    if inputs.indices is not None:
        return "all_gather", "indices may be of any keys"
    if (needs := whole_sequences(inputs, options)) is not None:
        return "all_to_all", f"{needs} needs whole sequences"
    if options.stats == 2:
        return "all_gather", "received sums over all queries"
    if meshed:
        return "2d", "the mesh is of two dimensions"
    H, ranks = inputs.q.shape[1], keys.ranks
    steps, waits = ring_shape(call.queries, keys, call.sight)
    ring = _numbers(call, keys.rows) * steps * inputs.k.element_size()
    exchanged = max(_heads(call, rank)[0] for rank in (0, ranks - 1))  # fewest and most heads
    said = f"{ring:.4g} bytes round the ring, {exchanged:.4g} to exchange heads for rows"
    if waits > MOST_WAIT:
        said += f", and the ring's busiest rank has {waits:.2f} times the mean of scores"
    if (exchanged < ring or waits > MOST_WAIT) and H % ranks == 0:
        return "all_to_all", said
    return "ring", said


@functools.lru_cache(maxsize=1 << 12)
def ring_shape(queries: Layout, keys: Layout, sight: Sight) -> tuple[int, float]:
    """Of a ring, how many blocks a rank sends on at most, and the most scores of one.

    Scores are a multiple of the mean; those of cut pieces count half. Of many ranks some are
    looked at, with the last two, which send most and compute most.
    """
    ranks, scores, most = keys.ranks, [], 0
    some = range(0, ranks, max(1, ranks // MOST_RANKS))
    for rank in sorted({*some, max(0, ranks - 2), ranks - 1}):
        own = queries.chunks(rank)
        blocks = [(q, k) for owner in range(ranks) for k in keys.chunks(owner) for q in own]
        scores.append(sum(q.length * k.length * sight.scores(q, k) for q, k in blocks))
        lasts = (last_step(queries, keys, sight, (rank - s) % ranks) for s in range(ranks))
        most = max(most, sum(step < last for step, last in enumerate(lasts)))
    return most, max(scores) * len(scores) / max(sum(scores), 1)


def sent(call: Call, method: str) -> tuple[int, int]:
    """Bytes that this rank sends: forward, and backward for the gradients of q, k, v.

    Not counted are the sums of the gradients of sinks, and of a bias that ranks share. A gather of
    all counts what a ring of ranks sends for it.
    """
    if method == "ring":
        return _ring(call, call.rank)
    if method == "all_to_all":
        return _heads(call, call.rank)
    others = (call.keys.ranks - 1) * _numbers(call, call.keys.rows)
    return others * call.inputs.k.element_size(), others * 4


def _numbers(call: Call, rows: int) -> int:
    """In keys and values of so many rows."""
    (B, H_kv, _, D_v), D = call.inputs.v.shape, call.inputs.q.shape[3]
    return int(B * H_kv * rows * (D + D_v))


def _ring(call: Call, rank: int) -> tuple[int, int]:
    """Blocks that a rank sends on, and in the backward their fp32 gradients, also home."""
    queries, keys, sight, ranks = call.queries, call.keys, call.sight, call.keys.ranks
    on = home = 0
    for step in range(ranks):
        last = last_step(queries, keys, sight, (rank - step) % ranks)
        on += step < last
        home += 0 < step == last
    block, size = _numbers(call, keys.rows), call.inputs.k.element_size()
    return block * on * size, block * (on * (size + 4) + home * 4)


def _heads(call: Call, rank: int) -> tuple[int, int]:
    """Others' heads of a rank's rows, and its own heads of others' rows."""
    (B, H, _, D), H_kv, D_v = call.inputs.q.shape, *call.inputs.v.shape[1::2]
    ranks, size = call.keys.ranks, call.inputs.q.element_size()
    heads = Heads.over(ranks, H, H_kv)
    there, back = [], []  # rows x heads that are sent when heads are exchanged for rows, and back
    for part, layout in ((heads.queries, call.queries), (heads.keys, call.keys)):
        there.append(layout.rows * (sum(map(len, part)) - len(part[rank])))
        back.append(layout.rows * (ranks - 1) * len(part[rank]))
    results = 4 * (5 if call.options.stats else 1)  # lse and statistics
    forward = size * (there[0] * D + there[1] * (D + D_v) + back[0] * D_v) + results * back[0]
    backward = size * (back[0] * D + back[1] * (D + D_v) + there[0] * D_v)
    return int(B * forward), int(B * backward)


def computed_at_once(call: Call, method: str, inner: int) -> Inputs:
    """Tensors of the shapes that a backend is given by a method, without values.

    ``inner`` are the ranks that exchange heads, with "2d" those of a row of the mesh.
    """
    inputs, T, S = call.inputs, call.queries.rows, call.keys.rows
    H, H_kv = inputs.q.shape[1], inputs.k.shape[1]
    if method in ("all_to_all", "2d"):
        heads = Heads.over(inner, H, H_kv)
        H, H_kv = (len(x[call.rank % inner]) for x in (heads.queries, heads.keys))
        T, S = T * inner, S * inner
        if method == "all_to_all":  # what shards are padded with has no part in it
            T, S = call.queries.length, call.keys.length
    elif method == "all_gather":
        S = call.keys.length

    def sized(x: Tensor, heads: int, rows: int) -> Tensor:
        return x[:, :1, :1].expand(-1, heads, rows, -1)

    return inputs._replace(
        q=sized(inputs.q, H, T), k=sized(inputs.k, H_kv, S), v=sized(inputs.v, H_kv, S)
    )


def whole_sequences(inputs: Inputs, options: Options) -> str | None:
    """What of a call only a rank that has whole sequences computes; None: nothing."""
    if inputs.block_bits is not None:
        return "a BlockMask"
    if inputs.windows is not None:
        return "a window for each head"
    if inputs.cu_seqlens_q is not None:
        for name, x in (("mask", inputs.mask), ("bias", inputs.bias)):
            if x is not None:
                return f"{name} of sequences"
        if options.dropout_p > 0:
            return "dropout_p of sequences"
    return None
