"""kv_cache: decoding step by step gives what the whole sequence gives."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from modules import random_mask
from torch import Tensor, nn

import attnfast.nn.attention
from attnfast import KVCache, MultiheadAttention, replace

B, E, H, LENGTH = 3, 16, 4, 13

EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"num_kv_heads": 2},
    "window": {"window": (4, 0)},
    "windows of heads": {"window": torch.tensor([[4, 0], [-1, 1], [0, 0], [9, -1]])},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "alibi": {"alibi": True},
    "cosine": {"similarity": "cosine"},
    "appended": {"add_bias_kv": True, "add_zero_attn": True},
    "appended cosine": {"add_bias_kv": True, "similarity": "cosine"},
    "apart": {"kdim": 7, "vdim": 5},
    "no bias": {"bias": False},
}


def layer(**options: Any) -> MultiheadAttention:
    torch.manual_seed(0)
    made = MultiheadAttention(E, H, **{"batch_first": True, **options}).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(std=0.4)
    return made


def inputs(module: MultiheadAttention, length: int = LENGTH) -> list[Tensor]:
    shape = (B, length) if module.batch_first else (length, B)
    x = torch.randn(*shape, E)
    if module._qkv_same_embed_dim:
        return [x, x, x]
    return [x, torch.randn(*shape, module.kdim), torch.randn(*shape, module.vdim)]


def piece(xs: list[Tensor], start: int, end: int, batch_first: bool) -> list[Tensor]:
    made: dict[int, Tensor] = {}
    dim = 1 if batch_first else 0
    for x in xs:
        made.setdefault(id(x), x.narrow(dim, start, end - start))
    return [made[id(x)] for x in xs]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("pieces", [[1] * LENGTH, [5, 1, 1, 4, 2], [LENGTH], [10, 3]], ids=str)
@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
def test_pieces_give_what_the_whole_gives(
    extras: dict[str, Any], pieces: list[int], batch_first: bool
) -> None:
    module = layer(batch_first=batch_first, **extras)
    xs = inputs(module)
    for max_length, padded, need_weights in itertools.product(
        (None, LENGTH), (False, True), (False, True)
    ):
        padding = random_mask(B, LENGTH) if padded else None
        expected, weights = module(*xs, is_causal=True, key_padding_mask=padding)
        cache, start = KVCache(max_length), 0
        for size in pieces:
            end = start + size
            with torch.inference_mode():
                out, part = module(
                    *piece(xs, start, end, batch_first),
                    is_causal=True,
                    kv_cache=cache,
                    need_weights=need_weights,
                    key_padding_mask=None if padding is None else padding[:, :end],
                )
            want = piece([expected], start, end, batch_first)[0]
            torch.testing.assert_close(out, want)
            if need_weights:
                appended = weights.shape[-1] - LENGTH
                keys = [*range(end), *range(LENGTH, LENGTH + appended)]
                torch.testing.assert_close(part, weights[:, start:end, keys])
            start = end
            assert cache.length == end
            assert cache.prefix == weights.shape[-1] - LENGTH


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_token_at_a_time_in_every_dtype(dtype: torch.dtype) -> None:
    module = layer(dtype=dtype, num_kv_heads=2)
    x = torch.randn(B, LENGTH, E, dtype=dtype)
    exact = layer(dtype=torch.float64, num_kv_heads=2)
    exact.load_state_dict(module.state_dict())
    truth = exact(*(x.double(),) * 3, is_causal=True)[0]
    whole = (module(x, x, x, is_causal=True)[0].double() - truth).abs().max()
    cache = KVCache()
    with torch.no_grad():
        steps = [module(t, t, t, kv_cache=cache, need_weights=False)[0] for t in x.split(1, dim=1)]
    error = (torch.cat(steps, 1).double() - truth).abs().max()
    assert error <= 2 * whole + 4 * torch.finfo(dtype).eps * truth.abs().max()
    assert cache.keys.dtype == dtype
    assert cache.keys.shape == (B, 2, LENGTH, E // H)


def test_attention_masks_over_the_cache() -> None:
    module = layer()
    x, cache = torch.randn(B, 6, E), KVCache()
    mask = random_mask(6, 6) | torch.ones(6, 6, dtype=torch.bool).triu(1)
    bias = torch.randn(B, H, 6, 6).masked_fill(mask, -torch.inf)
    for given in (mask, bias):
        cache.reset()
        expected = module(x, x, x, attn_mask=given)[0]
        for t in range(6):
            with torch.inference_mode():
                token = x[:, t : t + 1]
                row = given[..., t : t + 1, : t + 1]
                out = module(
                    token, token, token, attn_mask=row, kv_cache=cache, need_weights=False
                )[0]
            torch.testing.assert_close(out, expected[:, t : t + 1])


@pytest.mark.parametrize("padded", [False, True])
def test_cross_attention_projects_its_memory_once(padded: bool) -> None:
    module = layer()
    x, memory, cache = torch.randn(B, 5, E), torch.randn(B, 9, E), KVCache()
    padding = random_mask(B, 9) if padded else None
    expected, weights = module(x, memory, memory, key_padding_mask=padding)
    options: dict[str, Any] = {"key_padding_mask": padding, "kv_cache": cache}
    with torch.inference_mode():
        for t in range(5):
            keys = memory if t == 0 else None
            token = x[:, t : t + 1]
            out, part = module(token, keys, keys, **options, need_weights=bool(t % 2))
            torch.testing.assert_close(out, expected[:, t : t + 1])
            if t % 2:
                torch.testing.assert_close(part, weights[:, t : t + 1])
    assert cache.length == 9


def test_a_step_is_computed_by_decode_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of one token, and short causal pieces, take the kernel that splits over the keys."""
    called = []
    for name in ("attention", "decode_attention"):
        function = getattr(attnfast.nn.attention, name)

        def spy(*args: Any, f: Any = function, n: str = name, **kwargs: Any) -> Any:
            called.append(n)
            return f(*args, **kwargs)

        monkeypatch.setattr(attnfast.nn.attention, name, spy)
    module, cache = layer(), KVCache()

    def step(count: int, **options: Any) -> str:
        x = torch.randn(B, count, E)
        with torch.inference_mode():
            module(x, x, x, kv_cache=cache, **{"need_weights": False, **options})
        return called[-1]

    assert step(40, is_causal=True) == "attention"
    assert step(1) == "decode_attention"
    assert step(4, is_causal=True) == "decode_attention"
    assert step(4) == "attention"  # new tokens look at each other
    assert step(1, need_weights=True) == "attention"
    module.collect_stats = True
    assert step(1) == "attention"
    assert module.stats.entropy.shape == (B, H, 1)


