"""What the PTX machine has to report: each kernel passes as it is, and not without one line."""

from __future__ import annotations

import re

import pytest
import torch

from .faults_of_blocks import BLOCKS, FENCES, TURNS
from .faults_of_copies import ASYNCHRONOUS, BULK_LOAD, MAPS
from .faults_of_memory import MEMORY, Kernel
from .machine import LIBRARY, Fault
from .snippets import maps, run

pytestmark = pytest.mark.skipif(
    not LIBRARY.exists(), reason="the emulator, of which the machine is a part, is not built"
)
SEEDS = range(6)
KERNELS = (*MEMORY, *BLOCKS, *ASYNCHRONOUS)


def variant(body: str, faulty: bool) -> str:
    """The lines of the sound kernel, or of the faulty one."""
    left_out, kept = ("!", "?") if faulty else ("?", "!")
    lines = [line.strip() for line in body.split("\n")]
    lines = [line.replace("LOAD", BULK_LOAD) for line in lines]
    return "\n".join(x.removeprefix(kept).strip() for x in lines if not x.startswith(left_out))


def execute(kernel: Kernel, faulty: bool, seed: int, options: int = 1) -> None:
    data = torch.zeros(1024, dtype=torch.uint8)
    tensors = (torch.arange(256, dtype=torch.float32), torch.zeros(8))
    if kernel in MAPS:
        tensors = (torch.zeros(24, 64, dtype=torch.bfloat16), data, maps())
    run(
        variant(kernel.body, faulty), *tensors, threads=kernel.threads, blocks=kernel.blocks,
        shared=kernel.shared, seed=seed, options=options, read_only=[1],
    )  # fmt: skip


def fault_of(kernel: Kernel, seed: int) -> str:
    """What is found in the faulty kernel, or nothing."""
    try:
        execute(kernel, faulty=True, seed=seed)
    except Fault as fault:
        return str(fault)
    return ""


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_faults(kernel: Kernel) -> None:
    for seed in SEEDS:
        execute(kernel, faulty=False, seed=seed)
    found = [fault_of(kernel, seed) for seed in SEEDS]  # of one mistake several things may be said
    assert any(re.search(kernel.message, x, re.DOTALL) for x in found), found


@pytest.mark.parametrize("body", [TURNS, FENCES], ids=["order", "fences"])
def test_blocks_take_turns(body: str) -> None:
    """Whatever the schedule, each of them once."""
    for seed in range(20):
        data = torch.zeros(64, dtype=torch.int32)
        run(body, data, blocks=9, seed=seed)
        assert data[32:].tolist() == [9] * 32


def test_a_race_names_both_lines() -> None:
    kernel = next(k for k in KERNELS if k.name == "warps race")
    found = next(x for x in (fault_of(kernel, seed) for seed in SEEDS) if x.startswith("race"))
    _, now, before = found.split("\n")
    assert re.search(r"block 0, warp \d, PTX line \d+: (ld|st)\.shared\.b32", now)
    assert re.search(r"before: PTX line \d+: (ld|st)\.shared\.b32", before)


def test_without_checks_only_addresses_are() -> None:
    """Races pass; what is out of bounds does not."""
    race = next(k for k in KERNELS if k.name == "warps race")
    execute(race, faulty=True, seed=0, options=0)
    beyond = next(k for k in KERNELS if k.name == "beyond a tensor")
    with pytest.raises(Fault):
        execute(beyond, faulty=True, seed=0, options=0)
