"""Inputs of transformers' models, by the names of ``forward``'s parameters."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import more_inputs
from .configs import VOCABULARY

B, L, L_DECODER = 2, 10, 7
BINS = ("num_mel_bins", "feature_size", "input_dim")  # of a spectrum
PADDING = {"none": 0, "right": 4, "left": -4}  # padded tokens of the second row


def sets(model: Any, padding: str) -> Iterator[dict[str, Any]]:
    """Sets of inputs that ``forward`` may take, the likeliest first."""
    names = inspect.signature(model.forward).parameters
    text, audio = _text(names, padding), _audio(names, model.config)
    pixels = {name: x for name, x in _vision(model.config).items() if name in names}
    if text:
        yield text
        yield {**text, **pixels}
    if pixels:
        yield {name: x for name, x in pixels.items() if name == "pixel_values"} or pixels
    yield from audio
    yield from _hidden(model, names, padding)
    if text:
        for sound in audio:
            yield {**text, **sound}
    if "pixel_values" in pixels:  # many to a row
        frames = getattr(getattr(model.config, "vision_config", model.config), "num_frames", 2)
        yield text | {"pixel_values": torch.stack([pixels["pixel_values"]] * frames, 1)}
    yield from more_inputs.heard(audio, names)
    yield from more_inputs.codebooks(model.config, names, text)
    yield from more_inputs.series(model.config, names)
    for patches in more_inputs.patches(model.config, names):
        yield text | patches
    embedded = bool(text) or _is_part(model, names)
    yield from more_inputs.named(model.config, names, text, embedded)


def _text(names: Any, padding: str) -> dict[str, Any]:
    """Token ids of two rows, the second padded."""
    generator = torch.Generator().manual_seed(1)
    pad = PADDING[padding]
    found: dict[str, Any] = {}
    for ids, mask, length in (
        ("input_ids", "attention_mask", L),
        ("decoder_input_ids", "decoder_attention_mask", L_DECODER),
    ):
        if ids not in names:
            continue
        found[ids] = torch.randint(3, VOCABULARY // 2, (B, length), generator=generator)
        if pad and mask in names:
            found[mask] = _own(length, pad)
    if found and "bbox" in names:
        found["bbox"] = torch.arange(4).expand(B, L, 4).clone()
    return found


def _own(length: int, pad: int) -> Tensor:
    """The second row padded by that many tokens, on the left if negative."""
    own = torch.ones(B, length, dtype=torch.long)
    own[1, slice(-pad) if pad < 0 else slice(length - pad, None)] = 0
    return own


def _hidden(model: Any, names: Any, padding: str) -> Iterator[dict[str, Tensor]]:
    """Embeddings where no tokens are taken."""
    width = getattr(model.config, "hidden_size", None)
    name = next((x for x in ("inputs_embeds", "hidden_states", "query_embeds") if x in names), None)
    if name is None or not isinstance(width, int):
        return
    if _is_part(model, names):
        return
    generator = torch.Generator().manual_seed(5)
    found = {name: torch.randn((B, L, width), generator=generator)}
    if PADDING[padding] and "attention_mask" in names:
        found["attention_mask"] = _own(L, PADDING[padding])
    yield found


def _is_part(model: Any, names: Any) -> bool:
    """Whether a model is given masks ready-made, by the whole that it is of."""
    makes = "create_" in inspect.getsource(type(model).forward)
    return "attention_mask" in names and not makes


def _vision(config: Any) -> dict[str, Tensor]:
    """Pixels as the configuration, or the one of its vision part, says."""
    of = getattr(config, "vision_config", config)
    size = getattr(of, "image_size", None) or 64
    height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
    generator = torch.Generator().manual_seed(2)
    channels = getattr(of, "num_channels", 3)
    shape = (B, channels if isinstance(channels, int) else 3, height, width)
    frames = getattr(of, "num_frames", None) or 2
    return {
        "pixel_values": torch.randn(shape, generator=generator),
        "pixel_values_videos": torch.randn(
            (B, frames if isinstance(frames, int) else 2, *shape[1:]), generator=generator
        ),
    }


def _audio(names: Any, config: Any) -> list[dict[str, Tensor]]:
    """A waveform, or features in one order or the other."""
    own = next((x for x in (getattr(config, field, None) for field in BINS) if x), 80)
    generator = torch.Generator().manual_seed(3)
    found = []
    if "input_values" in names:
        wave = torch.randn((B, 4000), generator=generator)
        found += [{"input_values": wave}, {"input_values": wave[:, None]}]
        spectrum = (B, getattr(config, "max_length", None) or 64, own)
        found.append({"input_values": torch.randn(spectrum, generator=generator)})
    if "input_features" in names:
        shapes = [(B, 64, 80), (B, 80, 64), (B, 80, 3000), (B, 128, 64), (B, 64, 160), (B, 64, 128)]
        for shape in [*shapes, (B, 64, own), (B, own, 64), (B, own, 200)]:
            found.append({"input_features": torch.randn(shape, generator=generator)})
    if "decoder_input_ids" in names:
        tokens = torch.randint(3, VOCABULARY // 2, (B, L_DECODER), generator=generator)
        found = [{**x, "decoder_input_ids": tokens} for x in found]
    return found
