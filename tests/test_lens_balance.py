"""attnfast.lens.BalanceLoss: the entropy's band, as a loss, is what dense attention in fp64 has."""

from __future__ import annotations

import math
from typing import Any

import accuracy
import pytest
import torch
from dense import Cotangents, Trial
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import attnfast
from attnfast import lens, watching
from attnfast.call import Inputs, Options
from attnfast.integrations import sdpa

B, T, E, H, H_KV, D = 3, 20, 32, 4, 2, 8


def encoder(**options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, H, 48, batch_first=True, dropout=0.0, **options)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0 + torch.rand_like(parameter))
    attnfast.replace(model, verbose=False)
    return model


def padding() -> Tensor:
    masked = torch.zeros(B, T, dtype=torch.bool)
    masked[0, 15:] = True
    masked[2, 4:] = True
    return masked


class Attends(nn.Module):
    """One call, without a layer."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attnfast.attention(q, k, v, **self.options)


def entropies(q: Tensor, k: Tensor, allowed: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """(B, H, T) of dense attention in fp64."""
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q.double() @ k.mT * q.shape[3] ** -0.5 + bias
    p = scores.masked_fill(~allowed, -torch.inf).softmax(3).nan_to_num()
    return torch.special.entr(p).sum(3)


def cost(
    entropy: Tensor, real: Tensor, low: Tensor | float, high: Tensor | float
) -> tuple[Tensor, Tensor]:
    """The mean distance to the band and its gradient by the entropy, from their definition."""
    apart = (low - entropy).clamp(min=0) + (entropy - high).clamp(min=0)
    sign = (entropy > high).double() - (entropy < low).double()
    real = real.expand(entropy.shape)
    return apart[real].mean(), torch.where(real, sign, 0.0) / real.sum()


@pytest.mark.parametrize("unit", ["nats", "share"])
@pytest.mark.parametrize("kind", ["padding", "causal window", "bias", "keys of a list"])
def test_gradients_are_those_of_dense_attention(unit: str, kind: str) -> None:
    torch.manual_seed(1)
    q, k, v = (torch.randn(B, heads, T, D) * 2 for heads in (H, H_KV, H_KV))
    inputs, options = Inputs(q, k, v), Options(scale=D**-0.5, stats=1)
    asked: dict[str, Any] = {}
    t, s = torch.arange(T)[:, None], torch.arange(T)
    allowed, real = torch.ones(B, 1, T, T, dtype=torch.bool), torch.ones(B, 1, T).bool()
    bias: Any = 0.0
    if kind == "padding":
        asked["mask"] = ~padding()[:, None, None]
        inputs = inputs._replace(mask=asked["mask"])
        allowed, real = allowed & asked["mask"], real & ~padding()[:, None]
    elif kind == "causal window":
        asked = {"causal": True, "window": (6, None)}
        options = options._replace(causal=True, window_left=6)
        allowed = allowed & (s <= t) & (s >= t - 6)
    elif kind == "bias":
        bias = torch.randn(1, H, T, T).masked_fill(torch.rand(1, H, T, T) < 0.3, -torch.inf)
        bias[:, :, 5] = -torch.inf  # queries without keys
        asked["bias"] = bias
        inputs = inputs._replace(bias=bias)
        allowed = allowed & (bias != -torch.inf)
        real = allowed.any(3)
    else:
        lists = torch.stack([torch.randperm(T)[:7] for _ in range(B * T)]).view(B, 1, T, 7)
        asked["indices"] = lists[:, 0].int()
        inputs = inputs._replace(indices=lists.int())
        allowed = torch.zeros(B, 1, T, T, dtype=torch.bool).scatter(3, lists, True)
    entropy, keys = entropies(q, k, allowed, bias), allowed.sum(3).double()
    log_keys = keys.log() if unit == "share" else torch.ones(B, 1, T, dtype=torch.float64)
    some = real.expand(entropy.shape) & (keys > 1)
    heads = [(entropy / log_keys)[:, h][some[:, h]] for h in range(H)]
    floor = torch.stack([x.quantile(0.3, interpolation="midpoint") for x in heads]).float()
    floor[2] = -torch.inf
    ceiling = heads[2].quantile(0.7, interpolation="midpoint").item()
    model = Attends(**asked)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    with lens.BalanceLoss(model, floor=floor, ceiling=ceiling, unit=unit, weight=0.5) as balance:
        out = model(*leaves)
        loss = balance()
    loss.backward()

    low, high = (x * log_keys.where(real, 0) for x in (floor.nan_to_num().view(-1, 1), ceiling))
    low = low.where(floor.isfinite().view(-1, 1), -torch.inf)
    expected, cotangent = cost(entropy, real, low, high)
    shares = (cotangent != 0).double().mean((0, 2))
    assert shares.min() > 0.05  # every head is partly beyond the band, partly within
    assert shares.max() < 0.95
    torch.testing.assert_close(loss.double(), 0.5 * expected, atol=1e-6, rtol=1e-5)
    _, lse, stats = attnfast.attention(q, k, v, **asked, return_lse=True, return_stats=True)
    results = {"out": out.detach(), "lse": lse}
    results |= {name: getattr(stats, name) for name in accuracy.STATISTICS}
    results |= {f"d{n}": x.grad for n, x in zip("qkv", leaves, strict=True)}
    if kind == "bias":
        results["dbias"] = bias_gradient(model, q, k, v, floor, ceiling, unit)
    accuracy.check(results, Trial(inputs, options, Cotangents(entropy=0.5 * cotangent)))


def bias_gradient(model: Attends, q: Tensor, k: Tensor, v: Tensor, *band: Any) -> Tensor:
    floor, ceiling, unit = band
    model.options["bias"] = model.options["bias"].clone().requires_grad_()
    with lens.BalanceLoss(model, floor=floor, ceiling=ceiling, unit=unit, weight=0.5) as balance:
        model(q, k, v)
        balance().backward()
    return model.options["bias"].grad


def test_a_replaced_model_with_padding_beside_an_observation() -> None:
    model, x = encoder(), torch.randn(B, T, E)
    layers = [layer.self_attn for layer in model.layers]
    for layer in layers:
        layer.collect_stats = True
    with lens.BalanceLoss(model, floor=2.4, weight=2.0) as balance, lens.observe(model) as seen:
        with lens.BalanceLoss(model, ceiling=2.0) as other:
            model(x, src_key_padding_mask=padding())
            high = other()
        low = balance()
        model(x)
        model(x[:1])  # accumulated
        both = balance()
        rows = torch.cat([layer.stats.entropy.flatten() for layer in layers])
    assert not watching.now
    assert seen.table()["queries"].max() == int((~padding()).sum()) + B * T + T
    entropy = torch.cat([layer.stats.entropy for layer in layers])
    assert torch.equal(rows, entropy.flatten())
    model(x, src_key_padding_mask=padding())
    entropy = torch.stack([layer.stats.entropy for layer in layers])
    real = (~padding())[:, None].expand(entropy.shape)
    torch.testing.assert_close(low, 2 * (2.4 - entropy)[real].clamp(min=0).mean())
    torch.testing.assert_close(high, (entropy - 2.0)[real].clamp(min=0).mean())
    model(x)
    whole = torch.stack([layer.stats.entropy for layer in layers])
    parts = torch.cat([whole.flatten(), whole[:, :1].flatten()])
    torch.testing.assert_close(both, 2 * (2.4 - parts).clamp(min=0).mean())
    low.backward()  # of the first forward, others having run since
    assert all(layer.in_proj_weight.grad[: 2 * E].abs().sum() > 0 for layer in layers)
    assert all(layer.stats.entropy.requires_grad for layer in layers)


def test_inside_the_band_there_is_no_gradient() -> None:
    model, x = encoder(), torch.randn(B, T, E)
    with lens.BalanceLoss(model, floor=0.0, ceiling=1.0, unit="share") as balance:
        model(x)
        loss = balance()
    loss.backward()
    assert loss < 1e-6  # rows nearly even, rounded
    weights = model.layers[0].self_attn.in_proj_weight
    assert torch.count_nonzero(weights.grad) == 0


def test_schedules_and_steps() -> None:
    model, x = encoder(), torch.randn(1, T, E)

    def losses(steps: int, **options: Any) -> list[float]:
        with lens.BalanceLoss(model, floor=9.0, **options) as balance:
            found = []
            for _ in range(steps):
                model(x)
                found.append(balance().item())
            with torch.no_grad():
                model(x)
                assert balance() == 0
            assert balance.step == steps
        return found

    (whole,) = losses(1)
    assert losses(4, schedule=lambda step: step * 2.0) == pytest.approx(
        [0, 2 * whole, 4 * whole, 6 * whole]
    )
    rising = [whole / 4, whole / 2, 3 * whole / 4, whole, whole]
    assert losses(5, schedule=(4, None)) == pytest.approx(rising)
    assert losses(5, schedule=(2, 4)) == pytest.approx([whole / 2, whole, whole, whole / 2, 0])
    with lens.BalanceLoss(model, floor=9.0, schedule=(4, None)) as balance:
        balance.step = 1
        model(x)
        assert balance().item() == pytest.approx(whole / 2)


def gradients(model: nn.Module, run: Any) -> list[Tensor]:
    model.zero_grad()
    with lens.BalanceLoss(model, floor=2.9, unit="nats") as balance:
        out = run()
        (out.square().mean() + balance()).backward()
    return [p.grad.clone() for p in model.parameters()]


def test_checkpointing() -> None:
    model, x = encoder(), torch.randn(B, T, E, requires_grad=True)
    plain = gradients(model, lambda: model(x))
    layers = list(model.layers)
    for layer in layers:  # within the model's forward
        forward = layer.forward
        layer.forward = lambda *args, f=forward, **kw: checkpoint(
            f, *args, use_reentrant=False, **kw
        )
    for got, want in zip(gradients(model, lambda: model(x)), plain, strict=True):
        torch.testing.assert_close(got, want)
    said = r"checkpoint\(..., use_reentrant=True\) runs the forward of 'layers.1.self_attn' without"
    for layer in layers:
        inner = type(layer).forward.__get__(layer)
        layer.forward = lambda x, *_, f=inner, **__: checkpoint(f, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match=said):
        gradients(model, lambda: model(x))


class Recomputing(nn.Module):
    """Checkpoints a call that is in no module of its own."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.reentrant = reentrant

    def forward(self, q: Tensor) -> Tensor:
        q = q * self.weight
        return checkpoint(attnfast.attention, q, q, q, use_reentrant=self.reentrant)


