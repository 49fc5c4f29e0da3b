"""Which backend runs, why, what is said about it, and how often."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import attnfast
from attnfast import dispatch, ops
from attnfast.backends import Backend, Problem, cpu, cuda
from attnfast.call import Options

PROBLEM = Problem(
    "attention", torch.device("cpu"), torch.float32, 2, 4, 2, 10, 12, 64, 32, Options(0.125)
)
MISSING = "native library not built: no _native.so"


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ATTNFAST_BACKEND", "ATTNFAST_FALLBACK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(dispatch, "_warned", set())


@pytest.fixture
def no_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the native library were missing."""
    monkeypatch.setattr(cpu, "MISSING", MISSING)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the backends that ran, in order."""
    ran: list[str] = []
    functional = sys.modules["attnfast.functional"]
    for module, name, backend in (
        (functional.autograd, "fused_attention", None),
        (functional, "reference_attention", "reference"),
        (functional, "reference_decode", "reference"),
    ):
        original = getattr(module, name)

        def record(
            *args: Any, original: Any = original, backend: str | None = backend, **kwargs: Any
        ) -> Any:
            ran.append(backend or args[0].fwd.name().split("::")[1].removesuffix("_fwd"))
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, record)
    return ran


def qkv(dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, ...]:
    return (
        torch.randn(2, 4, 10, 64, dtype=dtype, device=device),
        torch.randn(2, 2, 12, 64, dtype=dtype, device=device),
        torch.randn(2, 2, 12, 32, dtype=dtype, device=device),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_takes_the_cpu_backend_for_cpu_tensors(dtype: torch.dtype, calls: list[str]) -> None:
    attnfast.attention(*qkv(dtype))
    assert calls == ["cpu"]


def test_a_backend_can_be_named(calls: list[str]) -> None:
    for name in ("reference", "cpu", "auto"):
        attnfast.attention(*qkv(), backend=name)
    assert calls == ["reference", "cpu", "cpu"]


def test_the_environment_names_one_and_the_argument_wins(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTNFAST_BACKEND", "reference")
    attnfast.attention(*qkv())
    attnfast.attention(*qkv(), backend="cpu")
    monkeypatch.setenv("ATTNFAST_BACKEND", "")
    attnfast.attention(*qkv())
    assert calls == ["reference", "cpu", "cpu"]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_fp64_and_devices_without_kernels_get_the_reference_silently(
    device: str, calls: list[str]
) -> None:
    dtype = torch.float64 if device == "cpu" else torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = attnfast.attention(*qkv(dtype, device), causal=True)
    assert out.device.type == device
    assert calls == ["reference"]


@pytest.mark.usefixtures("no_native")
def test_a_fallback_warns_once_per_reason(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.warns(RuntimeWarning, match=rf"attention: no fused backend .* cpu: {MISSING}") as w:
        attnfast.attention(*qkv())
    assert w[0].filename == __file__  # the caller's line, not ours
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attnfast.attention(*qkv())
        attnfast.attention(*qkv(torch.bfloat16))
    monkeypatch.setattr(cpu, "MISSING", "another reason")
    with pytest.warns(RuntimeWarning, match="cpu: another reason"):
        attnfast.scaled_dot_product_attention(*(x.repeat(1, 2, 1, 1)[:, :4] for x in qkv()))
    assert calls == ["reference"] * 4


@pytest.mark.usefixtures("no_native")
def test_a_fallback_raises_where_the_environment_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNFAST_FALLBACK", "error")
    with pytest.raises(ValueError, match=rf"^attention: no fused backend .* cpu: {MISSING}"):
        attnfast.attention(*qkv())
    attnfast.attention(*qkv(), backend="reference")
    attnfast.attention(*qkv(torch.float64))


@pytest.mark.usefixtures("no_native")
@pytest.mark.parametrize("value", ["maybe", "Error", "0"])
def test_the_fallback_is_one_of_two(
    value: str, monkeypatch: pytest.MonkeyPatch, no_native: None
) -> None:
    monkeypatch.setenv("ATTNFAST_FALLBACK", value)
    said = f"attnfast: ATTNFAST_FALLBACK must be 'warn' or 'error', got '{value}'"
    for call in (attnfast.attention, attnfast.explain):
        with pytest.raises(ValueError, match=re.escape(said)):
            call(*qkv())


def test_checks_are_on_or_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNFAST_CHECK", "yes")
    with pytest.raises(ValueError, match="ATTNFAST_CHECK must be '0' or '1', got 'yes'"):
        dispatch.wants_checks(cuda.ROW)


def test_a_compiled_graph_falls_back_without_a_warning() -> None:
    compiled = torch.compile(
        lambda q, k, v: attnfast.attention(q, k, v), fullgraph=True, backend="eager"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(
            compiled(*(inputs := qkv())), attnfast.attention(*inputs, backend="reference")
        )


@pytest.mark.parametrize(
    ("backend", "dtype", "message"),
    [
        (
            "triton",
            torch.float32,
            "backend 'triton' cannot run this call: takes CPU tensors only .*",
        ),
        ("cuda", torch.float32, "backend 'cuda' cannot run this call: not part of this build"),
        (
            "cpu",
            torch.float64,
            "backend 'cpu' cannot run this call: takes float32, bfloat16 and float16, got float64",
        ),
        (
            "xla",
            torch.float32,
            r"backend must be one of \('auto', 'cpu', 'triton', 'gluon', 'cuda', 'reference'\), "
            r"got 'xla'",
        ),
    ],
)
@pytest.mark.parametrize("function", ["attention", "varlen_attention", "decode_attention"])
def test_a_named_backend_that_cannot_raises_its_reason(
    function: str, backend: str, dtype: torch.dtype, message: str
) -> None:
    q, k, v = qkv(dtype)
    with pytest.raises(ValueError, match=rf"^{function}: {message}$"):
        call(function, q, k, v, backend=backend)


def test_a_named_backend_on_another_device() -> None:
    with pytest.raises(ValueError, match=r"backend 'cpu' cannot run .*: does not run on meta tens"):
        attnfast.attention(*qkv(device="meta"), backend="cpu")


def test_the_backend_must_be_a_name() -> None:
    with pytest.raises(TypeError, match=r"^attention: backend must be a str, got NoneType$"):
        attnfast.attention(*qkv(), backend=None)


def test_the_environment_is_held_to_the_same_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNFAST_BACKEND", "gpu")
    with pytest.raises(ValueError, match=r"^attention: ATTNFAST_BACKEND must be one of .*'gpu'$"):
        attnfast.attention(*qkv())
    monkeypatch.setenv("ATTNFAST_BACKEND", "triton")
    with pytest.raises(ValueError, match=r"^attention: ATTNFAST_BACKEND 'triton' cannot run this"):
        attnfast.attention(*qkv())


@pytest.mark.usefixtures("no_native")
def test_a_named_cpu_backend_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match=MISSING):
        attnfast.attention(*qkv(), backend="cpu")


def test_a_backend_plugs_in_as_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = Backend(
        "triton",
        lambda problem: f"D must be at most 32, got {problem.D}" if problem.D > 32 else None,
        ops.CPU,
        lambda problem: (0, 0),
        lambda: "interpreted",
    )
    table = {"cpu": (refusing, *dispatch.BACKENDS["cpu"])}
    monkeypatch.setattr(dispatch, "BACKENDS", table)
    assert dispatch.select(PROBLEM).name == "cpu"
    assert dispatch.select(PROBLEM._replace(D=32)).name == "triton"
    with pytest.raises(ValueError, match="'triton' cannot run this call: D must be at most 32"):
        dispatch.select(PROBLEM, "triton")
    text = attnfast.explain(*qkv())
    assert "triton     D must be at most 32, got 64\n  cpu        accepted" in text


def call(function: str, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    """One of the three functions, or explain of it, on dense tensors."""
    return called(getattr(attnfast, function), function, q, k, v, **options)


def called(target: Any, function: str, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    if function == "attention":
        return target(q, k, v, **options)
    if function == "decode_attention":
        return target(q, k, v, torch.tensor([3, 12]), **options)
    ends = [torch.tensor([0, 4, x.shape[2]]) for x in (q, k)]
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    return target(q, k, v, *ends, q.shape[0], k.shape[0], **options)


def lines_of(text: str) -> dict[str, str]:
    """The text of explain by what stands before each line's first colon or column."""
    result = {}
    for line in text.splitlines():
        key, _, rest = (
            line.strip().partition(" ") if line.startswith("  ") else line.partition(": ")
        )
        result[key] = rest.strip()
    return result


