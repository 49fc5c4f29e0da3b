"""attnfast.lens: what is seen of a model's heads is what dense attention has in fp64."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attnfast
from attnfast import lens
from attnfast.integrations import sdpa
from attnfast.lens.running import Running, bin_of, value_of

B, T, E, H = 3, 20, 32, 4


def encoder(**options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, H, 48, batch_first=True, **options)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0 + torch.rand_like(parameter))
    attnfast.replace(model, verbose=False)
    return model


def rows_of(q: Tensor, k: Tensor, allowed: Tensor) -> dict[str, Tensor]:
    """Every statistic of every row (B, H, T), in fp64."""
    scores = (q.double() @ k.double().mT) * q.shape[3] ** -0.5
    scores = scores.masked_fill(~allowed, -torch.inf)
    p = scores.softmax(3).nan_to_num()
    t, s = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    entropy = torch.special.entr(p).sum(3)
    return {
        "breadth": entropy.exp(),
        "focus": p.amax(3),
        "reach": (p * (s - t).abs()).sum(3),
        "max_logit": scores.amax(3),
        "entropy": entropy,
    }


def expected(rows: dict[str, Tensor], real: Tensor) -> pd.DataFrame:
    """The table of one layer whose rows these are; real (B, T)."""
    columns: dict[str, Any] = {"head": range(H), "queries": int(real.sum())}
    for name, x in rows.items():
        values = x.transpose(0, 1)[:, real]
        columns |= {name: values.mean(1), f"{name}_sd": values.std(1)}
        columns |= {f"{name}_min": values.amin(1), f"{name}_max": values.amax(1)}
        for q in (0.05, 0.5, 0.95):
            columns[f"{name}_p{round(100 * q):02}"] = quantile(values, q)
    return pd.DataFrame(columns)


def quantile(x: Tensor, q: float) -> Tensor:
    """The least of the values, last dimension, that a share q of them does not exceed."""
    return x.sort(-1).values[..., math.ceil(q * x.shape[-1]) - 1]


def hold(found: pd.DataFrame, want: pd.DataFrame) -> None:
    assert list(found.columns) == ["layer", *want.columns]
    for name in want.columns:
        close = 0.09 if "_p" in name else 1e-4  # quantiles are those of bins
        actual, right = (torch.tensor(x[name].to_numpy(dtype=float)) for x in (found, want))
        torch.testing.assert_close(
            actual, right, atol=close, rtol=close, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("grads", [True, False])
def test_padded_batches_of_an_encoder(grads: bool) -> None:
    model = encoder(dropout=0.0)
    model.train(grads)
    x = torch.randn(B, T, E)
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[0, 15:] = True
    padding[2, 4:] = True
    inputs: list[Tensor] = []
    first = model.layers[0].self_attn
    first.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with lens.observe(model) as seen, torch.set_grad_enabled(grads):
        for part in (slice(0, 2), slice(2, 3)):  # merged over batches
            model(x[part], src_key_padding_mask=padding[part])
    table = seen.table()
    assert list(table["layer"].unique()) == ["layers.0.self_attn", "layers.1.self_attn"]
    weight, bias = first.in_proj_weight, first.in_proj_bias
    q, k, _ = (
        y.view(B, T, H, -1).transpose(1, 2)
        for y in nn.functional.linear(torch.cat(inputs), weight, bias).detach().chunk(3, 2)
    )
    allowed = ~padding[:, None, None].expand(B, H, T, T)
    hold(table[table.layer == "layers.0.self_attn"], expected(rows_of(q, k, allowed), ~padding))
    assert not first._forward_hooks_always_called
    model(x)  # no longer seen
    assert seen.table()["queries"].max() == int((~padding).sum())


class Calls(nn.Module):
    """Attention without a layer of ours: torch's function, twice."""

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        attend = nn.functional.scaled_dot_product_attention
        return attend(q, k, k, is_causal=True) + attend(q, k, k)


def test_callers_of_torchs_function() -> None:
    q, k = torch.randn(2, B, H, T, 8)
    model = Calls()
    sdpa.activate()
    with lens.observe(model) as seen:
        model(q, k)
    sdpa.restore()
    table = seen.table()
    assert list(table["layer"].unique()) == ["", "#2"]
    real = torch.ones(B, T, dtype=torch.bool)
    causal = torch.ones(T, T, dtype=torch.bool).tril().expand(B, H, T, T)
    hold(table[table.layer == ""], expected(rows_of(q, k, causal), real))
    hold(table[table.layer == "#2"], expected(rows_of(q, k, causal | True), real))


