"""``python -m attnfast --check``: every backend this machine can run, held to the accuracy rule.

The tests hold the backends to the same rule over hundreds of cases; this is the part that an
installed wheel can run by itself, to tell a broken machine, compiler or torch from a good one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch
from .call import Inputs, Options
from .functional import attention, attention_problem
from .reference import reference_attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DIFFERENTIABLE = ("q", "k", "v", "bias", "sinks")
REPEATS = 3


class Sample(NamedTuple):
    """The sizes and options of one call; False or zero is an option's absence."""

    name: str
    B: int
    H: int
    H_kv: int
    T: int
    S: int
    D: int
    causal: bool = False
    window: int = -1
    extras: bool = False  # a mask, a bias, slopes, sinks and dropout


SAMPLES = (
    Sample("plain", 2, 4, 4, 128, 128, 64),
    Sample("causal, grouped heads", 1, 6, 2, 65, 129, 80, causal=True),
    Sample("window, long rows", 1, 2, 2, 300, 300, 128, causal=True, window=70),
    Sample("mask, bias, ALiBi, sinks, dropout", 2, 2, 1, 63, 100, 40, extras=True),
)


class Verdict(NamedTuple):
    """One backend on one sample in one dtype."""

    backend: str
    case: str
    dtype: str
    errors: dict[str, float]  # by result: the largest difference from the fp64 reference
    bounds: dict[str, float]  # by result: what the accuracy rule allows
    forward_ms: float
    backward_ms: float

    @property
    def ok(self) -> bool:
        """Whether every error is within its bound. NaN is not."""
        return all(self.errors[name] <= self.bounds[name] for name in self.bounds)


def run(backends: list[tuple[str, str]]) -> Iterator[Verdict]:
    """Check backends, given as (name, device type), on every sample and dtype they take."""
    for backend, device in backends:
        for sample in SAMPLES:
            for dtype in DTYPES:
                inputs, options, _ = drawn(sample, dtype, device)
                call = attention_problem(_with_leaves(inputs)[0], options)
                if dispatch.refusal(backend, call) is None:
                    yield check(backend, sample, dtype, device)


def check(backend: str, sample: Sample, dtype: torch.dtype, device: str) -> Verdict:
    """Run one sample forward and backward, and measure it against the rule.

    ``error <= 2 x eager error + 4 unit``: eager is the reference computed in its dtype (lse in
    fp32), unit what the rounding of its sums explains (`units`).
    """
    inputs, options, grad_out = drawn(sample, dtype, device)
    truth = reference_results(_double(inputs), options, grad_out.double(), torch.float64)
    eager = reference_results(inputs, options, grad_out, dtype)
    eager["lse"] = reference_results(inputs, options, grad_out, torch.float32)["lse"]
    unit = units(_double(inputs), options, grad_out.double(), torch.finfo(dtype).eps)
    results, forward_ms, backward_ms = timed(backend, inputs, options, grad_out)
    errors = {name: _largest(results[name].double() - truth[name]) for name in truth}
    bounds = {
        name: 2 * _largest(eager[name].double() - truth[name]) + 4 * unit[name] for name in truth
    }
    name = str(dtype).removeprefix("torch.")
    return Verdict(backend, sample.name, name, errors, bounds, forward_ms, backward_ms)


