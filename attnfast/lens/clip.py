"""``QKClip``: heads whose logits grow beyond a limit have their projections scaled down."""

from __future__ import annotations

import zlib
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..requirements import MAX_FP32, MIN_FP32, fail, number
from .query_key import query_key_rows, unscalable
from .watcher import Call, Watcher

NAME = "QKClip"
SLACK = 4  # eps of the weights, by which their rounding may miss the limit


class QKClip(Watcher):
    """Scale the query and key projections of heads whose largest logit exceeds a limit.

    MuonClip's QK-Clip (Kimi K2, arXiv:2507.20534, section 2.1), for any optimiser::

        clip = lens.QKClip(model, limit=100.0).attach(optimizer)

    After each step of the optimiser, every head whose largest logit M since the last one was above
    the limit gets its rows of the query projection multiplied by ``gamma ** alpha`` and those of
    the key projection by ``gamma ** (1 - alpha)``, biases too, with ``gamma = limit / M``: all its
    logits shrink by gamma, as they do with rotary positions. Where query heads share a key head,
    its rows are scaled for the one of them that needs least, if all need some; queries take what
    keys cannot: each head's logits shrink by its own gamma, and no other's. A bias b is not scaled:
    then ``gamma = (limit - b) / (M - b)``, b the largest of the bias where it is positive.

    M is the largest score of the real queries of all forwards with gradients, which the kernels
    find while they attend. In several processes it is the largest of all ranks, so that replicas
    stay equal. Heads whose logits are not finite are left alone.

    It knows the projections of torch's and our MultiheadAttention (packed or apart), and linears
    called q_proj and k_proj, query and key, q and k, or q_lin and k_lin, as most models of
    transformers have them. Layers are found as `observe` does.

    Args:
        model: any module; it gets hooks while this is attached.
        limit: the largest logit allowed, above 0.
        alpha: the share of the scaling that queries take, from 0 to 1.
        group: the processes that train the same model; by default all there are.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a limit or alpha out of range; a layer of the model normalises queries and keys
            (q_norm, k_norm, cosine similarity), has projections that are not its own (adapters,
            parametrizations) or are cut over ranks; the message names it. While training: a layer
            has other projections, or a softcap above the limit.

    Attributes:
        max_logit: of the last step, by layer: the largest logit of each head, ``(H,)``.
        factors: of the last step, by layer in which a head was clipped: gamma, ``(H,)``.
    """

    def __init__(
        self, model: nn.Module, limit: float = 100.0, alpha: float = 0.5, *, group: Any = None
    ) -> None:
        super().__init__(NAME, model)
        self.limit = number(NAME, "limit", limit, MIN_FP32, MAX_FP32, "above 0")
        self.alpha = number(NAME, "alpha", alpha, 0, 1, "from 0 to 1")
        self.group = group
        for name, module in model.named_modules():
            reason = unscalable(module)
            if reason is not None:
                refuse(name, module, reason)
        self.found: dict[str, Tensor] = {}  # (2, H): largest logit and largest bias since the step
        self.max_logit: dict[str, Tensor] = {}
        self.factors: dict[str, Tensor] = {}
        self.handle: Any = None

    def attach(self, optimizer: torch.optim.Optimizer) -> QKClip:
        """Watch the model, and clip after every step of an optimiser; returns this object.

        Raises:
            TypeError: It is no optimiser.
            RuntimeError: This is attached already.
        """
        if not isinstance(optimizer, torch.optim.Optimizer):
            required = "a torch.optim.Optimizer"
            fail(NAME, "optimizer", required, type(optimizer).__name__, TypeError)
        if self.handle is not None:
            raise RuntimeError(f"{NAME}: is attached already")
        self.handle = optimizer.register_step_post_hook(lambda *_: self.clip())
        self.start()
        return self

    def detach(self) -> None:
        """Clip and watch no longer."""
        self.stop()
        if self.handle is not None:
            self.handle.remove()
        self.handle = None
        self.found.clear()

    def __enter__(self) -> QKClip:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def begins(self) -> bool:
        """Forwards with gradients are looked at."""
        return torch.is_grad_enabled()

    def see(self, call: Call) -> None:
        """Keep each head's largest logit."""
        layer, softcap = call.layer.partition("#")[0], call.options.softcap
        module = self.model.get_submodule(layer)
        if query_key_rows(module) is None:
            known = "in_proj, q_proj and k_proj, query and key, q and k, q_lin and k_lin"
            refuse(layer, module, f"its projections are none of {known}")
        if softcap > self.limit:
            refuse(layer, module, f"its softcap, {softcap:g}, bounds logits by itself")
        logits, bias = call.statistics["max_logit"].detach(), call.inputs.bias
        if not logits.numel():
            return
        largest = logits.where(call.real, -torch.inf).amax((0, 2))
        top = torch.zeros_like(largest)
        if bias is not None:
            top = torch.maximum(top, bias.detach().amax((0, 2, 3)).to(top))
        seen = torch.stack([largest, top])
        before = self.found.get(layer)
        self.found[layer] = seen if before is None else torch.maximum(before, seen)

    @torch.no_grad()
    def clip(self) -> None:
        """Scale what needs it, as after a step.

        Raises:
            RuntimeError: The bias of a layer alone reaches the limit; or ranks saw other layers.
        """
        self.factors, self.max_logit = {}, {}
        found = dict(sorted(self.found.items()))
        self.found.clear()
        every = self._over_ranks(found)
        if every is None:
            return
        parts = every.split([x.shape[1] for x in found.values()], 1)
        self.max_logit = {layer: part[0] for layer, part in zip(found, parts, strict=True)}
        over = every[0].isfinite() & (every[0] > self.limit)
        if not over.any():
            return
        for layer, (largest, bias) in zip(found, parts, strict=True):
            high = largest.isfinite() & (largest > self.limit)
            if high.any():
                self._scale(layer, largest.double(), bias.double(), high)

    def _over_ranks(self, found: dict[str, Tensor]) -> Tensor | None:
        """(2, heads of all layers), the largest of all ranks; None where nothing was seen."""
        alone = not dist.is_initialized() or dist.get_world_size(self.group) == 1
        device = next((x.device for x in found.values()), None)
        every = torch.cat([x.to(device) for x in found.values()], 1) if found else None
        if alone:
            return every
        if device is None:
            device = next(self.model.parameters()).device
        heads = [(layer, x.shape[1]) for layer, x in found.items()]
        check = zlib.crc32(repr(heads).encode())
        same = torch.tensor([check, -check], device=device)
        dist.all_reduce(same, dist.ReduceOp.MAX, self.group)
        if same.sum() != 0:
            raise RuntimeError(f"{NAME}: the ranks of a group must run the same layers in a step")
        if every is not None:
            dist.all_reduce(every, dist.ReduceOp.MAX, self.group)
        return every

    def _scale(self, layer: str, largest: Tensor, bias: Tensor, high: Tensor) -> None:
        module = self.model.get_submodule(layer)
        rows = query_key_rows(module)
        assert rows is not None
        q, k = rows
        limit = self.limit * (1 - SLACK * torch.finfo(q[0].dtype).eps)
        if (bias[high] >= limit).any():
            raise RuntimeError(
                f"{NAME}: the bias of {layer!r} alone reaches the limit, {self.limit:g}"
            )
        gamma = torch.where(high, (limit - bias) / (largest - bias), 1.0)
        self.factors[layer] = gamma.to(torch.float32)
        H, D = len(gamma), len(q[0]) // len(gamma)
        H_kv = len(k[0]) // max(D, 1)
        if len(q[0]) != H * D or len(k[0]) != H_kv * D or H % max(H_kv, 1):
            refuse(layer, module, f"its projections' rows are not those of {H} heads")
        of_keys = gamma.view(H_kv, -1).amax(1) ** (1 - self.alpha)
        of_queries = gamma / of_keys.repeat_interleave(H // H_kv)
        for views, factors in ((q, of_queries), (k, of_keys)):
            for x in views:
                x.view(len(factors), -1).mul_(factors[:, None].to(x.device))


def refuse(layer: str, module: nn.Module, reason: str) -> None:
    """Raise for a layer that cannot be clipped."""
    raise ValueError(f"{NAME}: cannot clip {layer!r} ({type(module).__name__}): {reason}")
