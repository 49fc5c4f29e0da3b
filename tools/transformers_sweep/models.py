"""Tiny models of every architecture of transformers, and inputs for them, made generically.

Sizes come from the names of the configuration's fields, inputs from the names of ``forward``'s
parameters. Nothing here knows an architecture by its name.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

B, L, L_DECODER = 2, 10, 7
LARGEST = 110_000_000  # parameters
VOCABULARY = 100
PADDING = {"none": 0, "right": 4, "left": -4}  # padded tokens of the second row

# What a field of that name becomes if it is a larger integer; the first match counts.
SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size|(num_embeddings|codebook_size)$", VOCABULARY),
    (r"(period|interval|pattern)$", 2),
    (r"layer_offset$", 1),
    (r"^(sliding_window|attention_chunk_size|local_attention)$", 4),
    (r"(^|_)(num_|n_)?(key_value|kv)_heads?$|num_query_groups", 2),
    (r"head_dim$|d_head$|d_kv$", 8),
    (r"(^|_)(n_|num_)?(\w+_)?heads?$", 4),
    (r"(n_|num_)(routed_|local_)?experts$", 4),
    (r"experts_per_tok|top_?k$|topk_group|n_group$", 2),
    (r"(^|_)(num_|n_)(\w+_)?(layers?|blocks)$|_layers$|^depth$", 2),
    (r"lora_rank$", 16),
    (r"(intermediate_size|ffn_dim|d_ff|mlp_dim|n_inner|ffn_size|ffn_hidden_size)$", 64),
    (r"(hidden_size|d_model|n_embd|embed_dim|emb_dim|hidden_dim|projection_dim|d_embed)$", 32),
    (r"(max_position_embeddings|n_positions|max_seq_len|max_sequence_length)$", 64),
    (r"max_(source|target)_positions$", 32),
    (r"image_size$", 64),
)
KEPT = re.compile(r"head_dim|d_head|rank|d_kv|image_size")  # where widths are scaled
WIDTHS = re.compile(
    r"head|rank|intermediate|ffn|d_ff|mlp|hidden|d_model|embd|emb|dim|d_kv|image_size"
)


class CannotBuild(Exception):
    """Why there is no tiny model of an architecture."""


def model_classes() -> dict[str, type[transformers.PreTrainedModel]]:
    """One model class for every configuration that has one, by the configuration's ``model_type``.

    transformers' own choice for ``AutoModel`` where it has one, else the first that computes.
    """
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    folder = Path(inspect.getfile(transformers)).parent / "models"
    for path in sorted(folder.glob("*/modeling_*.py")):
        try:
            importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
        except ImportError:
            continue
    chosen: dict[str, type[transformers.PreTrainedModel]] = {}
    base = transformers.PreTrainedModel
    ordered = sorted(_subclasses(base), key=lambda c: (len(c.__name__), c.__name__))
    for cls in ordered:
        config = cls.config_class
        if not isinstance(config, type) or not cls.__module__.startswith("transformers.models."):
            continue
        name = config.model_type or config.__name__
        names = MODEL_MAPPING_NAMES.get(name, ())
        preferred = cls.__name__ in ((names,) if isinstance(names, str) else names)
        computes = cls.forward is not nn.Module.forward
        if preferred or (computes and name not in chosen):
            chosen[name] = cls
    return dict(sorted(chosen.items()))


def _subclasses(cls: type) -> Iterator[type]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def tiny_config(cls: type[transformers.PretrainedConfig], how: str) -> Any:
    """A configuration with few layers and tokens, and narrow layers.

    Args:
        cls: its class.
        how: "fixed" widths, those of `SIZES`; "scaled", an eighth of the widths and of the number
            of heads; or "wide", as they are.
    """
    default = cls()
    allowed = inspect.signature(cls.__init__).parameters
    changes: dict[str, Any] = {}
    for name in cls.sub_configs:
        sub = getattr(default, name, None)
        if isinstance(sub, transformers.PretrainedConfig):
            changes[name] = tiny_config(type(sub), how)
    special = iter(range(VOCABULARY - 1, 0, -1))
    for name, value in vars(default).items():
        if name not in allowed or name.startswith("_"):
            continue
        if name == "vocab_size" and value is None:
            changes |= {"vocab_size": VOCABULARY, "pad_token_id": 0}
        elif name == "codebook_size":
            changes[name] = 64
        elif re.search(r"token_(id|index)$", name) and isinstance(value, int):
            if value >= VOCABULARY:
                first = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
                changes[name] = first[name] if name in first else next(special)
        elif isinstance(value, int) and not isinstance(value, bool):
            size = next((size for rule, size in SIZES if re.search(rule, name)), None)
            if size is None or value <= size:
                continue
            if how == "fixed" or not WIDTHS.search(name):
                changes[name] = size
            elif how == "scaled" and not KEPT.search(name):
                changes[name] = max(1, value // 8)
    kinds = getattr(default, "layer_types", None)
    if kinds and "layer_types" in allowed:
        kept = list(dict.fromkeys(kinds))
        kept = kept * 2 if len(kept) == 1 else kept
        changes |= {"layer_types": kept, "num_hidden_layers": len(kept)}
    return cls(**changes)


def build(cls: type[transformers.PreTrainedModel]) -> tuple[Any, Any, dict[str, Any]]:
    """A model with eager attention, its configuration, and inputs that it takes.

    Raises:
        CannotBuild: No sizes that were tried give a model that runs.
    """
    reason = ""
    for how in ("fixed", "scaled", "wide"):
        try:
            config = tiny_config(cls.config_class, how)
            with torch.device("meta"):
                count = sum(p.numel() for p in make(cls, config, "eager").parameters())
            if count > LARGEST:
                reason = reason or f"{count / 1e6:.0f} million parameters"
                continue
            model = make(cls, config, "eager")
            spread(model)
            return model, config, first_that_runs(model)
        except TimeoutError:
            raise
        except Exception as error:  # whatever a model says of sizes that it was not made for
            reason = told(error)
    raise CannotBuild(reason)


def first_that_runs(model: Any) -> dict[str, Any]:
    """Inputs without padding that a model takes."""
    reason: Exception = CannotBuild("forward takes none of the inputs known")
    for given in inputs(model, "none"):
        try:
            run(model, given)
        except TimeoutError:
            raise
        except Exception as error:
            reason = error if isinstance(reason, CannotBuild) else reason
        else:
            return given
    raise reason


def run(model: Any, given: dict[str, Any], **more: Any) -> Any:
    """One forward pass without gradients, its random numbers always the same."""
    torch.manual_seed(0)
    with torch.no_grad():
        return model(**copy.deepcopy(given), **more)


def make(cls: type[transformers.PreTrainedModel], config: Any, implementation: str) -> Any:
    """A model in evaluation, as it is loaded with ``attn_implementation=``."""
    torch.manual_seed(0)
    return cls._from_config(copy.deepcopy(config), attn_implementation=implementation).eval()


def told(error: Exception) -> str:
    """An error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:150]


