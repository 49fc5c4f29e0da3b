"""Launching kernels: through Triton the first time, then past its dispatch.

Triton's own launch looks at every argument again, which costs more than a small call of attention.
Here the whole of a launch but its pointers, with the pointers' alignment, is the key of a table of
compiled kernels; a hit goes straight to the driver.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .configs import Config

REMEMBERED = 4096  # launches; the table starts afresh when it is full
INTERPRETED = triton.knobs.runtime.interpret


class Launch(NamedTuple):
    """Everything about one launch.

    ``kernel(*tensors, values, features, tile)``: tuples of tensors and numbers, then of numbers,
    then two of compile-time constants.
    """

    kernel: Any
    grid: int
    tensors: tuple[Any, ...]
    values: Any
    features: Any
    tile: Any
    config: Config

    def arguments(self) -> tuple[Any, ...]:
        """The kernel's arguments as Triton takes them."""
        constants = (type(c)(*map(tl.constexpr, c)) for c in (self.features, self.tile))
        return (*self.tensors, self.values, *constants)

    def options(self) -> dict[str, Any]:
        """Triton's options for it."""
        options = {"num_warps": self.config.num_warps, "num_stages": self.config.num_stages}
        return options if INTERPRETED else options | {"enable_fp_fusion": True}


_compiled: dict[Any, Any] = {}


def launch(job: Launch) -> None:
    """Run a kernel on the current stream of its tensors' device; nothing if its grid is empty."""
    if job.grid == 0:
        return
    if INTERPRETED:
        job.kernel[(job.grid,)](*job.arguments(), **job.options())
        return
    device = job.tensors[0].q.device.index
    key = (
        job.kernel,
        device,
        job.grid,
        job.values,
        job.features,
        job.tile,
        job.config,
        *(described(part) for tensors in job.tensors for part in tensors),
    )
    with on_device(device):
        run = _compiled.get(key)
        if run is None:
            compiled = job.kernel[(job.grid,)](*job.arguments(), **job.options())
            if len(_compiled) >= REMEMBERED:
                _compiled.clear()
            _compiled[key] = compiled[(job.grid, 1, 1)], job.arguments()[-3:]
            return
        runner, constants = run
        runner(*job.tensors, *constants, stream=torch._C._cuda_getCurrentRawStream(device))


def described(x: Any) -> Any:
    """What of an argument decides how a kernel is compiled."""
    if isinstance(x, torch.Tensor):
        return x.dtype, x.data_ptr() & 15
    return x


def on_device(device: int) -> AbstractContextManager[Any]:
    """Make it the current device, if it is not."""
    if device == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