def test_explain_tells_the_whole_decision() -> None:
    q, k, v = qkv()
    q.requires_grad_()
    found = lines_of(
        attnfast.explain(
            q,
            k,
            v,
            causal=True,
            window=(3, None),
            align="bottom_right",
            softcap=30,
            bias=torch.zeros(4, 1, 1, dtype=torch.bfloat16),
            mask=torch.ones(12, dtype=torch.bool),
            sinks=torch.zeros(4),
            alibi_slopes=torch.zeros(4),
            dropout_p=0.1,
            return_stats=True,
            return_weights="mean",
            deterministic=True,
        )
    )
    assert found["attention"] == (
        "q (2, 4, 10, 64), k (2, 2, 12, 64), v (2, 2, 12, 32), float32 on cpu, with gradient"
    )
    assert found["options"] == (
        "scale=0.125, softcap=30.0, causal=True, window=(3, None), align=bottom_right, "
        "dropout_p=0.1, return_weights=mean, return_stats=True, deterministic=True, mask, "
        "bias (bfloat16), alibi_slopes, sinks"
    )
    assert found["cpu"] == f"accepted ({ops.cpu_isa()}, threads: {torch.get_num_threads()})"
    assert found["reference"] == "accepted (plain PyTorch)"
    assert found["triton"].endswith("set TRITON_INTERPRET=1")
    assert found["cuda"] == "not part of this build"
    assert found["chosen"] == "cpu, the first that accepts"
    # q, k, v: 2 * 4 * 10 * 64 + 2 * 2 * 12 * 96 numbers; out, norm and four statistics
    assert found["saved for backward"] == (
        "the inputs (38 KiB of q, k, v, not copied), out, norm and statistics (11.88 KiB)"
    )
    assert "forward" in found["workspace"]
    assert "backward" in found["workspace"]
    assert "ATTNFAST_BACKEND unset" in found["environment"]


