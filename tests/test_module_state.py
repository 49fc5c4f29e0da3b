"""What a layer holds: nothing derived is held twice, so that it may start on meta and be pruned."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnfast import KVCache, MultiheadAttention, replace, restore

B, T, S, E, H = 2, 5, 7, 32, 4
D = E // H
EXTRAS: dict[str, dict[str, Any]] = {
    "none": {},
    "apart": {"kdim": 12, "vdim": 10},
    "appended": {"add_bias_kv": True},
    "grouped": {"num_kv_heads": 2},
    "sinks": {"sinks": True},
    "cosine": {"similarity": "cosine"},
    "alibi": {"alibi": True},
    "all": {"num_kv_heads": 2, "sinks": True, "similarity": "cosine", "alibi": True},
}
over_extras = pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)


@pytest.fixture
def empty_is_nan() -> Iterator[None]:
    """Memory that nobody initialised is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def layer(**options: Any) -> MultiheadAttention:
    torch.manual_seed(0)
    return MultiheadAttention(E, H, **{"batch_first": True, **options})


def call(module: nn.Module) -> Tensor:
    torch.manual_seed(1)
    return module(
        torch.randn(B, T, module.embed_dim),
        torch.randn(B, S, 12 if "k_proj_weight" in module.state_dict() else module.embed_dim),
        torch.randn(B, S, 10 if "k_proj_weight" in module.state_dict() else module.embed_dim),
    )[0]


# Starting on the meta device.


@over_extras
def test_reset_parameters_initialises_all_that_torchs_does_not(
    extras: dict[str, Any], empty_is_nan: None
) -> None:
    with torch.device("meta"):
        module = layer(**extras)
    module.to_empty(device="cpu")
    for p in module.parameters():
        assert p.isnan().all()
    torch.manual_seed(0)
    module._reset_parameters()
    module.out_proj.reset_parameters()  # torch's leaves its weight to the module itself
    nn.init.zeros_(module.out_proj.bias)
    fresh = layer(**extras)
    for name, p in module.named_parameters():
        assert p.isfinite().all(), name
        if name in ("sinks", "log_temperature", "in_proj_bias"):
            assert torch.equal(p, fresh.get_parameter(name)), name
    assert call(module).isfinite().all()


def assigned(module: nn.Module, real: nn.Module) -> None:
    module.load_state_dict(real.state_dict(), assign=True)


def emptied(module: nn.Module, real: nn.Module) -> None:
    module.to_empty(device="cpu").load_state_dict(real.state_dict())


def one_by_one(module: nn.Module, real: nn.Module) -> None:
    """As loaders do that fill a model in while they read."""
    for name, p in real.named_parameters():
        owner, _, last = name.rpartition(".")
        setattr(module.get_submodule(owner), last, nn.Parameter(p.detach()))


