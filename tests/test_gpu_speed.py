"""tools/gpu_speed.py: the model gives what it was fitted to, and the page is as the tables say."""

from __future__ import annotations

import pytest

from tools import aot_docs, gpu_speed


@pytest.mark.parametrize(
    "speed", gpu_speed.FLASH_2_SPEEDS, ids=lambda x: f"{x.machine.name} {x.kernel} {x.D}"
)
def test_the_model_gives_the_speeds_that_are_published(speed: gpu_speed.Published) -> None:
    model = gpu_speed.models()[speed.machine]
    cycles = model.cycles(speed.kernel, speed.D, gpu_speed.FLASH_2[speed.kernel, speed.D])
    found = gpu_speed.tflops(speed.machine, speed.kernel, speed.D, cycles)
    assert found == pytest.approx(speed.tflops, rel=1e-9)


@pytest.mark.parametrize(
    ("machine", "peak"),
    [(gpu_speed.A100, 312), (gpu_speed.RTX_4090, 165.2), (gpu_speed.H100, 989.4)],
    ids=lambda x: getattr(x, "name", ""),
)
def test_machines_are_as_their_data_sheets_say(machine: gpu_speed.Machine, peak: float) -> None:
    """With the tensor cores busy all the time: TFLOP/s of bf16 into fp32, not sparse."""
    cycles = gpu_speed.flop("fwd", 64) / 2 / machine.rate
    assert gpu_speed.tflops(machine, "fwd", 64, cycles) == pytest.approx(peak, rel=2e-3)


def test_mma_has_less_than_the_tensor_cores_rate_on_hopper() -> None:
    share = gpu_speed.hopper_rate() / gpu_speed.H100.rate
    assert 0.55 < share < 0.65, "published microbenchmarks have 0.62"


def test_fewer_instructions_are_faster() -> None:
    for model in gpu_speed.models().values():
        assert model.cycles("fwd", 128, 1000) < model.cycles("fwd", 128, 2000)
        assert model.forward > 1
        assert model.backward > 1


def test_the_page_is_as_the_tables_say() -> None:
    assert aot_docs.main(["--check"], page=gpu_speed.PAGE, text=gpu_speed.text) == 0
