"""Mean, spread, extremes and quantiles of numbers that come in batches, for every head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

OCTAVE, OCTAVES = 16, 24  # bins: a width of 4%, up to 16 million
BINS = 2 * OCTAVE * OCTAVES + 1  # the middle one holds what is nearly zero


class Running(NamedTuple):
    """Of H heads, whatever number of values: fp64."""

    number: Tensor  # (H,)
    mean: Tensor  # (H,)
    squares: Tensor  # (H,), of the distances from the mean
    least: Tensor  # (H,)
    largest: Tensor  # (H,)
    bins: Tensor  # (H, BINS), how many fell into each

    @classmethod
    def of(cls, values: Tensor, real: Tensor) -> Running:
        """Of values ``(H, N)``, those that are real ``(H, N)``; on the CPU."""
        x = torch.where(real, values.detach().double(), 0.0)
        number = real.sum(1).double()
        mean = x.sum(1) / number.clamp(min=1)
        apart = torch.where(real, x - mean[:, None], 0.0)
        H = len(x)
        place = bin_of(x) + BINS * torch.arange(H, device=x.device)[:, None]
        bins = torch.bincount(place[real], minlength=H * BINS).view(H, BINS)
        least = torch.where(real, x, torch.inf).amin(1) if x.shape[1] else mean + torch.inf
        largest = torch.where(real, x, -torch.inf).amax(1) if x.shape[1] else mean - torch.inf
        found = number, mean, apart.square().sum(1), least, largest, bins.double()
        return cls(*(y.cpu() for y in found))

    def merged(self, other: Running) -> Running:
        """Of both, by the rule of Chan, Golub and LeVeque (1983)."""
        number = self.number + other.number
        some = number.clamp(min=1)
        apart = other.mean - self.mean
        return Running(
            number,
            self.mean + apart * other.number / some,
            self.squares + other.squares + apart.square() * self.number * other.number / some,
            torch.minimum(self.least, other.least),
            torch.maximum(self.largest, other.largest),
            self.bins + other.bins,
        )

    @property
    def deviation(self) -> Tensor:
        """The standard deviation, (H,); 0 where there is at most one value."""
        return (self.squares / (self.number - 1).clamp(min=1)).sqrt()

    def quantile(self, q: float) -> Tensor:
        """What a share q of the values does not exceed, (H,), within a bin's width."""
        below = self.bins.cumsum(1)
        place = torch.searchsorted(below, (q * self.number)[:, None].clamp(min=1)).squeeze(1)
        middle = value_of(place.clamp(max=BINS - 1))
        return torch.minimum(torch.maximum(middle, self.least), self.largest)


def bin_of(x: Tensor) -> Tensor:
    """The bin of numbers: even steps of sign(x) log2(1 + |x|)."""
    steps = torch.round(x.sign() * (1 + x.abs()).log2() * OCTAVE)
    return (steps + BINS // 2).clamp(0, BINS - 1).long()


def value_of(place: Tensor) -> Tensor:
    """The number in the middle of a bin."""
    steps = (place - BINS // 2).double() / OCTAVE
    return steps.sign() * (steps.abs().exp2() - 1)
