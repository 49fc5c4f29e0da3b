"""Probabilities pooled in few cells, by whichever backend runs the call: never T x S numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import autograd, checks, dispatch, sharding
from .call import Inputs, Options, Outputs, Pooling
from .functional import attention_problem
from .reference import reference_pooled


def pooled(
    function: str,
    inputs: Inputs,
    options: Options,
    kind: int,
    rows: int,
    columns: int,
    backend: str,
    *,
    tokens_q: Tensor | None = None,
    tokens_k: Tensor | None = None,
    norm: Tensor | None = None,
    real: Tensor | None = None,
    names: tuple[str, ...] = checks.NAMES,
) -> Tensor:
    """Choose a backend and pool the probabilities of a checked call, without gradients.

    Args:
        function: For messages, with ``names`` as those of ``checks.attention_call``.
        inputs: The call's tensors, canonical.
        options: Its other options; dropout, statistics and weights are of no effect.
        kind: See `Pooling`, as for the next two.
        rows: Cells along the queries.
        columns: Cells along the keys.
        backend: As for `attention`.
        tokens_q: See `Pooling`.
        tokens_k: See `Pooling`.
        norm: That of the call's ``Outputs``, where it has been run with the same backend: it is not
            run again. None, or empty, where there is none.
        real: Bool ``(B, H, T)``, the queries that count; of all others p is 0.
        names: Of q, k and v, for messages.

    Returns:
        See `reference_pooled`.

    Raises:
        ValueError: The call has indices; or the named backend cannot run it, or pools nothing; or
            none but the reference can and ``ATTNFAST_FALLBACK=error``.
    """
    if inputs.indices is not None:
        raise ValueError(
            f"{function}: indices must be left out where probabilities are pooled, got a list of"
            f" {inputs.indices.shape[3]} keys for each query"
        )
    problem = attention_problem(inputs, options)
    detached: list[Any] = [None if x is None else x.detach() for x in inputs]
    inputs = Inputs(*detached)._replace(dropout_seed=None)
    options = options._replace(dropout_p=0.0, weights=0, stats=0)
    pooling = problem._replace(options=options, requires_grad=False, pooled=True)
    row = dispatch.select(pooling, backend, function=function)
    if row.ops is None:
        sharding.needs_operator(function, inputs.q)
        checks.memory(function, inputs, names)
    if inputs.cu_seqlens_q is not None and dispatch.wants_checks(row):
        checks.sequence_values(function, inputs, options)
    if row.ops is None:
        return reference_pooled(inputs, options, kind, rows, columns, tokens_q, tokens_k, real)
    try:
        if norm is None or dispatch.select(problem, backend, function=function) is not row:
            outputs = Outputs(*autograd.call(row.ops.fwd, *inputs, *options))
            assert outputs.norm is not None
            norm = outputs.norm
        if real is not None:
            norm = norm.detach().clone()
            norm[1].masked_fill_(~real, torch.inf)
        cells = Pooling(norm, tokens_q, tokens_k, kind, rows, columns)
        result: Tensor = autograd.call(row.ops.pooled, *inputs, *options, *cells)
    except RuntimeError as error:
        if (refused := checks.complaint(function, error, names)) is None:
            raise
        raise refused from None
    return result
