"""The table of decoding cases, and how to run one, contiguous or paged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accuracy import Expected, expected, expected_one, hold, in_double, reference_results
from cases import fp32
from dense import Cotangents, Trial, dense
from torch import Tensor

import attnfast
from attnfast import BlockMask
from attnfast.call import Inputs, Options

PAGE = 16


@dataclass(frozen=True)
class DecodeCase:
    """A call of `decode_attention`: lengths are those of the cache's entries, S its capacity."""

    name: str
    lengths: tuple[int, ...] = (129, 300, 64)
    H: int = 4
    H_kv: int = 2
    T: int = 1
    S: int = 320
    D: int = 64
    D_v: int = 64
    dtype: torch.dtype = fp32
    scale: float | None = None
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    alibi: str = ""
    sinks: bool = False
    bias: str | None = None
    windows: tuple[tuple[int, int], ...] = ()  # heads take them in turn
    received: bool = False
    mask: str = ""  # the dimensions of (b, h, t, s) that are not broadcast, or "tree"

    def __str__(self) -> str:
        lengths = "+".join(map(str, self.lengths))
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.name}-S{lengths}-T{self.T}-H{self.H}:{self.H_kv}-D{self.D}:{self.D_v}-{dtype}"
        )


CASES = (
    DecodeCase("plain"),
    DecodeCase("mha", H_kv=4),
    DecodeCase("mqa", H=8, H_kv=1),
    DecodeCase("gqa_wide", H=24, H_kv=2, D=128, D_v=128),
    DecodeCase("few_queries", T=5),
    DecodeCase("many_queries", T=40, lengths=(129, 300, 41)),
    DecodeCase("more_queries_than_keys", T=7, lengths=(0, 3, 7, 300)),
    DecodeCase("empty", lengths=(0, 0, 5)),
    DecodeCase("short", lengths=(1, 2, 15, 16, 17), S=32),
    DecodeCase("long", lengths=(4097, 1, 2000), S=4112),
    DecodeCase("long_row", lengths=(9000,), S=9008, H=2, H_kv=1),
    DecodeCase("tiny", D=1, D_v=1),
    DecodeCase("odd", D=40, D_v=72),
    DecodeCase("wide", D=192, D_v=512),
    DecodeCase("narrow", D=512, D_v=8),
    DecodeCase("scale", scale=0.3),
    DecodeCase("softcap", softcap=2.0),
    DecodeCase("window", window=(40, None)),
    DecodeCase("window_outside", window=(0, 0), T=3),
    DecodeCase("window_long", window=(100, 0), lengths=(4000, 50, 101), S=4000, T=2),
    DecodeCase("windows", windows=((40, -1), (-1, -1), (0, 0), (150, 3)), T=3),
    DecodeCase("windows_long", windows=((100, 0), (700, -1)), lengths=(4000, 50, 101), S=4000, T=2,
         H_kv=1),
    DecodeCase("windows_tree", windows=((9, 0), (-1, 1), (200, 2)), mask="tree", T=20, H=6,
         sinks=True),
    DecodeCase("alibi", alibi="h", T=2),
    DecodeCase("alibi_batch", alibi="bh"),
    DecodeCase("sinks", sinks=True, lengths=(0, 100, 320)),
    DecodeCase("bias", bias="bhts", T=3),
    DecodeCase("bias_keys", bias="bs"),
    DecodeCase("bias_heads", bias="h"),
    DecodeCase("mask", mask="bhts", T=5, lengths=(129, 300, 3, 0)),
    DecodeCase("mask_rows", mask="bt", T=3, window=(50, None), alibi="h"),
    DecodeCase("mask_tree", mask="tree", T=20, H=6),
    DecodeCase("mask_long", mask="hts", T=70, lengths=(600, 2000), S=2000, H=2, sinks=True,
         bias="bs"),
    DecodeCase("everything", H=6, T=3, D=40, D_v=24, scale=0.2, window=(150, None), softcap=4.0,
         alibi="bh", sinks=True, bias="hts"),
)  # fmt: skip


class Call(NamedTuple):
    """Tensors of `decode_attention` with a contiguous cache, and its keyword arguments."""

    q: Tensor
    k: Tensor
    v: Tensor
    lengths: Tensor
    options: dict[str, Any]


