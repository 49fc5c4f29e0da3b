"""The tensors of an attention row, and its result in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .clock import Call, Results
from .grid import DTYPES, WINDOW, AttentionCase

SOFTCAP = 30.0


@dataclass
class Workload:
    """What every contestant of a row is given, on one device.

    ``leaves`` are the tensors whose gradients the row's backward pass gives, by name. ``dropout_p``
    is 0 while results are compared, since dropout masks differ.
    """

    case: AttentionCase
    q: Tensor  # (B, H, T, D)
    k: Tensor  # (B, H_kv, S, D)
    v: Tensor
    grads: Results = field(default_factory=dict)  # cotangents by result
    mask: Tensor | None = None  # bool, True = attend
    bias: Tensor | None = None  # (1, H, T, S)
    slopes: Tensor | None = None  # (H,)
    sinks: Tensor | None = None  # (H,)
    softcap: float | None = None
    dropout_p: float = 0.0
    kept: dict[str, Any] = field(default_factory=dict)  # by contestants, between calls

    @property
    def leaves(self) -> Results:
        """The differentiable inputs."""
        named = {"q": self.q, "k": self.k, "v": self.v, "bias": self.bias, "sinks": self.sinks}
        return {name: x for name, x in named.items() if x is not None and x.requires_grad}

    def dense_bias(self) -> Tensor | None:
        """Bias and ALiBi as one float tensor that broadcasts to (B, H, T, S)."""
        if self.slopes is None:
            return self.bias
        case = self.case
        distance = (
            torch.arange(case.S, device=self.q.device)
            - torch.arange(case.T, device=self.q.device)[:, None]
        ).abs()
        alibi = (-self.slopes[:, None, None] * distance)[None].to(self.q.dtype)
        return alibi if self.bias is None else alibi + self.bias

    def dense_mask(self) -> Tensor | None:
        """Mask, causal and window as one bool tensor, or None."""
        case, mask = self.case, self.mask
        if case.causal or case.option == "window":
            t = torch.arange(case.T, device=self.q.device)[:, None]
            s = torch.arange(case.S, device=self.q.device)
            allowed = s <= t
            if case.option == "window":
                allowed &= s >= t - WINDOW
            mask = allowed if mask is None else mask & allowed
        return mask


def problem(case: AttentionCase, device: torch.device | str = "cpu") -> Workload:
    """The row's tensors, from torch's generator."""
    needs = case.work != "forward"
    dtype = DTYPES[case.dtype]

    def tensor(*shape: int, needs_grad: bool = needs) -> Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_(needs_grad)

    B, H, T, S, D = case[:5]
    made = Workload(
        case, tensor(B, H, T, D), tensor(B, case.H_kv, S, D), tensor(B, case.H_kv, S, D)
    )
    if case.option == "mask":  # padding: a quarter of the keys
        lengths = torch.linspace(S, S // 2, B, device=device).long()
        made.mask = (torch.arange(S, device=device) < lengths[:, None])[:, None, None]
    elif case.option == "bias":
        made.bias = tensor(1, H, T, S)
    elif case.option == "alibi":
        made.slopes = 2.0 ** -torch.linspace(1, 8, H, device=device)
    elif case.option == "sinks":
        made.sinks = tensor(H)
    elif case.option == "softcap":
        made.softcap = SOFTCAP
    with torch.no_grad():
        made.grads = {
            name: torch.randn(x.shape, device=device).to(x.dtype)
            for name, x in result_shapes(case, device).items()
        }
    return made


def result_shapes(case: AttentionCase, device: torch.device | str) -> Results:
    """Tensors of the results' shapes and dtypes, on the meta device."""
    B, H, T, S, D = case[:5]
    dtype = DTYPES[case.dtype]
    shapes = {"out": torch.empty(B, H, T, D, dtype=dtype, device="meta")}
    if case.option == "weights":
        shapes["weights"] = torch.empty(B, H, T, S, dtype=dtype, device="meta")
    elif case.option == "mean weights":
        shapes["weights"] = torch.empty(B, T, S, dtype=dtype, device="meta")
    elif case.option == "statistics":
        shapes["entropy"] = torch.empty(B, H, T, device="meta")
    return shapes


def eager(p: Workload) -> Results:
    """The row's results as PyTorch code without fused attention writes them."""
    case = p.case
    k, v = p.k, p.v
    if case.H_kv != case.H:
        k, v = (x.repeat_interleave(case.H // case.H_kv, 1) for x in (k, v))
    scores = (p.q @ k.transpose(-2, -1)) * case.D**-0.5
    if p.softcap:
        scores = p.softcap * torch.tanh(scores / p.softcap)
    bias, mask = p.dense_bias(), p.dense_mask()
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if p.sinks is not None:
        sinks = p.sinks[:, None, None].expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    results: Results = {}
    if case.option == "statistics":
        log = F.log_softmax(scores.float(), -1)
        results["entropy"] = -(log.exp() * log.masked_fill(log == -torch.inf, 0)).sum(-1)
    if p.dropout_p:
        weights = F.dropout(weights, p.dropout_p)
    results["out"] = weights @ v
    if case.option == "weights":
        results["weights"] = weights
    elif case.option == "mean weights":
        results["weights"] = weights.mean(1)
    return results


def pass_of(p: Workload, forward: Callable[[Workload], Results]) -> Call:
    """A contestant's call: the part of forward and backward that the row times."""
    work, leaves = p.case.work, p.leaves

    def differentiate(results: Results, keep: bool = False) -> Results:
        outputs = [results[name] for name in p.grads]
        grads = torch.autograd.grad(
            outputs, [*leaves.values()], [*p.grads.values()], retain_graph=keep
        )
        return {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}

    def only_forward() -> Results:
        return forward(p)

    def both() -> Results:
        results = forward(p)
        grads = differentiate(results)
        return {name: x.detach() for name, x in results.items()} | grads

    if work == "forward":
        return only_forward
    if work == "forward+backward":
        return both
    kept: Results = {}

    def only_backward() -> Results:
        if not kept:
            kept.update(forward(p))
        return differentiate(kept, keep=True)

    return only_backward
