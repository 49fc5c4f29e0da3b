"""`attnfast.integrations.transformers`: small random models of many kinds against eager's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from kernel_calls import kernel_calls
from torch import Tensor

from attnfast.integrations import _transformers_masks
from attnfast.integrations import transformers as integration

PAD, BOS, EOS = 0, 1, 2
TOKENS: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
DECODER: dict[str, Any] = TOKENS | {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
SLIDING: dict[str, Any] = DECODER | {"sliding_window": 4}
MARIAN: dict[str, Any] = TOKENS | {
    "vocab_size": 50,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "decoder_start_token_id": PAD,
    "forced_eos_token_id": None,
    "dropout": 0.0,
}
T5: dict[str, Any] = TOKENS | {
    "vocab_size": 50,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "decoder_start_token_id": PAD,
    "dropout_rate": 0.0,
}
BERT: dict[str, Any] = DECODER | {
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


GPT2: dict[str, Any] = TOKENS | {
    "vocab_size": 50,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}


class Kind(NamedTuple):
    """A model, and how many attentions one forward pass of it has."""

    name: str
    config: str
    options: dict[str, Any]
    attentions: int = 2


KINDS = {
    "gpt2": Kind("GPT2LMHeadModel", "GPT2Config", GPT2),
    "bert": Kind("BertForMaskedLM", "BertConfig", BERT),
    "llama": Kind("LlamaForCausalLM", "LlamaConfig", DECODER),
    "mistral": Kind("MistralForCausalLM", "MistralConfig", SLIDING),
    "gemma2": Kind(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        SLIDING | {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0},
    ),
    "gpt_oss": Kind(
        "GptOssForCausalLM",
        "GptOssConfig",
        SLIDING
        | {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
        | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "t5": Kind("T5ForConditionalGeneration", "T5Config", T5, 6),
    "marian": Kind("MarianMTModel", "MarianConfig", MARIAN, 6),
}
GENERATING = [kind for kind in KINDS if kind != "bert"]
CACHED = {"dynamic": None, "static": "static"}


@pytest.fixture(autouse=True)
def name() -> Iterator[str]:
    yield integration.register()
    integration.unregister()


def build(kind: str, implementation: str, **changes: Any) -> Any:
    """A small model in eval mode, its weights seeded and large enough for uneven attention."""
    _, config, options, _ = KINDS[kind]
    made = getattr(transformers, config)(**options | changes)
    made._attn_implementation = implementation
    made._experts_implementation = "eager"  # any dtype
    torch.manual_seed(0)
    model = getattr(transformers, KINDS[kind].name)(made).eval()
    assert model.config._attn_implementation == implementation
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.normal_(std=1.0 if "embed" in name or "shared" in name else 0.3)
            else:
                p.add_(torch.randn(p.shape), alpha=0.1)
    return model


def inputs(kind: str) -> dict[str, Tensor]:
    """Three rows of unequal length, padded where the kind pads, and targets or labels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 50, (3, 9), generator=generator)
    own = torch.arange(9) < torch.tensor([[9], [5], [7]])
    if kind in ("t5", "marian"):
        labels = torch.randint(3, 50, (3, 6), generator=generator)
        return {"input_ids": ids * own, "attention_mask": own.long(), "labels": labels}
    if kind != "bert":
        own = own.flip(1)  # decoders are padded on the left
    labels = (ids * own).masked_fill(~own, -100)
    if kind != "bert":
        labels[~own.roll(1, 1)] = -100  # what a padded position would have to predict
    return {"input_ids": ids * own, "attention_mask": own.long(), "labels": labels}


def counting(kind: str, batch: dict[str, Tensor]) -> Tensor:
    """Which of the logits' positions are not padding, bool (B, L)."""
    if kind in ("t5", "marian"):
        return torch.ones_like(batch["labels"], dtype=torch.bool)
    return batch["attention_mask"].bool()


def check(found: Tensor, expected: Tensor, largest: float | None = None) -> None:
    """Equal up to 64 fp32 roundings of the largest value, over a whole model."""
    largest = expected.abs().max().item() if largest is None else largest
    bound = 64 * torch.finfo(torch.float32).eps * largest
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


