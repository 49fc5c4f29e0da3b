"""The translation demo's training: optimiser, exact resumption, checkpoints, comparison."""

from __future__ import annotations

import dataclasses
import math
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from demo_needs import CPU
from translation_pairs import sentences, work_here

import attnfast
from demo.command import UsageError
from demo.translation import checkpoint, compare, pairs, tokens, train
from demo.translation.interrupt import Interrupt
from demo.translation.pairs import Pair
from demo.translation.settings import Settings
from demo.translation.train import Trainer

SETTINGS = Settings(
    width=16,
    heads=2,
    layers=1,
    feedforward=32,
    dropout=0.2,
    rate=1e-2,
    warm_up=10,
    batch_tokens=400,
)


@pytest.fixture(scope="module")
def data() -> tokens.Data:
    split = pairs.split_pairs([Pair(*pair) for pair in sentences()], 0)
    return tokens.prepare(split, 320, 64)


def trainer_of(data: tokens.Data, settings: Settings = SETTINGS, **options: object) -> Trainer:
    model = settings.build(data.tokenizer.get_vocab_size())
    attnfast.replace(model, verbose=False)
    torch.manual_seed(settings.seed)
    return Trainer(model, data, settings, **options)  # type: ignore[arg-type]


def nothing() -> None:
    pass


def test_the_seed_decides_the_first_weights_and_nothing_else(data: tokens.Data) -> None:
    torch.manual_seed(9)
    state = torch.get_rng_state()
    a, b = SETTINGS.build(320), SETTINGS.build(320)
    assert torch.equal(state, torch.get_rng_state())
    other = dataclasses.replace(SETTINGS, seed=1).build(320)
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y)
    assert not torch.equal(a.embedding.weight, other.embedding.weight)


def test_weight_decay_spares_biases_norms_and_embeddings(data: tokens.Data) -> None:
    trainer = trainer_of(data, dataclasses.replace(SETTINGS, weight_decay=0.5))
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    decayed, spared = (
        {names[id(p)] for p in group["params"]} for group in trainer.optimiser.param_groups
    )
    assert [group["weight_decay"] for group in trainer.optimiser.param_groups] == [0.5, 0.0]
    assert not decayed & spared
    assert decayed | spared == set(names.values())
    assert spared == {
        name for name in names.values() if "norm" in name or "bias" in name or "embedding" in name
    }


def test_the_rate_rises_linearly_and_falls_with_the_root() -> None:
    factor = train.rate_factor(100)
    assert factor(0) == pytest.approx(0.01)
    assert factor(49) == pytest.approx(0.5)
    assert factor(99) == pytest.approx(1.0)
    assert factor(399) == pytest.approx(0.5)
    assert max(map(factor, range(1000))) == pytest.approx(1.0)


def test_the_model_learns(data: tokens.Data) -> None:
    trainer = trainer_of(data)
    before = trainer.held_out_loss()
    assert trainer.train(150, save=nothing)
    assert before > 4
    assert trainer.held_out_loss() < before / 3
    assert sum(trainer.losses[-10:]) < 0.4 * sum(trainer.losses[:10])
    assert trainer.steps == 150 == len(trainer.seconds) == len(trainer.tokens)


@pytest.mark.parametrize("stop", [1, 17])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    data: tokens.Data, tmp_path: Path, stop: int
) -> None:
    path = tmp_path / "checkpoint.pt"
    whole = trainer_of(data, watch_every=5)
    assert whole.train(30, save=nothing)

    first = trainer_of(data, watch_every=5)
    assert first.train(stop, save=lambda: checkpoint.save(first, path))
    drawn = [random.random(), np.random.rand(), torch.rand(()).item()]  # noqa: NPY002
    second = trainer_of(data, dataclasses.replace(SETTINGS), watch_every=5)
    torch.manual_seed(77)
    state = checkpoint.read(path, CPU)
    checkpoint.check(state, path, SETTINGS, data)
    checkpoint.restore(state, second)
    again = [random.random(), np.random.rand(), torch.rand(()).item()]  # noqa: NPY002
    assert again == drawn
    checkpoint.restore(state, second)
    assert second.losses == whole.losses[:stop]
    assert second.train(30, save=nothing)

    assert second.losses == whole.losses
    assert second.tokens == whole.tokens
    assert second.held_out_loss() == whole.held_out_loss()
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [look.step for look in second.looks] == [0, 5, 10, 15, 20, 25, 30]
    for a, b in zip(whole.looks, second.looks, strict=True):
        for kind in a.breadth:
            assert torch.equal(a.breadth[kind], b.breadth[kind])


