"""The reference's dropout mask: published vectors of its generator, its layout, its rate."""

from __future__ import annotations

import math

import pytest
import torch

from attnfast.reference import dropout_mask, philox

SEED = torch.tensor([-7_000_000_000_000, 2**32 + 5])


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_known_answers(counter: list[int], key: list[int], words: list[int]) -> None:
    """The vectors that Random123 publishes for philox4x32-10."""
    result = philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert [int(x) for x in result] == words


def test_dropout_lanes() -> None:
    """Key s takes half s % 2, low first, of word s // 2 % 4 of the counter for s // 8."""
    seed, offset = SEED.tolist()
    p, shape = 0.3, (2, 3, 5, 21)
    mask = dropout_mask(SEED, *shape, p)
    for b, h, t, s in torch.cartesian_prod(*(torch.arange(n) for n in shape)).tolist():
        counter = (s // 8, t, b * 3 + h, offset % 2**32)
        key = (seed % 2**64 % 2**32, seed % 2**64 // 2**32)
        words = philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
        lane = int(words[s % 8 // 2]) >> 16 * (s % 2) & 0xFFFF
        assert mask[b, h, t, s] == (lane >= round(p * 65536))


def test_dropout_rate_and_extremes() -> None:
    kept = dropout_mask(SEED, 2, 4, 64, 128, 0.25).double().mean().item()
    deviation = math.sqrt(0.25 * 0.75 / 65536)
    assert abs(kept - 0.75) < 4 * deviation
    assert dropout_mask(SEED, 1, 1, 2, 9, 0.0).all()
    assert not dropout_mask(SEED, 1, 1, 2, 9, 1.0).any()
    assert dropout_mask(SEED, 0, 3, 0, 0, 0.5).shape == (0, 3, 0, 0)


@pytest.mark.parametrize(
    "change", [(1, 0), (2**32, 0), (0, 1)], ids=["seed", "high half", "offset"]
)
def test_dropout_depends_on_every_word(change: tuple[int, int]) -> None:
    """Guards against reading only the low half of the seed."""
    mask = dropout_mask(SEED, 2, 2, 8, 32, 0.5)
    other = dropout_mask(SEED + torch.tensor(change), 2, 2, 8, 32, 0.5)
    assert 0.3 < (mask != other).double().mean() < 0.7
