"""attnfast.lens.apply_windows: heads that look near are made local, and the rest is as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnfast
from attnfast import lens
from attnfast.lens.windows import local_windows

B, T, E, H = 2, 60, 32, 4


class Local(nn.Module):
    """Self-attention whose heads look the nearer, the larger their slope."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = attnfast.MultiheadAttention(E, H, batch_first=True, **options)
        self.slopes = torch.tensor([4.0, 1.0, 0.3, 0.0])

    def forward(self, x: Tensor) -> Tensor:
        t = torch.arange(x.shape[1])
        bias = -(t - t[:, None]).abs() * self.slopes[:, None, None]
        bias[0] = -4.0 * (t[:, None] - t - 1).abs()  # the token before
        bias = bias.masked_fill(t > t[:, None], -torch.inf)
        return self.attention(x, x, x, attn_mask=bias.expand(len(x), H, -1, -1))[0]


def mass_of(**bins: float) -> Tensor:
    """(64,), by distances back (b1: one key) and ahead (a1), in the bins' first places."""
    mass = torch.zeros(64, dtype=torch.float64)
    for name, value in bins.items():
        distance = int(name[1:])
        place = distance.bit_length()
        mass[32 + place if name[0] == "b" else 32 - place] = value
    return mass


def test_windows_of_known_mass() -> None:
    heads = torch.stack(
        [
            mass_of(b0=0.5, b1=0.495, b64=0.005),
            mass_of(b0=0.4, b4=0.3, a2=0.295, b64=0.005),
            mass_of(b0=0.9, b64=0.1),
            mass_of(b0=0.995, a8=0.005),
            mass_of(b0=0.9, a8=0.1),
            mass_of(),
        ]
    )
    expected = [[1, 0], [7, 3], [-1, 0], [0, 0], [0, -1], [-1, -1]]
    assert local_windows(heads, 0.99).tolist() == expected
    assert local_windows(heads[:1, :], 0.999).tolist() == [[-1, 0]]
    ahead = torch.stack([mass_of(b0=1.0), mass_of(b0=0.9, b3=0.1)])
    assert local_windows(ahead, 0.95).tolist() == [[0, 0], [-1, 0]]  # nothing ahead was seen
    assert local_windows(ahead, 0.85).tolist() == [[0, 0], [0, 0]]


def test_heads_look_within_their_windows() -> None:
    model, x = Local(), torch.randn(B, T, E)
    with lens.observe(model, shares=True) as seen:
        before = model(x)
    rows = lens.apply_windows(model, seen, keep=0.95)
    windows = model.attention.window
    assert windows.dtype == torch.int32
    assert [row.head for row in rows] == [0, 1, 2, 3]
    assert [[row.left, row.right] for row in rows] == windows.tolist()
    assert windows[0].tolist() == [1, 0]
    assert windows[3].tolist() == [-1, 0]
    assert (windows[:3, 0] > 0).all()
    with lens.observe(model, shares=True) as seen:
        after = model(x)
    assert not torch.equal(after, before)
    far = seen.distances("attention")
    assert far[0, 34:].sum() == 0
    assert far[3, 34:].sum() > 0.5


def dense_weights(model: Local, x: Tensor) -> Tensor:
    """(B, H, T, T), of a model without windows."""
    kept: list[Tensor] = []
    hook = model.attention.register_forward_pre_hook(
        lambda m, args, kwargs: kept.append(kwargs["attn_mask"]), with_kwargs=True
    )
    model(x)
    hook.remove()
    return model.attention(x, x, x, attn_mask=kept[0], average_attn_weights=False)[1]


@pytest.mark.parametrize("keep", [0.6, 0.95, 0.999])
def test_expected_mass_is_that_of_the_weights(keep: float) -> None:
    model, x = Local(), torch.randn(B, T, E)
    weights = dense_weights(model, x).detach().double()
    with lens.observe(model, shares=True) as seen:
        model(x)
    rows = lens.apply_windows(model, seen, keep)
    back = torch.arange(T)[:, None] - torch.arange(T)
    for row in rows:
        left = T if row.left < 0 else row.left
        right = T if row.right < 0 else row.right
        outside = (back > left) | (-back > right)
        truth = (weights[:, row.head] * outside).sum(2).mean().item()
        assert row.left_out == pytest.approx(truth, abs=1e-5)
        assert row.left_out <= 1 - keep + 1e-6
        if row.left > 0:  # the next narrower one would not do
            narrow = back > (row.left - 1) // 2
            assert (weights[:, row.head] * narrow).sum(2).mean() > 1 - keep - 1e-6


def test_windows_that_were_there_and_repeated_calls() -> None:
    model, x = Local(window=(8, None)), torch.randn(B, T, E)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.local = model

        def forward(self, x: Tensor) -> Tensor:
            return self.local(x)

    twice = Twice()
    with lens.observe(twice, shares=True) as seen:
        twice(x)
    shares = seen.shares["local.attention"]
    other = shares._replace(mass=torch.zeros_like(shares.mass))
    other.mass[:, 36] = shares.mass[:, :64].sum(1)  # half of all probability is 8 to 15 keys back
    seen.shares["local.attention#2"] = other
    rows = lens.apply_windows(twice, seen, 0.92)
    assert [(row.layer, row.left) for row in rows] == [("local.attention", -1)] * H
    assert model.attention.window.tolist() == [[8, 0]] * H  # no key further back was seen
    del seen.shares["local.attention#2"]
    lens.apply_windows(twice, seen, 0.92)
    windows = model.attention.window.clone()
    assert windows[0].tolist() == [1, 0]
    assert windows[3].tolist() == [8, 0]
    lens.apply_windows(twice, seen, 0.99)  # wider: the narrower ones stay
    assert torch.equal(model.attention.window, windows)
    model.attention.window = None
    model(x)


def test_errors() -> None:
    model, x = Local(), torch.randn(B, T, E)
    with lens.observe(model) as plain:
        model(x)
    with lens.observe(model, shares=True) as seen:
        model(x)
    with pytest.raises(ValueError, match=r"apply_windows: keep must be a number above 0 and below"):
        lens.apply_windows(model, seen, 1.0)
    with pytest.raises(
        ValueError, match=r"seen must be of lens.observe\(model, shares=True\), got"
    ):
        lens.apply_windows(model, plain)
    with pytest.raises(ValueError, match=r"seen must be of this model, got layer 'attention', whi"):
        lens.apply_windows(nn.Linear(2, 2), seen)
    model.attention = nn.Identity()
    with pytest.raises(
        ValueError, match=r"'attention' must be an attnfast.MultiheadAttention, whi"
    ):
        lens.apply_windows(model, seen)
    model.attention = attnfast.MultiheadAttention(E, H, add_zero_attn=True)
    with pytest.raises(ValueError, match=r"'attention' must be without add_bias_kv and add_zero_a"):
        lens.apply_windows(model, seen)
