"""Gradients beyond the accuracy rule's: transforms, checkpointing, autocast, what must raise."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import attnfast

RESULTS = ("out", "lse", "entropy", "weights")


def test_third_derivatives_raise() -> None:
    q, k, v = leaves()
    first = torch.autograd.grad(loss(q, k, v), q, create_graph=True)[0]
    second = torch.autograd.grad(first.square().sum(), q, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="attention: third derivatives are not implemen"):
        torch.autograd.grad(second.sum(), q)


def leaves(B: int = 2, H: int = 2, T: int = 5, S: int = 7, D: int = 4) -> tuple[Tensor, ...]:
    rng = torch.Generator().manual_seed(1)
    shapes = (B, H, T, D), (B, H, S, D), (B, H, S, D)
    return tuple(torch.randn(shape, generator=rng).requires_grad_() for shape in shapes)


def loss(q: Tensor, k: Tensor, v: Tensor, backend: str = "cpu", **options: Any) -> Tensor:
    """A scalar of every differentiable result."""
    arguments = {"causal": True, "align": "bottom_right"} | options
    out, lse, stats, weights = attnfast.attention(
        q,
        k,
        v,
        return_lse=True,
        return_stats=True,
        return_weights=True,
        backend=backend,
        **arguments,
    )
    return out.square().sum() + lse.sin().sum() + stats.entropy.sum() + (weights**3).sum()


# What is saved, what is differentiable, what is not


def test_only_rows_are_saved_for_backward() -> None:
    q, k, v = leaves(T=60, S=70)
    mask = torch.ones(60, 70, dtype=torch.bool)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out, lse = attnfast.attention(q, k, v, mask=mask, return_lse=True)
    shapes = sorted(tuple(x.shape) for x in saved if x.dtype != torch.bool)
    norm = (2, *lse.shape)
    assert shapes == sorted([norm, *(tuple(x.shape) for x in (q, k, v, out))])
    pointers = {x.data_ptr() for x in saved if x.shape != norm}
    assert {x.data_ptr() for x in (q, k, v, out, mask)} == pointers  # nothing is copied


def test_a_saved_tensor_that_was_changed_is_noticed() -> None:
    q, k, v = leaves()
    out = attnfast.attention(q, k, v * 1)
    with torch.no_grad():
        q.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_which_results_are_differentiable(backend: str) -> None:
    out, lse, stats, weights = attnfast.attention(
        *leaves(), return_lse=True, return_stats="received", return_weights=True, backend=backend
    )
    for x in (out, lse, weights, stats.lse, stats.entropy, stats.breadth):
        assert x.requires_grad
    for x in (stats.max_logit, stats.reach, stats.received, stats.focus):
        assert not x.requires_grad


@pytest.mark.parametrize("wanted", ["q", "k", "v", "bias", "sinks"])
def test_each_input_can_be_the_only_one_that_wants_a_gradient(wanted: str) -> None:
    q, k, v = (x.detach() for x in leaves())
    given = {"q": q, "k": k, "v": v, "bias": torch.randn(5, 7), "sinks": torch.randn(2)}
    given[wanted].requires_grad_()
    found = [
        torch.autograd.grad(loss(**given, backend=backend), given[wanted])[0]
        for backend in ("cpu", "reference")
    ]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("which", range(4), ids=RESULTS)
def test_each_result_can_be_the_only_one_in_the_loss(which: int) -> None:
    found = []
    for backend in ("cpu", "reference"):
        q, k, v = leaves()
        out, lse, stats, weights = attnfast.attention(
            q, k, v, return_lse=True, return_stats=True, return_weights="mean", backend=backend
        )
        x = (out, lse, stats.entropy, weights)[which]
        gradients = torch.autograd.grad(x.square().sum(), (q, k, v), allow_unused=True)
        found.append([torch.zeros(()) if g is None else g for g in gradients])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y.expand_as(x))


@pytest.mark.parametrize(
    "shape", [(), (7,), (5, 1), (5, 7), (2, 1, 1), (2, 5, 7), (2, 1, 1, 7)], ids=str
)
def test_the_gradient_of_a_bias_has_its_shape_and_dtype(shape: tuple[int, ...]) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        q, k, v = leaves()
        bias = torch.randn(shape).to(dtype).requires_grad_()
        loss(q, k, v, bias=bias).backward()
        assert bias.grad.shape == shape
        assert bias.grad.dtype == dtype
        assert bias.grad.any()


def test_an_expanded_bias_gets_the_sum() -> None:
    q, k, v = leaves()
    bias = torch.randn(5, 7)
    gradients = []
    for expanded in (False, True):
        leaf = bias.clone().requires_grad_()
        given = leaf.expand(2, 2, 5, 7) if expanded else leaf
        gradients.append(torch.autograd.grad(loss(q, k, v, bias=given), leaf)[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", ["expanded", "transposed", "strided"])
def test_gradients_that_are_not_contiguous(kind: str) -> None:
    q, k, v = leaves(D=8)
    out = attnfast.attention(q, k, v)
    if kind == "expanded":
        grad = torch.randn(2, 2, 1, 1).expand_as(out)
    elif kind == "transposed":
        grad = torch.randn(2, 2, 8, 5).transpose(-1, -2)
    else:
        grad = torch.randn(2, 2, 10, 16)[:, :, ::2, ::2]
    found = torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)
    expected = torch.autograd.grad(out, (q, k, v), grad.contiguous())
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


def test_the_slopes_have_no_gradient_and_say_so() -> None:
    q, k, v = leaves()
    slopes = torch.rand(2, requires_grad=True)
    with pytest.raises(ValueError, match="alibi_slopes must be without gradient"):
        loss(q, k, v, alibi_slopes=slopes)
    with torch.no_grad():
        loss(q, k, v, alibi_slopes=slopes)


def test_inference_mode_and_anomaly_detection() -> None:
    q, k, v = leaves()
    expected = attnfast.attention(q, k, v).detach()
    with torch.inference_mode():
        assert torch.equal(attnfast.attention(q, k, v), expected)
        attnfast.attention(*(x * 1 for x in (q, k, v)))
    with torch.autograd.detect_anomaly(check_nan=True):
        attnfast.attention(q, k, v, mask=torch.zeros(5, 7, dtype=torch.bool)).sum().backward()
    assert not q.grad.any()


# functorch and forward mode


def objective(backend: str) -> Callable[[Tensor], Tensor]:
    _, k, v = (x.detach() for x in leaves())
    return lambda q: loss(q, k, v, backend, bias=torch.linspace(-1, 1, 35).view(5, 7))


def slope(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A scalar of the gradient of f."""
    return lambda q: (torch.func.grad(f)(q) * torch.linspace(-1, 1, q.numel()).view_as(q)).sum()


