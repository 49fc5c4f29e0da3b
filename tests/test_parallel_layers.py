"""Layers whose heads or rows are cut over real processes are the whole layer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import run_on
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

import attnfast
from attnfast.distributed import HeadParallel, parallelize, shard, unshard

B, T, E, H = 2, 12, 32, 4
EXTRAS: dict[str, Any] = {
    "num_kv_heads": 2, "sinks": True, "alibi": True, "similarity": "cosine", "window": (5, 3),
}  # fmt: skip
OWN_WINDOWS = torch.tensor([[5, 3], [-1, 0], [0, -1], [2, 2]])


def layer(**options: Any) -> attnfast.MultiheadAttention:
    torch.manual_seed(0)
    made = attnfast.MultiheadAttention(E, H, batch_first=True, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def whole(x: Any) -> Tensor:
    """Of a DTensor all of it."""
    found: Tensor = x.full_tensor() if isinstance(x, DTensor) else x
    return found


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient, of a packed projection by its parts."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        grad = whole(parameter.grad)
        if name.endswith("in_proj_weight"):
            keys = (len(grad) - E) // 2
            parts = zip("qkv", grad.split((E, keys, keys)), strict=True)
            found |= {name.replace("in_", f"{n}_"): part for n, part in parts}
        else:
            found[name] = grad
    return found


def same(found: dict[str, Tensor], expected: dict[str, Tensor], said: str) -> None:
    assert found.keys() == expected.keys()
    for name, x in found.items():
        torch.testing.assert_close(
            x, expected[name], atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{said}, {n}: {m}"
        )


def hold_tensor(mesh: DeviceMesh) -> None:
    """Heads over ranks: results, gradients, masks of heads, weights, statistics, a cache."""
    torch.manual_seed(1)
    x, memory = torch.randn(B, T, E), torch.randn(B, 7, E)
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[1, 9:] = True
    by_head = torch.randn(B * H, T, T)
    calls: tuple[tuple[dict[str, Any], dict[str, Any], bool], ...] = (
        ({}, {"is_causal": True, "need_weights": False}, False),
        (EXTRAS, {"key_padding_mask": padding, "need_weights": False}, False),
        ({"window": OWN_WINDOWS, "num_kv_heads": 2}, {"need_weights": False}, False),
        ({"bias": False}, {"attn_mask": by_head, "average_attn_weights": False}, False),
        ({"collect_stats": True}, {"attn_mask": by_head[0] > 1}, False),
        ({}, {"need_weights": False}, True),
    )
    for options, given, across in calls:
        plain = layer(**options)
        cut = copy.deepcopy(plain)
        parallelize_module(cut, mesh, HeadParallel())
        results = []
        for model in (plain, cut):
            leaf = x.clone().requires_grad_()
            key = memory if across else leaf
            out, weights = model(leaf, key, key, **given)
            loss = out.sin().sum() if weights is None else out.sin().sum() + weights.cos().sum()
            loss.backward()
            found = {"out": out.detach(), "dx": leaf.grad, **gradients(model)}
            if weights is not None:
                found["weights"] = weights.detach()
            results.append(found)
        same(results[1], results[0], str((options, given.keys())))
        if plain.stats is not None:
            assert cut.stats is not None
            own = plain.stats.entropy.chunk(mesh.size(), 1)[mesh.get_local_rank()]
            torch.testing.assert_close(cut.stats.entropy, own, atol=1e-5, rtol=1e-5)
    hold_gradients_of_masks(mesh, layer(), parallelize_module(layer(), mesh, HeadParallel()))
    alone, weights = x[0], []
    for model in (layer(), parallelize_module(layer(), mesh, HeadParallel())):
        weights.append(model(alone, alone, alone, average_attn_weights=False)[1])
    torch.testing.assert_close(weights[1], weights[0], atol=1e-6, rtol=1e-5)
    plain = layer(num_kv_heads=2).eval()
    cut = parallelize_module(copy.deepcopy(plain), mesh, HeadParallel())
    outs = []
    with torch.no_grad():
        for model in (plain, cut):
            cache = attnfast.KVCache(T)
            outs.append([
                model(p, p, p, need_weights=False, is_causal=True, kv_cache=cache)[0]
                for p in x.split([8, 1, 3], 1)
            ])  # fmt: skip
    torch.testing.assert_close(outs[1], outs[0], atol=1e-5, rtol=1e-5)
    dropped = layer(dropout=0.5)
    parallelize_module(dropped, mesh, HeadParallel())
    first = dropped(x, x, x, need_weights=False)[0]
    assert not first.equal(dropped(x, x, x, need_weights=False)[0])


def hold_gradients_of_masks(mesh: DeviceMesh, plain: nn.Module, cut: nn.Module) -> None:
    """A float mask's gradient: with heads over ranks whole, with rows to be added."""
    torch.manual_seed(3)
    x, padding, mask = torch.randn(B, T, E), torch.randn(B, T), torch.randn(T, T)
    rows, rows_of = cut.parallel.context is not None, {"key_padding_mask": 1, "attn_mask": 0}
    for given in (
        {"attn_mask": mask[:1]},
        {"key_padding_mask": padding},
        {"key_padding_mask": padding, "attn_mask": mask},
    ):
        found: list[dict[str, Tensor]] = []
        for model in (plain, cut):
            own, fed, many = dict(given), x, rows and model is cut
            if many:
                fed = shard(x, mesh, 1)
                own = {
                    n: g if len(g) == 1 else shard(g, mesh, g is padding) for n, g in own.items()
                }
            leaves = {n: g.detach().clone().requires_grad_() for n, g in own.items()}
            model(fed, fed, fed, need_weights=False, **leaves)[0].sin().sum().backward()
            grads = {n: leaf.grad for n, leaf in leaves.items()}
            for n, grad in grads.items() if many else ():
                if len(grad) == 1:
                    dist.all_reduce(grad, group=mesh.get_group())
                else:
                    grads[n] = unshard(grad, mesh, rows_of[n])
            found.append(grads)
        same(found[1], found[0], f"gradients of {list(given)}")


