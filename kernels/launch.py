"""Launching kernels: through Triton the first time, then past its dispatch.

Triton's own launch looks at every argument and option again, which costs more than a small call of
attention. Here compiled kernels are kept under what they were specialised for, as Triton itself
tells it; a hit hands the call's own tensors and numbers straight to the driver.
"""

from __future__ import annotations

import functools
import logging
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton.language as tl
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import native_specialize_impl

from .configs import Config

REMEMBERED = 1024  # compiled kernels; the table starts afresh when it is full
SMALLEST = 16  # side of a tile
MOST_PROGRAMS = 2**31 - 1  # of a grid; no index that kernels count with leaves 32 bits then
INTERPRETED = knobs.runtime.interpret

log = logging.getLogger("attnfast.triton")


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
    walked: str = ""  # "BLOCK_M" or "BLOCK_N": the side of the tile that no grid depends on

    def arguments(self) -> tuple[Any, ...]:
        """The kernel's arguments as Triton takes them."""
        return (*self.tensors, self.values, *self.constants())

    def constants(self) -> tuple[Any, Any]:
        """The two tuples of constants as Triton takes them."""
        features, tile = (type(c)(*map(tl.constexpr, c)) for c in (self.features, self.tile))
        return features, tile

    def options(self) -> dict[str, Any]:
        """Triton's options for it.

        Products and sums are fused whatever Triton's default is, which 3.10 turns round: where a
        kernel must not fuse, it says so itself (``rounded_product``).
        """
        options = {"num_warps": self.config.num_warps, "num_stages": self.config.num_stages}
        return options if INTERPRETED else options | {"enable_fp_fusion": True}

    def smaller(self) -> Launch | None:
        """The same with a stage less, or else half of what a loop walks by; None if neither is."""
        config, walked = self.config, self.walked
        if config.num_stages > 1:
            return self._replace(config=config._replace(num_stages=config.num_stages - 1))
        if not walked or getattr(config, walked) <= SMALLEST:
            return None
        half = {walked: getattr(config, walked) // 2}
        return self._replace(config=config._replace(**half), tile=self.tile._replace(**half))


_compiled: dict[Any, tuple[CompiledKernel, Any]] = {}  # by `specialisation`: and its constants


def launch(job: Launch) -> None:
    """Run a kernel on the current stream of its tensors' device; nothing if its grid is empty.

    Raises:
        RuntimeError: The grid has more programs than a GPU can count.
    """
    if job.grid == 0:
        return
    if job.grid > MOST_PROGRAMS:
        raise RuntimeError(
            f"attention: {name_of(job)} must have at most {MOST_PROGRAMS} programs (blocks of rows"
            f" of all heads of all batch entries), got {job.grid}"
        )
    if INTERPRETED:
        job.kernel[(job.grid,)](*job.arguments(), **job.options())
        return
    with on_device(job.tensors[0].q.device):
        if is_watched(job.kernel):
            through_triton(job)
            return
        index = driver.active.get_current_device()
        key = specialisation(job, index)
        found = _compiled.get(key)
        if found is None:
            compiled, launched = first_launch(job)
            if isinstance(compiled, CompiledKernel):  # not what a hook left uncompiled
                if len(_compiled) >= REMEMBERED:
                    _compiled.clear()
                _compiled[key] = compiled, launched.constants()
            return
        compiled, constants = found
        run = compiled[(job.grid, 1, 1)]
        stream = driver.active.get_current_stream(index)
        run(*job.tensors, job.values, *constants, stream=stream)


def specialisation(job: Launch, index: int) -> tuple[Any, ...]:
    """What Triton compiles a kernel for on a device: equal where it would take the same binary."""
    backend = job.kernel.device_caches[index][3]
    tensors = (specialised(backend, part) for part in job.tensors)
    values = specialised_values(backend, job.values)
    return (job.kernel, index, job.features, job.tile, job.config, values, *tensors)


def specialised(backend: Any, argument: Any) -> Any:
    """Triton's own rule for an argument: types, alignment, and integers that are 1."""
    return native_specialize_impl(backend, argument, False, True, True)


specialised_values = functools.lru_cache(REMEMBERED)(specialised)


def is_watched(kernel: Any) -> bool:
    """Whether something is set that only Triton's own dispatch heeds at every launch."""
    runtime = knobs.runtime
    return bool(
        kernel.pre_run_hooks
        or knobs.compilation.instrumentation_mode
        or runtime.debug
        or runtime.add_stages_inspection_hook
    )


def first_launch(job: Launch) -> tuple[Any, Launch]:
    """`through_triton`, with a line before and after: compiling may take long."""
    began = time.perf_counter()
    log.info("%s: Triton compiles it, or loads it from its cache", described(job))
    result = through_triton(job)
    log.info("%s: launched after %.1f s", name_of(job), time.perf_counter() - began)
    return result


def through_triton(job: Launch) -> tuple[Any, Launch]:
    """Launch by Triton's own dispatch; smaller, where a tile is more than the device holds.

    Options take shared memory beside what a tile was chosen for.

    Returns:
        The compiled kernel and the launch that it was compiled for.

    Raises:
        OutOfResources: No smaller tile fits either.
    """
    try:
        return job.kernel[(job.grid,)](*job.arguments(), **job.options()), job
    except OutOfResources as error:
        smaller = job.smaller()
        if smaller is None:
            raise
        log.info("%s: %s", described(job), error)
    return through_triton(smaller)


def described(job: Launch) -> str:
    """What is compiled, for people."""
    q, tile = job.tensors[0].q, job.config
    features = [name for name, value in job.features._asdict().items() if value is True]
    options = f", {' '.join(features)}" if features else ""
    return (
        f"{name_of(job)} for {q.device}: {q.dtype}, D {job.features.D}{options}, tile"
        f" {tile.BLOCK_M}x{tile.BLOCK_N}, {tile.num_warps} warps, {tile.num_stages} stages"
    )


def name_of(job: Launch) -> str:
    """The kernel's name."""
    return str(job.kernel.fn.__name__)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make it the current device, if it is not."""
    if device.index in (None, driver.active.get_current_device()):
        return nullcontext()
    module: Any = torch.get_device_module(device)
    return module.device(device)  # type: ignore[no-any-return]