def test_checkpointing_of_a_function() -> None:
    q = torch.randn(B, H, T, D)
    model = Recomputing(reentrant=False)
    (got,) = gradients(model, lambda: model(q))
    plain = Attends()
    x = q.requires_grad_()
    with lens.BalanceLoss(plain, floor=2.9) as balance:
        out = plain(x, x, x)
        (out.square().mean() + balance()).backward()
    torch.testing.assert_close(got, (x.grad * q.detach()).sum())
    model = Recomputing(reentrant=True)
    with pytest.raises(RuntimeError, match=r"use_reentrant=True\) runs the forward of ''"):
        gradients(model, lambda: model(q))


def test_compiled_models() -> None:
    model = encoder()
    x = torch.randn(B, T, E)
    plain = gradients(model, lambda: model(x))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    for got, want in zip(gradients(model, lambda: compiled(x)), plain, strict=True):
        torch.testing.assert_close(got, want)
    with lens.BalanceLoss(model, floor=2.9) as balance, lens.observe(model):
        compiled(x)
        first = balance()
        before = counter.frame_count
        for _ in range(3):
            compiled(x)
            torch.testing.assert_close(balance(), first)
        assert counter.frame_count == before
    compiled(x)  # nobody watches: another program
    assert counter.frame_count > before