def hold_context(mesh: DeviceMesh) -> None:
    """Rows over ranks: every rank finds its rows, and gradients add up."""
    torch.manual_seed(1)
    x, mask = torch.randn(B, T, E), torch.randn(T, T)
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[1, 9:] = True
    for options, given, layout in (
        ({}, {"is_causal": True}, "zigzag"),
        (EXTRAS, {"key_padding_mask": padding}, "contiguous"),
        ({"bias": False}, {"attn_mask": mask}, "zigzag"),
        ({"window": OWN_WINDOWS, "num_kv_heads": 2}, {"is_causal": True}, "zigzag"),
    ):
        plain = layer(**options)
        cut = parallelize(copy.deepcopy(plain), mesh, context=mesh.mesh_dim_names[0], layout=layout)
        rows = {"key_padding_mask": 1, "attn_mask": 0}
        own = {n: shard(g, mesh, rows[n], layout) if n in rows else g for n, g in given.items()}
        leaf = x.clone().requires_grad_()
        out = plain(leaf, leaf, leaf, need_weights=False, **given)[0]
        out.sin().sum().backward()
        part = shard(x, mesh, 1, layout).requires_grad_()
        found = cut(part, part, part, need_weights=False, **own)[0]
        found.sin().sum().backward()
        of_all = gradients(cut)
        for grad in of_all.values():
            dist.all_reduce(grad, group=mesh.get_group())
        results = {"out": unshard(found.detach(), mesh, 1, layout), **of_all}
        results["dx"] = unshard(part.grad, mesh, 1, layout)
        same(results, {"out": out.detach(), "dx": leaf.grad, **gradients(plain)}, layout)
    name = mesh.mesh_dim_names[0]
    hold_gradients_of_masks(mesh, layer(), parallelize(layer(), mesh, context=name))
    blocks = attnfast.BlockMask.strided(T, T, 2)
    expected = layer()(x, x, x, padding, attn_mask=blocks, need_weights=False)[0]
    cut, part = parallelize(layer(), mesh, context=name), shard(x, mesh, 1)
    found = cut(part, part, part, shard(padding, mesh, 1), attn_mask=blocks, need_weights=False)[0]
    torch.testing.assert_close(unshard(found, mesh, 1), expected, atol=1e-5, rtol=1e-5)
    jagged = torch.nested.nested_tensor([torch.randn(3, E)], layout=torch.jagged)
    with pytest.raises(TypeError, match="query must be dense over many ranks, got nested"):
        cut(jagged, jagged, jagged, need_weights=False)
    with pytest.raises(
        ValueError, match=r"key_padding_mask must be \(B, S\) = \(2, 6\), got \(2, 12"
    ):
        cut(part, part, part, padding, need_weights=False)
    with pytest.raises(ValueError, match="kv_cache must be None where sequences are cut over"):
        cut(part, part, part, kv_cache=attnfast.KVCache(T))
    with pytest.raises(ValueError, match="return_weights must be False: weights are T x S"):
        cut(part, part, part)


