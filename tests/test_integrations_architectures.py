"""attnfast in models whose attention code is their own, or not made for fused kernels.

A sample of `tools.transformers_sweep`, which compares all architectures of transformers.
"""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from attnfast.integrations import _transformers_masks as masks
from attnfast.integrations import transformers as integration
from tools.transformers_sweep import compare

EQUAL = {  # by attnfast, without a warning
    "BartModel",
    "CLIPModel",
    "DeepseekV32Model",  # passes the chosen keys, not a mask, where it is not called sdpa
    "Gemma2Model",  # no sdpa for its softcap, but flash attention
    "Gemma4TextModel",  # asks for sdpa where it drops queries
    "GptOssModel",  # nor for its sinks
    "JambaModel",
    "PaliGemmaModel",  # a causal mask for layers that are not causal of their own
    "Wav2Vec2Model",
}
EAGER_MASKS = {  # by attnfast, with eager's masks and a warning
    "BigBirdPegasusModel",  # its decoder's layers do not say that they are causal
    "DeepseekV4Model",
    "NllbMoeModel",
    "PegasusXModel",
    "SplinterModel",
}
OWN = {  # by code of their own, with eager's masks and a warning
    "BloomModel",
    "GPTNeoXJapaneseModel",
    "LEDModel",
    "LongformerModel",
    "MegatronBertModel",
    "RemBertModel",
    "RoFormerModel",
    "TapasModel",
    "XGLMModel",
}
REFUSED = {"FalconModel", "GitModel"}  # by transformers: the name is none of theirs


@pytest.fixture(autouse=True)
def name() -> Iterator[str]:
    yield integration.register()
    integration.unregister()


@pytest.mark.parametrize("model", sorted(EQUAL | EAGER_MASKS | OWN | REFUSED))
def test_an_architecture_is_eagers_or_says_so(model: str) -> None:
    verdict = compare.judge(model, getattr(transformers, model))
    assert verdict.outcome == ("refused" if model in REFUSED else "equal"), verdict
    assert verdict.warned == (model in EAGER_MASKS | OWN), verdict
    assert (verdict.calls > 0) == (model in EQUAL | EAGER_MASKS), verdict
    if model not in REFUSED:
        assert {"none", "weights", "left", "right"} <= set(verdict.ran.split("; ")), verdict


def test_layers_that_are_always_causal_get_every_mask() -> None:
    """Phi 4's vision layers would take no mask for a causal one."""
    verdict = compare.judge("", transformers.models.phi4_multimodal.Phi4MultimodalVisionModel)
    assert (verdict.outcome, verdict.warned, verdict.calls) == ("equal", False, 2)


# --- what decides


class OwnConfig(transformers.PretrainedConfig):
    """A configuration of somebody's own."""

    model_type = "attnfast_own"
    hidden_size = 8


def model_of(
    config: type, source: str | None, monkeypatch: pytest.MonkeyPatch, **flags: Any
) -> Any:
    """A model class of that configuration in a module with that source."""
    module = types.ModuleType("attnfast_modeling_own")
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def read(_: Any) -> str:
        if source is None:
            raise OSError
        return source

    monkeypatch.setattr(masks.inspect, "getsource", read)
    body = {"__module__": module.__name__, "config_class": config, **flags}
    return type("OwnModel", (transformers.PreTrainedModel,), body)


CHOOSES = "\n    sparse_indices = None\n...\n    indices=sparse_indices,\n"
DROPS = """elif (
    self.config._attn_implementation == "sdpa"  # a comment
    and (logits_to_keep > 1 or getattr(cache, "is_compileable", False))
"""
ASKS = 'if self.config._attn_implementation in ("eager", "sdpa"):'
FLASH = {"_supports_flash_attn": True}
BACKEND = {"_supports_attention_backend": True}
REASONS: dict[str, tuple[str | None, dict[str, bool], str | None]] = {
    "sdpa": ("", {"_supports_sdpa": True}, None),
    "flash attention of any maker": ("", FLASH | BACKEND, None),
    "flash attention of one maker": ("", FLASH, "OwnModel supports neither"),
    "no fused attention": ("", BACKEND, "OwnModel supports neither"),
    "asks the name": (ASKS, {"_supports_sdpa": True}, "where attention is called 'sdpa'"),
    "passes the keys": (ASKS + CHOOSES, {"_supports_sdpa": True}, None),
    "drops queries": (DROPS, {"_supports_sdpa": True}, None),
    "drops queries and more": (DROPS + ASKS, {"_supports_sdpa": True}, "is called 'sdpa'"),
    "no source": (None, {"_supports_sdpa": True}, "attnfast_modeling_own cannot be read"),
}


@pytest.mark.parametrize(("source", "flags", "reason"), REASONS.values(), ids=REASONS)
def test_what_a_models_classes_and_source_say_decides(
    source: str | None, flags: dict[str, bool], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = type("OwnConfig", (OwnConfig,), {})
    kept = model_of(config, source, monkeypatch, **flags)  # else its class is collected
    for kind in (config, type("Derived", (config,), {})):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = [masks.why_eager(kind()) for _ in range(2)]
        assert found[0] == found[1]
        assert (found[0] is None) == (reason is None)
        assert len(caught) == (reason is not None)  # once
        if reason is not None:
            assert reason in found[0]
            message = str(caught[0].message)
            assert message.startswith(
                f"{integration.NAME}: models of {kind.__name__} get the float"
            )
            assert "\n" not in message
    assert kept.config_class is config


def test_a_text_model_decides_for_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    config = type("Whole", (OwnConfig,), {})
    whole = config()
    transformers.LlamaModel, transformers.BloomModel  # noqa: B018  loaded
    kept = model_of(config, "", monkeypatch, _supports_sdpa=True)
    whole.text_config = transformers.LlamaConfig()
    assert masks.why_eager(whole) is None
    whole.text_config = transformers.BloomConfig()
    with pytest.warns(UserWarning, match="models of BloomConfig get .*: Bloom"):
        assert masks.why_eager(whole) is not None
    assert kept.config_class is config


def test_a_configuration_without_models_gets_eagers_masks_and_keeps_its_layers_word() -> None:
    config = type("Lonely", (OwnConfig,), {})()
    with pytest.warns(UserWarning, match="models of Lonely get .*none of its models is loaded"):
        mask = masks.attention_mask(
            batch_size=1, q_length=3, kv_length=3, config=config, dtype=torch.float32
        )
    assert mask.dtype == torch.float32
    assert mask[0, 0, 0].tolist() == [0.0] + 2 * [torch.finfo(torch.float32).min]
    q = torch.randn(1, 2, 3, 8)
    layer = nn.Module()
    layer.config, layer.is_causal = config, True
    out, _ = integration.attention_forward(layer, q, q, q, None)
    torch.testing.assert_close(out[:, 0], q[:, :, 0])  # the first sees itself alone


def test_without_a_mask_nothing_is_masked_where_masks_are_eagers() -> None:
    q = torch.randn(1, 2, 3, 8)
    layer = nn.Module()
    layer.config = transformers.SplinterConfig()
    transformers.SplinterModel  # noqa: B018  loaded
    with pytest.warns(UserWarning, match="models of SplinterConfig get"):
        out, _ = integration.attention_forward(layer, q, q, q, None)
    expected, _ = integration.attention_forward(layer, q, q, q, None, is_causal=False)
    assert torch.equal(out, expected)


def test_unregistering_forgets(name: str) -> None:
    config = transformers.SplinterConfig()
    for _ in range(2):
        with pytest.warns(UserWarning, match="SplinterConfig"):
            masks.why_eager(config)
        integration.unregister()