def test_unbatched() -> None:
    module, cache = layer(batch_first=False), KVCache()
    x = torch.randn(4, E)
    expected = module(x, x, x, is_causal=True)[0]
    with torch.inference_mode():
        for t in range(4):
            out = module(x[t : t + 1], *(x[t : t + 1],) * 2, kv_cache=cache)[0]
            torch.testing.assert_close(out, expected[t : t + 1])


def test_autocast_holds_its_dtype() -> None:
    module, cache = layer(), KVCache()
    x = torch.randn(B, 2, E)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x, x, x, kv_cache=cache, is_causal=True)[0]
    assert out.dtype == cache.keys.dtype == cache.values.dtype == torch.bfloat16
    with torch.inference_mode(), pytest.raises(TypeError, match=r"keys must be of the dtype held"):
        module(x, x, x, kv_cache=cache)


def test_a_replaced_module_takes_a_cache() -> None:
    model = nn.ModuleDict({"a": nn.MultiheadAttention(E, H, batch_first=True)})
    replace(model)
    x, cache = torch.randn(B, 3, E), KVCache()
    expected = model.a(x, x, x, is_causal=True)[0]
    with torch.no_grad():
        for t in x.split(1, 1):
            out = model.a(t, t, t, kv_cache=cache)[0]
    torch.testing.assert_close(out, expected[:, 2:])


# The cache itself.


def filled(length: int = 5, **options: Any) -> KVCache:
    cache = KVCache(**options)
    torch.manual_seed(1)
    cache.append(torch.randn(B, 2, length, 4), torch.randn(B, 2, length, 4))
    return cache


def test_it_grows_by_doubling_and_keeps_what_it_holds() -> None:
    cache = KVCache()
    k, v = torch.randn(2, B, 2, 100, 4)
    addresses = set()
    for t in range(100):
        cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
        addresses.add(cache.keys.data_ptr())
    assert torch.equal(cache.keys, k)
    assert torch.equal(cache.values, v)
    assert len(addresses) == 4  # 16, 32, 64, 128
    assert cache.nbytes == 2 * B * 2 * 128 * 4 * 4
    assert repr(cache) == f"KVCache(100 tokens, batch {B}, torch.float32, cpu)"


