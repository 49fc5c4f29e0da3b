"""`python -m bench tune`: find the fastest tile of every Triton kernel on this GPU.

For one place of the table (architecture, pass, bytes of an element, head dimension) the search
starts at the tile that is there, tries all that differ in one number by one step, goes on from the
fastest, and ends where none is faster by `GAIN`. A tile is timed only if its results agree with
those of the first. What is found goes to kernels/tuned.py.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnfast.backends import triton
from attnfast.call import (
    BY_DISTANCE,
    DISTANCES,
    MEAN,
    DecodeInputs,
    DecodeOptions,
    Inputs,
    Options,
    Pooling,
    Upstream,
)
from bench import ROOT, clock, environment

PATH = ROOT / "kernels" / "tuned.py"
GAIN = 0.02  # of the time, below which a tile is not taken for faster
ROUNDS = 9
LEAST, MOST = 16, 128  # a tile's queries or keys
WARPS = (4, 8)
MOST_STAGES = 4
SECOND_PASSES = ("weights", "received", "cells", "distances")
PASSES = ("fwd", "rows", "dq", "dkdv", "dbias", *SECOND_PASSES, "decode")
UNPIPELINED = ("rows", "dbias", *SECOND_PASSES)  # always one stage, see configs.choose
DTYPES = {2: torch.bfloat16, 4: torch.float32}

Tile = tuple[int, int, int, int]  # BLOCK_M, BLOCK_N, warps, stages
Tuned = dict[tuple[str, str, int, int], Tile]  # by arch, pass, bytes, D


class Place(NamedTuple):
    """One entry of the table."""

    arch: str
    name: str  # the pass
    size: int  # bytes of an element
    D: int


class Unfit(Exception):
    """A tile that cannot be used; one line."""


class Found(NamedTuple):
    """What a search ended with."""

    tile: Tile
    seconds: float
    before_s: float  # of the tile it started at
    tried: int
    unfit: dict[Tile, str]


def neighbours(tile: Tile, name: str) -> Iterator[Tile]:
    """The tiles that differ from one in one number, by one step."""
    queries, keys, warps, stages = tile
    if name != "decode":  # whose queries fill one tile at most
        yield from ((x, keys, warps, stages) for x in (queries // 2, queries * 2) if _fits(x))
    yield from ((queries, x, warps, stages) for x in (keys // 2, keys * 2) if _fits(x))
    yield from ((queries, keys, x, stages) for x in WARPS if x != warps)
    if name not in UNPIPELINED:
        around = (stages - 1, stages + 1)
        yield from ((queries, keys, warps, x) for x in around if 1 <= x <= MOST_STAGES)


def _fits(block: int) -> bool:
    return LEAST <= block <= MOST


def least_shared(tile: Tile, place: Place) -> int:
    """Bytes of shared memory that the pipelined tiles of two tensors take at least."""
    queries, keys, _, stages = tile
    rows = queries if place.name == "dkdv" else keys
    return 2 * rows * place.D * place.size * (stages if place.name not in UNPIPELINED else 1)


def search(place: Place, start: Tile, limit: int, measure: Callable[[Tile], float]) -> Found:
    """The fastest tile that single steps lead to.

    Args:
        place: What the tile is for.
        start: Where to begin.
        limit: Bytes of shared memory that a program may have; tiles that need more are not tried.
        measure: Seconds of a tile, or `Unfit`.

    Raises:
        Unfit: Already the first tile is.
    """
    seconds = {start: measure(start)}
    unfit: dict[Tile, str] = {}
    best = start
    while True:
        for tile in neighbours(best, place.name):
            if tile in seconds or tile in unfit:
                continue
            if least_shared(tile, place) > limit:
                unfit[tile] = f"needs more than {limit} bytes of shared memory"
                continue
            try:
                seconds[tile] = measure(tile)
            except Unfit as reason:
                unfit[tile] = str(reason)
        fastest = min(seconds, key=lambda tile: seconds[tile])
        if seconds[fastest] > seconds[best] * (1 - GAIN):
            return Found(best, seconds[best], seconds[start], len(seconds), unfit)
        best = fastest


def agree(results: Iterable[Tensor], expected: Iterable[Tensor], terms: int) -> str | None:
    """How results differ by more than another order of the same sums explains, or None.

    Args:
        results: Of a tile.
        expected: Of another.
        terms: How many numbers are summed.
    """
    for i, (result, truth) in enumerate(zip(results, expected, strict=True)):
        if not truth.numel():
            continue
        same = (result == truth) | (result.isnan() & truth.isnan())
        finite = torch.where(truth.isfinite(), truth, 0.0).double()
        allowed = 4 * torch.finfo(truth.dtype).eps + terms**0.5 * torch.finfo(torch.float32).eps
        allowed *= max(float(finite.abs().max()), torch.finfo(truth.dtype).tiny)
        error = torch.where(same, 0.0, (result.double() - truth.double()).abs())
        if not bool((error <= allowed).all()):
            return f"result {i} differs by {float(error.max()):.2g}, allowed is {allowed:.2g}"
    return None


class Sizes(NamedTuple):
    """Of the call that is timed."""

    B: int
    H: int
    T: int


def sizes_of(place: Place) -> Sizes:
    """A call that fills a GPU for about a millisecond."""
    if place.name == "decode":
        return Sizes(16, 8, 16384 if place.D <= 128 else 8192)
    return Sizes(2, 16 if place.size == 2 else 4, 4096 if place.D <= 128 else 2048)


def call_of(
    place: Place, sizes: Sizes, device: torch.device
) -> tuple[Callable[[], tuple[Tensor, ...]], int]:
    """A call of the operator that runs a pass, and how many terms its sums have."""
    generator = torch.Generator(device).manual_seed(0)
    B, H, T = sizes
    ops = triton.ROW.ops

    def normal(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator, device=device)
        return x.to(DTYPES[place.size])

    scale = place.D**-0.5
    k, v = normal(B, H, T, place.D), normal(B, H, T, place.D)
    if place.name == "decode":
        q = normal(B, 8 * H, 1, place.D)
        lengths = torch.full((B,), T, dtype=torch.int32, device=device)
        step, given = DecodeInputs(q, k, v, lengths), DecodeOptions(scale)
        return lambda: tuple(ops.decode(*step, *given)), T
    q = normal(B, H, T, place.D)
    inputs = Inputs(q, k, v, bias=normal(1, H, T, T) if place.name == "dbias" else None)
    asked = {"weights": {"weights": 1}, "received": {"stats": 2}}
    options = Options(scale, **asked.get(place.name, {}))
    if place.name in ("fwd", *asked):
        return lambda: tuple(ops.fwd(*inputs, *options)), T
    out, _, norm, *_ = ops.fwd(*inputs, *options)
    if place.name == "cells":
        pooling = Pooling(norm, None, None, MEAN, T // 64, T // 64)
        return lambda: (ops.pooled(*inputs, *options, *pooling),), T
    if place.name == "distances":
        pooling = Pooling(norm, None, None, BY_DISTANCE, T // 256, DISTANCES)
        return lambda: (ops.pooled(*inputs, *options, *pooling),), T
    grad_out = normal(*out.shape)
    upstream = Upstream.plain(grad_out, out, norm)._replace(need_dbias=place.name == "dbias")
    if place.name == "rows":  # which has products only then
        options = options._replace(weights=1)
        upstream = upstream._replace(grad_weights=normal(B, T, T))
    return lambda: tuple(ops.bwd(*upstream, *inputs, *options)), T


class Trial:
    """Measures the tiles of one place.

    The whole operator is timed. What runs beside the kernel in question is the same each time.

    Args:
        place: What to measure.
        sizes: Of the call.
        device: Where.
        stopwatch: Times calls; `clock.EventClock` on a GPU.
    """

    def __init__(self, place: Place, sizes: Sizes, device: torch.device, stopwatch: Any) -> None:
        self.place, self.stopwatch = place, stopwatch
        with torch.no_grad():
            self.call, self.terms = call_of(place, sizes, device)
        self.expected: tuple[Tensor, ...] | None = None

    def measure(self, tile: Tile) -> float:
        """The median of a tile's times in seconds.

        Raises:
            Unfit: It does not compile, or its results are not those of the first tile.
        """
        from attnfast.kernels import configs

        configs.trial[self.place.name] = configs.Config(*tile)
        try:
            with torch.no_grad():
                return self._measure()
        except (RuntimeError, ValueError) as error:
            raise Unfit(_line(error)) from None
        except Exception as error:  # Triton's errors have no base but this
            if not type(error).__module__.startswith("triton"):
                raise
            raise Unfit(_line(error)) from None
        finally:
            del configs.trial[self.place.name]

    def _measure(self) -> float:
        results = self.call()
        if self.expected is None:
            self.expected = tuple(x.clone() for x in results)
        difference = agree(results, self.expected, self.terms)
        if difference is not None:
            raise Unfit(difference)
        call = lambda: dict(enumerate(self.call()))  # noqa: E731
        return statistics.median(self.stopwatch.read(call).seconds for _ in range(ROUNDS))


def _line(error: Exception) -> str:
    """An error in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def text(tuned: Tuned) -> str:
    """The table as a module."""
    lines = "".join(f"    {place!r}: {tile!r},\n" for place, tile in sorted(tuned.items()))
    return (
        '"""Tiles that were the fastest on hardware: written by ``python -m bench tune``, not by'
        ' hand."""\n\n'
        "from __future__ import annotations\n\n"
        "# (architecture, pass, bytes of an element, largest D and D_v) -> BLOCK_M, BLOCK_N, warps,"
        " stages\n"
        "TUNED: dict[tuple[str, str, int, int], tuple[int, int, int, int]] = {"
        + (f"\n{lines}}}\n" if lines else "}\n")
    ).replace("'", '"')


