"""Which calls the CUDA backend makes of torch and CUDA, where, and in which order; without a GPU.

tests/cuda_recorder.cpp links the real bindings, dispatch and launches with stand-ins that write
down every call. What has no stand-in does not link: the two lists here are all there is.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from test_cuda_launch import TYPES

from attnfast.autograd import operator_error

ROOT = Path(__file__).resolve().parent.parent
CSRC, BUILT = ROOT / "csrc", ROOT / "build" / "emulator"

# What CUDA permits while a stream is captured, and waits for nothing.
CUDA_CALLS = {"cudaFuncSetAttribute", "cudaFuncGetAttributes", "cudaGetDevice",
              "cudaDeviceGetAttribute", "cudaLaunchKernel"}  # fmt: skip
# Memory from torch's allocator, which captures know, and what torch launches on the current stream.
TORCH_CALLS = {"guard", "unguard", "stream", "empty", "fill_", "aten::zero_", "aten::copy_",
               "from", "aten::select", "aten::clamp"}  # fmt: skip

REPLACED = ("launch.o", "launch_ptx.o", "selftest.o")  # by the recorder, or not needed
HEADER = (
    TYPES
    + """
void record(const char* function, void* stream);
int current_device();
inline cudaError_t heard(const char* function, void* stream = nullptr) {
  record(function, stream);
  const char* failing = std::getenv("FAILING");
  return failing && std::string(failing) == function ? cudaErrorMemoryAllocation : cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaFuncSetAttribute(const void*, int, int) {
  return heard("cudaFuncSetAttribute");
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* of, const void*) {
  of->ptxVersion = 90;
  return heard("cudaFuncGetAttributes");
}
inline cudaError_t cudaGetDevice(int* x) { *x = current_device(); return heard("cudaGetDevice"); }
inline cudaError_t cudaDeviceGetAttribute(int* x, cudaDeviceAttr what, int) {
  const char* bytes = std::getenv("SHARED");
  *x = what != cudaDevAttrMaxSharedMemoryPerBlockOptin ? capability(90, what)
       : bytes                                         ? std::atoi(bytes)
                                                       : 166912;
  return heard("cudaDeviceGetAttribute");
}
inline cudaError_t cudaDriverGetVersion(int* x) { *x = 13000; return cudaSuccess; }
inline cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t stream) {
  return heard("cudaLaunchKernel", stream);
}
"""
)
FIRST_STREAM = 100  # that of GPU 0 in the recorder; the default stream is 0
STREAMS = f"""
#include <cstdint>
#include <cstdio>
int current_device();
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {{
  std::printf("stream gpu %d current %d\\n", device, current_device());
  *stream = reinterpret_cast<void*>(static_cast<intptr_t>({FIRST_STREAM} + device));
  return 0;
}}
"""


class Event(NamedTuple):
    """A call that a stand-in got."""

    name: str
    place: str | None  # "gpu 2" of a tensor, a guard, or whose stream is asked for
    stream: int | None  # that CUDA was given
    current: int  # the current device then


class Recorder(NamedTuple):
    """Programs that run one call each."""

    program: Path
    without_streams: Path  # where torch has none

    def lines(self, call: str, kind: str, device: int, failing: str = "") -> list[str]:
        """What a run printed."""
        return run(self.program, call, kind, device, failing)

    def events(self, call: str, kind: str, device: int) -> tuple[list[Event], list[str]]:
        """The calls in their order, and the kernels that were launched."""
        *lines, after = self.lines(call, kind, device)
        assert after == "after: current 1"
        events, kernels = [], []
        for line in lines:
            if line.startswith("kernel "):
                kernels.append(line.removeprefix("kernel ").partition("<")[0])
                continue
            found = re.fullmatch(r"(\S+)(?: ((?:gpu|host) \d+))?(?: to (\d+))? current (\d)", line)
            assert found, line
            name, place, stream, current = found.groups()
            events.append(Event(name, place, None if stream is None else int(stream), int(current)))
        return events, kernels


def run(program: Path, call: str, kind: str, device: int, failing: str = "") -> list[str]:
    done = subprocess.run(
        [program, call, kind, str(device)], env=os.environ | {"FAILING": failing},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Recorder:
    rules = BUILT / "build.ninja"
    if not rules.exists():
        pytest.skip("the emulator of the CUDA kernels is not built: make emulator")
    linked = next(line for line in rules.read_text().splitlines() if "_emulator.so: link" in line)
    objects = [
        CSRC.parent / name
        for name in linked.split()[3:]
        if "/bindings/" not in name and Path(name).name not in REPLACED
    ]
    folder = tmp_path_factory.mktemp("recorder")
    (folder / "cuda_runtime_api.h").write_text(HEADER)
    (folder / "streams.cpp").write_text(STREAMS)
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    include = Path(torch.__file__).parent / "include"
    flags = ["-std=c++17", "-Wall", "-fvisibility=hidden", "-pthread", f"-I{folder}", f"-I{CSRC}"]
    flags += ["-isystem", str(include), "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags.append('-DATTNFAST_CUDA_ARCHS="sm_80"')

    def compiled(*arguments: str | Path) -> None:
        command = [*compiler, *flags, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    own = [folder / f"{name}.o" for name in ("recorder", "launch", "streams")]
    compiled("-c", Path(__file__).with_name("cuda_recorder.cpp"), "-o", own[0])
    compiled("-c", "-x", "c++", CSRC / "cuda" / "launch.cu", "-o", own[1])
    compiled("-c", folder / "streams.cpp", "-o", own[2])
    found = Recorder(folder / "recorder", folder / "without_streams")
    compiled(*own, *objects, "-o", found.program)
    compiled(*own[:2], *objects, "-o", found.without_streams)
    return found


KERNELS = {
    ("forward", "plain"): ["attention_fwd"],
    ("forward", "options"): ["attention_fwd", "attention_weights", "attention_received"],
    ("forward", "packed"): ["attention_fwd", "attention_received"],
    ("backward", "plain"): ["attention_bwd_rows", "attention_bwd_fused"],
    ("backward", "options"): [
        "attention_bwd_rows", "attention_weight_rows", "attention_bwd_keys",
        "attention_bwd_queries", "attention_bwd_bias", "attention_bwd_sinks",
    ],
    ("backward", "packed"): ["attention_bwd_short"],
    ("backward", "short"): ["attention_bwd_short"],
    ("decode", "contiguous"): ["attention_decode", "decode_combine"],
    ("decode", "paged"): ["attention_decode", "decode_combine"],
    ("decode", "received"): ["attention_decode", "attention_decode_received", "decode_combine"],
    ("pooled", "cells"): ["attention_cells"],
    ("pooled", "distances"): ["attention_distances"],
}  # fmt: skip
TWO_PASSES = ["attention_bwd_rows", "attention_bwd_keys", "attention_bwd_queries"]
each_call = pytest.mark.parametrize(("call", "kind"), KERNELS)
each_device = pytest.mark.parametrize("device", [0, 2])  # the recorder begins on GPU 1


@each_call
@each_device
def test_launches_are_on_the_current_stream_of_the_tensors_device(
    recorder: Recorder, call: str, kind: str, device: int
) -> None:
    events, kernels = recorder.events(call, kind, device)
    launches = [event for event in events if event.name == "cudaLaunchKernel"]
    assert kernels == KERNELS[call, kind]
    assert len(launches) == len(kernels)
    assert {event.stream for event in launches} == {FIRST_STREAM + device}
    assert [event.place for event in events if event.name == "stream"] == [f"gpu {device}"]


@each_call
@each_device
def test_everything_happens_on_the_tensors_device_and_then_the_old_one_is_current(
    recorder: Recorder, call: str, kind: str, device: int
) -> None:
    first, *events, last = recorder.events(call, kind, device)[0]
    assert first == Event("guard", f"gpu {device}", None, device)
    assert last == Event("unguard", None, None, 1)
    assert {event.current for event in events} == {device}
    assert {event.place for event in events if event.place} == {f"gpu {device}"}


@pytest.mark.parametrize("kilobytes", [99, 163, 227])
def test_a_gpu_without_the_shared_memory_gets_other_kernels(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, kilobytes: int
) -> None:
    """D = 128, of which short sequences' kernel takes 129.5 KB, and the fused one more than 99."""
    monkeypatch.setenv("SHARED", str(kilobytes << 10))
    _, kernels = recorder.events("backward", "short", 2)
    assert kernels == (TWO_PASSES if kilobytes == 99 else KERNELS["backward", "short"])


