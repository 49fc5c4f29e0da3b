"""``explain``: the whole dispatch decision of a call as text."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any

import torch

from . import checks, dispatch
from . import requirements as require
from .backends import Backend, Problem, dtype_name
from .call import SCORE_OPTIONS, Options, Sequences
from .functional import (
    attention,
    attention_problem,
    decode_attention,
    decode_problem,
    varlen_attention,
)
from .subclasses import is_at_hand

NO_VALUES = "the tensors have no values yet"
PARTS = ("window_right", "align_bottom_right", "max_seqlen_q", "max_seqlen_k")  # of other lines
ENVIRONMENT = ("ATTNFAST_BACKEND", "ATTNFAST_FALLBACK", "ATTNFAST_CPU_ISA", "ATTNFAST_NATIVE")


class Explanation(str):
    """A text of several lines, which the interpreter and notebooks show as lines."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def explain(*args: Any, **kwargs: Any) -> str:
    """Which backend would run a call, why, and what it costs; nothing is computed.

    Takes the arguments of `attnfast.distributed.context_parallel_attention` or its varlen form (if
    ``mesh`` is named among them; also on one rank alone), of `varlen_attention` (if there is any
    cu_seqlens or max_seqlen among them, or more than four by position), of `decode_attention` (if
    there is a cache argument, or are four by position) or else of `attention`, and checks them
    alike.

    Returns:
        Several lines with the problem; its options; every backend in the order in which "auto"
        tries them, accepted or with its reason; the one chosen, and why it comes before those
        that follow; what is saved for backward; the workspace, which is memory in use only while a
        call runs: the most scratch that its kernels hold, by their own plan, and lse and norm where
        they are neither returned nor saved; the environment variables that count.

    Raises:
        TypeError: As the function whose arguments these are.
        ValueError: As the function whose arguments these are, except that a named backend which
            refuses the call is reported, not raised.
    """
    function, call = bound_call("explain", args, kwargs)
    name = function.__name__
    call.apply_defaults()
    if "mesh" in call.arguments:
        from .distributed.context import plan

        planned, backend = plan(name, call.arguments), call.arguments["backend"]
        at_once = describe("of which at once", planned.problem(), backend)
        return Explanation(f"{planned.explanation()}\n{at_once}")
    if call.arguments["other"]:
        require.nothing_else(name, call.arguments["other"])
    call.arguments["return_lse"] = require.truth(name, "return_lse", call.arguments["return_lse"])
    checked = _checked_call(name, call.arguments)
    problem = (decode_problem if name == "decode_attention" else attention_problem)(*checked)
    workspace = functools.partial(_workspace, name, call.arguments, checked)
    return Explanation(describe(name, problem, call.arguments["backend"], workspace))


def bound_call(
    asking: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], inspect.BoundArguments]:
    """The public function that takes these arguments, and which of its arguments they are.

    Raises:
        TypeError: They do not fit it; the message names ``asking``, the function that was called.
    """
    function = _function(args, kwargs)
    try:
        return function, inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{asking}: as a call of {function.__name__}: {error}") from None


