"""``report``: what the heads of a model do with one text, as a page of HTML."""

from __future__ import annotations

import base64
import functools
import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import __version__, watching
from ..block_index import dense
from ..call import MEAN, Inputs, Options
from ..pooled import pooled
from ..requirements import fail
from .advice import Heads, advice
from .heads import ALIKE, FAULTS, NAMES, NEAR, faults_of, name_of, near, similar
from .maps import top_keys
from .observe import observe
from .shares import Shares
from .watcher import Call, Watcher

PAGE = Path(__file__).with_name("page.html")
LOWEST = -24  # the least power of 2 that a byte tells from 0
SIDE = 512  # cells of a map along each side, at most
MAP_BYTES, TOP_BYTES = 8 << 20, 8 << 20  # of all heads, before they are packed
PIECES = 3000  # tokens up to which a text is shown by token
TOP = 8  # keys that are kept of each query
SMALL = 64  # cells of the maps that heads are compared by
METRICS = (
    ("breadth", "breadth", "how many keys a query effectively attends, on average"),
    ("focus", "focus", "the probability of a query's likeliest key, on average"),
    ("reach", "reach", "the mean distance between query and key, in tokens"),
    ("sink", "sink share", "the share of all probability that the most looked-at key receives"),
    ("first", "first token", "the share of probability on the first token"),
    ("previous", "previous", "the share of probability on the token before"),
    ("next", "next", "the share of probability on the token after"),
    ("self", "self", "the share of probability on the token itself"),
    ("same", "same token", "the share of probability on the same token elsewhere"),
    ("near", "near", f"the share of probability within {NEAR} tokens"),
)


