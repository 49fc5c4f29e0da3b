"""PEFT's LoRA: on ``self_attn`` as with torch's module, merged exactly; and on ``out_proj``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import attnfast
from attnfast import MultiheadAttention, replace

E, H, B, T, CLASSES = 16, 4, 8, 5, 3
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(E, H, 32, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(E, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


def adapted(ours: bool, target: str = "self_attn") -> Any:
    """A model with LoRA on its attention, its adapters not zero."""
    model = Classifier()
    if ours:
        assert len(replace(model, verbose=False).replaced) == 2
    made = peft.get_peft_model(model, peft.LoraConfig(target_modules=[target], r=4))
    torch.manual_seed(1)
    for name, p in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.2)
    return made


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(B, T, E), torch.randint(CLASSES, (B,))


def train(model: nn.Module) -> list[float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses, (x, y) = torch.optim.AdamW(trained, lr=1e-2), [], data()
    for _ in range(5):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_it_trains_as_with_torchs_module() -> None:
    theirs, ours = adapted(False), adapted(True)
    expected, actual = train(theirs), train(ours)
    assert actual == pytest.approx(expected, rel=1e-4)
    assert actual[-1] < actual[0]
    for (name, p), q in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert p.requires_grad == q.requires_grad == ("lora_" in name)
        torch.testing.assert_close(q, p, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_adapters_count_in_inference() -> None:
    """Torch's encoder layer reads the weights without them and answers as if not adapted."""
    for ours in (False, True):
        model, (x, _) = adapted(ours), data()
        with torch.no_grad():
            trained, evaluated = model.train()(x), model.eval()(x)
        assert torch.allclose(trained, evaluated, atol=1e-5) == ours


def test_it_merges_exactly() -> None:
    """Merged, the plain model of our class gives the adapted one's answers; unmerged, its own."""
    model, (x, _) = adapted(True), data()
    train(model)
    with torch.no_grad():
        before = model.eval()(x)
        with model.disable_adapter():
            plain = model(x)
        assert not torch.allclose(plain, before, atol=1e-3)
        model.merge_adapter()
        torch.testing.assert_close(model(x), before)
        model.unmerge_adapter()
        torch.testing.assert_close(model(x), before)
        merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
        attention = merged.encoder.layers[0].self_attn
        assert type(attention) is MultiheadAttention
        assert isinstance(attention.in_proj_weight, nn.Parameter)
        torch.testing.assert_close(merged(x), before)
        unloaded = model.unload()
        torch.testing.assert_close(unloaded(x), plain)
        attnfast.restore(unloaded)
        torch.testing.assert_close(unloaded(x), plain)


def test_merged_weights_are_those_of_torchs_module() -> None:
    theirs, ours = (adapted(x).merge_and_unload().encoder for x in (False, True))
    before = Classifier().encoder.state_dict()
    for name, weight in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name
        merged = name.endswith(("in_proj_weight", "out_proj.weight"))
        assert torch.equal(weight, before[name]) != merged, name


def test_lora_on_out_proj_takes_part() -> None:
    """Torch's module reads the projection's weight without calling it: its adapters do nothing."""
    (x, y), gradients = data(), {}
    for ours in (False, True):
        model = adapted(ours, "out_proj").train()
        model.head.requires_grad_()
        nn.functional.cross_entropy(model(x), y).backward()
        adapters = [p for name, p in model.named_parameters() if "lora_" in name]
        assert len(adapters) == 4
        gradients[ours] = [p.grad is not None and bool(p.grad.any()) for p in adapters]
    assert gradients == {False: [False] * 4, True: [True] * 4}
    losses = train(model)
    assert losses[-1] < losses[0]
    with torch.no_grad():
        before = model.eval()(x)
        with model.disable_adapter():
            assert not torch.allclose(model(x), before, atol=1e-3)
        torch.testing.assert_close(model.merge_and_unload(safe_merge=True)(x), before)


def test_adapters_are_saved_and_loaded(tmp_path: Path) -> None:
    model, (x, _) = adapted(True), data()
    train(model)
    model.save_pretrained(tmp_path)
    fresh = Classifier()
    replace(fresh, verbose=False)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(x), model.eval()(x))
