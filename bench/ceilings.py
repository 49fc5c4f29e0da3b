"""What the machine can do at best, measured in the same run as the rows.

    fma     FLOP/s of multiply-adds on registers (CPU), the processor's peak
    gemm    FLOP/s of torch's matrix product of large square matrices
    copy    bytes read and written per second, by how many bytes are touched
    launch  seconds of the shortest call of torch that does something

A row's limit is the roofline (Williams, Waterman and Patterson, 2009): its FLOP at the highest of
the rates for its dtype and fp32, or its bytes at the rate of copying as many, whichever takes
longer.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from .clock import EventClock, HostClock, clock
from .grid import DTYPES, Case

SOURCE = Path(__file__).with_name("fma.cpp")
GEMM_SIZE = {"cpu": (256, 2048), "cuda": (8192, 8192)}  # the smallest and the largest
GEMM_S = 0.4  # of one product: a CPU may have none of its own for bf16
COPY_BYTES = {"cpu": (1 << 18, 1 << 22, 1 << 26, 1 << 29), "cuda": (1 << 24, 1 << 27, 1 << 31)}
FMA_STEPS = 200_000  # about a millisecond: the best of many slices is one that nothing disturbs


def measure(device: torch.device, threads: int, *, dry: bool = False) -> dict[str, Any]:
    """The ceilings of a device.

    Args:
        device: Of the rows.
        threads: That the rows are measured with, on a CPU.
        dry: Sizes so small that the figures mean nothing, to see that everything works.

    Returns:
        ``gemm`` and ``fma``: FLOP/s by dtype; ``copy``: pairs of bytes and bytes/s; ``launch``:
        seconds; ``missing``: what could not be measured, and why.
    """
    found: dict[str, Any] = {"gemm": {}, "fma": {}, "copy": [], "missing": {}}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    timer = clock(device, threads)
    try:
        for name in ("float32", "bfloat16", "float16"):
            if name == "float16" and device.type == "cpu":
                continue
            sizes = (128, 128) if dry else GEMM_SIZE[device.type]
            found["gemm"][name] = _gemm(timer, device, DTYPES[name], *sizes)
        for size in COPY_BYTES[device.type]:
            found["copy"].append([size, _copy(timer, device, size >> 8 if dry else size)])
        found["launch"] = _launch(timer, device)
    finally:
        torch.set_num_threads(before)
    if device.type == "cpu":
        rates, reason = _fma(threads, 1000 if dry else FMA_STEPS)
        found["fma"] = rates
        if reason:
            found["missing"]["fma"] = reason
    return found


def limit_s(case: Case, ceilings: dict[str, Any] | None) -> float | None:
    """The time in which the machine could do a row at best; None without ceilings."""
    if not ceilings:
        return None
    peak = peak_flops(case.dtype, ceilings)
    size = case.bytes
    rates = [rate for touched, rate in ceilings["copy"] if touched >= size]
    bandwidth = rates[0] if rates else ceilings["copy"][-1][1]
    return float(max(case.flop / peak, size / bandwidth))


def peak_flops(dtype: str, ceilings: dict[str, Any]) -> float:
    """The highest rate for a dtype; at least fp32's, in which it can be computed."""
    return float(
        max(ceilings[kind].get(x, 0.0) for kind in ("gemm", "fma") for x in (dtype, "float32"))
    )


def _best(timer: HostClock | EventClock, call: Any, rounds: int = 7) -> float:
    """The shortest time of a call, after one to warm up."""
    call()
    return min(timer.read(call).seconds for _ in range(rounds))


def _gemm(
    timer: HostClock | EventClock, device: torch.device, dtype: torch.dtype, size: int, most: int
) -> float:
    """FLOP/s of the largest product, of sizes that double, that does not take too long."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=dtype)
    seconds = _best(timer, lambda: torch.mm(a, b, out=out))
    if size < most and 8 * seconds < GEMM_S:
        return _gemm(timer, device, dtype, 2 * size, most)
    return 2.0 * size**3 / seconds


def _copy(timer: HostClock | EventClock, device: torch.device, touched: int) -> float:
    source = torch.ones(max(1, touched // 8), device=device)  # fp32: half is read, half written
    target = torch.empty_like(source)
    repeats = max(1, (1 << 24) // touched) if device.type == "cpu" else 1

    def copy() -> None:
        for _ in range(repeats):
            target.copy_(source)

    return 8.0 * source.numel() * repeats / _best(timer, copy)


def _launch(timer: HostClock | EventClock, device: torch.device) -> float:
    x = torch.ones(8, device=device)
    return _best(timer, lambda: torch.add(x, x, out=x), 50)


def _fma(threads: int, steps: int) -> tuple[dict[str, float], str | None]:
    """The peak by dtype; or none, and why."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++")), "")
    command = shlex.split(compiler)
    if not command or shutil.which(command[0]) is None:
        return {}, "no C++ compiler"
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "fma.so"
        command += ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        done = subprocess.run(
            [*command, str(SOURCE), "-o", str(library)], capture_output=True, text=True
        )
        if done.returncode:
            return {}, f"{compiler} failed: {(done.stderr.strip() or 'no message').splitlines()[0]}"
        loaded = ctypes.CDLL(str(library))
        rates = {}
        for dtype, function in (("float32", loaded.fma_fp32), ("bfloat16", loaded.fma_bf16)):
            function.restype, function.argtypes = ctypes.c_double, [ctypes.c_int, ctypes.c_int64]
            rate = float(function(threads, steps))
            if rate > 0:
                rates[dtype] = rate
    return rates, None
