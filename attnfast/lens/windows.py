"""``apply_windows``: heads that look near are made local."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..nn.attention import MultiheadAttention
from ..requirements import fail, number
from .advice import lost, windows_of
from .seen import Seen
from .shares import Shares

NAME = "apply_windows"
UNBOUNDED = 2**31 - 1


class Windowed(NamedTuple):
    """A head that was made local.

    Attributes:
        layer: its name in the model.
        head: which of the layer's.
        left: how many keys before the query it may still attend; -1 is all.
        right: the same of keys behind it.
        left_out: the mean probability that it gave to other keys.
    """

    layer: str
    head: int
    left: int
    right: int
    left_out: float


def apply_windows(model: nn.Module, seen: Seen, keep: float = 0.99) -> list[Windowed]:
    """Give every head the narrowest window that keeps a share of its probability.

    ``seen`` was observed with ``shares=True``: a window ends where a bin of `Seen.distances` ends,
    at a power of 2 less one. A head that needs even the furthest keys that any head of its layer
    looked at stays unbounded in that direction, so that longer sequences than those seen lose
    nothing unmeasured. Windows are set as ``layer.window``, an int32 tensor ``(H, 2)``, and kernels
    skip what lies outside of them; ``layer.window = None`` undoes it. A window that a layer has
    already stays: the narrower one holds. Calls of one layer within a forward count together.

    What a head gave to keys outside is ``left_out``, the mean over the queries that were seen: it
    is expected where other inputs are like those, and of a model's results says nothing: measure.

    Args:
        model: the one observed, with layers of `attnfast.MultiheadAttention`.
        seen: what `observe` gave.
        keep: the share to keep, above 0 and below 1.

    Returns:
        A row for each head that was made local; the rows make a pandas DataFrame.

    Raises:
        TypeError: keep is no number.
        ValueError: keep is out of range, nothing was seen with ``shares=True``, or a layer is no
            `attnfast.MultiheadAttention`, or appends keys (``add_bias_kv``, ``add_zero_attn``).
    """
    keep = number(NAME, "keep", keep, 1e-6, 1 - 1e-6, "above 0 and below 1")
    if not seen.shares:
        fail(NAME, "seen", "of lens.observe(model, shares=True)", "none of it")
    layers: dict[str, Shares] = {}
    for call, shares in seen.shares.items():
        layer = call.partition("#")[0]
        layers[layer] = layers[layer].merged(shares) if layer in layers else shares
    modules = {layer: layer_of(model, layer) for layer in layers}
    rows = []
    for layer, module in modules.items():
        mass = layers[layer].distances
        windows = local_windows(mass, keep)
        for head, (left, right) in enumerate(windows.tolist()):
            if (left, right) != (-1, -1):
                rows.append(Windowed(layer, head, left, right, lost(mass[head], left, right)))
        if module.window is not None:
            windows = narrower(windows, as_tensor(module.window, len(windows)))
        if (windows != -1).any():
            module.window = windows.to(module.out_proj.weight.device)
    return rows


def local_windows(mass: Tensor, keep: float) -> Tensor:
    """Windows ``(H, 2)``, int32, of heads' mass ``(H, 64)``; -1 where all that was seen is needed.

    A head that was not seen at all is left unbounded.
    """
    windows = windows_of(mass, keep)
    reached = mass.sum(0) > 0
    for side, bins in enumerate((reached[33:], reached[:32].flip(0))):
        furthest = int((bins * torch.arange(1, len(bins) + 1, device=bins.device)).max())
        needed = windows[:, side] >= 2**furthest - 1
        if furthest:
            windows[:, side] = windows[:, side].masked_fill(needed, -1)
    return windows.masked_fill(mass.sum(1, keepdim=True) == 0, -1).int()


def narrower(a: Tensor, b: Tensor) -> Tensor:
    """The smaller of two windows on each side, of which -1 is the largest."""
    sizes = torch.minimum(*(x.cpu().masked_fill(x.cpu() < 0, UNBOUNDED) for x in (a, b)))
    return sizes.masked_fill(sizes == UNBOUNDED, -1)


def as_tensor(window: Tensor | tuple[int | None, int | None], H: int) -> Tensor:
    """A layer's window as one of each head."""
    if isinstance(window, Tensor):
        return window.int()
    sides = [-1 if side is None else side for side in window]
    return torch.tensor(sides, dtype=torch.int32).expand(H, 2)


def layer_of(model: nn.Module, layer: str) -> MultiheadAttention:
    """The module of a layer that can have windows."""
    try:
        module = model.get_submodule(layer)
    except AttributeError:
        fail(NAME, "seen", "of this model", f"layer {layer!r}, which it does not have")
    if not isinstance(module, MultiheadAttention):
        required = "an attnfast.MultiheadAttention, which has windows"
        fail(NAME, repr(layer), required, type(module).__name__)
    if module.bias_k is not None or module.add_zero_attn:
        fail(NAME, repr(layer), "without add_bias_kv and add_zero_attn", "one of them")
    return module
