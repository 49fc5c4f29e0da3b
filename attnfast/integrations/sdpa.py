"""``torch.nn.functional.scaled_dot_product_attention`` computed by attnfast, whoever calls it.

attnfast joins torch's registry of flash-attention implementations (torch.nn.attention). While it is
the active one, two sets of torch's own operators have our kernels on the CPU:

- ``aten::scaled_dot_product_attention``, for plain tensors in eager mode: all that torch's function
  takes, also what torch leaves to its slow path (dropout, masks with gradients, D_v != D), and
  bool masks stay bool.
- ``aten::_scaled_dot_product_flash_attention_for_cpu`` and its backward, which torch's function
  becomes in compiled graphs, under functorch's transforms, in dispatch modes, and here for a single
  query, a step of generation. Graphs are the same whether or not attnfast is active, and so are
  torch's caches of them.

What neither takes goes to torch's own kernels, which then also raise its own errors.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .. import backends, ops
from ..backends import cpu
from ..call import DecodeInputs, DecodeOptions, Upstream
from ..checks import attention_call, dense_rows
from ..sdpa import scaled_dot_product_attention

IMPLEMENTATION = "attnfast"  # its name in torch's registry
NAME = "attnfast.integrations.sdpa"
REGISTRY = (
    "register_flash_attention_impl",
    "activate_flash_attention_impl",
    "restore_flash_attention_impl",
    "current_flash_attention_impl",
)
FLASH = "_scaled_dot_product_flash_attention_for_cpu"
FLASH_NAMES = ("query", "key", "value", "attn_mask", "attn_mask")

_before: str | None = None  # the implementation that was active before ours


def activate() -> None:
    """Compute ``scaled_dot_product_attention`` on CPU tensors by attnfast, in this whole process.

    Semantics are torch's: the same arguments, results, gradients, errors, autocast and
    ``torch.nn.attention.sdpa_kernel``, which by leaving FLASH_ATTENTION out also leaves attnfast
    out. Dropout draws other masks than torch's. Queries that attend nothing give zeros. float64
    stays torch's.

    ``nn.TransformerEncoderLayer``'s inference path, which does not call the function, is switched
    off meanwhile (``torch.backends.mha``), so that ``nn.Transformer`` uses attnfast in evaluation
    too. ``nn.MultiheadAttention`` calls the function only with ``need_weights=False``.

    Another active implementation of torch's registry ("FA4" for example) is inactive meanwhile.
    Nothing happens if attnfast is active already.

    Raises:
        RuntimeError: torch has no registry of flash-attention implementations, or attnfast's native
            library is not there.
    """
    global _before
    missing = [name for name in REGISTRY if not hasattr(nn.attention, name)]
    if missing:
        raise RuntimeError(
            f"{NAME}: torch must have torch.nn.attention.{missing[0]} (2.13 does), got torch"
            f" {torch.__version__}: call attnfast.scaled_dot_product_attention instead"
        )
    if cpu.MISSING is not None:
        raise RuntimeError(f"{NAME}: there are no kernels to activate: {cpu.MISSING}")
    active = nn.attention.current_flash_attention_impl()
    if active == IMPLEMENTATION:
        return
    _before = active
    nn.attention.register_flash_attention_impl(IMPLEMENTATION, register_fn=_Kernels)
    nn.attention.activate_flash_attention_impl(IMPLEMENTATION)


def restore() -> None:
    """Undo `activate`: torch's kernels, its inference path, and the implementation active before.

    Nothing happens unless attnfast is the active implementation.
    """
    current = getattr(nn.attention, "current_flash_attention_impl", lambda: None)
    if current() != IMPLEMENTATION:
        return
    nn.attention.restore_flash_attention_impl()
    if _before is not None:
        nn.attention.activate_flash_attention_impl(_before)


class _Kernels:
    """Our kernels in torch's dispatcher, from creation to ``remove``, which torch's registry calls.

    Attributes:
        library: What holds the registrations: they end with it.
        fast_path: Whether the inference path of torch's encoder layers was on.
        flash, flash_backward: The kernels of torch that ours hide, for float64.
    """

    def __init__(self) -> None:
        self.flash = torch.library.get_kernel(f"aten::{FLASH}", "CPU")
        self.flash_backward = torch.library.get_kernel(f"aten::{FLASH}_backward", "CPU")
        self.fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        self.library: Any = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():  # torch reports the first override of a process
            warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
            for name, kernel, key in (
                ("scaled_dot_product_attention", _attention, "AutogradCPU"),
                ("scaled_dot_product_attention", _attention, "CPU"),  # in inference mode
                (FLASH, self.forward, "CPU"),
                (f"{FLASH}_backward", self.backward, "CPU"),
            ):
                self.library.impl(name, kernel, key, allow_override=True)

    def remove(self) -> None:
        """Give torch its kernels and its inference path back."""
        self.library = None
        torch.backends.mha.set_fastpath_enabled(self.fast_path)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(B, H, L, E) and (B, H_kv, S, E) twice -> out (B, H, L, E), lse (B, H, L)."""
        if query.dtype not in backends.FUSED_DTYPES:
            given = (query, key, value, dropout_p, is_causal)
            out, lse = _boxed(self.flash, *given, attn_mask=attn_mask, scale=scale)
            return out, lse
        inputs, options = _flash_call(query, key, value, dropout_p, is_causal, attn_mask, scale)
        if query.shape[2] == 1 and not is_causal:
            q, k, v = inputs.q, inputs.k, inputs.v
            lengths = torch.full((q.shape[0],), k.shape[2], dtype=torch.int32)
            step = DecodeInputs(q, k, v, lengths, bias=inputs.bias)
            out, lse, _ = ops.CPU.decode(*step, *DecodeOptions(options.scale))
        else:
            out, lse, *_ = ops.CPU.fwd(*inputs, *options)
        return out, lse.transpose(1, 2).contiguous().transpose(1, 2)  # with torch's strides

    def backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        dropout_p: float,
        is_causal: bool,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value, their rows in the order (B, L, H)."""
        if query.dtype not in backends.FUSED_DTYPES:
            given = (grad_out, query, key, value, out, logsumexp, dropout_p, is_causal)
            dq, dk, dv = _boxed(self.flash_backward, *given, attn_mask=attn_mask, scale=scale)
            return dq, dk, dv
        inputs, options = _flash_call(query, key, value, dropout_p, is_causal, attn_mask, scale)
        upstream = Upstream.plain(dense_rows(grad_out), dense_rows(out), logsumexp.contiguous())
        dq, dk, dv, *_ = ops.CPU.bwd(*upstream, *inputs, *options)
        dq, dk, dv = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (dq, dk, dv))
        return dq, dk, dv


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Torch's function: our kernels where they apply, else its own way."""
    single = query.shape[-2:-1] == (1,) and query.shape[-1:] == value.shape[-1:] and not dropout_p
    if not single and _is_ours(query, key, value, attn_mask):
        try:
            return scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask,
                dropout_p,
                is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )
        except (TypeError, ValueError):
            pass  # arguments that torch refuses too, in its own words
    given = (query, key, value, attn_mask, dropout_p, is_causal)
    function = torch.ops.aten.scaled_dot_product_attention.default
    out: Tensor = function.decompose(*given, scale=scale, enable_gqa=enable_gqa)
    return out


def _is_ours(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> bool:
    """Whether torch may use its flash attention, on plain tensors, with nobody watching."""
    return (
        query.dtype in backends.FUSED_DTYPES
        and torch.backends.cuda.flash_sdp_enabled()
        and all(type(x) in (Tensor, nn.Parameter) for x in (query, key, value))
        and (attn_mask is None or type(attn_mask) in (Tensor, nn.Parameter))
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
    )


def _flash_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    is_causal: bool,
    attn_mask: Tensor | None,
    scale: float | None,
) -> Any:
    """Inputs and Options of torch's flash operator, whose masks are float."""
    return attention_call(
        FLASH,
        query,
        key,
        value,
        None,
        attn_mask,
        is_causal,
        None,
        "top_left",
        (scale, None),
        None,
        None,
        dropout_p,
        None,
        False,
        False,
        None,
        names=FLASH_NAMES,
    )


def _boxed(kernel: Any, *args: Any, **kwargs: Any) -> Any:
    return kernel.call_boxed(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
