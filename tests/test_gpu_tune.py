"""python -m bench tune: which tiles are tried, chosen and written; the times are made up."""

from __future__ import annotations

import importlib
import importlib.util
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attnfast.kernels import configs

from bench import cli, environment
from tools.gpu import tune
from tools.gpu.tune import Place, Unfit

PLACE = Place("sm_90", "fwd", 2, 128)
START = (64, 64, 4, 2)
ROOM = 232448


def times(best: tune.Tile) -> Any:
    """A measure whose minimum is at one tile: every step away from it costs a quarter."""

    def measure(tile: tune.Tile) -> float:
        steps = sum(abs(math.log2(a / b)) for a, b in zip(tile[:3], best[:3], strict=True))
        return 1e-3 * (1 + 0.25 * (steps + abs(tile[3] - best[3])))

    return measure


@pytest.mark.parametrize("best", [(128, 128, 8, 2), (16, 32, 4, 1), (64, 64, 8, 3), START])
def test_steps_lead_to_the_fastest(best: tune.Tile) -> None:
    found = tune.search(PLACE, START, ROOM, times(best))
    assert found.tile == best
    assert found.seconds == 1e-3
    assert found.before_s == times(best)(START)
    assert not found.unfit


def test_noise_changes_nothing() -> None:
    noise = iter([1.0, *([0.99, 0.985] * 20)])
    found = tune.search(PLACE, START, ROOM, lambda tile: next(noise))
    assert found.tile == START


def test_what_is_unfit_is_passed_over() -> None:
    def measure(tile: tune.Tile) -> float:
        if tile[2] == 8:
            raise Unfit("wrong results")
        return times((64, 128, 8, 2))(tile)

    found = tune.search(PLACE, START, ROOM, measure)
    assert found.tile == (64, 128, 4, 2)
    assert set(found.unfit.values()) == {"wrong results"}
    with pytest.raises(Unfit, match="wrong results"):
        tune.search(PLACE, (64, 64, 8, 2), ROOM, measure)


def test_what_cannot_fit_is_never_measured() -> None:
    """Two tensors' tiles, as deep as the pipeline is."""
    assert tune.least_shared((64, 128, 8, 3), PLACE) == 3 * 2 * 128 * 128 * 2
    assert tune.least_shared((64, 128, 8, 3), PLACE._replace(name="dkdv")) == 3 * 2 * 64 * 128 * 2
    measured = []

    def measure(tile: tune.Tile) -> float:
        measured.append(tile)
        return times((128, 128, 4, 4))(tile)

    limit = 2 * 2 * 64 * 128 * 2  # of START
    found = tune.search(PLACE, START, limit, measure)
    assert found.tile == (128, 64, 4, 2)
    assert all(tune.least_shared(tile, PLACE) <= limit for tile in measured)
    assert f"needs more than {limit} bytes of shared memory" in found.unfit.values()


@pytest.mark.parametrize("name", tune.PASSES)
def test_neighbours_are_one_step_away_and_tiles_of_triton(name: str) -> None:
    found = list(tune.neighbours((32, 64, 4, 1), name))
    assert len(set(found)) == len(found)
    for tile in found:
        assert sum(a != b for a, b in zip(tile, (32, 64, 4, 1), strict=True)) == 1
        assert all(x >= 16 and x & (x - 1) == 0 for x in tile[:2])
        assert tile[3] == 1 or name not in tune.UNPIPELINED
    assert any(tile[0] != 32 for tile in found) == (name != "decode")


def test_passes_are_those_of_the_table() -> None:
    assert tune.PASSES == configs.PASSES


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (0.0, None),
        (2.0**-8, None),  # bf16's last place
        (2.0**-3, "result 1 differs by 0.12, allowed is"),
        (math.nan, "result 1 differs by nan, allowed is"),
        (math.inf, "result 1 differs by inf, allowed is"),
    ],
)
def test_results_are_those_of_the_first_tile(change: float, reason: str | None) -> None:
    truth = (torch.tensor([-math.inf, 3.0]), torch.tensor([0.5, 1.0, -0.25]).bfloat16())
    changed = (truth[0].clone(), truth[1] + torch.tensor([0.0, change, 0.0]).bfloat16())
    found = tune.agree(changed, truth, 64)
    assert (found is None) == (reason is None)
    assert reason is None or found.startswith(reason)


def test_an_infinity_elsewhere_is_found() -> None:
    truth = (torch.tensor([-math.inf, 3.0]),)
    assert tune.agree((torch.tensor([3.0, -math.inf]),), truth, 4) is not None


