"""ONNX Runtime's Attention operator on the CPU."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..clock import Results
from ..problem import Workload

OPSET = 23  # the first with Attention


def missing(device: torch.device) -> str | None:
    """Why it cannot be had."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        return f"not installed ({error.name})"
    return None if device.type == "cpu" else "is compared on the CPU"


def absent(p: Workload) -> str | None:
    """What it does not compute."""
    if (reason := missing(p.q.device)) is not None:
        return reason
    if p.leaves:
        return "has no backward pass"
    if p.q.dtype != torch.float32:
        return "is compared in float32"
    if p.case.option not in ("", "gqa", "softcap"):
        return f"{p.case.option} is not compared"
    return None


def forward(p: Workload) -> Results:
    """The row's result."""
    return {"out": attention(p.q, p.k, p.v, p.case.causal, p.softcap or 0.0)}


def attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, softcap: float = 0.0
) -> Tensor:
    """The operator on (B, H, T, D) fp32 tensors, whose memory it shares."""
    session = _session(causal, softcap, torch.get_num_threads())
    given = {name: x.numpy() for name, x in (("q", q), ("k", k), ("v", v))}
    return torch.from_numpy(session.run(None, given)[0])


@functools.cache
def _session(causal: bool, softcap: float, threads: int) -> Any:
    import onnx
    import onnxruntime

    FLOAT = onnx.TensorProto.FLOAT
    node = onnx.helper.make_node(
        "Attention", ["q", "k", "v"], ["out"], is_causal=int(causal), softcap=softcap
    )

    def value(name: str) -> Any:
        sizes = [f"{name}_{axis}" for axis in ("batch", "heads", "length", "features")]
        return onnx.helper.make_tensor_value_info(name, FLOAT, sizes)

    graph = onnx.helper.make_graph([node], "attention", [*map(value, "qkv")], [value("out")])
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=10
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Its threads would wait for work by spinning, on the cores of whoever is timed next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
