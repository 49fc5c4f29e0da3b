"""Attention rollout: through all layers, how much an output position looks at each input token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import watching
from ..call import Inputs, Options, Outputs
from ..requirements import fail, shown
from .products import transposed


def rollout(
    model: nn.Module,
    *args: Any,
    positions: Sequence[int] = (0,),
    residual: float = 0.5,
    **kwargs: Any,
) -> Tensor:
    """How much output positions of a model draw on each input token, by attention rollout.

    The model runs once, ``model(*args, **kwargs)`` without gradients. With A the mean of a layer's
    heads, the rollout is the product of ``residual * I + (1 - residual) * A`` over the layers, the
    last on the left (arXiv:2005.00928). Rows of it are found from the last layer to the first by
    `apply_transposed`: no matrix of T x T is made, and memory is that of the layers' q and k.

    Args:
        model: layers of attention that `observe` sees, each over the same T tokens: an encoder, or
            a model of decoder layers alone.
        args: the model's arguments.
        positions: rows wanted, counted from the end where negative: 0 is a classifier's token, -1
            what a language model continues.
        residual: the share of a layer's input that passes it by, from 0 to 1.
        kwargs: the model's arguments by name.

    Returns:
        ``(B, len(positions), T)``, q's dtype, or fp32 if that is narrower. Rows sum to one, less
        what goes to attention sinks.

    Raises:
        TypeError: ``model`` is not a module, or a position no int.
        ValueError: No attention of attnfast ran, a layer has other keys than queries
            (cross-attention), sequences are packed, or a position is not within T.
    """
    if not isinstance(model, nn.Module):
        fail("rollout", "model", "a torch.nn.Module", type(model).__name__, TypeError)
    if not isinstance(residual, (int, float)) or not 0 <= residual <= 1:
        fail("rollout", "residual", "from 0 to 1", shown(residual))
    recorder, others = Recorder(), watching.now
    watching.now = (*others, recorder)
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        watching.now = others
    calls = recorder.calls
    if not calls:
        said = "a module in which attention of attnfast runs: see attnfast.replace"
        fail("rollout", "model", said, type(model).__name__)
    B, _, T, _ = calls[-1][0].q.shape
    for inputs, options, _ in calls:
        if inputs.cu_seqlens_q is not None:
            fail("rollout", "model", "run on a padded batch", "packed sequences")
        if not inputs.q.shape[2] == inputs.k.shape[2] == T or options.align_offset:
            got = f"{inputs.q.shape[2]} queries of {inputs.k.shape[2]} keys"
            fail("rollout", "model", f"of self-attention of {T} tokens in every layer", got)
    places = torch.tensor([place(x, T) for x in positions])
    dtype = torch.promote_types(calls[-1][0].q.dtype, torch.float32)
    rows = nn.functional.one_hot(places, T).to(calls[-1][0].q.device, dtype)
    y = rows.mT[None].expand(B, T, len(places))
    for inputs, options, backend in reversed(calls):
        H = inputs.q.shape[1]
        wide = inputs._replace(q=inputs.q.to(dtype), k=inputs.k.to(dtype))
        spread = y.unsqueeze(1).expand(B, H, T, -1)
        looked = transposed("rollout", wide, options, backend, spread).sum(1) / H
        y = residual * y + (1 - residual) * looked
    return y.mT


def place(x: Any, T: int) -> int:
    """A position counted from the first token."""
    if not isinstance(x, int) or isinstance(x, bool):
        fail("rollout", "positions", "ints", shown(x), TypeError)
    if not -T <= x < T:
        fail("rollout", "positions", f"from {-T} to {T - 1}", x)
    return x % T


class Recorder:
    """Keeps what each call of a forward was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[Inputs, Options, str]] = []

    def run(
        self,
        compute: Callable[..., Outputs],
        inputs: Inputs,
        options: Options,
        backend: str,
        *others: Any,
    ) -> Outputs:
        """Compute a call and keep its tensors; in a rollout nothing is dropped."""
        plain = options._replace(dropout_p=0.0, weights=0, stats=0)
        self.calls.append((inputs._replace(dropout_seed=None), plain, backend))
        return compute(inputs, options, backend, *others)