def test_explain_names_windows_of_heads() -> None:
    window = torch.zeros(4, 2, dtype=torch.int64)
    for more in ((), (torch.tensor([3, 5]),)):
        found = lines_of(attnfast.explain(*qkv(), *more, window=window))
        assert "window=per head" in found["options"].split(", ")


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        ("attention", "q (2, 4, 10, 64), k (2, 2, 12, 64), v (2, 2, 12, 32), float32 on cpu"),
        (
            "varlen_attention",
            "2 sequences, q (10, 4, 64), k (12, 2, 64), v (12, 2, 32), float32 on cpu",
        ),
        (
            "decode_attention",
            "q (2, 4, 10, 64), k (2, 2, 12, 64), v (2, 2, 12, 32), float32 on cpu",
        ),
    ],
)
def test_explain_knows_the_function_by_its_arguments(function: str, shapes: str) -> None:
    text = called(attnfast.explain, function, *qkv())
    assert text.startswith(f"{function}: {shapes}, without gradient\n")
    assert "chosen: cpu" in text
    assert "saved for backward: nothing" in text


def test_explain_takes_keywords_too() -> None:
    q, k, v = qkv()
    assert attnfast.explain(q=q, k=k, v=v).startswith("attention: ")
    text = attnfast.explain(q, k_cache=k, v_cache=v, cache_seqlens=torch.tensor([3, 4]))
    assert text.startswith("decode_attention: ")
    pages = torch.zeros(2, 3, dtype=torch.int32)
    text = attnfast.explain(
        q,
        torch.zeros(5, 8, 2, 64),
        torch.zeros(5, 8, 2, 32),
        torch.tensor([3, 4]),
        page_table=pages,
    )
    assert "k (2, 2, 24, 64), v (2, 2, 24, 32) (pages of 8)" in text