def read(path: Path) -> Tuned:
    """The table of a module that `text` wrote; empty if there is none."""
    names: dict[str, Any] = {}
    if path.exists():
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), names)
    return dict(names.get("TUNED", {}))


def tune(
    places: Iterable[Place],
    path: Path,
    limit: int,
    start_of: Callable[[Place], Tile],
    measure_of: Callable[[Place], Callable[[Tile], float]],
    until: float = float("inf"),
    now: Callable[[], float] = time.monotonic,
) -> Tuned:
    """Search at every place, and write the table after each: a run that is stopped has its part.

    Args:
        places: Where; those that the table has already are left as they are.
        path: Of the table.
        limit: Bytes of shared memory of a program.
        start_of: The tile that a place has now.
        measure_of: Prepares a place; what measures its tiles.
        until: ``now()`` after which no place is begun.
        now: A clock.

    Returns:
        The table.
    """
    tuned = read(path)
    for place in places:
        if tuple(place) in tuned:
            continue
        if now() >= until:
            print("the time is over: the same command goes on from here", flush=True)
            break
        try:
            found = search(place, start_of(place), limit, measure_of(place))
        except Unfit as reason:
            print(f"{' '.join(map(str, place))}: left out: {reason}", flush=True)
            continue
        tuned[tuple(place)] = found.tile
        path.write_text(text(tuned), encoding="utf-8")
        print(line(place, found), flush=True)
    return tuned


