"""The PTX machine's C interface."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

LIBRARY = Path(__file__).resolve().parents[2] / "build" / "emulator" / "_emulator.so"
ROOM = 1 << 14  # bytes of a message
MOST_PARAMETERS = 256


class Fault(RuntimeError):
    """What a kernel does that it must not."""


class Range(NamedTuple):
    """Bytes of global memory that a kernel may touch."""

    begin: int
    end: int
    writable: bool

    @classmethod
    def of(cls, x: torch.Tensor, writable: bool) -> Range:
        """From the first byte of a view to past its last."""
        begin = end = x.data_ptr()
        if x.numel():
            last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
            end += (last + 1) * x.element_size()
        return cls(begin, end, writable)


class Parameter(NamedTuple):
    """Where a parameter lies in the bytes that a launch passes."""

    offset: int
    size: int


class Program:
    """One kernel of a PTX text; without a name the first.

    Raises:
        Fault: The machine does not know something in it.
    """

    def __init__(self, text: str, entry: str = "") -> None:
        self.lines = text.split("\n")
        message = ctypes.create_string_buffer(ROOM)
        self._handle = library().ptx_load(text.encode(), entry.encode(), message, ROOM)
        if not self._handle:
            raise Fault(message.value.decode())
        offsets, sizes = ((ctypes.c_int * MOST_PARAMETERS)() for _ in range(2))
        n = library().ptx_parameters(self._handle, offsets, sizes, MOST_PARAMETERS)
        self.parameters = list(map(Parameter, offsets[:n], sizes[:n]))

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            library().ptx_free(self._handle)

    def runs(self) -> list[int]:
        """How many warps have executed each line so far."""
        found = (ctypes.c_long * len(self.lines))()
        library().ptx_runs(self._handle, found, len(self.lines))
        return list(found)

    def launch(
        self,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        parameters: bytes,
        ranges: Iterable[Range],
        seed: int = 0,
        checks: bool = True,
    ) -> None:
        """Execute it; what it must not do is a `Fault`."""
        flat = [int(x) for one in ranges for x in one]
        message = ctypes.create_string_buffer(ROOM)
        done = library().ptx_launch(
            self._handle,
            (ctypes.c_uint32 * 3)(*grid),
            threads,
            shared,
            parameters,
            (ctypes.c_uint64 * len(flat))(*flat),
            len(flat) // len(Range._fields),
            seed,
            checks,
            message,
            ROOM,
        )
        if done < 0:
            raise Fault(message.value.decode())


@functools.cache
def library() -> ctypes.CDLL:
    """The machine, which is a part of the emulator's library."""
    found = ctypes.CDLL(str(LIBRARY))
    text, room, handle = ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p
    numbers = ctypes.c_void_p
    found.ptx_load.restype = handle
    found.ptx_load.argtypes = [text, text, text, room]
    found.ptx_free.restype = None
    found.ptx_free.argtypes = [handle]
    found.ptx_parameters.argtypes = [handle, numbers, numbers, room]
    found.ptx_runs.restype = None
    found.ptx_runs.argtypes = [handle, numbers, room]
    found.ptx_launch.restype = ctypes.c_long
    found.ptx_launch.argtypes = [handle, numbers, room, room, text, numbers, room]
    found.ptx_launch.argtypes += [ctypes.c_uint64, ctypes.c_int, text, room]
    return found