# --- against eager attention


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_weights_are_eagers(kind: str, name: str) -> None:
    eager, ours = build(kind, "eager"), build(kind, name)
    batch = inputs(kind)
    with torch.no_grad():
        expected = eager(**batch, output_attentions=True)
        found = ours(**batch, output_attentions=True)
    kept = counting(kind, batch)
    check(found.logits[kept], expected.logits[kept])
    own = batch["attention_mask"].bool()
    queries = {
        "attentions": own,
        "encoder_attentions": own,
        "decoder_attentions": kept,
        "cross_attentions": kept,
    }
    seen = 0
    for field, rows in queries.items():
        for x, y in zip(found.get(field) or (), expected.get(field) or (), strict=True):
            assert x.shape == y.shape
            torch.testing.assert_close(x.transpose(1, 2)[rows], y.transpose(1, 2)[rows])
            assert y.transpose(1, 2)[rows].max() > 0.3  # three times an even share
            seen += 1
    assert seen == KINDS[kind].attentions
    whole = {key: x for key, x in batch.items() if key != "attention_mask"}
    with torch.no_grad():
        check(ours(**whole).logits, eager(**whole).logits)
        assert ours(**whole).get("attentions") is None
        assert kernel_calls(lambda: ours(**batch)) == KINDS[kind].attentions


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_eagers(kind: str, name: str) -> None:
    """Or nearer to those of fp64 than twice eager's own, which processors round differently."""
    batch, gradients = inputs(kind), []
    for implementation, dtype in (("eager", torch.float32), (name, torch.float32), ("eager", None)):
        model = build(kind, implementation).train().to(dtype or torch.float64)
        model(**batch).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    expected, found, truth = gradients
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for parameter, gradient in expected.items():
        error, own = (
            (x.double() - truth[parameter]).abs().max() for x in (found[parameter], gradient)
        )
        if error > 2 * own:
            check(found[parameter], gradient, largest)
        if "sinks" in parameter or "relative_attention_bias" in parameter:
            assert gradient.abs().max() > 1e-3 * largest