def test_a_checkpoint_keeps_how_many_steps_were_decided_on(
    data: tokens.Data, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint.pt"
    first, second = trainer_of(data), trainer_of(data)
    assert first.goal is None
    first.goal = 321
    checkpoint.save(first, path)
    state = checkpoint.read(path, CPU)
    checkpoint.restore(state, second)
    assert second.goal == 321
    del state["goal"]  # as checkpoints once were
    checkpoint.restore(state, second)
    assert second.goal is None


def test_without_its_generators_a_resumed_run_would_differ(
    data: tokens.Data, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint.pt"
    first = trainer_of(data)
    first.train(3, save=lambda: checkpoint.save(first, path))
    first.train(6, save=nothing)
    second = trainer_of(data)
    checkpoint.restore(checkpoint.read(path, CPU), second)
    torch.manual_seed(77)
    second.train(6, save=nothing)
    assert second.losses[:3] == first.losses[:3]
    assert second.losses[3:] != first.losses[3:]


def test_dropout_and_looking_do_not_disturb_each_other(data: tokens.Data) -> None:
    watched, alone = trainer_of(data, watch_every=2), trainer_of(data)
    torch.manual_seed(0)
    watched.train(6, save=nothing)
    torch.manual_seed(0)
    alone.train(6, save=nothing)
    assert watched.losses == alone.losses
    assert not alone.looks


def test_ctrl_c_ends_training_between_two_steps(data: tokens.Data) -> None:
    before = signal.getsignal(signal.SIGINT)
    trainer, saved = trainer_of(data), []
    step = trainer._step

    def interrupted(batch: object) -> None:
        if trainer.steps == 4:
            os.kill(os.getpid(), signal.SIGINT)
        step(batch)  # type: ignore[arg-type]

    trainer._step = interrupted  # type: ignore[method-assign]
    assert not trainer.train(50, save=lambda: saved.append(trainer.steps))
    assert saved == [5]
    assert trainer.steps == 5
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_interrupts_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        assert not interrupt.asked
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)
        assert interrupt.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_checkpoints_are_saved_on_the_way(data: tokens.Data) -> None:
    trainer, saved = trainer_of(data), []
    trainer.train(10, save=lambda: saved.append(trainer.steps), save_every=4)
    assert saved == [4, 8, 10]
    trainer.train(10, save=lambda: saved.append(trainer.steps))
    assert saved == [4, 8, 10]


def test_a_checkpoint_that_fails_leaves_the_old_one(
    data: tokens.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint.pt"
    trainer = trainer_of(data)
    checkpoint.save(trainer, path)
    old = path.read_bytes()

    def fail(state: object, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint.torch, "save", fail)
    with pytest.raises(OSError, match="no space left"):
        checkpoint.save(trainer, path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"width": 32}, "is of another shape: it was made with --width 16, got 32"),
        ({"layers": 2}, "is of another shape: it was made with --layers 1, got 2"),
        ({"dropout": 0.0}, "is of another training run: it was made with --dropout 0.2, got 0.0"),
        ({"batch_tokens": 99}, "of another training run: it was made with --batch-tokens 400, "),
        ({"width": 32, "seed": 3}, "is of another shape: it was made with --width 16, got 32"),
    ],
    ids=str,
)
def test_a_checkpoint_of_something_else_is_told(
    data: tokens.Data, tmp_path: Path, change: dict[str, object], told: str
) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(trainer_of(data), path)
    state = checkpoint.read(path, CPU)
    checkpoint.check(state, path, SETTINGS, data)
    with pytest.raises(UsageError) as caught:
        checkpoint.check(state, path, dataclasses.replace(SETTINGS, **change), data)
    assert str(caught.value).startswith(f"--resume: {path} is of another ")
    assert told in str(caught.value)


