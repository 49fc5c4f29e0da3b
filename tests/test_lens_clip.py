"""attnfast.lens.QKClip: after a clip no logit of the same batch is above the limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import attnfast
from attnfast import lens, watching

B, T, E, H = 3, 20, 32, 4
STILL = {"lr": 0.0}  # an optimiser's step that changes nothing


def layer(**options: Any) -> attnfast.MultiheadAttention:
    torch.manual_seed(0)
    made = attnfast.MultiheadAttention(E, H, batch_first=True, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    made.collect_stats = True
    return made


def largest(module: Any) -> Tensor:
    """Of each head in the last call."""
    return module.stats.max_logit.detach().amax((0, 2))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"kdim": 24, "vdim": 40},
        {"num_kv_heads": 2},
        {"num_kv_heads": 1, "bias": False, "kdim": 24},
        {"add_bias_kv": True, "add_zero_attn": True},
        {"alibi": True},
        {"sinks": True, "softcap": 3.0},
        {"dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_no_logit_is_above_the_limit(options: dict[str, Any], alpha: float) -> None:
    model = layer(**options)
    dtype = options.get("dtype", torch.float32)
    q = torch.randn(B, T, E, dtype=dtype)
    k, v = (torch.randn(B, 9, options.get(n, E), dtype=dtype) for n in ("kdim", "vdim"))
    model(q, k, v)
    before = largest(model)
    limit = before.sort().values[1:3].mean().item()  # two of four heads are above
    if "softcap" in options:
        limit = 3.0  # which nothing exceeds
    weights = {name: x.detach().clone() for name, x in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), **STILL)
    with lens.QKClip(model, limit, alpha).attach(optimizer) as clip:
        model(q, k, v)[0].sum().backward()
        optimizer.step()
        torch.testing.assert_close(clip.max_logit[""], before)
        gamma = clip.factors.get("", torch.ones(H))
        model(q, k, v)
    assert not watching.now
    after = largest(model)
    high = before > limit
    assert high.sum() == (0 if "softcap" in options else 2)
    assert after.max() <= limit
    assert torch.equal(gamma < 1, high)
    torch.testing.assert_close(after[~high], before[~high])
    close = 0.05 if dtype == torch.bfloat16 else 1e-5
    reached = torch.full_like(after, limit)[high] if "alibi" not in options else after[high]
    torch.testing.assert_close(after[high], reached, atol=0, rtol=close)
    untouched = {"out_proj.weight", "out_proj.bias", "bias_v", "v_proj_weight", "sinks"}
    for name, x in model.named_parameters():
        assert torch.equal(x, weights[name]) or name not in untouched
    if "in_proj_weight" in weights:
        assert torch.equal(model.in_proj_weight.chunk(3)[2], weights["in_proj_weight"].chunk(3)[2])


def test_powers_of_gamma() -> None:
    model = layer()
    weights = model.in_proj_weight.detach().clone()
    biases = model.in_proj_bias.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), **STILL)
    x = torch.randn(B, T, E)
    clip = lens.QKClip(model, 0.5, alpha=0.25).attach(optimizer)
    model(x, x, x)
    with torch.no_grad():
        model(9 * x, x, x)  # an evaluation does not count
    optimizer.step()
    gamma = (0.5 / clip.max_logit[""]).double()
    assert (gamma < 1).all()
    for got, was in ((model.in_proj_weight, weights), (model.in_proj_bias, biases)):
        q, k, v = (y.double().view(H, -1) for y in got.detach().chunk(3))
        old_q, old_k, old_v = (y.double().view(H, -1) for y in was.chunk(3))
        torch.testing.assert_close(q, old_q * gamma[:, None] ** 0.25, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(k, old_k * gamma[:, None] ** 0.75, rtol=1e-5, atol=1e-7)
        assert torch.equal(v, old_v)
    scaled = model.in_proj_weight.detach().clone()
    optimizer.step()  # nothing was seen since
    assert torch.equal(model.in_proj_weight, scaled)
    assert not clip.factors
    clip.detach()
    model(x, x, x)
    optimizer.step()
    assert torch.equal(model.in_proj_weight, scaled)


def test_heads_that_share_keys_shrink_by_their_own_factors() -> None:
    model = layer(num_kv_heads=2)
    with torch.no_grad():
        rows = model.in_proj_weight.view(-1, 8, E)
        rows[:4] *= torch.tensor([1.0, 6.0, 4.0, 9.0])[:, None, None]  # the first head stays low
    x = torch.randn(B, T, E)
    model(x, x, x)
    before, weights = largest(model), model.in_proj_weight.detach().clone()
    limit = 1.05 * before[0].item()
    optimizer = torch.optim.SGD(model.parameters(), **STILL)
    with lens.QKClip(model, limit).attach(optimizer) as clip:
        model(x, x, x)
        optimizer.step()
        model(x, x, x)
    gamma = clip.factors[""]
    assert gamma[0] == 1
    assert (gamma[1:] < 1).all()
    ratio = (model.in_proj_weight / weights).view(-1, 8 * E).detach()
    assert torch.equal(ratio[0], torch.ones(8 * E))
    torch.testing.assert_close(ratio[1], gamma[1].expand(8 * E), rtol=1e-5, atol=0)
    assert torch.equal(ratio[4], torch.ones(8 * E))  # its keys serve the first head, too
    shared = gamma[2:].max().sqrt()
    torch.testing.assert_close(ratio[5], shared.expand(8 * E), rtol=1e-5, atol=0)
    torch.testing.assert_close(ratio[3], (gamma[3] / shared).expand(8 * E), rtol=1e-5, atol=0)
    torch.testing.assert_close(largest(model)[1:], torch.full((3,), limit), rtol=1e-5, atol=0)


def test_a_bias_is_not_scaled() -> None:
    model, x = layer(), torch.randn(B, T, E)
    bias = torch.randn(T, T).clamp(-3, 0.4)
    bias[:, 15:] = -torch.inf
    model(x, x, x, attn_mask=bias)
    limit = 0.5 * largest(model).min().item()
    optimizer = torch.optim.SGD(model.parameters(), **STILL)
    with lens.QKClip(model, limit).attach(optimizer) as clip:
        model(x, x, x, attn_mask=bias)
        optimizer.step()
        model(x, x, x, attn_mask=bias)
        assert largest(model).max() <= limit
        assert (clip.factors[""] < 1).all()
        clip.found.clear()
        model(x, x, x, attn_mask=bias + limit)
        with pytest.raises(RuntimeError, match=r"QKClip: the bias of '' alone reaches the limit"):
            optimizer.step()


def test_padding_and_logits_that_are_not_finite_are_left_alone() -> None:
    model, x = layer(), torch.randn(B, T, E)
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[:, 15:] = True
    model(x, x, x, key_padding_mask=padding)
    real = model.stats.max_logit[:, :, :15].amax((0, 2)).detach()
    optimizer = torch.optim.SGD(model.parameters(), **STILL)
    with lens.QKClip(model, real.max().item() + 0.1).attach(optimizer) as clip:
        far = torch.where(padding[..., None], 100.0, x)
        model(far, x, x, key_padding_mask=padding)
        optimizer.step()
        torch.testing.assert_close(clip.max_logit[""], real)
        assert not clip.factors
        weights = model.in_proj_weight.detach().clone().view(3, H, -1)
        model(9 * x, x, x)
        clip.found[""][0, 1] = torch.inf
        optimizer.step()
    changed = (model.in_proj_weight.detach().view(3, H, -1) != weights).any(2)
    assert torch.equal(changed[:2].all(0), torch.tensor([True, False, True, True]))
    assert not changed[:, 1].any()


def by_heads(seen: lens.Seen, statistic: str = "max_logit") -> dict[str, Tensor]:
    return {name: found[statistic].largest for name, found in seen.layers.items()}


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Bert", "T5", "DistilBert"])
def test_models_of_transformers(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    from attnfast.integrations import transformers as ours

    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 40, "hidden_size": E, "num_hidden_layers": 1}
    shape |= {"intermediate_size": 48, "num_attention_heads": H, "max_position_embeddings": 64}
    ids = torch.randint(40, (B, T))
    if kind in ("Llama", "Qwen2"):
        shape["num_key_value_heads"] = 2
    if kind == "T5":
        shape = {"vocab_size": 40, "d_model": E, "d_kv": 8, "d_ff": 48, "num_layers": 1}
        shape["num_heads"] = H
    if kind == "DistilBert":
        shape = {"vocab_size": 40, "dim": E, "n_layers": 1, "n_heads": H, "hidden_dim": 48}
    config = getattr(transformers, f"{kind}Config")(**shape)
    config._attn_implementation = ours.register()
    name = {"T5": "T5EncoderModel"}.get(kind, f"{kind}Model")
    model = getattr(transformers, name)(config).train()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            scaled = any(f".{x}." in parameter_name for x in ("q_proj", "query", "q", "q_lin"))
            parameter.mul_(40.0 if scaled else 1.0)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    optimizer = torch.optim.SGD(model.parameters(), **STILL)
    with lens.observe(model) as seen:
        model(ids)
    (before,) = by_heads(seen).values()
    limit = before.sort().values[1:3].mean().item()
    with lens.QKClip(model, limit).attach(optimizer) as clip:
        model(ids)
        optimizer.step()
        with lens.observe(model) as seen:
            model(ids)
    ours.unregister()
    (after,), (factors,) = by_heads(seen).values(), clip.factors.values()
    assert torch.equal(factors < 1, before > limit)
    assert after.max() <= limit
    torch.testing.assert_close(after[before <= limit], before[before <= limit])


class Other(Tensor):
    """Parameters that are not plain, as those that are cut over ranks or quantised."""


class Alone(nn.Module):
    def forward(self, q: Tensor) -> Tensor:
        return attnfast.attention(q, q, q)


def test_what_cannot_be_clipped_is_named() -> None:
    refused = pytest.raises(
        ValueError, match=r"QKClip: cannot clip '0' \(MultiheadAttention\): its"
    )
    with refused as found:
        lens.QKClip(nn.Sequential(layer(similarity="cosine")))
    assert "cosine similarity undoes any scaling" in str(found.value)
    made = layer(kdim=24)
    nn.utils.parametrizations.orthogonal(made, "q_proj_weight")
    with pytest.raises(ValueError, match=r"its projections are parametrized"):
        lens.QKClip(made)
    made = layer()
    made.in_proj_weight = nn.Parameter(Other(made.in_proj_weight.detach()))
    with pytest.raises(ValueError, match=r"its parameters are of the type Other"):
        lens.QKClip(made)
    model, x = layer(softcap=30.0), torch.randn(B, T, E)
    optimizer = torch.optim.SGD(model.parameters(), **STILL)
    capped = pytest.raises(ValueError, match=r"'' \(MultiheadAttention\): its softcap, 30, bounds")
    with lens.QKClip(model, 20.0).attach(optimizer), capped:
        model(x, x, x)

    alone = Alone()
    other = pytest.raises(ValueError, match=r"cannot clip '' \(Alone\): its projections are none")
    with lens.QKClip(alone).attach(optimizer), other:
        alone(torch.randn(B, H, T, 8))
    for error, said, options in (
        (ValueError, "limit must be a number above 0, got 0", {"limit": 0}),
        (ValueError, "alpha must be a number from 0 to 1, got 2", {"alpha": 2}),
        (TypeError, "limit must be a number above 0, got 'high'", {"limit": "high"}),
    ):
        with pytest.raises(error, match=f"QKClip: {said}"):
            lens.QKClip(model, **options)
    clip = lens.QKClip(model, 50.0)
    with pytest.raises(TypeError, match=r"QKClip: optimizer must be a torch.optim.Optimizer, got"):
        clip.attach(model)  # type: ignore[arg-type]
    with clip.attach(optimizer), pytest.raises(RuntimeError, match=r"QKClip: is attached already"):
        clip.attach(optimizer)


def test_models_with_norms_and_adapters_are_named() -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    shape: dict[str, Any] = {"vocab_size": 40, "hidden_size": E, "num_hidden_layers": 1}
    shape |= {"intermediate_size": 48, "num_attention_heads": H, "num_key_value_heads": 2}
    qwen = transformers.Qwen3Model(transformers.Qwen3Config(**shape, head_dim=8))
    said = r"'layers.0.self_attn' \(Qwen3Attention\): its q_norm undoes any scaling"
    with pytest.raises(ValueError, match=said):
        lens.QKClip(qwen)
    llama = transformers.LlamaModel(transformers.LlamaConfig(**shape))
    adapted = peft.get_peft_model(llama, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"its projection is peft's Linear and no nn.Linear: merg"):
        lens.QKClip(adapted)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0] + self.attention(2 * x, x, x)[0]


def train_halves(group: dist.ProcessGroup, x: Tensor, whole: Tensor) -> None:
    model = Twice()
    replica = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(replica.parameters(), **STILL)
    with lens.QKClip(replica, 0.5).attach(optimizer) as clip:
        replica(x.chunk(2)[dist.get_rank()]).sum().backward()
        optimizer.step()
        assert list(clip.factors) == ["module.attention"]
    torch.testing.assert_close(model.attention.in_proj_weight, whole)
    every = [torch.empty_like(whole) for _ in range(2)]
    dist.all_gather(every, model.attention.in_proj_weight.detach())
    assert torch.equal(*every)
    single = torch.optim.SGD(model.parameters(), **STILL)
    said = r"QKClip: the ranks of a group must run the same layers in a step"
    with lens.QKClip(model, 0.5).attach(single):
        if dist.get_rank() == 0:
            model(x)
        with pytest.raises(RuntimeError, match=said):
            single.step()


def test_replicas_stay_equal(tmp_path: Path) -> None:
    model, x = Twice(), torch.randn(4, T, E)
    optimizer = torch.optim.SGD(model.parameters(), **STILL)
    with lens.QKClip(model, 0.5).attach(optimizer) as clip:
        model(x)
        optimizer.step()
        model(x)
        assert clip.found["attention"][0].max() <= 0.5
    ranks.run_on(2, tmp_path, train_halves, x, model.attention.in_proj_weight.detach())