def _function(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Which public function takes these arguments."""
    if "mesh" in kwargs:
        from . import distributed

        cut = "cu_seqlens_q" in kwargs or len(args) > 4
        prefix = "context_parallel_" + "varlen_" * cut
        return getattr(distributed, prefix + "attention")
    if len(args) > 4 or any(name.startswith(("cu_seqlens", "max_seqlen")) for name in kwargs):
        return varlen_attention
    if len(args) == 4 or any("cache" in name or name == "page_table" for name in kwargs):
        return decode_attention
    return attention


def _checked_call(function: str, arguments: dict[str, Any]) -> Any:
    """The tensors and the options of a call."""
    arguments = {**arguments, "scores": tuple(arguments[name] for name in SCORE_OPTIONS)}
    if function == "decode_attention":
        return _checked(checks.decode_call, function, arguments)
    sequences = None
    if function == "varlen_attention":
        sequences = Sequences(*(arguments[name] for name in Sequences._fields))
    arguments = {"indices": None, **arguments, "sequences": sequences, "names": checks.NAMES}
    return _checked(checks.attention_call, function, arguments)


def _checked(check: Any, function: str, arguments: dict[str, Any]) -> Any:
    """Call a check with its own selection of a public function's arguments."""
    wanted = list(inspect.signature(check).parameters)[1:]
    return check(function, **{name: arguments[name] for name in wanted})


def describe(
    function: str,
    problem: Problem,
    backend: str = "auto",
    workspace: Callable[[Backend], tuple[int, int] | str] = lambda row: NO_VALUES,
) -> str:
    """The text of ``explain`` for a problem; ``workspace`` is what a backend takes for it."""
    name, source = dispatch.requested(backend)
    dispatch.check_name(function, name, source)
    order = [row.name for row in dispatch.backends_of(problem.device)]
    order += [other for other in dispatch.NAMES if other not in order]
    reasons = {other: dispatch.refusal(other, problem) for other in order}
    accepted = [other for other in order if reasons[other] is None]
    lines = [f"{function}: {_shapes(problem)}", f"options: {_options(problem)}", "backends:"]
    for other in order:
        lines.append(f"  {other:<10} {reasons[other] or f'accepted ({details(other, problem)})'}")
    if name == "auto":
        chosen = accepted[0]
        lines.append(f"chosen: {chosen}, the first that accepts")
        lines.append(f"its place: {dispatch.place(problem.device, chosen)}")
    elif reasons[name] is None:
        lines.append(f"chosen: {name}, named by {source}")
        chosen = name
    else:
        lines.append(f"chosen: none; {source} names {name}, and the call raises its reason")
        return "\n".join([*lines, _environment()])
    row = next(row for row in dispatch.backends_of(problem.device) if row.name == chosen)
    lines.append(f"saved for backward: {_saved(problem, chosen)}")
    lines.append(f"workspace: {_sizes(workspace(row), problem)}")
    return "\n".join([*lines, _environment()])


def details(name: str, problem: Problem) -> str:
    """What the backend says of itself, its instruction set for example."""
    return next(row for row in dispatch.backends_of(problem.device) if row.name == name).details()


def _shapes(p: Problem) -> str:
    if p.kind == "varlen":
        sizes = (
            f"{p.B} sequences, q ({p.T}, {p.H}, {p.D}), k ({p.S}, {p.H_kv}, {p.D}),"
            f" v ({p.S}, {p.H_kv}, {p.D_v})"
        )
    else:
        kv = f"({p.B}, {p.H_kv}, {p.S}, {{}})"
        cache = f" (pages of {p.page_size})" if p.page_size else ""
        sizes = f"q ({p.B}, {p.H}, {p.T}, {p.D}), k {kv.format(p.D)}, v {kv.format(p.D_v)}{cache}"
    gradient = "with gradient" if p.requires_grad else "without gradient"
    return f"{sizes}, {dtype_name(p.dtype)} on {p.device}, {gradient}"


def _options(p: Problem) -> str:
    """Every option that is not at its default, as the caller gave it."""
    options = p.options
    sides = (options.window_left, options.window_right)
    window = None if max(sides) < 0 else tuple(None if side < 0 else side for side in sides)
    align = "bottom_right" if options.align_bottom_right else options.align_offset
    as_given: dict[str, tuple[str, Any]] = {
        "window_left": ("window", "per head" if p.windows else window),
        "align_offset": ("align", "per batch entry" if p.align else align),
        "weights": ("return_weights", _given(options.weights, checks.WEIGHTS)),
        "stats": ("return_stats", _given(options.stats, checks.STATS)),
    }
    shown: dict[str, Any] = {"scale": f"{options.scale:.6g}"}
    for name, default in Options._field_defaults.items():
        if name in as_given:
            shown_name, value = as_given[name]
            shown |= {shown_name: value} if value else {}
        elif name not in PARTS and getattr(options, name) != default:
            shown[name] = getattr(options, name)
    flags = {
        "mask": p.mask,
        "mask in blocks": p.blocks,
        f"bias ({dtype_name(p.bias)})" if p.bias else "bias": p.bias,
        "alibi_slopes": p.alibi,
        "sinks": p.sinks,
        "indices": p.indices,
    }
    return ", ".join(
        [f"{name}={value}" for name, value in shown.items()]
        + [name for name, given in flags.items() if given]
    )


def _given(number: int, choices: dict[Any, int]) -> Any:
    """The choice that a number stands for."""
    return next(choice for choice, stands_for in choices.items() if stands_for == number)


def _saved(p: Problem, backend: str) -> str:
    if not p.requires_grad:
        return "nothing (no gradient wanted)"
    rows = p.T * p.H * (p.B if p.kind == "attention" else 1)
    keys = p.S * p.H_kv * (p.B if p.kind == "attention" else 1)
    size = torch.tensor([], dtype=p.dtype).element_size()
    if backend == "reference":
        return "what autograd saves of the reference, all scores several times over"
    inputs = (rows * p.D + keys * (p.D + p.D_v)) * size
    results = rows * (p.D_v * size + 4 * (6 if p.options.stats else 2))
    names = "out, norm" + (" and statistics" if p.options.stats else "")
    return f"the inputs ({_size(inputs)} of q, k, v, not copied), {names} ({_size(results)})"


def _workspace(
    function: str, arguments: dict[str, Any], call: Any, row: Backend
) -> tuple[int, int] | str:
    """Bytes in use only while a call runs, forward and backward; or why they are not known.

    Not counted are a few numbers per batch entry, sequence or head, and copies of arguments and
    gradients whose rows have gaps.
    """
    inputs, options = call
    if row.ops is None:
        return row.workspace(*call)
    if not is_at_hand(inputs.q):
        return NO_VALUES
    try:
        forward, backward = row.workspace(*call)
    except RuntimeError as error:
        refused = checks.complaint(function, error)
        if refused is None:  # of the device: which backend runs the call is known all the same
            return str(error).partition("\n")[0]
        raise refused from None
    rows = inputs.q.shape[:3].numel()
    if not (arguments["return_lse"] or arguments.get("return_stats")):
        forward += 4 * rows
    if isinstance(options, Options) and not attention_problem(*call).requires_grad:
        forward += 8 * rows
    return forward, backward


def _sizes(workspace: tuple[int, int] | str, problem: Problem) -> str:
    if isinstance(workspace, str):
        return f"unknown: {workspace}"
    forward, backward = map(_size, workspace)
    return f"about {forward} forward" + (f", {backward} backward" if problem.requires_grad else "")


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} GiB"


def _environment() -> str:
    dispatch.raises_for_fallback()
    return "environment: " + ", ".join(
        f"{name}={os.environ[name]}" if name in os.environ else f"{name} unset"
        for name in ENVIRONMENT
    )
