"""Bugs planted in small kernels and in the real ones: the emulator has to notice every one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import decode_cases
import pytest
import test_pooled
import torch
from cases import EVERYTHING, Case, bf16, fp16, fp32
from emulation import (
    SEEDS,
    Place,
    architecture,
    caught,
    check_case,
    places,
    sabotage,
    schedule,
)

from attnfast.call import BY_DISTANCE, DISTANCES, LARGEST, MEAN

# Of each small kernel of csrc/emulator/selftest.cpp, the bugs it can have and what is said of them.
SMALL = {
    "exchange": {
        "no barrier after writes": r"never written|without a barrier after another warp's write",
        "no barrier after reads": r"a race: .* without a barrier",
    },
    "exchange in warp": {
        "no sync_warp after writes": r"never written|without sync_warp after another lane's write",
        "no sync_warp after reads": r"a race: .* without sync_warp",
    },
    "ring": {
        "no wait": "asynchronous copy into it is under way",
        "wait for too few": "asynchronous copy into it is under way",
        "no barrier when full": r"never written|without a barrier|under way",
        "no barrier when empty": r"without a barrier|under way",
        "no commit": "asynchronous copy into it is under way",
        "never waited": "asynchronous copy into it is under way",
    },
    "matrices": {
        "wrong swizzle": "a wrong result of matrices",
        "no sync_warp": r"never written|without sync_warp",
    },
    "collectives": {
        # 4 MB past it, where another tensor may be nearer
        "read past the end": "a read outside every tensor: [0-9]+ bytes (past the end of|before) ",
        "read before the beginning": "a read outside every tensor: 4 bytes before in",
        "write past the end": "a write outside .*: 24 bytes past the end of out",
        "write to an input": "a write outside every tensor that may be written: in is read-only",
        "misaligned": "a misaligned read of 8 bytes",
        "shared out of bounds": "outside the block's memory",
        "shared never written": "read, but never written",
        "copy past the end": "copy_async at .*: a read outside every tensor",
        "half a warp": "divergence: other lanes of the warp are in shuffle_xor",
        "different collectives": "divergence: other lanes of the warp are in",
        "one lane leaves": "left the kernel|have left the kernel",
        "barrier in one warp": "deadlock: warp 0: sync_block at selftest.cpp:[0-9]+; warp 1: has",
        "different barriers": "divergence: other warps are in sync_block",
    },
    "products": {},
    "hand over": {
        "no wait": "a read of what no other block has passed on",
        "no pass": "deadlock: no other block brings about what is awaited",
        "no sync_warp after the wait": "a read of what no other block has passed on",
        "no sync_warp before the pass": "a read of what no other block has passed on",
    },
}
# What has no effect on sm_75, where copies are there at once.
ORDERED_ON_TURING = ("no wait", "wait for too few", "no commit", "never waited")
BUGS = [(kernel, bug) for kernel, bugs in SMALL.items() for bug in bugs]


@pytest.mark.parametrize("arch", [75, 80, 120])
@pytest.mark.parametrize("kernel", SMALL)
def test_sound_kernels_pass(kernel: str, arch: int) -> None:
    for seed in range(20):
        with schedule(seed), architecture(arch):
            torch.ops.attnfast.emulator_selftest(kernel, "")


@pytest.mark.parametrize("arch", [75, 80])
@pytest.mark.parametrize(("kernel", "bug"), BUGS)
def test_bugs_of_small_kernels(kernel: str, bug: str, arch: int) -> None:
    if arch == 75 and bug in ORDERED_ON_TURING:
        pytest.skip("no bug there: sm_75 has no asynchronous copies")
    for seed in SEEDS:
        with (
            schedule(seed),
            architecture(arch),
            pytest.raises(RuntimeError, match=SMALL[kernel][bug]),
        ):
            torch.ops.attnfast.emulator_selftest(kernel, bug)


def test_turing_has_no_products_of_bf16() -> None:
    torch.ops.attnfast.emulator_selftest("products", "bf16")
    with architecture(75), pytest.raises(RuntimeError, match="sm_75 multiplies no bf16"):
        torch.ops.attnfast.emulator_selftest("products", "bf16")


def test_unknown_architectures() -> None:
    with architecture(70), pytest.raises(ValueError, match="there is no sm_70"):
        torch.ops.attnfast.emulator_selftest("products", "")


def test_schedules_come_from_the_seed() -> None:
    """Who runs first into a bug depends on the seed, and on nothing else."""

    def message(seed: int) -> str:
        with schedule(seed), pytest.raises(RuntimeError) as caught:
            torch.ops.attnfast.emulator_selftest("collectives", "shared never written")
        return str(caught.value)

    messages = [message(seed) for seed in range(20)]
    assert messages == [message(seed) for seed in range(20)]
    assert len(set(messages)) > 10


def test_unknown_kernels_and_sabotage() -> None:
    with pytest.raises(ValueError, match="there is no kernel named nothing"):
        torch.ops.attnfast.emulator_selftest("nothing", "")
    with pytest.raises(RuntimeError, match="there is no sabotage named burn"):
        torch.ops.attnfast.emulator_sabotage("burn", "", 0)


# Between them they reach every line of the kernels.
OPTIONS = replace(EVERYTHING, dtype=fp16, H=2, H_kv=1, T=140, S=130)
CASES = {
    "plain": Case("plain", B=1, H_kv=1, T=150, S=200, D=64, dtype=bf16, causal=True),
    "two passes": Case("two", B=1, H=1, H_kv=1, T=150, S=140, D=32, dtype=bf16, causal=True),
    "short": Case("short", B=1, H=2, H_kv=1, T=100, S=120, D=32, dtype=bf16, causal=True),
    "short, wide": Case(
        "wide", B=1, H_kv=1, T=70, S=100, D=128, dtype=fp16, window=(40, 20), align="bottom_right"
    ),
    "options": OPTIONS,
    "masked": Case("masked", B=1, H=1, H_kv=1, T=140, S=130, D=64, mask="ts", dtype=bf16),
    "odd bias": Case("odd_bias", B=1, H=2, H_kv=1, T=70, S=71, D=32, bias="ts", dtype=fp16),
    "weights": Case(
        "weights",
        B=1,
        H_kv=1,
        T=70,
        S=70,
        D=32,
        weights="mean",
        stats=2,
        grads=("out", "weights"),
        dtype=fp16,
    ),
    "blocks": Case(
        "blocks",
        B=1,
        H_kv=1,
        T=150,
        S=140,
        D=32,
        blocks="heads 64",
        causal=True,
        align="bottom_right",
        bias="ts",
        weights="mean",
        stats=2,
        dtype=bf16,
    ),
    "plain blocks": Case(
        "plain", B=1, H_kv=1, T=150, S=200, D=64, blocks="heads 64", window=(90, 60), dtype=fp16
    ),
    "blocks, one stage": Case(
        "one_stage", B=1, H=1, H_kv=1, T=70, S=140, D=256, blocks="blocks 128", dtype=bf16
    ),
    "odd rows": Case("odd", B=1, H=1, H_kv=1, T=70, S=70, D=37, dtype=bf16),
    "one stage": Case("one_stage", B=1, H_kv=1, T=70, S=70, D=256, dtype=bf16),
    "bias per query": Case("bias_t", B=1, H=1, H_kv=1, T=70, S=70, D=32, bias="t", dtype=bf16),
    "bias per key": Case("bias_s", B=1, H=1, H_kv=1, T=70, S=70, D=32, bias="s", dtype=bf16),
    "one bias": Case(
        "bias",
        B=1,
        H=1,
        H_kv=1,
        T=70,
        S=70,
        D=32,
        D_v=8,
        bias="",
        bias_dtype=fp32,
        grads=("out", "lse"),
        dtype=fp16,
    ),
}

REAL: dict[str, Callable[[], None]] = {
    name: functools.partial(check_case, case) for name, case in CASES.items()
}


def check_decode(case: decode_cases.DecodeCase) -> None:
    call = decode_cases.make(case)
    bias = call.options["bias"]
    dropped = torch.rand(bias.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    call.options["bias"] = bias.masked_fill(dropped, -torch.inf)
    decode_cases.judge(decode_cases.decode_paged(call, backend="cuda"), call)


def check_on_turing() -> None:
    with architecture(75):
        check_case(replace(CASES["short"], name="turing", D=96, dtype=fp16))


REAL["turing"] = check_on_turing


def check_pooled(*kinds: test_pooled.Cells) -> None:
    check_case(POOLED)  # the forward, whose norm it takes
    given = test_pooled.trial(POOLED)
    for cells in kinds:
        test_pooled.check(test_pooled.run(given, cells, "cuda"), given, cells)


POOLED = Case("pooled", B=1, H=1, H_kv=1, T=70, S=70, D=32, dtype=bf16, grads=())
REAL |= {  # several rows of cells, or columns, to a block, and more than one tile for them
    "cells": functools.partial(check_pooled, (MEAN, 1, 20), (LARGEST, 10, 2)),
    "distances": functools.partial(check_pooled, (BY_DISTANCE, 3, DISTANCES)),
}

DECODE = decode_cases.DecodeCase(
    "decode", lengths=(129, 300), H=6, T=3, D_v=40, alibi="h", sinks=True, bias="bhts", dtype=fp16
)
REAL["decode"] = functools.partial(check_decode, DECODE)

# What to do to each primitive. Addresses move by whole chunks, so that they stay aligned.
SHARED = [("shift", 64), ("flip", 16), ("shift", 1 << 20)]
WRONGS: dict[str, list[tuple[str, int]]] = {
    "sync_block": [("omit", 0), ("omit in one lane", 0)],
    "sync_warp": [("omit", 0), ("omit in one lane", 0)],
    "wait_copies": [("omit", 0)],
    "commit_copies": [("omit", 0)],
    "shuffle_xor": [("omit", 0), ("omit in one lane", 0)],
    "any_lane": [("omit in one lane", 0)],  # where all lanes ask, to branch alike
    "multiply_accumulate": [("omit", 0), ("omit in one lane", 0)],
    "take_ticket": [],
    "await_turn": [("omit", 0)],
    "pass_turn": [("omit", 0)],
    "load_handed": [("shift", 1 << 22), ("flip", 16)],
    "store_handed": [("shift", 1 << 22), ("flip", 16)],
    "load_matrix": [*SHARED, ("omit in one lane", 0)],
    "load_matrix_transposed": [*SHARED, ("omit in one lane", 0)],
    "load_shared": SHARED,
    "store_shared": SHARED,
    "copy_async": SHARED,
    "copy_async:shared": [],  # counted apart, the same call
    "load_global": [("shift", 1 << 22)],
    "store_global": [("shift", 1 << 22)],
}

HARMLESS = {  # what makes no wrong result there
    # Copies are there at once.
    ("turing", "omit", "wait_copies"),
    ("turing", "omit", "commit_copies"),
    # Rows at odd addresses are not copied asynchronously.
    ("odd rows", "omit", "wait_copies"),
    ("odd rows", "omit", "commit_copies"),
    # Exchanges columns that are added up; "bias per key" keeps them apart.
    ("one bias", "flip", "store_shared"),
    ("one bias", "flip", "load_shared"),
    ("one bias", "shift", "load_shared"),
    # All that it may clear is cleared.
    ("distances", "flip", "store_shared"),
}


@pytest.mark.parametrize("name", REAL)
def test_bugs_of_the_real_kernels(name: str) -> None:
    """Every primitive in its turn left out, left out in one lane, or given a wrong address."""
    run = REAL[name]
    missed = []
    for place in places(run):
        for kind, amount in WRONGS[place.op]:
            if (name, kind, place.op) in HARMLESS:
                continue
            with sabotage(kind, place, amount):
                if caught(run) is None:
                    missed.append(f"{kind} {amount} {place}")
    assert not missed
    run()


def test_deadlocks_name_each_warp() -> None:
    run = REAL["two passes"]
    barrier = next(place for place in places(run) if place.op == "sync_block")
    with sabotage("omit in one lane", barrier):
        message = caught(run)
    assert message is not None
    assert f"sync_block at {barrier.file}:{barrier.line}" in message


# The best is one wavefront for every 128 bytes and one sector for every 32.
WITHOUT_CONFLICTS = ("load_matrix", "load_matrix_transposed", "copy_async:shared", "store_shared")


@pytest.mark.parametrize("D", [32, 64, 96, 128, 192, 256])
def test_tiles_have_no_bank_conflicts(D: int) -> None:
    case = Case(B=1, H=1, H_kv=1, T=130, S=130, D=D, dtype=bf16, grads=())
    costs = places(functools.partial(check_case, case))
    assert {place.op for place in costs} >= {*WITHOUT_CONFLICTS, "load_shared", "copy_async"}
    for place in costs:
        if place.op in (*WITHOUT_CONFLICTS, "load_shared"):
            assert place.cost == place.least, f"bank conflicts: {place}"
    copied, stored = (
        [place for place in costs if place.op == op and place.file in ("rows.h", "attention_fwd.h")]
        for op in ("copy_async", "store_global")
    )
    assert all(place.cost == place.least for place in copied), copied
    assert sum(place.cost for place in stored) <= 1.1 * sum(place.least for place in stored)


def test_conflicts_are_counted() -> None:
    """A wrong swizzle that still finds its rows would cost wavefronts: seen where lanes collide."""
    torch.ops.attnfast.emulator_count(True)
    with pytest.raises(RuntimeError, match="wrong result"):
        torch.ops.attnfast.emulator_selftest("matrices", "wrong swizzle")
    lines = torch.ops.attnfast.emulator_counts().splitlines()
    torch.ops.attnfast.emulator_count(False)
    words = [line.split() for line in lines]
    costs = [Place(op, file, *map(int, numbers)) for op, file, *numbers in words]
    loads = [place for place in costs if place.op == "load_matrix"]
    assert loads[0].cost == 8 * loads[0].least  # eight rows of 128 bytes, the same chunk of each
