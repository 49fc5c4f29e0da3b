"""A mask that says what it follows from, in the place of its T x S bools."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ..block_mask import BlockMask

FIELDS = ("causal", "left", "right", "offset", "keys", "ends", "longest", "blocks", "bools", "none")


class StructuredMask(Tensor):
    """Bools ``(B, 1, T, S)``, True = attend, which are made only if somebody reads them.

    Query t stands at t' = t + offset among the keys. To transformers' models it is a tensor like
    any other: whatever operator it is given to gets `dense`.

    Attributes:
        causal: Whether only keys s <= t' are attended.
        left, right: And only t' - left <= s <= t' + right; None is unbounded.
        offset: An int, or an int tensor ``()``.
        keys: bool ``(B, S)``, those that may be attended; None if all.
        ends: int32 ``(documents + 1,)``, where documents of all rows end, one row after another:
            each attends itself alone. None if every row is one.
        longest: Tokens of the longest document, 0 without them.
        blocks: All of it, in place of what precedes; None where that says it.
        bools: `dense`, once somebody has read it. May be changed in place, and then says more
            than the other attributes.
    """

    causal: bool
    left: int | None
    right: int | None
    offset: int | Tensor
    keys: Tensor | None
    ends: Tensor | None
    longest: int
    blocks: BlockMask | None
    bools: Tensor | None
    none: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, ...],
        device: torch.device,
        *,
        causal: bool = False,
        left: int | None = None,
        right: int | None = None,
        offset: int | Tensor = 0,
        keys: Tensor | None = None,
        ends: Tensor | None = None,
        longest: int = 0,
        blocks: BlockMask | None = None,
        bools: Tensor | None = None,
        none: Tensor | None = None,
    ) -> StructuredMask:
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        mask: StructuredMask = made
        mask.causal, mask.left, mask.right, mask.offset = causal, left, right, offset
        mask.keys, mask.ends, mask.longest = keys, ends, longest
        mask.blocks, mask.bools = blocks, bools
        mask.none = torch.empty(0, device=device) if none is None else none
        return mask

    def dense(self) -> Tensor:
        """The bools, contiguous; from then on they alone count."""
        if self.bools is None and self.blocks is not None:
            self.bools = self.blocks.to_dense()
        if self.bools is None:
            B, _, T, S = self.shape
            t = torch.arange(T, device=self.device)[:, None] + self.offset  # [T, 1]
            s = torch.arange(S, device=self.device)  # [S]
            allowed = torch.ones((B, 1, T, S), dtype=torch.bool, device=self.device)
            if self.causal:
                allowed &= s <= t
            if self.left is not None:
                allowed &= s >= t - self.left
            if self.right is not None:
                allowed &= s <= t + self.right
            if self.keys is not None:
                allowed &= self.keys[:, None, None]
            if self.ends is not None:
                lengths = self.ends.diff().long()
                own = torch.arange(len(lengths), device=self.device).repeat_interleave(lengths)
                own = own.view(B, 1, T)
                allowed &= own[..., None] == own[..., None, :]
            if torch.compiler.is_compiling():
                return allowed
            self.bools = allowed
        return self.bools

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Any operator, on the bools."""
        args, kwargs = torch.utils._pytree.tree_map_only(
            StructuredMask, StructuredMask.dense, (args, kwargs or {})
        )
        return func(*args, **kwargs)

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        """What torch.compile traces, and what it compiles anew for."""
        fields = self._fields()
        if self.blocks is not None:
            fields |= {"blocks": None, "bools": self.dense()}
        tensors = [name for name, x in fields.items() if isinstance(x, Tensor)]
        return tensors, {name: x for name, x in fields.items() if name not in tensors}

    @staticmethod
    def __tensor_unflatten__(
        tensors: dict[str, Any], rest: dict[str, Any], shape: Any, stride: Any
    ) -> StructuredMask:
        return StructuredMask(shape, tensors["none"].device, **rest, **tensors)

    def __deepcopy__(self, memo: dict[int, Any]) -> StructuredMask:
        return StructuredMask(self.shape, self.device, **copy.deepcopy(self._fields(), memo))

    def __repr__(self) -> str:  # type: ignore[override]
        said = ", ".join(f"{name}={x}" for name, x in self._fields().items() if x is not None)
        return f"StructuredMask({tuple(self.shape)}, {said})"

    def _fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in FIELDS}

    def tolist(self) -> Any:
        """The bools, as of any tensor."""
        return self.dense().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """The bools, as of any tensor."""
        return self.dense().numpy(force=force)


# Functions, not methods: torch.compile would call a tensor's methods when the program runs.


def fits(mask: StructuredMask, B: int, T: int, S: int) -> bool:
    """Whether the structure is all there is to say of such scores."""
    return mask.bools is None and mask.shape == (B, 1, T, S)


def options(mask: StructuredMask) -> dict[str, Any]:
    """What `attnfast.attention` is told in place of the bools, ``mask`` apart."""
    align: Any = mask.offset
    if isinstance(align, Tensor):
        align = align.int().expand(mask.shape[0])
    elif align == 0:
        align = "top_left"
    window = None if mask.left is None and mask.right is None else (mask.left, mask.right)
    return {"causal": mask.causal, "window": window, "align": align}


def lengths(mask: StructuredMask) -> Tensor | None:
    """How many keys a single query attends, padding apart, int32 (B,); None if not the first.

    With ``left``, the newest of these.
    """
    B, _, _, S = mask.shape
    if mask.blocks is not None or mask.right is not None:
        return None
    if not mask.causal and mask.left is not None:
        return None
    length = mask.offset + 1 if mask.causal else S
    if isinstance(length, Tensor):
        return length.int().expand(B)
    if not 0 <= length <= S:
        return None
    return torch.full((B,), length, dtype=torch.int32, device=mask.device)