@each_call
def test_nothing_is_called_that_waits_or_that_a_capture_forbids(
    recorder: Recorder, call: str, kind: str
) -> None:
    events, _ = recorder.events(call, kind, 2)
    assert {event.name for event in events} <= CUDA_CALLS | TORCH_CALLS
    copies = [event for event in events if event.name == "aten::copy_"]
    assert len(copies) == len([event for event in events if event.name == "from"])
    wanted = {"plain": 0, "short": 0, "contiguous": 1, "received": 1, "paged": 2, "packed": 2}
    assert len(copies) == wanted.get(kind, {"forward": 4, "backward": 7, "pooled": 4}.get(call))


def test_only_one_file_calls_cudas_runtime() -> None:
    called = {
        path.name
        for path in CSRC.rglob("*")
        if path.suffix in (".h", ".cpp", ".cu")
        and re.search(r"\bcu(da)?[A-Z]\w*\(|<<<", path.read_text())
    }
    assert called == {"launch.cu"}


@each_call
def test_no_value_is_read_on_the_host(recorder: Recorder, call: str, kind: str) -> None:
    """Lengths, pages, alignments and the dropout's seed: on the host they cannot be touched."""
    recorder.events(call, kind, 2)
    done = subprocess.run([recorder.program, "peek", "", "2"], capture_output=True, check=False)
    assert done.returncode == -signal.SIGSEGV


