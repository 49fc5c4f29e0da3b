"""``torch.fx.symbolic_trace``: the layer and the functions are leaves of the graph."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnfast
from attnfast import MultiheadAttention, replace, restore

B, T, E, H = 2, 5, 16, 4


class Own(MultiheadAttention):
    """A user's own, with a forward of its own."""

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(query * 2 if query.shape[0] else query, *args, **kwargs)


class Block(nn.Module):
    """Self-attention, attention from a learned and from a fixed query, weights, a mask."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.learned = nn.Parameter(torch.randn(B, 2, E))
        self.register_buffer("fixed", torch.randn(B, 3, E))

    def forward(self, x: Tensor, padding: Tensor) -> Any:
        attended, weights = self.attention(x, x, x, padding)
        pooled, _ = self.attention(self.learned, x, x, need_weights=False)
        fixed = self.attention(query=self.fixed, key=x, value=x, key_padding_mask=padding)[0]
        return x + attended, weights.mean(-1), pooled, fixed


def inputs() -> tuple[Tensor, Tensor]:
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[1, 3:] = True
    return torch.randn(B, T, E), padding


def traced(model: nn.Module) -> torch.fx.GraphModule:
    graph = torch.fx.symbolic_trace(model)
    graph.graph.lint()
    for node in graph.graph.nodes:
        node.type = None  # annotations, which this file has as strings, do not pickle
    graph.recompile()
    return graph


@pytest.mark.parametrize("mode", ["train", "eval", "inference"])
@pytest.mark.parametrize(
    "extras",
    [{}, {"add_bias_kv": True}, {"num_kv_heads": 2, "window": (2, 0), "sinks": True}],
    ids=["plain", "appended", "extras"],
)
@pytest.mark.parametrize("kind", [MultiheadAttention, Own])
def test_a_layer_is_a_leaf(kind: Any, extras: dict[str, Any], mode: str) -> None:
    torch.manual_seed(0)
    model = Block(kind(E, H, batch_first=True, **extras)).train(mode == "train")
    graph = traced(model)
    calls = [node for node in graph.graph.nodes if node.op == "call_module"]
    assert [node.target for node in calls] == ["attention"] * 3
    stacks = [[name for name, _ in node.meta["nn_module_stack"].values()] for node in calls]
    assert stacks == [["attention"]] * 3
    with torch.inference_mode(mode == "inference"):
        given = inputs()
        for got, want in zip(graph(*given), model(*given), strict=True):
            assert torch.equal(got, want)


def test_a_replaced_model_is_traced_as_torchs() -> None:
    """Node by node; and a traced model can be replaced."""
    torch.manual_seed(0)
    model = Block(nn.MultiheadAttention(E, H, batch_first=True))
    before = traced(model)
    x, padding = inputs()
    expected = before(x, padding)
    replace(model, verbose=False)
    after = traced(model)
    assert str(after.graph) == str(before.graph)
    torch.testing.assert_close(after(x, padding), expected)
    restore(model)
    fresh = traced(model)
    assert replace(fresh, verbose=False).replaced == ("attention",)
    torch.testing.assert_close(fresh(x, padding), expected)


def test_hooks_run_when_the_graph_does() -> None:
    """Not while it is traced, on what only stands for a value: as with torch's own."""
    seen: list[Any] = []
    for kind in (nn.MultiheadAttention, MultiheadAttention):
        model = Block(kind(E, H, batch_first=True))
        model.attention.register_forward_hook(lambda *args: seen.append(args[2][0]))
        graph = traced(model)
        assert seen == []
        graph(*inputs())
        assert [type(x) for x in seen] == [Tensor] * 3
        seen.clear()


def test_a_traced_model_trains_and_pickles() -> None:
    torch.manual_seed(0)
    model = Block(MultiheadAttention(E, H, batch_first=True, alibi=True))
    graph = traced(model)
    x, padding = inputs()
    graph(x, padding)[0].square().sum().backward()
    assert all(p.grad is not None for p in graph.attention.parameters())
    again = pickle.loads(pickle.dumps(graph))
    for got, want in zip(again(x, padding), graph(x, padding), strict=True):
        assert torch.equal(got, want)


def test_a_tracer_of_ones_own_may_decide() -> None:
    """One that has every module as a leaf finds ours as the others."""

    class Leaves(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return True

    graph = Leaves().trace(Block(MultiheadAttention(E, H)))
    assert [n.target for n in graph.nodes if n.op == "call_module"] == ["attention"] * 3


def dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    out, lse = attnfast.attention(q, k, v, bias=bias, causal=True, window=(3, 0), return_lse=True)
    return out + lse.unsqueeze(-1)


def positions(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Only the alignment is a graph's input: the queries are constants."""
    return attnfast.attention(ROWS, ROWS, ROWS, align=bias.flatten()[:2].long())


def varlen(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    packed = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    return attnfast.varlen_attention(*packed, ENDS, ENDS, T, T, softcap=2.0)


def decode(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return attnfast.decode_attention(q[:, :, :1], k, v, cache_seqlens=ENDS[1:] - ENDS[:-1])


def torchs(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return attnfast.scaled_dot_product_attention(q, k, v, attn_mask=bias)


ENDS = torch.tensor([0, T, 2 * T], dtype=torch.int32)
ROWS = torch.randn(B, H, T, 8)


@pytest.mark.parametrize("function", [dense, positions, varlen, decode, torchs])
def test_a_function_is_one_node(function: Any) -> None:
    torch.manual_seed(0)
    graph = traced(function)
    ours = [n for n in graph.graph.nodes if "attnfast" in getattr(n.target, "__module__", "")]
    assert [node.op for node in ours] == ["call_function"]
    args = (*torch.randn(3, B, H, T, 8), torch.randn(1, H, T, T))
    assert torch.equal(graph(*args), function(*args))
    again = pickle.loads(pickle.dumps(graph))
    assert torch.equal(again(*args), function(*args))
