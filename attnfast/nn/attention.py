"""MultiheadAttention: ``torch.nn.MultiheadAttention`` computed by `attnfast.attention`.

The forward pass traces these shapes (E = H * D; batch_first swaps B and T in the first and last):

    query (T, B, E), key, value (S, B, kdim|vdim)
      -> one to three linears, viewed as heads: q (B, H, T, D), k and v (B, H_kv, S, D), no copies
      -> attention: out (B, H, T, D) with q's strides, weights (B, T, S) or (B, H, T, S)
      -> viewed as (T, B, E) -> out_proj
"""

from __future__ import annotations

from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from .. import requirements as require
from ..block_mask import BlockMask
from ..dispatch import check_name
from ..functional import attention, decode_attention
from ..stats import AttentionStats
from . import extras, fast_path
from .cache import KVCache
from .inputs import (
    NAME,
    apart,
    beside_blocks,
    check_cache,
    check_flags,
    check_inputs,
    check_tensors,
    plain_mask,
    split_masks,
)
from .jagged import jagged_forward
from .linear import use_projection_linear
from .projections import merge_heads, project
from .tracing import first_proxy, module_node

DECODE_ROWS = 4  # queries per sequence up to which decode_attention beats attention (Zen 5)
HOOK = -1  # the key of our hooks: torch counts its own from 0, anew in each process


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` with fused attention: same parameters, ``state_dict``, results.

    Every argument and default is torch's; the keyword-only extras default to torch's behaviour.
    It differs from torch where torch is wrong or refuses:

    - A query whose keys are all masked gives zeros in output, weights and gradients, never NaN.
    - Training and evaluation are the same function (dropout aside); ``out_proj`` is called as a
      module, so hooks and adapters on it take part.
    - ``need_weights=True`` with averaging never materialises ``(B, H, T, S)``. As in torch, the
      weights are those after dropout.
    - ``is_causal=True`` works without ``attn_mask`` and together with ``key_padding_mask``; the
      keys that ``add_bias_kv`` and ``add_zero_attn`` append are always attended.
    - ``attn_mask`` may also be ``(B, T, S)``, 4-D, or have dimensions of size 1; bool and float
      masks may be mixed, and bool masks stay bool.
    - Nested tensors work in training and evaluation, without padding; best those of layout
      ``torch.jagged``.
    - ``nn.TransformerEncoderLayer`` calls it in inference too, where it reads the parameters of
      torch's class and computes on its own.
    - Heads can be pruned in place: sizes are those of ``num_heads``, ``embed_dim`` and the weights.

    Args:
        embed_dim: E, the model's width; a multiple of ``num_heads``.
        num_heads: H; each head has dimension ``D = E // H``.
        dropout: probability in [0, 1] with which an attention weight is dropped in training.
        bias: whether the projections have biases.
        add_bias_kv: append one learned key and value to every sequence.
        add_zero_attn: append one zero key and value to every sequence.
        kdim: features of ``key``; default ``embed_dim``.
        vdim: features of ``value``; default ``embed_dim``.
        batch_first: inputs and output are ``(B, T, E)`` instead of ``(T, B, E)``.
        device: where the parameters live.
        dtype: the parameters' dtype; fp64 is computed by the reference.
        num_kv_heads: H_kv, heads of keys and values, each shared by ``H / H_kv`` query heads
            (arXiv:2305.13245); default H. ``in_proj_weight`` then is ``((H + 2 H_kv) D, E)``.
        window: ``(left, right)``: query t attends keys t - left to t + right only; None is
            unbounded. Or an int tensor ``(H, 2)``, of each head its own, -1 is unbounded: a buffer
            then, not in the ``state_dict``. May be changed at any time. Not with ``add_bias_kv`` or
            ``add_zero_attn``, whose keys have no position.
        softcap: c: scores x become ``c * tanh(x / c)`` (arXiv:2408.00118).
        sinks: learn one logit per head, the parameter ``sinks`` ``(H,)``, initially zero, that
            takes part in the softmax's denominator only (arXiv:2309.17453).
        alibi: add ``-slope * abs(s - t)`` to the scores, with the slopes of arXiv:2108.12409 in
            ``alibi_slopes``, fp32 ``(H,)``, not in the ``state_dict``; pruned with the heads. Not
            with ``add_bias_kv`` or ``add_zero_attn``.
        similarity: "dot", or "cosine": q and k are normalised, and multiplied not by ``D ** -0.5``
            but by a temperature per head, exp of the parameter ``log_temperature`` ``(H,)``,
            initially 10, at most 100 (arXiv:2010.04245, arXiv:2111.09883).
        collect_stats: keep the `AttentionStats` of the last call in ``module.stats``, attached to
            the graph, so that entropy can be penalised; "received" fills its column sums too. May
            be changed at any time. Copies and pickles leave ``stats`` out.
        backend: the backend to use, see `attnfast.attention`.
        deterministic: see `attnfast.attention`.

    Raises:
        TypeError: an extra of the wrong type.
        ValueError: ``embed_dim`` or ``num_heads`` is not positive; an extra is out of range, or
            does not go with ``add_bias_kv`` or ``add_zero_attn``.
        AssertionError: ``embed_dim`` is not a multiple of ``num_heads`` (torch's own check).
    """

    backend: str = "auto"
    deterministic: bool | None = None
    _window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    alibi: bool = False
    similarity: str = "dot"
    collect_stats: bool | str = False
    stats: AttentionStats | None = None
    parallel: Any = None  # see attnfast.distributed.parallelize
    sinks: nn.Parameter | None
    log_temperature: nn.Parameter | None
    alibi_slopes: Tensor | None
    windows: Tensor | None
    _has_sinks: bool = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        num_kv_heads: int | None = None,
        window: tuple[int | None, int | None] | Tensor | None = None,
        softcap: float | None = None,
        sinks: bool = False,
        alibi: bool = False,
        similarity: str = "dot",
        collect_stats: bool | str = False,
        backend: str = "auto",
        deterministic: bool | None = None,
    ) -> None:
        sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "kdim": kdim, "vdim": vdim}
        for name, size in sizes.items():
            if size is not None or name in ("embed_dim", "num_heads"):
                require.integer(NAME, name, size, low=1)
        flags = {"bias": bias, "add_bias_kv": add_bias_kv, "add_zero_attn": add_zero_attn}
        flags |= {"batch_first": batch_first, "sinks": sinks, "alibi": alibi}
        bias, add_bias_kv, add_zero_attn, batch_first, sinks, alibi = (
            require.truth(NAME, name, x) for name, x in flags.items()
        )
        check_name(NAME, backend, "backend")
        require.flag(NAME, "deterministic", deterministic, (None, True, False))
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )
        appends = add_bias_kv or add_zero_attn
        extras.check(num_heads, window, softcap, alibi, similarity, collect_stats, appends)
        self.backend = backend
        self.deterministic = deterministic
        self.softcap = softcap
        self.alibi = alibi
        self.similarity = similarity
        self.collect_stats = collect_stats
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        adopt(self)
        self.window = window
        if num_kv_heads is not None:
            self._share_key_heads(num_kv_heads, made)
        if sinks:
            self._has_sinks = True
            self.sinks = nn.Parameter(torch.empty(num_heads, **made))
        if similarity == "cosine":
            self.log_temperature = nn.Parameter(torch.empty(num_heads, **made))
        extras.reset(self)
        if alibi:
            extras.slopes_of(self)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | BlockMask | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        kv_cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from ``query`` to ``key`` and ``value``.

        With ``kv_cache`` the projected ``key`` and ``value`` are appended to what it holds, S
        counts all that it then holds, and the T queries stand at the last T of these positions (for
        ``is_causal``, ``window`` and ALiBi), so that feeding a sequence piece by piece with
        ``is_causal=True`` gives what feeding it whole gives. ``key`` and ``value`` may be None to
        attend only what is held: cross-attention after its first step.

        Args:
            query: ``(T, B, E)``, ``(B, T, E)`` with ``batch_first``, or ``(T, E)`` unbatched; or
                nested ``(B, *, E)`` with ``batch_first``.
            key: ``(S, B, kdim)``, ``(B, S, kdim)`` or ``(S, kdim)``; or nested ``(B, *, kdim)``.
            value: ``(S, B, vdim)``, ``(B, S, vdim)`` or ``(S, vdim)``; or nested, as ``key``.
            key_padding_mask: ``(B, S)``, or ``(S,)`` unbatched. Bool: True keys are masked **out**.
                Float: added to the scores of the key. What is padding belongs here: the same tensor
                as ``attn_mask`` would be taken for ``(T, S)`` where B and T are equal.
            need_weights: also return the weights, after dropout.
            attn_mask: ``(T, S)``, ``(B * H, T, S)``, ``(B, T, S)`` or ``(B, H, T, S)``, any of the
                dimensions T, S and those of the 4-D form also 1. Bool: True pairs are masked
                **out**. Float: added to the scores, differentiable. Or a `BlockMask` of
                ``(B|1, H|1, T, S)``, torch's too, of the pairs that do attend; ``is_causal`` and
                ``key_padding_mask`` then hold as well.
            average_attn_weights: average the weights over heads.
            is_causal: query t attends keys up to t. With ``attn_mask`` it is, as in torch, the
                caller's promise that ``attn_mask`` is the causal mask: ``attn_mask`` is then not
                read at all, except with ``need_weights``, where it alone decides.
            kv_cache: what this layer has read before; see `KVCache`. Without gradients only.

        Returns:
            The output, of query's shape (and layout, where it is nested), and the weights,
            None without ``need_weights``, else ``(B, T, S)``, per head ``(B, H, T, S)``; unbatched
            without the B. S includes the keys that ``add_bias_kv`` and ``add_zero_attn`` append, in
            this order, last.

        Raises:
            TypeError: an input or mask that is not a dense Tensor; a mask that is neither bool nor
                float; nested tensors with options that need padding; an input in another dtype than
                the parameters outside autocast.
            ValueError: a shape that does not fit; an input on another device than the parameters;
                ``key`` or ``value`` None without a ``kv_cache`` that holds something; a
                ``kv_cache`` that is full, of another batch, or where gradients are needed.
        """
        if not (type(query) is type(key) is type(value) is Tensor):
            check_tensors(query, key, value)
        if not (type(need_weights) is type(average_attn_weights) is type(is_causal) is bool):
            flags = check_flags(need_weights, average_attn_weights, is_causal)
            need_weights, average_attn_weights, is_causal = flags
        asked, parallel = extras.asked_of(self), self.parallel
        if query.is_nested:
            options: Any = (key_padding_mask, need_weights, attn_mask, is_causal, kv_cache, asked)
            return jagged_forward(self, query, key, value, *options), None
        if kv_cache is not None or key is None or value is None:
            check_cache(kv_cache, key, value, parallel)
        weight = self.in_proj_weight  # None where key or value have features of their own
        check_inputs(self, weight, query, key, value)
        dense, blocks = (None, None) if attn_mask is None else apart(attn_mask)
        if dense is not None:
            dense, is_causal = plain_mask(dense, is_causal, need_weights, query.device)
        return_weights = need_weights and ("mean" if average_attn_weights else True)
        alone = query is key and key is value and kv_cache is None and blocks is None
        if alone and parallel is None and fast_path.takes(self, asked, weight, query):
            options = (key_padding_mask, dense, is_causal, return_weights, asked["dropout_p"])
            short = fast_path.self_attention(self, weight, query, *options)
            if short is not None:
                return short

        q, k, v = project(self, weight, query, key, value)
        appended = extras.appended_keys(self)
        if appended:
            extras.check_positions(self.window, self.alibi)
            if kv_cache is None or not (k is None or kv_cache.length):
                k, v = self._append_keys(k, v)
        if self.similarity == "cosine":
            temperature = cast(Tensor, self.log_temperature)
            own = temperature if parallel is None else parallel.per_head(temperature)
            q, k = extras.normalise(q, k, own)
        if kv_cache is not None:
            if k is not None:
                kv_cache.append(k, v, appended)
            k, v = kv_cache.keys, kv_cache.values
        mask = bias = None
        if dense is not None or key_padding_mask is not None:
            if parallel is None:
                sizes = (*q.shape[:3], k.shape[2] - appended)
                mask, bias = split_masks(dense, key_padding_mask, sizes, q.device, appended)
            else:
                mask, bias = parallel.masks(self, dense, key_padding_mask, q, k)

        if blocks is not None:
            lengths = (q.shape[2], k.shape[2]) if parallel is None else parallel.lengths(q, k)
            bias = beside_blocks(blocks, (*q.shape[:2], *lengths), q, mask, bias, appended)
        elif kv_cache is not None and decodes(asked, q.shape[2], is_causal, need_weights):
            out = self._decode(asked, q, kv_cache, mask, bias)
            return self.out_proj(merge_heads(self, out, query)), None
        attend = attention if parallel is None else parallel.attention
        results = attend(
            q,
            k,
            v,
            mask=mask if blocks is None else blocks,
            bias=bias,
            causal=is_causal,
            align="bottom_right" if kv_cache is not None else appended or "top_left",
            return_weights=return_weights,
            deterministic=self.deterministic,
            backend=self.backend,
            **asked,
        )
        if not (need_weights or asked["return_stats"]):
            return self.out_proj(merge_heads(self, results, query)), None
        out, stats, weights = extras.results(results, need_weights, appended, query.dim() == 2)
        if stats is not None:
            self.stats = stats
        if parallel is not None:
            weights = parallel.weights(weights, average_attn_weights)
        return self.out_proj(merge_heads(self, out, query)), weights

    @property
    def num_kv_heads(self) -> int:
        """H_kv, the heads of keys and values, as the weights have it."""
        packed = self.in_proj_weight
        if packed is None:
            rows = self.k_proj_weight.shape[0]
        else:
            rows = (packed.shape[0] - self.embed_dim) // 2
        heads: int = rows * self.num_heads // self.embed_dim
        return heads

    @property
    def window(self) -> tuple[int | None, int | None] | Tensor | None:
        """The window of all heads, or those of each, int32 ``(H, 2)``; see the class."""
        return self._window if self.windows is None else self.windows

    @window.setter
    def window(self, window: tuple[int | None, int | None] | Tensor | None) -> None:
        if isinstance(window, Tensor):
            self._window, self.windows = None, extras.windows_of(self, window)
        else:
            self._window, self.windows = window, None

    def extra_repr(self) -> str:
        """The extras that are not torch's behaviour."""
        shown: dict[str, Any] = {}
        if self.num_kv_heads != self.num_heads:
            shown["num_kv_heads"] = self.num_kv_heads
        if self.window is not None:
            shown["window"] = self._window if self.windows is None else "of each head"
        shown |= {
            name: getattr(self, name)
            for name in ("softcap", "alibi", "similarity", "collect_stats", "backend")
            if getattr(self, name) != getattr(MultiheadAttention, name)
        }
        if self._has_sinks:
            shown["sinks"] = True
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("stats", None)  # part of a graph, which neither pickles nor copies
        return state

    def __prepare_scriptable__(self) -> NoReturn:
        extras.fail_to_script()

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        proxy = first_proxy(args, kwargs)
        if proxy is not None:
            return module_node(self, proxy, args, kwargs)
        return super()._call_impl(*args, **kwargs)

    def _reset_parameters(self) -> None:
        super()._reset_parameters()
        extras.reset(self)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        extras.slopes_of(self)  # no longer on meta, where assign=True has taken the parameters away

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        slopes, windows = extras.slopes_of(self), self.windows
        applied = super()._apply(fn, recurse)
        if slopes is not None and self.alibi_slopes is not None:
            self.alibi_slopes = extras.moved_slopes(self, slopes, self.alibi_slopes.device)
        if windows is not None and self.windows is not None:  # to_empty brings no values
            self.windows = windows.to(self.windows.device)
        return applied

    def _share_key_heads(self, num_kv_heads: int, made: dict[str, Any]) -> None:
        """Give keys and values their number of heads: other shapes of the same parameters."""
        H = self.num_heads
        num_kv_heads = require.integer(NAME, "num_kv_heads", num_kv_heads, low=1)
        if H % num_kv_heads:
            require.fail(NAME, "num_kv_heads", f"a divisor of num_heads, {H}", num_kv_heads)
        if num_kv_heads == H:
            return
        E = self.embed_dim
        rows = num_kv_heads * (E // H)
        if self._qkv_same_embed_dim:
            self.in_proj_weight = nn.Parameter(torch.empty(E + 2 * rows, E, **made))
        else:
            self.k_proj_weight = nn.Parameter(torch.empty(rows, self.kdim, **made))
            self.v_proj_weight = nn.Parameter(torch.empty(rows, self.vdim, **made))
        if self.in_proj_bias is not None:
            self.in_proj_bias = nn.Parameter(torch.empty(E + 2 * rows, **made))
        if self.bias_k is not None:
            self.bias_k = nn.Parameter(torch.empty(1, 1, rows, **made))
            self.bias_v = nn.Parameter(torch.empty(1, 1, rows, **made))
        self._reset_parameters()

    def _decode(
        self,
        asked: dict[str, Any],
        q: Tensor,
        cache: KVCache,
        mask: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        """`attention` by the kernel for few queries: a mask becomes part of the bias."""
        if mask is not None:
            lowest = torch.zeros(mask.shape, device=q.device).masked_fill_(~mask, -torch.inf)
            bias = lowest if bias is None else bias + lowest
        out: Tensor = decode_attention(
            q,
            cache.keys,
            cache.values,
            cache.seqlens(),
            bias=None if bias is None else bias.detach(),
            backend=self.backend,
            **extras.decoding(asked),
        )
        return out

    def _append_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put the keys and values of `add_bias_kv` and `add_zero_attn` before k and v.

        Before, not after: a causal query at t' = t + appended then attends all of them unmasked.
        """
        batch, heads, _, dim = k.shape
        keys, values = [], []
        if self.bias_k is not None and self.bias_v is not None:
            shape = (batch, heads, 1, dim)
            keys.append(self.bias_k.to(k.dtype).view(1, heads, 1, dim).expand(shape))
            values.append(self.bias_v.to(v.dtype).view(1, heads, 1, dim).expand(shape))
        if self.add_zero_attn:
            keys.append(k.new_zeros(batch, heads, 1, dim))
            values.append(v.new_zeros(batch, heads, 1, dim))
        return torch.cat([*keys, k], dim=2), torch.cat([*values, v], dim=2)


def decodes(asked: dict[str, Any], T: int, is_causal: bool, need_weights: bool) -> bool:
    """Whether a step over the cache is one that `decode_attention` computes."""
    few = T == 1 or (is_causal and T <= DECODE_ROWS)
    return few and not need_weights and extras.is_decoded(asked)


def adopt(module: nn.MultiheadAttention) -> None:
    """Give a module built by torch what our class expects beyond its class attributes."""
    ours = cast(MultiheadAttention, module)
    ours._forward_pre_hooks[HOOK] = called_in_inference
    ours.register_parameter("sinks", None)
    ours.register_parameter("log_temperature", None)
    ours.register_buffer("alibi_slopes", None, persistent=False)
    ours.register_buffer("windows", None, persistent=False)
    use_projection_linear(ours.out_proj)


def abandon(module: nn.MultiheadAttention) -> None:
    """Undo `adopt`, and forget the extras that were set since."""
    module._forward_pre_hooks.pop(HOOK, None)
    for registered, name in (
        (module._parameters, "sinks"),
        (module._parameters, "log_temperature"),
        (module._buffers, "alibi_slopes"),
        (module._buffers, "windows"),
    ):
        registered.pop(name, None)
    module._non_persistent_buffers_set -= {"alibi_slopes", "windows"}
    for name in MultiheadAttention.__annotations__:
        module.__dict__.pop(name, None)


def called_in_inference(module: nn.Module, args: Any) -> None:
    """Do nothing, as a forward pre-hook of every layer of ours.

    ``nn.TransformerEncoderLayer`` computes attention from its module's parameters, in inference,
    unless there is a hook that would miss the call: then it calls the module.
    """
