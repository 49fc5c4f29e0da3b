"""The report: it holds what dense attention has; its names, its errors, its page in use."""

from __future__ import annotations

import base64
import json
import re
import sys
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import attnfast
from attnfast import lens
from attnfast.lens import heads
from attnfast.lens.advice import lost, share_of_scores, windows_of

module = sys.modules["attnfast.lens.report"]
VOCABULARY, E, H = 256, 32, 4


class Bytes(nn.Module):
    """A small Transformer over bytes."""

    def __init__(self, layers: int = 2, positions: int | None = 400) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(VOCABULARY, E)
        self.positions = nn.Embedding(positions, E) if positions else None
        layer = nn.TransformerEncoderLayer(E, H, 48, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        with torch.no_grad():
            for block in self.encoder.layers:
                block.self_attn.in_proj_weight.mul_(3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        if self.positions is not None:
            x = x + self.positions(torch.arange(ids.shape[1]))
        return self.encoder(x)


def bytes_model(layers: int = 2, positions: int | None = 400) -> Bytes:
    """With our attention; also what the command is given."""
    model = Bytes(layers, positions).eval()
    attnfast.replace(model, verbose=False)
    return model


def endless_model() -> Bytes:
    return bytes_model(1, None)


def plain_model() -> nn.Module:
    return Bytes().eval()


def not_a_model() -> int:
    return 3


def text_of(T: int) -> tuple[Tensor, list[str]]:
    text = ("the cat sat on the mat. <b>&amp;</b> " * (T // 20 + 1))[:T]
    return torch.tensor([list(text.encode())]), list(text)


def content_of(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found is not None
    return json.loads(found[1])


def unpacked(text: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)


def probabilities(codes: np.ndarray) -> np.ndarray:
    return np.where(codes == 0, 0, 2.0 ** (-24 * (1 - codes / 255.0)))


def held(codes: np.ndarray, right: Tensor) -> None:
    """A byte is at most half of its step away from what it stands for."""
    apart = np.abs(np.log2(np.maximum(probabilities(codes), 2.0**-24.1)) - right.log2().numpy())
    assert apart[right.numpy() > 2.0**-23.9].max() < 0.5 * 24 / 255 + 1e-3


def dense_maps(model: Bytes, ids: Tensor) -> Tensor:
    """(layers, H, T, T), fp64."""
    double = Bytes().double().eval()
    double.load_state_dict(model.state_dict())
    x = double.words(ids) + double.positions(torch.arange(ids.shape[1]))
    maps = []
    for block in double.encoder.layers:
        maps.append(
            block.self_attn(x, x, x, need_weights=True, average_attn_weights=False)[1][0].detach()
        )
        x = block(x)
    return torch.stack(maps)


def pooled(maps: Tensor, n: int) -> Tensor:
    T = maps.shape[-1]
    edges = [c * T // n for c in range(n + 1)]
    rows = [maps[..., a:b, :].mean(-2) for a, b in pairwise(edges)]
    whole = torch.stack(rows, -2)
    return torch.stack([whole[..., a:b].mean(-1) for a, b in pairwise(edges)], -1)


@pytest.mark.parametrize("side", [512, 7])
def test_what_the_page_holds(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SIDE", side)
    model, T = bytes_model(), 60
    ids, tokens = text_of(T)
    content = content_of(lens.report(model, ids, tokens, title="A </script> name"))
    n = content["cells"]
    assert (content["tokens"], n, content["text"]) == (T, min(T, side), tokens)
    assert content["title"] == "A </script> name"
    maps = dense_maps(model, ids).flatten(0, 1)
    assert len(content["heads"]) == len(maps) == 2 * H
    for head, right in zip(content["heads"], maps, strict=True):
        held(unpacked(head["map"]).reshape(n, n), pooled(right, n))
        held(unpacked(head["received"]), right.mean(0))
        assert head["sink"] == pytest.approx(float(right.mean(0).max()), rel=1e-4)
        assert head["sink_token"] == int(right.mean(0).argmax())
        assert head["keys"] == pytest.approx(T, rel=1e-4)
        assert head["self"] == pytest.approx(float(right.diagonal().mean()), rel=1e-4)
        top = unpacked(head["top"])
        keys = top[: 2 * T * 8].view(np.uint16).reshape(T, 8)
        best = right.topk(8)
        held(top[2 * T * 8 : 3 * T * 8].reshape(T, 8), best.values)
        picked = right.gather(1, torch.from_numpy(keys.astype(np.int64)))
        torch.testing.assert_close(picked, best.values, atol=1e-5, rtol=0)
        rest = 1 - best.values.sum(1).numpy()
        assert np.abs(top[3 * T * 8 :] / 255 - rest).max() < 0.5 / 255 + 1e-4
    labels = content["labels"]
    assert "".join(labels) == "".join(tokens)
    assert len(labels) == n


def test_a_long_text_is_shown_by_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECES", 700)
    ids, tokens = text_of(1500)
    page = lens.report(endless_model(), ids, tokens)
    content = content_of(page)
    assert content["top"] == 0
    assert len(content["text"]) == content["cells"] == 512
    assert {len(unpacked(head["received"])) for head in content["heads"]} == {512}
    assert len(page) < 3e6


T = 30
CALLS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"window": (3, 2), "scale": 1.5},
    "a window a head": {"window": torch.tensor([[3, 0], [-1, 2], [0, 0], [-1, -1]])},
    "mask": {"mask": torch.ones(T, T, dtype=torch.bool).triu(-4), "softcap": 2.0},
    "blocks": {"mask": attnfast.BlockMask.from_mask_mod(lambda b, h, q, k: q >= k, 1, 1, T, T)},
    "bias": {"bias": torch.linspace(-2, 2, T), "alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4])},
    "sinks": {"sinks": torch.zeros(4), "align": 2, "causal": True},
}


@pytest.mark.parametrize("name", CALLS)
def test_every_option_of_a_call(name: str) -> None:
    class Model(nn.Module):
        def forward(self, ids: Tensor) -> Any:
            return attnfast.attention(q, k, k, **CALLS[name])

    torch.manual_seed(0)
    q, k = torch.randn(1, 4, T, 16), torch.randn(1, 2, T, 16)
    ids, tokens = text_of(T)
    heads_found = content_of(lens.report(Model(), ids, tokens))["heads"]
    double = [x.double() for x in (q, k, k)]
    options = dict(CALLS[name])
    maps = attnfast.attention(*double, return_weights=True, **options)[1][0]
    equal = attnfast.attention(*(0 * x for x in double), return_lse=True, **strip(options))[1]
    for head, right, keys in zip(heads_found, maps, equal[0].exp().mean(1), strict=True):
        held(unpacked(head["map"]).reshape(T, T), right)
        best = right.topk(8)
        codes = unpacked(head["top"])[2 * T * 8 : 3 * T * 8].reshape(T, 8)
        held(codes, best.values)
        assert head["keys"] == pytest.approx(float(keys), rel=1e-4)


def strip(options: dict[str, Any]) -> dict[str, Any]:
    """Without what changes the scores of keys that may be attended."""
    return {x: y for x, y in options.items() if x not in ("bias", "alibi_slopes", "sinks")}


class Planted(nn.Module):
    """Heads that do what their biases say."""

    def __init__(self, biases: Tensor) -> None:
        super().__init__()
        self.biases = biases  # (H, T, T)

    def forward(self, ids: Tensor) -> Tensor:
        q = torch.zeros(1, len(self.biases), ids.shape[1], 8)
        return attnfast.attention(q, q, q, bias=self.biases[None])


def test_names_faults_and_pairs() -> None:
    T = 100
    torch.manual_seed(0)
    ids = torch.randint(0, 5, (1, T))
    t = torch.arange(T)
    distance = t[:, None] - t
    zero = torch.zeros(T, T)
    same = (ids[0][:, None] == ids[0]) & (distance != 0)
    planted = {
        "previous": 20.0 * (distance == 1),
        "next": 20.0 * (distance == -1),
        "sink": 7.0 * (t == 40).expand(T, T) + torch.randn(T, T),
        "copy": 2.0 * same,
        "broad": 0.8 * torch.randn(T, T),
        "local": torch.where(distance.abs() < 6, 3.0 + torch.randn(T, T), -2.0),
        "": 2.6 * torch.randn(T, T),
        "even": zero,
        "also even": zero + 1e-3 * torch.randn(T, T),
        "one": 40.0 * (t == 40).expand(T, T),
    }
    model = Planted(torch.stack([x.float() for x in planted.values()]))
    content = content_of(lens.report(model, ids, [str(x) for x in ids[0].tolist()]))
    names = [head["name"] for head in content["heads"]]
    assert names == [*list(planted)[:7], "broad", "broad", "sink"]
    faults = [head["faults"] for head in content["heads"]]
    # the first query has no key before it, the last none after: the rest has nearly one key
    assert faults == [["collapsed"]] * 2 + [[]] * 5 + [["dead"]] * 2 + [["dead", "collapsed"]]
    assert content["similar"]["pairs"][0][:2] == [7, 8]
    assert content["heads"][9]["sink_token"] == 40
    rows = {row["index"]: row for row in content["advice"]["rows"]}
    assert rows[0]["window"] == [1, 0]
    assert rows[1]["window"] == [0, 1]
    assert {4, 7, 9}.isdisjoint(rows)
    assert all(row["lost"] <= 0.01 and row["faster"] > 0 for row in rows.values())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(0, 0), (3, 0), (7, 15), (-1, 1), (63, -1), (-1, -1)])
def test_shares_of_windows(causal: bool, window: tuple[int, int]) -> None:
    T = 40
    t = torch.arange(T)
    distance = t[:, None] - t
    seen = torch.ones(T, T, dtype=torch.bool) if not causal else distance >= 0
    left, right = (T if size < 0 else size for size in window)
    inside = seen & (distance <= left) & (-distance <= right)
    assert share_of_scores(T, causal, *window) == pytest.approx(float(inside.sum() / seen.sum()))
    p = torch.rand(T, T) * seen
    places = torch.where(
        distance == 0, 32, 32 + distance.sign() * (1 + distance.abs().clamp(min=1).log2().floor())
    ).long()
    mass = torch.zeros(64).index_add(0, places.flatten(), p.flatten())
    right_share = float((p * ~inside).sum() / p.sum())
    assert lost(mass, *window) == pytest.approx(right_share, abs=1e-5)
    assert float(heads.near(mass[None] / mass.sum())) == pytest.approx(
        float((p * (distance.abs() < heads.NEAR)).sum() / p.sum()), abs=1e-5
    )


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.99])
def test_windows_are_the_narrowest(keep: float) -> None:
    torch.manual_seed(0)
    mass = torch.rand(20, 64) ** 30
    for head, window in zip(mass, windows_of(mass, keep).tolist(), strict=True):
        assert lost(head, *window) <= 1 - keep + 1e-6
        others = [(2**i - 1, 2**j - 1) for i in range(32) for j in range(33)]
        better = [other for other in others if sum(other) < sum(window)]
        assert all(lost(head, *other) > 1 - keep - 1e-6 for other in better)


def test_other_calls_are_left_out_by_name() -> None:
    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = bytes_model(1)
            self.cross = attnfast.MultiheadAttention(E, H, batch_first=True)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.inner(ids)
            return self.cross(x, x[:, :7], x[:, :7], need_weights=False)[0]

    ids, tokens = text_of(30)
    content = content_of(lens.report(Crossed().eval(), ids, tokens))
    assert {head["layer"] for head in content["heads"]} == {"inner.encoder.layers.0.self_attn"}
    assert "Left out: cross: 30 queries, 7 keys." in content["about"]


# ---- the command

SAID = "return document.getElementById('said').textContent"
ACTIVE = "return document.activeElement.title || document.activeElement.id"


@pytest.mark.skipif(browser.MISSING is not None, reason=str(browser.MISSING))
def test_the_page_is_used_by_keys_and_mouse(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    ids, tokens = text_of(120)
    path.write_text(lens.report(bytes_model(), ids, tokens, title="bytes"))
    content = content_of(path.read_text())
    maps = dense_maps(bytes_model(), ids)
    with browser.browser() as window:
        window.open(path)
        assert window.waits_for(SAID).startswith("Coloured by what each token receives")
        assert window.run("return document.title") == "Heads of bytes"
        # the overview: one cell is in the order of Tab, arrows move, Enter opens
        assert window.run("return document.querySelectorAll('[role=gridcell]').length") == 2 * H
        assert (
            len(window.run("return document.querySelectorAll('[role=gridcell][tabindex=\"0\"]')"))
            == 1
        )
        window.run("document.querySelector('[role=gridcell]').focus()")
        window.press("ArrowDown", "ArrowRight", "ArrowRight", "ArrowLeft")
        assert window.run(ACTIVE).startswith("layer 1, head 1: breadth")
        window.press("Enter")
        assert window.run(ACTIVE) == "map"
        assert window.run("return document.getElementById('opened').textContent") == (
            "Layer 1, head 1 of encoder.layers.1.self_attn"
        )
        # the map: a cursor, zoom, what the row looks at
        window.press("ArrowDown", "ArrowDown", "ArrowRight")
        p = float(maps[1, 1, 2, 1])
        where = window.waits_for(
            "const x = document.getElementById('where').textContent;"
            "return x.startsWith('token 2 “e”') && x"
        )
        assert where.startswith("token 2 “e” looks at token 1 “h”: ")
        assert float(where.rpartition(" ")[2]) == pytest.approx(p, rel=0.06)
        assert (
            window.run("return document.getElementById('shown').textContent") == "all of the text"
        )
        window.press("+", "+")
        shown = window.run("return document.getElementById('shown').textContent")
        assert re.fullmatch(r"rows \d+ to \d+, columns \d+ to \d+", shown)
        window.press("0")
        assert (
            window.run("return document.getElementById('shown').textContent") == "all of the text"
        )
        window.press("Enter")
        asked = window.waits_for(
            f"const x = (() => {{ {SAID} }})(); return x.startsWith('token 2') && x"
        )
        best = int(maps[1, 1, 2].argmax())
        assert asked.startswith(f"token 2 “e” looks at token {best} ")
        window.press("Escape")
        window.waits_for(f"const x = (() => {{ {SAID} }})(); return x.startsWith('Coloured')")
        window.press("Escape")
        assert window.run(ACTIVE).startswith("layer 1, head 1: breadth")
        # the text: arrows, Enter, a click
        window.run("document.querySelector('[role=option]').focus()")
        window.press("ArrowRight", "ArrowDown", "Enter")
        window.waits_for(f"const x = (() => {{ {SAID} }})(); return x.startsWith('token 11 ')")
        x, y = window.run(
            "const o = document.querySelectorAll('[role=option]')[4];"
            "o.scrollIntoView({block: 'center'});"
            "const b = o.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]"
        )
        window.click(int(x), int(y))
        window.waits_for(f"const x = (() => {{ {SAID} }})(); return x.startsWith('token 4 ')")
        assert (
            window.run("return document.querySelector('#text [aria-selected=true]').textContent")
            == tokens[4]
        )
        # other numbers, and nothing without a name
        window.run("document.querySelector('input[value=focus]').click()")
        assert "focus" in window.run("return document.querySelector('[role=gridcell]').title")
        unnamed = "[...document.querySelectorAll('[role=gridcell], [role=option], canvas, button')]"
        assert (
            window.run(
                f"return {unnamed}.filter(x => !(x.title || x.ariaLabel || x.textContent)).length"
            )
            == 0
        )
        assert window.errors() == []
        assert "<b>&amp;</b>" in window.run("return document.getElementById('text').textContent")
        assert content["tokens"] == 120
