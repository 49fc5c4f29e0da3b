"""The table of named cases, and how to run one through the public functions.

Every backend goes through `CASES`, forward and all gradients. A case that found a bug stays.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from accuracy import STATISTICS, Results, differentiate, with_leaves
from dense import Cotangents, Trial
from torch import Tensor

import attnfast
from attnfast import BlockMask, dispatch
from attnfast.block_index import with_dense_mask
from attnfast.call import BLOCK_FIELDS, Inputs, Options, Outputs
from attnfast.functional import attention_problem

fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (fp32, bf16, fp16)
LENGTHS = (1, 2, 7, 63, 64, 65, 127, 128, 129, 300)
HEAD_DIMS = (1, 8, 40, 64, 80, 96, 128, 192, 256, 512)
WEIGHTS = {"none": 0, "mean": 1, "per head": 2}


@dataclass(frozen=True)
class Case:
    """A call of `attention`, or with lengths of `varlen_attention`, on random tensors.

    ``mask`` and ``bias`` name the dimensions of (b, h, t, s) that are not broadcast: "bs" is a
    padding mask (B, 1, 1, S). ``indices`` is how many keys each query lists, some of them twice and
    some -1, for all key heads or ``apart``. ``grads`` are the outputs in the loss.
    """

    name: str = ""
    B: int = 2
    H: int = 2
    H_kv: int = 2
    T: int = 65
    S: int = 129
    D: int = 16
    D_v: int = 0  # 0: D
    dtype: torch.dtype = fp32
    lengths: tuple[tuple[int, int], ...] = ()  # varlen: (T, S) of each sequence
    scale: float | None = None
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    align: int | str = 0  # an offset, "bottom_right" or "tensor"
    softcap: float = 0.0
    alibi: str = ""  # "h" or "bh"
    sinks: bool = False
    mask: str | None = None
    blocks: str = ""  # a BlockMask's pattern, and its block size: "documents 64"
    bias: str | None = None
    bias_dtype: torch.dtype | None = None  # None: dtype
    masking_bias: bool = False  # some entries of the bias are -inf
    # What the others are then, unless 0; q and k are whole, so that no score is rounded.
    constant: float = field(default=0.0, repr=False)
    dropout_p: float = 0.0
    weights: str = "none"
    stats: int = 0
    grads: tuple[str, ...] = ("out",)
    spread: float = 1.0  # standard deviation of q and k
    indices: int = field(default=0, repr=False)
    apart: bool = field(default=False, repr=False)
    windows: tuple[tuple[int, int], ...] = field(default=(), repr=False)  # heads take them in turn

    def __str__(self) -> str:
        """The test id: shape, dtype, and every field that is not at its default."""
        heads = f"H{self.H}" if self.H_kv == self.H else f"H{self.H}:{self.H_kv}"
        T, S = "+".join(str(t) for t, _ in self.lengths), "+".join(str(s) for _, s in self.lengths)
        shape = f"T{T}-S{S}" if self.lengths else f"B{self.B}-T{self.T}-S{self.S}"
        D = f"D{self.D}:{self.D_v}" if self.D_v else f"D{self.D}"
        return "-".join(
            x for x in (self.name, shape, heads, D, str(self.dtype).removeprefix("torch.")) if x
        )


def problem(case: Case) -> Trial:
    """The case's tensors: the same every time, in every process."""
    rng = torch.Generator().manual_seed(zlib.crc32(repr(case).encode()))

    def normal(*shape: int, dtype: torch.dtype = case.dtype, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=rng) * std).to(dtype)

    B, H, D_v = len(case.lengths) if case.lengths else case.B, case.H, case.D_v or case.D
    T, S = case.T, case.S
    varlen: dict[str, Tensor] = {}
    if case.lengths:
        T, S = (max(lengths) for lengths in zip(*case.lengths, strict=True))
        varlen = {
            f"cu_seqlens_{side}": torch.tensor([0, *lengths]).cumsum(0).int()
            for side, lengths in zip("qk", zip(*case.lengths, strict=True), strict=True)
        }
        rows, keys = (int(x[-1]) for x in varlen.values())
        q = normal(rows, H, case.D, std=case.spread).transpose(0, 1).unsqueeze(0)
        k = normal(keys, case.H_kv, case.D, std=case.spread).transpose(0, 1).unsqueeze(0)
        v = normal(keys, case.H_kv, D_v).transpose(0, 1).unsqueeze(0)
    else:
        q = normal(B, H, T, case.D, std=case.spread)
        k = normal(B, case.H_kv, S, case.D, std=case.spread)
        v = normal(B, case.H_kv, S, D_v)

    def broadcast(dims: str) -> tuple[int, ...]:
        return tuple(n if d in dims else 1 for d, n in zip("bhts", (B, H, T, S), strict=True))

    mask = bias = None
    if case.mask is not None:
        mask = torch.rand(broadcast(case.mask), generator=rng) < 0.7
        mask[-1:, -1:, :1] = False  # rows without keys; of a padding mask, a whole entry
    if case.bias is not None:
        bias = normal(*broadcast(case.bias), dtype=case.bias_dtype or case.dtype)
        if case.masking_bias:
            bias[torch.rand(bias.shape, generator=rng) < 0.3] = -torch.inf
            bias[:1, :1, -1:] = -torch.inf
    if case.constant and bias is not None:
        q, k = q.round(), k.round()
        bias[bias > -torch.inf] = case.constant
    indices = None
    if case.indices:
        lists = (B, case.H_kv if case.apart else 1, T, case.indices)
        indices = torch.randint(-1, S, lists, generator=rng).int()
        indices[-1:, :, -1:] = -1  # a query without keys
    windows = None
    if case.windows:
        windows = torch.tensor([case.windows[h % len(case.windows)] for h in range(H)]).int()
    blocks = block_mask(case.blocks, B, H, T, S, rng) if case.blocks else None
    alibi = torch.rand(B if "b" in case.alibi else 1, H, generator=rng) if case.alibi else None
    inputs = Inputs(
        q,
        k,
        v,
        mask,
        bias,
        alibi,
        normal(H) if case.sinks else None,
        torch.randint(-9, 40, (B,), generator=rng).int() if case.align == "tensor" else None,
        torch.tensor([2**40 + 12345, 77]) if case.dropout_p > 0 else None,
        indices=indices,
        windows=windows,
        **varlen,
        **({} if blocks is None else tensors_of(blocks)),
    )
    options = Options(
        scale=case.D**-0.5 if case.scale is None else case.scale,
        causal=case.causal,
        window_left=case.window[0],
        window_right=case.window[1],
        align_offset=case.align if isinstance(case.align, int) else 0,
        align_bottom_right=case.align == "bottom_right",
        softcap=case.softcap,
        dropout_p=case.dropout_p,
        weights=WEIGHTS[case.weights],
        stats=case.stats,
        max_seqlen_q=T if case.lengths else 0,
        max_seqlen_k=S if case.lengths else 0,
    )
    rows = q.shape[:3]
    matrix = (B, H, T, S) if case.weights == "per head" else (B, T, S)
    shapes = {"out": (*rows, D_v), "lse": rows, "entropy": rows, "weights": matrix}
    dtypes = {"lse": fp32, "entropy": fp32}
    cotangents = Cotangents(
        **{name: normal(*shapes[name], dtype=dtypes.get(name, case.dtype)) for name in case.grads}
    )
    return Trial(inputs, options, cotangents)


