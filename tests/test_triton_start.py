"""Whether Triton can start on a machine with a GPU: what `auto` and `explain` make of it if not.

There is no GPU here, so torch is told that there is one; what fails then is Triton itself.
"""

from __future__ import annotations

import errno
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attnfast import __main__ as about
from attnfast import backends, dispatch
from attnfast.backends import gpus, triton
from attnfast.call import Options
from attnfast.explain import describe

PROBLEM = backends.Problem(
    "attention", torch.device("cuda", 0), torch.bfloat16, 2, 4, 4, 64, 64, 64, 64, Options(0.125)
)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A GPU, a Triton that has not started, and a cache of its own in the folder returned."""
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpus, "capability", lambda index: (9, 0))
    monkeypatch.setattr(triton, "_unusable", {})
    monkeypatch.setattr(driver, "_active", None)
    monkeypatch.setattr(driver, "_default", None)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    for function in (nvidia.libcuda_dirs, nvidia.library_dirs):
        function.cache_clear()
    return tmp_path


def no_libcuda(machine: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("triton.backends.nvidia.driver.subprocess.check_output", lambda *x: b"")
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    return "Triton cannot start: libcuda.so cannot found! Please make sure GPU is set up"


def no_headers(machine: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TRITON_LIBCUDA_PATH", str(machine))
    monkeypatch.setattr(sysconfig, "get_paths", lambda **scheme: {"include": str(machine)})
    return f"Triton finds no Python.h in {machine}: install python3-dev, or what has it here"


def broken_compiler(machine: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TRITON_LIBCUDA_PATH", str(machine))
    monkeypatch.setenv("CC", "false")
    import triton.runtime.build

    triton.runtime.build._find_compiler.cache_clear()
    return "Triton cannot build its driver: false ended with 1, and says why above"


def no_cache(machine: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (machine / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(machine / "file" / "cache"))
    return (
        f"Triton cannot write to its cache {machine}/file/cache (Not a directory): name another"
        " folder in TRITON_CACHE_DIR"
    )


@pytest.mark.parametrize("broken", [no_libcuda, no_headers, broken_compiler, no_cache])
def test_what_stops_triton_leaves_the_call_to_others(
    broken: Callable[[Path, pytest.MonkeyPatch], str],
    machine: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reason = broken(machine, monkeypatch)
    with pytest.warns(RuntimeWarning, match="no fused backend accepts this call"):
        assert dispatch.select(PROBLEM).name != "triton"
    text = describe("attention", PROBLEM)
    assert f"\n  triton     {reason}" in text
    assert "chosen: triton" not in text
    with pytest.raises(
        ValueError, match="backend 'triton' cannot run this call: Triton "
    ) as raised:
        dispatch.select(PROBLEM, "triton")
    assert reason in str(raised.value)
    assert reason in about.backend("triton")["reason"]


def starts(monkeypatch: pytest.MonkeyPatch, *errors: Exception | None) -> list[int]:
    """Let Triton's starts end so, in their order; returns a list that counts them."""
    asked: list[int] = []

    def start() -> None:
        asked.append(1)
        error = errors[len(asked) - 1]
        if error is not None:
            raise error

    monkeypatch.setattr(triton, "start", start)
    return asked


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (None, False),
        (RuntimeError("no"), False),
        (subprocess.CalledProcessError(1, ["gcc"]), False),
        (PermissionError(errno.EACCES, "no"), False),
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (MemoryError(), True),
        (subprocess.CalledProcessError(-9, ["gcc"]), True),
    ],
    ids=repr,
)
def test_what_may_pass_is_asked_again(
    machine: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None, again: bool
) -> None:
    asked = starts(monkeypatch, error, None)
    first, second = (triton.unsupported(PROBLEM) for _ in range(2))
    assert (first is None) == (error is None)
    assert len(asked) == 1 + again
    assert (second is None) == (error is None or again)


def test_nothing_is_asked_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = starts(monkeypatch)
    assert triton.unsupported(PROBLEM) is None
    assert not asked


def test_asking_does_not_break_a_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first time too, when Triton is imported and starts."""
    asked = starts(monkeypatch, RuntimeError("no driver"))
    gpu = SimpleNamespace(is_available=lambda: True)  # to others there is no GPU
    monkeypatch.setattr(triton, "_unusable", {})
    monkeypatch.setattr(triton, "torch", SimpleNamespace(get_device_module=lambda device: gpu))

    def run(x: torch.Tensor) -> Any:
        return x + (triton.unusable("cuda") == "Triton cannot start: no driver")

    assert torch.compile(run, fullgraph=True, backend="eager")(torch.zeros(1)) == 1
    assert asked == [1]


def test_intels_gpus_have_triton_and_the_reference() -> None:
    on_xpu = PROBLEM._replace(device=torch.device("xpu", 0))
    assert dispatch.select(on_xpu).name == "triton"
    names = [row.name for row in dispatch.backends_of(on_xpu.device)]
    assert names == list(dispatch.REASONS["xpu"]) == ["triton", "reference"]
    for kind in ("fwd", "bwd", "decode"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"attnfast::triton_{kind}", "XPU")
    from attnfast.kernels import configs

    assert configs.architecture(on_xpu.device) == "xpu"
    assert configs.choose("xpu", "fwd", 2, 64, 64, False) == configs.choose(
        "sm_89", "fwd", 2, 64, 64, False
    )
