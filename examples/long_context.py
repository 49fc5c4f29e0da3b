"""Train a causal Transformer on one sequence of 32k tokens that is cut over processes.

    python examples/long_context.py
    torchrun --nproc-per-node 2 examples/long_context.py

Every rank has its rows of the sequence; only attention looks beyond them. The first rank then
trains the same model alone, and the losses have to agree.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from pydoc_data.topics import topics  # half a million characters that every Python brings

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import attnfast
from attnfast.distributed import parallelize, shard

WIDTH, HEADS, LAYERS, CHARACTERS = 32, 1, 2, 128


class Model(nn.Module):
    """Characters to the logits of the next; ALiBi says what is near, so rows may lie anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.characters = nn.Embedding(CHARACTERS, WIDTH)
        sizes = {"dim_feedforward": 2 * WIDTH, "dropout": 0.0, "batch_first": True}
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, norm_first=True, **sizes)
        self.blocks = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.out = nn.Linear(WIDTH, CHARACTERS)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] tokens: [B, T, V] logits."""
        nothing = torch.zeros(1, 1, device=tokens.device)  # is_causal says it all
        return self.out(self.blocks(self.characters(tokens), mask=nothing, is_causal=True))


def losses_of(tokens: Tensor, steps: int, mesh: DeviceMesh | None) -> list[float]:
    """Train for some steps, over the ranks of a mesh or alone; tokens [T + 1] are the whole."""
    torch.manual_seed(0)
    model: nn.Module = Model().to(tokens.device)
    attnfast.replace(model, verbose=False)
    for module in model.modules():
        if isinstance(module, attnfast.MultiheadAttention):
            module.alibi = True
    read, following = tokens[None, :-1], tokens[None, 1:]
    if mesh is not None:
        read, following = (shard(x, mesh, 1) for x in (read, following))  # all there is to do
        parallelize(model, mesh, context="cp")
        model = nn.parallel.DistributedDataParallel(model, process_group=mesh.get_group())
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(read).flatten(0, 1), following.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    found = torch.stack(losses)
    if mesh is not None:  # every rank has equally many tokens
        dist.all_reduce(found, group=mesh.get_group())
        found /= mesh.size()
    return found.tolist()


def peak() -> float:
    """The most memory that this process has had, in MB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main(length: int = 32768, steps: int = 20) -> dict[str, object]:
    """Train over all ranks, then alone; returns what is printed."""
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(rank)
    text = "\n".join(topics.values())[: length + 1].encode("ascii", "replace")
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().to(device)
    mesh = init_device_mesh(device, (ranks,), mesh_dim_names=("cp",)) if ranks > 1 else None
    before, start = peak(), time.perf_counter()
    losses = losses_of(tokens, steps, mesh)
    took = time.perf_counter() - start
    print(
        f"rank {rank} of {ranks}: {len(tokens) - 1} tokens, {steps} steps in {took:.1f} s, loss"
        f" {losses[0]:.4f} to {losses[-1]:.4f}, {peak() - before:.0f} MB more at the peak\n",
        end="",  # in one write with its newline: lines of several ranks never run together
    )
    apart = 0.0
    if mesh is not None:
        if rank == 0:
            q = torch.empty(1, HEADS, (len(tokens) - 1) // ranks, WIDTH // HEADS, device=device)
            plan = str(attnfast.explain(q, q, q, mesh=mesh, causal=True)).splitlines()[1]
            print(f"a layer's {plan}")
            torch.set_num_threads(ranks * torch.get_num_threads())  # of those that wait
            alone = losses_of(tokens, steps, None)
            apart = max(abs(a - b) for a, b in zip(losses, alone, strict=True))
            print(f"alone: losses differ by at most {apart:.1e}")
        dist.barrier()
        dist.destroy_process_group()
    assert apart < 1e-5, apart
    return {"losses": losses, "apart": apart}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--steps", type=int, default=20)
    main(**vars(parser.parse_args()))