@pytest.mark.parametrize(
    ("call", "failing", "said"),
    [
        ("forward", "cudaLaunchKernel", "launching attention_fwd<bf16, 64, plain>"),
        ("backward", "cudaLaunchKernel", "launching attention_bwd_rows<bf16>"),
        ("backward", "cudaFuncSetAttribute", "launching attention_bwd_fused<bf16, 64, plain>"),
        ("decode", "cudaGetDevice", "asking what a GPU can run"),
    ],
)
def test_a_failure_leaves_the_old_device_current(
    recorder: Recorder, call: str, failing: str, said: str
) -> None:
    lines = recorder.lines(call, "plain", 2, failing)
    assert lines[-3] == "unguard current 1"
    assert lines[-2].startswith(f"raised attention: {said}")
    assert lines[-1] == "after: current 1"
    assert lines[-4].startswith(failing), "nothing is tried after it"


def test_no_memory(recorder: Recorder) -> None:
    *_, empty, unguard, raised, after = recorder.lines("forward", "plain", 2, "empty")
    assert (empty, unguard) == ("empty gpu 2 current 2", "unguard current 1")
    said = raised.removeprefix("raised ")
    assert re.fullmatch(r"attnfast: no tensor of \d+ MiB of shape \([\d, ]+\): out of memory", said)
    assert type(operator_error(RuntimeError(said))) is torch.OutOfMemoryError
    assert after == "after: current 1"


def test_a_torch_without_streams(recorder: Recorder) -> None:
    *events, raised, after = run(recorder.without_streams, "forward", "plain", 2)
    assert events == ["guard gpu 2 current 2", "unguard current 1"]
    assert raised.endswith("this torch has no CUDA streams; install a CUDA build of torch")
    assert after == "after: current 1"


def test_the_device_that_is_asked_about_is_current_meanwhile(recorder: Recorder) -> None:
    *lines, said, after = recorder.lines("unusable", "", 2, "cudaFuncGetAttributes")
    assert lines[0] == "guard gpu 2 current 2"
    assert lines[-2:] == ["cudaFuncGetAttributes to 0 current 2", "unguard current 1"]
    assert all(line.endswith(" current 2") for line in lines[:-1])
    assert said.startswith("raised attention: asking what a GPU can run failed: words (name); free")
    assert after == "after: current 1"


def test_the_operators_are_registered_for_gpus(recorder: Recorder) -> None:
    assert recorder.lines("registered", "", 0)[:-1] == [
        "CompositeExplicitAutograd cuda_unusable",
        "CompositeExplicitAutograd cuda_build",
        "CUDA cuda_fwd",
        "CUDA cuda_bwd",
        "CUDA cuda_decode",
        "CUDA cuda_pooled",
        "CUDA cuda_workspace",
        "CUDA cuda_decode_workspace",
    ]
