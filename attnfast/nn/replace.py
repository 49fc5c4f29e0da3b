"""Swap ``torch.nn.MultiheadAttention``, and layers around it, for ours in place, and back."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from torch import nn

from .. import dispatch
from . import unpad as padding
from .attention import MultiheadAttention, abandon, adopt
from .linear import use_torch_linear
from .transformer import LAYERS

_REPLACED = "_attnfast_replaced"  # on a module whose class replace changed: the class it had
_USED_NESTED = "_attnfast_used_nested_tensor"  # on an encoder that replace took it from
_PARTS = {"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"}
_PARTS |= {"out_proj"}  # parameters and modules of torch's class
_OPTIONAL = {"bias_k", "bias_v"}


class ReplaceReport(NamedTuple):
    """What `attnfast.replace` did to a model. Names are those of ``model.named_modules()``."""

    replaced: tuple[str, ...]
    left: tuple[tuple[str, str], ...]  # name, reason
    encoders: tuple[str, ...]  # encoders that now skip padding with our attention

    def __str__(self) -> str:
        found = len(self.replaced) + len(self.left)
        if not found:
            return (
                "replace: nothing to replace: the model has no torch.nn.MultiheadAttention "
                "(attention modules of other classes are not touched)"
            )
        lines = [f"replace: {len(self.replaced)} of {found} attention modules replaced"]
        lines += [f"  replaced  {name or '(the model itself)'}" for name in self.replaced]
        lines += [f"  left      {name or '(the model itself)'}: {why}" for name, why in self.left]
        if self.encoders:
            names = ", ".join(name or "(the model itself)" for name in self.encoders)
            lines.append(f"  padding skipped by jagged nested tensors: {names}")
        return "\n".join(lines)


def replace(
    model: nn.Module,
    *,
    subclasses: bool | type | tuple[type, ...] = False,
    backend: str = "auto",
    deterministic: bool | None = None,
    verbose: bool = True,
) -> ReplaceReport:
    """Turn every ``torch.nn.MultiheadAttention`` in a model into an `attnfast.MultiheadAttention`.

    The modules stay the same objects with the same parameters: optimisers, hooks, shared modules,
    the training flag, dtype and device survive. Only exact instances are swapped, and of
    subclasses those that ``subclasses`` names; others, and modules whose ``forward`` was overridden
    on the instance, are left and reported. Around them, modules of exactly the classes
    ``nn.TransformerEncoderLayer`` and ``nn.TransformerDecoderLayer`` become subclasses of ours of
    the same names, whose feed-forward part is faster. ``nn.TransformerEncoder``, where it skips
    padding in inference by itself (``use_nested_tensor``, now False), does so by two hooks: in
    evaluation, without gradients, on the CPU, with a bool ``src_key_padding_mask`` alone, where
    there is enough padding to gain by it. This is also done where the attention already was ours.
    The result can be copied and pickled, and `restore` undoes it all. Calling it again changes
    nothing.

    Args:
        model: any module, itself a ``torch.nn.MultiheadAttention`` or holding some; may hold none.
        subclasses: subclasses of ``torch.nn.MultiheadAttention`` to swap as well, True for all.
            What their own methods do is gone until `restore`: they compute what torch's class does.
            Those with parameters or modules that torch's class does not have are left.
        backend: the ``backend`` of the swapped modules.
        deterministic: the ``deterministic`` of the swapped modules.
        verbose: also print the report.

    Returns:
        What was swapped, what was left and why. It says so too if there was nothing to replace.

    Raises:
        TypeError: ``model`` is not a module, or ``subclasses`` neither a bool nor such classes.
        ValueError: ``backend`` is not a backend's name.
    """
    _check_model("replace", model)
    chosen = _chosen(subclasses)
    dispatch.check_name("replace", backend, "backend")
    replaced, left = [], []
    for name, module in model.named_modules():
        if not isinstance(module, nn.MultiheadAttention):
            continue
        why = _why_left(module, chosen)
        if why:
            left.append((name, why))
            continue
        kind = type(module)
        module.__class__ = MultiheadAttention
        ours = cast(MultiheadAttention, module)
        adopt(ours)
        ours.backend, ours.deterministic = backend, deterministic
        setattr(ours, _REPLACED, kind)
        replaced.append(name)

    encoders = []
    for name, module in model.named_modules():
        kind = type(module)
        if kind in LAYERS and _is_ours(module) and "forward" not in vars(module):
            module.__class__ = LAYERS[kind]
            setattr(module, _REPLACED, kind)
        if (
            isinstance(module, nn.TransformerEncoder)
            and getattr(module, "use_nested_tensor", False)
            and any(_is_ours(layer) for layer in module.layers)
        ):
            module.use_nested_tensor = False
            setattr(module, _USED_NESTED, True)
            padding.skip(module)
            encoders.append(name)
    report = ReplaceReport(tuple(replaced), tuple(left), tuple(encoders))
    if verbose:
        print(report)
    return report


def restore(model: nn.Module) -> int:
    """Undo what `replace` did to a model or to the one it was copied or unpickled from.

    Modules that were built as `attnfast.MultiheadAttention` stay what they are. Calling it again
    changes nothing.

    Args:
        model: the module given to `replace`, a part of it or a module that holds it.

    Returns:
        The number of attention modules that are ``torch.nn.MultiheadAttention`` again.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: something has changed a swapped module's class since, such as a parametrization
            or ``fully_shard``; nothing is restored then.
    """
    _check_model("restore", model)
    for name, module in model.named_modules():
        if _REPLACED not in vars(module):
            continue
        if getattr(module, "parallel", None) is not None:
            raise ValueError(
                f"restore: {name or 'the model'} must be whole, got one that parallelize has cut"
            )
        ours = LAYERS.get(vars(module)[_REPLACED], MultiheadAttention)
        if type(module) is not ours:
            raise ValueError(
                f"restore: {name or 'the model'} must be attnfast's {ours.__name__} as replace "
                f"left it, got {type(module).__name__}: remove parametrizations and wrappers first"
            )
    restored = 0
    for module in model.modules():
        state = module.__dict__
        kind = state.pop(_REPLACED, None)
        if kind is not None:
            if isinstance(module, MultiheadAttention):
                use_torch_linear(module.out_proj)
                abandon(module)
                restored += 1
            module.__class__ = kind
        if state.pop(_USED_NESTED, False):
            state["use_nested_tensor"] = True
            padding.keep(module)
    return restored


def _check_model(function: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")


def _chosen(subclasses: Any) -> tuple[type, ...]:
    """The classes that may be swapped."""
    if isinstance(subclasses, bool):
        return (nn.MultiheadAttention,) if subclasses else ()
    classes = subclasses if isinstance(subclasses, tuple) else (subclasses,)
    for kind in classes:
        if not (isinstance(kind, type) and issubclass(kind, nn.MultiheadAttention)):
            raise TypeError(
                "replace: subclasses must be a bool or subclasses of torch.nn.MultiheadAttention, "
                f"got {kind!r}"
            )
    return classes


def _why_left(module: nn.MultiheadAttention, chosen: tuple[type, ...]) -> str | None:
    """Why an attention module must not be swapped, or None."""
    kind = type(module)
    if isinstance(module, MultiheadAttention):
        return "it is an attnfast.MultiheadAttention already"
    if kind is not nn.MultiheadAttention:
        name = f"{kind.__module__}.{kind.__qualname__}"
        if not issubclass(kind, chosen):
            return f"{name} is a subclass with behaviour of its own (subclasses=True swaps it)"
        parts = {*module._parameters, *module._modules} - _OPTIONAL
        if parts != _PARTS:
            differing = ", ".join(sorted(parts ^ _PARTS))
            return f"{name} differs from torch.nn.MultiheadAttention in {differing}"
    if "forward" in vars(module):
        return "its forward was overridden on the instance"
    return None


def _is_ours(layer: nn.Module) -> bool:
    return isinstance(getattr(layer, "self_attn", None), MultiheadAttention)
