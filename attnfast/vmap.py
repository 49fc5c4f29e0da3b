"""vmap of the raw operators: a mapped dimension joins the batch, or the calls run one by one.

Entries of a batch do not know of each other, so that M mapped calls of B entries are one call of
M * B, and views where the strides allow it. What a call has only one of cannot join: sinks, the
windows of heads, a seed of dropout (whose mask counts the entries), the boundaries of a varlen
call, a pool of pages. Then every mapped call is run by itself.

A rule is ``rule(op, info, in_dims, *args) -> (results, out_dims)``, as torch.library.register_vmap
has it, and is called once for every level of nested transforms.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .call import (
    DecodeInputs,
    Gradients,
    Inputs,
    Options,
    Outputs,
    Upstream,
    backward_call,
    decode_call,
    forward_call,
)
from .checks import contiguous, dense_rows


class Fold(NamedTuple):
    """How M mapped calls of B entries become one of M * B entries."""

    M: int
    B: int

    def tensor(self, x: Tensor, dim: int | None, batch: int = 0) -> Tensor:
        """X with its mapped dimension, or as often as there are calls, joined to its batch."""
        if dim is None:
            x = x.unsqueeze(batch)
            x = x.expand(*x.shape[:batch], self.M, *x.shape[batch + 1 :])
        else:
            x = x.movedim(dim, batch)
        joined: Tensor = x.flatten(batch, batch + 1)
        return joined

    def optional(self, x: Tensor | None, dim: int | None, batch: int = 0) -> Tensor | None:
        """The same, or None."""
        return None if x is None else self.tensor(x, dim, batch)

    def broadcast(self, x: Tensor | None, dim: int | None, apart: bool = False) -> Tensor | None:
        """The same where the batch of x may be 1; x itself if all calls share it, unless apart."""
        if x is None or (dim is None and x.shape[0] == 1 and not apart):
            return x
        x = x[None] if dim is None else x.movedim(dim, 0)  # [M|1, B|1, ...]
        return x.expand(self.M, self.B, *x.shape[2:]).flatten(0, 1)

    def inputs(self, x: Inputs, dims: Any, bias_apart: bool = False) -> Inputs:
        """Every tensor of a call."""
        return Inputs(
            q=dense_rows(self.tensor(x.q, dims.q)),
            k=dense_rows(self.tensor(x.k, dims.k)),
            v=dense_rows(self.tensor(x.v, dims.v)),
            mask=self.broadcast(x.mask, dims.mask),
            bias=self.broadcast(x.bias, dims.bias, bias_apart),
            alibi_slopes=self.broadcast(x.alibi_slopes, dims.alibi_slopes),
            sinks=x.sinks,
            align=self.optional(x.align, dims.align),
            indices=self.optional(x.indices, dims.indices),
            windows=x.windows,
            block_starts=self.broadcast(x.block_starts, dims.block_starts),
            block_index=x.block_index,
            block_bits=x.block_bits,
        )

    def upstream(self, x: Upstream, dims: Any) -> Upstream:
        """What a backward receives before the inputs."""
        return Upstream(
            grad_out=dense_rows(self.tensor(x.grad_out, dims.grad_out)),
            grad_lse=contiguous(self.optional(x.grad_lse, dims.grad_lse)),
            grad_entropy=contiguous(self.optional(x.grad_entropy, dims.grad_entropy)),
            grad_weights=contiguous(self.optional(x.grad_weights, dims.grad_weights)),
            out=dense_rows(self.tensor(x.out, dims.out)),
            norm=self.tensor(x.norm, dims.norm, 1).contiguous(),
            entropy=contiguous(self.optional(x.entropy, dims.entropy)),
            need_dbias=x.need_dbias,
            need_dsinks=x.need_dsinks,
        )

    def decode_inputs(self, x: DecodeInputs, dims: Any) -> DecodeInputs:
        """Every tensor of a decode call; all calls share a pool of pages."""
        paged = x.page_table is not None
        return DecodeInputs(
            q=dense_rows(self.tensor(x.q, dims.q)),
            k_cache=x.k_cache if paged else dense_rows(self.tensor(x.k_cache, dims.k_cache)),
            v_cache=x.v_cache if paged else dense_rows(self.tensor(x.v_cache, dims.v_cache)),
            cache_seqlens=self.tensor(x.cache_seqlens, dims.cache_seqlens).contiguous(),
            page_table=contiguous(self.optional(x.page_table, dims.page_table)),
            bias=self.broadcast(x.bias, dims.bias),
            alibi_slopes=self.broadcast(x.alibi_slopes, dims.alibi_slopes),
            sinks=x.sinks,
            mask=self.broadcast(x.mask, dims.mask),
            windows=x.windows,
        )

    def result(self, x: Any, batch: int | None) -> Any:
        """A result whose batch has that dimension; None: as it is."""
        return x if batch is None else self.apart(x, batch)

    def apart(self, x: Tensor, batch: int = 0) -> Tensor:
        """A result whose mapped dimension stands before its batch."""
        result: Tensor = x.unflatten(batch, (self.M, self.B))
        return result


def fwd_rule(op: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    """Of ``NAME_fwd``."""
    inputs, options = forward_call(args)
    dims: Any
    dims, _ = forward_call(in_dims)
    if not joins(inputs, dims, options):
        return one_by_one(op, info, in_dims, *args)
    fold = fold_of(info, inputs.q, dims.q)
    places: Any = Outputs
    out_dims = places(
        out=0,
        lse=0,
        norm=1,
        stats=1 if options.stats else None,
        received=0 if options.stats == 2 else None,
        weights=0 if options.weights else None,
    )
    results = op(*fold.inputs(inputs, dims), *options)
    return tuple(map(fold.result, results, out_dims)), tuple(out_dims)


def bwd_rule(op: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    """Of ``NAME_bwd``."""
    upstream, inputs, options = backward_call(args)
    up_dims: Any
    dims: Any
    up_dims, dims, _ = backward_call(in_dims)
    need_dbias = upstream.need_dbias
    if upstream.need_dsinks or not joins(inputs, dims, options):
        return one_by_one(op, info, in_dims, *args)
    fold = fold_of(info, inputs.q, dims.q)
    bias, shared = inputs.bias, False
    if bias is not None and need_dbias:
        shared = bias.shape[0 if dims.bias != 0 else 1] != fold.B
        if shared and bias.dtype != torch.float64:  # its gradient is summed here, as in the kernel
            inputs = inputs._replace(bias=bias.float())
    folded = fold.upstream(upstream, up_dims)
    gradients = Gradients(*op(*folded, *fold.inputs(inputs, dims, need_dbias), *options))
    places: Any = Gradients
    out_dims = places(dq=0, dk=0, dv=0, dbias=0 if need_dbias else None, dsinks=None)
    results = Gradients(*map(fold.result, gradients, out_dims))
    if shared:
        assert bias is not None
        assert results.dbias is not None
        dbias = results.dbias.sum(1, keepdim=True).to(bias.dtype)
        results = results._replace(dbias=dbias)
    return tuple(results), tuple(out_dims)


def decode_rule(op: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    """Of ``NAME_decode``."""
    inputs, options = decode_call(args)
    dims: Any
    dims, _ = decode_call(in_dims)
    paged = inputs.page_table is not None
    pool = (dims.k_cache, dims.v_cache)
    shared = (dims.sinks, dims.windows)
    if shared != (None, None) or (paged and pool != (None, None)):
        return one_by_one(op, info, in_dims, *args)
    fold = fold_of(info, inputs.q, dims.q)
    results = op(*fold.decode_inputs(inputs, dims), *options)
    out_dims = (0, 0, 0 if options.received else None)
    return tuple(map(fold.result, results, out_dims)), out_dims


def one_by_one(op: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    """Of any operator or function: the results of all calls, stacked."""
    calls = [
        op(*(entry(x, d, i) for x, d in zip(args, in_dims, strict=True)))
        for i in range(max(info.batch_size, 1))
    ]
    if isinstance(calls[0], Tensor):
        return torch.stack(calls)[: info.batch_size], 0
    return tuple(torch.stack(x)[: info.batch_size] for x in zip(*calls, strict=True)), 0


def entry(x: Any, dim: Any, i: int) -> Any:
    """The argument of mapped call i; zeros where there is no call."""
    if not isinstance(dim, int):  # None, or a tuple's for a tuple
        return x
    if x.shape[dim] == 0:
        return x.new_zeros(x.movedim(dim, 0).shape[1:])
    return x.select(dim, i).contiguous()


def joins(inputs: Inputs, dims: Any, options: Options) -> bool:
    """Whether mapped calls may be entries of one batch."""
    return (
        inputs.cu_seqlens_q is None
        and options.dropout_p == 0
        and dims.sinks is None
        and dims.windows is None
        and dims.dropout_seed is None
        and dims.block_index is None
        and dims.block_bits is None
    )


def fold_of(info: Any, q: Tensor, dim: int | None) -> Fold:
    """The numbers of calls and of entries, of which q (B, H, T, D) has every one."""
    return Fold(info.batch_size, q.shape[0 if dim != 0 else 1])
