"""A stand-in for Triton's driver: its device is the PTX machine, its binaries are PTX.

The launcher, Triton's specialisation of arguments and its compiler are the real ones, up to the
PTX; ptxas is left out.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import _allocation, driver

from .machine import Fault, Program, Range

SHARED_LIMIT = {80: 166912, 90: 232448}  # bytes of a block
MOST_THREADS = 1024
FORMATS = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q"}
FORMATS |= {"u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q", "fp32": "f", "fp64": "d"}


class Driver:
    """What Triton, and our launcher, ask of a driver.

    Attributes:
        edit: What is done to the PTX of a kernel of that name before it runs: to plant faults.
        checks: Whether races and reads of what was never written are faults.
        programs: What was run last under each kernel's name.
        launches: The names of the kernels that were launched.
    """

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)
        self.utils = self
        self.launcher_cls = Launcher
        self.edit: Callable[[str, str], str] = lambda name, text: text
        self.checks = True
        self.programs: dict[str, Program] = {}
        self.launches: list[str] = []
        self._loaded: dict[str, Program] = {}

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return self.target

    def get_current_device(self) -> None:
        """The index of the tensors' device, and the CPU's has none."""

    def get_current_stream(self, device: int | None) -> int:
        """The default stream."""
        return 0

    def get_device_properties(self, device: int | None) -> dict[str, int]:
        """What Triton holds a kernel to."""
        return {"max_shared_mem": SHARED_LIMIT[self.target.arch]}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int | None) -> Any:
        """Module, function, registers, spills and the most threads."""
        return None, (name, binary.decode()), 0, 0, MOST_THREADS

    def program(self, name: str, text: str) -> Program:
        """The kernel to run: that of the text, edited."""
        text = self.edit(name, text)
        if text not in self._loaded:
            self._loaded[text] = Program(text)
        self.programs[name] = self._loaded[text]
        self.launches.append(name)
        return self._loaded[text]


class Launcher:
    """What Triton calls with a grid and arguments: one for every compiled kernel."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.metadata = metadata
        self.types = list(leaves(tuple(src.signature.values())))

    def __call__(
        self, x: int, y: int, z: int, stream: int, function: tuple[str, str], *rest: Any
    ) -> None:
        """Run the kernel; `rest` ends with its arguments."""
        of = driver.active
        name, text = function
        program = of.program(name, text)
        arguments = rest[4:]  # after two records of metadata and two hooks
        read_only = {id(x) for x in leaves(arguments[0])}
        passed, ranges = [], []
        for kind, value in zip(self.types, leaves(arguments), strict=True):
            if kind == "constexpr":
                continue
            if isinstance(value, torch.Tensor):
                ranges.append(Range.of(value, id(value) not in read_only))
                value = value.data_ptr()
            passed.append(struct.pack("Q" if kind[0] == "*" else FORMATS[kind], value))
        scratch = [self.scratch(what, x * y * z, stream) for what in ("global", "profile")]
        for room in scratch:
            if room is not None:
                ranges.append(Range.of(room, True))
            passed.append(struct.pack("Q", 0 if room is None else room.data_ptr()))
        blob = bytearray(sum(program.parameters[-1]))
        for parameter, value in zip(program.parameters, passed, strict=True):
            blob[parameter.offset : parameter.offset + len(value)] = value
        seed = int(os.environ.get("ATTNFAST_EMULATOR_SEED", "0"))
        threads = 32 * self.metadata.num_warps
        try:
            program.launch(
                (x, y, z), threads, self.metadata.shared, bytes(blob), ranges, seed, of.checks
            )
        except Fault as fault:
            raise Fault(f"{name}: {fault}") from None

    def scratch(self, what: str, programs: int, stream: int) -> torch.Tensor | None:
        """Memory beside the arguments that the kernel wants, from the allocator that was set."""
        size = getattr(self.metadata, f"{what}_scratch_size", 0)
        if not size or what == "profile":
            return None
        align = getattr(self.metadata, f"{what}_scratch_align")
        room = _allocation._allocator.get()(size * programs + align, align, stream)
        return room[-room.data_ptr() % align :]  # the CPU's memory may begin at any 64 bytes


def leaves(x: Any) -> Iterator[Any]:
    """What is in nested tuples."""
    if isinstance(x, tuple):
        for part in x:
            yield from leaves(part)
    else:
        yield x


def install(arch: int) -> Driver:
    """Make it Triton's driver."""
    CUDABackend.make_cubin = lambda self, src, metadata, opt, capability: src.encode()
    driver.set_active(Driver(arch))
    return driver.active
