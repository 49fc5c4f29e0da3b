"""python -m bench tune with the real kernels: every pass runs and agrees with other tiles."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attnfast.kernels import configs

from tools.gpu import tune


class Stopwatch:
    """Runs the call; every call takes a second."""

    def read(self, call: Any) -> Any:
        return SimpleNamespace(seconds=1.0, results=call())


@pytest.mark.parametrize("size", tune.DTYPES)
@pytest.mark.parametrize("name", tune.PASSES)
def test_every_pass(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tiles are run; they reach the kernel in question and no other."""
    monkeypatch.setattr(tune, "ROUNDS", 1)
    chosen = []
    plain = configs.choose

    def choose(arch: str, asked: str, *rest: Any) -> configs.Config:
        config = plain(arch, asked, *rest)
        chosen.append((asked, config[:2]))
        return config

    monkeypatch.setattr(configs, "choose", choose)
    place = tune.Place("interpreter", name, size, 8)
    trial = tune.Trial(place, tune.Sizes(1, 1, 40), torch.device("cpu"), Stopwatch())
    assert trial.measure((32, 32, 4, 1)) == 1.0
    assert trial.measure((16, 16, 4, 1)) == 1.0
    assert {(name, (32, 32)), (name, (16, 16))} <= set(chosen)
    others = {config for asked, config in chosen if asked != name}
    assert others <= {configs.INTERPRETER[:2]}
