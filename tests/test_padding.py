"""A replaced ``nn.TransformerEncoder`` skips padding in inference, as torch's own does."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import attnfast
from attnfast.nn import attention as module_file
from attnfast.nn import unpad as padding

B, T, E, H = 4, 19, 32, 4
LENGTHS = (19, 7, 1, 12)


@pytest.fixture(autouse=True)
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padding, "WORTH_IT", 1)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows every call of an attention was given without padding."""
    seen: list[int] = []
    real = module_file.jagged_forward

    def counted(module: Any, query: Any, *rest: Any) -> Tensor:
        seen.append(query.values().shape[0])
        return real(module, query, *rest)

    monkeypatch.setattr(module_file, "jagged_forward", counted)
    return seen


def encoder(norm: bool = True, **options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(3)
    layer = nn.TransformerEncoderLayer(E, H, 2 * E, batch_first=True, **options)
    model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(E) if norm else None).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter).mul_(0.05))
    return model


def replaced(model: nn.TransformerEncoder) -> nn.TransformerEncoder:
    ours = copy.deepcopy(model)
    report = attnfast.replace(ours, verbose=False)
    assert report.encoders == ("",)
    return ours


def batch(lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    x = torch.randn(len(lengths), T, E)
    return x, torch.arange(T) >= torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_torchs_result(norm: bool, activation: str, norm_first: bool, rows: list[int]) -> None:
    stock = encoder(norm, activation=activation, norm_first=norm_first)
    ours, (x, mask) = copy.deepcopy(stock), batch()
    attnfast.replace(ours, verbose=False)
    with torch.no_grad():
        out = ours(x, src_key_padding_mask=mask)
        expected = stock(x, src_key_padding_mask=mask)
    assert rows == ([] if norm_first else [sum(LENGTHS)] * 2)  # as torch's, which pads with it
    assert out.shape == x.shape
    kept = ~mask if norm_first else torch.ones_like(mask)
    torch.testing.assert_close(out[kept], expected[kept], atol=2e-6, rtol=2e-5)


def test_padding_anywhere_and_rows_of_nothing_else(rows: list[int]) -> None:
    stock = encoder()
    ours, x = replaced(stock), torch.randn(B, T, E)
    mask = torch.rand(B, T) < 0.4
    mask[1], mask[2] = True, False
    with torch.no_grad():
        out = ours(x, src_key_padding_mask=mask)
        padding.keep(ours)
        long = ours(x, src_key_padding_mask=mask)
    assert rows == [int((~mask).sum())] * 2
    torch.testing.assert_close(out[~mask], long[~mask], atol=2e-6, rtol=2e-5)
    assert torch.equal(out[mask], stock.norm.bias.expand(int(mask.sum()), E))


@pytest.mark.parametrize("shape", [(B, T), (1, T)])
def test_nothing_but_padding(shape: tuple[int, int], rows: list[int]) -> None:
    ours = replaced(encoder())
    with torch.no_grad():
        out = ours(torch.randn(*shape, E), src_key_padding_mask=torch.ones(shape, dtype=bool))
    assert rows == [0, 0]
    assert torch.isfinite(out).all()


def test_when_padding_is_kept(rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    x, mask = batch()
    ours = replaced(encoder())
    ours(x, src_key_padding_mask=mask)  # gradients
    with torch.no_grad():
        ours.train()(x, src_key_padding_mask=mask)
        ours.eval()(x)
        ours(x, torch.zeros(T, T), mask)
        ours(x, torch.ones(T, T).triu(1).bool(), mask, True)
        ours(x, src_key_padding_mask=torch.zeros(B, T).masked_fill(mask, -torch.inf))
        with torch.autocast("cpu", torch.bfloat16):
            ours(x, src_key_padding_mask=mask)
        handle = ours.layers[1].linear1.register_forward_hook(lambda *_: None)
        ours(x, src_key_padding_mask=mask)
        handle.remove()
        for name, value in (("window", (2, 2)), ("alibi", True), ("collect_stats", True)):
            other = copy.deepcopy(ours)
            attention = other.layers[0].self_attn
            if name == "alibi":
                attention.alibi_slopes = torch.ones(H)
            setattr(attention, name, value)
            other(x, src_key_padding_mask=mask)
        monkeypatch.setattr(padding, "WORTH_IT", 1 << 40)
        ours(x, src_key_padding_mask=mask)
        assert not rows
        monkeypatch.setattr(padding, "WORTH_IT", 1)
        ours(x, None, mask)
    assert rows == [sum(LENGTHS)] * 2


def test_other_layers_keep_it(rows: list[int]) -> None:
    class Layer(nn.TransformerEncoderLayer):
        pass

    model = encoder()
    model.layers[1].__class__ = Layer
    ours, (x, mask) = replaced(model), batch()
    with torch.no_grad():
        ours(x, src_key_padding_mask=mask)
    assert not rows


def test_restore_copies_and_twice(rows: list[int]) -> None:
    stock = encoder()
    ours, (x, mask) = replaced(stock), batch()
    attnfast.replace(ours, verbose=False)
    assert len(ours._forward_pre_hooks) == len(ours._forward_hooks) == 1
    with torch.no_grad():
        expected = ours(x, src_key_padding_mask=mask)
        for same in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            rows.clear()
            assert torch.equal(same(x, src_key_padding_mask=mask), expected)
            assert rows == [sum(LENGTHS)] * 2
    attnfast.restore(ours)
    assert not ours._forward_pre_hooks
    assert not ours._forward_hooks
    assert not ours._forward_hooks_with_kwargs
    assert ours.use_nested_tensor


def test_unpickled_where_torch_counts_hooks_anew(
    rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another process: hooks that its user adds and removes must not take the place of ours."""
    ours, (x, mask) = replaced(encoder()), batch()
    twin = pickle.loads(pickle.dumps(ours))
    monkeypatch.setattr(RemovableHandle, "next_id", max(0, *twin._forward_hooks))
    twin.register_forward_hook(lambda *_: None).remove()
    monkeypatch.setattr(RemovableHandle, "next_id", max(0, *twin._forward_pre_hooks))
    twin.register_forward_pre_hook(lambda *_: None).remove()
    with torch.no_grad():
        torch.testing.assert_close(
            twin(x, src_key_padding_mask=mask), ours(x, src_key_padding_mask=mask)
        )
    assert rows == [sum(LENGTHS)] * 4


def test_compiled() -> None:
    ours, (x, mask) = replaced(encoder()), batch()
    with torch.no_grad():
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        out = compiled(x, src_key_padding_mask=mask)
        torch.testing.assert_close(out[~mask], ours(x, src_key_padding_mask=mask)[~mask])
