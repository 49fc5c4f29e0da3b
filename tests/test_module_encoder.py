"""Our layer put by hand into torch's: whatever path these take in inference, it is called."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from attnfast import MultiheadAttention, replace

B, T, E, H = 3, 6, 16, 4

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

EXTRAS: dict[str, dict[str, Any]] = {
    "none": {},
    "window": {"window": (1, 1)},
    "softcap": {"softcap": 0.5},
    "alibi": {"alibi": True},
    "cosine": {"similarity": "cosine"},
    "sinks": {"sinks": True},
    "grouped": {"num_kv_heads": 2},
    "statistics": {"collect_stats": True},
}
over_extras = pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)


class Subclass(MultiheadAttention):
    """A user's own."""


def attention(kind: type[MultiheadAttention] = MultiheadAttention, **extras: Any) -> Any:
    made = kind(E, H, batch_first=True, dtype=torch.float64, **extras)
    for p in made.parameters():
        nn.init.normal_(p, std=0.3)
    return made


def layer(made: nn.Module, **options: Any) -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    options = {"batch_first": True, "dropout": 0.0, "dtype": torch.float64} | options
    block = nn.TransformerEncoderLayer(E, H, 32, **options)
    block.self_attn = made
    return block


def reloaded(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def unpickled_elsewhere(model: nn.Module) -> nn.Module:
    """In another process, where torch counts hooks from 0 again and users add theirs."""
    twin = pickle.loads(pickle.dumps(model))
    count, RemovableHandle.next_id = RemovableHandle.next_id, 0
    for module in twin.modules():
        module.register_forward_pre_hook(lambda *_: None).remove()
    RemovableHandle.next_id = count
    return twin


def with_new_weights(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict(), assign=True)
    return twin


CHANGED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "itself": lambda model: model,
    "deepcopy": copy.deepcopy,
    "pickle": unpickled_elsewhere,
    "torch.save": reloaded,
    "load_state_dict": with_new_weights,
}


@pytest.mark.parametrize("changed", CHANGED.values(), ids=CHANGED)
@over_extras
def test_an_encoder_layer_calls_it(
    extras: dict[str, Any], changed: Callable[[nn.Module], nn.Module]
) -> None:
    """Torch's layer, left alone, computes without window, softcap and the others."""
    model = changed(layer(attention(**extras)))
    x = torch.randn(B, T, E, dtype=torch.float64)
    trained = model.train()(x)
    model.self_attn.stats = None
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(x), trained)
    assert (model.self_attn.stats is not None) == bool(extras.get("collect_stats"))


def adapted(made: MultiheadAttention) -> nn.Module:
    """Of a class that a parametrization made."""
    nn.utils.parametrizations.weight_norm(made, "in_proj_weight")
    return made


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize(
    "made",
    [lambda **x: attention(Subclass, **x), lambda **x: adapted(attention(**x))],
    ids=["subclass", "parametrized"],
)
def test_subclasses_are_called_too(made: Any, norm_first: bool) -> None:
    model = layer(made(window=(1, 0)), norm_first=norm_first)
    x = torch.randn(B, T, E, dtype=torch.float64)
    trained = model.train()(x)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), trained)


@pytest.mark.parametrize("where", ["all", "first", "last"])
@over_extras
def test_an_encoder_that_nests_its_batch_calls_it(extras: dict[str, Any], where: str) -> None:
    """``nn.TransformerEncoder`` makes a strided nested tensor of a padded batch in inference."""
    model = nn.TransformerEncoder(layer(nn.MultiheadAttention(E, H, batch_first=True)), 2)
    model = model.double()
    for index in {"all": (0, 1), "first": (0,), "last": (1,)}[where]:
        model.layers[index].self_attn = attention(**extras)
    assert model.use_nested_tensor
    x = torch.randn(B, T, E, dtype=torch.float64)
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[1, 4:] = padding[2, 1:] = True
    trained = model.train()(x, src_key_padding_mask=padding)
    nested = []
    model.layers[1].register_forward_pre_hook(lambda _, args: nested.append(args[0].is_nested))
    with torch.no_grad():
        evaluated = model.eval()(x, src_key_padding_mask=padding)
    assert nested == [True]
    torch.testing.assert_close(evaluated[~padding], trained[~padding])


def test_decoders_and_transformers_call_it() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(E, H, 1, 1, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    model.encoder.layers[0].self_attn = attention(softcap=0.5)
    model.decoder.layers[0].self_attn = attention(window=(2, 0))
    model.decoder.layers[0].multihead_attn = attention(sinks=True)
    source, target = torch.randn(2, B, T, E, dtype=torch.float64)
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[0, 3:] = True
    options = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}
    trained = model.train()(source, target, **options)
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(source, target, **options), trained)


def test_replace_leaves_no_trace_of_its_own_on_layers() -> None:
    """The attention's class makes the layer call it; the layer itself is as torch built it."""
    model = nn.TransformerEncoderLayer(E, H, batch_first=True)
    replace(model, verbose=False)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("relation", ["self", "apart"])
def test_strided_nested_tensors_are_jagged_ones(relation: str, gradients: bool) -> None:
    module = attention(window=(2, 1), alibi=True)
    queries = [torch.randn(n, E, dtype=torch.float64, requires_grad=True) for n in (5, 1, 3)]
    keys = [torch.randn(n, E, dtype=torch.float64, requires_grad=True) for n in (2, 4, 6)]

    def run(layout: torch.layout) -> list[Tensor]:
        query, key = (torch.nested.as_nested_tensor(x, layout=layout) for x in (queries, keys))
        key = query if relation == "self" else key
        with torch.set_grad_enabled(gradients):
            out = module(query, key, key, need_weights=False)[0]
        assert out.is_nested
        assert out.layout is layout
        rows = list(out.unbind())
        if not gradients:
            return rows
        leaves = queries if relation == "self" else [*queries, *keys]
        loss = sum(row.square().sum() for row in rows)
        return [*rows, *torch.autograd.grad(loss, [*leaves, *module.parameters()])]

    torch.testing.assert_close(run(torch.strided), run(torch.jagged))
