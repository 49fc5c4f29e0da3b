"""A pytest-benchmark run: settings, rows, and what the JSON holds beside the times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from . import RESULTS, environment, results, suites, tables
from .grid import SUITES, Case

SETTINGS = pytest.StashKey[environment.Settings]()
FACTS = pytest.StashKey[dict[str, Any]]()
ROWS = pytest.StashKey[list[results.Row]]()
PARTIAL = pytest.StashKey[bool]()
Measure = Callable[[Case], None]  # the fixture of that name


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where the rows are written beside pytest-benchmark's own file."""
    parser.addoption(
        "--results",
        metavar="FILE",
        help="also write this project's file of results; 'device': the device's in bench/results,"
        " or bench/results/latest.json if only some rows are run",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Refuse settings or a backend that cannot be measured, in one line."""
    try:
        settings = environment.available_settings()
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    config.stash[SETTINGS] = settings
    config.stash[FACTS] = environment.facts("timing", settings)
    config.stash[ROWS] = []
    if config.option.benchmark_json:
        Path(config.option.benchmark_json).parent.mkdir(parents=True, exist_ok=True)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The rows of the size that was asked for, suite by suite."""
    size = metafunc.config.stash[SETTINGS].size
    cases = [case for suite in SUITES for case in SUITES[suite](size)]
    metafunc.parametrize("case", cases, ids=lambda case: f"{case.suite}-{case}")


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Iterator[suites.Session]:
    """What all rows share, the machine's ceilings measured first."""
    before = torch.get_num_threads()
    stash = request.config.stash
    rows = [item.callspec.params["case"] for item in request.session.items]
    found = suites.session(stash[SETTINGS], rows)
    stash[FACTS].update(found.facts())
    yield found
    torch.set_num_threads(before)


@pytest.fixture
def measure(
    benchmark: BenchmarkFixture, session: suites.Session, request: pytest.FixtureRequest
) -> Measure:
    """Times one row, puts it into the JSON, and prints its line."""
    reporter = request.config.pluginmanager.getplugin("terminalreporter")
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def say(line: str) -> None:
        with capture.global_and_fixture_disabled():
            reporter.ensure_newline()
            reporter.write_line(line)

    def run(case: Case) -> None:
        benchmark.group = case.suite
        try:
            race = suites.race(case, session)
        except suites.LeftOut as reason:
            say(f"{case}: left out: {reason}")
            pytest.skip(f"left out: {reason}")
        benchmark.pedantic(race.our_turn, setup=race.rivals_turn, rounds=race.rounds)
        row = suites.finished(race, session)
        benchmark.extra_info.update(row)
        request.config.stash[ROWS].append(row)
        say(suites.line(row))

    return run


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Remember that this run is no whole one."""
    items[0].config.stash[PARTIAL] = True


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the file of results that was asked for."""
    config = session.config
    if not config.option.results or not config.stash[ROWS]:
        return
    path = Path(config.option.results)
    if config.option.results == "device":
        whole = RESULTS / config.stash[FACTS]["device"] / "timing.json"
        path = RESULTS / "latest.json" if config.stash.get(PARTIAL, False) else whole
    results.save(path, config.stash[FACTS], config.stash[ROWS])


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """No dot for a row that has printed its line."""
    if report.when != "call" or report.failed:
        return None
    return ("left out", "", "LEFT OUT") if report.skipped else ("passed", "", "PASSED")


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """The last tables: means and extremes of all groups, and the core shapes beside torch."""
    if config.stash[ROWS]:
        run = results.Run(Path("this run"), config.stash[FACTS], config.stash[ROWS])
        terminalreporter.write_line(f"\n{tables.overview(run)}")


def pytest_benchmark_generate_machine_info() -> dict[str, Any]:
    """The machine, without its name."""
    return environment.machine()


def pytest_benchmark_generate_commit_info() -> dict[str, Any]:
    """The commit, and whether what was measured differs from it."""
    return environment.commit()


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Add what was measured, and leave out the single times: quartiles are in every row."""
    output_json["attnfast"] = {"schema": results.SCHEMA, **config.stash[FACTS]}
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
        benchmark.pop("params", None)
