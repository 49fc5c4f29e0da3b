"""attnfast.lens.Monitor, and its callbacks in the training loops of others."""

from __future__ import annotations

import csv
import logging
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnfast
from attnfast import lens, watching

B, T, E, H = 3, 20, 32, 4
NAMES = ["step", "layer", "head", "entropy", "breadth", "focus", "max_logit"]


def encoder() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, H, 48, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    attnfast.replace(model, verbose=False)
    return model


def rows_of(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def sharpen(model: Any, head: int, factor: float) -> None:
    """Multiply the queries of a head of the first layer."""
    with torch.no_grad():
        model.layers[0].self_attn.in_proj_weight.view(3, H, -1)[0, head] *= factor


def test_rows_are_what_was_seen(tmp_path: Path) -> None:
    model, path = encoder(), tmp_path / "heads.csv"
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[0, 15:] = True
    xs = torch.randn(5, B, T, E)
    path.write_text("of another training")
    with lens.Monitor(model, every=2, out=path), lens.observe(model, every=2) as seen:
        for x in xs:
            model(x, src_key_padding_mask=padding)
            with torch.no_grad():
                model.layers[0](x)  # an evaluation, or a part of it, is no step
    with lens.observe(model) as seen:
        model(xs[2], src_key_padding_mask=padding)
    assert not watching.now
    rows = rows_of(path)
    assert list(rows[0]) == NAMES
    assert [row["step"] for row in rows] == ["0"] * 8 + ["2"] * 8 + ["4"] * 8
    for row, right in zip(rows[8:16], seen.table().to_dict("records"), strict=True):
        assert (row["layer"], int(row["head"])) == (right["layer"], right["head"])
        for name in ("entropy", "breadth", "focus"):
            assert float(row[name]) == pytest.approx(right[name], rel=1e-4)
        assert float(row["max_logit"]) == pytest.approx(right["max_logit_max"], rel=1e-4)


class Board:
    """As torch.utils.tensorboard.SummaryWriter has it."""

    def __init__(self) -> None:
        self.scalars: dict[tuple[str, int], float] = {}

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.scalars[tag, global_step] = scalar_value


class Run:
    """As wandb's run has it."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []

    def log(self, data: dict[str, Any]) -> None:
        self.logged.append(data)


def test_tensorboard_and_wandb(tmp_path: Path) -> None:
    board, run, path = Board(), Run(), tmp_path / "heads.csv"
    model, x = encoder(), torch.randn(B, T, E)
    first, second = lens.Monitor(model, out=board), lens.Monitor(model, out=run)
    with first, second, lens.Monitor(model, out=str(path)):
        model(x)
        model(2 * x)
    rows = rows_of(path)
    assert len(rows) == 16
    assert len(board.scalars) == 16 * 4
    assert len(run.logged) == 2
    for row in rows:
        step = int(row["step"])
        for name in NAMES[3:]:
            tag = f"{name}/{row['layer']}/{row['head']}"
            assert board.scalars[tag, step] == float(row[name])
            assert run.logged[step][tag] == float(row[name])
            assert run.logged[step]["lens/step"] == step


def warned(model: nn.Module, xs: list[Tensor], monitor: lens.Monitor) -> list[str]:
    with warnings.catch_warnings(record=True) as caught, monitor:
        warnings.simplefilter("always")
        for x in xs:
            model(x)
    return [str(x.message) for x in caught if issubclass(x.category, RuntimeWarning)]


def test_a_collapse_and_its_recovery(caplog: pytest.LogCaptureFixture) -> None:
    model, x = encoder(), torch.randn(B, T, E)
    monitor = lens.Monitor(model, floor=0.2, looks=3, limit=1e9)
    assert not warned(model, [x] * 4, monitor)
    sharpen(model, 2, 1e3)
    assert not warned(model, [x] * 2, monitor)
    with caplog.at_level(logging.WARNING, "attnfast.lens"):
        (told,) = warned(model, [x] * 5, monitor)
    assert told.startswith("Monitor: step 6, 'layers.0.self_attn', head 2: the head has collapsed:")
    assert told.endswith("nats, below 0.2 in 3 looks")
    assert [record.message for record in caplog.records] == [told]
    sharpen(model, 2, 1e-3)
    assert not warned(model, [x], monitor)
    sharpen(model, 2, 1e3)
    assert len(warned(model, [x] * 3, monitor)) == 1  # anew


def test_exploding_logits() -> None:
    model, x = encoder(), torch.randn(B, T, E)
    monitor = lens.Monitor(model, floor=0.0, limit=50.0)
    assert not warned(model, [x], monitor)
    sharpen(model, 1, 1e3)
    (told,) = warned(model, [x, x], monitor)
    assert told.startswith("Monitor: step 1, 'layers.0.self_attn', head 1: logits explode: the lar")
    assert told.endswith(", beyond 50")
    sharpen(model, 1, 1e-3)
    assert not warned(model, [x], monitor)
    sharpen(model, 1, torch.nan)
    told = warned(model, [x, x], monitor)[0]
    assert told.endswith("head 1: logits explode: the largest logit is nan, beyond 50")


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = encoder()
    for error, said, options in (
        (TypeError, r"out must be a path for CSV, a SummaryWriter .*, got 3", {"out": 3}),
        (ValueError, "every must be from 1", {"every": 0}),
        (ValueError, "floor must be a number of at least 0, got -1", {"floor": -1}),
        (ValueError, "looks must be from 1", {"looks": 0}),
        (ValueError, "limit must be a number of at least 0, got -2", {"limit": -2}),
    ):
        with pytest.raises(error, match=f"Monitor: {said}"):
            lens.Monitor(model, **options)
    with pytest.raises(FileNotFoundError):
        lens.Monitor(model, out=tmp_path / "no folder" / "heads.csv")
    for name in ("lightning.pytorch", "pytorch_lightning", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    said = r"lightning_callback: needs lightning.pytorch or pytorch_lightning, which is not"
    with pytest.raises(ImportError, match=said):
        lens.lightning_callback()
    with pytest.raises(ImportError, match=r"trainer_callback: needs transformers, which is not"):
        lens.trainer_callback()


def test_transformers_trainer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from attnfast.integrations import transformers as ours

    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=E, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=H, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    config._attn_implementation = ours.register()
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(500)
    ids = [{"input_ids": x, "labels": x} for x in torch.randint(40, (24, T))]
    path = tmp_path / "heads.csv"
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=5, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, report_to=[], use_cpu=True, disable_tqdm=True,
        learning_rate=1e-5, save_strategy="no", eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    callback = lens.trainer_callback(every=2, out=path, limit=1e9, clip=0.5)
    trainer = transformers.Trainer(
        model, arguments, train_dataset=ids, eval_dataset=ids[:4], callbacks=[callback]
    )
    trainer.train()
    ours.unregister()
    assert not watching.now
    rows = rows_of(path)
    assert sorted({int(row["step"]) for row in rows}) == [0, 2, 4]
    assert len(rows) == 3 * 2 * 2 * H  # looks, halves of a batch, layers
    largest = {step: max(float(r["max_logit"]) for r in rows if r["step"] == step) for step in "04"}
    assert largest["0"] > 2
    assert largest["4"] < 1.0  # other batches than the one that it was clipped by
    with pytest.raises(ValueError, match=r"trainer_callback: clip must be a number above 0, or No"):
        lens.trainer_callback(clip=-1.0)
    with pytest.raises(ValueError, match=r"Monitor: every must be"):
        lens.trainer_callback(every=0)


def stand_in() -> ModuleType:
    """Lightning's Callback, with the hooks that are used and the arguments they are called with."""

    class Callback:
        def on_train_start(self, trainer: Any, pl_module: Any) -> None: ...
        def on_train_batch_start(
            self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
        ) -> None: ...
        def on_train_end(self, trainer: Any, pl_module: Any) -> None: ...
        def on_exception(self, trainer: Any, pl_module: Any, exception: Any) -> None: ...

    module = ModuleType("lightning.pytorch")
    module.Callback = Callback  # type: ignore[attr-defined]
    return module


class Lit(nn.Module):
    """A LightningModule's step: not through the module's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.model = encoder()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(batch).square().mean()


def test_lightning_by_a_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning", ModuleType("lightning"))
    monkeypatch.setitem(sys.modules, "lightning.pytorch", stand_in())
    module, path = Lit(), tmp_path / "heads.csv"
    callback = lens.lightning_callback(every=2, out=path, clip=0.3)
    assert isinstance(callback, sys.modules["lightning.pytorch"].Callback)
    optimizer = torch.optim.SGD(module.parameters(), 0.0)
    trainer = SimpleNamespace(optimizers=[optimizer], global_step=0)
    callback.on_train_start(trainer, module)
    x = torch.randn(B, T, E)
    for i in range(4):
        callback.on_train_batch_start(trainer, module, x, i)
        module.training_step(x, i).backward()
        optimizer.step()
        trainer.global_step += 1
    callback.on_train_end(trainer, module)
    assert not watching.now
    rows = rows_of(path)
    assert [row["step"] for row in rows] == ["0"] * 8 + ["2"] * 8
    assert rows[0]["layer"] == "model.layers.0.self_attn"
    first = [[float(row["max_logit"]) for row in part] for part in (rows[:H], rows[8 : 8 + H])]
    assert max(first[0]) > 0.31
    assert max(first[1]) <= 0.3
    callback.on_train_start(trainer, module)
    callback.on_exception(trainer, module, ValueError())
    assert not watching.now
    trainer.optimizers = [optimizer, optimizer]
    with pytest.raises(ValueError, match=r"clip must be None with several optimisers, got 2"):
        callback.on_train_start(trainer, module)
