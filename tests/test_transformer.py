"""Torch's encoder and decoder layers as replace leaves them: who computes what."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from attnfast import MultiheadAttention, lens, replace, restore
from attnfast.nn import transformer

B, T, E, H, F = 3, 6, 16, 4, 40

KINDS = {
    "encoder": (nn.TransformerEncoderLayer, transformer.TransformerEncoderLayer),
    "decoder": (nn.TransformerDecoderLayer, transformer.TransformerDecoderLayer),
}
over_kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the weights of every product of the feed-forward parts."""
    seen: list[tuple[int, ...]] = []
    plain = transformer.linear

    def listed(x: Tensor, weight: Tensor, bias: Tensor | None, *activation: str) -> Tensor:
        seen.append(tuple(weight.shape))
        return plain(x, weight, bias, *activation)

    monkeypatch.setattr(transformer, "linear", listed)
    return seen


def made(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    options = {"batch_first": True, "dropout": 0.0} | options
    return KINDS[kind][0](E, H, F, **options)


def call(layer: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = layer(x) if isinstance(layer, nn.TransformerEncoderLayer) else layer(x, x)
    return out


@over_kinds
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_feed_forward_part(
    kind: str, norm_first: bool, bias: bool, training: bool, products: list[tuple[int, ...]]
) -> None:
    """Torch's results and gradients, its dropout included; both of its products are ours."""
    stock = made(kind, norm_first=norm_first, bias=bias).train(training)
    stock.dropout.p = 0.5
    ours = copy.deepcopy(stock)
    replace(ours, verbose=False)
    assert type(ours) is KINDS[kind][1]
    results = []
    for layer in (stock, ours):
        x = torch.randn(B, T, E, generator=torch.Generator().manual_seed(1), requires_grad=True)
        torch.manual_seed(2)
        y = call(layer, x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    assert products == [(F, E), (E, F)]
    torch.testing.assert_close(results[1], results[0])


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The encoder layers that went the short way of inference."""
    seen: list[nn.Module] = []
    plain = transformer._inferred_feed_forward

    def listed(layer: nn.Module, x: Tensor) -> Tensor:
        seen.append(layer)
        return plain(layer, x)

    monkeypatch.setattr(transformer, "_inferred_feed_forward", listed)
    return seen


MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "padding": {"src_key_padding_mask": torch.arange(T) >= torch.tensor([[T], [2], [4]])},
    "mask": {"src_mask": torch.ones(T, T, dtype=torch.bool).triu(1)},
    "float mask": {"src_mask": torch.linspace(-1, 1, T * T).view(T, T)},
    "causal": {"src_mask": nn.Transformer.generate_square_subsequent_mask(T), "is_causal": True},
    "both": {
        "src_mask": torch.ones(T, T, dtype=torch.bool).triu(2),
        "src_key_padding_mask": torch.arange(T) >= torch.tensor([[T], [3], [4]]),
    },
}


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu", nn.functional.gelu])
def test_inference(
    activation: Any, norm_first: bool, masks: dict[str, Any], short: list[nn.Module]
) -> None:
    """Torch's results, the argument as it was; its own fast path takes a float mask for a bool."""
    stock = made("encoder", activation=activation, norm_first=norm_first, layer_norm_eps=0.1)
    ours = copy.deepcopy(stock).eval()
    replace(ours, verbose=False)
    x = torch.randn(B, T, E)
    given = x.clone()
    with torch.inference_mode():
        torch.testing.assert_close(ours(given, **masks), stock(x, **masks))
    assert short == [ours]
    assert torch.equal(given, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_inference_of_any_layout(
    bias: bool, batch_first: bool, dtype: torch.dtype, short: list[nn.Module]
) -> None:
    stock = made("encoder", batch_first=batch_first, bias=bias).eval()
    ours = copy.deepcopy(stock).to(dtype)
    replace(ours, verbose=False)
    bound = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
    with torch.no_grad():
        for shape in ((B, T, E), (T, E), (1, 1, E), (0, T, E)):
            x = torch.randn(shape).to(dtype)
            expected = stock(x.float()).to(dtype)
            torch.testing.assert_close(ours(x), expected, atol=bound, rtol=bound)
    assert short == [ours] * 4


def training(layer: Any) -> None:
    layer.train()


def trained_dropout(layer: Any) -> None:
    layer.dropout2.train()


def other_activation(layer: Any) -> None:
    layer.activation = nn.ReLU()


def other_norm(layer: Any) -> None:
    layer.norm2.__class__ = type("Norm", (nn.LayerNorm,), {})


def hooked_attention(layer: Any) -> None:
    layer.self_attn.register_forward_hook(lambda *_: None)


def left_attention(layer: Any) -> None:
    restore(layer.self_attn)


def hooked_projection(layer: Any) -> None:
    layer.self_attn.out_proj.register_forward_hook(lambda *_: None)


def other_projection(layer: Any) -> None:
    layer.self_attn.out_proj = nn.Linear(E, E)


class Unhashable:
    __hash__ = None

    def __call__(self, x: Tensor) -> Tensor:
        return x.relu()


def unhashable_activation(layer: Any) -> None:
    layer.activation = Unhashable()


LONG = (
    training,
    trained_dropout,
    other_activation,
    unhashable_activation,
    other_norm,
    hooked_attention,
    left_attention,
    hooked_projection,
    other_projection,
)


@pytest.mark.parametrize("change", LONG, ids=lambda f: f.__name__)
def test_what_is_changed_goes_torchs_way(
    change: Callable[[Any], None], short: list[nn.Module]
) -> None:
    layer = made("encoder").eval()
    replace(layer, verbose=False)
    change(layer)
    with torch.no_grad():
        layer(torch.randn(B, T, E))
    assert not short


def test_what_a_hook_keeps_stays_as_it_was() -> None:
    """The projection's result, to which the layer's argument is added."""
    layer, x, kept = made("encoder").eval(), torch.randn(B, T, E), []
    replace(layer, verbose=False)
    layer.self_attn.out_proj.register_forward_hook(lambda _, __, y: kept.append(y))
    layer(x)
    with torch.no_grad():
        layer(x)
    torch.testing.assert_close(kept[1], kept[0])


def test_who_watches_sees_torchs_way(short: list[nn.Module]) -> None:
    """Autocast, gradients, functorch, dispatch modes and observers."""
    layer, x = made("encoder").eval(), torch.randn(B, T, E)
    replace(layer, verbose=False)
    layer(x)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
        torch.func.vmap(layer)(x[None])
        with FlopCounterMode(display=False):
            layer(x)
        with lens.observe(layer):
            layer(x)
    assert not short


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("gradients", [True, False])
def test_the_rows_of_nested_tensors(gradients: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of all sequences' rows, with the results and gradients of padded ones."""
    layer, seen = made("encoder"), []
    replace(layer, verbose=False)
    plain = nn.functional.linear

    def listed(x: Tensor, *args: Any) -> Tensor:
        seen.append((x.is_nested, *x.shape))
        return plain(x, *args)

    x = [torch.randn(n, E) for n in (5, 1, 3)]
    with torch.set_grad_enabled(gradients):
        expected = [layer(sequence[None])[0] for sequence in x]
        monkeypatch.setattr(nn.functional, "linear", listed)
        actual = list(layer(torch.nested.as_nested_tensor(x, layout=torch.jagged)).unbind())
        monkeypatch.undo()
    assert seen == [(False, 9, E)] * 3 + [(False, 9, F)]
    torch.testing.assert_close(actual, expected)
    if gradients:
        parameters = list(layer.parameters())
        torch.testing.assert_close(
            *(
                torch.autograd.grad(sum(y.square().sum() for y in ys), parameters)
                for ys in (actual, expected)
            )
        )


@over_kinds
def test_it_comes_back(kind: str) -> None:
    layer = made(kind)
    before = [(type(m), sorted(vars(m))) for m in layer.modules()]
    replace(layer, verbose=False)
    replace(layer, verbose=False)
    assert repr(layer).startswith(KINDS[kind][0].__name__)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer):
        assert type(twin) is KINDS[kind][1]
        assert type(twin.linear1) is nn.Linear
        assert restore(twin) == 1 + (kind == "decoder")
        assert [(type(m), sorted(vars(m))) for m in twin.modules()] == before


class Sub(nn.TransformerEncoderLayer):
    """A user's own."""


def overridden(layer: nn.Module) -> nn.Module:
    layer.forward = lambda x: x
    return layer


@pytest.mark.parametrize(
    "layer",
    [lambda: Sub(E, H), lambda: overridden(nn.TransformerEncoderLayer(E, H))],
    ids=["subclass", "overridden"],
)
def test_other_layers_are_left(layer: Callable[[], nn.Module]) -> None:
    model = layer()
    kind = type(model)
    assert replace(model, verbose=False).replaced == ("self_attn",)
    assert type(model) is kind


def test_a_layer_whose_attention_is_left() -> None:
    class Other(nn.MultiheadAttention):
        pass

    model = made("encoder")
    model.self_attn = Other(E, H)
    replace(model, verbose=False)
    assert type(model) is nn.TransformerEncoderLayer


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def other_class(module: Any) -> None:
    module.__class__ = Doubled


def hooked(module: Any) -> None:
    module.register_forward_hook(lambda _, __, y: 2 * y)


def pre_hooked(module: Any) -> None:
    module.register_forward_pre_hook(lambda _, args: (2 * args[0],))


def own_forward(module: Any) -> None:
    plain = module.forward
    module.forward = lambda x: 2 * plain(x)


def parametrized(module: Any) -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    nn.utils.parametrize.register_parametrization(module, "weight", Double())


CHANGES = {
    "class": other_class,
    "hook": hooked,
    "pre-hook": pre_hooked,
    "forward": own_forward,
    "parametrization": parametrized,
}


@over_kinds
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("part", ["linear1", "linear2"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_others_did_to_a_linear_takes_part(
    change: Callable[[Any], None],
    part: str,
    training: bool,
    kind: str,
    products: list[tuple[int, ...]],
) -> None:
    layer, x = made(kind).train(training), torch.randn(B, T, E)
    replace(layer, verbose=False)
    with torch.set_grad_enabled(training):
        change(getattr(layer, part))
        actual = call(layer, x)
        assert len(products) == 1
        restore(layer)
        layer.train()  # torch's own inference does not look at hooks of classes
        torch.testing.assert_close(actual, call(layer, x))


@over_kinds
def test_backward_hooks_and_global_hooks_see_it(kind: str, products: list[tuple[int, ...]]) -> None:
    layer, seen = made(kind), []
    replace(layer, verbose=False)
    handle = layer.linear2.register_full_backward_hook(lambda *_: seen.append("backward"))
    call(layer, torch.randn(B, T, E)).sum().backward()
    assert seen == ["backward"]
    handle.remove()
    products.clear()
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        call(layer, torch.randn(B, T, E))
    finally:
        handle.remove()
    assert layer.linear1 in seen
    assert layer.linear2 in seen
    assert not products


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
@over_kinds
def test_it_is_quantized_as_before(kind: str) -> None:
    layer = made(kind).eval()
    replace(layer, verbose=False)
    quantized = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, torch.qint8)
    assert type(quantized.linear1) is torch.ao.nn.quantized.dynamic.Linear
    x = torch.randn(B, T, E)
    with torch.no_grad():
        assert (call(quantized, x) - call(layer, x)).abs().max() < 0.1


@over_kinds
def test_a_graph_of_fx_has_it_as_one_node(kind: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = made(kind)

        def forward(self, x: Tensor) -> Tensor:
            return call(self.layer, x)

    model, x = Model(), torch.randn(B, T, E)
    replace(model, verbose=False)
    graph = torch.fx.symbolic_trace(model)
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"] == ["layer"]
    assert torch.equal(graph(x), model(x))


@over_kinds
@pytest.mark.parametrize("training", [True, False])
def test_it_compiles_whole(kind: str, training: bool) -> None:
    layer, x = made(kind).train(training), torch.randn(B, T, E)
    replace(layer, verbose=False)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(compiled(*[x] * (1 + (kind == "decoder"))), call(layer, x))


def test_layers_built_with_our_attention() -> None:
    model = made("encoder")
    model.self_attn = MultiheadAttention(E, H, batch_first=True)
    replace(model, verbose=False)
    assert type(model) is transformer.TransformerEncoderLayer
    assert restore(model) == 0
    assert type(model) is nn.TransformerEncoderLayer
