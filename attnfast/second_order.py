"""Second derivatives of a fused call, through the reference, in memory linear in T and S."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .block_index import dense
from .call import BLOCK_FIELDS, Inputs, Options
from .reference import reference_attention, without_autocast

PRIMALS = ("q", "k", "v", "bias", "sinks")
BLOCK_ELEMENTS = 1 << 20  # scores in one block of rows


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

    Every block of rows is computed anew by the reference, in fp32 or better, and differentiated
    twice: memory is that of one block's scores, beside results of the inputs' sizes.

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
    totals = {name: torch.zeros_like(x, dtype=dtype) for name, x in primals.items()}
    grad_totals = {name: torch.zeros_like(x, dtype=dtype) for name, x in grads.items()}
    options = options._replace(
        stats=int("entropy" in grads), weights=options.weights if "weights" in grads else 0
    )
    with without_autocast(inputs.q.device.type):
        for block in blocks(inputs, options):
            x, dy, direction = (block.cut(tensors, dtype) for tensors in (primals, grads, toward))
            pullback = vjp(lambda x, dy, block=block: block.backward(x, dy, toward), x, dy)
            for sums, terms in zip((totals, grad_totals), pullback(direction), strict=True):
                for name, term in terms.items():
                    sums[name][block.part(name, sums[name])] += term
    results = [total.to(primals[name].dtype) for name, total in totals.items()]
    results += [total.to(grads[name].dtype) for name, total in grad_totals.items()]
    return dict(zip(second_derivative_names(inputs, grads), results, strict=True))


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

    def forward(self, x: dict[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
        """The reference's results on the block, as functions of its differentiable tensors."""
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
        outputs = reference_attention(
            Inputs(**x, **others),
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


def blocks(
    inputs: Inputs, options: Options, height: Callable[[int], int] | None = None
) -> Iterator[Block]:
    """Cut a call into blocks of ``height(S)`` rows, by default those of BLOCK_ELEMENTS scores."""
    B, H, T, _ = inputs.q.shape
    q_ends, k_ends = [0, T], [0, inputs.k.shape[2]]
    if inputs.cu_seqlens_q is not None and inputs.cu_seqlens_k is not None:
        q_ends, k_ends = inputs.cu_seqlens_q.tolist(), inputs.cu_seqlens_k.tolist()
    for i, (q_start, k_start) in enumerate(zip(q_ends[:-1], k_ends[:-1], strict=True)):
        T, S = q_ends[i + 1] - q_start, k_ends[i + 1] - k_start
        offset = options.align_offset + (S - T if options.align_bottom_right else 0)
        aligned = options._replace(align_offset=offset, align_bottom_right=False)
        step = height(S) if height else max(1, BLOCK_ELEMENTS // max(1, B * H * S))
        for row in range(0, T, step):
            sequence = None if inputs.cu_seqlens_q is None else i
            rows, k_rows = slice(row, min(row + step, T)), slice(k_start, k_start + S)
            yield Block(inputs, aligned, sequence, q_start, k_rows, rows)