def assigned_and_moved(module: nn.Module, real: nn.Module) -> None:
    assigned(module, real)
    module.to(torch.bfloat16).to(device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("load", [assigned, emptied, one_by_one, assigned_and_moved])
@over_extras
def test_nothing_stays_on_meta(
    extras: dict[str, Any], load: Callable[..., None], empty_is_nan: None
) -> None:
    real = layer(**extras)
    with torch.no_grad():
        for p in real.parameters():
            p.copy_(p.bfloat16())  # exact in both dtypes
    with torch.device("meta"):
        module = layer(**extras)
    assert {x.device.type for x in (*module.parameters(), *module.buffers())} == {"meta"}
    load(module, real)
    if load is not one_by_one:
        assert {x.device.type for x in (*module.parameters(), *module.buffers())} == {"cpu"}
    assert torch.equal(call(module), call(real))
    assert {x.device.type for x in (*module.parameters(), *module.buffers())} == {"cpu"}


def test_skip_init(empty_is_nan: None) -> None:
    module = nn.utils.skip_init(MultiheadAttention, E, H, batch_first=True, alibi=True)
    real = layer(alibi=True)
    assert torch.equal(module.alibi_slopes, real.alibi_slopes)
    module.load_state_dict(real.state_dict())
    assert torch.equal(call(module), call(real))


def test_slopes_of_ones_own_stay(empty_is_nan: None) -> None:
    """Whatever becomes of the parameters: they are what the module was given."""
    module = layer(alibi=True)
    slopes = torch.tensor([1.0, 0.5, 0.3, 0.1])
    module.alibi_slopes = slopes
    for changed in (module.bfloat16(), module.to_empty(device="cpu"), copy.deepcopy(module)):
        assert torch.equal(changed.alibi_slopes, slopes)
        assert changed.alibi_slopes.dtype == torch.float32


def test_alibi_set_later_has_slopes() -> None:
    module, real = layer(), layer(alibi=True)
    module.alibi = True
    assert torch.equal(call(module), call(real))
    assert not torch.equal(call(module), call(layer()))


# Pruning heads in place.


def kept(x: Tensor, heads: list[int], parts: int = 1) -> nn.Parameter:
    """The rows of some heads of each of several projections."""
    rows = x.detach().unflatten(0, (parts, -1, D))[:, heads]
    return nn.Parameter(rows.flatten(0, 2).clone())


def prune(module: nn.Module, heads: list[int]) -> nn.Module:
    """Keep some heads, and of the embedding as much: what a structured pruner does in place."""
    narrow = len(heads) * D
    if module.in_proj_weight is None:
        module.q_proj_weight = nn.Parameter(kept(module.q_proj_weight, heads)[:, :narrow])
        module.k_proj_weight = kept(module.k_proj_weight, heads)
        module.v_proj_weight = kept(module.v_proj_weight, heads)
    else:
        module.in_proj_weight = nn.Parameter(kept(module.in_proj_weight, heads, 3)[:, :narrow])
    module.in_proj_bias = kept(module.in_proj_bias, heads, 3)
    if module.bias_k is not None:
        module.bias_k, module.bias_v = (
            nn.Parameter(kept(x.flatten(), heads).view(1, 1, -1))
            for x in (module.bias_k, module.bias_v)
        )
    for name in ("sinks", "log_temperature", "alibi_slopes"):
        x = getattr(module, name, None)
        if x is not None:
            pruned = x.detach()[heads].clone()
            setattr(module, name, nn.Parameter(pruned) if name != "alibi_slopes" else pruned)
    weight = module.out_proj.weight.detach().unflatten(1, (-1, D))[:narrow, heads]
    module.out_proj.weight = nn.Parameter(weight.flatten(1).clone())
    module.out_proj.bias = nn.Parameter(module.out_proj.bias.detach()[:narrow].clone())
    module.embed_dim, module.num_heads = narrow, len(heads)
    return module


def filled(module: nn.Module) -> Any:
    """No parameter zero."""
    torch.manual_seed(2)
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    return module


def forwards(module: nn.Module, gradients: bool, **options: Any) -> list[Tensor]:
    """Self-attention, cross-attention, three inputs; where inputs may differ."""
    torch.manual_seed(3)
    x, y, z = (torch.randn(B, n, module.embed_dim) for n in (T, S, S))
    if module.in_proj_weight is None:
        inputs = [(x, torch.randn(B, S, 12), torch.randn(B, S, 10))]
    else:
        inputs = [(x, x, x), (x, y, y), (x, y, z)]
    with torch.set_grad_enabled(gradients):
        return [out for args in inputs for out in module(*args, **options) if out is not None]


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("options", [{}, {"kdim": 12, "vdim": 10}, {"add_bias_kv": True}], ids=str)
def test_a_pruned_layer_is_torchs(
    options: dict[str, Any], need_weights: bool, gradients: bool
) -> None:
    """Stale ``head_dim``, ``kdim`` and ``vdim`` are read by neither; replaced before or after."""
    theirs = filled(nn.MultiheadAttention(E, H, batch_first=True, **options))
    ours, late = copy.deepcopy(theirs), copy.deepcopy(theirs)
    replace(ours, verbose=False)
    for module in (theirs, ours, late):
        prune(module, [0, 2, 3])
    replace(late, verbose=False)
    expected = forwards(theirs, gradients, need_weights=need_weights)
    for module in (ours, late):
        actual = forwards(module, gradients, need_weights=need_weights)
        torch.testing.assert_close(actual, expected)
        restore(module)
        torch.testing.assert_close(forwards(module, gradients, need_weights=need_weights), expected)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", ["sinks", "cosine", "alibi"])
def test_extras_are_pruned_with_the_heads(name: str, gradients: bool) -> None:
    """Heads that stay compute what they did: slopes are theirs, not those of fewer heads."""
    heads = [0, 2, 3]
    whole = filled(layer(**EXTRAS[name]))
    with torch.no_grad():  # the part of the embedding that goes is not read, nor the head
        whole.in_proj_weight[:, 3 * D :] = 0
        whole.out_proj.weight[:, D : 2 * D] = 0
    pruned = prune(copy.deepcopy(whole), heads).to("cpu")
    x = torch.randn(B, T, E)
    narrow = x[..., : 3 * D].contiguous()
    with torch.set_grad_enabled(gradients):
        expected = whole(x, x, x)[0][..., : 3 * D]
        torch.testing.assert_close(pruned(narrow, narrow, narrow)[0], expected)
        nested = torch.nested.nested_tensor(list(narrow), layout=torch.jagged)
        rows = pruned(nested, nested, nested, need_weights=False)[0].values()
        torch.testing.assert_close(rows, expected.flatten(0, 1))
        if not gradients:
            cache = KVCache()
            pieces = [
                pruned(t, t, t, is_causal=True, need_weights=False, kv_cache=cache)[0]
                for t in narrow.split(1, 1)
            ]
            whole_causal = whole(x, x, x, is_causal=True)[0][..., : 3 * D]
            torch.testing.assert_close(torch.cat(pieces, 1), whole_causal)
    pruned.alibi_slopes = whole.alibi_slopes
    pruned.sinks = whole.sinks
    if name != "cosine":
        with pytest.raises(ValueError, match=r"(alibi_slopes|sinks) must be .*\(3,\)"):
            pruned(narrow, narrow, narrow)


@pytest.mark.parametrize(
    ("queries", "keys", "num_kv_heads"),
    [([0, 2], [0, 1], 2), ([0, 1], [0], 1), ([2], [1], 1)],
    ids=["one of each group", "one group", "one head"],
)
def test_grouped_heads_are_counted_by_the_weights(
    queries: list[int], keys: list[int], num_kv_heads: int
) -> None:
    """Query heads or whole groups go; the layer is the one built that small."""
    module = filled(layer(num_kv_heads=2))
    q, k, v = (x.unflatten(0, (-1, D)) for x in module.in_proj_weight.split((E, 2 * D, 2 * D)))
    qb, kb, vb = (x.unflatten(0, (-1, D)) for x in module.in_proj_bias.split((E, 2 * D, 2 * D)))
    narrow = len(queries) * D
    small = MultiheadAttention(narrow, len(queries), batch_first=True, num_kv_heads=num_kv_heads)
    with torch.no_grad():
        weight = torch.cat([q[queries], k[keys], v[keys]])[..., :narrow].flatten(0, 1)
        small.in_proj_weight.copy_(weight)
        small.in_proj_bias.copy_(torch.cat([qb[queries], kb[keys], vb[keys]]).flatten())
        out = module.out_proj.weight.unflatten(1, (-1, D))[:narrow, queries].flatten(1)
        small.out_proj.weight.copy_(out)
        small.out_proj.bias.copy_(module.out_proj.bias[:narrow])
    module.in_proj_weight = copy.deepcopy(small.in_proj_weight)
    module.in_proj_bias = copy.deepcopy(small.in_proj_bias)
    module.out_proj = copy.deepcopy(small.out_proj)
    module.embed_dim, module.num_heads = narrow, len(queries)
    assert module.num_kv_heads == num_kv_heads
    for gradients in (True, False):
        assert all(map(torch.equal, forwards(module, gradients), forwards(small, gradients)))


def test_sizes_that_do_not_fit_are_named() -> None:
    x = torch.randn(B, T, E)
    module = layer()
    module.num_heads = 3
    with pytest.raises(ValueError) as raised:
        module(x, x, x)
    assert str(raised.value) == (
        "MultiheadAttention: embed_dim must be a multiple of num_heads, 3, got 32"
    )
    module.num_heads = H
    module.in_proj_weight = nn.Parameter(module.in_proj_weight[: E + 6].detach())
    module.in_proj_bias = None
    for key in (x, x[:, :3]):
        with pytest.raises(ValueError) as raised:
            module(x, key, key)
        assert str(raised.value) == (
            "MultiheadAttention: in_proj_weight must be ((H + 2 H_kv) D, E) for embed_dim 32 and "
            "4 heads, got (38, 32)"
        )
