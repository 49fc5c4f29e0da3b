"""One architecture, with eager attention and with attnfast: outputs, weights, gradients."""

from __future__ import annotations

import contextlib
import copy
import signal
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from attnfast.integrations import _transformers_masks as masks
from attnfast.integrations import transformers as integration
from attnfast.integrations._structured_mask import StructuredMask

from . import generating, inputs, models
from .differences import TOLERANCE, Different, close

SECONDS = 100  # of the processor's time, for one architecture


class Late(BaseException):
    """An architecture took too long; nobody's ``except Exception`` holds it up."""


class Verdict(NamedTuple):
    """How an architecture compares.

    Attributes:
        name: The configuration's ``model_type``.
        outcome: "equal", "fewer" (equal, but some weights are None), "refused", "wrong" or
            "not built".
        warned: Whether attnfast said that this model gets eager's masks.
        calls: How many attentions of one forward pass attnfast computed.
        masks: What masks they had, with padding on the left: "structure", "bools", "floats", in
            words, joined by "and"; empty if none had any.
        ran: What was compared, in words.
        detail: The first difference or reason.
    """

    name: str
    outcome: str
    warned: bool = False
    calls: int = 0
    masks: str = ""
    ran: str = ""
    detail: str = ""


def judge(name: str, cls: Any, generates: Any = None) -> Verdict:
    """Compare one architecture in every way that it can run.

    Args:
        name: The configuration's ``model_type``.
        cls: A model class of it.
        generates: The one that generates, if any.
    """
    try:
        with _deadline():
            return _judge(name, cls, generates)
    except models.CannotBuild as error:
        return Verdict(name, "not built", detail=str(error))
    except Late:
        return Verdict(name, "not built", detail=f"took more than {SECONDS} s of the processor")


def _judge(name: str, cls: Any, generates: Any) -> Verdict:
    eager, config, given = models.build(cls)
    masks.forget()  # each warns anew
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ran: list[str] = []
        seen: list[str] = []
        padded: list[str] = []
        outcome, detail = "equal", ""
        try:
            loaded = models.make(cls, config, integration.register())
            loaded.load_state_dict(eager.state_dict())
            with _watched() as seen:
                models.run(loaded, given)
            with _watched() as padded, contextlib.suppress(Exception):
                models.run(loaded, next(inputs.sets(loaded, "left")))
            for model in (loaded, _switched(eager)):
                for padding in inputs.PADDING:
                    _compare(eager, model, padding, ran)
            _compare_gradients(eager, loaded, ran)
            if generates is not None:
                generating.compare(generates, config, integration.IMPLEMENTATION, ran)
        except Different as error:
            outcome, detail = "wrong", str(error)
        except Exception as error:
            outcome, detail = "refused", models.told(error)
        if outcome == "equal" and "not all weights" in ran:
            outcome = "fewer"
    warned = any(integration.NAME in str(warning.message) for warning in caught)
    kinds = " and ".join(sorted(set(padded) - {"none"}))
    tried = "; ".join(dict.fromkeys(ran))
    return Verdict(name, outcome, warned, len(seen), kinds, tried, detail)


def _switched(eager: Any) -> Any:
    """The same model, given attnfast after it was made."""
    model = copy.deepcopy(eager)
    model.set_attn_implementation(integration.IMPLEMENTATION)
    return model


def _compare(eager: Any, model: Any, padding: str, ran: list[str]) -> None:
    """Outputs without gradients, and weights, with one kind of padding."""
    for given in inputs.sets(model, padding):
        for weights in (False, True):
            more = {"output_attentions": True} if weights else {}
            try:
                expected = models.run(eager, given, **more)
            except Exception:
                break
            found = models.run(model, given, **more)
            what = f"{padding} padding" + (", weights" if weights else "")
            complete = _check(expected, found, given, padding, weights, what)
            if not complete:
                ran.append("not all weights")
            ran.append("weights" if weights else padding)
        else:
            return


