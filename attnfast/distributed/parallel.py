"""Layers of which every rank has some of the heads, or some rows of the sequence, or both."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ParallelStyle, RowwiseParallel, parallelize_module

from ..functional import attention
from ..nn.attention import MultiheadAttention
from ..nn.extras import appended_keys
from ..nn.inputs import NAME, split_masks
from ..requirements import choice, fail
from .collectives import Gather, Shared
from .context import METHODS, context_parallel_attention
from .layout import PARTS, Layout

PROJECTIONS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class HeadParallel(ParallelStyle):
    """Tensor parallel `attnfast.MultiheadAttention`: every rank has some of the heads.

    A style for ``parallelize_module``, on a mesh of one dimension. The rows of the input
    projections are cut by heads, as ``q_proj_weight``, ``k_proj_weight`` and ``v_proj_weight`` (a
    packed ``in_proj_weight`` is taken apart: load checkpoints of whole layers before), the columns
    of ``out_proj`` likewise; their sum over the ranks is the output (arXiv:1909.08053). Sinks and
    temperatures go with their heads; ``in_proj_bias`` stays whole. ``module.stats`` is of this
    rank's heads, and each drops weights of its own.

    Args:
        input_layouts: how query, key and value are cut: ``Replicate()``, or ``Shard(1)`` where a
            ``SequenceParallel`` norm with ``batch_first`` comes before.
        output_layouts: the same of the output.
        use_local_output: whether the output is a Tensor, else a DTensor.

    Raises:
        TypeError: The module is not an `attnfast.MultiheadAttention`.
        ValueError: The ranks do not divide its heads; or they are cut already; or it has
            ``add_bias_kv`` or ``add_zero_attn``.
    """

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        self.input_layouts = input_layouts or Replicate()
        self.output_layouts = output_layouts or Replicate()
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        ranks, layer = device_mesh.size(), _layer(module)
        if _own_parallel(layer).tensor is not None:
            fail("HeadParallel", "module", "whole", "one whose heads are cut already")
        for name in ("num_heads", "num_kv_heads"):
            if getattr(layer, name) % ranks:
                fail(NAME, name, f"a multiple of the {ranks} ranks", getattr(layer, name))
        _cut_projections(layer, device_mesh)
        for name in ("sinks", "log_temperature"):
            if layer._parameters.get(name) is not None:
                _distribute(layer, name, device_mesh, Shard(0))
        if layer.in_proj_bias is not None:
            _distribute(layer, "in_proj_bias", device_mesh, Replicate())
        style = RowwiseParallel(
            output_layouts=self.output_layouts, use_local_output=self.use_local_output
        )
        parallelize_module(layer.out_proj, device_mesh, style)
        layer.parallel = _own_parallel(layer)._replace(tensor=device_mesh)
        whole = functools.partial(_whole_inputs, device_mesh, self.input_layouts)
        layer.register_forward_pre_hook(whole, with_kwargs=True)
        return layer


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    context: str | None = None,
    tensor: str | None = None,
    layout: str = "zigzag",
    method: str = "auto",
) -> nn.Module:
    """Give every `attnfast.MultiheadAttention` of a model its part of heads and rows.

    With ``context`` the model is fed this rank's rows of every sequence, as `shard` cuts them,
    and only attention looks beyond them: ``key_padding_mask`` is that of these rows, ``attn_mask``
    has these rows and all keys, or is the whole `attnfast.BlockMask`. Rows that `shard` has padded
    are rows like others: mask them, unless ``is_causal`` does. Parameters are whole on every rank,
    and each finds the part of their gradients that its rows make: DDP or ``fully_shard`` over the
    same dimension adds them up. With ``tensor`` see `HeadParallel`; the rest of a block is for
    torch's own styles.

    Args:
        model: holds `attnfast.MultiheadAttention` layers, built so or by `attnfast.replace`; it is
            changed in place.
        mesh: has dimensions of these names.
        context: the dimension over whose ranks sequences are cut.
        tensor: the dimension over whose ranks heads are cut.
        layout: how sequences are cut, see `shard`.
        method: see `context_parallel_attention`.

    Returns:
        The model.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: There is no such dimension, or none is named, or there is no layer; or a layer
            does not take it.
    """
    function = "parallelize"
    if not isinstance(model, nn.Module):
        fail(function, "model", "a torch.nn.Module", type(model).__name__, TypeError)
    if not isinstance(mesh, DeviceMesh):
        fail(function, "mesh", "a DeviceMesh", type(mesh).__name__, TypeError)
    names = mesh.mesh_dim_names or ()
    for what, name in (("context", context), ("tensor", tensor)):
        if name is not None and name not in names:
            fail(function, what, f"one of the mesh's dimensions {names}, or None", name)
    if context is None and tensor is None:
        fail(function, "context or tensor", f"one of the mesh's dimensions {names}", None)
    choice(function, "layout", layout, PARTS)
    choice(function, "method", method, METHODS)
    layers = [m for m in model.modules() if isinstance(m, MultiheadAttention)]
    if not layers:
        requirement = "a model with an attnfast.MultiheadAttention: see attnfast.replace"
        fail(function, "model", requirement, type(model).__name__)
    for layer in layers:
        if tensor is not None:
            parallelize_module(layer, mesh[tensor], HeadParallel())
        if context is not None:
            own = _own_parallel(_layer(layer))
            layer.parallel = own._replace(context=mesh[context], layout=layout, method=method)
    return model


class Parallel(NamedTuple):
    """What of a layer's attention is this rank's: ``MultiheadAttention.parallel``."""

    tensor: DeviceMesh | None = None  # over whose ranks heads are cut
    context: DeviceMesh | None = None  # and sequences
    layout: str = "zigzag"
    method: str = "auto"

    def _own(self, x: Tensor, dim: int) -> Tensor:
        """This rank's heads of all heads."""
        if self.tensor is None:
            return x
        if isinstance(x, DTensor):
            return x.to_local()
        part: Tensor = x.chunk(self.tensor.size(), dim)[self.tensor.get_local_rank()]
        return part

    def projections(self, module: Any) -> tuple[list[Tensor], list[Tensor | None]]:
        """The weights and biases that project to this rank's heads."""
        whole = [getattr(module, name) for name in PROJECTIONS]
        bias, biases = module.in_proj_bias, cast(list[Tensor | None], [None] * 3)
        if bias is not None:
            if isinstance(bias, DTensor):
                bias = bias.to_local(grad_placements=[Partial()])
            biases = [self._own(b, 0) for b in bias.split([len(w) for w in whole])]
        return [self._own(w, 0) for w in whole], biases

    def per_head(self, x: Tensor | None) -> Tensor | None:
        """Of a parameter or buffer ``(H, ...)``."""
        return None if x is None else self._own(x, 0)

    def asked(self, asked: dict[str, Any]) -> dict[str, Any]:
        """A layer's options, of this rank's heads."""
        own = {name: self.per_head(asked[name]) for name in ("alibi_slopes", "sinks")}
        if isinstance(asked["window"], Tensor):
            own["window"] = self.per_head(asked["window"])
        return asked | own

    def lengths(self, q: Tensor, k: Tensor) -> tuple[int, int]:
        """T and S of the whole sequences."""
        ranks = 1 if self.context is None else self.context.size()
        return q.shape[2] * ranks, k.shape[2] * ranks

    def masks(
        self, module: Any, dense: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """`split_masks` of this rank's queries and heads, and all keys."""
        B, _, T, _ = q.shape
        S = k.shape[2]
        if self.context is not None:
            keys = Layout.of_sequence(S * self.context.size(), self.context.size(), self.layout)
            if padding is not None:
                split_masks(None, padding, (B, module.num_heads, T, S), q.device)  # checks it
                given = padding.to(torch.uint8) if padding.dtype == torch.bool else padding
                every = Gather.apply(given.reshape(B, 1, S, 1), keys, self.context.get_group())
                padding = every[:, 0, :, 0].to(padding.dtype)
            S = keys.length
        split = split_masks(dense, padding, (B, module.num_heads, T, S), q.device)
        mask, bias = (x if x is None else x[(None,) * (4 - x.dim())] for x in split)
        if bias is not None and self.tensor is not None:
            bias = cast(Tensor, Shared.apply(bias, self.tensor.get_group()))
        mask, bias = (x if x is None or x.shape[1] == 1 else self._own(x, 1) for x in (mask, bias))
        return mask, bias

    def attention(self, q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Any:
        """`attention` of this rank's heads, over the sequences of all ranks."""
        if given["dropout_p"] > 0:
            given["dropout_seed"] = self._seed(q.device)
        if self.context is None:
            return attention(q, k, v, **given)
        given |= {"layout": self.layout, "method": self.method}
        given["sinks"] = self._with_own_share(given["sinks"])
        bias = given["bias"]
        if bias is not None and bias.shape[2] == 1 < q.shape[2]:
            given["bias"] = self._with_own_share(bias)
        return context_parallel_attention(q, k, v, self.context, **given)

    def _with_own_share(self, x: Tensor | None) -> Tensor | None:
        """With a gradient that, like that of other parameters, is to be added over the ranks."""
        assert self.context is not None
        if x is None or not x.requires_grad:
            return x
        own, ranks = x.view_as(x), self.context.size()
        own.register_hook(lambda gradient: gradient / ranks)  # which is the sum on every rank
        return own

    def _seed(self, device: torch.device) -> Tensor:
        """One for all rows, another for the heads of another rank."""
        seed = torch.randint(1 << 31, (2,), dtype=torch.int64, device=device)
        if self.context is not None:
            dist.broadcast(seed, group=self.context.get_group(), group_src=0)
        if self.tensor is not None:
            seed[0] += self.tensor.get_local_rank() << 31
        return seed

    def weights(self, weights: Tensor | None, averaged: bool) -> Tensor | None:
        """The weights over the heads of all ranks."""
        if weights is None or self.tensor is None:
            return weights
        placement: Placement = Partial() if averaged else Shard(weights.dim() - 3)
        own = weights / self.tensor.size() if averaged else weights
        whole: Tensor = DTensor.from_local(own, self.tensor, [placement]).full_tensor()
        return whole


def _layer(module: Any) -> MultiheadAttention:
    if not isinstance(module, MultiheadAttention):
        requirement = "an attnfast.MultiheadAttention, see attnfast.replace"
        fail("HeadParallel", "module", requirement, type(module).__name__, TypeError)
    if appended_keys(module):
        fail(NAME, "add_bias_kv and add_zero_attn", "False over many ranks", True)
    return module


def _own_parallel(layer: MultiheadAttention) -> Parallel:
    found: Parallel = layer.parallel or Parallel()
    return found


def _cut_projections(layer: Any, mesh: DeviceMesh) -> None:
    """The weights of q, k and v, apart, cut by heads."""
    packed = layer.in_proj_weight
    if packed is not None:
        keys = layer.num_kv_heads * layer.embed_dim // layer.num_heads
        parts = packed.detach().split((layer.embed_dim, keys, keys))
        for name, part in zip(PROJECTIONS, parts, strict=True):
            parameter = nn.Parameter(part.clone(), requires_grad=packed.requires_grad)
            layer.register_parameter(name, parameter)
        layer.register_parameter("in_proj_weight", None)
    for name in PROJECTIONS:
        _distribute(layer, name, mesh, Shard(0))


def _distribute(layer: nn.Module, name: str, mesh: DeviceMesh, placement: Placement) -> None:
    parameter = getattr(layer, name)
    cut = distribute_tensor(parameter.detach(), mesh, [placement])
    layer.register_parameter(name, nn.Parameter(cut, requires_grad=parameter.requires_grad))


def _whole_inputs(
    mesh: DeviceMesh, layout: Placement, module: Any, args: Any, kwargs: Any
) -> tuple[Any, Any]:
    """Query, key and value, whole, with gradients that are sums over the ranks."""
    made: dict[int, Tensor] = {}

    def whole(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if x.is_nested:
            fail(NAME, "query", "dense over many ranks", "nested", TypeError)
        if id(x) not in made:
            cut = x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, [layout])
            there = cut.redistribute(placements=[Replicate()])
            made[id(x)] = there.to_local(grad_placements=[Partial()])
        return made[id(x)]

    named = {n: whole(x) if n in ("query", "key", "value") else x for n, x in kwargs.items()}
    return (*map(whole, args[:3]), *args[3:]), named
