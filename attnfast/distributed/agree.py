"""Whether all ranks have called with the same shapes, dtypes and options."""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .layout import all_gather

# Of these every rank has its own rows, or its own values, which nobody compares.
OWN = ("mesh", "return_lse")


def agree(function: str, given: dict[str, Any], group: dist.ProcessGroup) -> None:
    """Compare the arguments of all ranks: of tensors shape and dtype, of others what they print.

    One gather of 8 bytes an argument, made before anything is checked, so that no rank waits for
    another that has raised.

    Raises:
        ValueError: An argument differs, on every rank.
    """
    said = {name: _said(x) for name, x in given.items() if name not in OWN}
    tensors = (x for x in given.values() if isinstance(x, Tensor))
    device = next((x.device for x in tensors), torch.device("cpu"))
    digest = torch.tensor([zlib.crc32(text.encode()) for text in said.values()], device=device)
    every = digest.new_empty((dist.get_world_size(group), len(said)))
    all_gather(every.view(-1), digest, group=group)
    for name, column in zip(said, every.T.tolist(), strict=True):
        if len(set(column)) > 1:
            rank = dist.get_rank(group)
            alike = [r for r, value in enumerate(column) if value == column[rank]]
            raise ValueError(
                f"{function}: {name} must be the same on every rank, got {said[name]} on rank"
                f" {rank}, and another on {[r for r in range(len(column)) if r not in alike]}"
            )


def _said(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"{tuple(x.shape)} of {x.dtype}"
    if isinstance(x, dict):  # arguments that there are not
        return str(sorted(x))
    return str(x) if isinstance(x, (bool, int, float, str, tuple, list)) else type(x).__name__
