"""What counts as equal to eager attention."""

from __future__ import annotations

from torch import Tensor

TOLERANCE = 1e-3  # of the largest value; the weights are random and layers few


class Different(Exception):
    """Where attnfast's results are not eager's."""


def close(x: Tensor, y: Tensor, what: str) -> None:
    """Check that y, attnfast's, is x, but for what rounding explains.

    Raises:
        Different: It is not.
    """
    x, y = x.double(), y.double()
    finite = x.isfinite()  # where not, a query of eager's had no key
    if not y[finite].isfinite().all():
        raise Different(f"{what}: NaN or Inf where eager has none")
    x, y = x[finite], y[finite]
    if x.numel() == 0:
        return
    error = (x - y).abs().max().item() / max(x.abs().max().item(), 1e-6)
    if error > TOLERANCE:
        raise Different(f"{what} off by {error:.1e} of the largest value")
