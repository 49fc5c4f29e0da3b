"""Faults planted in compiled kernels and their launches: each is found within six seeds.

A machine that finds nothing in sound kernels may look at nothing: these are the same kernels with
one thing wrong, and what has to be said of it.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import check
from cases import Case, fp16, problem, run
from ptx import machine, session
from ptx.planted import FORWARD, PLANTED, WRONG, Planted

SEEDS = range(6)
CASES = {
    "triton": Case(B=1, H_kv=1, T=150, S=200, D=64, causal=True, align="bottom_right", dtype=fp16),
    "cuda": Case(B=1, H_kv=1, T=90, S=130, D=64, causal=True, align="bottom_right", dtype=fp16),
    "gluon": Case(B=1, T=150, S=600, D=64, causal=True, align="bottom_right", dtype=fp16, grads=()),
}


class Ground:
    """Plants faults in the PTX of kernels, counts the places, and weeds afterwards."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.places = folder, 0
        folder.mkdir(exist_ok=True)

    def plant(self, fault: Planted) -> None:
        """Before the kernels run again."""

        def edit(text: str) -> str:
            text, places = re.subn(fault.pattern, fault.replacement, text)
            self.places += places
            return text

        if fault.backend == "cuda":
            self.plant_in_files(lambda text: edit(text) if fault.kernel in text else text)
        else:
            session.driver().edit = lambda name, text: edit(text) if name == fault.kernel else text

    def plant_in_files(self, edit: Callable[[str], str]) -> None:
        """In a folder that stands in for nvcc's."""
        for path in session.FOLDER.glob("*.ptx"):
            if path.stem.endswith(f".{CASES['cuda'].D}") or not path.stem.startswith("attention_"):
                (self.folder / path.name).write_text(edit(path.read_text()))
        torch.ops.attnfast.emulator_ptx(str(self.folder))

    def weed(self, backend: str) -> None:
        """The kernels are their compilers' again."""
        if backend == "cuda":
            torch.ops.attnfast.emulator_ptx(str(session.FOLDER))
        else:
            session.driver().edit = lambda name, text: text


def results(backend: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The case, held to the accuracy rule."""
    monkeypatch.setenv("ATTNFAST_EMULATOR_SEED", str(seed))
    given = problem(CASES[backend])
    check(run(given, backend), given)


def first_words(backend: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What is said of the kernels as they are now, on the first seed on which something is."""
    for seed in SEEDS:
        try:
            results(backend, seed, monkeypatch)
        except (RuntimeError, AssertionError) as fault:
            return str(fault)
    return ""


@functools.cache
def sound(backend: str) -> None:
    """The twin without a fault passes on every seed."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert not first_words(backend, monkeypatch)


def skip_others(request: pytest.FixtureRequest, backend: str, arch: str) -> None:
    chosen = "cuda" if backend == "cuda" else "triton"
    if reason := session.left_out(request.config, chosen, arch):
        pytest.skip(reason)


@pytest.mark.parametrize("fault", PLANTED, ids=lambda x: f"{x.backend}-{x.arch}-{x.name}")
def test_planted(
    fault: Planted,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    skip_others(request, fault.backend, fault.arch)
    sound(fault.backend)
    ground = Ground(tmp_path)
    ground.plant(fault)
    try:
        words = first_words(fault.backend, monkeypatch)
    finally:
        ground.weed(fault.backend)
    assert ground.places, "nothing was planted"
    assert re.search(fault.said, words, re.DOTALL), words or "nothing was found"


SYNCHRONISES = r"(?:bar\.(?:warp\.)?sync|cp\.async\.wait_group)\s[^;]*;"
PLAIN = r"\.entry \w*attention_fwd_kernelINS0_7Float16ELi64ELNS0_4FormE0E.*?\n}"  # no options


def places(text: str) -> list[tuple[int, int]]:
    """Where the forward's barriers and waits for copies begin and end."""
    body = re.search(PLAIN, text, re.DOTALL)
    found = re.finditer(SYNCHRONISES, body[0]) if body else ()
    return [(body.start() + x.start(), body.start() + x.end()) for x in found]


def test_each_barrier_and_wait_is_missed(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the CUDA forward: none is superfluous."""
    skip_others(request, "cuda", session.ARCH)
    sound("cuda")
    path = session.FOLDER / "attention_fwd.64.ptx"
    text = path.read_text()
    assert places(text)
    for begin, end in places(text):
        faulty = text[:begin] + text[end:]
        ground = Ground(tmp_path / str(begin))
        ground.plant_in_files(lambda x, faulty=faulty: faulty if x == text else x)
        try:
            assert first_words("cuda", monkeypatch), text[begin:end]
        finally:
            ground.weed("cuda")


# ---- What a launch passes

Launch = dict[str, Any]  # arguments of machine.Program.launch, by name


def moved(launch: Launch, place: int, bytes_: int) -> None:
    """A tensor's address, moved by so many bytes."""
    begin = int.from_bytes(launch["parameters"][8 * place : 8 * place + 8], "little") + bytes_
    words = launch["parameters"]
    launch["parameters"] = words[: 8 * place] + begin.to_bytes(8, "little") + words[8 * place + 8 :]


def swapped(launch: Launch, one: int, other: int) -> None:
    """Two tensors, one in the other's place."""
    words = [launch["parameters"][n : n + 8] for n in range(0, 8 * (max(one, other) + 1), 8)]
    words[one], words[other] = words[other], words[one]
    launch["parameters"] = b"".join(words) + launch["parameters"][8 * len(words) :]


def of_values(launch: Launch, old: bytes, new: bytes) -> None:
    """Numbers of 4 bytes, wherever they are."""
    words = launch["parameters"]
    assert old in words
    parts = [words[n : n + 4] for n in range(0, len(words), 4)]
    launch["parameters"] = b"".join(new if x == old else x for x in parts)


def number(x: int) -> bytes:
    return x.to_bytes(4, "little")


LAUNCHES: dict[str, tuple[Callable[[Launch], None], str]] = {
    "compiled for addresses of 16 bytes": (lambda x: moved(x, 0, 8), "misaligned"),
    "k and v swapped": (lambda x: swapped(x, 1, 2), WRONG),
    "k and the output swapped": (lambda x: swapped(x, 1, 3), "only read|never written"),
    "rows nearer to one another": (
        lambda x: of_values(x, number(64), number(56)),
        "race between blocks",
    ),
    "more keys than there are": (
        lambda x: of_values(x, number(200), number(208)),
        f"{WRONG}|past the end|no tensor",
    ),
    "a block too few": (
        lambda x: x.update(grid=(x["grid"][0] - 1, 1, 1)),
        "NaN or Inf out of place",
    ),
    "less shared memory": (lambda x: x.update(shared=x["shared"] // 2), "outside of shared memory"),
    "another number of warps": (lambda x: x.update(threads=64), "launched with 64 threads"),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_planted_in_a_launch(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of Triton's forward."""
    skip_others(request, "triton", "80")
    sound("triton")
    change, said = LAUNCHES[name]
    launch = machine.Program.launch
    signature = inspect.signature(launch)

    def changed(program: machine.Program, *arguments: Any) -> None:
        bound = signature.bind(program, *arguments).arguments
        if f".entry {FORWARD}(" in "\n".join(program.lines):
            change(bound)
        launch(**bound)

    monkeypatch.setattr(machine.Program, "launch", changed)
    words = first_words("triton", monkeypatch)
    assert re.search(said, words), words or "nothing was found"
