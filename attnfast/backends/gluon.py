"""An experimental forward for Hopper in Gluon; its backward and decoding are Triton's."""

from __future__ import annotations

import torch

from .. import ops
from ..call import OPERATORS
from . import HALF, Backend, Problem, gpus, no_pooling, other_dtype, triton

HEAD_DIMS = (64, 128, 256)
LARGEST_SCALE = 2.0**100  # beyond, scores leave their units of log2
OPS = ops.define("gluon")
_LIBRARY = torch.library.Library(ops.NAMESPACE, "IMPL")

for _kind in (kind for kind in OPERATORS if kind != "pooled"):
    _name = "gluon_fwd" if _kind == "fwd" else _kind
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(f"gluon_{_kind}", triton.implementation(_name), _key)


def unsupported(problem: Problem) -> str | None:
    """Why the experimental forward for Hopper refuses a problem, or None."""
    options, D = problem.options, problem.D
    masked = problem.mask or problem.blocks or problem.bias
    tensors = masked or problem.indices or problem.alibi or problem.sinks or problem.align
    tensors = tensors or problem.windows
    plain = options._replace(scale=1.0, causal=False, deterministic=False, align_bottom_right=False)
    reasons = (
        (
            problem.device.type == "cpu" and not gpus.PTX,
            "runs on GPUs only: Triton cannot interpret Gluon",
        ),
        (problem.kind != "attention", f"takes attention only, got {problem.kind}"),
        (problem.dtype not in HALF, other_dtype(problem, HALF)),
        (
            problem.D_v != D or D not in HEAD_DIMS,
            f"takes D = D_v of {HEAD_DIMS}, got {D} and {problem.D_v}",
        ),
        (
            bool(tensors)
            or plain != type(options)(scale=1.0)
            or not 0 < options.scale <= LARGEST_SCALE,
            "takes no options but causal, a bottom-right align and a scale in (0, 2**100]",
        ),
        (problem.S == 0, "needs keys"),
        (problem.pooled, no_pooling(problem)),
    )
    reason = next((text for holds, text in reasons if holds), None) or triton.unsupported(problem)
    if reason is None and gpus.capability(problem.device.index or 0) not in ((9, 0), (99, 0)):
        return "needs a GPU of compute capability 9.0"
    return reason


ROW = Backend("gluon", unsupported, OPS, triton.ROW.workspace, triton.details)
