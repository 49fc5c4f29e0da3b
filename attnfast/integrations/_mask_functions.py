"""What transformers' mask functions mean, read from their code and what they hold.

A mask function says of one query and one key whether it is attended. transformers composes them out
of few kinds, closures whose code is always the same. A function of these kinds alone is understood;
one that has anything else in any part of it is asked about every score, block by block where these
are many. Either way it becomes a `StructuredMask`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..block_mask import BlockMask
from ._structured_mask import StructuredMask

# Kinds, and how transformers makes one, for its code.
MAKERS: dict[str, Callable[[Any], Any]] = {
    "causal": lambda library: library.causal_mask_function,
    "all": lambda library: library.bidirectional_mask_function,
    "and": lambda library: library.and_masks(),
    "window": lambda library: library.sliding_window_overlay(1),
    "window both ways": lambda library: library.sliding_window_bidirectional_overlay(1),
    "packed": lambda library: library.packed_sequence_mask_function(None),
    "chunks": lambda library: library.chunked_overlay(1, None),
    "positions": lambda library: library.remap_positions_for_packed_sequence(None, None),
}


BY_BLOCKS = 1 << 20  # scores of one batch entry; of fewer, bools are soon made


class Unknown(Exception):
    """A mask function that is not understood."""


class Part(NamedTuple):
    """One of the conditions that all hold.

    Attributes:
        kind: One of `MAKERS`, and neither "and" nor "positions".
        value: The window, the ids of what is packed, or the size of chunks and where they begin.
        positions: What the condition counts by, ``(B, T)``, for queries and keys; None: by index.
    """

    kind: str
    value: Any = None
    positions: Tensor | None = None


class _Called(Exception):
    """A mask is needed."""


_kinds: dict[CodeType, str] = {}


def learn() -> None:
    """Find out how this transformers composes masks, and whether they mean what is thought here."""
    library = sys.modules["transformers.masking_utils"]
    for kind, make in MAKERS.items():
        try:
            _kinds[make(library).__code__] = kind
        except (AttributeError, TypeError):  # another transformers
            continue
    try:
        understood = all(_is_right(library, sample) for sample in _samples(library))
    except (AttributeError, IndexError, RuntimeError, TypeError, Unknown):
        understood = False
    if not understood:
        _kinds.clear()


def forget() -> None:
    """Undo `learn`: nothing is understood."""
    _kinds.clear()


def _samples(library: Any) -> Iterator[Any]:
    """One mask function of each kind, alone and composed."""
    yield library.causal_mask_function
    yield library.bidirectional_mask_function
    yield library.sliding_window_causal_mask_function(3)
    yield library.sliding_window_bidirectional_mask_function(2)
    ids = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 1]], device="cpu")
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]], device="cpu")
    yield library.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int64, device="cpu"))
    window = library.sliding_window_causal_mask_function(2)
    remapped = library.remap_positions_for_packed_sequence(window, positions)
    yield library.and_masks(remapped, library.packed_sequence_mask_function(ids))


def _is_right(library: Any, function: Any) -> bool:
    expected = library.sdpa_mask(2, 6, 6, mask_function=function, allow_is_causal_skip=False)
    found = structured(2, 6, 6, mask_function=function, device="cpu")
    return found is not None and torch.equal(found.dense(), expected)


def attention_mask(
    make: Callable[..., Tensor | None],
    *,
    mask_function: Any,
    use_vmap: bool = False,
    **asked: Any,
) -> Tensor | None:
    """What ``make``, transformers' ``sdpa_mask``, gives: None, or the same bools by structure.

    Traced programs get the bools, and so does a transformers that is not understood at all.
    """
    if not _is_traced() and _kinds:  # in this order: no guards on _kinds
        try:
            return make(mask_function=_called, **asked)  # None, where no mask is needed
        except _Called:
            found = structured(mask_function=mask_function, **asked)
        if found is None:
            found = in_blocks(mask_function=mask_function, use_vmap=use_vmap, **asked)
        if found is not None:
            return found
    return make(mask_function=mask_function, use_vmap=use_vmap, **asked)


def structured(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    *,
    mask_function: Any,
    attention_mask: Tensor | None = None,
    device: Any = "cpu",
    **_: Any,
) -> StructuredMask | None:
    """The arguments of ``sdpa_mask`` as a mask; None if they are not understood.

    ``attention_mask`` is bool (B, any), False for padding; what it does not reach is padding too.
    """
    B, T, S, device = batch_size, q_length, kv_length, torch.device(device)
    if not isinstance(kv_offset, int):
        return None
    if attention_mask is not None and attention_mask.shape[:-1] != (B,):
        return None
    try:
        parts = list(_parts(mask_function, None))
    except Unknown:
        return None
    kinds = {part.kind for part in parts}
    both_ways = [part.value for part in parts if part.kind == "window both ways"]
    back = [part.value - 1 for part in parts if part.kind == "window"] + both_ways
    keys, ends, longest = _keys(attention_mask, kv_offset, S), None, 0
    apart = [part for part in parts if part.kind in ("packed", "chunks")]
    positions = [part.positions for part in parts if part.positions is not None]
    if apart:
        whole = isinstance(q_offset, int) and q_offset == kv_offset == 0 and T == S
        ids = _documents(apart[0], B, T)
        if not whole or len(apart) > 1 or keys is not None or ids is None:
            return None
        if not all(_are_documents(ids, counted) for counted in positions):
            return None
        ends = _ends(ids)
        longest = int(ends.diff().max())
    elif positions:
        return None
    if isinstance(q_offset, Tensor):
        q_offset = q_offset.to(device)
    return StructuredMask(
        (B, 1, T, S),
        device,
        causal="causal" in kinds,
        left=min(back, default=None),
        right=min(both_ways, default=None),
        offset=q_offset - kv_offset,  # a copy: a static cache's own tensor moves on
        keys=keys,
        ends=ends,
        longest=longest,
    )


def in_blocks(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    *,
    mask_function: Any,
    use_vmap: bool,
    attention_mask: Tensor | None = None,
    device: Any = "cpu",
    **_: Any,
) -> StructuredMask | None:
    """The arguments of ``sdpa_mask`` as a mask in blocks; None if bools are better."""
    shape, device = (batch_size, 1, q_length, kv_length), torch.device(device)
    if q_length == 1 or q_length * kv_length < BY_BLOCKS or device.type != "cpu":
        return None  # nothing is known yet of their speed on others
    if isinstance(kv_offset, Tensor):
        return None
    keys = _keys(attention_mask, kv_offset, kv_length)
    function = _each(mask_function) if use_vmap else mask_function

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        found: Tensor = function(b, h, q + q_offset, k + kv_offset)
        return found if keys is None else found & keys[b, k]

    try:
        blocks = BlockMask.from_mask_mod(allowed, *shape, device=device)
    except (TypeError, ValueError):
        return None
    return StructuredMask(shape, device, blocks=blocks)


def _each(function: Any) -> Callable[..., Tensor]:
    """A function of single numbers as one of tensors that broadcast."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    def each(*positions: Tensor) -> Tensor:
        whole = torch.broadcast_tensors(*positions)
        with TransformGetItemToIndex():
            found: Tensor = torch.vmap(function)(*(x.flatten() for x in whole))
        return found.view(whole[0].shape)

    return each


