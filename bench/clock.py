"""Clocks: how long a call takes on a CPU or a GPU, and what memory it needs beside its inputs.

On a GPU the time is that between two events around the call. Before them the L2 cache is flushed,
and the GPU is kept busy long enough for the host to issue the whole call: what is measured is the
GPU's work and not the host's. The host's time to issue the call is taken at the same time and kept
apart. Where a call can be captured into a graph, its replay is timed.
`triton.testing.do_bench` measures alike, but repeats one function, so that nobody could take turns;
`torch.utils.benchmark` has the host's time in its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

DISTURBED = 0.03  # of a call's time that its threads may wait for a core

Results = dict[str, Tensor]  # the results of a call by name
Call = Callable[[], Results]


class Reading(NamedTuple):
    """One call."""

    seconds: float
    host_s: float  # until the call returned
    results: Results
    disturbed: bool = False  # its threads had to wait for a core


class HostClock:
    """The CPU's clock: a call is done when it returns.

    Args:
        threads: Of the calls. With one, its CPU time is taken, which leaves out what other
            processes do meanwhile; with more, the time on the wall.
    """

    copies = 1  # of the inputs: rows find their tensors in the cache, as in a model they would

    def __init__(self, threads: int) -> None:
        self.name = "cpu time" if threads == 1 else "wall"
        self.now = time.process_time if threads == 1 else time.perf_counter

    def read(self, call: Call) -> Reading:
        """Time one call."""
        waited = _waited() if self.name == "wall" else 0.0
        start = self.now()
        results = call()
        seconds = self.now() - start
        disturbed = self.name == "wall" and _waited() - waited > DISTURBED * seconds
        return Reading(seconds, seconds, results, disturbed)

    def prepared(self, call: Call) -> Call:
        """A call as it is timed."""
        return call

    def peak(self, call: Call) -> tuple[Reading, int | None]:
        """Time one call, and by how many bytes resident memory grew at most; None if unknown."""
        if not _trim() or not _reset_peak():
            return self.read(call), None
        before = _status("VmRSS")
        reading = self.read(call)
        after = _status("VmHWM")
        if before is None or after is None:
            return reading, None
        return reading, max(0, after - before)


class EventClock:
    """A CUDA device's clock.

    Args:
        cuda: ``torch.cuda``, or what stands for it in a test.
        flush: A tensor larger than the L2 cache, written before every call; by default as large as
            twice the cache.
    """

    name = "events"
    copies = 3  # of the inputs, taken in turn

    def __init__(self, cuda: Any = torch.cuda, flush: Tensor | None = None) -> None:
        self.cuda = cuda
        properties = cuda.get_device_properties(0)
        size = 2 * int(getattr(properties, "L2_cache_size", 0) or 64 << 20)
        self.flush = torch.empty(size, dtype=torch.int8, device="cuda") if flush is None else flush
        self.cycles_per_s = 1e3 * float(getattr(properties, "clock_rate", 2e6) or 2e6)  # from kHz
        self.lead_s = 1e-3  # how long the GPU is kept busy before a call

    def read(self, call: Call) -> Reading:
        """Time one call between two events."""
        start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        self.cuda._sleep(int(self.lead_s * self.cycles_per_s))
        start.record()
        begin = time.perf_counter()
        results = call()
        host_s = time.perf_counter() - begin
        end.record()
        end.synchronize()
        self.lead_s = min(0.02, max(self.lead_s, 1.5 * host_s))
        return Reading(start.elapsed_time(end) / 1e3, host_s, results)

    def prepared(self, call: Call) -> Call:
        """The call's replay from a graph; the call itself where it cannot be captured."""
        try:
            side = self.cuda.Stream()
            side.wait_stream(self.cuda.current_stream())
            with self.cuda.stream(side):
                call()
            self.cuda.current_stream().wait_stream(side)
            graph = self.cuda.CUDAGraph()
            with self.cuda.graph(graph):
                results = call()
        except RuntimeError:  # synchronises, or allocates outside of torch
            self.cuda.synchronize()
            return call

        def replay() -> Results:
            graph.replay()
            return results

        return replay

    def peak(self, call: Call) -> tuple[Reading, int | None]:
        """Time one call, and by how many bytes torch's allocator grew at most."""
        self.cuda.synchronize()
        self.cuda.reset_peak_memory_stats()
        before = self.cuda.memory_allocated()
        reading = self.read(call)
        return reading, int(self.cuda.max_memory_allocated() - before)


Clock = HostClock | EventClock


def clock(device: torch.device, threads: int) -> Clock:
    """The clock of a device, for calls of as many threads on a CPU."""
    return EventClock() if device.type == "cuda" else HostClock(threads)


def _waited() -> float:
    """Seconds that this process's threads were ready to run and did not; 0 if nobody counts."""
    total = 0
    for stat in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # the thread has ended
            total += int(stat.read_text().split()[1])
    return total / 1e9


def _trim() -> bool:
    """Give free memory back to the system, so that a peak is a peak."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return False
    return True


def _reset_peak() -> bool:
    """Set the peak of resident memory back to what is resident."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> int | None:
    """A size of this process in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    sizes = [line.split() for line in lines if line.startswith(f"{name}:")]
    return int(sizes[0][1]) * 1024 if sizes else None
