"""The options of `MultiheadAttention` that torch's module lacks, as functions of tensors."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree

from .. import requirements as require
from ..checks import STATS
from ..functional import decode_attention
from ..stats import AttentionStats
from .inputs import NAME, projection_weight

SIMILARITIES = {"dot": 0, "cosine": 1}
LOG_TEMPERATURE = math.log(10)  # where the learned log temperatures of cosine similarity start
MAX_LOG_TEMPERATURE = math.log(100)  # and where they are clamped (arXiv:2111.09883)


NO_DROPOUT = 0.0
OFF = {"dropout_p": NO_DROPOUT, "return_stats": False}  # None for all others
DECODED = inspect.signature(decode_attention).parameters


def asked_of(module: Any) -> dict[str, Any]:
    """What a layer asks for now that torch's would not, as arguments of `attention`.

    All who call `attention`, `varlen_attention` or `decode_attention` for a layer hand on all of
    them. Options may be changed at any time.
    """
    asked = {
        "window": module.window,
        "scale": None if module.similarity == "dot" else 1.0,
        "softcap": module.softcap,
        "alibi_slopes": slopes_of(module),
        "sinks": module.sinks if module._has_sinks else None,
        "dropout_p": module.dropout if module.training and module.dropout else NO_DROPOUT,
        "return_stats": module.collect_stats,
    }
    return asked if module.parallel is None else module.parallel.asked(asked)


def is_plain(asked: dict[str, Any], *but: str) -> bool:
    """Whether a layer asks for nothing, but for what is named, that torch's would not do."""
    return not [
        x
        for name, x in asked.items()
        if x is not None and x is not OFF.get(name) and name not in but
    ]


def is_decoded(asked: dict[str, Any]) -> bool:
    """Whether a layer asks for nothing that `decode_attention` does not take."""
    return is_plain({name: x for name, x in asked.items() if name not in DECODED})


def decoding(asked: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `decode_attention`, which has no gradients."""
    taken = ((name, x) for name, x in asked.items() if name in DECODED)
    return {name: x.detach() if isinstance(x, Tensor) else x for name, x in taken}


def check(
    num_heads: int,
    window: Any,
    softcap: Any,
    alibi: bool,
    similarity: str,
    collect_stats: Any,
    appends: bool,
) -> None:
    """Raise unless the constructor's extras are what `attention` will take.

    ``appends`` is whether keys without a position are appended.
    """
    if window is not None:
        require.window(NAME, window, window, num_heads)
    if softcap is not None:
        require.softcap_limit(NAME, softcap)
    require.choice(NAME, "similarity", similarity, SIMILARITIES)
    require.choice(NAME, "collect_stats", collect_stats, STATS)
    if appends:
        check_positions(window, alibi)


def appended_keys(module: Any) -> int:
    """How many keys `add_bias_kv` and `add_zero_attn` append."""
    return (module.bias_k is not None) + bool(module.add_zero_attn)


def counts_positions(module: Any) -> bool:
    """Whether a layer's weights depend on how far a query and a key are apart."""
    return module.window is not None or bool(module.alibi)


def check_positions(window: Any, alibi: bool) -> None:
    """Raise where an option that depends on positions meets keys that have none."""
    if window is None and not alibi:
        return
    raise ValueError(
        f"{NAME}: {'alibi' if window is None else 'window'} must not be combined with add_bias_kv "
        "or add_zero_attn, whose keys have no position"
    )


def fail_to_script() -> NoReturn:
    """Raise what ``torch.jit.script`` shows."""
    raise NotImplementedError(
        f"{NAME}: torch.jit.script cannot compile attnfast's kernels: use torch.compile or "
        "torch.export, or call attnfast.restore(model) before scripting"
    )


def alibi_slopes(num_heads: int, device: torch.device | str | None = None) -> Tensor:
    """The slopes of ALiBi (arXiv:2108.12409): fp32 ``(H,)``, geometric from ``2 ** (-8 / H)``.

    For an H that is no power of 2, those of the power below, then every other one of the power
    above, as its authors do.
    """
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    slopes += [2 ** (-4 * i / power) for i in range(1, 2 * (num_heads - power), 2)]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


def slopes_of(module: Any) -> Tensor | None:
    """The slopes of a layer with ALiBi, on the meta device only while its parameters are.

    They are in no ``state_dict``, so nothing that loads or initialises parameters brings them.
    """
    if not module.alibi:
        return None
    slopes: Tensor | None = module.alibi_slopes
    if slopes is None or _is_meta(slopes):
        weight = projection_weight(module)
        if slopes is None or not _is_meta(weight):
            slopes = module.alibi_slopes = alibi_slopes(module.num_heads, weight.device)
    return slopes


def windows_of(module: Any, window: Tensor) -> Tensor:
    """Windows of heads as the kernels take them, int32, where the layer's parameters are."""
    window = require.indices(NAME, "window", window, window, (None, 2), "(H, 2)")
    device = projection_weight(module).device
    return window if device.type == "meta" else window.to(device)


def moved_slopes(module: Any, slopes: Tensor, device: torch.device) -> Tensor:
    """The same slopes on another device, fp32 whatever the parameters become."""
    return alibi_slopes(module.num_heads, device) if _is_meta(slopes) else slopes.to(device)


def _is_meta(x: Tensor) -> bool:
    return x.device.type == "meta"


def reset(module: Any) -> None:
    """Initialise the parameters that torch's layer does not have, where they are."""
    with torch.no_grad():
        for name, value in (("sinks", 0.0), ("log_temperature", LOG_TEMPERATURE)):
            parameter = module._parameters.get(name)
            if parameter is not None:
                parameter.fill_(value)


def normalise(q: Tensor, k: Tensor | None, log_temperature: Tensor) -> tuple[Tensor, Tensor | None]:
    """Unit vectors, taken in fp32 or better; q carries the temperature of its head.

    Args:
        q: ``(B, H, T, D)``.
        k: ``(B, H_kv, S, D)`` or None.
        log_temperature: ``(H,)``.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    temperature = log_temperature.to(dtype).clamp(max=MAX_LOG_TEMPERATURE).exp()
    scaled = F.normalize(q.to(dtype), dim=-1) * temperature[:, None, None]
    return scaled.to(q.dtype), None if k is None else F.normalize(k.to(dtype), dim=-1).to(k.dtype)


def results(
    given: Any, need_weights: bool, appended: int, unbatched: bool
) -> tuple[Tensor, AttentionStats | None, Tensor | None]:
    """The output, statistics and weights of `attention`'s results; None what was not asked for.

    Appended keys are last, and a batch of one is left out where the layer was given none.
    """
    out, *others = given
    weights = others.pop() if need_weights else None
    stats = others.pop() if others else None
    if stats is not None and stats.received is not None and appended:
        stats = dataclasses.replace(stats, received=stats.received.roll(-appended, -1))
    if weights is not None and appended:
        weights = weights.roll(-appended, -1)
    if stats is not None and unbatched:
        stats = _pytree.tree_map(lambda x: x[0], stats)
    if weights is not None and unbatched:
        weights = weights[0]
    return out, stats, weights