def refusal(problem: Trial, backend: str) -> str | None:
    """Why a backend does not run a problem, or None."""
    return dispatch.refusal(backend, attention_problem(_leaves(problem)[0], problem.options))


def run(problem: Trial, backend: str, **overrides: Any) -> Results:
    """All results of a problem through `attnfast.attention` or `varlen_attention`."""
    inputs, leaves = _leaves(problem)
    return differentiate(outputs(inputs, problem.options, backend, **overrides), leaves, problem)


def _leaves(problem: Trial) -> tuple[Inputs, dict[str, Tensor]]:
    """Inputs that want gradients where there are cotangents, and these by name."""
    wanted = any(x is not None for x in problem.cotangents)
    return with_leaves(problem.inputs) if wanted else (problem.inputs, {})


def outputs(inputs: Inputs, options: Options, backend: str, **overrides: Any) -> Outputs:
    """The public function's results as `Outputs`, 4-D for varlen too."""
    arguments = arguments_of(inputs, options) | {"backend": backend} | overrides
    if inputs.cu_seqlens_q is None:
        returned = attnfast.attention(inputs.q, inputs.k, inputs.v, **arguments)
    else:
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (inputs.q, inputs.k, inputs.v))
        returned = attnfast.varlen_attention(
            q,
            k,
            v,
            inputs.cu_seqlens_q,
            inputs.cu_seqlens_k,
            options.max_seqlen_q,
            options.max_seqlen_k,
            **arguments,
        )
    rest = iter(returned)
    out, lse = next(rest), next(rest)
    stats = next(rest) if options.stats else None
    weights = next(rest) if options.weights else None
    received = stats.received if stats is not None and options.stats == 2 else None
    table = None
    if stats is not None:
        assert stats.lse is lse
        table = torch.stack([getattr(stats, name) for name in STATISTICS])
    if inputs.cu_seqlens_q is not None:
        out, lse = out.transpose(0, 1).unsqueeze(0), lse.unsqueeze(0)
        table = None if table is None else table.unsqueeze(1)
        received = None if received is None else received.unsqueeze(0)
    return Outputs(out, lse, None, table, received, weights)