def test_torch_func_grad_and_vjp() -> None:
    q = leaves()[0].detach()
    expected = torch.func.grad(objective("reference"))(q)
    torch.testing.assert_close(torch.func.grad(objective("cpu"))(q), expected)
    torch.testing.assert_close(torch.func.vjp(objective("cpu"), q)[1](torch.ones(()))[0], expected)
    gradient, value = torch.func.grad_and_value(objective("cpu"))(q)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(value, objective("reference")(q))


def test_torch_func_grad_of_grad() -> None:
    q = leaves()[0].detach()
    expected = torch.func.grad(slope(objective("reference")))(q)
    torch.testing.assert_close(torch.func.grad(slope(objective("cpu")))(q), expected)


def test_torch_func_grad_of_varlen_and_by_every_input() -> None:
    ends = torch.tensor([0, 2, 5]), torch.tensor([0, 3, 7])
    rng = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(n, 2, 4, generator=rng) for n in (5, 7, 7))
    bias, sinks = torch.randn(2, 1, 4, generator=rng), torch.randn(2, generator=rng)

    def f(backend: str) -> Callable[..., Tensor]:
        return lambda q, k, v, bias, sinks: (
            attnfast.varlen_attention(q, k, v, *ends, 3, 4, bias=bias, sinks=sinks, backend=backend)
            .square()
            .sum()
        )

    def g(backend: str) -> Callable[..., Any]:
        first = torch.func.grad(f(backend), argnums=tuple(range(5)))
        return torch.func.grad(
            lambda *x: sum(y.square().sum() for y in first(*x)), argnums=tuple(range(5))
        )

    for order in (lambda b: torch.func.grad(f(b), argnums=tuple(range(5))), g):
        arguments = q, k, v, bias, sinks
        for x, y in zip(order("cpu")(*arguments), order("reference")(*arguments), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda f, q: torch.func.jvp(f, (q,), (q,)), r"forward-mode derivatives \(jvp\)"),
        (lambda f, q: torch.func.jacfwd(f)(q), r"forward-mode derivatives \(jvp\)"),
        (lambda f, q: torch.func.hessian(f)(q), r"forward-mode derivatives \(jvp\)"),
        (
            lambda f, q: torch.func.jvp(torch.func.grad(f), (q,), (q,)),
            r"forward-mode derivatives \(jvp\)",
        ),
        (lambda f, q: torch.func.grad(slope(slope(f)))(q), "third derivatives"),
    ],
    ids=["jvp", "jacfwd", "hessian", "jvp-grad", "third"],
)
def test_what_the_fused_backends_lack_raises(transform: Any, message: str) -> None:
    q = leaves()[0].detach()
    with pytest.raises(NotImplementedError, match=f"^attention: ({message}) (is|are) not impl"):
        transform(objective("cpu"), q)
    transform(objective("reference"), q)  # what the message recommends