class Calls(nn.Module):
    """Attention without a layer of ours: torch's function."""

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True)


def test_callers_of_torchs_function() -> None:
    q, k = (torch.randn(B, H, T, D, requires_grad=True) for _ in range(2))
    causal = torch.ones(T, T, dtype=torch.bool).tril().expand(B, H, T, T)
    model = Calls()
    sdpa.activate()
    with lens.BalanceLoss(model, floor=1.5) as balance:
        model(q, k)
        loss = balance()
    sdpa.restore()
    expected, _ = cost(entropies(q, k, causal), torch.ones(B, 1, T).bool(), 1.5, math.inf)
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-5)
    loss.backward()
    assert q.grad is not None
    assert q.grad.abs().sum() > 0


def test_a_model_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    from attnfast.integrations import transformers as ours

    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=E, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=H, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    config._attn_implementation = ours.register()
    model = transformers.LlamaForCausalLM(config).train()
    real = torch.ones(B, T, dtype=torch.long)
    real[0, :9] = 0  # padded on the left
    ids = torch.randint(40, (B, T))
    with lens.BalanceLoss(model, floor=3.0) as balance, lens.observe(model) as seen:
        model(ids, attention_mask=real)
        loss = balance()
    ours.unregister()
    loss.backward()
    means = torch.tensor(seen.table()["entropy"].to_numpy())
    torch.testing.assert_close(loss.double(), 3.0 - means.mean(), atol=1e-5, rtol=1e-5)
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_errors() -> None:
    model = encoder()
    for error, said, options in (
        (ValueError, "floor or ceiling must be given, got neither", {}),
        (ValueError, "floor must be at most the ceiling, got 2", {"floor": 2, "ceiling": 1}),
        (TypeError, "floor must be a number or a tensor", {"floor": "low"}),
        (ValueError, "ceiling must be a number or a float tensor", {"ceiling": torch.ones(1, 2)}),
        (
            ValueError,
            "floor and ceiling must be for the same number of heads, got 2 and 4",
            {"floor": torch.zeros(2), "ceiling": torch.ones(4)},
        ),
        (ValueError, r"unit must be one of \['nats', 'share'\]", {"floor": 1, "unit": "bits"}),
        (ValueError, "weight must be a number of at least 0", {"floor": 1, "weight": -1}),
        (TypeError, "schedule must be a function of the step or", {"floor": 1, "schedule": 3}),
        (ValueError, "end must be from 5 to", {"floor": 1, "schedule": (4, 4)}),
    ):
        with pytest.raises(error, match=f"BalanceLoss: {said}"):
            lens.BalanceLoss(model, **options)
    with pytest.raises(TypeError, match=r"BalanceLoss: model must be a torch.nn.Module, got int"):
        lens.BalanceLoss(3, floor=1.0)  # type: ignore[arg-type]
    balance = lens.BalanceLoss(model, floor=1.0)
    model(torch.randn(1, T, E))
    with pytest.raises(RuntimeError, match=r"BalanceLoss: no attention of attnfast ran with"):
        balance()
    heads = pytest.raises(ValueError, match=r"floor must be a number or of \(H,\) = \(4,\), got")
    with lens.BalanceLoss(model, floor=torch.zeros(3)), heads:
        model(torch.randn(1, T, E))
    attends, q = Attends(), torch.randn(2, B, H, T, D)
    refused = pytest.raises(NotImplementedError, match=r"transforms of torch.func keep no loss")
    with lens.BalanceLoss(attends, floor=1.0), refused:
        torch.func.vmap(lambda x: attends(x, x, x))(q)