def make(case: DecodeCase, beyond: float = torch.nan) -> Call:
    """The case's tensors; cache slots past the lengths hold ``beyond``."""
    rng = torch.Generator().manual_seed(len(str(case)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(case.dtype)

    B, H, H_kv, T, S = len(case.lengths), case.H, case.H_kv, case.T, case.S
    lengths = torch.tensor(case.lengths).int()
    unused = (torch.arange(S) >= lengths.view(B, 1)).view(B, 1, S, 1)
    q = normal(B, H, T, case.D)
    k = normal(B, H_kv, S, case.D).masked_fill(unused, beyond)
    v = normal(B, H_kv, S, case.D_v).masked_fill(unused, beyond)
    options: dict[str, Any] = {
        "scale": case.scale,
        "window": case.window,
        "softcap": case.softcap,
        "return_lse": True,
        "return_received": case.received,
    }
    if case.windows:
        each = [case.windows[h % len(case.windows)] for h in range(H)]
        options["window"] = torch.tensor(each).int()
    if case.alibi:
        shape = (B, H) if "b" in case.alibi else (H,)
        options["alibi_slopes"] = torch.rand(shape, generator=rng)
    if case.sinks:
        options["sinks"] = normal(H)
    if case.bias is not None:
        sizes = zip("bhts", (B, H, T, S), strict=True)
        bias = normal(*(n if d in case.bias else 1 for d, n in sizes))
        bias[..., ::7] = -torch.inf if bias.shape[-1] > 1 else 0.5
        options["bias"] = bias
    if case.mask == "tree":
        parents = [torch.randint(-1, max(i, 1), (B,), generator=rng) for i in range(T)]
        parents[0][:] = -1
        options["mask"] = BlockMask.from_tree(torch.stack(parents, 1))
    elif case.mask:
        sizes = zip("bhts", (B, H, T, T), strict=True)
        shape = tuple(n if d in case.mask else 1 for d, n in sizes)
        options["mask"] = torch.rand(shape, generator=rng) < 0.6
    return Call(q, k, v, lengths, options)


def judge(results: tuple[Tensor, ...], call: Call) -> None:
    """By the accuracy rule."""
    hold(dict(zip(("out", "lse", "received"), results, strict=False)), expected_of(call))


def expected_of(call: Call) -> dict[str, Expected]:
    """What the accuracy rule wants of a call's results."""
    trial = equivalent(call)
    wanted = expected(trial)
    if call.options["return_received"]:
        trial = trial._replace(options=trial.options._replace(stats=2))
        truth = reference_results(in_double(trial), torch.float64)["received"]
        eager = reference_results(trial, torch.float32)["received"]
        unit = dense(trial)["received"].unit
        wanted["received"] = expected_one(truth, torch.float32, [eager], unit)
    return wanted


def equivalent(call: Call) -> Trial:
    """The same as a problem of `attention`: decoding is causal, with align = length - T."""
    options = call.options
    windows = options["window"] if isinstance(options["window"], Tensor) else None
    left, right = (None, None) if windows is not None else options["window"] or (None, None)
    slopes = options.get("alibi_slopes")
    inputs = Inputs(
        call.q,
        call.k,
        call.v,
        bias=options.get("bias"),
        alibi_slopes=slopes[None] if slopes is not None and slopes.dim() == 1 else slopes,
        sinks=options.get("sinks"),
        align=call.lengths - call.q.shape[2],
    )
    scale = call.q.shape[3] ** -0.5 if options["scale"] is None else options["scale"]
    mask = options.get("mask")
    if mask is not None:
        mask = mask.to_dense() if isinstance(mask, BlockMask) else mask
        inputs = inputs._replace(mask=over_the_cache(mask, call))
        if windows is not None:  # the mask decides to the right
            windows = torch.stack((windows[:, 0], torch.full_like(windows[:, 1], -1)), 1)
    inputs = inputs._replace(windows=windows)
    given = Options(
        scale,
        causal=mask is None,
        window_left=-1 if left is None else left,
        window_right=-1 if right is None else right,
        softcap=options["softcap"] or 0.0,
    )
    return Trial(inputs, given, Cotangents())


def over_the_cache(mask: Tensor, call: Call) -> Tensor:
    """The bool mask (B, H, T, S) of a mask of the last T keys."""
    (B, H, T, _), S = call.q.shape, call.k.shape[2]
    mask = mask.expand(B, H, T, T)
    whole = torch.zeros(B, H, T, S, dtype=torch.bool)
    for b, length in enumerate(call.lengths.tolist()):
        whole[b, :, :, : max(length - T, 0)] = True
        there = min(length, T)  # of the last T keys
        whole[b, :, :, length - there : length] = mask[b, :, :, T - there :]
    return whole


def decode(call: Call, backend: str) -> tuple[Tensor, Tensor]:
    return attnfast.decode_attention(
        call.q, call.k, call.v, call.lengths, backend=backend, **call.options
    )


def decode_paged(call: Call, backend: str, page: int = PAGE) -> tuple[Tensor, Tensor]:
    """The same with the cache cut into pages that lie in any order among unused ones."""
    B, H_kv, S, _ = call.k.shape
    n = S // page
    assert n * page == S
    rng = torch.Generator().manual_seed(1)
    places = torch.randperm(B * n + 3, generator=rng)[: B * n]  # three pages stay unused

    def pages(x: Tensor) -> Tensor:
        scattered = x.new_full((B * n + 3, page, H_kv, x.shape[3]), torch.nan)
        scattered[places] = x.transpose(1, 2).reshape(B * n, page, H_kv, x.shape[3])
        return scattered

    table = places.int().view(B, n).clone()
    used = (call.lengths.view(B, 1) + page - 1) // page
    table[torch.arange(n) >= used] = -7  # never read
    return attnfast.decode_attention(
        call.q,
        pages(call.k),
        pages(call.v),
        call.lengths,
        page_table=table,
        backend=backend,
        **call.options,
    )


WAYS = {"contiguous": decode, "paged": decode_paged}