@pytest.mark.parametrize("grad_enabled", [True, False])
def test_forward_mode_raises_instead_of_losing_a_tangent(grad_enabled: bool) -> None:
    q, k, v = (x.detach() for x in leaves())
    with forward_ad.dual_level(), torch.set_grad_enabled(grad_enabled):
        plain = attnfast.attention(q, k, v, backend="cpu")
        assert torch.equal(plain, attnfast.attention(q, k, v))
        for i in range(3):
            dual = [forward_ad.make_dual(x, x) if i == j else x for j, x in enumerate((q, k, v))]
            with pytest.raises(NotImplementedError, match=r"derivatives \(jvp\) are not"):
                attnfast.attention(*dual)


def test_forward_mode_over_backward_raises() -> None:
    q, k, v = leaves()
    with forward_ad.dual_level():
        out = attnfast.attention(q, k, v)
        grad = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        with pytest.raises(NotImplementedError, match=r"derivatives \(jvp\) are not"):
            torch.autograd.grad(out, q, grad)


# Dropout, checkpointing, autocast


def test_dropout_draws_from_torchs_generator() -> None:
    q, k, v = leaves()

    def call() -> Tensor:
        return attnfast.attention(q, k, v, dropout_p=0.5)

    torch.manual_seed(3)
    first, second = call(), call()
    torch.manual_seed(3)
    assert torch.equal(call(), first)
    assert torch.equal(call(), second)
    assert not torch.equal(first, second)


