"""Second derivatives of a fused call, through the reference, in memory linear in T and S."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .block_index import dense
from .call import BLOCK_FIELDS, Inputs, Options
from .reference import (
    NEG_INF,
    allowed,
    dropout_mask,
    positions,
    reference_attention,
    scores,
    without_autocast,
)

PRIMALS = ("q", "k", "v", "bias", "sinks")
BLOCK_ELEMENTS = 1 << 20  # scores in one block of rows
CLOSED_FORMS = 4  # so many times as many, since it holds so many times fewer matrices of them


class ResultGradients(NamedTuple):
    """The gradients of a call's results that its backward was given."""

    out: Tensor
    lse: Tensor | None
    entropy: Tensor | None
    weights: Tensor | None


def present(names: Iterable[str], values: Iterable[Tensor | None]) -> dict[str, Tensor]:
    """The values that are not None, by name."""
    return {name: x for name, x in zip(names, values, strict=True) if x is not None}


def second_derivatives(
    inputs: Inputs, options: Options, grads: dict[str, Tensor], toward: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The gradient of sum(first gradients * ``toward``) for every differentiable tensor.

    Every block of rows is computed anew, in fp32 or better: in closed form where only ``out`` has a
    gradient, else by the reference, differentiated twice. Memory is that of one block's scores,
    beside results of the inputs' sizes.

    Args:
        inputs: The tensors of the forward call.
        options: Its options.
        grads: The gradients of out, lse, entropy and weights that the first backward was given.
        toward: The gradients of its results, for q, k, v, bias and sinks.

    Returns:
        The results by name, as ``second_derivative_names`` lists them.
    """
    primals = primals_of(inputs)
    dtype = torch.promote_types(inputs.q.dtype, torch.float32)
    totals: dict[str, Tensor] = {}
    grad_totals: dict[str, Tensor] = {}
    options = options._replace(
        stats=int("entropy" in grads), weights=options.weights if "weights" in grads else 0
    )
    with without_autocast(inputs.q.device.type):
        closed = list(grads) == ["out"] and inputs.sinks is None and options.softcap <= 0
        elements = BLOCK_ELEMENTS * (CLOSED_FORMS if closed else 1)
        of_a_row = inputs.q.shape[0] * inputs.q.shape[1]
        for block in blocks(inputs, options, lambda S: elements // max(1, of_a_row * S)):
            x, dy, direction = (block.cut(tensors, dtype) for tensors in (primals, grads, toward))
            if closed:
                results = closed_form(block, x, dy["out"], direction)
            else:
                pullback = vjp(lambda x, dy, block=block: block.backward(x, dy, toward), x, dy)
                results = pullback(direction)
            for sums, terms in zip((totals, grad_totals), results, strict=True):
                for name, term in terms.items():
                    whole = (primals if sums is totals else grads)[name]
                    if closed and name not in sums and term.shape == whole.shape:
                        sums[name] = term
                        continue
                    if name not in sums:
                        sums[name] = torch.zeros_like(whole, dtype=dtype)
                    sums[name][block.part(name, whole)] += term
    found = [
        sums[name].to(x.dtype) if name in sums else torch.zeros_like(x)
        for tensors, sums in ((primals, totals), (grads, grad_totals))
        for name, x in tensors.items()
    ]
    return dict(zip(second_derivative_names(inputs, grads), found, strict=True))


def primals_of(inputs: Inputs) -> dict[str, Tensor]:
    """The differentiable tensors of a call, by name."""
    return present(PRIMALS, (inputs.q, inputs.k, inputs.v, inputs.bias, inputs.sinks))


def second_derivative_names(inputs: Inputs, grads: Iterable[str]) -> list[str]:
    """Which second derivatives there are: by q, k, v, bias, sinks, and by each gradient given."""
    return [*primals_of(inputs), *(f"grad_{name}" for name in grads)]


def vjp(function: Callable[..., Any], *primals: Any) -> Callable[..., Any]:
    """The function from gradients of ``function``'s results to those of ``primals``."""
    pullback: Callable[..., Any] = torch.func.vjp(function, *primals)[1]
    return pullback


class Block(NamedTuple):
    """Rows ``rows`` of one sequence of a varlen call, or of all entries of a dense call."""

    inputs: Inputs
    options: Options
    sequence: int | None
    q_start: int  # where the sequence begins among all queries
    k_rows: slice
    rows: slice

    def part(self, name: str, x: Tensor) -> tuple[slice, ...]:
        """Which part of a tensor of the whole call belongs to the block."""
        every = slice(None)
        entry = every if self.sequence is None else slice(self.sequence, self.sequence + 1)
        local_keys = slice(0, self.k_rows.stop - self.k_rows.start)
        if name in ("q", "out", "lse", "entropy"):
            start, stop = self.q_start + self.rows.start, self.q_start + self.rows.stop
            return every, every, slice(start, stop)
        if name in ("k", "v"):
            return every, every, self.k_rows
        if name == "weights":
            return (entry, *(every,) * (x.dim() - 3), self.rows, local_keys)
        if name in ("mask", "bias"):
            return (
                every if x.shape[0] == 1 else entry,
                every,
                every if x.shape[2] == 1 else self.rows,
                every if x.shape[3] == 1 else local_keys,
            )
        if name == "indices":
            return every, every, self.rows
        if name in ("align", "alibi_slopes", "block_starts"):
            return (every if x.shape[0] == 1 else entry,)
        return (every,)

    def cut(self, tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """The block's part of each tensor, in the dtype of the computation."""
        return {name: x[self.part(name, x)].to(dtype) for name, x in tensors.items()}

    def backward(
        self, x: dict[str, Tensor], dy: dict[str, Tensor], wanted: Collection[str]
    ) -> dict[str, Tensor]:
        """The block's first gradients, as functions of its inputs and its results' gradients."""
        (dx,) = vjp(lambda x: self.forward(x, dy), x)(dy)
        return {name: dx[name] for name in wanted}

    def call(self, x: dict[str, Tensor]) -> Inputs:
        """The block's own call, with ``x`` for the differentiable tensors."""
        others = {
            name: tensor[self.part(name, tensor)]
            for name, tensor in self.inputs._asdict().items()
            if tensor is not None and name not in x and not name.startswith("cu_seqlens")
        }
        in_blocks = [others.pop(name) for name in BLOCK_FIELDS if name in others]
        if in_blocks:
            keys = self.k_rows.stop - self.k_rows.start
            longest = self.options.max_seqlen_k or keys
            starts, index, bits = in_blocks
            others["mask"] = dense(starts, index, bits, self.rows, longest)[..., :keys]
        return Inputs(**x, **others)

    def forward(self, x: dict[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
        """The reference's results on the block, as functions of its differentiable tensors."""
        outputs = reference_attention(
            self.call(x),
            self.options,
            row_start=self.rows.start,
            batch_start=self.sequence or 0,
            compute_dtype=x["q"].dtype,
        )
        results: dict[str, Any] = {
            "out": outputs.out,
            "lse": outputs.lse,
            "entropy": None if outputs.stats is None else outputs.stats[1],
            "weights": outputs.weights,
        }
        return {name: results[name] for name in wanted}


def closed_form(
    block: Block,
    x: dict[str, Tensor],
    d_o: Tensor,
    toward: dict[str, Tensor],
    *,
    careful: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A block's second derivatives where out alone has a gradient; docs/math.md has the names.

    Where a query must not see a key, p is 0, and so is what it multiplies unless that is NaN or
    Inf; then sums over the row are too, and all is done again with ``careful`` zeros there.
    """
    inputs, options, row = block.call(x), block.options, block.rows.start
    (B, H, T, _), S, H_kv = inputs.q.shape, inputs.k.shape[2], inputs.k.shape[1]
    distance = torch.arange(S, device=d_o.device) - positions(inputs, options, row)
    hidden = ~allowed(inputs, options, distance) if hides(inputs, options) else None

    def hide(y: Tensor) -> Tensor:
        return y.masked_fill_(hidden, 0) if careful and hidden is not None else y

    def of_all_heads(y: Tensor) -> Tensor:
        return y.repeat_interleave(H // H_kv, dim=1) if H_kv < H else y

    def of_key_heads(y: Tensor) -> Tensor:
        return y.unflatten(1, (H_kv, H // H_kv)).sum(2) if H_kv < H else y

    q, k, v = inputs.q, of_all_heads(inputs.k), of_all_heads(inputs.v)
    poison: Tensor | None = None
    if hidden is not None:
        idle_q = hidden.all(-1)[..., None]
        if careful:  # as in the reference: NaN goes nowhere that it was not seen
            idle_k = hidden.all(-2)[..., None]
            k, v = (y.masked_fill(idle_k, 0) for y in (k, v))
            q, d_o = (y.masked_fill(idle_q, 0) for y in (q, d_o))
            has_nan = q.isnan().any(-1, keepdim=True)
            poison = torch.where(has_nan, q, 0).sum(-1, keepdim=True)
            q = q.masked_fill(has_nan, 0)
    p = scores(q @ k.mT, inputs, options, distance)
    if poison is not None:
        p += poison
    if hidden is not None:
        seen = torch.zeros_like(hidden, dtype=p.dtype).masked_fill_(hidden, NEG_INF)
        p = hide(torch.softmax(hide(p).add_(seen), -1))
        if idle_q.any():
            p.masked_fill_(idle_q, 0)
    else:
        p = torch.softmax(p, -1)
    kept = None
    if options.dropout_p > 0:
        assert inputs.dropout_seed is not None
        start = {"row_start": row, "batch_start": block.sequence or 0}
        kept = dropout_mask(inputs.dropout_seed, B, H, T, S, options.dropout_p, **start).to(p.dtype)
        kept /= 1 - options.dropout_p if options.dropout_p < 1 else 1

    def drop(y: Tensor) -> Tensor:
        return y if kept is None else y.mul_(kept)

    by = {name: of_all_heads(y) if name in ("k", "v") else y for name, y in toward.items()}
    g: Tensor | None = None  # d / d ds
    for a, b in (("q", k), ("k", q)):
        if a in by:
            rows, columns = (by[a], b) if a == "q" else (b, by[a])
            g = product(rows, columns.mT, g, options.scale)
    if "bias" in by:
        g = by["bias"].expand_as(p).clone() if g is None else g.add_(by["bias"])
    g, dp = hide(torch.zeros_like(p) if g is None else g), hide(drop(d_o @ v.mT))
    delta, gamma = ((p * y).sum(-1, keepdim=True) for y in (dp, g))
    dp -= delta
    g -= gamma
    ds, d_dp = hide(p * dp), drop(hide(p * g))
    # d / dp, but for multiples of the row: sum(p (dp - delta)) = 0
    e = g.mul_(dp)
    if "v" in by:
        e = product(d_o, by["v"].mT, e) if kept is None else e.add_(drop(d_o @ by["v"].mT))
    e = torch._softmax_backward_data(e, p, -1, p.dtype)  # p (e - sum(p e))
    if hidden is not None and not careful:
        rows_of_e = e[..., :1]  # none of a row is finite where the sum is not
        sums = (q.sum(-1), k.sum(-1), delta, gamma, rows_of_e)
        if not torch.cat([y.flatten() for y in sums]).isfinite().all():
            return closed_form(block, x, d_o, toward, careful=True)
    e = hide(e)
    dq, dk = product(e, k, None, options.scale), product(e.mT, q, None, options.scale)
    if "k" in by:
        dq = product(ds, by["k"], dq, options.scale)
    if "q" in by:
        dk = product(ds.mT, by["q"], dk, options.scale)
    dv, d_do = d_dp.mT @ d_o, d_dp @ v
    if "v" in by:
        d_do = product(drop(p), by["v"], d_do)
    if careful and hidden is not None:
        dq, d_do = (y.masked_fill_(idle_q, 0) for y in (dq, d_do))
        dk, dv = (y.masked_fill_(idle_k, 0) for y in (dk, dv))
    terms = {"q": dq, "k": of_key_heads(dk), "v": of_key_heads(dv)}
    if "bias" in x:
        terms["bias"] = e.sum_to_size(x["bias"].shape)
    return terms, {"out": d_do}


def product(a: Tensor, b: Tensor, onto: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """``scale a @ b``, added to ``onto`` in place where there is one."""
    beta = 0.0 if onto is None else 1.0
    onto = a.new_empty(*a.shape[:-1], b.shape[-1]) if onto is None else onto
    flat = (y.flatten(0, 1) for y in (a, b))
    onto.flatten(0, 1).baddbmm_(*flat, beta=beta, alpha=scale)
    return onto


def hides(inputs: Inputs, options: Options) -> bool:
    """Whether there may be keys that a query must not see."""
    limits = (inputs.mask, inputs.bias, inputs.windows, inputs.indices)
    sides = (options.window_left, options.window_right)
    return options.causal or max(sides) >= 0 or any(limit is not None for limit in limits)


def blocks(inputs: Inputs, options: Options, height: Callable[[int], int]) -> Iterator[Block]:
    """Cut a call into blocks of ``height(S)`` rows."""
    T = inputs.q.shape[2]
    q_ends, k_ends = [0, T], [0, inputs.k.shape[2]]
    if inputs.cu_seqlens_q is not None and inputs.cu_seqlens_k is not None:
        q_ends, k_ends = inputs.cu_seqlens_q.tolist(), inputs.cu_seqlens_k.tolist()
    for i, (q_start, k_start) in enumerate(zip(q_ends[:-1], k_ends[:-1], strict=True)):
        T, S = q_ends[i + 1] - q_start, k_ends[i + 1] - k_start
        offset = options.align_offset + (S - T if options.align_bottom_right else 0)
        aligned = options._replace(align_offset=offset, align_bottom_right=False)
        step = max(1, height(S))
        for row in range(0, T, step):
            sequence = None if inputs.cu_seqlens_q is None else i
            rows, k_rows = slice(row, min(row + step, T)), slice(k_start, k_start + S)
            yield Block(inputs, aligned, sequence, q_start, k_rows, rows)
