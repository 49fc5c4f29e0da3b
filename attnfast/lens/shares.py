"""Where the probability of heads goes: to which tokens, and how far away."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call import BY_DISTANCE, DISTANCES
from ..pooled import pooled
from ..requirements import fail
from .watcher import Call

COLUMNS = {"self": 32, "previous": 33, "next": 31, "first": 64, "same": 65}  # of DISTANCES
BINS = 64  # of them by distance
ROWS = 256  # queries whose probabilities are one sum in fp32


class Shares(NamedTuple):
    """Of H heads, whatever number of queries: fp64."""

    mass: Tensor  # (H, DISTANCES), summed over the queries: see `Pooling`
    queries: Tensor  # (H,)
    named: Tensor  # (H,), those whose tokens are known

    @classmethod
    def of(cls, call: Call, backend: str, tokens: Tensor | None) -> Shares:
        """Of a call's real queries; tokens (B, T), on the CPU."""
        inputs = call.inputs
        B, H, T, _ = inputs.q.shape
        real = call.real.expand(B, H, T)
        if inputs.cu_seqlens_q is not None or (tokens is not None and tokens.shape != (B, T)):
            tokens = None  # of packed rows it is not known which they are
        if inputs.k.shape[2] != T:
            tokens = None  # of queries alone
        ids = None if tokens is None else tokens.to(inputs.q.device, torch.int32).contiguous()
        found = pooled(
            "observe",
            inputs,
            call.options,
            BY_DISTANCE,
            max(-(-T // ROWS), 1),
            DISTANCES,
            backend,
            tokens_q=ids,
            tokens_k=ids,
            norm=call.outputs.norm,
            real=real,
        )
        queries = real.sum((0, 2)).double().cpu()
        mass = found.double().sum((0, 2)).cpu()
        return cls(mass, queries, queries if ids is not None else torch.zeros_like(queries))

    def merged(self, other: Shares) -> Shares:
        """Of both."""
        return Shares(*(x + y for x, y in zip(self, other, strict=True)))

    @property
    def table(self) -> dict[str, Tensor]:
        """The mean share of each of COLUMNS, (H,); NaN where no token is known."""
        number = dict.fromkeys(COLUMNS, self.queries) | {"same": self.named}
        return {name: self.mass[:, at] / number[name] for name, at in COLUMNS.items()}

    @property
    def distances(self) -> Tensor:
        """The mean share of each distance, (H, BINS)."""
        return self.mass[:, :BINS] / self.queries.clamp(min=1)[:, None]


def tokens_of(module: Any, name: str | None, args: Any, kwargs: Any) -> Tensor | None:
    """The tokens that a model's forward was given by this name, if they are (B, T) integers."""
    if name is None:
        return None
    given = kwargs.get(name)
    if given is None:
        names = list(inspect.signature(module.forward).parameters)
        place = names.index(name) if name in names else len(args)
        given = args[place] if place < len(args) else None
    integer = isinstance(given, Tensor) and given.dim() == 2 and not given.is_floating_point()
    return given if integer else None


def token_name(tokens: Any) -> str | None:
    """Check the argument of `observe`."""
    if tokens is not None and not isinstance(tokens, str):
        fail("observe", "tokens", "the name of an argument of the model", repr(tokens), TypeError)
    return tokens
