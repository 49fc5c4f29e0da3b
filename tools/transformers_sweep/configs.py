"""Tiny configurations of every architecture of transformers, by the names of their fields."""

from __future__ import annotations

import inspect
import re
from typing import Any

import transformers

VOCABULARY = 100
WAYS = ("fixed", "scaled", "wide", "completed", "completed, scaled", "whole")

# What a field of that name becomes if it is a larger integer; the first match counts.
SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size|(num_embeddings|codebook_size)$", VOCABULARY),
    (r"(period|interval|pattern)$", 2),
    (r"layer_offset$", 1),
    (r"^(sliding_window|attention_chunk_size|local_attention)$", 4),
    (r"(^|_)(num_|n_)?(key_value|kv)_heads?$|num_query_groups", 2),
    (r"^qk_head_dim$", 16),
    (r"head_dim$|d_head$|d_kv$", 8),
    (r"(^|_)(n_|num_)?(\w+_)?heads?$", 4),
    (r"(n_|num_)(routed_|local_)?experts$", 4),
    (r"experts_per_tok|top_?k(_experts)?$|moe_k$|topk_group|n_group$|kpool$", 2),
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
KV_HEADS = re.compile(r"(key_value|kv)_heads?$")
# What a field that says nothing becomes, in a configuration of layers and in any.
LAYERS: dict[str, Any] = {
    "layer_types": ["full_attention"] * 2,
    "mlp_layer_types": ["dense", "sparse"],
    "attn_layer_indices": [1],
}
OPEN = {"n_shared_experts": 1, "prediction_length": 6, "vocabulary_map": {"<image>": 5}}
# What is of so many layers or heads as there were.
FEW = {"per_layer_config": None, "n_groups": 1, "attention_types": [[["global", "local"], 1]]}
QUERIES = {"num_queries": 10}  # of detectors, which choose them among the places of an image


def tiny_config(cls: type[transformers.PretrainedConfig], way: str, source: str = "") -> Any:
    """A configuration with few layers and tokens, and narrow layers.

    Args:
        cls: its class.
        way: one of `WAYS`: "fixed" widths, those of `SIZES`; "scaled", an eighth of the widths and
            of the number of heads; "wide", as they are; "completed", with all that the class's
            defaults leave to a checkpoint; "whole", those defaults alone.
        source: the code that reads it.
    """
    default = cls()
    if way == "whole":
        return cls(**QUERIES) if hasattr(default, "num_queries") else default
    completed, widths = way.startswith("completed"), "scaled" if "scaled" in way else way
    allowed = inspect.signature(cls.__init__).parameters
    changes: dict[str, Any] = {}
    for name in cls.sub_configs:
        sub = getattr(default, name, None)
        if isinstance(sub, transformers.PretrainedConfig):
            changes[name] = tiny_config(type(sub), way, source)
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
            size = _size(name)
            if size is None or value <= size:
                continue
            if widths in ("fixed", "completed") or not WIDTHS.search(name):
                changes[name] = size
            elif widths == "scaled" and not KEPT.search(name):
                changes[name] = max(1, value // 8)
    kinds = getattr(default, "layer_types", None)
    if kinds and "layer_types" in allowed:
        kept = list(dict.fromkeys(kinds))
        if completed and "full_attention" not in kept:
            kept.append("full_attention")
        kept = kept * 2 if len(kept) == 1 else kept
        changes |= {"layer_types": kept, "num_hidden_layers": len(kept)}
    if not completed:
        return cls(**changes)
    return _completed(cls, changes, default, source)


def _completed(cls: Any, changes: dict[str, Any], default: Any, source: str) -> Any:
    """The configuration with what its defaults leave open, and with parts that fit each other."""
    allowed, values = inspect.signature(cls.__init__).parameters, vars(default)
    layers = values.get("num_hidden_layers")
    for name in allowed:
        if values.get(name, 0) is None and name not in changes:
            known = OPEN if layers is None else OPEN | LAYERS
            found = known.get(name, _size(name))
            if found is not None:
                changes[name] = found
        elif name.endswith("feature_layer") and isinstance(values.get(name), list):
            changes[name] = [-1] * len(values[name])
    heads = values.get("num_attention_heads")
    for name in filter(KV_HEADS.search, allowed):
        if heads is not None and values.get(name) == heads:
            changes[name] = changes.get("num_attention_heads", heads)
    changes |= {name: few for name, few in FEW.items() if name in allowed and values.get(name)}
    if "rope_parameters" in allowed and heads is not None:
        changes |= _rotary(cls(**changes), source)
    return cls(**changes)


def _rotary(config: Any, source: str) -> dict[str, Any]:
    """Rotations for every kind of layers, or for every axis, where the code reads such."""
    given: dict[str, Any] = dict(config.rope_parameters or {})
    if "rope_parameters[layer_type]" in source:
        each = {"rope_type": "default", "rope_theta": 10000.0}
        kinds = {kind: each | given.get(kind, {}) for kind in config.layer_types}
        return {"rope_parameters": kinds}
    if "mrope_section" in source:
        width = getattr(config, "head_dim", None)
        width = width or config.hidden_size // config.num_attention_heads
        pairs = int(width * given.get("partial_rotary_factor", 1.0)) // 2
        side = pairs // 3
        return {"rope_parameters": given | {"mrope_section": [side, side, pairs - 2 * side]}}
    return {}


def _size(name: str) -> int | None:
    return next((size for rule, size in SIZES if re.search(rule, name)), None)
