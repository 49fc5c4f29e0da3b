"""vmap of the raw operators: a mapped dimension joins the batch, or the calls run one by one.

Entries of a batch do not know of each other, so that M mapped calls of B entries are one call of
M * B, and views where the strides allow it. What a call has only one of cannot join: sinks, a seed
of dropout (whose mask counts the entries), the boundaries of a varlen call, a pool of pages. Then
every mapped call is run by itself.

A rule is ``rule(op, info, in_dims, *args) -> (results, out_dims)``, as torch.library.register_vmap
has it, and is called once for every level of nested transforms.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import rows
from .options import Inputs, Options


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
            rows(self.tensor(x.q, dims.q)),
            rows(self.tensor(x.k, dims.k)),
            rows(self.tensor(x.v, dims.v)),
            self.broadcast(x.mask, dims.mask),
            self.broadcast(x.bias, dims.bias, bias_apart),
            self.broadcast(x.alibi_slopes, dims.alibi_slopes),
            x.sinks,
            self.optional(x.align, dims.align),
        )

    def apart(self, x: Tensor, batch: int = 0) -> Tensor:
        """A result whose mapped dimension stands before its batch."""
        result: Tensor = x.unflatten(batch, (self.M, self.B))
        return result


def fwd_rule(op: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    """Of ``NAME_fwd``."""
    inputs, options = Inputs(*args[:11]), Options(*args[11:])
    dims: Any = Inputs(*in_dims[:11])
    if not joins(inputs, dims, options):
        return one_by_one(op, info, in_dims, *args)
    fold = fold_of(info, inputs.q, dims.q)
    out, lse, norm, stats, received, weights = op(*fold.inputs(inputs, dims), *options)
    return (
        fold.apart(out),
        fold.apart(lse),
        fold.apart(norm, 1),
        fold.apart(stats, 1) if options.stats else stats,
        fold.apart(received) if options.stats == 2 else received,
        fold.apart(weights) if options.weights else weights,
    ), (
        0,
        0,
        1,
        1 if options.stats else None,
        0 if options.stats == 2 else None,
        0 if options.weights else None,
    )


def bwd_rule(op: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    """Of ``NAME_bwd``."""
    inputs, options = Inputs(*args[9:20]), Options(*args[20:])
    dims: Any = Inputs(*in_dims[9:20])
    need_dbias, need_dsinks = args[7:9]
    if need_dsinks or not joins(inputs, dims, options):
        return one_by_one(op, info, in_dims, *args)
    fold = fold_of(info, inputs.q, dims.q)
    bias, shared = inputs.bias, False
    if bias is not None and need_dbias:
        shared = bias.shape[0 if dims.bias != 0 else 1] != fold.B
        if shared and bias.dtype != torch.float64:  # its gradient is summed here, as in the kernel
            inputs = inputs._replace(bias=bias.float())
    grad_out, grad_lse, grad_entropy, grad_weights, out, norm, entropy = args[:7]
    dq, dk, dv, dbias, dsinks = op(
        rows(fold.tensor(grad_out, in_dims[0])),
        contiguous(fold.optional(grad_lse, in_dims[1])),
        contiguous(fold.optional(grad_entropy, in_dims[2])),
        contiguous(fold.optional(grad_weights, in_dims[3])),
        rows(fold.tensor(out, in_dims[4])),
        contiguous(fold.tensor(norm, in_dims[5], 1)),
        contiguous(fold.optional(entropy, in_dims[6])),
        need_dbias,
        need_dsinks,
        *fold.inputs(inputs, dims, bias_apart=need_dbias),
        *options,
    )
    if need_dbias:
        assert bias is not None
        dbias = fold.apart(dbias)
        dbias = dbias.sum(1, keepdim=True).to(bias.dtype) if shared else dbias
    results = fold.apart(dq), fold.apart(dk), fold.apart(dv), dbias, dsinks
    return results, (0, 0, 0, 0 if need_dbias else None, None)


def decode_rule(op: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    """Of ``NAME_decode``."""
    q, k_cache, v_cache, cache_seqlens, page_table, bias, alibi_slopes, sinks, *values = args
    paged = page_table is not None
    if in_dims[7] is not None or (paged and in_dims[1:3] != (None, None)):
        return one_by_one(op, info, in_dims, *args)
    fold = fold_of(info, q, in_dims[0])
    out, lse = op(
        rows(fold.tensor(q, in_dims[0])),
        k_cache if paged else rows(fold.tensor(k_cache, in_dims[1])),
        v_cache if paged else rows(fold.tensor(v_cache, in_dims[2])),
        contiguous(fold.tensor(cache_seqlens, in_dims[3])),
        contiguous(fold.optional(page_table, in_dims[4])),
        fold.broadcast(bias, in_dims[5]),
        fold.broadcast(alibi_slopes, in_dims[6]),
        sinks,
        *values,
    )
    return (fold.apart(out), fold.apart(lse)), (0, 0)


def one_by_one(op: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    """Of any operator or function: the results of all calls, stacked."""
    calls = [
        op(*(entry(x, d, i) for x, d in zip(args, in_dims, strict=True)))
        for i in range(max(info.batch_size, 1))
    ]
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
        and dims.dropout_seed is None
    )


def fold_of(info: Any, q: Tensor, dim: int | None) -> Fold:
    """The numbers of calls and of entries, of which q (B, H, T, D) has every one."""
    return Fold(info.batch_size, q.shape[0 if dim != 0 else 1])


def contiguous(x: Tensor | None) -> Tensor | None:
    """X without gaps."""
    return None if x is None else x.contiguous()
