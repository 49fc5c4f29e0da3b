"""torch.nn.MultiheadAttention and ours side by side: what the tests of the module share."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnfast import MultiheadAttention

B, H, T, S, E = 2, 3, 5, 4, 12


class Call(NamedTuple):
    """One way to call forward; `tensors` are its differentiable inputs, float masks included."""

    name: str
    args: tuple[Tensor, ...]
    kwargs: dict[str, Any]
    tensors: list[Tensor]


def pair(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Torch's module and ours with the same parameters, none of them zero."""
    theirs = nn.MultiheadAttention(E, H, dtype=dtype, **options)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.3)
    ours = MultiheadAttention(E, H, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def causal_mask(t: int = T, s: int = S) -> Tensor:
    return torch.ones(t, s, dtype=torch.bool).triu(1)


def random_mask(*shape: int) -> Tensor:
    """True = masked out; every query keeps key 0."""
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False
    return mask


def sequences(module: nn.Module, relation: str, batched: bool, dtype: torch.dtype) -> list[Tensor]:
    """Query, key and value that require gradients; the same tensor where `relation` says so."""

    def make(length: int, features: int) -> Tensor:
        shape = (length, features)
        if batched:
            shape = (B, length, features) if module.batch_first else (length, B, features)
        return torch.randn(shape, dtype=dtype, requires_grad=True)

    if relation == "self":
        x = make(T, E)
        return [x, x, x]
    query, key = make(T, E), make(S, module.kdim)
    return [query, key, key if relation == "shared" else make(S, module.vdim)]


def results(
    module: nn.Module, call: Call, cotangent: float | None = None, **changes: Any
) -> dict[str, Tensor]:
    """Output, weights, and the gradients of parameters and inputs.

    The cotangents are random, the same in every call, or all `cotangent`.
    """
    out, weights = module(*call.args, **{**call.kwargs, **changes})
    found = {"out": out} if weights is None else {"out": out, "weights": weights}
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in found.values()]
    if cotangent is not None:
        cotangents = [x.fill_(cotangent) for x in cotangents]
    named = dict(module.named_parameters())
    leaves = [*named.values(), *call.tensors]
    names = [*named, *(f"input {i}" for i in range(len(call.tensors)))]
    grads = torch.autograd.grad([*found.values()], leaves, cotangents, allow_unused=True)
    return found | {f"gradient of {name}": g for name, g in zip(names, grads, strict=True)}


def assert_same(actual: dict[str, Any], expected: dict[str, Any], call: str = "") -> None:
    assert actual.keys() == expected.keys(), call
    for name, want in expected.items():
        torch.testing.assert_close(actual[name], want, msg=lambda m, n=name: f"{call}, {n}: {m}")
