"""vmap: every mapped call gives what it gives alone, in results and gradients of every order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn, vmap
from torch.func import functional_call, grad, jacrev, stack_module_state

import attnfast
from attnfast.call import MEAN, Inputs, Options
from attnfast.pooled import pooled

M = 3
NAMES = ("q", "k", "v", "bias", "sinks")


def call(x: dict[str, Tensor], **options: Any) -> Tensor:
    """A scalar of every differentiable result."""
    arguments = {"causal": True, "align": "bottom_right"} | options
    given = {name: x[name] for name in x if name not in "qkv"}
    out, lse, stats, weights = attnfast.attention(
        *(x[name] for name in "qkv"),
        **given,
        **arguments,
        return_lse=True,
        return_stats="received",
        return_weights="mean",
    )
    others = stats.received.sum() + stats.reach.sum() + stats.focus.sum()
    return out.square().sum() + lse.sin().sum() + stats.entropy.sum() + (weights**3).sum() + others


def tensors(B: int = 2, bias: tuple[int, ...] = (4, 5, 7)) -> dict[str, Tensor]:
    """M calls."""
    shapes = (B, 4, 5, 8), (B, 2, 7, 8), (B, 2, 7, 8), bias, (4,)
    return {n: torch.randn(M, *shape) for n, shape in zip(NAMES, shapes, strict=True)}


def split(x: dict[str, Tensor], dims: dict[str, int | None]) -> list[dict[str, Tensor]]:
    """The arguments of each call, with contiguous tensors."""
    return [
        {n: t if dims[n] is None else t.select(dims[n], i).contiguous() for n, t in x.items()}
        for i in range(M)
    ]


def assert_as_alone(function: Any, x: dict[str, Tensor], dims: dict[str, int | None]) -> None:
    found = vmap(function, in_dims=(dims,))(x)
    alone = [function(entry) for entry in split(x, dims)]
    expected = torch.utils._pytree.tree_map(lambda *y: torch.stack(y), *alone)
    torch.testing.assert_close(found, expected)


MAPPED = {
    "all": dict.fromkeys(NAMES, 0),
    "but the sinks": dict.fromkeys(NAMES, 0) | {"sinks": None},
    "q": dict.fromkeys(NAMES, None) | {"q": 0},
    "keys and values": dict.fromkeys(NAMES, None) | {"k": 0, "v": 0},
    "bias": dict.fromkeys(NAMES, None) | {"bias": 0},
    "sinks": dict.fromkeys(NAMES, None) | {"sinks": 0},
}


@pytest.mark.parametrize("sinks", [False, True], ids=["no sinks", "sinks"])
@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize("mapped", MAPPED)
def test_which_tensors_are_mapped(mapped: str, B: int, sinks: bool) -> None:
    if mapped == "sinks" and not sinks:
        return
    names = [n for n in NAMES if sinks or n != "sinks"]
    dims = {n: MAPPED[mapped][n] for n in names}
    x = {n: t if dims[n] == 0 else t[0] for n, t in tensors(B).items() if n in names}
    assert_as_alone(call, x, dims)
    assert_as_alone(grad(call), x, dims)


@pytest.mark.parametrize(
    "shape", [(), (7,), (5, 1), (4, 1, 7), (1, 4, 5, 7), (2, 1, 5, 1)], ids=str
)
@pytest.mark.parametrize("dim", [None, 0], ids=["shared", "mapped"])
def test_a_bias_that_is_broadcast(shape: tuple[int, ...], dim: int | None) -> None:
    x = tensors(bias=shape)
    x["bias"] = x["bias"].bfloat16() if len(shape) == 3 else x["bias"]
    x["bias"] = x["bias"] if dim == 0 else x["bias"][0]
    del x["sinks"]
    dims = dict.fromkeys(x, 0) | {"bias": dim}
    assert_as_alone(grad(call), x, dims)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("lists", [(2, 5, 3), (2, 2, 5, 3)], ids=["shared", "apart"])
def test_chosen_keys(lists: tuple[int, ...], mapped: bool) -> None:
    def function(x: dict[str, Tensor]) -> Tensor:
        q, k, v = (x[name] for name in "qkv")
        out, lse = attnfast.attention(q, k, v, indices=x["indices"], return_lse=True)
        return out.square().sum() + lse.sin().sum()

    x = {name: x for name, x in tensors().items() if name in "qkv"}
    x["indices"] = torch.randint(7, (M, *lists))
    x["indices"] = x["indices"] if mapped else x["indices"][0]
    dims = dict.fromkeys(x, 0) | {"indices": 0 if mapped else None}
    assert_as_alone(lambda x: grad(lambda q: function(x | {"q": q}))(x["q"]), x, dims)


@pytest.mark.parametrize("mapped", [False, True])
def test_windows_of_heads(mapped: bool) -> None:
    x = {name: x for name, x in tensors().items() if name in "qkv"}
    windows = torch.randint(-1, 4, (M, 4, 2))
    x["window"] = windows if mapped else windows[0]
    dims = dict.fromkeys(x, 0) | {"window": 0 if mapped else None}

    def function(x: dict[str, Tensor]) -> Tensor:
        return grad(lambda q: call(x | {"q": q}))(x["q"])

    assert_as_alone(function, x, dims)


def test_mapped_dimensions_anywhere() -> None:
    x = tensors()
    del x["sinks"]
    dims = {"q": 4, "k": 1, "v": 3, "bias": 2}
    moved = {n: t.movedim(0, dims[n]) for n, t in x.items()}
    assert_as_alone(grad(call), moved, dims)


@pytest.mark.parametrize("mapped", [False, True])
def test_tensors_without_gradients(mapped: bool) -> None:
    x = {n: t for n, t in tensors().items() if n in "qkv"}
    x |= {
        "mask": torch.rand(M, 2, 1, 5, 7) < 0.7,
        "alibi_slopes": torch.rand(M, 2, 4),
        "align": torch.randint(0, 4, (M, 2)),
    }
    dims = {n: 0 if mapped or n in "qkv" else None for n in x}
    x = {n: t if dims[n] == 0 else t[0] for n, t in x.items()}

    def function(x: dict[str, Tensor]) -> Tensor:
        rest = {n: t for n, t in x.items() if n != "align"}
        return grad(lambda q: call(rest | {"q": q}, align=x["align"]))(x["q"])

    assert_as_alone(function, x, dims)


def test_every_order_and_nesting() -> None:
    x = tensors()
    dims = dict.fromkeys(NAMES, 0)

    def slope(x: dict[str, Tensor]) -> Tensor:
        return sum(g.square().sum() for g in grad(call)(x).values())

    small = {n: 0.3 * t for n, t in x.items()}
    assert_as_alone(grad(slope), small, dims)  # vmap of the second derivative
    total = grad(lambda x: vmap(call, in_dims=(dims,))(x).sum())(x)
    alone = [grad(call)(entry) for entry in split(x, dims)]
    for name in NAMES:
        torch.testing.assert_close(total[name], torch.stack([y[name] for y in alone]))
    inner = {"q": 0, **dict.fromkeys(NAMES[1:], None)}
    outer = {"q": None, **dict.fromkeys(NAMES[1:], 0)}
    nested = vmap(vmap(grad(call), in_dims=(inner,)), in_dims=(outer,))(x)
    for i in range(M):
        for j in range(M):
            entry = {n: t[j] if n == "q" else t[i] for n, t in x.items()}
            for name, g in grad(call)(entry).items():
                torch.testing.assert_close(nested[name][i, j], g)


def test_jacobians_are_those_of_the_reference() -> None:
    x = {n: t[0] for n, t in tensors(1).items()}
    for function in (
        lambda q, b: attnfast.attention(q, x["k"], x["v"], bias=x["bias"], backend=b),
        lambda q, b: grad(lambda q: call(x | {"q": q}, backend=b))(q),
    ):
        found, expected = (
            jacrev(lambda q, b=b, f=function: f(q, b))(x["q"]) for b in ("cpu", "reference")
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_autograd_through_vmap_to_the_second_order() -> None:
    x = tensors()
    found = []
    for mapped in (True, False):
        leaves = {n: t.clone().requires_grad_() for n, t in x.items()}
        if mapped:
            total = vmap(call, in_dims=(dict.fromkeys(NAMES, 0),))(leaves).sum()
        else:
            total = sum(call({n: t[i] for n, t in leaves.items()}) for i in range(M))
        first = torch.autograd.grad(total, list(leaves.values()), create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in first), list(leaves.values()))
        found.append([*first, *second])
    for y, z in zip(*found, strict=True):
        torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mapped", ["everything", "rows"])
def test_varlen(mapped: str) -> None:
    ends = torch.tensor([[0, 2, 5], [0, 3, 5], [0, 1, 4]])
    rows = torch.randn(M, 5, 2, 4)

    def function(rows: Tensor, ends: Tensor) -> Tensor:
        def loss(rows: Tensor) -> Tensor:
            out = attnfast.varlen_attention(rows, rows, rows, ends, ends, 4, 4, causal=True)
            return out.sin().sum()

        return grad(loss)(rows)

    each = mapped == "everything"
    found = vmap(function, in_dims=(0, 0 if each else None))(rows, ends if each else ends[0])
    for i in range(M):
        torch.testing.assert_close(found[i], function(rows[i], ends[i if each else 0]))


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("mapped", ["q", "all", "caches", "all but what all share"])
def test_decoding(mapped: str, paged: bool) -> None:
    x = {
        "q": torch.randn(M, 2, 4, 2, 8),
        "k_cache": torch.randn(M, *((5, 6, 2, 8) if paged else (2, 2, 12, 8))),
        "v_cache": torch.randn(M, *((5, 6, 2, 8) if paged else (2, 2, 12, 8))),
        "cache_seqlens": torch.randint(2, 12, (M, 2)),
        "bias": torch.randn(M, 4, 1, 12),
        "sinks": torch.randn(M, 4),
        "alibi_slopes": torch.rand(M, 4),
        "window": torch.randint(-1, 6, (M, 4, 2)),
    }
    if paged:
        x["page_table"] = torch.randint(0, 5, (M, 2, 2))
    which = {
        "q": ("q",),
        "all": tuple(x),
        "caches": ("k_cache", "v_cache"),
        "all but what all share": tuple(
            n for n in x if n not in ("sinks", "window") and not (paged and "_cache" in n)
        ),
    }[mapped]
    dims = {n: 0 if n in which else None for n in x}
    x = {n: t if dims[n] == 0 else t[0] for n, t in x.items()}
    wanted = {"return_lse": True, "return_received": True}
    assert_as_alone(lambda x: attnfast.decode_attention(**x, **wanted), x, dims)


def test_pooling() -> None:
    q, k = torch.randn(M, 2, 4, 5, 8), torch.randn(2, 2, 12, 8)

    def pool(q: Tensor) -> Tensor:
        return pooled("attention", Inputs(q, k, k), Options(0.3, causal=True), MEAN, 2, 3, "cpu")

    assert torch.equal(vmap(pool)(q), torch.stack([pool(x) for x in q]))
    assert vmap(pool)(q[:0]).shape == (0, 2, 4, 2, 3)


def test_no_calls_at_all() -> None:
    q = torch.randn(0, 2, 4, 5, 8)
    sinks = torch.randn(0, 4)
    assert vmap(attnfast.attention)(q, q, q).shape == q.shape
    assert vmap(lambda q, s: attnfast.attention(q, q, q, sinks=s))(q, sinks).shape == q.shape


def test_randomness_is_that_of_vmap() -> None:
    q, k, v = (torch.randn(2, 4, 5, 8) for _ in range(3))
    many = q.expand(M, *q.shape)

    def drop(q: Tensor) -> Tensor:
        return attnfast.attention(q, k, v, dropout_p=0.5)

    with pytest.raises(RuntimeError, match="randomness"):
        vmap(drop)(many)
    same = vmap(drop, randomness="same")(many)
    assert torch.equal(same[0], same[1])
    different = vmap(drop, randomness="different")(many)
    assert not torch.equal(different[0], different[1])
    seeds = torch.arange(2 * M).view(M, 2)

    def seeded(q: Tensor, seed: Tensor) -> Tensor:
        return attnfast.attention(q, k, v, dropout_p=0.5, dropout_seed=seed)

    found = vmap(seeded)(many, seeds)
    for i in range(M):
        assert torch.equal(found[i], seeded(q, seeds[i]))


def test_compiled() -> None:
    x = tensors()
    dims = dict.fromkeys(NAMES, 0)
    function = vmap(grad(call), in_dims=(dims,))
    found = torch.compile(function, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(found, function(x))


# Layers


def layer(**extras: Any) -> nn.Module:
    torch.manual_seed(0)
    return attnfast.MultiheadAttention(16, 4, batch_first=True, **extras)


EXTRAS = {"num_kv_heads": 2, "sinks": True, "alibi": True, "similarity": "cosine"}


@pytest.mark.parametrize(
    "extras", [{}, EXTRAS, {"add_bias_kv": True}], ids=["torch's", "all", "kv"]
)
def test_gradients_of_every_sample(extras: dict[str, Any]) -> None:
    module = layer(**extras)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    x, padding = torch.randn(6, 5, 16), torch.rand(6, 5) < 0.3

    def loss(parameters: dict[str, Tensor], x: Tensor, padding: Tensor) -> Tensor:
        x, padding = x[None], padding[None]
        out, weights = functional_call(
            module, parameters, (x, x, x), {"key_padding_mask": padding, "is_causal": True}
        )
        return out.square().sum() + weights.square().sum()

    found = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, padding)
    for i in range(6):
        expected = grad(loss)(parameters, x[i], padding[i])
        for name, g in expected.items():
            torch.testing.assert_close(found[name][i], g)


@pytest.mark.parametrize("extras", [{}, EXTRAS], ids=["torch's", "all"])
@pytest.mark.parametrize("grads", [False, True])
def test_ensembles(extras: dict[str, Any], grads: bool) -> None:
    models = [attnfast.MultiheadAttention(16, 4, batch_first=True, **extras) for _ in range(M)]
    for model in models:
        model.eval()
        for p in model.parameters():
            nn.init.normal_(p, std=0.3)
    parameters, buffers = stack_module_state(models)
    x = torch.randn(2, 5, 16)

    def run(parameters: Any, buffers: Any) -> Tensor:
        return functional_call(models[0], (parameters, buffers), (x, x, x))[0]

    with torch.set_grad_enabled(grads):
        found = vmap(run)(parameters, buffers)
        expected = torch.stack([model(x, x, x)[0] for model in models])
    torch.testing.assert_close(found, expected)
    if grads:
        found.sin().sum().backward()
        expected.sin().sum().backward()
        for i, model in enumerate(models):
            for name, p in model.named_parameters():
                torch.testing.assert_close(parameters[name].grad[i], p.grad)
