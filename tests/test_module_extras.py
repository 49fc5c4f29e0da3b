"""The extras of MultiheadAttention against their formulas, written out densely in fp64."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from modules import random_mask
from torch import Tensor, nn

from attnfast import AttentionStats, MultiheadAttention, replace, restore

B, T, E, H = 2, 7, 24, 6

EXTRAS: dict[str, dict[str, Any]] = {
    "grouped": {"num_kv_heads": 2},
    "one key head": {"num_kv_heads": 1},
    "window": {"window": (2, 1)},
    "window to the left": {"window": (3, None)},
    "windows of heads": {
        "num_kv_heads": 2,
        "window": torch.tensor([[2, 1], [-1, 0], [0, -1], [-1, -1], [3, 3], [0, 0]]),
    },
    "softcap": {"softcap": 0.7},
    "sinks": {"sinks": True},
    "alibi": {"alibi": True},
    "cosine": {"similarity": "cosine"},
    "all": {
        "num_kv_heads": 3,
        "window": (3, 0),
        "softcap": 2.0,
        "sinks": True,
        "alibi": True,
        "similarity": "cosine",
    },
}
over_extras = pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)


def layer(dtype: torch.dtype = torch.float64, **options: Any) -> MultiheadAttention:
    torch.manual_seed(0)
    made = MultiheadAttention(E, H, **{"batch_first": True, "dtype": dtype, **options})
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(std=0.2)
    return made


def dense(
    module: MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, causal: bool
) -> tuple[Tensor, Tensor]:
    """Output and weights per head, from the parameters and the options alone."""
    groups, D = module.num_heads // module.num_kv_heads, module.head_dim
    sizes = [E, module.num_kv_heads * D, module.num_kv_heads * D]
    if module.in_proj_weight is not None:
        weights = module.in_proj_weight.split(sizes)
    else:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.split(sizes)
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (-1, D)).transpose(1, 2)
        for x, w, b in zip((query, key, value), weights, biases, strict=True)
    )
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.mT / math.sqrt(D)
    if module.similarity == "cosine":
        cosine = q @ k.mT / (q.norm(dim=-1)[..., None] * k.norm(dim=-1)[..., None, :])
        scores = cosine * module.log_temperature.exp().clamp(max=100)[:, None, None]
    if module.softcap:
        scores = module.softcap * torch.tanh(scores / module.softcap)
    ahead = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None]
    if module.alibi:
        slopes = 2.0 ** torch.tensor([-2.0, -4.0, -6.0, -8.0, -1.0, -3.0])  # of 6 heads
        scores = scores - slopes[:, None, None] * ahead.abs()
    hidden = torch.zeros(module.num_heads, *ahead.shape, dtype=torch.bool)
    if causal:
        hidden |= ahead > 0
    pair = [-1 if side is None else side for side in module._window or (None, None)]
    for h, of_head in enumerate(hidden):
        left, right = pair if module.windows is None else module.windows[h].tolist()
        of_head |= (left >= 0) & (ahead < -left) | (right >= 0) & (ahead > right)
    scores = scores.masked_fill(hidden, -torch.inf)
    if module.sinks is not None:
        sink = module.sinks[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], -1)
    p = scores.softmax(-1)[..., : k.shape[2]]
    return module.out_proj((p @ v).transpose(1, 2).flatten(-2)), p


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("causal", [False, True])
@over_extras
def test_each_extra_is_its_formula(extras: dict[str, Any], causal: bool, backend: str) -> None:
    """Output, weights, and the gradients of the inputs and of every parameter.

    fp64 has to be equal; fp32 no further from fp64 than twice what `dense` is in fp32.
    """
    dtype = torch.float64 if backend == "reference" else torch.float32
    module = layer(dtype, **extras, backend=backend)
    exact = copy.deepcopy(module).double()

    def both_kinds(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return module(x, y, y, is_causal=causal, average_attn_weights=False)

    for shared in (True, False):
        x = torch.randn(B, T, E, dtype=dtype)
        y = x if shared else torch.randn(B, T + 2, E, dtype=dtype)
        got = differentiated(both_kinds, module, x, y)
        got["mean"] = module(x, y, y, is_causal=causal)[1]
        truth, eager = (
            differentiated(lambda x, y, m=m: dense(m, x, y, y, causal), m, x, y)
            for m in (exact, copy.deepcopy(module))
        )
        for want in (truth, eager):
            want["mean"] = want["weights"].mean(1)
        assert got.keys() == truth.keys()
        for name, want in truth.items():
            assert want.abs().sum() > 0, name
            if dtype == torch.float64:
                torch.testing.assert_close(got[name], want, msg=lambda m, n=name: f"{n}: {m}")
                continue
            error, baseline = ((r[name] - want).abs().max() for r in (got, eager))
            unit = torch.finfo(dtype).eps * want.abs().max()
            assert error <= 2 * baseline + 4 * unit, name


def differentiated(attend: Any, module: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Output, weights and the gradients of a sum of squares, in the module's dtype."""
    dtype = next(module.parameters()).dtype
    shared = x is y
    x = x.to(dtype).requires_grad_()
    leaves = {"x": x}
    if not shared:
        y = leaves["y"] = y.to(dtype).requires_grad_()
    leaves |= dict(module.named_parameters())
    out, weights = attend(x, x if shared else y)
    grads = torch.autograd.grad(out.square().sum(), [*leaves.values()])
    named = {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    results = {"out": out, "weights": weights} | named
    return {name: result.detach() for name, result in results.items()}


@pytest.mark.parametrize("appends", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("kdim", "vdim"), [(None, None), (7, 5)])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("relation", ["self", "shared", "apart"])
def test_grouped_heads_are_repeated_heads(
    relation: str, batch_first: bool, kdim: int | None, vdim: int | None, bias: bool, appends: bool
) -> None:
    """Torch's module with the shared heads written out gives the same."""
    if kdim and relation != "apart":
        return
    common = {
        "bias": bias,
        "add_bias_kv": appends,
        "kdim": kdim,
        "vdim": vdim,
        "batch_first": batch_first,
    }
    ours = layer(num_kv_heads=2, **common)
    theirs = nn.MultiheadAttention(E, H, dtype=torch.float64, **common)
    D = E // H

    def repeated(x: Tensor) -> Tensor:
        return x.unflatten(0, (2, D)).repeat_interleave(H // 2, 0).flatten(0, 1)

    state = {}
    for name, x in ours.state_dict().items():
        if name.startswith("in_proj"):
            q, k, v = x.split([E, 2 * D, 2 * D])
            x = torch.cat([q, repeated(k), repeated(v)])
        elif name in ("k_proj_weight", "v_proj_weight"):
            x = repeated(x)
        elif name in ("bias_k", "bias_v"):
            x = repeated(x[0, 0])[None, None]
        state[name] = x
    theirs.load_state_dict(state)

    def sequence(length: int, features: int) -> Tensor:
        shape = (B, length) if batch_first else (length, B)
        return torch.randn(*shape, features, dtype=torch.float64)

    x = sequence(T, E)
    y = x if relation == "self" else sequence(4, kdim or E)
    z = y if relation in ("self", "shared") else sequence(4, vdim or E)
    torch.testing.assert_close(ours(x, y, z), theirs(x, y, z))
    torch.testing.assert_close(ours.eval()(x, y, z), theirs(x, y, z))


@pytest.mark.parametrize("heads", [1, 2, 6, 8, 12])
def test_alibi_slopes_are_those_of_the_paper(heads: int) -> None:
    known = {
        1: [8.0],
        2: [4.0, 8.0],
        6: [2.0, 4.0, 6.0, 8.0, 1.0, 3.0],
        8: [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
        12: [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 0.5, 1.5, 2.5, 3.5],
    }
    module = MultiheadAttention(2 * heads, heads, alibi=True)
    torch.testing.assert_close(module.alibi_slopes, 2.0 ** -torch.tensor(known[heads]))


def test_alibi_slopes_stay_exact() -> None:
    """In fp32 whatever the parameters become, and right after a start on the meta device."""
    module = MultiheadAttention(E, H, alibi=True, batch_first=True)
    slopes = module.alibi_slopes.clone()
    assert torch.equal(module.bfloat16().alibi_slopes, slopes)
    x = torch.randn(B, T, E, dtype=torch.bfloat16)
    assert module(x, x, x)[0].dtype == torch.bfloat16
    late = MultiheadAttention(E, H, alibi=True, device="meta")
    assert late.alibi_slopes.device.type == "meta"
    assert torch.equal(late.to_empty(device="cpu").alibi_slopes, slopes)
    assert "alibi_slopes" not in module.state_dict()


def test_windows_of_heads_stay_what_they_are() -> None:
    """Int32 on the parameters' device, also right after a start on the meta device; not saved."""
    given = EXTRAS["windows of heads"]["window"]
    module, late = layer(window=given), layer(window=given, device="meta")
    for changed in (module, module.bfloat16(), copy.deepcopy(module), late.to_empty(device="cpu")):
        assert changed.window.dtype == torch.int32
        assert torch.equal(changed.window, given.int())
    assert module.to("meta").window.is_meta
    assert "windows" not in module.state_dict()


def test_windows_may_change_at_any_time() -> None:
    given = EXTRAS["windows of heads"]["window"]
    module, x = layer(), torch.randn(B, T, E, dtype=torch.float64)
    plain = module(x, x, x)[0]
    module.window = (1, 1)
    near = module(x, x, x)[0]
    module.window = torch.ones_like(given)
    assert module.extra_repr() == "window='of each head'"
    torch.testing.assert_close(module(x, x, x)[0], near)
    module.window[:] = -1
    torch.testing.assert_close(module(x, x, x)[0], plain)
    module.window = (1, 1)
    assert module.windows is None
    torch.testing.assert_close(module(x, x, x)[0], near)
    module.window = None
    assert torch.equal(module(x, x, x)[0], plain)


def test_cosine_sees_directions_only() -> None:
    module = layer(similarity="cosine", bias=False)
    x = torch.randn(B, T, E, dtype=torch.float64)
    weights = module(x, x, x)[1]
    with torch.no_grad():
        module.in_proj_weight[: 2 * E] *= 17
    torch.testing.assert_close(module(x, x, x)[1], weights)


def test_the_temperature_starts_at_10_and_ends_at_100() -> None:
    module = MultiheadAttention(E, H, similarity="cosine", batch_first=True)
    torch.testing.assert_close(module.log_temperature.exp(), torch.full((H,), 10.0))
    x = torch.randn(B, T, E)

    def weights(log_temperature: float) -> Tensor:
        nn.init.constant_(module.log_temperature, log_temperature)
        return module(x, x, x)[1]

    assert torch.equal(weights(9.0), weights(math.log(100) + 1e-3))
    assert not torch.equal(weights(4.5), weights(9.0))
    weights(9.0).square().sum().backward()
    assert (module.log_temperature.grad == 0).all()


def test_state_dicts() -> None:
    """Those of torch, with sinks and temperatures added; checkpoints go both ways."""
    stock = nn.MultiheadAttention(E, H)
    plain = MultiheadAttention(E, H, window=(1, 1), softcap=2.0, alibi=True, collect_stats=True)
    assert list(plain.state_dict()) == list(stock.state_dict())
    plain.load_state_dict(stock.state_dict())
    stock.load_state_dict(plain.state_dict())
    extended = MultiheadAttention(E, H, sinks=True, similarity="cosine")
    assert set(extended.state_dict()) - set(stock.state_dict()) == {"sinks", "log_temperature"}
    assert (extended.sinks == 0).all()
    missing = extended.load_state_dict(stock.state_dict(), strict=False)
    assert missing.missing_keys == ["sinks", "log_temperature"]


def test_options_of_the_factory_reach_the_extras() -> None:
    module = MultiheadAttention(
        E, H, num_kv_heads=2, sinks=True, similarity="cosine", dtype=torch.bfloat16, device="meta"
    )
    assert {(p.dtype, p.device.type) for p in module.parameters()} == {(torch.bfloat16, "meta")}


@over_extras
def test_each_extra_compiles_whole(extras: dict[str, Any]) -> None:
    module = layer(torch.float32, **extras, collect_stats=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(B, T, E, requires_grad=True)
    padding = random_mask(B, T)

    def run(f: Any) -> list[Tensor]:
        out = f(x, x, x, key_padding_mask=padding, need_weights=False, is_causal=True)[0]
        loss = out.square().sum() - module.stats.entropy.mean()
        return [out, module.stats.breadth, *torch.autograd.grad(loss, [x, *module.parameters()])]

    torch.testing.assert_close(run(compiled), run(module))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@over_extras
def test_extras_survive_copies_and_training(extras: dict[str, Any], copied: Any) -> None:
    module = layer(torch.float32, **extras)
    twin = copied(module)
    x = torch.randn(B, T, E)
    torch.testing.assert_close(twin(x, x, x), module(x, x, x), rtol=0, atol=0)
    assert repr(twin) == repr(module)


def test_the_representation_shows_what_is_not_torchs() -> None:
    assert MultiheadAttention(E, H).extra_repr() == ""
    shown = MultiheadAttention(E, H, num_kv_heads=2, window=(3, None), sinks=True, backend="cpu")
    assert shown.extra_repr() == ("num_kv_heads=2, window=(3, None), backend='cpu', sinks=True")


# Statistics.


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("appends", [False, True])
@pytest.mark.parametrize("kind", [True, "received"])
def test_statistics_are_those_of_the_weights(
    kind: bool | str, appends: bool, need_weights: bool
) -> None:
    module = layer(collect_stats=kind, add_bias_kv=appends, add_zero_attn=appends)
    x = torch.randn(B, T, E, dtype=torch.float64)
    out = module(x, x, x, need_weights=need_weights)[0]
    stats = module.stats
    assert isinstance(stats, AttentionStats)
    module.collect_stats = False
    expected, p = module(x, x, x, average_attn_weights=False)
    assert module.stats is stats  # of the last call that collected
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(stats.entropy, torch.special.entr(p).sum(-1))
    torch.testing.assert_close(stats.focus, p.amax(-1))
    if kind == "received":
        torch.testing.assert_close(stats.received, p.sum(2))
    else:
        assert stats.received is None


def test_entropy_trains() -> None:
    module = layer(torch.float32, collect_stats=True)
    x = torch.randn(B, T, E)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    seen = []
    for _ in range(5):
        module(x, x, x, need_weights=False)
        entropy = module.stats.entropy.mean()
        seen.append(entropy.item())
        optimizer.zero_grad()
        (-entropy).backward()
        optimizer.step()
    assert seen == sorted(seen)
    assert seen[-1] > seen[0] + 0.1


def test_statistics_of_an_unbatched_call() -> None:
    module = layer(collect_stats="received", batch_first=False)
    x = torch.randn(T, E, dtype=torch.float64)
    module(x, x, x)
    assert module.stats.entropy.shape == (H, T)
    assert module.stats.received.shape == (H, T)


def test_statistics_are_not_copied() -> None:
    module = layer(torch.float32, collect_stats=True)
    x = torch.randn(B, T, E, requires_grad=True)
    module(x, x, x)
    assert module.stats.entropy.requires_grad
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin.stats is None
        assert twin.collect_stats is True
    assert module.stats is not None


def test_statistics_of_a_replaced_model() -> None:
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(E, H, 32, batch_first=True, dropout=0.0), 2
    ).eval()
    replace(model)
    for block in model.layers:
        block.self_attn.collect_stats = True
    with torch.inference_mode():
        model(torch.randn(B, T, E))
    assert all(block.self_attn.stats.breadth.shape == (B, H, T) for block in model.layers)
    restore(model)
    assert "stats" not in vars(model.layers[0].self_attn)


# Errors.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_kv_heads": 4}, ValueError, "num_kv_heads must be a divisor of num_heads, 6, got 4"),
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads must be from 1 to 2147483647, got 0"),
        ({"num_kv_heads": 2.0}, TypeError, "num_kv_heads must be an int, got 2.0"),
        (
            {"window": 3},
            TypeError,
            "window must be None, (left, right), each None or an int, or an int32 Tensor (H, 2), "
            "(3, 3) or (3, 0) for example, got 3",
        ),
        ({"window": (1, 2, 3)}, ValueError, "window must be (left, right), got 3 entries"),
        ({"window": torch.ones(6, 2)}, TypeError, "window must be int32, got torch.float32"),
        (
            {"window": torch.ones(4, 2).int()},
            ValueError,
            "window must be (H, 2) = (6, 2), got (4, 2)",
        ),
        (
            {"window": (-1, 0)},
            ValueError,
            "window's left side must be from 0 to 2147483647, or None for no bound, got -1",
        ),
        (
            {"softcap": 0.0},
            ValueError,
            "softcap must be a number above 0 and finite in float32, or None for no cap, got 0.0",
        ),
        ({"similarity": "l2"}, ValueError, "similarity must be one of ['dot', 'cosine'], got 'l2'"),
        (
            {"collect_stats": "all"},
            ValueError,
            "collect_stats must be one of [False, True, 'received'], got 'all'",
        ),
        (
            {"backend": "opencl"},
            ValueError,
            "backend must be one of ('auto', 'cpu', 'triton', 'gluon', 'cuda', 'reference'), got "
            "'opencl'",
        ),
        (
            {"backend": torch.nn.Parameter(torch.zeros(()))},
            TypeError,
            "backend must be a str, got Parameter",
        ),
        ({"deterministic": 1}, TypeError, "deterministic must be None or True or False, got 1"),
        (
            {"sinks": torch.zeros(2)},
            TypeError,
            "sinks must be True or False, got Tensor of shape (2,)",
        ),
        (
            {"window": (1, 1), "add_bias_kv": True},
            ValueError,
            "window must not be combined with add_bias_kv or add_zero_attn, whose keys have no "
            "position",
        ),
        (
            {"alibi": True, "add_zero_attn": True},
            ValueError,
            "alibi must not be combined with add_bias_kv or add_zero_attn, whose keys have no "
            "position",
        ),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        MultiheadAttention(E, H, **options)
    assert str(raised.value) == f"MultiheadAttention: {message}"


def test_a_window_set_later_is_checked_too() -> None:
    module = layer(add_bias_kv=True)
    module.window = (1, 1)
    x = torch.randn(B, T, E, dtype=torch.float64)
    with pytest.raises(ValueError, match="window must not be combined with add_bias_kv"):
        module(x, x, x)


def test_restore_removes_what_extras_need() -> None:
    model = nn.ModuleDict({"a": nn.MultiheadAttention(E, H)})
    before = [sorted(vars(m)) for m in model.modules()], [*model.a._parameters], [*model.a._buffers]
    replace(model)
    model.a.window, model.a.collect_stats = torch.ones(H, 2, dtype=torch.int32), True
    x = torch.randn(T, B, E)
    model.a(x, x, x)
    restore(model)
    after = [sorted(vars(m)) for m in model.modules()], [*model.a._parameters], [*model.a._buffers]
    assert after == before
    for training, need in itertools.product((True, False), repeat=2):
        model.train(training)
        assert model.a(x, x, x, need_weights=need)[0].shape == x.shape
