"""The arguments that functions of the lens share with `attnfast.attention`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import checks
from ..call import Inputs, Options, Sequences
from ..requirements import fail, nothing_else

SCORES = (
    *("mask", "bias", "causal", "window", "align", "scale", "softcap", "alibi_slopes", "sinks"),
    "backend",
)
SEQUENCES = Sequences._fields


def canonical(
    function: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    given: dict[str, Any],
    names: tuple[str, ...] = checks.NAMES,
) -> tuple[Inputs, Options, str]:
    """A checked call and its backend; ``names`` are the function's of q, k, v, mask and bias."""
    if others := {n: x for n, x in given.items() if n not in (*SCORES, *SEQUENCES)}:
        nothing_else(function, others)
    sequences = None
    if missing := [name for name in SEQUENCES if given.get(name) is None]:
        if len(missing) < len(SEQUENCES):
            fail(function, missing[0], f"given with the others of {', '.join(SEQUENCES)}", "none")
    else:
        sequences = Sequences(*(given[name] for name in SEQUENCES))
    inputs, options = checks.attention_call(
        function,
        q,
        k,
        v,
        given.get("mask"),
        given.get("bias"),
        given.get("causal", False),
        given.get("window"),
        given.get("align", "top_left"),
        (given.get("scale"), given.get("softcap")),
        given.get("alibi_slopes"),
        given.get("sinks"),
        0.0,
        None,
        False,
        False,
        None,
        sequences,
        names,
    )
    return inputs, options, given.get("backend", "auto")


def narrow(k: Any) -> Any:
    """Values for a call of which only the scores matter: a few of the keys' own columns."""
    return k[..., :8] if isinstance(k, Tensor) else k
