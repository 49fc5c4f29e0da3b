"""`attnfast.integrations.sdpa`: torch's function, its flash operator, the models that call it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import accuracy
import pytest
import torch
import torch.nn.functional as F
from dense import Cotangents, Trial
from kernel_calls import kernel_calls
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

import attnfast
from attnfast.backends import cpu
from attnfast.call import Inputs, Options
from attnfast.integrations import sdpa

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def active() -> Iterator[None]:
    sdpa.activate()
    yield
    sdpa.restore()


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    yield
    assert nn.attention.current_flash_attention_impl() is None
    assert torch.backends.mha.get_fastpath_enabled()


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def with_gradients(function: Any, tensors: list[Tensor], *args: Any, **kwargs: Any) -> list[Tensor]:
    """Output and the gradients of the tensors that want one, dropout seeded."""
    torch.manual_seed(1)
    out = function(*tensors, *args, **kwargs)
    wanting = [x for x in (*tensors, *args, *kwargs.values()) if getattr(x, "requires_grad", False)]
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), wanting)]


# --- torch's function


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torchs_own_samples(dtype: torch.dtype) -> None:
    """Outputs and gradients are those of attnfast's own function, with dropout too."""
    from torch.testing._internal.common_methods_invocations import op_db  # takes seconds

    (op,) = (op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")
    count = 0
    for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
        tensors = [sample.input, *sample.args]
        stock = with_gradients(F.scaled_dot_product_attention, tensors, **sample.kwargs)
        expected = with_gradients(attnfast.scaled_dot_product_attention, tensors, **sample.kwargs)
        sdpa.activate()
        try:
            found = with_gradients(F.scaled_dot_product_attention, tensors, **sample.kwargs)
        finally:
            sdpa.restore()
        for x, y, z in zip(found, expected, stock, strict=True):
            assert torch.equal(x, y)
            assert x.shape == z.shape
            assert x.dtype == z.dtype == dtype
        count += 1
    assert count >= 20


CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "plain": ((8, 8, 8), {}),
    "causal": ((8, 8, 8), {"is_causal": True}),
    "scale": ((8, 8, 8), {"scale": 0.3}),
    "bool mask": ((8, 8, 8), {"attn_mask": torch.ones(5, 7, dtype=torch.bool).tril(1)}),
    "float mask": ((8, 8, 8), {"attn_mask": torch.linspace(-2, 2, 35).view(5, 7)}),
    "mask with a gradient": ((8, 8, 8), {"attn_mask": torch.zeros(4, 5, 7, requires_grad=True)}),
    "dropout": ((8, 8, 8), {"dropout_p": 0.4}),
    "all dropped": ((8, 8, 8), {"dropout_p": 1.0}),
    "other head size of v": ((8, 8, 4), {}),
    "grouped heads": ((8, 8, 8), {"enable_gqa": True}),
}


@pytest.mark.parametrize(("sizes", "options"), CALLS.values(), ids=CALLS)
def test_our_kernel_runs_and_gives_torchs_results(sizes: Any, options: Any) -> None:
    heads = 2 if options.get("enable_gqa") else 4
    tensors = leaves((2, 4, 5, sizes[0]), (2, heads, 7, sizes[1]), (2, heads, 7, sizes[2]))

    def run() -> list[Tensor]:
        return with_gradients(F.scaled_dot_product_attention, tensors, **options)

    expected = run()
    assert kernel_calls(run) == 0
    sdpa.activate()
    try:
        assert kernel_calls(run) == 1
        found = run()
        if options.get("dropout_p") != 0.4:
            torch.testing.assert_close(found, expected)
        with torch.inference_mode():
            assert kernel_calls(lambda: F.scaled_dot_product_attention(*tensors, **options)) == 1
        with torch.no_grad():
            torch.manual_seed(1)
            assert torch.equal(F.scaled_dot_product_attention(*tensors, **options), found[0])
    finally:
        sdpa.restore()


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("v_size", [16, 8])
def test_single_queries(heads: int, masked: bool, v_size: int) -> None:
    """A step of generation; with v of the same size by the kernel that is split over keys."""
    tensors = leaves((2, 4, 1, 16), (2, heads, 37, 16), (2, heads, 37, v_size))
    mask = torch.rand(2, 1, 1, 37) < 0.7 if masked else None

    def run() -> list[Tensor]:
        return with_gradients(
            F.scaled_dot_product_attention, tensors, attn_mask=mask, enable_gqa=heads == 2
        )

    expected = run()
    sdpa.activate()
    try:
        assert kernel_calls(run) == 1
        torch.testing.assert_close(run(), expected)
    finally:
        sdpa.restore()