def _check(
    expected: Any, found: Any, given: dict[str, Any], padding: str, weights: bool, what: str
) -> bool:
    """Whether all of eager's weights are there; all that is there must be equal."""
    a, b = dict(_tensors(expected)), dict(_tensors(found))
    if not weights:  # some give eager's, which are there, to those who did not ask
        a, b = ({k: x for k, x in c.items() if "attentions" not in k} for c in (a, b))
    lacking = sorted(a.keys() - b.keys())
    if b.keys() - a.keys() or not all("attentions" in key for key in lacking):
        raise Different(f"{what}: {sorted(a.keys() ^ b.keys())[:3]} in one alone")
    for key in a.keys() & b.keys():
        x, y = a[key], b[key]
        if x.shape != y.shape:
            raise Different(f"{what}: {key} has shape {tuple(y.shape)}, not {tuple(x.shape)}")
        attended = "attentions" in key and x.dim() == 4
        if attended:
            x, y = x.transpose(1, 2), y.transpose(1, 2)
        if padding == "left" and (x.dim() < 2 or x.shape[1] not in (inputs.L, inputs.L_DECODER)):
            continue  # may come from padding
        own = _own(x, given)
        if own is not None:
            x, y = x[own], y[own]
        if attended and ((x.sum(-1) - 1).abs() < 1e-4).all():
            y = y / y.sum(-1, keepdim=True)  # a sink's share may be left out of eager's weights
        close(x, y, f"{what}: {key}")
    return not lacking


def _own(x: Tensor, given: dict[str, Any]) -> Tensor | None:
    """Which tokens of a result are not padding; those of every codebook may be a row."""
    masks = {inputs.L: "attention_mask", inputs.L_DECODER: "decoder_attention_mask"}
    own = given.get(masks.get(x.shape[1], "")) if x.dim() > 1 else None
    if own is None or x.shape[0] % own.shape[0]:
        return None
    return own.bool().repeat_interleave(x.shape[0] // own.shape[0], 0)


def _tensors(output: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The float tensors of a model's output, by name."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield prefix, output
    elif isinstance(output, dict):
        for key, value in output.items():
            if "cache" not in key and "past" not in key:
                yield from _tensors(value, f"{prefix}.{key}" if prefix else key)
    elif isinstance(output, (list, tuple)):
        for i, value in enumerate(output):
            yield from _tensors(value, f"{prefix}[{i}]")


def _compare_gradients(eager: Any, model: Any, ran: list[str]) -> None:
    """Gradients of every parameter, of the sum of weighted outputs that are not padding."""
    for given in inputs.sets(model, "right"):
        grads = []
        for one in (eager, model):
            one.zero_grad()
            torch.manual_seed(0)
            generator = torch.Generator().manual_seed(4)
            try:
                outputs = dict(_tensors(one(**copy.deepcopy(given))))
                total = torch.zeros(())
                for x in (x for key, x in outputs.items() if "attentions" not in key):
                    weight = torch.randn(x.shape, generator=generator)
                    own = _own(x, given)
                    if own is not None:
                        weight[~own] = 0
                    if x.requires_grad and x.isfinite().all():
                        total = total + (x * weight).mean()
                total.backward()
            except Exception:
                if one is model and grads:
                    raise
                break
            grads.append(
                {n: p.grad for n, p in one.named_parameters() if p.grad is not None and p.numel()}
            )
        if len(grads) < 2 or not grads[0]:
            continue
        expected, found = grads
        if expected.keys() != found.keys():
            raise Different(f"gradients: {sorted(expected.keys() ^ found.keys())[:2]} in one alone")
        largest = max(x.abs().max().item() for x in expected.values())
        for key, x in expected.items():
            error = (x - found[key]).abs().max().item() / max(largest, 1e-12)
            if not error <= TOLERANCE:
                raise Different(f"gradients: {key} off by {error:.1e} of the largest")
        ran.append("gradients")
        return


@contextlib.contextmanager
def _watched() -> Iterator[list[str]]:
    """What masks the calls of our attention get meanwhile."""
    mapping = transformers.AttentionInterface._global_mapping
    ours = mapping[integration.IMPLEMENTATION]
    seen: list[str] = []

    def watching(*args: Any, **kwargs: Any) -> Any:
        seen.append(_kind(kwargs["attention_mask"] if "attention_mask" in kwargs else args[4]))
        return ours(*args, **kwargs)

    mapping[integration.IMPLEMENTATION] = watching
    try:
        yield seen
    finally:
        mapping[integration.IMPLEMENTATION] = ours


def _kind(mask: Any) -> str:
    if mask is None:
        return "none"
    if isinstance(mask, StructuredMask):
        return "structure" if mask.bools is None else "bools"
    return "bools" if mask.dtype is torch.bool else "floats"


@contextlib.contextmanager
def _deadline() -> Iterator[None]:
    def late(*_: Any) -> None:
        raise Late

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
