"""The demos on slow and fast machines: how much work fits the time they are promised to take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from demo_needs import CPU
from torch import Tensor

import attnfast
from demo import budget
from demo.search import cli, corpus, encoder, finetune, measure, options


@pytest.mark.parametrize(
    ("seconds", "each", "steps"),
    [(30.0, 2.9, 10), (31.9, 2.9, 11), (5.0, 2.9, 10), (-5.0, 2.9, 10), (55.0, 0.2, 50)],
    ids=["exactly", "rounded down", "too slow", "too late", "fast"],
)
def test_the_steps_that_fit(seconds: float, each: float, steps: int) -> None:
    assert budget.steps_that_fit(seconds, each, budget.TUNED) == steps


@pytest.mark.parametrize(
    ("elapsed", "each", "steps"),
    [
        (60.0, 0.1, 150),  # 3,480 would fit
        (100.0, 0.4, 136),  # 680
        (130.0, 0.7, 58),  # 294
        (130.0, 1.0, 50),  # 170
        (500.0, 1.0, 50),  # none
    ],
)
def test_the_comparison_gets_a_fifth_of_the_steps_that_fit(
    elapsed: float, each: float, steps: int
) -> None:
    assert budget.compared_steps(elapsed, each) == steps


@pytest.mark.parametrize(
    ("done", "elapsed", "each", "steps"),
    [
        (150, 100.0, 0.1, 800),  # 3,230 would fit
        (150, 200.0, 0.4, 580),
        (60, 200.0, 0.8, 215),
        (50, 250.0, 1.0, 150),  # 100
        (50, 500.0, 1.0, 150),  # none
        (10, 30.0, 0.5, 670),
    ],
)
def test_training_gets_what_is_left(done: int, elapsed: float, each: float, steps: int) -> None:
    assert budget.training_steps(done, elapsed, each) == steps


@pytest.mark.parametrize("each", [0.02, 0.1, 0.3, 0.5, 0.8])
def test_a_whole_run_takes_less_than_eight_minutes(each: float) -> None:
    """From nothing, with processes that take seven seconds to start, and ours a tenth slower."""
    elapsed = 60 + 2 * 7 + 50 * (each + 1.1 * each)
    compared = budget.compared_steps(elapsed, 1.1 * each)
    elapsed += 2 * 7 + compared * (each + 1.1 * each)
    steps = budget.training_steps(compared, elapsed, 1.1 * each)
    elapsed += (steps - compared + budget.MEASURING) * 1.1 * each
    assert steps == 800 or elapsed > 400 or each > 0.7
    assert elapsed < 480


def test_texts_are_cut_off_no_more_than_the_time_asks_for() -> None:
    lengths = [300, 100, 70, 5]
    # 256 + 100 + 70 + 5 = 431, 112 + 100 + 70 + 5 = 287, 96 + 96 + 70 + 5 = 267
    for seconds, longest in ((431.0, 256), (430.9, 240), (287.0, 112), (286.9, 96), (1.0, 48)):
        assert budget.longest_that_fits(lengths, seconds, 1.0) == longest


def test_a_token_takes_what_all_models_take(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    sizes = []

    class Slow(torch.nn.Module):
        def __init__(self, seconds: float) -> None:
            super().__init__()
            self.seconds = seconds

        def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
            clock[0] += self.seconds * tokens.numel()
            self.seconds /= 2 if not sizes else 1
            sizes.append(tuple(tokens.shape))
            return tokens

    monkeypatch.setattr(measure, "now", lambda device: clock[0])
    ids = [[7] * length for length in range(1, 101)]
    each = measure.token_seconds({"a": Slow(2.0), "b": Slow(0.5)}, ids, CPU)
    assert each == pytest.approx(1.0 + 0.5)  # the first pass, slower, is not counted
    assert set(sizes) == {(16, 58)}  # of 100 lengths, those from 43 to 58


def test_a_chosen_number_of_steps_trains_as_the_same_number_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(budget, "TUNING", 0.0)
    monkeypatch.setattr(budget, "TUNED", budget.Limits(2, 3))
    model = encoder.load_encoder(0.1)
    attnfast.replace(model, verbose=False)
    documents = corpus.collect_stdlib(["statistics", "platform"])
    split = finetune.split_by_module(documents, 0)
    assert split is not None
    texts = [document.text for document in documents]
    ids = [encoding.ids for encoding in encoder.load_tokenizer(16).encode_batch(texts)]
    told: list[str] = []
    how = {"batch_size": 4, "max_tokens": 16, "dropout": 0.1, "seed": 0, "device": CPU}
    chosen, given = (
        finetune.fine_tune({"a": model}, ids, split, steps=n, tell=told.append, **how)["a"]
        for n in (None, 2)
    )
    assert len(chosen.losses) == 2
    assert chosen.losses == given.losses
    assert chosen.held_out_after == given.held_out_after
    assert len(told) == 1  # a number given needs no reason
    assert told[0].startswith("2 steps, from 2 to 3: one of both models takes ")


def test_a_slow_machine_cuts_texts_off_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(budget, "EMBEDDING", 0.0)
    monkeypatch.setattr(cli, "peak_memory", lambda *_: None)
    texts = tmp_path / "texts"
    texts.write_text("dog " * 100)
    given = ["--texts", str(texts), "--out", str(tmp_path / "out"), "cat"]
    assert cli.main(given) == 0
    printed = capsys.readouterr().out
    assert "texts are cut off after 48 tokens, from 48 to 256: embedding twice takes " in printed
    assert "1 texts and 1 queries, 51 tokens in 1 batches" in printed
    job = cli._prepare(options.parser().parse_args([*given, "--max-tokens", "80"]))
    assert not job.cut
    assert sum(map(len, job.ids)) == 83
