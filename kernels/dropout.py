"""Which probabilities dropout keeps: Philox-4x32-10, as docs/math.md section 6 counts it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def kept_by_dropout(x, p, f: tl.constexpr, b, h, t0, j0, M: tl.constexpr, N: tl.constexpr):
    """[M, N] bool: which probabilities of queries t0 .. and keys j0 .. stay; j0 and N in eights.

    Philox-4x32-10 of (s // 8, t, b * H + h, offset); its words, low half first, are eight lanes.
    With PLACED the seed goes on with H and the first head, query and key (in eights) of this part.
    """
    seed = tl.load(x.dropout_seed)
    times = tl.load(x.dropout_seed + 1).to(tl.uint32)
    t = (t0 + tl.arange(0, M)).to(tl.uint32)[:, None]
    eights = (j0 // 8 + tl.arange(0, N // 8)).to(tl.uint32)[None, :]
    stream = (b * p.H + h).to(tl.uint32)
    if f.PLACED:
        heads = tl.load(x.dropout_seed + 2)
        stream = (b * heads + tl.load(x.dropout_seed + 3) + h).to(tl.uint32)
        t += tl.load(x.dropout_seed + 4).to(tl.uint32)
        eights += (tl.load(x.dropout_seed + 5) // 8).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, eights, t, stream, times)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [M, N / 8, 2, 2]: word // 2 after word % 2
    lanes = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(lanes.to(tl.int32) >= p.threshold, [M, N])