def spread(model: nn.Module) -> None:
    """Weights large enough for uneven attention, the same for every model of these shapes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2 and p.is_floating_point():
                p.normal_(std=1.5 * p.shape[-1] ** -0.5, generator=generator)
            elif not torch.isfinite(p).all():
                p.normal_(std=0.1, generator=generator)


def inputs(model: Any, padding: str) -> Iterator[dict[str, Any]]:
    """Sets of inputs that ``forward`` may take, the likeliest first."""
    names = inspect.signature(model.forward).parameters
    text, audio = _text(names, padding), _audio(names)
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
    if "attention_mask" in names and "create_" not in inspect.getsource(type(model).forward):
        return  # a part that is given masks ready-made
    generator = torch.Generator().manual_seed(5)
    found = {name: torch.randn((B, L, width), generator=generator)}
    if PADDING[padding] and "attention_mask" in names:
        found["attention_mask"] = _own(L, PADDING[padding])
    yield found


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


def _audio(names: Any) -> list[dict[str, Tensor]]:
    """A waveform, or features in one order or the other."""
    generator = torch.Generator().manual_seed(3)
    found = []
    if "input_values" in names:
        wave = torch.randn((B, 4000), generator=generator)
        found += [{"input_values": wave}, {"input_values": wave[:, None]}]
    if "input_features" in names:
        for shape in ((B, 64, 80), (B, 80, 64), (B, 80, 3000), (B, 128, 64), (B, 64, 160)):
            found.append({"input_features": torch.randn(shape, generator=generator)})
    if "decoder_input_ids" in names:
        tokens = torch.randint(3, VOCABULARY // 2, (B, L_DECODER), generator=generator)
        found = [{**x, "decoder_input_ids": tokens} for x in found]
    return found
