"""The raw operators: torch.ops.attnfast.NAME_{fwd,bwd,decode,pooled} of every fused backend.

All backends share one schema, which call.py makes, and one fake per operation, defined here; a
backend adds kernels for its device, in C++ (the CPU's, from the native library) or in Python. Empty
tensors of shape (0,) come back for what was not asked for. Shapes and dtypes are checked by the
public functions, not here.

``NAME_fwd`` and ``NAME_bwd`` are differentiable (autograd.py), the others raise where a gradient
would be lost; vmap folds into the batch (vmap.py).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import autograd, vmap
from .call import (
    OPERATORS,
    DecodeInputs,
    DecodeOptions,
    DecodeOutputs,
    Gradients,
    Inputs,
    Options,
    Outputs,
    backward_call,
    decode_call,
    forward_call,
    parameters,
    pooled_call,
    schema,
)
from .sizes import memory_order

EMULATOR = os.environ.get("ATTNFAST_EMULATOR", "0")  # "0" for none, see load_emulator

NAMESPACE = "attnfast"  # of the operators; `make hub` writes another, and builds its library so
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
RAW = getattr(torch.ops, NAMESPACE)
DEFINED: dict[str, Ops] = {}  # by backend


class Ops(NamedTuple):
    """The operators of one backend."""

    fwd: Callable[..., Any]
    bwd: Callable[..., Any]
    decode: Callable[..., Any]
    pooled: Callable[..., Any]


@functools.cache
def define(backend: str) -> Ops:
    """Define a backend's operators: schemas, fakes, gradients, and what vmap does."""
    ops = Ops(*(_define(f"{backend}_{kind}", schema(kind), FAKES[kind]) for kind in OPERATORS))
    for op, kernel, rule in (
        (ops.fwd, autograd.fwd_kernel(ops), vmap.fwd_rule),
        (ops.bwd, autograd.bwd_kernel(ops), vmap.bwd_rule),
        (ops.decode, autograd.refusing_kernel(ops.decode), vmap.decode_rule),
        (ops.pooled, autograd.refusing_kernel(ops.pooled), vmap.one_by_one),
    ):
        _transform(op, kernel, rule)
    DEFINED[backend] = ops
    return ops


def _define(name: str, schema: str, fake: Callable[..., Any]) -> Any:
    _LIBRARY.define(name + schema)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return getattr(RAW, name).default


def _transform(op: Any, kernel: Callable[..., Any], rule: Callable[..., Any]) -> None:
    """Give an operator its Autograd kernel and its rule for vmap."""
    _LIBRARY.impl(op, kernel, "Autograd", with_keyset=True)
    torch.library.register_vmap(op.name(), functools.partial(rule, op), lib=_LIBRARY)


def empty_in_order(like: Tensor, last: int) -> Tensor:
    """An empty tensor with the first three sizes and the memory order of ``like``.

    Rows are dense: the last dimension has size ``last`` and stride 1, and the other three follow in
    the order of their strides in ``like``, the largest first, equal ones in the order of the
    dimensions.
    """
    return torch.empty_permuted(
        (*like.shape[:3], last), (*memory_order(like), 3), dtype=like.dtype, device=like.device
    )


def _fwd_fake(*args: Any) -> Outputs:
    inputs, options = forward_call(args)
    q, (B, H, T, _), S = inputs.q, inputs.q.shape, inputs.k.shape[2]
    fp32 = functools.partial(q.new_empty, dtype=torch.float32)
    weights: tuple[Any, ...] = (B, H, T, S)
    if inputs.cu_seqlens_q is not None:
        weights = (
            inputs.cu_seqlens_q.shape[0] - 1,
            H,
            options.max_seqlen_q,
            options.max_seqlen_k,
        )
    if options.weights == 1:
        weights = (weights[0], *weights[2:])
    return Outputs(
        empty_in_order(q, inputs.v.shape[3]),
        fp32((B, H, T)),
        fp32((2, B, H, T)),
        fp32((4, B, H, T) if options.stats else (0,)),
        fp32((B, H, S) if options.stats == 2 else (0,)),
        q.new_empty(weights if options.weights else (0,)),
    )


def _bwd_fake(*args: Any) -> Gradients:
    upstream, inputs, _ = backward_call(args)
    dbias, dsinks = (
        x.new_empty(x.shape) if x is not None and wanted else inputs.q.new_empty((0,))
        for x, wanted in (
            (inputs.bias, upstream.need_dbias),
            (inputs.sinks, upstream.need_dsinks),
        )
    )
    dq, dk, dv = (empty_in_order(x, x.shape[3]) for x in (inputs.q, inputs.k, inputs.v))
    return Gradients(dq, dk, dv, dbias, dsinks)


def _decode_fake(*args: Any) -> DecodeOutputs:
    inputs, options = decode_call(args)
    q, k, v, table = inputs.q, inputs.k_cache, inputs.v_cache, inputs.page_table
    S = k.shape[2] if table is None else table.shape[1] * k.shape[1]
    fp32 = functools.partial(q.new_empty, dtype=torch.float32)
    received = fp32((*q.shape[:2], S) if options.received else (0,))
    return DecodeOutputs(empty_in_order(q, v.shape[3]), fp32(q.shape[:3]), received)