def arguments_of(inputs: Inputs, options: Options) -> dict[str, Any]:
    """The keyword arguments of `attention` for these options; the lse is always returned."""
    align: Tensor | int | str = options.align_offset
    if inputs.align is not None:
        align = inputs.align
    elif options.align_bottom_right:
        align = "bottom_right"
    slopes = inputs.alibi_slopes
    left, right = options.window_left, options.window_right
    pair = (None if left < 0 else left, None if right < 0 else right)
    indices = inputs.indices
    if indices is not None and indices.shape[1] < inputs.k.shape[1]:
        indices = indices[:, 0]
    chosen = {} if indices is None else {"indices": indices}
    mask: Tensor | BlockMask | None = inputs.mask
    if inputs.block_starts is not None and inputs.block_bits is not None:
        sizes = (inputs.q.shape[2], inputs.k.shape[2])
        if inputs.cu_seqlens_q is not None:
            sizes = (options.max_seqlen_q, options.max_seqlen_k)
        in_bool = with_dense_mask(inputs, *sizes).mask
        assert in_bool is not None
        mask = BlockMask.from_mask(in_bool, inputs.block_bits.shape[1])
    return {
        "mask": mask,
        "bias": inputs.bias,
        "causal": options.causal,
        "window": pair if inputs.windows is None else inputs.windows,
        "align": align,
        "scale": options.scale,
        "softcap": options.softcap or None,
        "alibi_slopes": slopes[0] if slopes is not None and len(slopes) == 1 else slopes,
        "sinks": inputs.sinks,
        **chosen,
        "dropout_p": options.dropout_p,
        "dropout_seed": inputs.dropout_seed,
        "return_lse": True,
        "return_stats": (False, True, "received")[options.stats],
        "return_weights": (False, "mean", True)[options.weights],
    }