def _parts(function: Any, positions: Tensor | None) -> Iterator[Part]:
    """The conditions that a mask function is made of."""
    code: Any = getattr(function, "__code__", None)
    kind = _kinds.get(code)
    if kind is None:
        raise Unknown
    cells = function.__closure__ or ()
    held = dict(zip(code.co_freevars, (cell.cell_contents for cell in cells), strict=True))
    try:
        if kind == "and":
            for one in held["mask_functions"]:
                yield from _parts(one, positions)
        elif kind == "positions" and positions is None:
            yield from _parts(held["mask_function"], held["position_ids"])
        elif kind == "packed" and positions is None:
            yield Part(kind, held["packed_sequence_mask"])
        elif kind == "chunks" and positions is None:
            yield Part(kind, (held["chunk_size"], held["left_padding"]))
        elif kind.startswith("window"):
            window = held["sliding_window"]
            if type(window) is not int or window < 1:
                raise Unknown
            yield Part(kind, window, positions)
        elif kind in ("causal", "all"):
            yield Part(kind, None, positions)
        else:
            raise Unknown
    except KeyError:
        raise Unknown from None


def _documents(part: Part, B: int, T: int) -> Tensor | None:
    """Ids (B, T) that never decrease along a row; None if there are none such."""
    if part.kind == "packed":
        ids: Tensor = part.value
        return ids if ids.shape == (B, T) and (ids.diff() >= 0).all() else None
    size, begins = part.value
    if type(size) is not int or begins.shape != (B,) or (begins != 0).any():
        return None
    return (torch.arange(T, device=begins.device) // size).expand(B, T)


def _are_documents(ids: Tensor, positions: Tensor) -> bool:
    """Whether positions go on by one within every id, so that they differ as indices do."""
    if positions.shape != ids.shape:
        return False
    return bool(((ids.diff() != 0) | (positions.diff() == 1)).all())


def _ends(ids: Tensor) -> Tensor:
    """Ids (B, T) -> int32, 0 and where runs of one id end, one row after another."""
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids.diff() != 0
    first = starts.flatten().nonzero().flatten()
    return torch.cat([first, first.new_full((1,), ids.numel())]).int()


def _keys(padding: Tensor | None, kv_offset: int, S: int) -> Tensor | None:
    """(B, any) -> bool (B, S), False past its end; None if there is no padding."""
    if padding is None:
        return None
    keys = padding[:, kv_offset : kv_offset + S].bool()
    if keys.shape[1] < S:
        return torch.nn.functional.pad(keys, (0, S - keys.shape[1]))
    return None if keys.all() else keys


def _is_traced() -> bool:
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
    )


def _called(*_: Any) -> Any:
    raise _Called