def test_a_checkpoint_of_other_pairs_is_told(data: tokens.Data, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(trainer_of(data), path)
    state = checkpoint.read(path, CPU)
    with pytest.raises(UsageError, match=r"checkpoint.pt was trained on other pairs$"):
        checkpoint.check(state, path, SETTINGS, data._replace(train=data.train[1:]))
    other = data._replace(tokenizer=tokens.learn_tokenizer(data.texts, 300))
    with pytest.raises(UsageError, match=r"its vocabulary has 320 tokens, .* has 300$"):
        checkpoint.check(state, path, SETTINGS, other)


def test_files_that_are_no_checkpoints_are_told(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(
        UsageError, match=r"--resume: cannot read .*file: No such file or directory"
    ):
        checkpoint.read(path, CPU)
    for content in (b"", b"text", b"PK\x03\x04broken"):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"--resume: .*file is no checkpoint of this demo$"):
            checkpoint.read(path, CPU)
    torch.save({"model": {}}, path)
    with pytest.raises(UsageError, match=r"is no checkpoint of this demo$"):
        checkpoint.read(path, CPU)
    torch.save(Path, path)  # a global, which a checkpoint must not bring
    with pytest.raises(UsageError, match=r"is no checkpoint of this demo$"):
        checkpoint.read(path, CPU)


def test_bf16_is_autocast(data: tokens.Data) -> None:
    settings = dataclasses.replace(SETTINGS, precision="bf16", dropout=0.0)
    ours, exact = (
        trainer_of(data, settings),
        trainer_of(data, dataclasses.replace(SETTINGS, dropout=0.0)),
    )
    seen = []
    hook = ours.model.attentions()["cross"][0].register_forward_hook(
        lambda module, args, out: seen.append(out[0].dtype)
    )
    ours.train(20, save=nothing)
    hook.remove()
    exact.train(20, save=nothing)
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in ours.model.parameters()} == {torch.float32}
    assert ours.losses != exact.losses
    assert ours.losses == pytest.approx(exact.losses, rel=0.02)


def test_tensorboard_gets_losses_and_every_head(data: tokens.Data, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = trainer_of(data, watch_every=2, logdir=tmp_path)
    trainer.train(4, save=nothing)
    trainer.train(6, save=nothing)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    losses = events.Scalars("loss")
    assert [event.step for event in losses] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in losses] == pytest.approx(trainer.losses)
    heads = {
        f"{measure}/{kind} layer 1 head {head}"
        for measure in ("breadth", "focus", "max_logit")
        for kind in ("encoder", "decoder", "cross")
        for head in (1, 2)
    }
    assert heads | {"loss", "rate", "tokens per second"} == set(events.Tags()["scalars"])
    for measure in ("breadth", "focus", "max_logit"):
        found = events.Scalars(f"{measure}/decoder layer 1 head 2")
        assert [event.step for event in found] == [0, 2, 4, 6]
        values = [getattr(look, measure)["decoder"][0, 1].item() for look in trainer.looks]
        assert [event.value for event in found] == pytest.approx(values)


# --- stock and ours


def test_without_dropout_every_loss_agrees(data: tokens.Data) -> None:
    compared = compare.compare_exact(data, SETTINGS, 30, CPU)
    assert compared.agree
    assert compared.tolerance == 1e-3
    a, b = compared.outcomes["torch"], compared.outcomes["attnfast"]
    assert len(a.losses) == 30
    apart = max(abs(x - y) / x for x, y in zip(a.losses, b.losses, strict=True))
    assert compared.difference == apart <= 1e-3
    trainer = trainer_of(data, dataclasses.replace(SETTINGS, dropout=0.0))
    trainer.train(30, save=nothing)
    assert trainer.losses == pytest.approx(b.losses, rel=1e-6)
    assert a.losses[-1] < 0.7 * a.losses[0]
    for outcome in (a, b):
        assert outcome.step_seconds > 0
        assert outcome.tokens_per_second > 0
        assert outcome.peak_bytes is None or outcome.peak_bytes > 0


