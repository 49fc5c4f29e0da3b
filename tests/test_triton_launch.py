"""The launcher: Triton once, then straight to the driver; stand-ins for both, as for the GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from attnfast.kernels import launch as launching
from attnfast.kernels.configs import Config


class Tensors(NamedTuple):
    q: Any
    mask: Any = None


class Numbers(NamedTuple):
    T: int = 5


class OnGpu:
    """What the launcher looks at in a tensor on a GPU."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, address: int = 0, index: int = 0):
        self.dtype, self.address = dtype, address
        self.device = SimpleNamespace(index=index)

    def data_ptr(self) -> int:
        return self.address


class Kernel:
    """Counts what is compiled and what is run by whom."""

    def __init__(self) -> None:
        self.compiled: list[Any] = []
        self.direct: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def through_triton(*arguments: Any, **options: Any) -> Any:
            self.compiled.append((grid, arguments, options))
            return {(*grid, 1, 1): lambda *a, stream: self.direct.append((a, stream))}

        return through_triton


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(launching, "_compiled", {})
    monkeypatch.setattr(launching, "INTERPRETED", False)
    monkeypatch.setattr(launching.torch, "Tensor", OnGpu)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda i: 7 + i, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return Kernel()


def job(kernel: Kernel, **changes: Any) -> launching.Launch:
    plain = launching.Launch(
        kernel, 12, (Tensors(OnGpu()),), Numbers(), Numbers(), Numbers(), Config(64, 64, 4, 2)
    )
    return plain._replace(**changes)


def test_the_second_launch_goes_past_triton(kernel: Kernel) -> None:
    launching.launch(job(kernel))
    again = job(kernel)
    launching.launch(again)
    assert len(kernel.compiled) == len(kernel.direct) == 1
    grid, arguments, options = kernel.compiled[0]
    assert grid == (12,)
    assert options == {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    passed, stream = kernel.direct[0]
    assert stream == 7
    assert passed[0] is again.tensors[0]  # the new call's tensors, not those of the first
    assert len(passed) == len(arguments)


@pytest.mark.parametrize(
    "changes",
    [
        {"tensors": (Tensors(OnGpu(address=8)),)},
        {"tensors": (Tensors(OnGpu(torch.float16)),)},
        {"tensors": (Tensors(OnGpu(), OnGpu()),)},
        {"values": Numbers(6)},
        {"features": Numbers(6)},
        {"tile": Numbers(6)},
        {"grid": 13},
        {"config": Config(64, 64, 8, 2)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_decides_how_a_kernel_is_compiled(kernel: Kernel, changes: dict[str, Any]) -> None:
    launching.launch(job(kernel))
    launching.launch(job(kernel, **changes))
    assert len(kernel.compiled) == 2
    launching.launch(job(kernel, **changes))
    launching.launch(job(kernel, tensors=(Tensors(OnGpu(address=16)),)))  # as aligned as 0
    assert len(kernel.compiled) == 2
    assert len(kernel.direct) == 2


def test_another_device_becomes_the_current_one(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered = []

    class Device:
        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            entered.append(self.index)

        def __exit__(self, *error: object) -> None:
            entered.append("left")

    monkeypatch.setattr(torch.cuda, "device", Device)
    launching.launch(job(kernel))
    assert entered == []
    for _ in range(2):
        launching.launch(job(kernel, tensors=(Tensors(OnGpu(index=1)),)))
    assert entered == [1, "left"] * 2
    assert [stream for _, stream in kernel.direct] == [8]


def test_an_empty_grid_launches_nothing(kernel: Kernel) -> None:
    launching.launch(job(kernel, grid=0))
    assert not kernel.compiled


def test_the_table_is_bounded(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "REMEMBERED", 3)
    for T in range(10):
        launching.launch(job(kernel, values=Numbers(T)))
        assert len(launching._compiled) <= 3
