"""The launcher: Triton once for each specialisation, then straight to the driver.

Triton compiles here as it does beside a GPU, for a driver that only writes down what it is given.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from attnfast.kernels import (
    arguments,
    attention_bwd,
    attention_fwd,
    attention_weights,
    configs,
)
from attnfast.kernels import launch as launching
from attnfast.kernels.configs import Config
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

from attnfast.call import Inputs, Options, Upstream


class Tensors(NamedTuple):
    q: Any
    mask: Any = None


class Numbers(NamedTuple):
    T: int = 80
    q_t: int = 64
    scale: float = 0.5


class Features(NamedTuple):
    D: int = 16
    CAUSAL: bool = False


class Tile(NamedTuple):
    BLOCK_M: int = 64
    BLOCK_N: int = 64


@triton.jit
def scale_kernel(x, p, f, tile):
    at = tl.program_id(0) * p.q_t + tl.arange(0, tile.BLOCK_N)
    tl.store(x.q + at, (tl.load(x.q + at) * p.scale).to(x.q.dtype.element_ty), mask=at < p.T)
    if x.mask is not None:
        tl.store(x.mask + at, at.to(tl.int1))


class Run(NamedTuple):
    """What the driver was asked to launch."""

    grid: tuple[int, int, int]
    stream: int
    arguments: tuple[Any, ...]


class Driver:
    """Triton's driver of a GPU that is not there, with as much shared memory as is wanted."""

    def __init__(self) -> None:
        self.runs: list[Run] = []
        self.device, self.shared = 0, 99 << 10
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": self.shared},
            load_binary=lambda *given: (1, 2, 32, 0, 1024),
            unload_module=lambda module: None,
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 80, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 7 + device

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def run(x: int, y: int, z: int, stream: int, *rest: Any) -> None:
            _function, _packed, described, enter, leave, *given = rest
            enter(described)
            leave(described)
            self.runs.append(Run((x, y, z), stream, tuple(given)))

        return run


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """The driver; Triton and the launcher know no kernel yet."""
    made = Driver()
    monkeypatch.setattr(driver, "_active", made)
    monkeypatch.setattr(launching, "_compiled", {})
    monkeypatch.setattr(launching, "INTERPRETED", False)
    monkeypatch.setattr(triton.compiler.compiler, "max_shared_mem", lambda device: made.shared)
    scale_kernel.device_caches.clear()
    yield made
    scale_kernel.device_caches.clear()


def binaries(device: int = 0) -> int:
    """How many kernels Triton has compiled."""
    return len(scale_kernel.device_caches[device][0])


def rows(dtype: torch.dtype = torch.bfloat16, offset: int = 0) -> torch.Tensor:
    return torch.zeros(256, dtype=dtype)[offset:]


def job(**changes: Any) -> launching.Launch:
    config = Config(64, 64, 1, 2)
    tensors = (Tensors(rows()),)
    plain = launching.Launch(scale_kernel, 12, tensors, Numbers(), Features(), Tile(), config)
    return plain._replace(**changes)


