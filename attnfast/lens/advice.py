"""Which heads could take a window, what that loses, and how much faster it makes them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..functional import attention

WORTH = 0.5  # share of its scores that a window leaves to a head, at most
MEASURED = 8192  # tokens up to which the speed is measured
REPEATS = 3


class Heads(NamedTuple):
    """A layer's."""

    q: Tensor  # (1, 1, T, D), of one head
    k: Tensor  # (1, 1, T, D)
    causal: bool
    mass: Tensor  # (H, 64), the mean probability by signed log2 distance


def advice(layers: Mapping[str, Heads], keep: float) -> dict[str, Any]:
    """What the page says of windows: a sentence, and a row for each head that could take one."""
    rows: list[dict[str, Any]] = []
    index, T = 0, 0  # of a head among all; tokens
    for layer, call in layers.items():
        mass, T = call.mass, call.q.shape[2]
        windows = windows_of(mass, keep)
        for h, window in enumerate(windows.tolist()):
            scores = share_of_scores(T, call.causal, *window)
            if scores <= WORTH:
                row = {"index": index, "layer": layer, "window": window, "scores": scores}
                rows.append(row | {"lost": lost(mass[h], *window)})
            index += 1
    measured = T <= MEASURED
    spent = seconds([(layers[row["layer"]], *row["window"]) for row in rows]) if measured else {}
    for row in rows:
        call = layers[row["layer"]]
        whole, part = (spent.get(key(call, *x)) for x in ((-1, -1), row["window"]))
        row["faster"] = whole / part if whole and part else 1 / row["scores"]
    return {
        "says": says(rows, index, keep, measured, T),
        "rows": rows,
        "speed": "faster" if measured else "faster, estimated",
    }


def windows_of(mass: Tensor, keep: float) -> Tensor:
    """The narrowest windows ``(H, 2)``, back and ahead, that keep a share of probability.

    Args:
        mass: ``(H, 64)``, by signed log2 distance. A window ends where a bin ends.
        keep: the share, less than 1.
    """
    sums = nn.functional.pad(mass.double().cumsum(1), (1, 0))  # of the bins before
    kept = sums[:, 33:, None] - sums[:, None, :33].flip(2)  # [H, bins back, bins ahead]
    widths = 2.0 ** torch.arange(32)[:, None] + 2.0 ** torch.arange(33)
    widths = torch.where(kept >= keep * sums[:, -1:, None], widths, torch.inf)
    place = widths.flatten(1).argmin(1)
    bins = torch.stack([place // 33, place % 33], 1)
    return 2**bins - 1


def share_of_scores(T: int, causal: bool, left: int, right: int) -> float:
    """Scores within a window, of those that are without it."""
    t = torch.arange(T, dtype=torch.float64)
    ahead = torch.zeros_like(t) if causal else T - 1 - t
    within = [x if size < 0 else x.clamp(max=size) for x, size in ((t, left), (ahead, right))]
    return float((within[0] + within[1] + 1).sum() / (t + ahead + 1).sum())


def lost(mass: Tensor, left: int, right: int) -> float:
    """The share of a head's probability, (64,) by signed log2 distance, that a window leaves out.

    A window ends where a bin ends.
    """
    low = 0 if right < 0 else 32 - right.bit_length()
    high = 64 if left < 0 else 33 + left.bit_length()
    return max(0.0, 1 - float(mass[low:high].sum() / mass.sum().clamp(min=1e-30)))


def key(call: Heads, left: int, right: int) -> tuple[Any, ...]:
    """What a call's time depends on."""
    return tuple(call.q.shape), call.q.dtype, call.causal, left, 0 if call.causal else right


def seconds(wanted: Iterable[tuple[Heads, int, int]]) -> dict[tuple[Any, ...], float]:
    """The least time of each head's call with its window, and without, in turns."""
    calls = {key(call, *window): (call, window) for call, *window in wanted}
    calls |= {key(call, -1, -1): (call, [-1, -1]) for call, _ in list(calls.values())}
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(REPEATS):
        for name, (call, window) in calls.items():
            left, right = (None if size < 0 else size for size in window)
            start = time.perf_counter()
            attention(call.q, call.k, call.k, causal=call.causal, window=(left, right))
            least[name] = min(least[name], time.perf_counter() - start)
    return least


def says(rows: list[dict[str, Any]], heads: int, keep: float, measured: bool, T: int) -> str:
    """What the rows mean."""
    text = (
        f"Of {heads} heads {len(rows)} keep at least {keep:.0%} of their probability in a window"
        f" that leaves them at most {WORTH:.0%} of their scores; windows are rounded up to a power"
        " of 2 less one. What is lost was measured on this text; a model's results change by"
        " more, or less."
    )
    if measured:
        return (
            f"{text} How much faster one head's attention becomes was measured here, over {T}"
            f" tokens, in {torch.get_num_threads()} thread(s), the best of {REPEATS} runs."
        )
    return f"{text} How much faster it becomes is estimated from the scores that are left."