def line(place: Place, found: Found) -> str:
    """A search in one line."""
    return (
        f"{' '.join(map(str, place))}: {found.tile}, {found.seconds * 1e3:.3f} ms,"
        f" before {found.before_s * 1e3:.3f} ms; {found.tried} timed, {len(found.unfit)} unfit"
    )


def command(options: argparse.Namespace) -> int:
    """The command on this machine's GPU.

    Raises:
        ValueError: There is none that Triton can use; one line.
    """
    reason = environment.unavailable("triton", "cuda")
    if reason is not None:
        raise ValueError(f"bench: nothing to tune: {reason}")
    from attnfast.kernels import configs

    device = torch.device("cuda", torch.cuda.current_device())
    arch = configs.architecture(device)
    properties = torch.cuda.get_device_properties(device)
    limit = int(getattr(properties, "shared_memory_per_block_optin", 0) or 64 << 10)
    places = [
        Place(arch, name, size, D)
        for size in options.bytes or DTYPES
        for D in options.head_dim or configs.HEAD_DIMS
        for name in options.passes or PASSES
    ]
    stopwatch = clock.clock(device, 1)
    tune(
        places,
        options.out,
        limit,
        lambda place: tuple(configs.entry(*place)),
        lambda place: Trial(place, sizes_of(place), device, stopwatch).measure,
        time.monotonic() + 60 * options.minutes,
    )
    print(f"wrote {options.out}. Then compile what changed: make aot ARGS='--write --missing'")
    return 0