def test_max_length_is_allocated_once_and_kept() -> None:
    cache = KVCache(max_length=8)
    assert repr(cache) == "KVCache(0 of 8 tokens)"
    cache.append(*torch.randn(2, B, 2, 5, 4))
    address = cache.keys.data_ptr()
    cache.append(*torch.randn(2, B, 2, 3, 4))
    assert cache.keys.data_ptr() == address
    assert cache.nbytes == 2 * B * 2 * 8 * 4 * 4
    before = cache.keys.clone()
    with pytest.raises(ValueError) as raised:
        cache.append(*torch.randn(2, B, 2, 2, 4))
    assert str(raised.value) == (
        "KVCache: length must be at most max_length = 8, got 10 after an append of 2"
    )
    assert torch.equal(cache.keys, before)


def test_max_length_counts_tokens_only() -> None:
    module, cache = layer(add_bias_kv=True, add_zero_attn=True), KVCache(max_length=3)
    x = torch.randn(B, 3, E)
    with torch.inference_mode():
        module(x, x, x, kv_cache=cache)
        assert (cache.length, cache.prefix, cache.keys.shape[2]) == (3, 2, 5)
        with pytest.raises(ValueError, match="at most max_length = 3, got 4 after an append of 1"):
            module(x[:, :1], x[:, :1], x[:, :1], kv_cache=cache)


@pytest.mark.parametrize("index", [[2, 0, 1], [1, 1, 1], [0], [2, 2, 1, 0, 0]], ids=str)
def test_reorder(index: list[int]) -> None:
    cache = filled()
    keys, values = cache.keys.clone(), cache.values.clone()
    for dtype in (torch.int64, torch.int32):
        cache = filled()
        cache.reorder(torch.tensor(index, dtype=dtype))
        assert torch.equal(cache.keys, keys[index])
        assert torch.equal(cache.values, values[index])
        assert cache.length == 5
    cache.append(*torch.randn(2, len(index), 2, 1, 4))
    assert cache.length == 6


def test_beams_decode_as_if_alone() -> None:
    """Reordering between steps is decoding the reordered sequences from the start."""
    module, cache = layer(), KVCache()
    x = torch.randn(B, 6, E)
    index = torch.tensor([2, 2, 0])
    with torch.inference_mode():
        module(x[:, :4], x[:, :4], x[:, :4], is_causal=True, kv_cache=cache)
        cache.reorder(index)
        x = x[index]
        for t in (4, 5):
            token = x[:, t : t + 1]
            out = module(token, token, token, kv_cache=cache)[0]
        torch.testing.assert_close(out, module(x, x, x, is_causal=True)[0][:, 5:])


def test_crop_and_reset() -> None:
    module, cache = layer(add_bias_kv=True), KVCache()
    x = torch.randn(B, 6, E)
    expected = module(x, x, x, is_causal=True)[0]
    with torch.inference_mode():
        wrong = torch.randn(B, 3, E)
        module(x[:, :3], x[:, :3], x[:, :3], kv_cache=cache, is_causal=True)
        module(wrong, wrong, wrong, kv_cache=cache, is_causal=True)
        cache.crop(3)
        assert (cache.length, cache.prefix) == (3, 1)
        out = module(x[:, 3:], x[:, 3:], x[:, 3:], kv_cache=cache, is_causal=True)[0]
        torch.testing.assert_close(out, expected[:, 3:])
        cache.crop(0)
        out = module(x, x, x, kv_cache=cache, is_causal=True)[0]
        torch.testing.assert_close(out, expected)
        cache.reset()
        assert (cache.length, cache.nbytes) == (0, 0)
        module(x[:1], x[:1], x[:1], kv_cache=cache)
    assert cache.length == 6