def block_mask(text: str, B: int, H: int, T: int, S: int, rng: torch.Generator) -> BlockMask:
    """A BlockMask of a pattern, with the size of its blocks."""
    pattern, size = text.split()
    n = int(size)

    def drawn(most: int, *shape: int) -> Tensor:
        return torch.randint(most, shape, generator=rng)

    makers: dict[str, Callable[[], BlockMask]] = {
        "blocks": lambda: BlockMask.from_mask(_in_blocks(B, H, T, S, n, rng), n),
        "heads": lambda: BlockMask.from_mask(_in_blocks(1, H, T, S, n, rng), n),
        "full": lambda: BlockMask.from_mask(torch.ones(T, S, dtype=torch.bool), n),
        "empty": lambda: BlockMask.nothing((1, 1, T, S), n),
        "mod": lambda: BlockMask.from_mask_mod(
            lambda b, h, q, k: (q + b >= k) & ((q - k) % (h + 2) == 0), B, H, T, S, block_size=n
        ),
        "documents": lambda: BlockMask.from_documents(
            (drawn(4, B, T) - 1).sort(1).values, (drawn(4, B, S) - 1).sort(1).values, n
        ),
        "cu_seqlens": lambda: BlockMask.from_cu_seqlens(
            torch.tensor([0, T // 3, T // 3, T]), torch.tensor([0, S // 2, S - 5, S]), n
        ),
        "prefix": lambda: BlockMask.prefix(drawn(S, B), T, S, n),
        "strided": lambda: BlockMask.strided(T, S, 7, 2, block_size=n),
        "tree": lambda: BlockMask.from_tree(
            torch.stack([drawn(i, B) if i else -torch.ones(B).long() for i in range(T)], 1), n
        ),
        "graph": lambda: BlockMask.from_graph(
            torch.stack((drawn(T, 2 * T), drawn(S, 2 * T))), T, S, n
        ),
        "algebra": lambda: (
            BlockMask.prefix(drawn(S, B), T, S, n) & ~BlockMask.strided(T, S, 5, block_size=n)
            | BlockMask.from_mask(_in_blocks(1, H, T, S, n, rng), n)
        ),
    }
    return makers[pattern]()


def _in_blocks(B: int, H: int, T: int, S: int, n: int, rng: torch.Generator) -> Tensor:
    """A mask in whose blocks nothing, something or everything is attended."""
    level = torch.rand(B, H, -(-T // n), -(-S // n), generator=rng)
    level = level.repeat_interleave(n, 2).repeat_interleave(n, 3)[:, :, :T, :S]
    some = torch.rand(B, H, T, S, generator=rng) < 0.5
    mask: Tensor = (level < 0.3) | ((level < 0.7) & some)
    return mask


def tensors_of(mask: BlockMask) -> dict[str, Tensor]:
    """The fields of `Inputs` that it fills."""
    return dict(zip(BLOCK_FIELDS, (mask.starts, mask.index, mask.bits), strict=True))


def _lengths() -> Iterator[Case]:
    """Every T with every S, the ways of masking taken in turn."""
    ways: tuple[dict[str, Any], ...] = (
        {},
        {"causal": True},
        {"causal": True, "align": "bottom_right", "name": "bottom_right"},
        {"window": (40, 9), "name": "window"},
        {"causal": True, "window": (70, -1), "align": "bottom_right", "name": "sliding"},
    )
    for i, (T, S) in enumerate(product(LENGTHS, LENGTHS)):
        way = {"name": "causal" if "causal" in ways[i % 5] else ""} | ways[i % 5]
        for j, dtype in enumerate(DTYPES):
            if dtype == fp32 or i % 3 == j:
                yield Case(B=1, H_kv=1, T=T, S=S, dtype=dtype, **way)
    for dtype in DTYPES:
        for T, S in ((448, 448), (192, 704), (704, 192), (1, 1088), (520, 1)):
            yield Case("long", B=1, T=T, S=S, D=64, dtype=dtype, causal=T >= S)


def _head_dims() -> Iterator[Case]:
    for (i, D), dtype in product(enumerate(HEAD_DIMS), DTYPES):
        yield Case(T=66, S=66, D=D, dtype=dtype, causal=i % 2 == 0, B=1)
        yield Case(T=17, S=70, D=D, D_v=HEAD_DIMS[-1 - i], dtype=dtype, B=1)
    yield from (Case(T=5, S=7, D=D, D_v=67 - D) for D in (3, 17, 33, 57))


EVERYTHING = Case(
    "everything",
    H=6,
    H_kv=2,
    D=40,
    D_v=24,
    scale=0.2,
    causal=True,
    window=(90, 3),
    align="bottom_right",
    softcap=3.0,
    alibi="bh",
    sinks=True,
    mask="bs",
    bias="hts",
    masking_bias=True,
    dropout_p=0.2,
    weights="per head",
    stats=2,
    grads=("out", "lse", "entropy", "weights"),
)

OPTIONS: tuple[Case, ...] = (
    Case("causal", causal=True),
    Case("causal_wide", causal=True, T=129, S=65),
    Case("bottom_right", causal=True, align="bottom_right"),
    Case("bottom_right_wide", causal=True, align="bottom_right", T=129, S=65),
    Case("align5", causal=True, align=5),
    Case("align-7", causal=True, align=-7),
    Case("align64", causal=True, align=64),
    Case("align_tensor", causal=True, align="tensor", B=4),
    Case("align_window", window=(20, 10), align="tensor", B=4),
    Case("window_left", window=(16, -1)),
    Case("window_right", window=(-1, 16)),
    Case("window", window=(8, 24)),
    Case("window_self", window=(0, 0)),
    Case("window_causal", window=(30, 8), causal=True),
    Case("window_bottom_right", window=(12, 5), align="bottom_right"),
    Case("window_outside", window=(3, 0), align=140),
    Case("far_ahead", window=(2**29 + 20, 2**31 - 1), align=2**29),
    Case("far_behind", window=(2**31 - 1, 2**29 + 9), align=-(2**29)),
    Case("scale", scale=0.37),
    Case("scale_negative", scale=-0.2),
    Case("scale_zero", scale=0.0),
    Case("softcap", softcap=2.0),
    Case("softcap_tight", softcap=0.5, spread=2.0, causal=True),
    Case("softcap_50", softcap=50.0, spread=3.0),
    Case("alibi", alibi="h"),
    Case("alibi_batch", alibi="bh", causal=True, align="bottom_right"),
    Case("sinks", sinks=True),
    Case("sinks_all_grads", sinks=True, stats=1, grads=("out", "lse", "entropy")),
    Case("sinks_empty_rows", sinks=True, mask="bts", grads=("out", "lse")),
    Case("mask_padding", mask="bs"),
    Case("mask_full", mask="bhts"),
    Case("mask_matrix", mask="ts"),
    Case("mask_rows", mask="bt"),
    Case("mask_heads", mask="hs"),
    Case("mask_one", mask=""),
    Case("mask_causal", mask="bs", causal=True),
    Case("blocks", blocks="blocks 64", T=200, S=333, D=64),
    Case("blocks_wide", B=1, H=2, H_kv=1, blocks="blocks 64", T=130, S=150, D=192, D_v=160,
         causal=True),
    Case("blocks_128", blocks="blocks 128", T=300, S=200, causal=True, align="bottom_right"),
    Case("blocks_heads", blocks="heads 64", T=130, S=150, H=6, H_kv=2, sinks=True, bias="hts",
         grads=("out", "lse")),
    Case("blocks_full", blocks="full 64", T=130, S=129, stats=2),
    Case("blocks_empty", blocks="empty 64", stats=2, weights="mean", grads=("out", "lse")),
    Case("blocks_mod", blocks="mod 64", T=129, S=200, window=(90, 20), softcap=2.0, alibi="h"),
    Case("blocks_documents", blocks="documents 64", T=200, S=200, weights="per head", stats=2,
         grads=("out", "lse", "entropy", "weights")),
    Case("blocks_cu_seqlens", blocks="cu_seqlens 128", T=300, S=270, causal=True, dropout_p=0.2),
    Case("blocks_prefix", blocks="prefix 128", T=129, S=300, weights="mean", H=4, H_kv=2,
         grads=("out", "weights")),
    Case("blocks_strided", blocks="strided 64", T=200, S=200, causal=True),
    Case("blocks_tree", blocks="tree 64", T=65, S=65),
    Case("blocks_graph", blocks="graph 128", T=150, S=260, stats=1, sinks=True),
    Case("blocks_algebra", blocks="algebra 64", T=140, S=190, D=40),
    Case("blocks_large", blocks="blocks 64", spread=30.0, T=130, S=200, stats=2, weights="per head",
         grads=("out", "lse", "weights")),
    Case("blocks_varlen", blocks="blocks 64", lengths=((5, 70), (130, 5), (66, 200)), stats=2,
         causal=True, align="bottom_right", weights="mean", grads=("out", "lse", "weights")),
    Case("bias_masking", bias="bhts", masking_bias=True),
    Case("bias_masking_heads", bias="h", masking_bias=True),
    Case("bias_mask", bias="hts", mask="bs", causal=True),
    Case("bias_softcap", bias="bhts", softcap=1.5),
    Case("bias_gqa", bias="ts", H=6, H_kv=2),
    Case("constant_low", bias="ts", constant=-(2.0**20), bias_dtype=fp32, weights="per head",
         stats=2, grads=("out", "lse", "entropy", "weights")),
    Case("constant_high", bias="bt", constant=2.0**20, bias_dtype=fp32, causal=True, H=6, H_kv=2,
         stats=2, weights="mean", grads=("out", "entropy", "weights"), masking_bias=True),
    Case("constant_dropout", bias="hs", constant=-(2.0**20), bias_dtype=fp32, window=(40, 9),
         align="bottom_right", sinks=True, alibi="", dropout_p=0.2, D=64, scale=0.125),
    Case("constant_varlen", lengths=((5, 70), (70, 5), (66, 67)), bias="ts", constant=-(2.0**20),
         bias_dtype=fp32, stats=2, causal=True, grads=("out", "lse", "entropy")),
    Case("large", spread=30.0, stats=2, weights="per head", grads=("out", "lse", "weights")),
    Case("large_causal", spread=30.0, D=64, causal=True, T=129),
    Case("large_decode", spread=30.0, D=64, T=1, S=300, H=4, H_kv=2, sinks=True),
    Case("dropout", dropout_p=0.3),
    Case("dropout_tiny", dropout_p=1e-6),
    Case("dropout_most", dropout_p=0.9, causal=True),
    Case("dropout_all", dropout_p=1.0, weights="per head", grads=("out", "weights")),
    Case("dropout_all_grads", dropout_p=0.4, stats=1, weights="mean",
         grads=("out", "lse", "entropy", "weights"), H=4),
    Case("weights", weights="per head", grads=("out", "weights")),
    Case("weights_only", weights="per head", grads=("weights",), mask="bts"),
    Case("weights_mean", weights="mean", grads=("out", "weights"), H=3, H_kv=3),
    Case("weights_mean_gqa", weights="mean", grads=("weights",), H=6, H_kv=2, causal=True),
    Case("weights_empty", weights="per head", window=(3, 0), align=140, grads=("out", "weights")),
    Case("stats", stats=1, causal=True),
    Case("stats_empty_rows", stats=2, mask="bts", grads=("out", "lse", "entropy")),
    Case("stats_reach", stats=1, align="tensor", window=(20, -1)),
    Case("received", stats=2),
    Case("received_gqa", stats=2, H=6, H_kv=2, causal=True, align="bottom_right"),
    Case("grad_lse", grads=("lse",)),
    Case("grad_entropy", stats=1, grads=("entropy",)),
    Case("grad_entropy_bias", stats=1, grads=("entropy",), bias="bhts", softcap=2.0),
    Case("grad_out_lse", grads=("out", "lse"), causal=True),
    Case("forward_only", grads=(), stats=2, weights="mean"),
    Case("gqa", H=6, H_kv=2, causal=True),
    Case("mqa", H=5, H_kv=1),
    Case("mqa_bias_sinks", H=4, H_kv=1, bias="hs", sinks=True, grads=("out", "lse")),
    Case("batch", B=5, H=3, H_kv=3, T=9, S=11),
    Case("varlen", lengths=((3, 3), (70, 70), (1, 1), (65, 65))),
    Case("varlen_causal", lengths=((30, 100), (100, 30), (7, 7)), causal=True),
    Case("varlen_empty", lengths=((0, 5), (33, 0), (0, 0), (20, 40), (0, 0)), sinks=True),
    Case("varlen_right", lengths=((5, 70), (70, 5), (66, 67)), causal=True, align="bottom_right"),
    Case("varlen_everything", lengths=((5, 70), (70, 5), (66, 67)), **{
        name: getattr(EVERYTHING, name)
        for name in ("H", "H_kv", "causal", "window", "align", "softcap", "alibi", "sinks", "bias",
                     "masking_bias", "dropout_p", "weights", "stats", "grads")}),
    Case("indices", indices=200, T=5, S=100),
    Case("indices_apart", indices=40, T=7, apart=True, H=6, grads=("out", "lse")),
    Case("indices_causal", indices=50, B=1, T=19, S=33, causal=True, H=4, H_kv=1, D=64, D_v=40),
    Case("indices_everything", indices=90, T=8, apart=True, H=6, H_kv=2, D=40, D_v=24, scale=0.2,
         causal=True, window=(90, 3), align="bottom_right", softcap=3.0, sinks=True, stats=1,
         grads=("out", "lse", "entropy")),
    Case("indices_sinks", indices=3, T=21, S=50, sinks=True, align="tensor", window=(20, 40),
         H=20, H_kv=1),
    Case("indices_large", indices=70, B=1, T=11, spread=30.0, stats=1, D=64, H=4,
         grads=("out", "lse")),
    Case("indices_decode", indices=200, T=1, S=300, B=3, H=40, H_kv=1, D=72, D_v=64),
    Case("windows", windows=((16, -1), (-1, 9), (8, 24), (-1, -1)), H=4),
    Case("windows_causal", windows=((40, 3), (0, 0), (-1, -1)), causal=True, H=6, T=129),
    Case("windows_long", windows=((70, 0), (-1, -1), (3, 2), (130, 64)), B=1, H=4, T=300, S=330,
         align="bottom_right", D=64, D_v=40, sinks=True, grads=("out", "lse")),
    Case("windows_far", windows=((2**29 + 20, 2**31 - 1), (2**29 - 5, -1)), align=2**29),
    Case("windows_outside", windows=((3, 0), (300, 0)), align=140, stats=2, weights="per head",
         grads=("out", "lse", "weights")),
    Case("windows_padding", windows=((9, -1), (20, 0), (-1, 5), (0, 30)), H=4, mask="bs",
         align="tensor", dropout_p=0.2, weights="mean", stats=1,
         grads=("out", "entropy", "weights")),
    Case("windows_bias", windows=((9, -1), (20, 0), (-1, 5)), H=3, H_kv=1, bias="ts", alibi="bh",
         softcap=2.0, causal=True),
    Case("windows_blocks", windows=((90, 20), (5, -1)), blocks="blocks 64", T=129, S=200),
    Case("windows_varlen", windows=((9, 0), (-1, -1), (64, 3), (20, 5)), H=4,
         lengths=((5, 70), (130, 9), (66, 67)), causal=True, align="bottom_right", stats=2,
         weights="per head", grads=("out", "lse", "entropy", "weights")),
    EVERYTHING,
    replace(EVERYTHING, name="everything_windows", window=(-1, -1),
            windows=((90, 3), (20, 0), (-1, 9), (0, -1))),
    replace(EVERYTHING, name="everything_mean", weights="mean", align="tensor", dropout_p=0.0),
    replace(EVERYTHING, name="everything_long", T=300, S=192, D=64, D_v=64, B=1, H=2, H_kv=1),
)  # fmt: skip


def _options() -> Iterator[Case]:
    for case, dtype in product(OPTIONS, DTYPES):
        yield replace(case, dtype=dtype)
    for dims in product(("", "b"), ("", "h"), ("", "t"), ("", "s")):
        kept = "".join(dims)
        yield Case(f"bias_{kept or 'one'}", bias=kept, B=3, T=20, S=70)
        yield Case(f"bias_{kept or 'one'}_causal", bias=kept, T=70, S=66, dtype=bf16, causal=True)
    for dtype, bias_dtype in product(DTYPES, (fp32, bf16, fp16, torch.float64)):
        if dtype != bias_dtype:
            name = f"bias_{str(bias_dtype).removeprefix('torch.')}"
            yield Case(name, bias="hts", bias_dtype=bias_dtype, dtype=dtype)


CASES: tuple[Case, ...] = (*_lengths(), *_head_dims(), *_options())