def test_layouts_are_read_in_place_and_kept(active: None) -> None:
    q, k, v = torch.randn(2, 9, 3, 4, 16).transpose(1, 3).unbind(2)  # packed, (B, T, 3, H, D)
    out = F.scaled_dot_product_attention(q, k, v)
    assert out.transpose(1, 2).is_contiguous()
    assert torch.equal(out, F.scaled_dot_product_attention(*(x.contiguous() for x in (q, k, v))))


def test_autocast_is_torchs(active: None) -> None:
    tensors = leaves(*[(2, 4, 8, 16)] * 3)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(F.scaled_dot_product_attention, tensors, is_causal=True)
        expected = with_gradients(attnfast.scaled_dot_product_attention, tensors, is_causal=True)
    assert [x.dtype for x in found] == [torch.bfloat16] + [torch.float32] * 3
    assert all(map(torch.equal, found, expected))


def test_sdpa_kernel_chooses(active: None) -> None:
    tensors = leaves(*[(2, 4, 8, 16)] * 3)
    with sdpa_kernel(SDPBackend.MATH):
        assert kernel_calls(lambda: F.scaled_dot_product_attention(*tensors)) == 0
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert kernel_calls(lambda: F.scaled_dot_product_attention(*tensors)) == 1


REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "dtypes differ": lambda q: F.scaled_dot_product_attention(q, q.double(), q),
    "head sizes differ": lambda q: F.scaled_dot_product_attention(q, q[..., :4], q),
    "mask does not broadcast": lambda q: F.scaled_dot_product_attention(q, q, q, q[0, 0, :3]),
    "integer mask": lambda q: F.scaled_dot_product_attention(q, q, q, q[0, 0, :, :5].long()),
    "one dimension": lambda q: F.scaled_dot_product_attention(q[0, 0, 0], q, q),
    "heads do not group": lambda q: F.scaled_dot_product_attention(
        q, q[:, :3], q[:, :3], enable_gqa=True
    ),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_errors_are_torchs(call: Callable[[Tensor], Tensor]) -> None:
    q, errors = torch.randn(2, 4, 5, 8), []
    for turn in (sdpa.restore, sdpa.activate):
        turn()
        try:
            with pytest.raises(Exception) as caught:
                call(q)
            errors.append((caught.type, str(caught.value)))
        finally:
            sdpa.restore()
    assert errors[0] == errors[1]


def test_a_mask_and_is_causal_both_hold_as_in_torch() -> None:
    tensors, mask = leaves(*[(2, 4, 5, 8)] * 3), torch.rand(5, 5) < 0.6
    run = lambda: with_gradients(  # noqa: E731
        F.scaled_dot_product_attention, tensors, attn_mask=mask, is_causal=True
    )
    expected = run()
    sdpa.activate()
    try:
        assert kernel_calls(run) == 1
        torch.testing.assert_close(run(), expected)
    finally:
        sdpa.restore()


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": "random"}], ids=str)
def test_float64_stays_torchs(options: dict[str, Any]) -> None:
    tensors = leaves(*[(2, 4, 5, 8)] * 3, dtype=torch.float64)
    if options.get("attn_mask"):
        options = {"attn_mask": torch.rand(5, 5) < 0.6}
    compiled = torch.compile(F.scaled_dot_product_attention, backend="aot_eager", fullgraph=True)
    functions = (F.scaled_dot_product_attention, compiled)
    expected = [with_gradients(function, tensors, **options) for function in functions]
    sdpa.activate()
    try:
        for function, results in zip(functions, expected, strict=True):
            found = with_gradients(function, tensors, **options)
            assert all(map(torch.equal, found, results))
    finally:
        sdpa.restore()


