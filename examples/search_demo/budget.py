"""How much work fits a promised time: pure arithmetic, and one short measurement of the encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from search_demo.encoder import SentenceEncoder, pad
from search_demo.measure import now

EMBEDDING = 60.0  # seconds for embedding everything twice
LONGEST, SHORTEST, APART = 256, 48, 16  # tokens after which a text may be cut off
STATISTICS = 1.1  # breadth and focus cost a tenth beside both models' passes
SAMPLE = 16  # texts whose embedding is timed


def steps_that_fit(seconds: float, each: float, least: int, most: int) -> int:
    """How many steps of `each` seconds take no longer than `seconds`; from `least` to `most`."""
    return min(max(int(seconds / each), least), most)


def longest_that_fits(lengths: Sequence[int], seconds: float, each: float) -> int:
    """After how many tokens to cut texts off, so that all of them fit a time.

    Args:
        lengths: tokens of the texts, uncut.
        seconds: the time.
        each: seconds that a token takes.

    Returns:
        The largest of 48, 64, ..., 256 with which they fit, and 48 where none is.
    """
    for longest in range(LONGEST, SHORTEST, -APART):
        if each * sum(min(length, longest) for length in lengths) <= seconds:
            return longest
    return SHORTEST


def token_seconds(
    models: Mapping[str, SentenceEncoder], ids: Sequence[Sequence[int]], device: torch.device
) -> float:
    """Seconds that a token takes all models together, timed over a few texts of middling length.

    Args:
        models: by name; in eval mode, on `device`.
        ids: token ids of the texts.
        device: where the models are.
    """
    by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    first = max(0, (len(ids) - SAMPLE) // 2)
    batch = pad(ids, by_length[first : first + SAMPLE]).to(device)
    seconds = 0.0
    with torch.inference_mode():
        for model in models.values():
            model(batch.tokens, batch.padding)  # first uses of memory and kernels
            start = now(device)
            model(batch.tokens, batch.padding)
            seconds += now(device) - start
    return seconds / batch.tokens.numel()