def block(causal: bool = True) -> nn.Module:
    """A pre-norm Transformer of two blocks."""
    torch.manual_seed(0)
    each = nn.TransformerEncoderLayer(E, H, 64, dropout=0.0, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(each, 2, enable_nested_tensor=False)
    attnfast.replace(model, verbose=False)
    return model


def trained(model: nn.Module, feed: Any, steps: int = 3) -> list[float]:
    """Losses of some steps."""
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.05), []
    for _ in range(steps):
        loss = feed(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def hold_models(grid: DeviceMesh) -> None:
    """A model over a mesh of rows and heads, under FSDP2, checkpointing and compile, and DDP."""
    torch.manual_seed(2)
    x = torch.randn(B, T, E)

    def feed(model: nn.Module) -> Tensor:
        return (
            model(x, is_causal=True, mask=nn.Transformer.generate_square_subsequent_mask(T))
            .square()
            .mean()
        )

    expected = torch.stack(trained(block(), feed))
    heads, rows = grid["tp"], grid["cp"]
    own = shard(x, rows, 1)
    nothing = torch.zeros(own.shape[1], T)

    def feed_own(model: nn.Module) -> Tensor:
        return model(own, is_causal=True, mask=nothing).square().mean()

    def recomputed(model: nn.Module) -> Tensor:
        def whole_model(given: Tensor) -> Tensor:
            result: Tensor = model(given, is_causal=True, mask=nothing)
            return result

        out: Tensor = checkpoint(whole_model, own.requires_grad_(), use_reentrant=False)
        return out.square().mean()

    plan = {
        "norm1": SequenceParallel(), "norm2": SequenceParallel(),
        "self_attn": HeadParallel(
            input_layouts=Shard(1), output_layouts=Shard(1), use_local_output=False
        ),
        "linear1": ColwiseParallel(input_layouts=Shard(1)),
        "linear2": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
    }  # fmt: skip

    def in_sequence(model: nn.Module) -> Tensor:
        cut = DTensor.from_local(x.chunk(2, 1)[heads.get_local_rank()], heads, [Shard(1)])
        out = model(cut, is_causal=True, mask=torch.zeros(T, T))
        return out.full_tensor().square().mean()

    found = {}
    model = parallelize(block(), grid, context="cp", tensor="tp")
    for each in model.layers:
        fully_shard(each, mesh=rows)
    fully_shard(model, mesh=rows)
    found["fsdp2"] = trained(model, feed_own)
    model = parallelize(block(), grid, context="cp")
    found["ddp"] = trained(
        nn.parallel.DistributedDataParallel(model, process_group=rows.get_group()), feed_own
    )
    model = parallelize(block(), grid, context="cp")
    found["checkpointed"] = trained(
        nn.parallel.DistributedDataParallel(model, process_group=rows.get_group()), recomputed
    )
    model = parallelize(block(), grid, context="cp", tensor="tp")
    found["compiled"] = trained(
        fully_shard(torch.compile(model, backend="aot_eager"), mesh=rows), feed_own
    )
    for name, losses in found.items():
        total = torch.stack(losses)
        dist.all_reduce(total, group=rows.get_group())
        torch.testing.assert_close(total / 2, expected, msg=lambda m, n=name: f"{n}: {m}")
    model = block()
    for each in model.layers:
        parallelize_module(each, heads, plan)
    losses = trained(model, in_sequence)
    torch.testing.assert_close(torch.stack(losses), expected)


def hold_four(group: dist.ProcessGroup, folder: str) -> None:
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    hold_tensor(grid["tp"])
    hold_context(grid["cp"])
    hold_models(grid)
    four = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    saved = parallelize(layer(sinks=True), four, tensor="tp")
    dcp.save(saved.state_dict(), checkpoint_id=folder)


def hold_two(group: dist.ProcessGroup, folder: str) -> None:
    """What four ranks have saved."""
    mesh, plain = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), layer(sinks=True)
    made = attnfast.MultiheadAttention(E, H, batch_first=True, sinks=True)
    state = parallelize(made, mesh, tensor="tp").state_dict()
    dcp.load(state, checkpoint_id=folder)
    made.load_state_dict(state)
    x = torch.randn(B, T, E, generator=torch.Generator().manual_seed(0))
    expected = plain(x, x, x)
    torch.testing.assert_close(made(x, x, x), expected, atol=1e-6, rtol=1e-5)