def _pooled_fake(*args: Any) -> Tensor:
    inputs, _, pooling = pooled_call(args)
    q, ends = inputs.q, inputs.cu_seqlens_q
    entries = q.shape[0] if ends is None else ends.shape[0] - 1
    shape = (entries, q.shape[1], pooling.rows, pooling.columns)
    return q.new_empty(shape, dtype=torch.float32)


FAKES: dict[str, Callable[..., Any]] = {
    "fwd": _fwd_fake,
    "bwd": _bwd_fake,
    "decode": _decode_fake,
    "pooled": _pooled_fake,
}


# A layer's self-attention on the CPU, see attnfast/nn/fast_path.py: the operators' arguments.
_LAYER = (
    "Tensor packed, int heads, bool batch_first, Tensor? mask, Tensor? bias, bool causal,"
    " float dropout_p, Tensor? dropout_seed"
)


def _self_attention_fake(
    packed: Tensor, heads: int, batch_first: bool, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    first, second, width = packed.shape
    B, T = (first, second) if batch_first else (second, first)
    weights = ((0,), (B, T, T), (B, heads, T, T))[args[-1]]
    return (
        packed.new_empty((first, second, width // 3)),
        packed.new_empty((3, B, heads, T), dtype=torch.float32),
        packed.new_empty(weights),
    )


def _self_attention_bwd_fake(
    grad_out: Tensor, out: Tensor, norm: Tensor, packed: Tensor, *args: Any
) -> Tensor:
    return packed.new_empty(packed.shape)


def _define_for_layers(name: str, schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    op: Callable[..., Any] = _define(name, schema, fake)
    _transform(op, autograd.refusing_kernel(op), vmap.one_by_one)
    return op


CPU = define("cpu")
SELF_ATTENTION = _define_for_layers(
    "cpu_self_attention",
    f"({_LAYER}, int weights) -> (Tensor out, Tensor norm, Tensor weights)",
    _self_attention_fake,
)
SELF_ATTENTION_BWD = _define_for_layers(
    "cpu_self_attention_bwd",
    f"(Tensor grad_out, Tensor out, Tensor norm, {_LAYER}) -> Tensor",
    _self_attention_bwd_fake,
)
CUDA = define("cuda")
_LIBRARY.define("cpu_isa() -> str")
_LIBRARY.define("cpu_isas() -> str")
_LIBRARY.define("cuda_unusable(int device) -> str")
_LIBRARY.define("cuda_build() -> str")
for _backend in ("cpu", "cuda"):
    _call = f"({parameters(Inputs, Options)}, bool need_dbias)"
    _LIBRARY.define(f"{_backend}_workspace{_call} -> (int forward, int backward)")
    _call = f"({parameters(DecodeInputs, DecodeOptions)})"
    _LIBRARY.define(f"{_backend}_decode_workspace{_call} -> int")


def workspace(
    backend: str, inputs: Inputs | DecodeInputs, options: Options | DecodeOptions
) -> tuple[int, int]:
    """Bytes of scratch that native kernels take for a call, forward and backward, as they say."""
    if isinstance(inputs, DecodeInputs):
        return getattr(RAW, f"{backend}_decode_workspace")(*inputs, *options), 0
    of_call = getattr(RAW, f"{backend}_workspace")
    forward, backward = of_call(*inputs, *options, wants_gradient(inputs.bias))
    return forward, backward


def wants_gradient(x: Tensor | None) -> bool:
    """Whether a backward has to give the gradient of an input."""
    return x is not None and x.requires_grad


def load() -> str | None:
    """Load the native library: None, or the reason why there is none.

    It is ``_native.so`` beside this file; the environment variable ``ATTNFAST_NATIVE`` names
    another.
    """
    path = Path(os.environ.get("ATTNFAST_NATIVE") or Path(__file__).with_name("_native.so"))
    if not path.exists():
        return (
            f"native library not built: no {path}; build it with"
            " `python setup.py build_ext --inplace`, or install a wheel"
        )
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"native library not loaded: {error}"
    return None


def load_emulator() -> str | None:
    """Load the CUDA kernels' emulator, which tests ask for: None, or the reason why there is none.

    ``ATTNFAST_EMULATOR`` is "1" for the library that ``make emulator`` builds, or the path of one.
    """
    if EMULATOR == "0":
        return "not part of this build"
    built = Path(__file__).parent.parent / "build" / "emulator" / "_emulator.so"
    path = built if EMULATOR == "1" else Path(EMULATOR)
    if not path.exists():
        return f"emulator not built: no {path}; build it with `make emulator`"
    for test_hook in (
        "emulator_sabotage(str kind, str place, int amount) -> ()",
        "emulator_count(bool on) -> ()",
        "emulator_counts() -> str",
        "emulator_ptx(str folder) -> ()",
        "emulator_ptx_lines(str file) -> str",
        "emulator_selftest(str kernel, str bug) -> ()",
    ):
        _LIBRARY.define(test_hook)
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"emulator not loaded: {error}"
    return None


def cpu_isa() -> str:
    """The instruction set that the CPU kernels use: amx, avx512_bf16, avx512, avx2 or portable."""
    isa: str = RAW.cpu_isa()
    return isa


def cpu_isas() -> list[str]:
    """The instruction sets that this machine can run, the fastest first."""
    isas: str = RAW.cpu_isas()
    return isas.split(",")


MISSING = load()  # why there is no native library, or None
EMULATOR_MISSING = load_emulator()
