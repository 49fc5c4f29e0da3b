"""What a device's errors become on their way to the caller: never a complaint about an argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import attnfast
from attnfast import dispatch
from attnfast.ops import Ops

LAUNCH = (
    "attention: launching attention_fwd<bf16, 64, plain> (6 blocks of 128 threads, 50000 bytes of"
    " shared memory) failed: out of memory (cudaErrorMemoryAllocation); free memory on this GPU"
)
ASKING = "attention: asking what a GPU can run failed: words (name)"
STREAMS = "/build/csrc/bindings/device.h:68, attention: this torch has no CUDA streams; install"
NO_TENSOR = "attnfast: no tensor of 3 MiB of shape (1, 2, 3): CUDA out of memory. Tried to allocate"
COMPLAINT = "/build/csrc/bindings/cpu.cpp:41, attention: cu_seqlens_q must start with 0, got 3"


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    """Have every operator of the backend for CPU tensors raise an error."""

    def fail(error: Exception) -> None:
        def operator(*args: Any) -> Any:
            raise error

        first, *others = dispatch.BACKENDS["cpu"]
        row = first._replace(ops=Ops(*[operator] * len(Ops._fields)), workspace=operator)
        monkeypatch.setitem(dispatch.BACKENDS, "cpu", (row, *others))

    return fail


q = torch.randn(1, 2, 3, 8)
CALLS: dict[str, Callable[[], Any]] = {
    "attention": lambda: attnfast.attention(q, q, q),
    "with gradient": lambda: attnfast.attention(q.clone().requires_grad_(), q, q),
    "decode_attention": lambda: attnfast.decode_attention(q, q, q, torch.tensor([3])),
}
each_call = pytest.mark.parametrize("call", CALLS)


@each_call
@pytest.mark.parametrize("said", [LAUNCH, ASKING, STREAMS], ids=["launch", "asking", "streams"])
def test_a_failure_is_a_runtime_error(
    call: str, said: str, failing: Callable[[Exception], None]
) -> None:
    error = RuntimeError(said)
    error.__cause__ = OSError("what CUDA said")
    failing(error)
    with pytest.raises(RuntimeError, match="attention: ") as raised:
        CALLS[call]()
    assert type(raised.value) is RuntimeError
    assert said.endswith(str(raised.value))
    assert raised.value is error or raised.value.__cause__ is error
    assert isinstance(error.__cause__, OSError)


@each_call
def test_a_lack_of_memory_is_torchs_own_error(
    call: str, failing: Callable[[Exception], None]
) -> None:
    ours, theirs = RuntimeError(NO_TENSOR), torch.OutOfMemoryError("attention: q must be smaller")
    for error in (ours, theirs):
        failing(error)
        with pytest.raises(torch.OutOfMemoryError) as raised:
            CALLS[call]()
        assert raised.value is theirs or raised.value.__cause__ is ours


@each_call
def test_a_complaint_about_an_argument_is_a_value_error(
    call: str, failing: Callable[[Exception], None]
) -> None:
    failing(RuntimeError(COMPLAINT))
    function = call.partition(" ")[0].replace("with", "attention")
    with pytest.raises(ValueError, match=f"^{function}: cu_seqlens_q must start with 0, got 3$"):
        CALLS[call]()


@pytest.mark.parametrize("said", [LAUNCH, STREAMS, NO_TENSOR], ids=["launch", "streams", "memory"])
def test_explain_tells_the_decision_all_the_same(
    said: str, failing: Callable[[Exception], None]
) -> None:
    failing(RuntimeError(f"{said}\nand where"))
    text = attnfast.explain(q, q, q)
    assert "chosen: cpu, the first that accepts" in text
    assert f"\nworkspace: unknown: {said}\nenvironment:" in text


def test_explain_raises_what_the_call_would(failing: Callable[[Exception], None]) -> None:
    failing(RuntimeError(COMPLAINT))
    with pytest.raises(ValueError, match=r"^attention: cu_seqlens_q must start with 0, got 3$"):
        attnfast.explain(q, q, q)
