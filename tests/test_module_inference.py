"""The short way of self-attention without gradients: the long way's bits, or not taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnfast
from attnfast import ops
from attnfast.nn import extras, fast_path

B, T, E, H = 3, 21, 48, 4


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Has the name of every operator that was called."""
    calls: list[str] = []

    def counted(name: str) -> Any:
        op = getattr(ops, name)
        return lambda *args: calls.append(name) or op(*args)

    for name in ("SELF_ATTENTION", "SELF_ATTENTION_BWD"):
        monkeypatch.setattr(ops, name, counted(name))
    return calls


def layer(**options: Any) -> attnfast.MultiheadAttention:
    torch.manual_seed(1)
    module = attnfast.MultiheadAttention(E, H, **{"batch_first": True, **options}).eval()
    with torch.no_grad():  # torch begins with zero biases
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter).mul_(0.1))
    return module


def long_way(module: nn.Module, monkeypatch: pytest.MonkeyPatch, *args: Any, **options: Any) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(fast_path, "takes", lambda *_: False)
        return module(*args, **options)


def masks(kind: str, T: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) < 0.3

    padding, square = draw(B, T), draw(T, T)
    bias = torch.randn(T, T, generator=generator)
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": torch.randn(B, T, generator=generator)},
        "square": {"attn_mask": square},
        "bias": {"attn_mask": bias},
        "heads": {"attn_mask": draw(B * H, T, T)},
        "batch": {"attn_mask": draw(B, T, T)},
        "broadcast": {"attn_mask": draw(B, 1, 1, T)},
        "mixed": {"attn_mask": bias, "key_padding_mask": padding},
        "causal": {"is_causal": True},
        "causal padding": {"is_causal": True, "key_padding_mask": padding},
        "all masked": {"key_padding_mask": torch.ones(B, T, dtype=torch.bool)},
    }[kind]


