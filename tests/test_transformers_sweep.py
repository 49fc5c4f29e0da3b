"""`tools.transformers_sweep`: what it writes down, what it sees, and the page made of it."""

from __future__ import annotations

import contextlib
import inspect
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from torch import Tensor

from attnfast.integrations import transformers as integration
from tools.transformers_sweep import __main__ as sweep
from tools.transformers_sweep import compare, inputs, models, page, table


@pytest.fixture(autouse=True)
def name() -> Iterator[str]:
    yield integration.register()
    integration.unregister()


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another file for the rows, and two architectures alone."""
    path = tmp_path / "transformers.csv"
    read, write = table.read, table.write
    monkeypatch.setattr(table, "read", lambda: read(path))
    monkeypatch.setattr(table, "write", lambda rows: write(rows, path))
    classes = {"mistral": transformers.MistralModel, "wavlm": transformers.WavLMModel}
    monkeypatch.setattr("tools.transformers_sweep.models.model_classes", lambda: classes)
    return path


def test_the_page_fits_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sweep.main(["--check"]) == 0, "run: .venv/bin/python -m tools.transformers_sweep --page"
    copy = tmp_path / "transformers.md"
    copy.write_text(page.PAGE.read_text().replace("| --- |", "| -- |"))
    monkeypatch.setattr(page, "PAGE", copy)
    assert sweep.main(["--check"]) == 1
    assert sweep.main(["--page"]) == 0
    assert sweep.main(["--check"]) == 0


def test_nothing_is_silently_different() -> None:
    rows = table.read()
    assert len(rows) > 0
    assert {name for name, row in rows.items() if row.outcome == "wrong"} == page.KNOWN.keys()


def test_a_sweep_goes_on_where_it_was_cut_short(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main(["--write", "mistral"]) == 0
    rows = table.read()
    row = rows["mistral"]
    assert (rows["wavlm"].outcome, rows["wavlm"].commit) == ("not yet", "")
    assert (row.outcome, row.model, row.masks) == ("equal", "MistralModel", "structure")
    ways = {
        "left",
        "gradients",
        "weights",
        "dynamic cache, sliding",
        "static cache, sliding",
        "beams",
    }
    assert ways <= set(row.ran.split("; "))

    def ends(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "judge", ends)
    with pytest.raises(KeyboardInterrupt):
        sweep.main(["--write"])
    rows = table.read()
    assert rows["mistral"] == row
    assert (rows["wavlm"].outcome, rows["wavlm"].detail) == ("not built", "the process ended")
    capsys.readouterr()
    assert sweep.main(["--write"]) == 0  # neither of them again, at this commit
    assert capsys.readouterr().out.strip() == ""
    monkeypatch.setattr(table, "commit", lambda: "another")
    with pytest.raises(KeyboardInterrupt):
        sweep.main(["--write"])


WRONG = {"prefill": "none padding", "a step": "dynamic cache: logits of token 1 off"}


@pytest.mark.parametrize(("when", "message"), WRONG.items(), ids=WRONG)
def test_what_is_wrong_is_seen(when: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = integration.attention_forward

    def wrong(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        out, weights = ours(module, query, *args, **kwargs)
        return (out * 1.1 if (query.shape[2] == 1) == (when == "a step") else out), weights

    mapping = transformers.AttentionInterface._global_mapping
    monkeypatch.setitem(mapping, integration.IMPLEMENTATION, wrong)
    monkeypatch.setattr(compare.integration, "attention_forward", wrong)
    verdict = compare.judge("mistral", transformers.MistralModel, transformers.MistralForCausalLM)
    assert verdict.outcome == "wrong"
    assert message in verdict.detail


def test_a_padded_query_without_keys_changes_no_gradients() -> None:
    """T5Gemma's decoder has one, beyond its window, which eager lets attend everything."""
    verdict = compare.judge("t5gemma", transformers.T5GemmaModel)
    assert (verdict.outcome, "gradients" in verdict.ran) == ("equal", True), verdict


def test_a_part_that_is_given_its_masks_is_not_compared() -> None:
    verdict = compare.judge("", transformers.models.blt.modeling_blt.BltGlobalTransformer)
    assert verdict.outcome == "not built"


def test_every_architecture_warns_for_itself() -> None:
    for _ in range(2):
        assert compare.judge("splinter", transformers.SplinterModel).warned


def test_what_takes_too_long_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the processor's time, so that a busy machine compares as many."""
    monkeypatch.setattr(compare, "SECONDS", 0.05)

    def endless(_: Any) -> Any:
        while True:
            with contextlib.suppress(Exception):
                while True:
                    pass

    monkeypatch.setattr(compare.models, "build", endless)
    verdict = compare.judge("mistral", transformers.MistralModel)
    assert (verdict.outcome, verdict.detail) == (
        "not built",
        "took more than 0.05 s of the processor",
    )
    monkeypatch.setattr(compare, "SECONDS", 0.2)
    monkeypatch.setattr(compare.models, "build", lambda _: time.sleep(0.5))
    with pytest.raises(TypeError):
        compare.judge("mistral", transformers.MistralModel)


MODELS = {  # and the inputs of it, where what follows from names alone is not enough
    "BambaModel": "input_ids",  # its defaults have no layer with attention
    "ChameleonModel": "input_ids",  # no vocabulary
    "CohereCompassTextModel": "input_ids",  # nor rotations for every kind of layers
    "DecisionTransformerModel": "states, actions, rewards, returns_to_go, timesteps",
    "Glm4vTextModel": "input_ids",  # rotations along three axes
    "GPTNeoModel": "input_ids",  # kinds of twelve layers
    "MinistralModel": "input_ids",  # no head dim
    "MusicgenModel": "input_ids",  # of every codebook
    "PatchTSTModel": "past_values",
    "Qwen2VLTextModel": "input_ids",
    "Qwen3VLVisionModel": "hidden_states, grid_thw",
    "RTDetrModel": "pixel_values",  # as it is, but for the number of queries
    "Siglip2VisionModel": "pixel_values, pixel_attention_mask, spatial_shapes",
    "TimeSeriesTransformerModel": "past_values, past_time_features, past_observed_mask",
}


@pytest.mark.parametrize(("model", "given"), MODELS.items(), ids=MODELS)
def test_a_tiny_model_runs(model: str, given: str) -> None:
    classes = models.model_classes().values()
    _, config, found = models.build(next(cls for cls in classes if cls.__name__ == model))
    assert ", ".join(found) == given
    assert getattr(config, "num_hidden_layers", 2) <= 4


def test_a_video_has_as_many_frames_as_its_model_takes() -> None:
    _, _, found = models.build(transformers.VideoMAEModel)
    assert found["pixel_values"].shape[:3] == (inputs.B, 16, 3)


def test_the_shapes_of_named_inputs_are_the_configurations() -> None:
    config = types.SimpleNamespace(context_length=32, num_input_channels=3)
    names = {"past_values": inspect.Parameter("past_values", inspect.Parameter.KEYWORD_ONLY)}
    (found,) = inputs.more_inputs.named(config, names, {}, False)
    assert found["past_values"].shape == (inputs.B, 32, 3)
    del config.context_length
    assert list(inputs.more_inputs.named(config, names, {}, False)) == []