# --- torch's flash operator: compiled graphs, transforms, dispatch modes


PADDING = torch.rand(2, 1, 1, 37, generator=torch.Generator().manual_seed(3)) < 0.7
OPERATOR_CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (4, {}),
    "causal": (4, {"causal": True}),
    "scale": (4, {"scale": 0.3}),
    "mask": (4, {"mask": PADDING}),
    "grouped heads": (2, {"causal": True}),
    "one query": (4, {"queries": 1, "scale": 0.3}),
    "one query, mask": (2, {"queries": 1, "mask": PADDING}),
    "one query, causal": (4, {"queries": 1, "causal": True}),
}


@pytest.mark.usefixtures("active")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "options"), OPERATOR_CASES.values(), ids=OPERATOR_CASES)
def test_the_operator_keeps_the_accuracy_rule(
    heads: int, options: dict[str, Any], dtype: torch.dtype
) -> None:
    queries, keys = (2, 4, options.get("queries", 37), 16), (2, heads, 37, 16)
    q, k, v = leaves(queries, keys, keys, dtype=dtype)
    cotangent = torch.randn(queries).to(dtype)
    mask, scale = options.get("mask"), options.get("scale", 0.25)
    added = None if mask is None else torch.zeros(mask.shape, dtype=dtype)
    if added is not None:
        added.masked_fill_(~mask, -torch.inf)
    causal = options.get("causal", False)
    out, lse = FLASH(q, k, v, 0.0, causal, attn_mask=added, scale=scale)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), cotangent)
    found = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    inputs = Inputs(q.detach(), k.detach(), v.detach(), mask=mask)
    problem = Trial(inputs, Options(scale, causal=causal), Cotangents(out=cotangent))
    accuracy.check({name: x.detach() for name, x in found.items()}, problem)


LAYOUTS: dict[str, Callable[[], list[Tensor]]] = {
    "contiguous": lambda: list(torch.randn(3, 2, 4, 9, 16)),
    "transposed": lambda: list(torch.randn(3, 2, 9, 4, 16).transpose(2, 3)),
    "packed": lambda: list(torch.randn(2, 9, 3, 4, 16).transpose(1, 3).unbind(2)),
    "sliced": lambda: list(torch.randn(3, 2, 4, 12, 20)[..., 2:11, 3:19]),
}


@pytest.mark.usefixtures("active")
@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_the_operators_strides_are_those_that_compilers_expect(make: Any) -> None:
    q, k, v = make()
    out, lse = FLASH(q, k, v)
    results = [out, lse, *FLASH_BACKWARD(q, q, k, v, out, lse, 0.0, False)]
    with FakeTensorMode() as mode:
        q, k, v = (mode.from_tensor(x) for x in (q, k, v))
        out, lse = FLASH(q, k, v)
        expected = [out, lse, *FLASH_BACKWARD(q, q, k, v, out, lse, 0.0, False)]
    for x, y in zip(results, expected, strict=True):
        assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)


def test_compiled_graphs_are_the_same_and_follow_activation() -> None:
    from torch._dynamo.backends.common import aot_autograd  # takes seconds
    from torch._functorch.aot_autograd import make_boxed_func

    tensors, graphs = leaves(*[(2, 4, 8, 16)] * 3), []

    def compiler(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph)

    def compiled() -> Any:
        torch.compiler.reset()
        function = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: E731
        return torch.compile(function, backend=aot_autograd(fw_compiler=compiler), fullgraph=True)

    before = compiled()
    expected = with_gradients(before, tensors)
    sdpa.activate()
    try:
        during = compiled()
        for function in (before, during):
            assert kernel_calls(lambda f=function: with_gradients(f, tensors)) == 1
            torch.testing.assert_close(with_gradients(function, tensors), expected)
    finally:
        sdpa.restore()
    assert graphs[:2] == graphs[2:4]
    assert kernel_calls(lambda: with_gradients(during, tensors)) == 0
    assert all(map(torch.equal, with_gradients(during, tensors), expected))


