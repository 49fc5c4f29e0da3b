"""What the drop-in mends: for each complaint, what torch.nn.MultiheadAttention does and what ours.

Should torch change, a test here fails, and the README has to say so.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from modules import B, E, H, S, T, causal_mask, pair, random_mask
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from attnfast import KVCache, MultiheadAttention, replace

pytestmark = pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors", "ignore:Support for mismatched key_padding_mask"
)


class Seen(TorchDispatchMode):
    """Every operator that runs, with the tensors that go in and come out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[Tensor]]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        tensors = [x for x in _pytree.tree_leaves((args, kwargs, result)) if type(x) is Tensor]
        self.calls.append((str(op), tensors))
        return result

    def of_shape(self, *shape: int) -> list[Tensor]:
        return [x for _, xs in self.calls for x in xs if tuple(x.shape) == shape]


def both(**options: Any) -> tuple[nn.Module, MultiheadAttention, Tensor]:
    """Torch's module, ours, and an input (B, T, E)."""
    torch.manual_seed(0)
    theirs, ours = pair(torch.float32, batch_first=True, **options)
    return theirs, ours, torch.randn(B, T, E)


def encoder() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, 4, 16, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 1)


def padding_of_sample(sample: int, start: int = 0) -> Tensor:
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[sample, start:] = True
    return padding


def test_a_fully_padded_row() -> None:
    """Torch: NaN, also in the gradients of what other samples use. Ours: zero weights."""
    theirs, ours, x = both()
    padding = padding_of_sample(0)
    gradients = []
    for module in (theirs, ours):
        out, weights = module(x, x, x, key_padding_mask=padding)
        out[1].square().sum().backward()  # the other sample
        gradients.append(module.in_proj_weight.grad)
        assert out[0].isnan().all() == (module is theirs)
        assert weights[0].isnan().all() == (module is theirs)
    assert gradients[0].isnan().any()
    assert gradients[1].isfinite().all()
    assert (weights[0] == 0).all()
    assert (out[0] == ours.out_proj.bias).all()


def test_training_and_evaluation() -> None:
    """Torch's encoder answers zeros at padding in evaluation only. Ours is one function."""
    model, x, padding = encoder(), torch.randn(B, T, E), padding_of_sample(1, start=3)

    def answers() -> list[Tensor]:
        with torch.no_grad():
            return [model.train(t)(x, src_key_padding_mask=padding) for t in (True, False)]

    trained, evaluated = answers()
    assert (evaluated[padding] == 0).all()
    assert (trained[padding] != 0).all()
    replace(model)
    trained, evaluated = answers()
    assert torch.equal(trained, evaluated)


def test_averaged_weights_without_those_of_every_head() -> None:
    theirs, ours, x = both()
    for module in (theirs, ours):
        with Seen() as seen, torch.no_grad():
            weights = module.train()(x, x, x)[1]
        assert weights.shape == (B, T, T)
        per_head = seen.of_shape(B * H, T, T) + seen.of_shape(B, H, T, T)
        assert bool(per_head) == (module is theirs)


def test_returned_weights_are_those_after_dropout() -> None:
    """In both, so that the sums of rows are not 1: a drop-in keeps it."""
    for module in both(dropout=0.5)[:2]:
        x = torch.randn(B, 64, E)
        sums = module(x, x, x)[1].sum(-1)
        assert (sums - 1).abs().max() > 0.05
        torch.testing.assert_close(module.eval()(x, x, x)[1].sum(-1), torch.ones(B, 64))


def test_is_causal_alone() -> None:
    theirs, ours, x = both()
    with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
        theirs(x, x, x, is_causal=True)
    expected = theirs(x, x, x, attn_mask=causal_mask(T, T))
    torch.testing.assert_close(ours(x, x, x, is_causal=True), expected)
    torch.testing.assert_close(ours(x, x, x, is_causal=True, need_weights=False)[0], expected[0])


def test_is_causal_with_padding() -> None:
    """Torch needs the mask all the same, and adds both up as floats for all pairs."""
    theirs, ours, x = both()
    padding = random_mask(B, T)
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        theirs(x, x, x, is_causal=True, key_padding_mask=padding)
    expected = theirs(x, x, x, attn_mask=causal_mask(T, T), key_padding_mask=padding)
    actual = ours(x, x, x, is_causal=True, key_padding_mask=padding)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("shape", [(B, T, S), (B, H, T, S), (B, 1, 1, S), (1, S), (T, 1)], ids=str)
def test_masks_of_other_shapes(shape: tuple[int, ...]) -> None:
    theirs, ours, x = both()
    key = torch.randn(B, S, E)
    mask = random_mask(*shape)
    with pytest.raises((RuntimeError, AssertionError), match="attn_mask"):
        theirs(x, key, key, attn_mask=mask)
    wide = mask.unsqueeze(1) if mask.dim() == 3 else mask
    wide = wide.expand(B, H, T, S).reshape(B * H, T, S)
    torch.testing.assert_close(
        ours(x, key, key, attn_mask=mask), theirs(x, key, key, attn_mask=wide)
    )


def test_bool_masks_stay_bool() -> None:
    """Torch turns them into floats, for every head where there is padding."""
    theirs, ours, x = both()
    options = {"attn_mask": random_mask(T, T), "key_padding_mask": random_mask(B, T)}
    for module in (theirs, ours):
        with Seen() as seen, torch.no_grad():
            module(x, x, x, need_weights=False, **options)
        pairs = seen.of_shape(T, T) + seen.of_shape(B, 1, T, T) + seen.of_shape(B * H, T, T)
        dtypes = {mask.dtype for mask in pairs}
        assert (torch.float32 in dtypes) == (module is theirs)
        assert bool(seen.of_shape(B * H, T, T)) == (module is theirs)


