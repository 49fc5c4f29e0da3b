"""Jagged nested tensors: every sequence as if alone, in training and evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnfast import KVCache, MultiheadAttention, replace

E, H = 12, 3
LENGTHS = (5, 1, 8, 3)
pytestmark = pytest.mark.filterwarnings("ignore:.*is_fx_tracing.*")


def layer(dtype: torch.dtype = torch.float32, **options: Any) -> MultiheadAttention:
    torch.manual_seed(0)
    return MultiheadAttention(E, H, **{"batch_first": True, "dtype": dtype, **options})


def jagged(
    lengths: tuple[int, ...] = LENGTHS, features: int = E, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, list[Tensor]]:
    """A nested tensor that requires gradients, and its sequences as leaves of their own."""
    sequences = [torch.randn(n, features, dtype=dtype) for n in lengths]
    nested = torch.nested.nested_tensor(sequences, layout=torch.jagged, requires_grad=True)
    return nested, [x.requires_grad_() for x in sequences]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "apart": {"kdim": 7, "vdim": 5},
    "all extras": {
        "num_kv_heads": 1,
        "window": (2, None),
        "softcap": 2.0,
        "sinks": True,
        "alibi": True,
        "similarity": "cosine",
    },
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("relation", ["self", "shared", "apart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_sequence_is_as_if_alone(
    dtype: torch.dtype, relation: str, options: dict[str, Any], causal: bool, training: bool
) -> None:
    if "kdim" in options and relation != "apart":
        return
    module = layer(dtype, **options).train(training)
    query, queries = jagged(dtype=dtype)
    key, keys = value, values = query, queries
    if relation != "self":
        lengths = (2, 6, 1, 4)
        key, keys = value, values = jagged(lengths, module.kdim, dtype)
        if relation == "apart":
            value, values = jagged(lengths, module.vdim, dtype)
            offsets = key.offsets()
            value = torch.nested.nested_tensor_from_jagged(
                value.values().detach().requires_grad_(), offsets
            )
    out, weights = module(query, key, value, need_weights=False, is_causal=causal)
    assert weights is None
    assert out.is_nested
    assert out.shape == query.shape
    rows = [
        module(q[None], k[None], v[None], need_weights=False, is_causal=causal)[0][0]
        for q, k, v in zip(queries, keys, values, strict=True)
    ]
    for got, want in zip(out.unbind(), rows, strict=True):
        torch.testing.assert_close(got, want)

    cotangent = torch.randn(sum(LENGTHS), E, dtype=dtype)
    parameters = [*module.parameters()]
    got = torch.autograd.grad(out.values(), [query, *parameters], cotangent, retain_graph=True)
    want = torch.autograd.grad(torch.cat(rows), [*queries, *parameters], cotangent)
    torch.testing.assert_close(got[0].values(), torch.cat(want[: len(queries)]))
    torch.testing.assert_close(got[1:], want[len(queries) :])


@pytest.mark.parametrize("mode", ["train", "eval", "inference"])
def test_an_encoder_takes_them(mode: str) -> None:
    """Torch's own encoder refuses in training; ours answers what it answers with padding."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(E, H, 16, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(block, 2).train(mode == "train")
    nested, _ = jagged()
    with pytest.raises(AssertionError, match="does not support NestedTensor"):
        model(nested)
    replace(model)
    padded = nested.to_padded_tensor(0.0)
    padding = torch.arange(max(LENGTHS)) >= torch.tensor(LENGTHS)[:, None]
    with torch.inference_mode(mode == "inference"):
        out = model(nested)
        expected = model(padded, src_key_padding_mask=padding)
    torch.testing.assert_close(out.values(), expected[~padding])


def test_training_with_dropout_draws_from_torchs_generator() -> None:
    module = layer(dropout=0.5)
    nested, _ = jagged()

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return module(nested, nested, nested, need_weights=False)[0].values()

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    module.eval()
    assert torch.equal(run(1), run(2))


def test_statistics_lie_packed() -> None:
    module = layer(collect_stats=True)
    nested, sequences = jagged()
    module(nested, nested, nested, need_weights=False)
    packed = module.stats.entropy
    alone = []
    for x in sequences:
        module(x[None], x[None], x[None], need_weights=False)
        alone.append(module.stats.entropy[0])
    torch.testing.assert_close(packed, torch.cat(alone, 1))


def test_autocast() -> None:
    module = layer()
    nested, _ = jagged()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(nested, nested, nested, need_weights=False)[0]
    assert out.dtype == torch.bfloat16
    exact = module(nested, nested, nested, need_weights=False)[0]
    assert (out.values() - exact.values()).abs().max() < 0.05


