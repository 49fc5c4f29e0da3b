"""replace and restore: what they change, what they leave, and that models answer the same."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnfast.nn.attention
from attnfast import MultiheadAttention, replace, restore

E, H, B, T = 16, 4, 3, 6

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask"),
]


def encoder(layers: int = 2, **options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    options = {"batch_first": True, "dropout": 0.0, "dtype": torch.float64} | options
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 32, **options), layers)


def padded() -> tuple[Tensor, Tensor]:
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[1, 4:] = padding[2, 1:] = True
    return torch.randn(B, T, E, dtype=torch.float64), padding


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keyword arguments of every call of `attention` by the module."""
    calls: list[dict[str, Any]] = []
    attention = attnfast.nn.attention.attention

    def spy(*args: Tensor, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return attention(*args, **kwargs)

    monkeypatch.setattr(attnfast.nn.attention, "attention", spy)
    return calls


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_an_encoder_answers_the_same(
    training: bool, norm_first: bool, attended: list[dict[str, Any]]
) -> None:
    """Every layer's attention is called, in inference too, which torch's layer would bypass."""
    model = encoder(norm_first=norm_first).train(training)
    x, padding = padded()
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            expected = model(x, src_key_padding_mask=padding)
            replace(model)
            attended.clear()
            actual = model(x, src_key_padding_mask=padding)
            restore(model)
        assert len(attended) == 2
        torch.testing.assert_close(actual[~padding], expected[~padding])


def test_evaluation_equals_training() -> None:
    model = encoder()
    replace(model)
    x, padding = padded()
    trained = model.train()(x, src_key_padding_mask=padding)
    with torch.inference_mode():
        assert torch.equal(model.eval()(x, src_key_padding_mask=padding), trained)


def test_a_transformer_trains_the_same(attended: list[dict[str, Any]]) -> None:
    """Encoder, decoder and cross-attention, causal and padded; the optimiser outlives the swap."""
    torch.manual_seed(0)
    theirs = nn.Transformer(E, H, 1, 1, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    ours = copy.deepcopy(theirs)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (theirs, ours)]
    report = replace(ours)
    assert report.replaced == (
        "encoder.layers.0.self_attn",
        "decoder.layers.0.self_attn",
        "decoder.layers.0.multihead_attn",
    )
    source, padding = padded()
    target, _ = padded()
    mask = ours.generate_square_subsequent_mask(T, dtype=torch.float64)
    for _ in range(3):
        losses = []
        for model, optimizer in zip((theirs, ours), optimizers, strict=True):
            out = model(
                source,
                target,
                tgt_mask=mask,
                src_key_padding_mask=padding,
                tgt_key_padding_mask=padding,
                memory_key_padding_mask=padding,
            )
            losses.append(out[~padding].square().mean())
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        torch.testing.assert_close(losses[1], losses[0])
    for theirs_p, ours_p in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(ours_p, theirs_p)
    assert len(attended) == 9
    assert [call["causal"] for call in attended[:3]] == [False, True, False]


def test_identity_survives() -> None:
    model = nn.ModuleDict(
        {"a": nn.MultiheadAttention(E, H, dropout=0.1, batch_first=True, dtype=torch.bfloat16)}
    )
    model.a.eval()
    seen = []
    model.a.register_forward_hook(lambda *_: seen.append(1))
    module, parameters, state = model.a, list(model.parameters()), model.state_dict()
    replace(model)
    assert model.a is module
    assert type(module) is MultiheadAttention
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == list(state)
    assert (module.training, module.dropout, module.batch_first) == (False, 0.1, True)
    x = torch.randn(2, 3, E, dtype=torch.bfloat16)
    assert module(x, x, x)[0].dtype == torch.bfloat16
    assert seen == [1]


def test_the_report_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(encoder())
    report = replace(model)
    assert capsys.readouterr().out == f"{report}\n"
    assert replace(model, verbose=False).replaced == ()
    assert capsys.readouterr().out == ""


def test_the_model_itself() -> None:
    module = nn.MultiheadAttention(E, H)
    assert str(replace(module)).splitlines() == [
        "replace: 1 of 1 attention modules replaced",
        "  replaced  (the model itself)",
    ]
    assert type(module) is MultiheadAttention
    assert restore(module) == 1
    assert type(module) is nn.MultiheadAttention


def test_shared_modules_are_swapped_once() -> None:
    shared = nn.MultiheadAttention(E, H)
    model = nn.Sequential(nn.ModuleDict({"a": shared}), nn.ModuleDict({"b": shared}))
    assert replace(model).replaced == ("0.a",)
    assert model[0].a is model[1].b is shared
    assert restore(model) == 1


class Lazily(nn.Module):
    """Attention used only when asked for, behind layers whose parameters do not exist yet."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([nn.ModuleDict({"deep": nn.MultiheadAttention(E, H)})])
        self.rarely = nn.MultiheadAttention(E, H)
        self.first = nn.LazyLinear(E)

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        x = self.first(x)
        x = self.inner[0]["deep"](x, x, x)[0]
        return self.rarely(x, x, x)[0] if twice else x


def test_nested_and_lazily_used_modules(attended: list[dict[str, Any]]) -> None:
    model = Lazily().double()
    assert replace(model).replaced == ("inner.0.deep", "rarely")
    x = torch.randn(T, B, 5, dtype=torch.float64)
    model(x)
    assert len(attended) == 1
    both = model(x, twice=True)
    assert len(attended) == 3
    restore(model)
    torch.testing.assert_close(model(x, twice=True), both)


def decoder(**options: Any) -> nn.TransformerDecoder:
    torch.manual_seed(0)
    options = {"batch_first": True, "dropout": 0.0, "dtype": torch.float64} | options
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, 32, **options), 2)


@pytest.mark.parametrize("mode", ["train", "eval", "inference"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_a_decoder_answers_the_same(
    mode: str, norm_first: bool, attended: list[dict[str, Any]]
) -> None:
    model = decoder(norm_first=norm_first).train(mode == "train")
    (x, _), (memory, memory_padding) = padded(), padded()
    options = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.float64),
        "tgt_is_causal": True,
        "memory_key_padding_mask": memory_padding,
    }
    with torch.inference_mode(mode == "inference"):
        expected = model(x, memory, **options)
        replace(model)
        actual = model(x, memory, **options)
    assert [call["causal"] for call in attended] == [True, False] * 2
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("training", [True, False])
def test_a_transformer_answers_the_same(training: bool, attended: list[dict[str, Any]]) -> None:
    """Encoder with nested-tensor conversion, decoder, cross-attention; with and without grad."""
    torch.manual_seed(0)
    model = nn.Transformer(E, H, 2, 2, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    model.train(training)
    (source, padding), (target, _) = padded(), padded()
    options = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}
    for context in (torch.enable_grad, torch.inference_mode):
        with context():
            expected = model(source, target, **options)
            report = replace(model)
            assert len(report.replaced) == 6
            assert report.encoders == ("encoder",)
            attended.clear()
            torch.testing.assert_close(model(source, target, **options), expected)
            assert len(attended) == 6
            restore(model)


def test_the_report_of_an_encoder() -> None:
    report = replace(nn.Sequential(encoder()))
    assert report.encoders == ("0",)
    assert str(report).splitlines() == [
        "replace: 2 of 2 attention modules replaced",
        "  replaced  0.layers.0.self_attn",
        "  replaced  0.layers.1.self_attn",
        "  padding skipped by jagged nested tensors: 0",
    ]


def snapshot(model: nn.Module) -> list[Any]:
    """All that replace may change, of every module."""
    return [
        (
            type(m),
            sorted(vars(m)),
            (*m._forward_hooks, *m._forward_pre_hooks),
            getattr(m, "use_nested_tensor", None),
        )
        for m in model.modules()
    ]


@pytest.mark.parametrize("nested", [True, False])
def test_restore_undoes_exactly_what_replace_did(nested: bool) -> None:
    model = nn.Sequential(encoder())
    model[0].use_nested_tensor = nested
    model[0].layers[0].register_forward_hook(lambda *_: None)
    before = snapshot(model)
    replace(model)
    after = snapshot(model)
    assert after != before
    replace(model)
    assert snapshot(model) == after
    assert restore(model) == 2
    assert snapshot(model) == before
    assert restore(model) == 0
    assert snapshot(model) == before


def saved_and_loaded(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies(copied: Callable[[nn.Module], nn.Module], attended: list[dict[str, Any]]) -> None:
    """A copy of a replaced model calls the kernels too, and is restored on its own."""
    model = encoder().eval()
    before = snapshot(model)
    replace(model)
    x, padding = padded()
    with torch.inference_mode():
        expected = model(x, src_key_padding_mask=padding)
        twin = copied(model)
        attended.clear()
        assert torch.equal(twin(x, src_key_padding_mask=padding), expected)
        assert len(attended) == 2
        assert restore(twin) == 2
        assert snapshot(twin) == before
        assert torch.equal(model(x, src_key_padding_mask=padding), expected)
        assert len(attended) == 4


def test_an_encoder_built_with_our_module(attended: list[dict[str, Any]]) -> None:
    """Nothing to swap, but it skips padding by itself."""
    model = encoder(layers=1).eval()
    model.layers[0].self_attn = MultiheadAttention(E, H, batch_first=True, dtype=torch.float64)
    report = replace(model)
    assert (report.replaced, report.encoders) == ((), ("",))
    x, padding = padded()
    with torch.inference_mode():
        model(x, src_key_padding_mask=padding)
    assert len(attended) == 1
    assert restore(model) == 0
    assert type(model.layers[0].self_attn) is MultiheadAttention


def test_options_reach_the_modules(attended: list[dict[str, Any]]) -> None:
    model = encoder()
    replace(model, backend="reference", deterministic=True)
    model(*padded()[:1])
    assert [(call["backend"], call["deterministic"]) for call in attended] == [
        ("reference", True)
    ] * 2


def test_checkpointing() -> None:
    """Recomputing a layer with dropout in the backward draws the same dropout."""
    model = encoder(layers=1, dropout=0.5)
    replace(model)
    x, _ = padded()
    gradients = []
    for recompute in (False, True):
        model.zero_grad()
        torch.manual_seed(1)
        if recompute:
            out = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
        else:
            out = model(x)
        out.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("training", [True, False])
def test_compiles_whole(training: bool) -> None:
    model = encoder(layers=1, dtype=torch.float32).train(training)
    replace(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, padding = padded()
    x = x.float()
    torch.testing.assert_close(
        compiled(x, src_key_padding_mask=padding), model(x, src_key_padding_mask=padding)
    )
