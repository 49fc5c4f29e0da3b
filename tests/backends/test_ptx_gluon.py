"""Gluon's forward for Hopper, which nothing interprets: its PTX, executed on six schedules."""

from __future__ import annotations

import pytest
import torch
from accuracy import check
from cases import Case, bf16, fp16, problem, run
from ptx import session

FORWARD = "attention_fwd_hopper_kernel"
SEEDS = range(6)
SHAPES = (  # every D, one row and one key, tiles that end in the middle, rows without keys
    Case("one", B=1, T=1, S=1, D=64, dtype=bf16),
    Case("plain", T=130, S=500, D=64, dtype=fp16),
    Case("plain", T=64, S=128, D=128, dtype=bf16),
    Case("plain", T=129, S=63, D=256, dtype=fp16),
    Case("heads", T=257, S=200, H=4, D=64, dtype=bf16),
    Case("heads", T=100, S=385, H=6, H_kv=1, D=128, dtype=fp16),
    Case("causal", T=300, S=300, D=64, dtype=fp16, causal=True),
    Case("causal", T=150, S=150, H_kv=1, D=128, dtype=bf16, causal=True),
    Case("causal", T=140, S=200, D=256, dtype=bf16, causal=True),
    Case("dead", T=300, S=70, D=64, dtype=bf16, causal=True, align="bottom_right"),
    Case("ahead", T=70, S=600, D=128, dtype=fp16, causal=True, align="bottom_right"),
    Case("scale", T=70, S=150, D=64, dtype=fp16, scale=3.0, causal=True),
    Case("large scores", T=70, S=300, D=128, dtype=bf16, spread=30.0),
)


@pytest.fixture(autouse=True)
def for_hopper(request: pytest.FixtureRequest) -> None:
    if reason := session.left_out(request.config, "triton", "90"):
        pytest.skip(reason)


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_forward(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is right, and no schedule changes a bit."""
    given = problem(Case(**vars(case) | {"grads": ()}))
    found = []
    for seed in SEEDS:
        monkeypatch.setenv("ATTNFAST_EMULATOR_SEED", str(seed))
        session.driver().launches.clear()
        found.append(run(given, "gluon"))
        assert session.driver().launches == [FORWARD]
    check(found[0], given)
    for results in found[1:]:
        for name, result in results.items():
            assert torch.equal(result, found[0][name]), name


def test_gradients() -> None:
    """What it saves is what Triton's backward takes."""
    given = problem(Case(T=70, S=150, H_kv=1, D=64, dtype=bf16, causal=True, grads=("out", "lse")))
    check(run(given, "gluon"), given)
    assert FORWARD in session.driver().launches


def test_strides() -> None:
    """Heads next to one another in memory, and rows with room between them."""
    given = problem(Case(T=130, S=140, D=64, dtype=fp16, grads=()))
    apart = {}
    for name in "qkv":
        x = getattr(given.inputs, name)
        room = torch.full((x.shape[0], x.shape[2], x.shape[1], 72), torch.nan, dtype=x.dtype)
        apart[name] = room[..., :64].transpose(1, 2).copy_(x)
    check(run(given._replace(inputs=given.inputs._replace(**apart)), "gluon"), given)
    assert session.driver().launches[-1] == FORWARD