def test_layers_over_ranks_are_whole_layers(tmp_path: Path) -> None:
    saved = str(tmp_path / "saved")
    for world, function in ((4, hold_four), (2, hold_two)):
        (folder := tmp_path / str(world)).mkdir()
        run_on(world, folder, function, saved)


@pytest.fixture
def mesh(tmp_path: Path) -> Any:
    """Of one process."""
    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
    dist.destroy_process_group()


def test_errors(mesh: DeviceMesh) -> None:
    for given, message in (
        ({"context": "cp"}, "parallelize: context must be one of the mesh's dimensions"),
        ({}, "parallelize: context or tensor must be one of the mesh's dimensions"),
        ({"tensor": "tp", "layout": "striped"}, "parallelize: layout must be one of"),
        ({"tensor": "tp", "method": "usp"}, "parallelize: method must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            parallelize(layer(), mesh, **given)
    with pytest.raises(ValueError, match="model must be a model with an attnfast"):
        parallelize(nn.Linear(2, 2), mesh, tensor="tp")
    with pytest.raises(TypeError, match="parallelize: mesh must be a DeviceMesh, got str"):
        parallelize(layer(), "tp", tensor="tp")
    with pytest.raises(TypeError, match="HeadParallel: module must be an attnfast"):
        parallelize_module(nn.MultiheadAttention(E, H), mesh, HeadParallel())
    with pytest.raises(ValueError, match="add_bias_kv and add_zero_attn must be False over many"):
        parallelize(layer(add_zero_attn=True), mesh, tensor="tp")
    cut = block()
    parallelize(cut, mesh, tensor="tp")
    with pytest.raises(ValueError, match="module must be whole, got one whose heads are cut alr"):
        parallelize(cut, mesh, tensor="tp")
    with pytest.raises(
        ValueError, match="self_attn must be whole, got one that parallelize has cut"
    ):
        attnfast.restore(cut)
    jagged = torch.nested.nested_tensor([torch.randn(3, E)], layout=torch.jagged)
    with pytest.raises(TypeError, match="query must be dense over many ranks, got nested"):
        cut.layers[0].self_attn(jagged, jagged, jagged)