def drawn(sample: Sample, dtype: torch.dtype, device: str) -> tuple[Inputs, Options, Tensor]:
    """The sample's tensors, the same every time, and the gradient of its output."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    B, H, T, S, D = sample.B, sample.H, sample.T, sample.S, sample.D
    inputs = Inputs(normal(B, H, T, D), normal(B, sample.H_kv, S, D), normal(B, sample.H_kv, S, D))
    if sample.extras:
        inputs = inputs._replace(
            mask=(torch.rand(B, 1, 1, S, generator=generator) < 0.8).to(device),
            bias=normal(1, H, T, S),
            alibi_slopes=torch.linspace(0.01, 0.1, H, device=device).view(1, H),
            sinks=normal(H),
            dropout_seed=torch.tensor([5, 7], device=device),
        )
    options = Options(
        scale=D**-0.5,
        causal=sample.causal,
        window_left=sample.window,
        align_bottom_right=sample.causal,
        dropout_p=0.1 if sample.extras else 0.0,
    )
    return inputs, options, normal(B, H, T, D)


def reference_results(
    inputs: Inputs, options: Options, grad_out: Tensor, compute_dtype: torch.dtype
) -> dict[str, Tensor]:
    """``out lse dq dk dv``, with dbias and dsinks where there are such inputs, by the reference."""
    inputs, leaves = _with_leaves(inputs)
    outputs = reference_attention(inputs, options, compute_dtype=compute_dtype)
    gradients = torch.autograd.grad(outputs.out, list(leaves.values()), grad_out)
    results = {"out": outputs.out.detach(), "lse": outputs.lse.detach()}
    return results | {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}


def timed(
    backend: str, inputs: Inputs, options: Options, grad_out: Tensor
) -> tuple[dict[str, Tensor], float, float]:
    """The same results through ``attention``, and the median ms of forward and of backward."""
    inputs, leaves = _with_leaves(inputs)
    forward, backward = [], []
    for _ in range(REPEATS):
        start = _now(grad_out)
        out, lse = attention(
            *inputs[:3],
            mask=inputs.mask,
            bias=inputs.bias,
            causal=options.causal,
            window=(options.window_left, None) if options.window_left >= 0 else None,
            align="bottom_right" if options.align_bottom_right else "top_left",
            alibi_slopes=None if inputs.alibi_slopes is None else inputs.alibi_slopes[0],
            sinks=inputs.sinks,
            dropout_p=options.dropout_p,
            dropout_seed=inputs.dropout_seed,
            return_lse=True,
            backend=backend,
        )
        middle = _now(grad_out)
        gradients = torch.autograd.grad(out, list(leaves.values()), grad_out)
        backward.append(_now(grad_out) - middle)
        forward.append(middle - start)
    results = {"out": out.detach(), "lse": lse.detach()}
    results |= {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}
    return results, 1e3 * sorted(forward)[REPEATS // 2], 1e3 * sorted(backward)[REPEATS // 2]


def units(inputs: Inputs, options: Options, grad_out: Tensor, e: float) -> dict[str, float]:
    """The largest rounding error of each result that its sums explain, from inputs in fp64.

    Terms and results are rounded to a dtype of this eps, each for itself: the root of the squares,
    at a variance of ``e**2 / 12``. Errors of fp32 count as its eps times the absolute terms.
    """
    q, k, v = inputs[:3]
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    per_head = options._replace(weights=2)
    undropped = reference_attention(inputs, per_head._replace(dropout_p=0.0))
    dropped = reference_attention(inputs, per_head)
    p, pz, lse = undropped.weights, dropped.weights, undropped.lse
    assert p is not None
    assert pz is not None

    def per_kv_head(x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(1, (-1, group))
        return heads.sum(2)

    dp, dp_abs = pz * (grad_out @ v.mT), pz * (grad_out.abs() @ v.abs().mT)  # p * dP
    delta, delta_abs = dp.sum(-1, keepdim=True), dp_abs.sum(-1, keepdim=True)
    rounded = (grad_out * dropped.out).square().sum(-1, keepdim=True)  # delta's squares: of out
    rounded = rounded + dp.square().sum(-1, keepdim=True)  # and of p
    ds, ds_abs = dp - p * delta, dp_abs + p * delta_abs
    squares = ds.square() + rounded * p.square()
    scale = options.scale
    sums = {  # squared terms, absolute terms
        "out": (pz.square() @ v.square() + dropped.out.square(), pz @ v.abs()),
        "lse": (lse.new_zeros(()), lse[lse.isfinite()].abs() + 1),
        "dq": (
            scale**2 * (ds.square() @ k.square() + rounded * (p @ k).square()),
            scale * ds_abs @ k.abs(),
        ),
        "dk": (
            per_kv_head(scale**2 * squares.mT @ q.square()),
            per_kv_head(scale * ds_abs.mT @ q.abs()),
        ),
        "dv": (
            per_kv_head(pz.square().mT @ grad_out.square()),
            per_kv_head(pz.mT @ grad_out.abs()),
        ),
    }
    if inputs.bias is not None:
        shape = inputs.bias.shape
        sums["dbias"] = squares.sum_to_size(shape), ds_abs.sum_to_size(shape)
    if inputs.sinks is not None:
        p_sink = 1 - p.sum(-1, keepdim=True)
        sums["dsinks"] = (
            (p_sink.square() * (delta.square() + rounded)).sum((0, 2, 3)),
            (p_sink * delta_abs).sum((0, 2, 3)),
        )
    fp32 = torch.finfo(torch.float32).eps
    return {
        name: e / 12**0.5 * _largest(squared) ** 0.5 + fp32 * _largest(absolute)
        for name, (squared, absolute) in sums.items()
    }


def _with_leaves(inputs: Inputs) -> tuple[Inputs, dict[str, Tensor]]:
    """The inputs with fresh leaves in the place of the differentiable ones, and these by name."""
    given = {name: getattr(inputs, name) for name in DIFFERENTIABLE}
    leaves = {name: x.detach().requires_grad_() for name, x in given.items() if x is not None}
    return inputs._replace(**leaves), leaves


def _double(inputs: Inputs) -> Inputs:
    floats = {
        name: x.double()
        for name, x in inputs._asdict().items()
        if x is not None and x.is_floating_point()
    }
    return inputs._replace(**floats)


def _largest(x: Tensor) -> float:
    """The largest absolute value; NaN if there is one, which no bound admits."""
    return float(x.abs().max())


def _now(x: Tensor) -> float:
    """Seconds, once the device of x has done what it was asked for."""
    if x.device.type != "cpu":
        torch.accelerator.synchronize(x.device)
    return time.perf_counter()