def test_hooks_on_out_proj_see_them() -> None:
    module, seen = layer(), []
    module.out_proj.register_forward_hook(lambda _, args, __: seen.append(args[0].is_nested))
    nested, _ = jagged()
    module(nested, nested, nested, need_weights=False)
    assert seen == [True]


def test_sequences_without_rows() -> None:
    module = layer()
    nested, _ = jagged((3, 0, 2))
    out = module(nested, nested, nested, need_weights=False)[0]
    assert [len(x) for x in out.unbind()] == [3, 0, 2]
    out.values().sum().backward()
    assert nested.grad is not None


def test_compiles_whole() -> None:
    module = layer()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for lengths in (LENGTHS, (2, 9)):
        nested, _ = jagged(lengths)
        expected = module(nested, nested, nested, need_weights=False, is_causal=True)[0]
        actual = compiled(nested, nested, nested, need_weights=False, is_causal=True)[0]
        torch.testing.assert_close(actual.values(), expected.values())


@pytest.mark.parametrize(
    ("options", "kwargs", "message"),
    [
        (
            {},
            {"need_weights": True},
            "nested tensors do not go with need_weights=True: pass need_weights=False, or pad",
        ),
        (
            {},
            {"key_padding_mask": torch.zeros(4, 8).bool()},
            "nested tensors do not go with key_padding_mask: nested tensors have no padding",
        ),
        (
            {},
            {"attn_mask": torch.zeros(8, 8)},
            "nested tensors do not go with attn_mask: pass is_causal=True for a causal mask, or "
            "pad",
        ),
        (
            {},
            {"kv_cache": KVCache()},
            "nested tensors do not go with kv_cache: pad on the left and give key_padding_mask",
        ),
        (
            {"batch_first": False},
            {},
            "nested tensors do not go with batch_first=False: build the module with "
            "batch_first=True",
        ),
        (
            {"add_zero_attn": True},
            {},
            "nested tensors do not go with add_bias_kv and add_zero_attn: use sinks=True, or pad "
            "(nn.TransformerEncoder: enable_nested_tensor=False)",
        ),
    ],
)
def test_what_needs_padding_is_refused(
    options: dict[str, Any], kwargs: dict[str, Any], message: str
) -> None:
    nested, _ = jagged()
    with pytest.raises(TypeError) as raised:
        layer(**options)(nested, nested, nested, **{"need_weights": False, **kwargs})
    assert str(raised.value) == f"MultiheadAttention: {message}"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_inputs_that_do_not_fit() -> None:
    module = layer()
    nested, _ = jagged()
    dense = torch.randn(4, 8, E)
    other, _ = jagged((1, 2, 3))
    longer, _ = jagged((5, 1, 8, 4))
    wide, _ = jagged(features=E + 1)
    strided = torch.nested.nested_tensor([torch.randn(n, E) for n in LENGTHS])
    short = torch.nested.nested_tensor([torch.randn(n, E) for n in (1, 2)])
    rows = torch.nested.nested_tensor([torch.randn(3), torch.randn(4)])
    empty = torch.nested.nested_tensor([])
    for args, error, message in (
        ((nested, dense, dense), TypeError, r"key must be a jagged nested tensor.*torch.strided"),
        ((nested, None, None), TypeError, r"key must be a jagged nested tensor.*got NoneType"),
        ((dense, nested, nested), TypeError, r"key must be dense as query is, got nested"),
        ((nested, other, other), ValueError, r"key must be a jagged .* \(4, \*, 12\), got"),
        ((wide, wide, wide), ValueError, r"query must be a jagged nested tensor \(B, \*, 12\)"),
        ((nested, nested, longer), ValueError, "value must have key's lengths in every sequence"),
        ((nested.double(),) * 3, TypeError, "query must have the parameters' dtype"),
        ((nested.transpose(1, 2),) * 3, ValueError, "query must be"),
        ((nested, strided, strided), TypeError, "key must be a jagged .* got layout torch.strided"),
        ((strided, nested, nested), TypeError, "key must be a strided .* got layout torch.jagged"),
        ((strided, strided, [dense]), TypeError, "value must be a Tensor, got list"),
        ((strided, short, short), ValueError, r"key must be .* = \(4, \*, 12\), got \(2, "),
        ((rows, rows, rows), ValueError, r"query must be .*, got 2 sequences of shapes \[\(3,\), "),
        ((empty, empty, empty), ValueError, r"query must be a nested .*, got 0 sequences"),
    ):
        with pytest.raises(error, match=message):
            module(*args, need_weights=False)