def test_transforms_and_second_derivatives(active: None) -> None:
    q, k, v = (x.detach() for x in leaves(*[(2, 4, 5, 8)] * 3))

    def loss(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).square().sum()

    q.requires_grad_()
    (expected,) = torch.autograd.grad(loss(q), q)
    torch.testing.assert_close(torch.func.grad(loss)(q.detach()), expected)
    mapped = torch.vmap(lambda q, k, v: F.scaled_dot_product_attention(q, k, v))(q, k, v)
    torch.testing.assert_close(mapped, F.scaled_dot_product_attention(q, k, v))
    (first,) = torch.autograd.grad(loss(q), q, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), q)
    with sdpa_kernel(SDPBackend.MATH):
        (first,) = torch.autograd.grad(loss(q), q, create_graph=True)
        torch.testing.assert_close(second, torch.autograd.grad(first.square().sum(), q)[0])


@pytest.mark.filterwarnings("ignore:`torch.jit.trace`:DeprecationWarning")
def test_tracing_gives_torchs_operators(active: None) -> None:
    q = torch.randn(2, 4, 5, 8)
    traced = torch.jit.trace(lambda q: F.scaled_dot_product_attention(q, q, q), q)
    assert "aten::scaled_dot_product_attention" in str(traced.graph) + str(traced.inlined_graph)
    torch.testing.assert_close(traced(q), F.scaled_dot_product_attention(q, q, q))


# --- activation


def test_it_is_never_active_on_import() -> None:
    code = """
import sys, torch
import attnfast, attnfast.integrations, attnfast.integrations.sdpa
import attnfast.integrations.transformers
assert torch.nn.attention.current_flash_attention_impl() is None
assert "attnfast" not in torch.nn.attention.list_flash_attention_impls()
assert torch.backends.mha.get_fastpath_enabled()
assert "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_restore_restores_and_both_are_idempotent() -> None:
    tensors = leaves(*[(2, 4, 8, 16)] * 3)

    def run() -> list[Tensor]:
        return with_gradients(F.scaled_dot_product_attention, tensors, is_causal=True)

    expected = run()
    sdpa.restore()
    for _ in range(2):
        sdpa.activate()
        sdpa.activate()
        assert nn.attention.current_flash_attention_impl() == "attnfast"
        assert not torch.backends.mha.get_fastpath_enabled()
        assert kernel_calls(run) == 1
        sdpa.restore()
        assert nn.attention.current_flash_attention_impl() is None
        assert torch.backends.mha.get_fastpath_enabled()
        assert kernel_calls(run) == 0
        assert all(map(torch.equal, run(), expected))
        sdpa.restore()


def test_torchs_own_switch_undoes_it_too() -> None:
    q = torch.randn(2, 4, 8, 16)
    sdpa.activate()
    nn.attention.restore_flash_attention_impl()
    assert kernel_calls(lambda: F.scaled_dot_product_attention(q, q, q)) == 0
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_users_choices_come_back() -> None:
    class Other:
        active = True

        def remove(self) -> None:
            self.active = False

    others: list[Other] = []
    register = nn.attention.register_flash_attention_impl
    register("other", register_fn=lambda: others.append(Other()) or others[-1])
    nn.attention.activate_flash_attention_impl("other")
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        sdpa.activate()
        assert not others[0].active
        sdpa.restore()
        assert not torch.backends.mha.get_fastpath_enabled()
        assert nn.attention.current_flash_attention_impl() == "other"
        assert [other.active for other in others] == [False, True]
        sdpa.restore()
        assert nn.attention.current_flash_attention_impl() == "other"
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
        nn.attention.restore_flash_attention_impl()


def test_a_torch_without_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(nn.attention, "register_flash_attention_impl")
    with pytest.raises(RuntimeError) as caught:
        sdpa.activate()
    assert str(caught.value) == (
        "attnfast.integrations.sdpa: torch must have torch.nn.attention.register_flash_attention_"
        f"impl (2.13 does), got torch {torch.__version__}: call"
        " attnfast.scaled_dot_product_attention instead"
    )
    monkeypatch.delattr(nn.attention, "current_flash_attention_impl")
    sdpa.restore()


def test_a_missing_native_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "MISSING", "native library not built: no _native.so")
    message = "there are no kernels to activate: native library not built: no _native.so"
    with pytest.raises(RuntimeError, match=message):
        sdpa.activate()