@pytest.mark.parametrize("function", ["attention", "varlen_attention", "decode_attention"])
def test_explain_reads_return_lse_as_the_call_does(function: str) -> None:
    message = f"{function}: return_lse must be True or False, got"
    for call in (getattr(attnfast, function), attnfast.explain):
        with pytest.raises(TypeError, match=message):
            called(call, function, *qkv(), return_lse=torch.zeros(2))


def test_explain_shows_its_lines_where_it_is_the_last_value_of_a_cell() -> None:
    found = attnfast.explain(*qkv())
    assert isinstance(found, str)
    assert repr(found) == str(found) == found
    assert len(found.splitlines()) > 5


def test_explain_says_what_a_call_lacks() -> None:
    q, _, _ = qkv()
    with pytest.raises(TypeError, match=r"^explain: as a call of attention: missing a required"):
        attnfast.explain(q)
    with pytest.raises(TypeError, match=r"^attention: attn_mask must be given as mask="):
        attnfast.explain(*qkv(), attn_mask=None)


def test_explain_reports_a_refusal_instead_of_raising(monkeypatch: pytest.MonkeyPatch) -> None:
    text = attnfast.explain(*qkv(), backend="triton")
    assert "chosen: none; backend names triton, and the call raises its reason" in text
    monkeypatch.setenv("ATTNFAST_BACKEND", "reference")
    text = attnfast.explain(*qkv())
    assert "chosen: reference, named by ATTNFAST_BACKEND" in text
    assert "environment: ATTNFAST_BACKEND=reference" in text


@pytest.mark.usefixtures("no_native")
def test_explain_shows_why_only_the_reference_is_left() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = lines_of(attnfast.explain(*qkv()))
    assert found["cpu"] == MISSING
    assert found["chosen"] == "reference, the first that accepts"


def test_explain_computes_nothing(calls: list[str]) -> None:
    state = torch.random.get_rng_state()
    attnfast.explain(*qkv(device="meta"), dropout_p=0.5)
    attnfast.explain(*(torch.empty(1, 1, 1 << 40, 8, device="meta") for _ in range(3)))
    assert not calls
    assert torch.equal(state, torch.random.get_rng_state())


def test_explain_checks_like_the_call_itself() -> None:
    with pytest.raises(ValueError, match=r"^attention: scale must be"):
        attnfast.explain(*qkv(), scale=float("inf"))
    with pytest.raises(ValueError, match=r"^attention: backend must be one of"):
        attnfast.explain(*qkv(), backend="xla")


MISSING_LIBRARY = """
import os, warnings
os.environ["ATTNFAST_NATIVE"] = {path!r}
import attnfast, torch
from attnfast.backends import cpu
x = torch.randn(1, 1, 4, 8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    attnfast.attention(x, x, x)
print(cpu.MISSING)
print([str(w.message) for w in caught])
"""


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "native library not built: no "), (b"not a library", "native library not loaded: ")],
)
def test_the_package_works_without_the_native_library(
    content: bytes | None, reason: str, tmp_path: Any
) -> None:
    path = tmp_path / "_native.so"
    if content is not None:
        path.write_bytes(content)
    result = subprocess.run(
        [sys.executable, "-c", MISSING_LIBRARY.format(path=str(path))],
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = result.stdout.strip().splitlines()[:: len(result.stdout.splitlines()) - 1 or 1]
    assert first.startswith(reason)
    assert str(path) in first
    assert "the reference runs it" in second