def report(
    model: nn.Module, ids: Tensor, tokens: Sequence[str], *, title: str = "", keep: float = 0.99
) -> str:
    """A page of HTML about every head of a model and one text; it needs no network.

    It has an overview of layers and heads, what each head does, by rules that it prints, heads that
    choose nothing or are saturated, heads that are alike, a map of every head to zoom into, the
    text coloured by what each token receives or looks at, and which heads could take a window, with
    the probability that this loses and what it saves. A map has at most 512 x 512 cells, fewer
    where there are many heads, so that the page stays below about 25 MB whatever the text's length.

    Args:
        model: called as ``model(ids)``, as it is: put it in evaluation first.
        ids: the text's tokens, ``(1, T)`` int64.
        tokens: each token's text.
        title: what the page calls the model.
        keep: the least share of a head's probability that an advised window keeps.

    Returns:
        The page.

    Raises:
        ImportError: There is no pandas.
        ValueError: No attention of attnfast of these T tokens ran; ``tokens`` are not T.
    """
    T = ids.shape[-1]
    if ids.shape != (1, T) or len(tokens) != T:
        fail("report", "ids", f"(1, {len(tokens)}), as there are tokens", tuple(ids.shape))
    with torch.no_grad(), observe(model) as seen:
        model(ids)
    table = seen.table()  # says what to call where there is no attention of ours
    by_token = T <= PIECES
    cells = min(T, SIDE, max(math.isqrt(MAP_BYTES // len(table)), 1))
    keys = min(TOP, T) if by_token and len(table) * T * (3 * TOP + 1) <= TOP_BYTES else 0
    look = Look(model, ids, cells, T if by_token else cells, keys)
    look.start()
    try:
        with torch.no_grad():
            model(ids)
    finally:
        look.stop()
    if not look.pictures:
        fail("report", "model", f"one whose attention is over the text's {T} tokens", look.left)
    labels = labels_of(tokens, cells)
    facts = [
        facts_of(row, look.pictures[row["layer"]])
        for row in table.to_dict("records")
        if row["layer"] in look.pictures
    ]
    return page(
        {
            "title": title or type(model).__name__,
            "about": about(T, facts, cells, look.left),
            "tokens": T,
            "cells": cells,
            "top": keys,
            "lowest": LOWEST,
            "metrics": [dict(zip(("name", "label", "says"), x, strict=True)) for x in METRICS],
            "heads": facts,
            "labels": labels,
            "text": list(tokens) if by_token else labels,
            "rules": [{"name": x.name, "says": x.says} for x in (*NAMES, *FAULTS)],
            "similar": {
                "says": f"Candidates to prune: the cosine of their maps is at least {ALIKE}.",
                "pairs": similar([x for y in look.pictures.values() for x in y.small]),
            },
            "advice": advice(look.calls, keep),
        }
    )


class Pictures(NamedTuple):
    """Of one call."""

    maps: list[str]  # a head's cells, packed codes
    received: list[str]  # a head's pieces of text, likewise
    top: list[str]  # T x TOP uint16 keys, their codes, and T bytes of what is left out; or ""
    small: Tensor  # (H, SMALL, SMALL)
    sinks: Tensor  # (H,), the share that the most looked-at piece's tokens receive, each
    places: Tensor  # (H,), which piece that is
    keys: Tensor  # (H,), how many keys a query may attend, on average
    shares: Shares


class Look(Watcher):
    """Takes pictures of the attention of one text, in memory linear in its length."""

    def __init__(self, model: nn.Module, ids: Tensor, cells: int, pieces: int, keys: int) -> None:
        super().__init__("report", model)
        self.T, self.tokens = ids.shape[1], ids
        self.cells, self.pieces, self.keys = cells, pieces, keys
        self.pictures: dict[str, Pictures] = {}
        self.calls: dict[str, Heads] = {}
        self.left: list[str] = []  # what has no pictures, and why

    def begins(self) -> bool:
        """The one forward that there is."""
        return True

    def see(self, call: Call) -> None:
        """Take the pictures of a call."""
        inputs = call.inputs
        lengths = inputs.q.shape[2], inputs.k.shape[2]
        if inputs.q.shape[0] != 1 or lengths != (self.T, self.T) or inputs.indices is not None:
            reason = "chosen keys" if inputs.indices is not None else "{} queries, {} keys"
            self.left.append(f"{call.layer}: {reason.format(*lengths)}")
            return
        watching.now, watchers = (), watching.now  # what follows is no call of the model
        try:
            self.pictures[call.layer] = self.pictures_of(call)
        finally:
            watching.now = watchers

    def pictures_of(self, call: Call) -> Pictures:
        """Of every head of a call."""
        inputs, norm = call.inputs, call.outputs.norm
        pool = functools.partial(
            pooled,
            "report",
            inputs,
            call.options,
            backend=call.backend,
            norm=norm if norm is not None and norm.numel() else None,
        )
        cells = pool(MEAN, self.cells, self.cells)[0]
        received = pool(MEAN, 1, self.pieces)[0, :, 0]
        shares = Shares.of(call, call.backend, self.tokens)
        top = [""] * len(cells)
        if self.keys:
            asked = as_asked(inputs, call.options)
            indices, p, left_out = (x[0] for x in top_keys(inputs.q, inputs.k, self.keys, **asked))
            parts = (indices.to(torch.uint16), codes_of(p), (255 * left_out).round().byte())
            top = [packed(*(part[h] for part in parts)) for h in range(len(cells))]
        side = min(SMALL, self.cells)
        sinks, places = received.max(1)
        head = inputs.q[:, :1], inputs.k[:, :1]
        self.calls[call.layer] = Heads(*head, call.options.causal, shares.distances)
        return Pictures(
            [packed(x) for x in codes_of(cells)],
            [packed(x) for x in codes_of(received)],
            top,
            nn.functional.adaptive_avg_pool2d(cells, side),
            sinks,
            places,
            allowed(call),
            shares,
        )


def as_asked(inputs: Inputs, options: Options) -> dict[str, Any]:
    """What changes the scores of a call with T = S, as `attnfast.attention` is given it."""
    mask = inputs.mask
    if inputs.block_starts is not None:
        assert inputs.block_index is not None
        assert inputs.block_bits is not None
        T = inputs.q.shape[2]
        blocks = inputs.block_starts, inputs.block_index, inputs.block_bits
        mask = dense(*blocks, slice(0, T), T)
    window: Any = inputs.windows
    if window is None:
        sides = options.window_left, options.window_right
        window = tuple(None if size < 0 else size for size in sides)
    return {
        "mask": mask,
        "bias": inputs.bias,
        "causal": options.causal,
        "window": window,
        "align": options.align_offset if inputs.align is None else inputs.align,
        "scale": options.scale,
        "softcap": options.softcap or None,
        "alibi_slopes": inputs.alibi_slopes,
        "sinks": inputs.sinks,
    }


def allowed(call: Call) -> Tensor:
    """How many keys a query may attend, on average over queries, (H,): of equal scores, e^lse."""
    q, k, v = (torch.zeros_like(x[..., :8]) for x in call.inputs[:3])
    bias = call.inputs.bias
    if bias is not None:
        bias = torch.where(bias == -torch.inf, bias, 0)
    inputs = call.inputs._replace(q=q, k=k, v=v, bias=bias, alibi_slopes=None, sinks=None)
    options = call.options._replace(stats=0, weights=0, dropout_p=0.0)
    return call.compute(inputs, options).lse.double().exp().mean((0, 2))


def facts_of(row: dict[str, Any], pictures: Pictures) -> dict[str, Any]:
    """What the page says of a head."""
    h, shares = row["head"], pictures.shares
    facts = {name: float(row[name]) for name in ("breadth", "breadth_p95", "focus", "reach")}
    facts |= {name: float(values[h]) for name, values in shares.table.items()}
    facts |= {"near": float(near(shares.distances)[h]), "sink": float(pictures.sinks[h])}
    facts["keys"] = float(pictures.keys[h])
    return {
        "layer": row["layer"],
        "head": h,
        **facts,
        "name": name_of(facts),
        "faults": faults_of(facts),
        "sink_token": int(pictures.places[h]),
        "map": pictures.maps[h],
        "received": pictures.received[h],
        "top": pictures.top[h],
    }


def codes_of(p: Tensor) -> Tensor:
    """A byte for each probability: 0 for less than 2^LOWEST, else even steps of its logarithm."""
    return (255 * (1 - p.log2() / LOWEST)).round().clamp(0, 255).byte()


def packed(*parts: Tensor) -> str:
    """Tensors' bytes one after another, squeezed, as text."""
    data = b"".join(part.contiguous().view(torch.uint8).numpy().tobytes() for part in parts)
    return base64.b64encode(zlib.compress(data, 6)).decode()


def pieces(text: str, names: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[str]:
    """Each token's part of the text, with what precedes it; its name where it has none."""
    result, end = [], 0
    for name, (first, last) in zip(names, offsets, strict=True):
        result.append(text[min(end, first) : last] if last > first else name)
        end = max(end, last)
    return result


def labels_of(tokens: Sequence[str], cells: int) -> list[str]:
    """Of each cell the text that it stands for, or its beginning."""
    T, labels = len(tokens), []
    for cell in range(cells):
        text = "".join(tokens[cell * T // cells : (cell + 1) * T // cells])
        labels.append(text if len(text) <= 60 else f"{text[:59]}…")
    return labels


def about(T: int, facts: list[dict[str, Any]], cells: int, left: list[str]) -> str:
    """The page's second line."""
    layers = len({x["layer"] for x in facts})
    text = f"A text of {T} tokens, {layers} layers, {len(facts)} heads."
    if cells < T:
        text += f" A map has {cells} x {cells} cells, each the mean of its tokens' probabilities."
    if left:
        text += f" Left out: {'; '.join(left)}."
    return f"{text} attnfast {__version__}, torch {torch.__version__}."


def page(content: dict[str, Any]) -> str:
    """The page that shows this content."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return PAGE.read_text(encoding="utf-8").replace(
        ">DATA<", f">{text.replace('<', chr(92) + 'u003c')}<", 1
    )
