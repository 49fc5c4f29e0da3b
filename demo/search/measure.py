"""Embedding with two models side by side: what differs, how long, how much of it is attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm import tqdm

from demo.measure import now
from demo.search.encoder import EMBED_DIM, Batch, SentenceEncoder, pad

FORWARD, ATTENTION = "search::forward", "search::attention"
# What TransformerEncoderLayer runs in eval mode instead of its self_attn module.
TORCH_FAST_PATH = "aten::_native_multi_head_attention"
PROJECTIONS = frozenset({"aten::linear", "aten::addmm", "aten::mm", "mkldnn::_linear_pointwise"})

SAMPLE = 16  # texts whose embedding is timed

Models = Mapping[str, nn.Module]  # of (tokens, padding), as SentenceEncoder


def embed(
    models: Models,
    batches: Sequence[Batch],
    device: torch.device,
    after_batch: Callable[[Batch], None] = lambda batch: None,
    title: str = "embedding twice",
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Embed the same batches with each model, taking turns batch by batch.

    Both models meet the machine in the same state, and which goes first alternates. The first
    batch is run once beforehand, untimed.

    Args:
        models: by name; in eval mode, on `device`.
        batches: together they number the texts from 0 on.
        device: where the batches are sent, outside the clock.
        after_batch: called with each batch once all models have done it, outside the clock.
        title: what the progress bar says.

    Returns:
        Embeddings (texts, 384) on the CPU and seconds, each by the model's name.
    """
    texts = sum(len(batch.indices) for batch in batches)
    embeddings = {name: torch.empty(texts, EMBED_DIM) for name in models}
    seconds = dict.fromkeys(models, 0.0)
    with torch.inference_mode():
        for model in models.values():
            model(*batches[0].to(device)[1:])
        with tqdm(total=texts, desc=title, unit=" texts", mininterval=0.5) as bar:
            for turn, batch in enumerate(batches):
                tokens, padding = batch.to(device)[1:]
                for name in list(models)[:: 1 if turn % 2 == 0 else -1]:
                    start = now(device)
                    embedded = models[name](tokens, padding)
                    seconds[name] += now(device) - start
                    embeddings[name][batch.indices] = embedded.cpu()
                after_batch(batch)
                bar.update(len(batch.indices))
                bar.set_postfix({name: f"{spent:.1f} s" for name, spent in seconds.items()})
    return embeddings, seconds


def token_seconds(models: Models, ids: Sequence[Sequence[int]], device: torch.device) -> float:
    """Seconds that a token takes all models together, timed over a few texts of middling length.

    Args:
        models: by name; in eval mode, on `device`.
        ids: token ids of the texts.
        device: where the models are.
    """
    by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    first = max(0, (len(ids) - SAMPLE) // 2)
    batch = pad(ids, by_length[first : first + SAMPLE]).to(device)
    seconds = 0.0
    with torch.inference_mode():
        for model in models.values():
            model(batch.tokens, batch.padding)  # first uses of memory and kernels
            start = now(device)
            model(batch.tokens, batch.padding)
            seconds += now(device) - start
    return seconds / batch.tokens.numel()


class Share(NamedTuple):
    """How a forward pass divides, as fractions of its time."""

    attention: float  # multi-head attention with its input and output projections
    core: float  # the same without the projections


def attention_share(
    model: SentenceEncoder, batches: Sequence[Batch], device: torch.device
) -> Share:
    """Attention's share of the time over `batches`, by torch.profiler.

    A layer's attention is the call of its `self_attn`, or the operator that torch's fast path runs
    in its place.
    """
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    batches = [batch.to(device) for batch in batches]
    with torch.inference_mode(), _attention_marked(model), profile(activities=activities) as run:
        for batch in batches:
            with record_function(FORWARD):
                model(batch.tokens, batch.padding)
        now(device)
    events = run.events() or []
    spent = _device_time if device.type == "cuda" else _cpu_time
    calls = [event for event in events if event.name in (ATTENTION, TORCH_FAST_PATH)]
    forward = sum(spent(event) for event in events if event.name == FORWARD)
    attention = sum(map(spent, calls))
    projections = sum(_projection_time(call, spent) for call in calls)
    return Share(attention / forward, (attention - projections) / forward)


@contextmanager
def _attention_marked(model: nn.Module) -> Iterator[None]:
    """Record a range around every replaced attention module.

    Torch's own are left alone: a hook would turn off the fast path, whose operator has a name.
    """
    ranges: list[record_function] = []

    def enter(*_: object) -> None:
        ranges.append(record_function(ATTENTION))
        ranges[-1].__enter__()

    def leave(*_: object) -> None:
        ranges.pop().__exit__(None, None, None)

    handles = []
    for module in model.modules():
        replaced = type(module) is not nn.MultiheadAttention
        if replaced and isinstance(module, nn.MultiheadAttention):
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _cpu_time(event: FunctionEvent) -> float:
    return float(event.cpu_time_total)


def _device_time(event: FunctionEvent) -> float:
    return float(event.device_time_total)


def _projection_time(event: FunctionEvent, spent: Callable[[FunctionEvent], float]) -> float:
    """The time of the linear layers anywhere below an event."""
    return sum(
        spent(child) if child.name in PROJECTIONS else _projection_time(child, spent)
        for child in event.cpu_children
    )