def tuned_module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("tuned_again", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def search_all(path: Path, **changes: Any) -> tune.Tuned:
    places = [PLACE, PLACE._replace(name="dq"), PLACE._replace(D=64)]
    arguments: dict[str, Any] = {
        "places": places,
        "path": path,
        "limit": ROOM,
        "start_of": lambda place: START,
        "measure_of": lambda place: times((128, 64, 4, 2)),
    }
    return tune.tune(**(arguments | changes))


def test_the_table_is_written_and_read_again(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "tuned.py"
    tuned = search_all(path)
    expected = {("sm_90", n, 2, D): (128, 64, 4, 2) for n, D in (("fwd", 128), ("dq", 128))}
    expected |= {("sm_90", "fwd", 2, 64): (128, 64, 4, 2)}
    assert tuned == tune.read(path) == tuned_module(path).TUNED == expected
    assert "sm_90 fwd 2 128: (128, 64, 4, 2), 1.000 ms, before 1.250 ms" in capsys.readouterr().out
    ruff = [sys.executable, "-m", "ruff", "format", "--check", "--line-length", "100", str(path)]
    if importlib.util.find_spec("ruff"):
        assert subprocess.run(ruff, capture_output=True).returncode == 0


def test_what_is_there_is_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "tuned.py"
    path.write_text(tune.text({tuple(PLACE): START, ("sm_80", "fwd", 4, 64): START}))

    def measure_of(place: Place) -> Any:
        assert place != PLACE
        return times((64, 32, 4, 2))

    tuned = search_all(path, measure_of=measure_of)
    assert tuned[tuple(PLACE)] == tuned["sm_80", "fwd", 4, 64] == START
    assert tuned["sm_90", "dq", 2, 128] == (64, 32, 4, 2)


def test_the_time_ends_between_places_and_a_place_may_fail(tmp_path: Path, capsys: Any) -> None:
    def broken(place: Place) -> Any:
        def measure(tile: tune.Tile) -> float:
            raise Unfit("does not compile")

        return measure if place.name == "fwd" else times(START)

    seconds = iter([0.0, 1.0, 2.0])
    tuned = search_all(tmp_path / "a.py", measure_of=broken, until=1.5, now=lambda: next(seconds))
    assert tuned == {("sm_90", "dq", 2, 128): START}
    printed = capsys.readouterr().out
    assert "sm_90 fwd 2 128: left out: does not compile" in printed
    assert "the same command goes on from here" in printed


def test_the_committed_table_is_as_the_command_writes_it() -> None:
    assert tune.PATH.read_text() == tune.text(tune.read(tune.PATH))


def test_measured_tiles_go_before_the_families(monkeypatch: pytest.MonkeyPatch) -> None:
    before = configs.choose("sm_90", "fwd", 2, 96, 96, False)
    monkeypatch.setitem(configs.TUNED, ("sm_90", "fwd", 2, 128), (32, 16, 8, 3))
    assert configs.choose("sm_90", "fwd", 2, 96, 96, False) == (32, 16, 8, 3) != before
    assert configs.choose("sm_90", "fwd", 2, 96, 96, True) == (32, 16, 8, 1)
    assert configs.choose("sm_90", "fwd", 2, 64, 64, False) != (32, 16, 8, 3)
    assert configs.choose("sm_80", "fwd", 2, 96, 96, False) != (32, 16, 8, 3)


class Stopwatch:
    """Calls the call, and reads seconds from a list."""

    def __init__(self, *seconds: float) -> None:
        self.seconds = iter(seconds)

    def read(self, call: Any) -> Any:
        call()
        return SimpleNamespace(seconds=next(self.seconds))


def trial(monkeypatch: pytest.MonkeyPatch, result_of: Any, *seconds: float) -> tune.Trial:
    """A trial whose operator is a function of the tile that the table would give it."""

    def call() -> tuple[torch.Tensor, ...]:
        return (result_of(configs.choose("sm_90", "fwd", 2, 128, 128, False)),)

    monkeypatch.setattr(tune, "call_of", lambda *arguments: (call, 16))
    return tune.Trial(PLACE, tune.Sizes(1, 1, 1), torch.device("cpu"), Stopwatch(*seconds))


def test_a_trial_runs_the_tile_and_takes_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()

    def result_of(config: configs.Config) -> torch.Tensor:
        seen.add(config)
        return torch.ones(3)

    measured = trial(monkeypatch, result_of, *range(9)).measure(START)
    assert measured == 4
    assert seen == {START}
    assert not configs.trial


class OutOfResources(Exception):
    __module__ = "triton.runtime.errors"


@pytest.mark.parametrize("error", [OutOfResources("shared memory\nmore"), RuntimeError("no")])
def test_a_trial_rejects_errors_and_wrong_results(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def result_of(config: configs.Config) -> torch.Tensor:
        if config.num_warps == 8:
            raise error
        return torch.full((3,), 1.0 + 0.1 * (config.BLOCK_N == 32))

    tried = trial(monkeypatch, result_of, *range(9))
    tried.measure(START)
    with pytest.raises(Unfit, match=f"^{str(error).splitlines()[0]}$"):
        tried.measure((64, 64, 8, 2))
    with pytest.raises(Unfit, match=r"^result 0 differs by"):
        tried.measure((64, 32, 4, 2))
    assert not configs.trial


def test_a_mistake_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def result_of(config: configs.Config) -> torch.Tensor:
        raise KeyError("q")

    with pytest.raises(KeyError):
        trial(monkeypatch, result_of).measure(START)
    assert not configs.trial


def test_without_a_gpu_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(environment.torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune"]) == 2
    said = capsys.readouterr()
    assert said.err == "bench: nothing to tune: no GPU that this torch can use\n"
    assert not said.out
