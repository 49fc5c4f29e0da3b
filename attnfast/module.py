"""MultiheadAttention: ``torch.nn.MultiheadAttention`` computed by `attnfast.attention`.

The forward pass traces these shapes (E = H * D; batch_first swaps B and T in the first and last):

    query (T, B, E), key, value (S, B, kdim|vdim)
      -> one to three linears, viewed as heads: q (B, H, T, D), k and v (B, H, S, D), nothing copied
      -> attention: out (B, H, T, D) with q's strides, weights (B, T, S) or (B, H, T, S)
      -> viewed as (T, B, E) -> out_proj
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import attention
from .linear import linear, use_projection_linear


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` with fused attention: same parameters, ``state_dict``, results.

    Every argument and default is torch's; the two keyword-only extras default to torch's behaviour.
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
        backend: the backend to use, see `attnfast.attention`.
        deterministic: see `attnfast.attention`.

    Raises:
        ValueError: ``embed_dim`` or ``num_heads`` is not positive.
        AssertionError: ``embed_dim`` is not a multiple of ``num_heads`` (torch's own check).
    """

    backend: str = "auto"
    deterministic: bool | None = None

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
        backend: str = "auto",
        deterministic: bool | None = None,
    ) -> None:
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
        self.backend = backend
        self.deterministic = deterministic
        use_projection_linear(self.out_proj)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from ``query`` to ``key`` and ``value``.

        Args:
            query: ``(T, B, E)``, ``(B, T, E)`` with ``batch_first``, or ``(T, E)`` unbatched.
            key: ``(S, B, kdim)``, ``(B, S, kdim)`` or ``(S, kdim)``.
            value: ``(S, B, vdim)``, ``(B, S, vdim)`` or ``(S, vdim)``.
            key_padding_mask: ``(B, S)``, or ``(S,)`` unbatched. Bool: True keys are masked **out**.
                Float: added to the scores of the key.
            need_weights: also return the weights, after dropout.
            attn_mask: ``(T, S)``, ``(B * H, T, S)``, ``(B, T, S)`` or ``(B, H, T, S)``, any of the
                dimensions T, S and those of the 4-D form also 1. Bool: True pairs are masked
                **out**. Float: added to the scores, differentiable.
            average_attn_weights: average the weights over heads.
            is_causal: query t attends keys up to t. With ``attn_mask`` it is, as in torch, the
                caller's promise that ``attn_mask`` is the causal mask: ``attn_mask`` is then not
                read at all, except with ``need_weights``, where it alone decides.

        Returns:
            The output, of query's shape, and the weights: None without ``need_weights``, else
            ``(B, T, S)``, per head ``(B, H, T, S)``; unbatched without the B. S includes the keys
            that ``add_bias_kv`` and ``add_zero_attn`` append, in this order, last.

        Raises:
            TypeError: a mask that is neither bool nor float; a nested tensor; an input in another
                dtype than the parameters outside autocast.
            ValueError: a shape that does not fit; an input on another device than the parameters.
        """
        self._check_inputs(query, key, value)
        if is_causal and attn_mask is not None:
            if need_weights:
                is_causal = False
            else:
                attn_mask = None

        q, k, v = self._project(query, key, value)
        mask = bias = None
        if attn_mask is not None or key_padding_mask is not None:
            mask, bias = _split_masks(attn_mask, key_padding_mask, (*q.shape[:3], k.shape[2]))
        appended = 0
        if self.bias_k is not None or self.add_zero_attn:
            source = k.shape[2]
            k, v = self._append_keys(k, v)
            appended = k.shape[2] - source
            mask, bias = (_attend_appended(x, appended, source) for x in (mask, bias))

        result = attention(
            q,
            k,
            v,
            mask=mask,
            bias=bias,
            causal=is_causal,
            align=appended or "top_left",
            dropout_p=self.dropout if self.training else 0.0,
            return_weights=("mean" if average_attn_weights else True) if need_weights else False,
            deterministic=self.deterministic,
            backend=self.backend,
        )
        if not need_weights:
            return self.out_proj(self._merge_heads(cast(Tensor, result), query)), None
        out, weights = result
        if appended:
            weights = weights.roll(-appended, -1)
        if query.dim() == 2:
            weights = weights[0]
        return self.out_proj(self._merge_heads(out, query)), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Project to q, k and v (B, H, length, D), with as few linears as the inputs allow."""
        heads = (self.num_heads, self.head_dim)
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if weight is not None and key is value and query is key:
            packed = linear(query, weight, bias).view(*query.shape[:-1], 3, *heads)
            if packed.dim() == 5 and not torch.is_grad_enabled():  # its backward would copy
                order = (2, 0, 3, 1, 4) if self.batch_first else (2, 1, 3, 0, 4)
                return packed.permute(order).unbind(0)
            return tuple(map(self._as_heads, packed.unbind(-3)))
        return tuple(map(self._as_heads, self._project_apart(query, key, value, weight, bias)))

    def _project_apart(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """q, k and v (..., H, D) of inputs that are not one tensor: two linears or three."""
        heads = (self.num_heads, self.head_dim)
        if weight is not None and key is value:
            sizes = (self.embed_dim, 2 * self.embed_dim)
            weight_q, weight_kv = weight.split(sizes)
            bias_q, bias_kv = (None, None) if bias is None else bias.split(sizes)
            q = linear(query, weight_q, bias_q)
            kv = linear(key, weight_kv, bias_kv)  # (..., 2E)
            k, v = kv.view(*key.shape[:-1], 2, *heads).unbind(-3)
            return q.view(*query.shape[:-1], *heads), k, v
        if weight is not None:
            weights = weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return tuple(
            linear(x, w, b).view(*x.shape[:-1], *heads)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )

    def _as_heads(self, x: Tensor) -> Tensor:
        """View a projection (..., H, D) as (B, H, length, D)."""
        if x.dim() == 3:
            return x.transpose(0, 1).unsqueeze(0)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _merge_heads(self, out: Tensor, query: Tensor) -> Tensor:
        """The inverse of `_as_heads`, heads merged: (B, H, T, D) to query's shape."""
        if query.dim() == 2:
            return out[0].transpose(0, 1).flatten(-2)
        return (out.transpose(1, 2) if self.batch_first else out.permute(2, 0, 1, 3)).flatten(-2)

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

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Raise what the projections would report without naming the argument."""
        rank = query.dim()
        if rank not in (2, 3):
            raise ValueError(
                f"MultiheadAttention: query must be {self._layout(3, 'B', 'T', self.embed_dim)} or "
                f"{self._layout(2, 'B', 'T', self.embed_dim)}, got {tuple(query.shape)}"
            )
        self._check_input("query", query, rank, None, None, self.embed_dim)
        if query is key and key is value and self._qkv_same_embed_dim:
            return
        batch = query.shape[0 if self.batch_first else 1] if rank == 3 else None
        self._check_input("key", key, rank, batch, None, self.kdim)
        source = key.shape[1 if self.batch_first and rank == 3 else 0]
        self._check_input("value", value, rank, batch, source, self.vdim)

    def _check_input(
        self, name: str, x: Tensor, rank: int, batch: int | None, length: int | None, features: int
    ) -> None:
        """Raise unless x fits its rank, the sizes given (None: any) and the parameters."""
        if x.is_nested:
            raise TypeError(
                f"MultiheadAttention: {name} must not be a nested tensor: pad it and give "
                "key_padding_mask (in nn.TransformerEncoder set use_nested_tensor to False, as "
                "attnfast.replace does)"
            )
        shape = x.shape
        batch_dim, length_dim = (0, 1) if self.batch_first else (1, 0)
        if (
            len(shape) != rank
            or shape[-1] != features
            or (batch is not None and shape[batch_dim] != batch)
            or (length is not None and shape[length_dim if rank == 3 else 0] != length)
        ):
            names = self._layout(rank, "B", "T" if name == "query" else "S", features)
            sizes = self._layout(
                rank, "*" if batch is None else batch, "*" if length is None else length, features
            )
            required = names if name == "query" else f"{names} = {sizes}"
            raise ValueError(f"MultiheadAttention: {name} must be {required}, got {tuple(shape)}")
        weight = self.in_proj_weight if self._qkv_same_embed_dim else self.q_proj_weight
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(
                f"MultiheadAttention: {name} must have the parameters' dtype {weight.dtype} "
                f"(or run under autocast), got {x.dtype}"
            )
        if x.device != weight.device:
            raise ValueError(
                f"MultiheadAttention: {name} must be on the parameters' device {weight.device}, "
                f"got {x.device}"
            )

    def _layout(self, rank: int, batch: int | str, length: int | str, features: int) -> str:
        """A shape as this module expects it, for messages."""
        if rank == 2:
            return f"({length}, {features})"
        first, second = (batch, length) if self.batch_first else (length, batch)
        return f"({first}, {second}, {features})"


def _split_masks(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, sizes: tuple[int, int, int, int]
) -> tuple[Tensor | None, Tensor | None]:
    """Torch's two masks as `attention` takes them: a bool mask (True = attend) and a float bias.

    Two masks are combined only where both are bool or both float, at the smallest broadcast shape.

    Args:
        attn_mask: any of the forms of `MultiheadAttention.forward`, or None.
        key_padding_mask: ``(B, S)``, or ``(S,)`` when B is 1, or None.
        sizes: ``(B, H, T, S)`` before any key is appended.
    """
    excluded: Tensor | None = None
    bias: Tensor | None = None
    for given in (
        None if key_padding_mask is None else _checked_key_padding_mask(key_padding_mask, sizes),
        None if attn_mask is None else _checked_attn_mask(attn_mask, sizes),
    ):
        if given is None:
            continue
        if given.dtype == torch.bool:
            excluded = given if excluded is None else excluded | given
        else:
            bias = given if bias is None else bias + given
    return None if excluded is None else ~excluded, bias


def _checked_key_padding_mask(mask: Tensor, sizes: tuple[int, int, int, int]) -> Tensor:
    """A view of key_padding_mask that broadcasts to ``(B, H, T, S)``."""
    batch, _, _, source = sizes
    _check_mask_dtype("key_padding_mask", mask)
    if mask.dim() == 1 and batch == 1:
        mask = mask.unsqueeze(0)
    if mask.shape != (batch, source):
        unbatched = f" or (S,) = ({source},)" if batch == 1 else ""
        raise ValueError(
            f"MultiheadAttention: key_padding_mask must be (B, S) = ({batch}, {source})"
            f"{unbatched}, got {tuple(mask.shape)}"
        )
    return mask[:, None, None]


def _checked_attn_mask(mask: Tensor, sizes: tuple[int, int, int, int]) -> Tensor:
    """A view of attn_mask that broadcasts to ``(B, H, T, S)``."""
    batch, heads, target, source = sizes
    _check_mask_dtype("attn_mask", mask)
    view = mask
    if mask.dim() == 3:
        if mask.shape[0] == batch * heads:
            view = mask.view(batch, heads, *mask.shape[1:])
        else:
            view = mask.unsqueeze(1)
    fits = all(
        n in (1, full) for n, full in zip(reversed(view.shape), reversed(sizes), strict=False)
    )
    if not (2 <= view.dim() <= 4 and fits):
        raise ValueError(
            f"MultiheadAttention: attn_mask must be (T, S) = ({target}, {source}), "
            f"(B * num_heads, T, S) = ({batch * heads}, {target}, {source}), (B, T, S) or "
            f"broadcastable to (B, num_heads, T, S) = {sizes}, got {tuple(mask.shape)}"
        )
    return view


def _check_mask_dtype(name: str, mask: Tensor) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"MultiheadAttention: {name} must be bool (True = masked out) or floating point "
            f"(added to the scores), got {mask.dtype}"
        )


def _attend_appended(mask: Tensor | None, appended: int, source: int) -> Tensor | None:
    """Extend a mask or bias over keys put before the others, all of which are attended."""
    if mask is None:
        return None
    value = 1.0 if mask.dtype == torch.bool else 0.0
    return F.pad(mask.expand(*mask.shape[:-1], source), (appended, 0), value=value)