def test_with_dropout_the_final_losses_agree_and_ours_can_go_on(
    data: tokens.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "_in_process", work_here)
    path = tmp_path / "checkpoint.pt"
    ours = {"checkpoint": str(path), "watch_every": 20}
    compared = compare.compare_dropout(data, SETTINGS, 120, CPU, **ours)
    assert compared.agree, compared.difference
    assert compared.tolerance == 0.05
    losses = [outcome.losses for outcome in compared.outcomes.values()]
    assert losses[0] != losses[1]
    trainer = trainer_of(data, watch_every=20)
    checkpoint.restore(checkpoint.read(path, CPU), trainer)
    assert trainer.losses == losses[1]
    assert [look.step for look in trainer.looks] == [0, 20, 40, 60, 80, 100, 120]


def outcome(losses: list[float], held_out: float = 1.0) -> compare.Outcome:
    return compare.Outcome(losses, held_out, 1.0, 1.0, None)


@pytest.mark.parametrize(
    ("ours", "held_out", "difference", "agree"),
    [
        ([2.0] * 30, 1.0, 0.0, True),
        ([9.0] * 10 + [2.08] * 20, 1.0, 0.04, True),
        ([2.0] * 10 + [2.12] * 20, 1.0, 0.06, False),
        ([2.0] * 30, 1.06, 0.06, False),
        ([2.0] * 30, math.nan, math.nan, False),
        ([2.0] * 29 + [math.nan], 1.0, math.nan, False),
    ],
    ids=["equal", "early", "late", "held out", "NaN held out", "NaN late"],
)
def test_the_verdict_with_dropout_is_about_the_end(
    monkeypatch: pytest.MonkeyPatch,
    data: tokens.Data,
    ours: list[float],
    held_out: float,
    difference: float,
    agree: bool,
) -> None:
    made = {"torch": outcome([2.0] * 30), "attnfast": outcome(ours, held_out)}
    monkeypatch.setattr(compare, "_both", lambda *_, **__: made)
    compared = compare.compare_dropout(data, SETTINGS, 30, CPU)
    assert compared.difference == pytest.approx(difference, nan_ok=True)
    assert compared.agree is agree


@pytest.mark.parametrize("last", [2.003, math.nan])
def test_the_verdict_without_dropout_is_about_every_step(
    monkeypatch: pytest.MonkeyPatch, data: tokens.Data, last: float
) -> None:
    made = {"torch": outcome([2.0] * 5), "attnfast": outcome([2.0, last, 2.0, 2.0, 2.0])}
    monkeypatch.setattr(compare, "_both", lambda *_, **__: made)
    assert not compare.compare_exact(data, SETTINGS, 5, CPU).agree


def test_a_failing_process_is_told(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], data: tokens.Data
) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('what was wrong')"]
    monkeypatch.setattr(compare, "fresh_python", lambda *_: (command, dict(os.environ)))
    with pytest.raises(UsageError, match="compare: training with torch failed with exit code 1"):
        compare.compare_exact(data, SETTINGS, 2, CPU)
    assert "what was wrong" in capfd.readouterr().err


def test_a_process_takes_its_job_from_a_file(data: tokens.Data, tmp_path: Path) -> None:
    tokens.save_data(data, tmp_path / "data.pt")
    job = {"name": "torch", "settings": SETTINGS.as_dict(), "steps": 2, "device": "cpu"}
    found = work_here(job | {"threads": 1, "label": "torch"}, tmp_path)
    assert len(found.losses) == 2
    assert found.held_out > 0