def test_out_proj_is_called() -> None:
    for module in both()[:2]:
        called: list[bool] = []
        module.out_proj.register_forward_hook(lambda *_, called=called: called.append(True))
        x = torch.randn(B, T, E)
        module(x, x, x)
        assert bool(called) == isinstance(module, MultiheadAttention)


@pytest.mark.parametrize("training", [True, False])
def test_nested_tensors(training: bool) -> None:
    theirs, ours, _ = both()
    sequences = [torch.randn(n, E) for n in (3, 5)]
    jagged = torch.nested.nested_tensor(sequences, layout=torch.jagged)
    with pytest.raises(AssertionError, match="does not support NestedTensor outside of its fast"):
        theirs.train(training)(jagged, jagged, jagged, need_weights=False)
    out = ours.train(training)(jagged, jagged, jagged, need_weights=False)[0]
    for x, got in zip(sequences, out.unbind(), strict=True):
        torch.testing.assert_close(got, theirs(x[None], x[None], x[None])[0][0])
    with pytest.raises(TypeError, match="nested tensors do not go with need_weights=True"):
        ours(jagged, jagged, jagged)


def test_the_inference_path_of_an_encoder_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's layer reads the module's weights and never calls it."""
    model, called = encoder().eval(), []
    for kind in (nn.MultiheadAttention, MultiheadAttention):
        forward = kind.forward

        def spy(self: Any, *args: Any, forward: Any = forward, **kwargs: Any) -> Any:
            called.append(type(self))
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", spy)
    x = torch.randn(B, T, E)
    with torch.inference_mode():
        expected = model(x)
        assert called == []
        replace(model)
        torch.testing.assert_close(model(x), expected)
    assert called == [MultiheadAttention]


X, KEY = torch.zeros(B, T, E), torch.zeros(B, S, E)
ERRORS: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], type[Exception]]] = {
    "features of key": ((X, X[..., :8], X[..., :8]), {}, RuntimeError, ValueError),
    "batch of key": ((X, X[:1], X[:1]), {}, RuntimeError, ValueError),
    "features of query": ((X[..., :8],) * 3, {}, AssertionError, ValueError),
    "rank of query": ((X[0, 0],) * 3, {}, AssertionError, ValueError),
    "rank of key": ((X, X[0], X[0]), {}, AssertionError, ValueError),
    "length of value": ((X, X, KEY), {}, AssertionError, ValueError),
    "kdim": ((X, X, X), {"kdim": 7}, AssertionError, ValueError),
    "attn_mask, 2-D": ((X,) * 3, {"attn_mask": X[:, :, 0]}, RuntimeError, ValueError),
    "attn_mask, 3-D": ((X,) * 3, {"attn_mask": torch.zeros(4, T, T)}, RuntimeError, ValueError),
    "attn_mask, 1-D": ((X,) * 3, {"attn_mask": X[0, :, 0]}, AssertionError, ValueError),
    "key_padding_mask": ((X,) * 3, {"key_padding_mask": X[0]}, AssertionError, ValueError),
    "dtype": ((X.double(),) * 3, {}, RuntimeError, TypeError),
    "dtype of a mask": ((X,) * 3, {"attn_mask": X[0].int()}, AssertionError, TypeError),
    "sparse": ((X.to_sparse(),) * 3, {}, RuntimeError, TypeError),
    "numpy": ((X.numpy(), X, X), {}, AttributeError, TypeError),
    "list": ((X, [1], X), {}, AttributeError, TypeError),
    "no key": ((X, None, None), {}, AttributeError, ValueError),
}


@pytest.mark.parametrize("name", ERRORS)
def test_classes_of_errors(name: str) -> None:
    """Those that the migration guide lists: torch's come from wherever the mistake is noticed."""
    args, options, theirs, ours = ERRORS[name]
    built = {key: options[key] for key in options if key == "kdim"}
    given = {key: options[key] for key in options if key != "kdim"}
    for kind, error in ((nn.MultiheadAttention, theirs), (MultiheadAttention, ours)):
        with pytest.raises(error) as raised:
            kind(E, H, batch_first=True, **built)(*args, **given)
        assert type(raised.value) is error
    assert str(raised.value).startswith("MultiheadAttention: ")


EXTRAS = {
    "num_kv_heads": 1,
    "window": (2, 2),
    "softcap": 2.0,
    "sinks": True,
    "alibi": True,
    "similarity": "cosine",
    "collect_stats": True,
    "backend": "reference",
    "deterministic": True,
}


@pytest.mark.parametrize("name", EXTRAS)
def test_extras(name: str) -> None:
    """Keyword-only; torch has none of them; the defaults are torch's behaviour (test_module.py)."""
    parameter = inspect.signature(MultiheadAttention).parameters[name]
    assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        nn.MultiheadAttention(E, H, **{name: EXTRAS[name]})
    module = MultiheadAttention(E, H, **{name: EXTRAS[name]})
    x = torch.randn(T, B, E)
    assert module(x, x, x)[0].isfinite().all()
    assert set(EXTRAS) == {
        name
        for name, p in inspect.signature(MultiheadAttention).parameters.items()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    }


def test_step_by_step_decoding() -> None:
    theirs, ours, x = both()
    with pytest.raises(TypeError, match="unexpected keyword argument 'kv_cache'"):
        theirs(x, x, x, kv_cache=KVCache())
    cache = KVCache()
    with torch.no_grad():
        steps = [ours(t, t, t, kv_cache=cache)[0] for t in x.split(1, 1)]
    expected = theirs(x, x, x, attn_mask=causal_mask(T, T))[0]
    torch.testing.assert_close(torch.cat(steps, 1), expected)
