"""Where a translation looks: the cross-attention's weights for one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from demo.translation.batches import Example, collate
from demo.translation.model import Translator
from demo.translation.tokens import END


def cross_attention(
    model: Translator, source: Sequence[int], target: Sequence[int]
) -> tuple[list[Tensor], list[int]]:
    """Every decoder layer's weights from a translation to its source.

    Args:
        model: left in eval mode.
        source: S ids.
        target: ids without END.

    Returns:
        Per layer fp32 [H, T, S] on the CPU, and the T ids that the rows were telling, END last.
    """
    told = [*target, END]
    batch = collate([Example(list(source), told)]).to(model.embedding.weight.device)
    maps: list[Tensor] = []

    def note(module: Any, args: tuple[Tensor, ...], options: dict[str, Any], out: Any) -> None:
        asked = {**options, "need_weights": True, "average_attn_weights": False}
        maps.append(module.forward(*args, **asked)[1][0].float().cpu())

    hooks = [
        module.register_forward_hook(note, with_kwargs=True)
        for module in model.attentions()["cross"]
    ]
    model.eval()
    try:
        with torch.inference_mode():
            model(*batch)
    finally:
        for hook in hooks:
            hook.remove()
    return maps, told
