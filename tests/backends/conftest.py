"""Tests of kernels, for the backends that ``--backend`` names.

A test with an argument `backend` is run for each of them. Files called test_triton* and test_cuda*
are about one backend, and all other tests about the CPU's, or none. Under ATTNFAST_PTX, where
there is neither Triton's interpreter nor the emulator, files called test_ptx* take their place.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from ptx import session

HERE = Path(__file__).parent
OF_ONE = "test_(triton|cuda|ptx)"
SCHEDULES = 6  # of the emulator

# Where kernels are interpreted or emulated: of the cases of each test of a file one in so many.
ONE_IN = {
    "triton": {
        "test_numerics": 3,
        "test_layouts": 2,
        "test_dropout": 4,
        "test_varlen": 4,
        "test_decode": 2,
        "test_determinism": 5,
        "test_large_scores": 9,
        "test_pooled": 3,
    },
    "cuda": {  # the last has files of its own
        "test_numerics": 3,
        "test_layouts": 2,
        "test_dropout": 3,
        "test_varlen": 3,
        "test_determinism": 4,
        "test_large_scores": 9,
        "test_pooled": 3,
    },
}
# Where their PTX is executed: Triton takes seconds to compile a case.
ONE_IN_PTX = {
    "triton": {
        "test_table": 6,
        "test_numerics": 8,
        "test_layouts": 8,
        "test_dropout": 8,
        "test_varlen": 8,
        "test_decode": 6,
        "test_determinism": 8,
        "test_large_scores": 12,
        "test_pooled": 8,
    },
    "cuda": {
        "test_table": 2,
        "test_numerics": 3,
        "test_layouts": 2,
        "test_dropout": 3,
        "test_varlen": 3,
        "test_determinism": 4,
        "test_large_scores": 9,
        "test_pooled": 6,
    },
}


def backends(config: pytest.Config) -> list[str]:
    """The backends under test."""
    return config.getoption("--backend") or ["cpu", "reference"]


def pytest_configure(config: pytest.Config) -> None:
    """Numpy, which interprets Triton's kernels, warns of what a GPU does silently: 1 / 0."""
    if "triton" in backends(config) and not session.ARCH:
        config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning")
    if not {"cpu", "reference"} & set(backends(config)):
        hypothesis.settings.register_profile(
            "slow", hypothesis.settings.get_profile("default"), max_examples=40
        )
        hypothesis.settings.load_profile("slow")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Whether a file is about a backend, or a way to run it, that is not under test."""
    about = re.match(OF_ONE, collection_path.name)
    chosen = ["ptx"] if session.ARCH else backends(config)
    return True if about and about[1] not in chosen else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test for each backend."""
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", backends(metafunc.config))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep one in so many; of the tests here alone, though pytest hands over all that it found."""
    kept, left_out = [], []
    seen: set[tuple[str, str]] = set()
    for item in items:
        step = one_in(item, backends(config)) if HERE in item.path.parents else 1
        test = (item.nodeid.partition("[")[0], backend_of(item))
        # By a hash: every second one could be every one with the same dtype.
        chosen = step and (test not in seen or zlib.crc32(item.nodeid.encode()) % step == 0)
        (kept if chosen else left_out).append(item)
        seen.add(test)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


def backend_of(item: pytest.Item) -> str:
    """The backend that a test is run for, or ""."""
    return item.callspec.params.get("backend", "") if hasattr(item, "callspec") else ""


def one_in(item: pytest.Item, chosen: list[str]) -> int:
    """Of how many cases of a test one is kept; 0 for none."""
    backend, file = backend_of(item), item.path.stem
    if not backend:
        return 1 if "cpu" in chosen or re.match(OF_ONE, file) else 0
    if backend == "reference":
        mark = item.get_closest_marker("reference")
        return mark.args[0] if mark else 0
    return (ONE_IN_PTX if session.ARCH else ONE_IN).get(backend, {}).get(file, 1)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """What a backend refuses is skipped for the backend's reason."""
    backend = pyfuncitem.funcargs.get("backend")
    if session.ARCH and (reason := session.missing(backend)):
        pytest.skip(reason)
    try:
        return (yield)
    except ValueError as error:
        _, refused, reason = str(error).partition(f"{backend!r} cannot run this call: ")
        if not refused:
            raise
        pytest.skip(f"{backend} {reason}")


@pytest.fixture(autouse=True)
def schedule_of_its_own(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test runs emulated kernels on one of six schedules."""
    seed = zlib.crc32(request.node.name.encode()) % SCHEDULES
    monkeypatch.setenv("ATTNFAST_EMULATOR_SEED", str(seed))
