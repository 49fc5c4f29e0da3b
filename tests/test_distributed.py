"""DDP, FSDP1 and FSDP2 over two gloo processes train our layers as one process trains them."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy, size_based_auto_wrap_policy

import attnfast
import attnfast.nn.attention

WORLD, B, T, E, STEPS = 2, 4, 6, 16, 3


class Extended(nn.Module):
    """Attention with every kind of parameter that torch's does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = attnfast.MultiheadAttention(
            E,
            4,
            batch_first=True,
            num_kv_heads=2,
            sinks=True,
            alibi=True,
            similarity="cosine",
            backend="cpu",
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False, is_causal=True)[0]


def model() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, 4, 32, batch_first=True, dropout=0.0)
    made = nn.Sequential(nn.TransformerEncoder(layer, 2), Extended())
    attnfast.replace(made, backend="cpu")
    return made


def ddp(made: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(made)


def fsdp1(made: nn.Module) -> nn.Module:
    policy = ModuleWrapPolicy({nn.TransformerEncoderLayer, Extended})
    return FullyShardedDataParallel(
        made, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True
    )


def fsdp1_by_size(made: nn.Module) -> nn.Module:
    """Wraps every module it may: attention is a leaf for it, its out_proj stays inside."""

    def policy(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
        return size_based_auto_wrap_policy(module, recurse, nonwrapped_numel, min_num_params=1)

    wrapped = FullyShardedDataParallel(
        made, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True
    )
    names = [n for n, m in wrapped.named_modules() if isinstance(m, FullyShardedDataParallel)]
    assert any(name.endswith("linear1") for name in names)
    assert not any("out_proj" in name for name in names)
    return wrapped


def fsdp2(made: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in (*made[0].layers, made[1]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(made, mesh=mesh)


def train(made: nn.Module, x: Tensor, scale: float) -> list[Tensor]:
    """The loss of each step, summed over x."""
    optimizer, losses = torch.optim.SGD(made.parameters(), lr=0.01), []
    for _ in range(STEPS):
        loss = made(x).square().sum()
        optimizer.zero_grad()
        (loss * scale).backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


WRAPS = (ddp, fsdp1, fsdp1_by_size, fsdp2)
OPERATORS = (("cpu_fwd", "cpu_bwd"), ("cpu_self_attention", "cpu_self_attention_bwd"))


def process(rank: int, rendezvous: str, x: Tensor, expected: list[Tensor]) -> None:
    """One of the processes: its half of the batch, gradients averaged over both."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=WORLD)
    for wrap in WRAPS:
        wrapped = wrap(model())
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            losses = train(wrapped, x.chunk(WORLD)[rank], 1.0)
        for loss in losses:
            dist.all_reduce(loss)
        torch.testing.assert_close(
            losses, expected, msg=lambda said, w=wrap: f"{w.__name__}: {said}"
        )
        calls = {event.key: event.count for event in seen.key_averages()}
        for forward, backward in OPERATORS:
            assert calls.get(f"attnfast::{forward}", 0) == calls.get(f"attnfast::{backward}", 0)
        forwards = sum(calls.get(f"attnfast::{forward}", 0) for forward, _ in OPERATORS)
        assert forwards == 3 * STEPS, wrap.__name__
    dist.destroy_process_group()


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """In every way, one after another: a process takes longer to start than to train."""
    torch.manual_seed(1)
    x = torch.randn(B, T, E)
    expected = train(model(), x, 1 / WORLD)
    assert len({loss.item() for loss in expected}) == STEPS  # something is learnt
    arguments = (str(tmp_path / "rendezvous"), x, expected)
    torch.multiprocessing.spawn(process, arguments, nprocs=WORLD)
