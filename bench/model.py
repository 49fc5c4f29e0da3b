"""How long attention takes: a model with four numbers for each kernel and machine.

    seconds = launch + (flop / rate + pairs * pair) / workers + bytes / bandwidth

``flop`` are those of the matrix products of all tiles that are touched, ``pairs`` the scores in
them (each costs an exponential and more, whatever D is), ``workers`` how many threads have
something to do at once, ``bytes`` every input and output once. On a CPU the four numbers are fitted
to measurements; for a GPU they are its ceilings, and the parts may overlap:

    seconds >= launch + max(flop / rate, pairs * pair, bytes / bandwidth)

as FlashAttention-3 (arXiv:2407.08608) aims at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .grid import DTYPES


class Tiles(NamedTuple):
    """How a kernel cuts its work."""

    queries: int
    keys: int


class Shape(NamedTuple):
    """Self-attention of B H sequences of T rows, on some threads."""

    B: int
    H: int
    T: int
    D: int
    dtype: str
    causal: bool
    work: str  # "forward" or "forward+backward"
    threads: int


class Work(NamedTuple):
    """What a call has to do."""

    flop: float
    pairs: float
    bytes: float
    workers: float


class Machine(NamedTuple):
    """The four numbers. Rate and pair are those of one worker."""

    launch: float  # seconds
    rate: float  # FLOP/s
    pair: float  # seconds
    bandwidth: float  # bytes/s


class Fitted(NamedTuple):
    """A kernel's points, its model and how far off that is."""

    dtype: str
    work: str
    machine: Machine
    rows: list[dict[str, Any]]
    predicted: list[float]
    known_error: float  # of the points that the model was fitted to
    unseen_error: float  # of those in between


CPU_TILES = {"float32": Tiles(64, 64), "bfloat16": Tiles(128, 64), "float16": Tiles(128, 64)}
GPU_TILES = Tiles(128, 128)
PRODUCTS = {"forward": 2, "forward+backward": 2 + 5}
FEW_HEADS_PRODUCTS = 2 + 7  # dq apart from dk and dv, where heads are fewer than threads


def touched(T: int, causal: bool, tiles: Tiles) -> float:
    """Scores of one head in the tiles that are computed."""
    if not causal:
        return float(T * T)
    starts = np.arange(0, T, tiles.queries)
    ends = np.minimum(starts + tiles.queries, T)
    keys = np.minimum(np.ceil(ends / tiles.keys) * tiles.keys, T)
    return float(((ends - starts) * keys).sum())


def work(shape: Shape, tiles: Tiles) -> Work:
    """What a shape has to do, on the CPU backend's threads."""
    B, H, T, D = shape[:4]
    heads, threads = B * H, shape.threads
    pairs = heads * touched(T, shape.causal, tiles)
    products = PRODUCTS[shape.work]
    blocks = heads * -(-T // tiles.queries)
    workers = _balance(blocks, threads)
    if shape.work != "forward":
        if -(-heads // threads) * 5 * threads > heads * 7 + 2:
            products = FEW_HEADS_PRODUCTS
        else:
            workers = _balance(heads, threads)
    rows = 4.0 * heads * T * D * DTYPES[shape.dtype].itemsize
    factor = 1 if shape.work == "forward" else 3
    scored = (
        pairs if shape.work == "forward" else 2 * pairs
    )  # the backward pass computes them again
    return Work(2.0 * products * pairs * D, scored, rows * factor, workers)


def _balance(items: int, threads: int) -> float:
    """Threads that are busy on average while items are shared out."""
    return items / -(-items // threads)


def seconds(todo: Work, machine: Machine) -> float:
    """The model, nothing overlapping."""
    compute = todo.flop / machine.rate + todo.pairs * machine.pair
    return machine.launch + compute / todo.workers + todo.bytes / machine.bandwidth


def overlapped(todo: Work, machine: Machine) -> float:
    """The model with everything overlapping: no kernel is faster."""
    parts = (todo.flop / machine.rate, todo.pairs * machine.pair, todo.bytes / machine.bandwidth)
    return machine.launch + max(parts)


def fit(todo: Sequence[Work], measured: Sequence[float]) -> Machine:
    """The four numbers by least squares of relative errors, none of them negative.

    Args:
        todo: At least four different pieces of work.
        measured: Their seconds.
    """
    terms = np.array([[1, w.flop / w.workers, w.pairs / w.workers, w.bytes] for w in todo])
    relative = terms / np.array(measured)[:, None]
    scale = np.abs(relative).max(0)
    scale[scale == 0] = 1
    best = _nonnegative(relative / scale) / scale
    launch, flop_s, pair, byte_s = (float(x) for x in best)
    rate, bandwidth = (1 / x if x else math.inf for x in (flop_s, byte_s))
    return Machine(launch, rate, pair, bandwidth)


def _nonnegative(terms: np.ndarray) -> np.ndarray:
    """X >= 0 that brings terms x closest to 1: the best of all choices of what is not zero."""
    count = terms.shape[1]
    best, error = np.zeros(count), math.inf
    for chosen in range(1, 1 << count):
        columns = [i for i in range(count) if chosen >> i & 1]
        part, *_ = np.linalg.lstsq(terms[:, columns], np.ones(len(terms)), rcond=None)
        if (part < 0).any():
            continue
        left = float(((terms[:, columns] @ part - 1) ** 2).sum())
        if left < error:
            error = left
            best = np.zeros(count)
            best[columns] = part
    return best


def error(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """The geometric mean of the factors by which they differ, less 1: 0.2 is 20 per cent."""
    factors = [abs(math.log(p / m)) for p, m in zip(predicted, measured, strict=True)]
    return math.exp(sum(factors) / len(factors)) - 1


# Ceilings from the vendors' data sheets: dense bf16 FLOP/s, exponentials/s (16 per clock and
# multiprocessor, at the boost clock), bytes/s. Not measured.
LAUNCH_S = 5e-6
DATA_SHEETS = {
    "H100 SXM": Machine(LAUNCH_S, 989.4e12, 1 / (132 * 16 * 1.83e9), 3.35e12),
    "A100 SXM 80 GB": Machine(LAUNCH_S, 312e12, 1 / (108 * 16 * 1.41e9), 2.039e12),
    "RTX 4090": Machine(LAUNCH_S, 165.2e12, 1 / (128 * 16 * 2.52e9), 1.008e12),
}
