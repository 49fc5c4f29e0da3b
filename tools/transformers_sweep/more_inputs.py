"""Inputs that few of transformers' models take, by the names of ``forward``'s parameters."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .configs import VOCABULARY

B, L = 2, 10
GRID = (1, 4, 6)  # frames, rows and columns of patches of an image

# Shapes of floats, and of ids or masks; a dim may be a field of the configuration, or one of some.
WIDTH = "hidden_size|d_model|hidden_dim"
CROSS = f"encoder_hidden_size|cross_hidden_size|{WIDTH}"
FLOATS: dict[str, tuple[int | str, ...]] = {
    "encoder_hidden_states": (B, L, CROSS),
    "context_hidden_states": (B, L, WIDTH),
    "noise_embeds": (B, L, WIDTH),
    "query_embeds": (B, L, WIDTH),
    "inputs_embeds": (B, L, WIDTH),
    "hidden_states": (B, L, "input_dim|" + WIDTH),
    "context": (B, L, WIDTH),
    "patch_embeds": (B, L, WIDTH),
    "vision_features": (B, L, WIDTH),
    "text_features": (B, L, WIDTH),
    "vision_pos_encoding": (B, L, WIDTH),
    "latents": (B, WIDTH, L),
    "image": (B, 3, "image_size", "image_size"),
    "visual_feats": (B, L, "visual_feat_dim"),
    "visual_pos": (B, L, "visual_pos_dim"),
    "states": (B, L, "state_dim"),
    "actions": (B, L, "act_dim"),
    "rewards": (B, L, 1),
    "returns_to_go": (B, L, 1),
    "past_values": (B, "context_length", "num_input_channels"),
    "spectrogram": (B, L, "model_in_dim"),
    "audio_mel": (B, 64, "input_feat_size"),
}
IDS: dict[str, tuple[int | str, ...]] = {
    "qformer_input_ids": (B, L),
    "task_inputs": (B, L),
    "codes": (B, "num_quantizers", L),
    "timesteps": (B, L),
}


def patches(config: Any, names: Any) -> Iterator[dict[str, Tensor]]:
    """Patches of two images, one after another or apart, and their rows and columns."""
    of = getattr(config, "vision_config", config)
    yield from _patches_apart(of, names)
    grid = next((name for name in ("grid_thw", "image_grid_thw") if name in names), None)
    main = next((name for name in ("pixel_values", "hidden_states") if name in names), None)
    side = getattr(config, "patch_size", None)
    if grid is None or main is None or not isinstance(side, int):
        return
    channels = getattr(config, "in_channels", None) or getattr(config, "num_channels", 3)
    frames = getattr(config, "temporal_patch_size", 1)
    number = B * math.prod(GRID)
    generator = torch.Generator().manual_seed(6)
    for shape in (
        (number, channels * frames * side * side),
        (number, channels * side * side),
        (number, channels, side, side),
        (1, number, channels, side, side),
    ):
        yield {main: torch.randn(shape, generator=generator), grid: torch.tensor([GRID] * B)}


def named(
    config: Any, names: Any, text: dict[str, Any], embedded: bool
) -> Iterator[dict[str, Any]]:
    """Whatever has a known name: first what ``forward`` requires, then all of it.

    Hidden states are not among it if they are ``embedded`` elsewhere.
    """
    generator = torch.Generator().manual_seed(7)
    found: dict[str, Any] = {}
    for name in names:
        if embedded and name in ("inputs_embeds", "hidden_states"):
            continue
        shape = _shape(config, FLOATS.get(name))
        if shape is not None:
            found[name] = torch.randn(shape, generator=generator)
        shape = _shape(config, IDS.get(name))
        if shape is not None:
            high = VOCABULARY // 2 if name.endswith("ids") else 4
            found[name] = torch.randint(0, high, shape, generator=generator)
    required = {name for name in found if names[name].default is inspect.Parameter.empty}
    if required:
        yield {**text, **{name: found[name] for name in found if name in required}}
    if found.keys() - required:
        yield {**text, **found}


def codebooks(config: Any, names: Any, text: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Tokens of several codebooks at once, last, before the length, or in the place of rows."""
    parts = [config, *(getattr(config, part, None) for part in ("decoder", "decoder_config"))]
    counts = [
        getattr(part, name, None) for part in parts for name in ("num_codebooks", "num_channels")
    ]
    count = next((x for x in counts if isinstance(x, int)), None)
    name = next((name for name in ("decoder_input_ids", "input_ids") if name in text), None)
    if count is None or name is None:
        return
    length = text[name].shape[1]
    generator = torch.Generator().manual_seed(8)
    for shape in ((B, length, count), (B, count, length), (B * count, length)):
        yield text | {name: torch.randint(3, VOCABULARY // 2, shape, generator=generator)}


def _patches_apart(config: Any, names: Any) -> Iterator[dict[str, Tensor]]:
    side, (_, rows, columns) = getattr(config, "patch_size", None), GRID
    width = getattr(config, "patch_embed_hidden_size", None)
    if width is None and not isinstance(side, int):
        return
    width = width or 3 * side * side
    patches = torch.randn((B, rows * columns, width), generator=torch.Generator().manual_seed(10))
    if "flattened_patches" in names:
        places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)) + 1.0
        yield {"flattened_patches": torch.cat([places.expand(B, -1, -1), patches], -1)}
    if "spatial_shapes" in names:
        yield {
            "pixel_values": patches,
            "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.long),
            "spatial_shapes": torch.tensor([[rows, columns]] * B),
        }


def series(config: Any, names: Any) -> Iterator[dict[str, Tensor]]:
    """The past of series of numbers, and features of its times."""
    lags = getattr(config, "lags_sequence", None)
    if "past_time_features" not in names or not lags:
        return
    length, generator = config.context_length + max(lags), torch.Generator().manual_seed(9)
    yield {
        "past_values": torch.randn((B, length), generator=generator),
        "past_time_features": torch.randn(
            (B, length, config.num_time_features), generator=generator
        ),
        "past_observed_mask": torch.ones(B, length),
    }


def heard(audio: list[dict[str, Tensor]], names: Any) -> Iterator[dict[str, Tensor]]:
    """Features of sounds, and which of their frames are any; or one after another, and how many."""
    if "feature_lens" in names:
        x = audio[-1]["input_features"]  # [B, bins, frames]
        after = {"aftercnn_lens": torch.tensor([x.shape[2] // 2] * B)}
        yield {
            "input_features": x.transpose(0, 1).flatten(1),
            "feature_lens": torch.tensor([x.shape[2]] * B),
            **{name: lengths for name, lengths in after.items() if name in names},
        }
    for given in audio if "input_features_mask" in names else ():
        x = given.get("input_features")
        for frames in (x.shape[2], x.shape[1]) if x is not None else ():
            yield {**given, "input_features_mask": torch.ones((B, frames), dtype=torch.long)}


def _shape(config: Any, dims: tuple[int | str, ...] | None) -> tuple[int, ...] | None:
    """Numbers for all dims; None if the configuration lacks one."""
    sizes = []
    for dim in dims or ():
        fields = dim.split("|") if isinstance(dim, str) else []
        named = [getattr(config, field, None) for field in fields]
        size = next((x for x in named if isinstance(x, int)), None) if fields else dim
        if not isinstance(size, int):
            return None
        sizes.append(size)
    return tuple(sizes) or None