def test_the_second_launch_goes_past_triton_with_its_own_arguments(
    gpu: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    launching.launch(job())
    monkeypatch.setattr(scale_kernel, "run", None)
    again = job(grid=13, values=Numbers(96, 128, 0.25))
    launching.launch(again)
    first, second = gpu.runs
    assert (first.grid, first.stream) == ((12, 1, 1), 7)
    assert (second.grid, second.stream) == ((13, 1, 1), 7)
    assert second.arguments[0] is again.tensors[0], "the new call's tensors, not the first one's"
    assert second.arguments[1] == again.values
    assert len(second.arguments) == len(first.arguments)


@pytest.mark.parametrize(
    ("changes", "kernels"),
    [
        ({"values": Numbers(T=160)}, 1),
        ({"values": Numbers(scale=1.0)}, 1),
        ({"grid": 13}, 1),
        ({"tensors": (Tensors(rows(offset=8)),)}, 1),
        ({"values": Numbers(T=81)}, 2),
        ({"values": Numbers(T=1)}, 2),
        ({"values": Numbers(T=1 << 35)}, 2),
        ({"tensors": (Tensors(rows(offset=4)),)}, 2),
        ({"tensors": (Tensors(rows(torch.float16)),)}, 2),
        ({"tensors": (Tensors(rows(), rows(torch.int8)),)}, 2),
        ({"features": Features(CAUSAL=True)}, 2),
        ({"tile": Tile(BLOCK_N=32)}, 2),
        ({"config": Config(64, 64, 2, 2)}, 2),
    ],
    ids=str,
)
def test_what_a_kernel_is_compiled_for(gpu: Driver, changes: dict[str, Any], kernels: int) -> None:
    for _ in range(2):
        launching.launch(job())
        launching.launch(job(**changes))
    assert len(gpu.runs) == 4
    assert len(launching._compiled) == binaries() == kernels


def test_whatever_is_launched_triton_would_have_taken_the_same_binary(gpu: Driver) -> None:
    """The table has an entry for each of Triton's, and no other: its rule is Triton's."""
    draw = random.Random(0)
    numbers = (1, 2, 16, 17, 31, 32, 48, 2**31 - 16, 2**31, 2**31 + 1, -1, -16, 0)
    for _ in range(60):
        values = Numbers(draw.choice(numbers), draw.choice((16, 48)), draw.random())
        tensors = (Tensors(rows(offset=draw.choice((0, 4, 8)))),)
        launching.launch(job(values=values, tensors=tensors, grid=draw.randint(1, 99)))
        assert len(launching._compiled) == binaries()
    assert binaries() < 20


def test_a_growing_sequence_is_one_kernel(gpu: Driver) -> None:
    """As decoding and bucketed training have them: sizes that specialise alike share all."""
    for T in range(16, 16 * 200, 16):
        launching.launch(job(values=Numbers(T)))
    assert len(launching._compiled) == binaries() == 1


def test_the_table_is_bounded(gpu: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "REMEMBERED", 2)
    for D in range(4):
        launching.launch(job(features=Features(D)))
        assert len(launching._compiled) <= 2


def test_another_device_becomes_the_current_one(
    gpu: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Current:
        """``torch.cuda.device``."""

        def __init__(self, device: torch.device) -> None:
            self.index = device.index

        def __enter__(self) -> None:
            self.before, gpu.device = gpu.device, self.index

        def __exit__(self, *error: object) -> None:
            gpu.device = self.before

    asked = []

    def module(device: torch.device) -> Any:
        asked.append(device.type)
        return SimpleNamespace(device=Current)

    monkeypatch.setattr(torch, "get_device_module", module)
    for index in (0, 1, 1):
        with launching.on_device(torch.device("xpu", index)):
            launching.launch(job())
    assert [run.stream for run in gpu.runs] == [7, 8, 8]
    assert gpu.device == 0
    assert asked == ["xpu"] * 2
    assert binaries(0) == binaries(1) == 1


def test_an_empty_grid_launches_nothing(gpu: Driver) -> None:
    launching.launch(job(grid=0))
    assert not gpu.runs


def test_a_grid_that_no_gpu_counts_is_refused(gpu: Driver) -> None:
    launching.launch(job(grid=2**31 - 1))
    with pytest.raises(RuntimeError, match="scale_kernel must have at most 2147483647"):
        launching.launch(job(grid=2**31))
    assert len(gpu.runs) == 1


class TestHooks:
    """What Triton's own dispatch heeds is heeded, whenever it is set."""

    def test_pre_run_hooks(self, gpu: Driver) -> None:
        seen: list[Any] = []
        launching.launch(job())
        scale_kernel.add_pre_run_hook(lambda *given, **options: seen.append(given[1].T))
        try:
            launching.launch(job())
            launching.launch(job(values=Numbers(96)))
        finally:
            scale_kernel.pre_run_hooks.clear()
        launching.launch(job())
        assert seen == [80, 96]
        assert len(gpu.runs) == 4

    def test_launch_hooks_set_after_the_first_launch(
        self, gpu: Driver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[str] = []
        launching.launch(job())
        for name in ("launch_enter_hook", "launch_exit_hook"):
            chain = knobs.HookChain()
            chain.add(lambda found, name=name: seen.append(f"{name} {found.get()['name']}"))
            monkeypatch.setattr(knobs.runtime, name, chain)
        launching.launch(job())
        assert seen == ["launch_enter_hook scale_kernel", "launch_exit_hook scale_kernel"]

    @pytest.mark.parametrize(
        ("place", "name", "value"),
        [("compilation", "instrumentation_mode", "consan"), ("runtime", "debug", True)],
    )
    def test_instrumentation_set_after_the_first_launch(
        self, gpu: Driver, monkeypatch: pytest.MonkeyPatch, place: str, name: str, value: Any
    ) -> None:
        launching.launch(job())
        dispatched: list[Any] = []
        with monkeypatch.context() as instrumented:
            instrumented.setattr(getattr(knobs, place), name, value)
            instrumented.setattr(scale_kernel, "run", lambda *x, **options: dispatched.append(x))
            launching.launch(job())
        launching.launch(job())
        assert len(dispatched) == 1
        assert len(gpu.runs) == 2

    def test_a_cache_hook_that_compiles_nothing(
        self, gpu: Driver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as hooked:
            hooked.setattr(knobs.runtime, "jit_cache_hook", lambda **compiled: True)
            launching.launch(job())
        assert not gpu.runs
        launching.launch(job())
        assert len(gpu.runs) == 1


class TestSharedMemory:
    """A tile that is too large with a call's options gives way, and is remembered so."""

    @pytest.fixture
    def needs(self, gpu: Driver, monkeypatch: pytest.MonkeyPatch) -> list[Config]:
        """A kernel that needs 1 KB per stage and key; returns the tiles that were tried."""
        tried: list[Config] = []
        plain = scale_kernel.run

        def run(*given: Any, **options: Any) -> Any:
            side = given[-1].BLOCK_N.value
            tried.append(Config(64, side, options["num_warps"], options["num_stages"]))
            need = options["num_stages"] * side * 1024
            if need > gpu.shared:
                raise OutOfResources(need, gpu.shared, "shared memory")
            return plain(*given, **options)

        monkeypatch.setattr(scale_kernel, "run", run)
        return tried

    def test_fewer_stages_then_a_smaller_tile(self, gpu: Driver, needs: list[Config]) -> None:
        gpu.shared = 40 << 10
        wide = job(config=Config(64, 64, 1, 3), walked="BLOCK_N")
        for _ in range(2):
            launching.launch(wide)
        assert [(tried.BLOCK_N, tried.num_stages) for tried in needs] == [
            *((64, 3), (64, 2), (64, 1)),
            (32, 1),
        ]
        assert [run.grid for run in gpu.runs] == [(12, 1, 1)] * 2
        assert [run.arguments[-1].BLOCK_N.value for run in gpu.runs] == [32, 32]

    def test_what_fits_nowhere_raises(self, gpu: Driver, needs: list[Config]) -> None:
        gpu.shared = 15 << 10
        with pytest.raises(OutOfResources, match="shared memory, Required: 16384"):
            launching.launch(job(walked="BLOCK_N"))
        assert needs[-1].BLOCK_N == 16
        with pytest.raises(OutOfResources, match="shared memory, Required: 65536"):
            launching.launch(job())

    def test_a_grid_does_not_depend_on_the_side_that_is_halved(self) -> None:
        q = torch.empty(2, 4, 500, 64, dtype=torch.bfloat16)
        for job in launches(Inputs(q, q, q)):
            if job.walked:
                smaller = job._replace(config=job.config._replace(num_stages=1)).smaller()
                assert smaller is not None
                side = "BLOCK_M" if job.walked == "BLOCK_N" else "BLOCK_N"
                blocks = -(-500 // getattr(smaller.tile, side))
                assert smaller.grid == 8 * blocks
                assert getattr(smaller.tile, job.walked) * 2 == getattr(job.tile, job.walked)


def launches(inputs: Inputs) -> list[launching.Launch]:
    """What forward, backward and received would launch."""
    options = Options(0.125)
    call = arguments.gather(inputs, options, configs.l2_bytes("sm_80"))
    q, norm = inputs.q, inputs.q.new_empty((2, *inputs.q.shape[:3]), dtype=torch.float32)
    given = attention_bwd.given(Upstream.plain(q, q, norm), False)
    return [
        attention_fwd.forward_launch(call, attention_fwd.results(inputs, options), "sm_80"),
        *attention_bwd.backward_launches(call, given, attention_bwd.results(inputs), "sm_80"),
        attention_weights.received_launch(call, norm[0], norm, "sm_80"),
    ]


def test_a_line_says_what_is_compiled(gpu: Driver, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "attnfast.triton"):
        for _ in range(2):
            launching.launch(job(features=Features(CAUSAL=True)))
    assert len(caplog.messages) == 2
    assert caplog.messages[0] == (
        "scale_kernel for cpu: torch.bfloat16, D 16, CAUSAL, tile 64x64, 1 warps, 2 stages:"
        " Triton compiles it, or loads it from its cache"
    )
    assert caplog.messages[1].startswith("scale_kernel: launched after ")


def test_fusing_is_asked_for_whatever_triton_defaults_to(
    gpu: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3.10 turns the default off, which TRITON_DEFAULT_FP_FUSION=0 does in 3.9."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    launching.launch(job())
    [compiled] = (kernel for kernel, _ in launching._compiled.values())
    assert compiled.metadata.enable_fp_fusion is True