# Errors.


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: KVCache(0), ValueError, "max_length must be from 1 to 2147483647, got 0"),
        (lambda: KVCache(2.5), TypeError, "max_length must be an int, got 2.5"),
        (lambda: KVCache().keys, ValueError, "nothing is held yet"),
        (lambda: filled().crop(6), ValueError, "length must be at most the 5 held, got 6"),
        (lambda: filled().crop(-1), ValueError, "length must be from 0 to 2147483647, got -1"),
        (
            lambda: filled().reorder([0]),
            TypeError,
            "index must be an int64 or int32 Tensor, got list",
        ),
        (
            lambda: filled().reorder(torch.ones(2)),
            TypeError,
            "index must be an int64 or int32 Tensor, got torch.float32",
        ),
        (
            lambda: filled().reorder(torch.zeros(1, 2).long()),
            ValueError,
            "index must be (B,), got (1, 2)",
        ),
        (
            lambda: filled().reorder(torch.tensor([0, 3])),
            ValueError,
            "index must be in [0, 3), got 3",
        ),
        (
            lambda: filled().reorder(torch.zeros(1, device="meta").long()),
            ValueError,
            "index must be on the cache's device cpu, got meta",
        ),
        (
            lambda: filled().append(*torch.randn(2, 2, 2, 1, 4)),
            ValueError,
            "keys must be (B, H_kv, *, D) = (3, 2, *, 4) as those held, got (2, 2, 1, 4) "
            "(reorder changes the batch, reset forgets it)",
        ),
        (
            lambda: filled().append(*torch.randn(2, B, 2, 1, 4).double()),
            TypeError,
            "keys must be of the dtype held, torch.float32, got torch.float64",
        ),
        (
            lambda: filled().append(*torch.randn(2, B, 2, 1, 4, device="meta")),
            ValueError,
            "keys must be on the device held, cpu, got meta",
        ),
        (
            lambda: filled().append(torch.randn(B, 2, 1, 4), torch.randn(B, 2, 1, 3)),
            ValueError,
            "values must be (B, H_kv, *, D) = (3, 2, *, 4) as those held, got (3, 2, 1, 3) "
            "(reorder changes the batch, reset forgets it)",
        ),
        (
            lambda: KVCache().append(torch.zeros(B, 2, 1, 4), torch.zeros(B, 2, 2, 4)),
            ValueError,
            "values must be (B, H_kv, N, D) = (3, 2, 1, *), got (3, 2, 2, 4)",
        ),
        (
            lambda: KVCache().append(torch.zeros(B, 2, 4), torch.zeros(B, 2, 4)),
            ValueError,
            "keys must be (B, H_kv, N, D), got (3, 2, 4)",
        ),
        (
            lambda: KVCache().append(torch.zeros(B, 2, 1, 4).numpy(), torch.zeros(B, 2, 1, 4)),
            TypeError,
            "keys must be a Tensor, got ndarray",
        ),
        (
            lambda: KVCache().append(torch.zeros(B, 2, 1, 4), [1.0]),
            TypeError,
            "values must be a Tensor, got list",
        ),
        (
            lambda: KVCache().append(torch.zeros(B, 2, 1, 4).to_sparse(), torch.zeros(B, 2, 1, 4)),
            TypeError,
            "keys must be a dense strided Tensor, got layout torch.sparse_coo",
        ),
        (
            lambda: KVCache().append(*torch.zeros(2, B, 2, 1, 4), prefix=2),
            ValueError,
            "prefix must be at most the 1 keys given, got 2",
        ),
        (
            lambda: filled().reorder(torch.zeros(2).long().to_sparse()),
            TypeError,
            "index must be a dense strided Tensor, got layout torch.sparse_coo",
        ),
        (lambda: filled().crop("2"), TypeError, "length must be an int, got '2'"),
    ],
)
def test_errors_of_the_cache(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == f"KVCache: {message}"


def test_gradients_are_refused_before_anything_is_written() -> None:
    module, cache = layer(), KVCache()
    x = torch.randn(B, 2, E)
    with pytest.raises(ValueError) as raised:
        module(x, x, x, kv_cache=cache)
    assert str(raised.value) == (
        "KVCache: keys and values must need no gradient: decode under torch.inference_mode() or "
        "torch.no_grad()"
    )
    assert cache.length == 0


@pytest.mark.parametrize(
    ("key", "value", "cache", "error", "message"),
    [
        (None, None, None, ValueError, "given unless kv_cache holds some, got None, no kv_cache"),
        (
            None,
            None,
            KVCache(),
            ValueError,
            "given unless kv_cache holds some, got None, an empty one",
        ),
        (None, 1, KVCache(), ValueError, "both given or both None, got one of them"),
    ],
)
def test_missing_keys(
    key: Any, value: Any, cache: KVCache | None, error: type[Exception], message: str
) -> None:
    x = torch.randn(B, 2, E)
    with torch.no_grad(), pytest.raises(error) as raised:
        layer()(x, None if key is None else x, None if value is None else x, kv_cache=cache)
    assert str(raised.value) == f"MultiheadAttention: key and value must be {message}"


def test_a_cache_of_another_kind() -> None:
    x = torch.randn(B, 2, E)
    with pytest.raises(TypeError) as raised:
        layer()(x, x, x, kv_cache=(x, x))
    assert str(raised.value) == (
        "MultiheadAttention: kv_cache must be an attnfast.KVCache or None, got tuple"
    )
