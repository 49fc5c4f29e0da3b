"""Set-up of a benchmark run: settings, threads, and what goes into the JSON beside the times."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from . import OURS, SCHEMA, environment, timing
from .shapes import Case, attention_cases, encoder_cases, layer_cases

SETTINGS = pytest.StashKey[environment.Settings]()
LOAD = pytest.StashKey[float | None]()


def pytest_configure(config: pytest.Config) -> None:
    """Refuse settings or a backend that cannot be measured, in one line."""
    try:
        settings = environment.settings()
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    reason = environment.unavailable(settings.backend)
    if reason is not None:
        raise pytest.UsageError(f"bench: nothing to measure: {reason}")
    config.stash[SETTINGS] = settings
    config.stash[LOAD] = environment.load()
    if config.option.benchmark_json:
        Path(config.option.benchmark_json).parent.mkdir(parents=True, exist_ok=True)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Cases of the suite that was asked for."""
    suite = metafunc.config.stash[SETTINGS].suite
    for argument, cases in (
        ("attention_case", attention_cases),
        ("layer_case", layer_cases),
        ("encoder_case", encoder_cases),
    ):
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, cases(suite), ids=str)


@pytest.fixture(scope="session")
def settings(pytestconfig: pytest.Config) -> environment.Settings:
    """The settings of this run."""
    return pytestconfig.stash[SETTINGS]


@pytest.fixture(autouse=True)
def threads_and_seed(settings: environment.Settings) -> Iterator[None]:
    """The number of threads asked for, and the same random inputs for the same row."""
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def race(
    benchmark: BenchmarkFixture, settings: environment.Settings, request: pytest.FixtureRequest
) -> timing.Race:
    """Times one row, puts it into the JSON, and prints its line."""
    reporter = request.config.pluginmanager.getplugin("terminalreporter")
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def run(case: Case, contestants: dict[str, timing.Call]) -> None:
        row = case.describe()
        measured = timing.race(
            benchmark,
            contestants,
            flop=row["flop"],
            budget_s=settings.budget_s,
            most_rounds=settings.most_rounds,
        )
        benchmark.extra_info.update(row, **measured)
        ours = measured["contestants"][OURS]
        theirs = measured["contestants"][measured["rival"]]
        with capture.global_and_fixture_disabled():
            reporter.ensure_newline()
            reporter.write_line(
                f"{case}: {ours['median_s'] * 1e3:.3f} ms, {measured['rival']}"
                f" {theirs['median_s'] * 1e3:.3f} ms: {measured['ratio']:.2f}x,"
                f" rounds {ours['rounds']}"
            )

    return run


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """No dot for a row that has printed its line."""
    return ("passed", "", "PASSED") if report.when == "call" and report.passed else None


def pytest_benchmark_generate_machine_info() -> dict[str, Any]:
    """The machine, without its name."""
    return environment.machine()


def pytest_benchmark_generate_commit_info() -> dict[str, Any]:
    """The commit, and whether what was measured differs from it."""
    return environment.commit()


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Add what was measured, and leave out the single times: quartiles are in every row."""
    settings = config.stash[SETTINGS]
    output_json["attnfast"] = {
        "schema": SCHEMA,
        "device": "cpu",
        "settings": settings._asdict(),
        "load": config.stash[LOAD],
        **environment.code(settings.backend),
    }
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
        benchmark.pop("params", None)