KINDS = (
    "none", "padding", "float padding", "square", "bias", "heads", "batch", "broadcast", "mixed",
    "causal", "causal padding", "all masked",
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("length", [1, 2, T, 65])
@pytest.mark.parametrize("kind", KINDS)
def test_the_long_ways_bits(
    kind: str,
    length: int,
    batch_first: bool,
    dtype: torch.dtype,
    taken: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = layer(batch_first=batch_first).to(dtype)
    x = torch.randn(B, length, E).to(dtype)
    x = x if batch_first else x.transpose(0, 1)
    for weights in ({"need_weights": False}, {}, {"average_attn_weights": False}):
        given = masks(kind, length) | weights
        with torch.no_grad():
            out, probabilities = module(x, x, x, **given)
            assert taken.pop()
            expected, expected_weights = long_way(module, monkeypatch, x, x, x, **given)
        assert not taken
        assert torch.equal(out, expected)
        assert out.is_contiguous()
        assert (probabilities is None) == (expected_weights is None)
        if probabilities is not None:
            assert torch.equal(probabilities, expected_weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast(
    dtype: torch.dtype, taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = layer(), torch.randn(B, T, E).to(dtype)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        out, _ = module(x, x, x, need_weights=False)
        assert taken.pop()
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, long_way(module, monkeypatch, x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("shape", [(0, T, E), (B, 0, E)])
def test_nothing_to_do(
    shape: tuple[int, ...], taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = layer(), torch.randn(shape)
    with torch.no_grad():
        out, weights = module(x, x, x)
        assert taken.pop()
        expected = long_way(module, monkeypatch, x, x, x)
    assert out.shape == shape
    assert weights.shape == expected[1].shape


def test_a_strided_query_and_hooks(taken: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module, seen = layer(), []
    module.out_proj.register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(T, E, B).permute(2, 0, 1)
    with torch.no_grad():
        out, _ = module(x, x, x, need_weights=False)
        assert taken.pop()
        assert seen == [1]
        assert torch.equal(out, long_way(module, monkeypatch, x, x, x, need_weights=False)[0])


LONG: dict[str, dict[str, Any]] = {
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "heads": {"num_kv_heads": 2},
    "window": {"window": (3, 3)},
    "softcap": {"softcap": 5.0},
    "sinks": {"sinks": True},
    "alibi": {"alibi": True},
    "cosine": {"similarity": "cosine"},
    "stats": {"collect_stats": True},
    "reference": {"backend": "reference"},
    "kdim": {"kdim": E, "vdim": E + 1},
}


@pytest.mark.parametrize("option", LONG)
def test_extras_go_the_long_way(option: str, taken: list[str]) -> None:
    module, x = layer(**LONG[option]), torch.randn(B, T, E)
    value = x if module.vdim == E else torch.randn(B, T, module.vdim)
    with torch.no_grad():
        module(x, x, value)
    assert not taken


def test_an_extra_that_is_new_is_never_dropped(
    taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that the record alone knows: all three functions are given it, no way leaves it out."""
    known, module, x = extras.asked_of, layer(), torch.randn(B, T, E)
    jagged = torch.nested.nested_tensor([x[0], x[1, :5]], layout=torch.jagged)
    monkeypatch.setattr(extras, "asked_of", lambda module: {**known(module), "novel": 1})
    step = {"kv_cache": attnfast.KVCache(), "need_weights": False}
    for given, options in ((x, {}), (jagged, {"need_weights": False}), (x[:, :1], step)):
        with torch.no_grad(), pytest.raises(TypeError, match=r"unexpected keyword .*'novel'"):
            module(given, given, given, **options)
    assert not taken
    monkeypatch.setattr(extras, "asked_of", lambda module: {**known(module), "novel": None})
    with torch.no_grad():
        module(x, x, x)
    assert taken


def test_what_else_goes_the_long_way(taken: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = layer(dropout=0.5), torch.randn(B, T, E)
    with torch.no_grad():
        module(x, x.clone(), x)
        module(x[0], x[0], x[0])
        module.double()(*[x.double()] * 3)
        module.float()
        torch.func.vmap(module.in_proj_weight.mul)(torch.ones(2))
        with torch.autograd.forward_ad.dual_level():
            module(x, x, x)
        monkeypatch.setenv("ATTNFAST_BACKEND", "reference")
        module(x, x, x)
        assert not taken
        monkeypatch.delenv("ATTNFAST_BACKEND")
        module(x, x, x)
        assert taken


def test_compiled(taken: list[str]) -> None:
    module, x = layer(), torch.randn(B, T, E)
    with torch.no_grad():
        out, _ = torch.compile(module, fullgraph=True, backend="aot_eager")(x, x, x)
        assert not taken
        torch.testing.assert_close(out, module(x, x, x)[0])


def test_a_mask_elsewhere_is_refused_by_name() -> None:
    module, x = layer(), torch.randn(B, T, E)
    mask = torch.zeros(T, T, dtype=torch.bool, device="meta")
    with torch.no_grad(), pytest.raises(ValueError, match="device"):
        module(x, x, x, attn_mask=mask)


@pytest.mark.parametrize("grads", [True, False])
def test_a_bias_of_another_dtype_is_refused_by_name(grads: bool) -> None:
    module, x = layer(), torch.randn(B, T, E)
    bias = torch.zeros(T, T).to(torch.float8_e4m3fn)
    with torch.set_grad_enabled(grads), pytest.raises(TypeError, match="bias must be float32"):
        module(x, x, x, attn_mask=bias)


def test_the_operator() -> None:
    packed = torch.randn(B, T, 3 * E)
    mask, bias = torch.rand(B, 1, 1, T) < 0.7, torch.randn(1, H, T, T)
    for batch_first in (True, False):
        for weights in (0, 1, 2):
            sizes = (packed, H, batch_first, mask, bias, False, 0.0, None, weights)
            if not batch_first:
                sizes = (packed.transpose(0, 1).contiguous(), *sizes[1:])
            torch.library.opcheck(torch.ops.attnfast.cpu_self_attention.default, sizes)
    op, none = torch.ops.attnfast.cpu_self_attention, (None, None, False, 0.0, None, 0)
    with pytest.raises(RuntimeError, match="packed must be contiguous"):
        op(packed.transpose(0, 1), H, True, *none)
    with pytest.raises(RuntimeError, match=r"3 \* heads \* D features"):
        op(packed, 5, True, *none)
    with pytest.raises(NotImplementedError, match="has no gradient"):
        op(packed.requires_grad_(), H, True, *none)