@pytest.mark.parametrize("cache", CACHED)
@pytest.mark.parametrize("kind", GENERATING)
def test_generated_tokens_are_eagers(kind: str, cache: str, name: str) -> None:
    batch, answers = inputs(kind), []
    del batch["labels"]
    for implementation in ("eager", name):
        model = build(kind, implementation)
        model.generation_config.eos_token_id = None
        answers.append(
            model.generate(
                **batch,
                max_new_tokens=8,
                do_sample=False,
                cache_implementation=CACHED[cache],
                disable_compile=True,
                return_dict_in_generate=True,
                output_logits=True,
            )
        )
    expected, found = answers
    assert torch.equal(found.sequences, expected.sequences)
    assert len(set(map(tuple, found.sequences[:, -8:].tolist()))) > 1
    check(torch.stack(found.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("kind", GENERATING)
def test_generated_weights_are_eagers(kind: str, name: str) -> None:
    """Where blocks pass no such argument on, too (GPT-2): transformers waits for them by hooks."""
    batch, answers = inputs(kind), []
    del batch["labels"]
    for implementation in ("eager", name):
        model = build(kind, implementation)
        model.generation_config.eos_token_id = None
        more = {"return_dict_in_generate": True, "output_attentions": True}
        answers.append(model.generate(**batch, max_new_tokens=3, do_sample=False, **more))
    check_weights(answers[1], answers[0], batch, KINDS[kind].attentions)


@pytest.mark.parametrize("kind", KINDS)
def test_a_configuration_asks_for_weights(kind: str, name: str) -> None:
    """If it did before its implementation was chosen: transformers refuses it afterwards."""
    batch = inputs(kind)
    with torch.no_grad():
        expected, found = (build(kind, x, output_attentions=True)(**batch) for x in ("eager", name))
    check_weights(found, expected, batch, KINDS[kind].attentions)


def check_weights(found: Any, expected: Any, batch: dict[str, Tensor], least: int) -> None:
    """As many as eager's, at least so many, and equal for every query that is not padding."""
    own, seen = batch["attention_mask"].bool(), 0
    for field in ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions"):
        for y, x in zip(flat(found.get(field)), flat(expected.get(field)), strict=True):
            everywhere = torch.ones(x.shape[0], x.shape[2], dtype=torch.bool)
            rows = own if x.shape[2] == own.shape[1] else everywhere
            torch.testing.assert_close(y.transpose(1, 2)[rows], x.transpose(1, 2)[rows])
            seen += 1
    assert seen >= least


def flat(weights: Any) -> list[Tensor]:
    """The tensors of tuples in tuples."""
    if isinstance(weights, Tensor):
        return [weights]
    return [x for part in weights or () for x in flat(part)]


@pytest.mark.parametrize("kind", ["llama", "t5", "marian"])
def test_beams_are_eagers(kind: str, name: str) -> None:
    batch = inputs(kind)
    del batch["labels"]
    expected, found = (
        build(kind, x).generate(**batch, max_new_tokens=6, do_sample=False, num_beams=3)
        for x in ("eager", name)
    )
    assert torch.equal(found, expected)


def test_a_compiled_model_is_eagers(name: str) -> None:
    torch.compiler.reset()
    batch = inputs("gemma2")
    model, eager = (build("gemma2", x, num_hidden_layers=1) for x in (name, "eager"))
    logits = torch.compile(model, backend="aot_eager", fullgraph=True)(**batch).logits
    kept = counting("gemma2", batch)
    check(logits[kept], eager(**batch).logits[kept])


def test_autocast_and_half_precision(name: str) -> None:
    batch = inputs("llama")
    kept = counting("llama", batch)
    exact = build("llama", "eager")(**batch).logits[kept]
    with torch.autocast("cpu", torch.bfloat16):
        errors = [(build("llama", x)(**batch).logits[kept] - exact) for x in ("eager", name)]
    assert errors[1].abs().max() <= 2 * errors[0].abs().max()
    halves = [build("llama", x).bfloat16()(**batch).logits[kept] - exact for x in ("eager", name)]
    assert halves[1].abs().max() <= 2 * halves[0].abs().max()


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_packed_rows_are_sequences_apart(kind: str, name: str) -> None:
    """By their position ids, from which transformers makes a mask."""
    ids = torch.randint(3, 50, (1, 9), generator=torch.Generator().manual_seed(1))
    lengths, model = (4, 3, 2), build(kind, name)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        apart = [model(part).logits for part in ids.split(lengths, 1)]
        together = model(ids, position_ids=positions, use_cache=False).logits
    check(together, torch.cat(apart, 1))


# --- registration


def known() -> tuple[Callable[..., Any] | None, Callable[..., Any] | None]:
    return (
        transformers.AttentionInterface._global_mapping.get("attnfast"),
        transformers.AttentionMaskInterface._global_mapping.get("attnfast"),
    )


def test_registering_is_idempotent_and_undone(name: str) -> None:
    assert name == integration.register() == "attnfast"
    assert known() == (integration.attention_forward, _transformers_masks.attention_mask)
    model = build("llama", name)
    integration.unregister()
    integration.unregister()
    assert known() == (None, None)
    with pytest.raises(KeyError, match="attnfast"):
        model(torch.ones(1, 3, dtype=torch.int64))
    model.set_attn_implementation("sdpa")
    model(torch.ones(1, 3, dtype=torch.int64))


def test_a_model_can_change_its_implementation(name: str) -> None:
    model, batch = build("llama", "sdpa"), inputs("llama")
    assert kernel_calls(lambda: model(**batch)) == 0
    model.set_attn_implementation(name)
    assert kernel_calls(lambda: model(**batch)) == 2
    model.set_attn_implementation("sdpa")
    assert kernel_calls(lambda: model(**batch)) == 0


def test_somebody_elses_name_is_left_alone() -> None:
    integration.unregister()

    def theirs() -> None:
        pass

    transformers.AttentionInterface.register("attnfast", theirs)
    try:
        with pytest.raises(ValueError, match=r"the name 'attnfast' must be free, it is .*theirs"):
            integration.register()
        integration.unregister()
        assert known()[0] is theirs
    finally:
        del transformers.AttentionInterface._global_mapping["attnfast"]


@pytest.mark.parametrize("missing", ["transformers", "interface"])
def test_transformers_missing_or_too_old(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing == "transformers":
        monkeypatch.setitem(sys.modules, "transformers", None)
    else:
        monkeypatch.delattr(transformers.masking_utils, "sdpa_mask")
    message = "attnfast.integrations.transformers: transformers 5 must be installed: "
    with pytest.raises(ImportError, match=message):
        integration.register()
    monkeypatch.undo()
