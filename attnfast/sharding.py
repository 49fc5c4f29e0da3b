"""DTensor: along which dimensions the operators may be cut over a mesh of processes.

Entries of a batch, and heads, do not know of each other: each may be cut, in every mesh dimension,
heads into parts of whole groups. A tensor that they share (a broadcast mask or bias, sinks, the
pages of a cache) is then whole everywhere, and its gradient a sum over the processes. Whatever is
cut otherwise, along the sequence say, DTensor gathers first, as it does for torch's own attention;
and with dropout everything, because its mask counts the entries and heads of the whole call.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from . import ops
from .call import (
    DecodeInputs,
    DecodeOptions,
    Gradients,
    Inputs,
    Options,
    Outputs,
    Pooling,
    Upstream,
    backward_call,
    decode_call,
    forward_call,
    pooled_call,
)
from .requirements import fail
from .subclasses import PLAIN, is_dtensor

BATCH, HEADS = 0, 1
SUM = "sum"  # every process has a part of the sum

# One way to cut a call: for every result and every argument a dimension, SUM, or None for whole.
Cut = tuple[Sequence[Any], Sequence[Any]]
# Records of a call with such dimensions, or whole, in their fields.
_inputs_at: Any = Inputs
_upstream_at: Any = Upstream
_outputs_at: Any = Outputs
_gradients_at: Any = Gradients
_decode_inputs_at: Any = DecodeInputs
_pooling_at: Any = Pooling
WHOLE, DECODE_WHOLE = (None,) * len(Options._fields), (None,) * len(DecodeOptions._fields)


def register() -> None:
    """Tell torch.distributed.tensor how every operator may be cut."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo

    propagator = DTensor._op_dispatcher.sharding_propagator
    every_argument_matters = RuntimeSchemaInfo(0)
    rules: list[tuple[Any, Any]] = [
        (ops.SELF_ATTENTION, self_attention_cuts),
        (ops.SELF_ATTENTION_BWD, self_attention_bwd_cuts),
    ]
    for each in ops.DEFINED.values():
        rules += [(each.fwd, fwd_cuts), (each.bwd, bwd_cuts), (each.decode, decode_cuts)]
        rules += [(each.pooled, pooled_cuts)]
    for op, cuts in rules:
        strategy = functools.partial(_strategy, cuts)
        propagator.register_op_strategy(op, strategy, every_argument_matters)


def fwd_cuts(*args: Any) -> Iterable[Cut]:
    """Of ``NAME_fwd``; tensors are given as their shapes."""
    inputs, options = forward_call(args)
    for cut in _ways(inputs, options):
        results = _outputs_at(
            out=cut,
            lse=cut,
            norm=cut + 1,
            stats=cut + 1 if options.stats else None,
            received=cut if options.stats == 2 else None,
            weights=cut if options.weights else None,
        )
        yield results, (*_inputs(cut, inputs), *WHOLE)


def bwd_cuts(*args: Any) -> Iterable[Cut]:
    """Of ``NAME_bwd``."""
    upstream, inputs, options = backward_call(args)
    for cut in _ways(inputs, options):
        dims = _inputs(cut, inputs)
        dbias, dsinks = (SUM if dim is None else dim for dim in (dims.bias, dims.sinks))
        results = _gradients_at(
            dq=cut,
            dk=cut,
            dv=cut,
            dbias=dbias if upstream.need_dbias else None,
            dsinks=dsinks if upstream.need_dsinks else None,
        )
        given = _upstream_at(
            grad_out=cut,
            grad_lse=cut,
            grad_entropy=cut,
            grad_weights=cut,
            out=cut,
            norm=cut + 1,
            entropy=cut,
            need_dbias=None,
            need_dsinks=None,
        )
        yield results, (*given, *dims, *WHOLE)


def decode_cuts(*args: Any) -> Iterable[Cut]:
    """Of ``NAME_decode``."""
    inputs, options = decode_call(args)
    for cut in (BATCH, HEADS):
        cache: int | None = cut
        if inputs.page_table is not None:  # (P, page, H_kv, D)
            cache = 2 if cut == HEADS else None
        entries, heads = (0, None) if cut == BATCH else (None, 0)
        given = _decode_inputs_at(
            q=cut,
            k_cache=cache,
            v_cache=cache,
            cache_seqlens=entries,
            page_table=entries,
            bias=_where(cut, inputs.bias),
            alibi_slopes=_where(cut, inputs.alibi_slopes),
            sinks=heads,
            mask=_where(cut, inputs.mask),
            windows=heads,
        )
        received = cut if options.received else None
        yield (cut, cut, received), (*given, *DECODE_WHOLE)


def pooled_cuts(*args: Any) -> Iterable[Cut]:
    """Of ``NAME_pooled``."""
    inputs, options, _ = pooled_call(args)
    for cut in _ways(inputs, options):
        entries = 0 if cut == BATCH else None
        given = _pooling_at(
            norm=cut + 1, tokens_q=entries, tokens_k=entries, kind=None, rows=None, columns=None
        )
        yield (cut,), (*_inputs(cut, inputs), *WHOLE, *given)