def test_what_is_asked_of_attention_stays_what_it_was() -> None:
    """Statistics that the caller wants, and none; packed rows; a query without keys."""
    model = attnfast.MultiheadAttention(
        E, H, batch_first=True, collect_stats="received", window=(3, 0)
    )
    x = torch.randn(2, T, E)
    jagged = torch.nested.nested_tensor([x[0, :7], x[1]], layout=torch.jagged)
    with lens.observe(model) as seen:
        assert model(jagged, jagged, jagged, need_weights=False)[1] is None
        received = model.stats.received
        assert received is not None
        out, weights = model(x, x, x, attn_mask=torch.ones(T, T, dtype=torch.bool).triu(0))
    assert seen.table()["queries"].tolist() == [7 + T + 2 * (T - 1)] * H
    again, same = model(x, x, x, attn_mask=torch.ones(T, T, dtype=torch.bool).triu(0))
    assert torch.equal(out, again)
    assert torch.equal(weights, same)


class Tokens(nn.Module):
    """An encoder that is given tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, E)
        self.encoder = encoder(dropout=0.0)

    def forward(self, input_ids: Tensor, padding: Tensor) -> Tensor:
        out: Tensor = self.encoder(self.table(input_ids), src_key_padding_mask=padding)
        return out


def shares_of(p: Tensor, real: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """Of probabilities (B, H, T, T) in fp64: the mean shares of each head, and by distance."""
    d = torch.arange(T)[:, None] - torch.arange(T)
    same = (ids[:, :, None] == ids[:, None]) & (d != 0)
    first = torch.zeros(T, T, dtype=torch.bool)
    first[:, 0] = True
    number = int(real.sum())
    kept = p * real[:, None, :, None]
    where = {"self": d == 0, "previous": d == 1, "next": d == -1, "first": first}
    shares = {n: (kept * x).sum((0, 2, 3)) / number for n, x in where.items()}
    shares["same"] = (kept * same[:, None]).sum((0, 2, 3)) / number
    bins = torch.where(d == 0, 32, 32 + d.sign() * (1 + d.abs().clamp(min=1).log2().floor()))
    shares["distances"] = torch.stack(
        [(kept * (bins == n)).sum((0, 2, 3)) / number for n in range(64)], 1
    )
    return shares


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_shares(dtype: torch.dtype, tmp_path: Path) -> None:
    """Fused, and by the reference (fp64); padded, over two batches, kept in a file."""
    model = Tokens().to(dtype).eval()
    ids, padding = torch.randint(7, (B, T)), torch.zeros(B, T, dtype=torch.bool)
    padding[0, 15:] = True
    padding[2, 4:] = True
    with lens.observe(model, shares=True) as seen:
        model(ids[:2], padding[:2])
        model(padding=padding[2:], input_ids=ids[2:])
    layer = model.encoder.layers[0].self_attn
    x = model.table(ids)
    weights = layer(x, x, x, key_padding_mask=padding, average_attn_weights=False)[1]
    want = shares_of(weights.detach().double(), ~padding, ids)
    name = "encoder.layers.0.self_attn"
    table = seen.table()
    for column in ("self", "previous", "next", "first", "same"):
        found = torch.tensor(table[table.layer == name][column].to_numpy())
        torch.testing.assert_close(found, want[column], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen.distances(name), want["distances"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen.distances(name).sum(1), torch.ones(H).double())
    seen.save(tmp_path / "seen")
    pd.testing.assert_frame_equal(lens.load(tmp_path / "seen").table(), table)
    with lens.observe(model, shares=True, tokens=None) as seen:
        model(ids, padding)
    assert seen.table()["same"].isna().all()
    torch.testing.assert_close(seen.distances(name), want["distances"], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"distances: layer must be one of .* got other"):
        seen.distances("other")
    with pytest.raises(TypeError, match=r"observe: tokens must be the name of an argument"):
        lens.observe(model, shares=True, tokens=3)  # type: ignore[arg-type]


def test_every_and_checkpointing_and_compile() -> None:
    model = encoder(dropout=0.0)
    x = torch.randn(B, T, E)
    with lens.observe(model, every=3) as seen:
        for _ in range(5):
            model(x)
    assert set(seen.table()["queries"]) == {2 * B * T}
    with lens.observe(model) as seen:
        checkpoint(model, x.requires_grad_(), use_reentrant=False).sum().backward()
    assert set(seen.table()["queries"]) == {B * T}
    compiled = torch.compile(model, backend="aot_eager")
    compiled(x).sum().backward()
    with lens.observe(model) as seen:
        out = compiled(x)
        out.sum().backward()
    assert set(seen.table()["queries"]) == {B * T}
    torch.testing.assert_close(out, model(x))


def test_files_and_differences(tmp_path: Path) -> None:
    tables = []
    for scale in (1.0, 2.0):
        model = encoder(dropout=0.0)
        with torch.no_grad():
            model.layers[0].self_attn.in_proj_weight.mul_(scale)
        with lens.observe(model) as seen:
            model(torch.randn(B, T, E, generator=torch.Generator().manual_seed(0)))
        seen.save(tmp_path / "seen")
        tables.append(lens.load(tmp_path / "seen"))
        pd.testing.assert_frame_equal(tables[-1].table(), seen.table())
    both = lens.compare(*tables)
    assert len(both) == 2 * H
    assert (both["breadth_change"][:H] < 0).all()  # larger scores, sharper heads
    torch.testing.assert_close(
        torch.tensor((both["focus_b"] - both["focus_a"]).to_numpy()),
        torch.tensor(both["focus_change"].to_numpy()),
    )
    torch.save({"format": 0}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"load: path must be a file of Seen.save, of format 2"):
        lens.load(tmp_path / "other")
    figure = tables[0].plot()
    assert [axis.get_title() for axis in figure.axes[:4]] == [
        "breadth",
        "focus",
        "reach",
        "max_logit",
    ]
    page = tables[0].html()
    assert page.count("<tr>") == 1 + 2 * H
    assert "layers.1.self_attn" in page


def test_quantiles_are_within_a_bin() -> None:
    torch.manual_seed(0)
    values = torch.stack([torch.randn(5000) * 30, torch.rand(5000) ** 4, torch.zeros(5000)])
    real = torch.rand(3, 5000) < 0.7
    found = Running.of(values, real)
    other = Running.of(values[:, :100], real[:, :100]).merged(
        Running.of(values[:, 100:], real[:, 100:])
    )
    for x, y in zip(found, other, strict=True):
        torch.testing.assert_close(x, y)
    for head in range(3):
        kept = values[head][real[head]].double()
        torch.testing.assert_close(found.mean[head], kept.mean())
        torch.testing.assert_close(found.deviation[head], kept.std())
        for q in (0.05, 0.5, 0.95):
            right = quantile(kept, q)
            assert abs(found.quantile(q)[head] - right) <= 0.045 * (1 + right.abs())
    x = torch.tensor([0.0, 1.0, -1.0, 3.5, 1e6, -1e6])
    torch.testing.assert_close(value_of(bin_of(x)), x.double(), atol=0.03, rtol=0.03)
    nothing = Running.of(torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool)).merged(
        found._replace(**{name: x[:2] for name, x in found._asdict().items()})
    )
    torch.testing.assert_close(nothing.mean, found.mean[:2])


def halves(group: dist.ProcessGroup, x: Tensor, whole: pd.DataFrame) -> None:
    model = encoder(dropout=0.0)
    with lens.observe(model) as seen:
        model(x.chunk(2)[dist.get_rank()])
    found = seen.over_ranks(group).table()
    pd.testing.assert_frame_equal(found, whole, rtol=1e-4, atol=1e-4)


def test_ranks_merge_to_the_whole(tmp_path: Path) -> None:
    x, model = torch.randn(4, T, E), encoder(dropout=0.0)
    with lens.observe(model) as seen:
        model(x)
    ranks.run_on(2, tmp_path, halves, x, seen.table())
    with pytest.raises(ValueError, match=r"over_ranks: torch.distributed must be initialised"):
        seen.over_ranks()


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match=r"observe: model must be a torch.nn.Module, got str"):
        lens.observe("model")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"observe: every must be"):
        lens.observe(nn.Linear(2, 2), every=0)
    again = pytest.raises(RuntimeError, match=r"observe: another observation is going on")
    with lens.observe(nn.Linear(2, 2)) as seen, again:
        lens.observe(nn.Linear(2, 2)).__enter__()
    with pytest.raises(ValueError, match=r"no attention of attnfast ran within the model: attnf"):
        seen.table()
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"attnfast.lens needs pandas: pip install 'attnfast\[le"):
        seen.table()


def test_a_model_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    from attnfast.integrations import transformers as ours

    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=E, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=H, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    name = ours.register()
    config._attn_implementation = name
    model = transformers.LlamaForCausalLM(config).eval()
    real = torch.ones(B, T, dtype=torch.long)
    real[0, :9] = 0  # padded on the left
    with lens.observe(model) as seen, torch.no_grad():
        model(torch.randint(40, (B, T)), attention_mask=real)
    ours.unregister()
    table = seen.table()
    assert list(table["layer"].unique()) == [f"model.layers.{i}.self_attn" for i in range(2)]
    assert set(table["queries"]) == {int(real.sum())}
    assert (table["breadth_min"] >= 1 - 1e-4).all()
    assert (table["breadth_max"] <= T + 1e-3).all()