def test_without_dropout_the_generator_is_left_alone() -> None:
    state = torch.random.get_rng_state()
    seed = torch.tensor([5, 6])
    q, k, v = leaves()
    attnfast.attention(q, k, v)
    first = attnfast.attention(q, k, v, dropout_p=0.5, dropout_seed=seed)
    assert torch.equal(state, torch.random.get_rng_state())
    for backend in ("cpu", "reference"):
        again = attnfast.attention(q, k, v, dropout_p=0.5, dropout_seed=seed, backend=backend)
        torch.testing.assert_close(again, first)
    wrapped = attnfast.attention(q, k, v, dropout_p=0.5, dropout_seed=seed + (1 << 32) * (seed > 5))
    assert torch.equal(wrapped, first)  # the offset counts modulo 2**32


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_repeats_the_dropout(use_reentrant: bool) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return loss(q, k, v, dropout_p=0.5)

    gradients = []
    for run in (call, lambda *x: checkpoint(call, *x, use_reentrant=use_reentrant)):
        inputs = leaves()
        torch.manual_seed(4)
        run(*inputs).backward()
        gradients.append([x.grad for x in inputs])
    for x, y in zip(*gradients, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_casts_q_k_and_v_alone(dtype: torch.dtype, backend: str) -> None:
    q, k, v = leaves()
    bias = torch.randn(5, 7, requires_grad=True)
    with torch.autocast("cpu", dtype):
        out, lse = attnfast.attention(q, k, v, bias=bias, return_lse=True, backend=backend)
    expected = attnfast.attention(
        q.to(dtype), k.to(dtype), v.to(dtype), bias=bias, return_lse=True, backend=backend
    )
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    out.float().sum().backward()
    assert q.grad.dtype == bias.grad.dtype == torch.float32


def test_autocast_leaves_fp64_alone_and_joins_mixed_dtypes() -> None:
    q, k, v = leaves()
    with torch.autocast("cpu", torch.bfloat16):
        assert attnfast.attention(q.double(), k.double(), v.double()).dtype == torch.float64
        assert attnfast.attention(q.half(), k, v.bfloat16()).dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert attnfast.attention(q, k, v).dtype == torch.float32
        packed = [x[0].transpose(0, 1) for x in (q, k, v)]
        ends = torch.tensor([0, 5]), torch.tensor([0, 7])
        assert attnfast.varlen_attention(*packed, *ends, 5, 7).dtype == torch.bfloat16
        with torch.no_grad():
            decoded = attnfast.decode_attention(q, k, v, torch.tensor([3, 7]))
        assert decoded.dtype == torch.bfloat16


def test_second_derivatives_under_autocast() -> None:
    found = []
    for enabled in (True, False):
        q, k, v = leaves()
        cast = (q, k, v) if enabled else tuple(x.bfloat16() for x in (q, k, v))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = attnfast.attention(*cast)
            (first,) = torch.autograd.grad(out.float().square().sum(), q, create_graph=True)
            found.append(torch.autograd.grad(first.square().sum(), (q, k, v)))
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y)


DISTRIBUTED = """
import os, torch, attnfast
from torch import nn

class Projected(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8, 24)
        self.bias = nn.Parameter(torch.randn(2, 1, 5))
        self.sinks = nn.Parameter(torch.randn(2))

    def forward(self, x):
        q, k, v = self.project(x).view(-1, 5, 3, 2, 4).transpose(1, 3).unbind(2)
        return attnfast.attention(q, k, v, bias=self.bias, sinks=self.sinks, dropout_p=0.2)

torch.distributed.init_process_group("gloo", init_method="file://{path}", rank=0, world_size=1)
model, found = Projected(), []
for run in (model, nn.parallel.DistributedDataParallel(model)):
    model.zero_grad()
    torch.manual_seed(0)
    run(torch.linspace(-1, 1, 80).view(2, 5, 8)).square().sum().backward()
    found.append([x.grad.clone() for x in model.parameters()])
print([torch.equal(x, y) for x, y in zip(*found)], flush=True)
os._exit(0)  # gloo's threads may wait for each other when Python tears them down
"""


def test_distributed_data_parallel(tmp_path: Any) -> None:
    result = subprocess.run(
        [sys.executable, "-c", DISTRIBUTED.format(path=tmp_path / "rendezvous")],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert result.stdout.strip() == str([True] * 4)


def test_deterministic_follows_torch() -> None:
    functional = attnfast.functional
    q, k, v = leaves()
    arguments = (q, k, v, None, None, False, None, "top_left", (None, None), None, None, 0.0, None)
    for torch_says in (False, True):
        torch.use_deterministic_algorithms(torch_says)
        try:
            for asked, expected in ((None, torch_says), (True, True), (False, False)):
                _, options = functional.checks.attention_call("f", *arguments, False, False, asked)
                assert options.deterministic is expected
        finally:
            torch.use_deterministic_algorithms(False)