def self_attention_cuts(*args: Any) -> Iterable[Cut]:
    """Of the layer's operator, whose heads lie packed."""
    *layer, weights = args
    for batch, given in _layer_ways(*layer):
        yield (batch, BATCH + 1, BATCH if weights else None), (*given, None)


def self_attention_bwd_cuts(*args: Any) -> Iterable[Cut]:
    """Of its backward."""
    _, _, _, *layer = args
    for batch, given in _layer_ways(*layer):
        yield (batch,), (batch, batch, BATCH + 1, *given)


def _layer_ways(*layer: Any) -> Iterable[tuple[int, tuple[Any, ...]]]:
    """Where the batch stands in a layer's tensors, and the cut of its operators' own arguments."""
    _, _, batch_first, mask, bias, _, dropout_p, _ = layer
    if dropout_p == 0:
        batch = 0 if batch_first else 1
        shared = _where(BATCH, mask), _where(BATCH, bias)
        yield batch, (batch, None, None, *shared, None, None, None)


def needs_operator(function: str, q: Tensor) -> None:
    """Raise for a DTensor where the reference runs, whose positions and masks are no DTensors."""
    if type(q) not in PLAIN and is_dtensor(q):
        requirement = "a plain Tensor where the reference runs: to_local() is one"
        fail(function, "q", requirement, f"a DTensor of {q.dtype}", TypeError)


def needs_seed(function: str, q: Tensor) -> None:
    """Raise for a DTensor without a seed of dropout: every process would draw its own."""
    if type(q) not in PLAIN and is_dtensor(q):
        raise ValueError(
            f"{function}: dropout_seed must be given, as a replicated DTensor, where q is a DTensor"
            " and dropout_p is not 0: every process would draw another"
        )


def _ways(inputs: Inputs, options: Options) -> tuple[int, ...]:
    if options.dropout_p > 0:
        return ()
    entries = () if inputs.cu_seqlens_q is not None else (BATCH,)
    return entries if options.weights == 1 else (*entries, HEADS)  # 1: their mean over all heads


def _inputs(cut: int, x: Inputs) -> Any:
    entries, heads = (0, None) if cut == BATCH else (None, 0)
    return _inputs_at(
        q=cut,
        k=cut,
        v=cut,
        mask=_where(cut, x.mask),
        bias=_where(cut, x.bias),
        alibi_slopes=_where(cut, x.alibi_slopes),
        sinks=heads,
        align=entries,
        indices=_where(cut, x.indices),
        windows=heads,
        block_starts=_where(cut, x.block_starts),
    )


def _where(cut: int, shape: Any) -> int | None:
    """The dimension to cut of what may be broadcast there."""
    return None if shape is None or shape[cut] == 1 else cut


def _strategy(cuts: Callable[..., Iterable[Cut]], schema: Any) -> Any:
    """An OpStrategy of everything whole, and every cut that leaves groups of heads whole."""
    from torch.distributed.tensor._op_schema import OpStrategy
    from torch.distributed.tensor._ops.utils import expand_to_full_mesh_op_strategy
    from torch.distributed.tensor.placement_types import Partial, Replicate, Shard

    def placement(dim: Any) -> Any:
        if dim is None:
            return Replicate()
        return Partial(SUM) if dim == SUM else Shard(dim)

    args = schema.args_schema
    tensors = [isinstance(x, OpStrategy) for x in args]
    shapes = [tuple(x.shape) if known else x for x, known in zip(args, tensors, strict=True)]
    count = len(schema.op._schema.returns)
    rows: list[list[Any]] = [
        [Replicate()] * count + [Replicate() if known else None for known in tensors]
    ]
    for results, given in cuts(*shapes):
        there = zip(given, tensors, strict=True)
        rows.append(
            [placement(dim) for dim in results]
            + [placement(dim) if known else None for dim, known in there]
        )
    mesh = schema.get_mesh_from_args()
    strategy = expand_to_full_mesh_op_strategy(mesh, schema, rows, input_index=count)
    names = [argument.name for argument in schema.op._schema.arguments]
    k = next((i for i, name in enumerate(names) if name in ("k", "k_cache")), None)
    if k is not None:
        paged = "page_table" in names and args[names.index("page_table")] is not None
        heads = 2 if paged else HEADS
        place, size = sum(tensors[:k]), shapes[k][heads]

        def in_whole_groups(specs: Any) -> bool:
            cuts_of_k = specs.input_specs[place].placements
            return bool(size % _parts(mesh, cuts_of_k, Shard(heads)) == 0)

        strategy.strategies = list(filter(in_whole_groups, strategy.strategies))
    return strategy


def _parts(mesh: Any, placements: Iterable[Any], wanted: Any) -> int:
    """Into how many parts a tensor is cut that way."""
    return math.prod(mesh.size(i) for i, x in enumerate(placements) if x == wanted)
