"""KVCache: the projected keys and values of what one attention layer has read so far."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import requirements as require

FIRST_CAPACITY = 16  # keys; doubled whenever it does not suffice
NAME = "KVCache"


class KVCache:
    """Keys and values of one `MultiheadAttention`, for decoding step by step, without gradients.

    Give it to ``forward(..., kv_cache=cache)``: the layer appends what it projects from ``key`` and
    ``value`` and attends all that is held. Each layer needs its own; self-attention and
    cross-attention of one layer of a decoder are two. All sequences of a batch have the same
    length; those padded on the left are told apart by ``key_padding_mask``.

    Args:
        max_length: the tokens it may hold, allocated at the first append; more is an error. None:
            it grows, doubling.

    Raises:
        TypeError: ``max_length`` is not an int.
        ValueError: ``max_length`` is not positive.

    Example::

        cache = attnfast.KVCache()
        with torch.inference_mode():
            layer(prompt, prompt, prompt, is_causal=True, need_weights=False, kv_cache=cache)
            layer(token, token, token, need_weights=False, kv_cache=cache)
    """

    def __init__(self, max_length: int | None = None) -> None:
        if max_length is not None:
            max_length = require.integer(NAME, "max_length", max_length, low=1)
        self.max_length = max_length
        self._k: Tensor | None = None  # (B, H_kv, capacity, D)
        self._v: Tensor | None = None
        self._filled = 0
        self.prefix = 0

    def __repr__(self) -> str:
        limit = "" if self.max_length is None else f" of {self.max_length}"
        held = f"{self.length}{limit} tokens"
        if self._k is not None:
            held += f", batch {self._k.shape[0]}, {self._k.dtype}, {self._k.device}"
        return f"KVCache({held})"

    @property
    def length(self) -> int:
        """The tokens held by every sequence."""
        return self._filled - self.prefix

    @property
    def keys(self) -> Tensor:
        """``(B, H_kv, prefix + length, D)``, a view: projected, normalised for cosine similarity.

        The ``prefix`` first are what ``add_bias_kv`` and ``add_zero_attn`` append.
        """
        return self._held(self._k)

    @property
    def values(self) -> Tensor:
        """``(B, H_kv, prefix + length, D)``, a view."""
        return self._held(self._v)

    @property
    def nbytes(self) -> int:
        """The memory allocated, in bytes."""
        return sum(x.nbytes for x in (self._k, self._v) if x is not None)

    def append(self, k: Tensor, v: Tensor, prefix: int = 0) -> None:
        """Copy projected keys and values behind those held; `MultiheadAttention` calls this.

        Args:
            k: ``(B, H_kv, N, D)``; B, H_kv, D, dtype and device are those of the first append.
            v: ``(B, H_kv, N, D)``.
            prefix: how many of the keys of a first append are no tokens.

        Raises:
            ValueError: Sizes that do not fit each other or what is held, another device, too many
                keys for ``max_length``, or a gradient is needed.
            TypeError: No dense Tensor, another dtype than held, or a ``prefix`` that is no int.
        """
        require.qkv_tensors(NAME, ("keys", "values"), k, v)
        if k.dim() != 4:
            require.fail(NAME, "keys", "(B, H_kv, N, D)", tuple(k.shape))
        if v.dim() != 4 or v.shape[:3] != k.shape[:3]:
            sizes = ", ".join(map(str, k.shape[:3]))
            require.fail(NAME, "values", f"(B, H_kv, N, D) = ({sizes}, *)", tuple(v.shape))
        require.memory(NAME, "keys", k)
        require.memory(NAME, "values", v)
        if k.requires_grad or v.requires_grad:
            raise ValueError(
                f"{NAME}: keys and values must need no gradient: decode under "
                "torch.inference_mode() or torch.no_grad()"
            )
        if not self._filled:
            prefix = require.integer(NAME, "prefix", prefix, low=0)
            if prefix > k.shape[2]:
                require.fail(NAME, "prefix", f"at most the {k.shape[2]} keys given", prefix)
            self.prefix = prefix
        start, end = self._filled, self._filled + k.shape[2]
        if self.max_length is not None and end - self.prefix > self.max_length:
            raise ValueError(
                f"{NAME}: length must be at most max_length = {self.max_length}, got "
                f"{end - self.prefix} after an append of {end - max(start, self.prefix)}"
            )
        for name, held, given in (("keys", self._k, k), ("values", self._v, v)):
            if held is not None:
                _check_fits(name, held, given)
        if self._k is None or self._v is None or end > self._k.shape[2]:
            self._grow(k, v, end)
        assert self._k is not None
        assert self._v is not None
        self._k[:, :, start:end] = k
        self._v[:, :, start:end] = v
        self._filled = end

    def reorder(self, index: Tensor) -> None:
        """Keep the sequences of these rows, in this order: a step of beam search.

        Args:
            index: int64 or int32 ``(B',)`` on the cache's device, each in [0, B); repeated and
                missing rows change the batch.

        Raises:
            TypeError: ``index`` is not an integer tensor.
            ValueError: it is not of one dimension, on another device, or a row is out of range.
        """
        require.tensor(NAME, "index", index, "an int64 or int32 Tensor")
        if index.dtype not in (torch.int32, torch.int64):
            require.fail(NAME, "index", "an int64 or int32 Tensor", index.dtype, TypeError)
        require.memory(NAME, "index", index)
        if index.dim() != 1:
            require.fail(NAME, "index", "(B,)", tuple(index.shape))
        if self._k is None or self._v is None:
            return
        if index.device != self._k.device:
            require.fail(NAME, "index", f"on the cache's device {self._k.device}", index.device)
        rows = self._k.shape[0]
        if index.device.type == "cpu" and index.numel():
            low, high = (int(x) for x in index.aminmax())
            if low < 0 or high >= rows:
                require.fail(NAME, "index", f"in [0, {rows})", low if low < 0 else high)
        self._k, self._v = (
            self._moved(x, x[:, :, : self._filled].index_select(0, index), x.shape[2])
            for x in (self._k, self._v)
        )

    def crop(self, length: int) -> None:
        """Forget all but the first ``length`` tokens, as when drafted tokens are rejected.

        Raises:
            TypeError: ``length`` is not an int.
            ValueError: it is negative or above what is held.
        """
        length = require.integer(NAME, "length", length, low=0)
        if length > self.length:
            require.fail(NAME, "length", f"at most the {self.length} held", length)
        self._filled = self.prefix + length if length else 0
        if not length:
            self.prefix = 0

    def reset(self) -> None:
        """Forget everything and free the memory; another batch size and dtype may follow."""
        self._k = self._v = None
        self._filled = self.prefix = 0

    def seqlens(self) -> Tensor:
        """int32 ``(B,)``: the keys held, prefix included, as `decode_attention` takes them."""
        k = self.keys
        return torch.full((k.shape[0],), self._filled, dtype=torch.int32, device=k.device)

    def _held(self, x: Tensor | None) -> Tensor:
        if x is None or not self._filled:
            raise ValueError(f"{NAME}: nothing is held yet")
        return x[:, :, : self._filled]

    def _grow(self, k: Tensor, v: Tensor, needed: int) -> None:
        """Allocate room for ``needed`` keys or more, and move what is held."""
        if self.max_length is not None:
            capacity = self.max_length + self.prefix
        else:
            held = FIRST_CAPACITY if self._k is None else self._k.shape[2]
            capacity = max(needed, 2 * held if self._k is not None else held)
        old_k = k[:, :, :0] if self._k is None else self._k[:, :, : self._filled]
        old_v = v[:, :, :0] if self._v is None else self._v[:, :, : self._filled]
        self._k = self._moved(k, old_k, capacity)
        self._v = self._moved(v, old_v, capacity)

    @staticmethod
    def _moved(like: Tensor, held: Tensor, capacity: int) -> Tensor:
        """A buffer of this capacity that begins with what is held.

        No inference tensor, so that it can be written to in and out of inference mode.
        """
        shape: list[Any] = [held.shape[0], held.shape[1], capacity, held.shape[3]]
        with torch.inference_mode(False):
            buffer = torch.empty(shape, dtype=like.dtype, device=like.device)
        with torch.no_grad():
            buffer[:, :, : held.shape[2]] = held
        return buffer


def _check_fits(name: str, kept: Tensor, given: Tensor) -> None:
    """Raise unless keys or values may follow those held."""
    B, H_kv, _, D = kept.shape
    if (given.shape[0], given.shape[1], given.shape[3]) != (B, H_kv, D):
        raise ValueError(
            f"{NAME}: {name} must be (B, H_kv, *, D) = ({B}, {H_kv}, *, {D}) as "
            f"those held, got {tuple(given.shape)} (reorder changes the batch, reset forgets it)"
        )
    if given.dtype != kept.dtype:
        require.fail(NAME, name, f"of the dtype held, {kept.dtype}", given.dtype, TypeError)
    if given.device != kept.device:
        require.fail(NAME, name, f"on the device held, {kept.device}", given.device)
