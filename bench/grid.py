"""The grid: which problems are timed, and how much work each of them is.

Every row belongs to a suite, and every suite has four sizes: "quick", which `make bench` runs, as
much of it as fits into its minutes, so that its rows come in order of value; "full", which also
holds the long contexts; "smoke", tiny rows that show that everything works; and "gpu",
"full" with the shapes that papers compare GPU kernels at.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPE_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
MEASURED_DTYPES = ("float32", "bfloat16")
SIZES = ("smoke", "quick", "full", "gpu")
WORKS = ("forward", "backward", "forward+backward")
DROPOUT_P = 0.1
PAGE = 64  # slots of a page, in the decode suite
WINDOW = 128  # keys to the left, of the "window" option

Shape = tuple[int, int, int, int, int]  # B, H, T, S, D

CORE: tuple[Shape, ...] = (
    (1, 8, 128, 128, 64),
    (32, 8, 64, 64, 64),
    (8, 12, 512, 512, 64),
    (2, 16, 1024, 1024, 64),
    (1, 16, 4096, 4096, 64),
    (1, 16, 4096, 4096, 128),
)
MODELS: tuple[Shape, ...] = (
    (512, 4, 64, 64, 16),  # recommender
    (8, 12, 197, 197, 64),  # ViT-B/16, 224 pixels
    (4, 12, 577, 577, 64),  # ViT-B/16, 384 pixels
    (3, 5, 333, 333, 40),  # odd sizes
    (4, 8, 1, 1000, 80),
    (2, 8, 300, 1000, 96),
    (4, 8, 512, 512, 32),
    (1, 8, 1024, 1024, 192),
    (1, 8, 1024, 1024, 256),
)
LONG: tuple[Shape, ...] = (
    (1, 8, 8192, 8192, 64),
    (1, 8, 8192, 8192, 128),
    (1, 2, 32768, 32768, 128),
    (1, 1, 131072, 131072, 64),
)
# 16k tokens of width 2048, as in the FlashAttention-2 and -3 papers (arXiv:2307.08691, 2407.08608)
PAPERS: tuple[Shape, ...] = tuple(
    (16384 // length, 2048 // D, length, length, D)
    for length in (4096, 16384, 1024, 512)
    for D in (128, 64)
)
SMOKE: tuple[Shape, ...] = ((1, 2, 32, 32, 64), (2, 3, 33, 40, 40))

# What may be asked of `attention` beside causal, each with a rival that gives the same without us.
OPTIONS = (
    "mask",
    "bias",
    "dropout",
    "window",
    "gqa",
    "softcap",
    "alibi",
    "sinks",
    "weights",
    "mean weights",
    "statistics",
)
OPTION_SHAPES: dict[str, tuple[Shape, ...]] = {
    "smoke": ((2, 4, 48, 48, 16),),
    "quick": ((2, 12, 512, 512, 64),),
    "full": ((8, 12, 128, 128, 64), (4, 12, 512, 512, 64), (1, 16, 2048, 2048, 64)),
}

# B, H, H_kv, S, D; one new token
DECODE: dict[str, tuple[tuple[int, int, int, int, int], ...]] = {
    "smoke": ((2, 4, 2, 40, 16),),
    "quick": (
        (1, 8, 8, 128, 64),
        (8, 12, 12, 512, 64),
        (1, 32, 8, 4096, 128),
        (16, 32, 8, 1024, 128),
        (1, 8, 1, 32768, 128),
    ),
}
DECODE["full"] = (*DECODE["quick"], (64, 32, 8, 1024, 128), (1, 32, 8, 131072, 128))

# name, H, D, lengths
VARLEN: dict[str, tuple[tuple[str, int, int, tuple[int, ...]], ...]] = {
    "smoke": (("tiny", 2, 16, (5, 9, 1)),),
    "quick": (
        ("sentences", 12, 64, tuple(8 + 7 * i % 121 for i in range(32))),
        ("documents", 12, 64, (1024, 512, 256, 128, 64, 32, 16, 16)),
    ),
}
VARLEN["full"] = (*VARLEN["quick"], ("pages", 16, 128, (4096, 1024, 1024, 512, 256)))

# pattern, its size, H, H_kv, T, S, D; "blocks" of 128, so many percent of them
SPARSE: dict[str, tuple[tuple[str, int, int, int, int, int, int], ...]] = {
    "smoke": (("window", 20, 2, 2, 150, 150, 16), ("chosen", 9, 4, 2, 30, 40, 16)),
    "quick": (
        ("window", 1024, 4, 4, 8192, 8192, 64),
        ("documents", 512, 4, 4, 8192, 8192, 64),
        ("tree", 64, 32, 8, 64, 8192, 128),
        ("blocks", 10, 4, 4, 8192, 8192, 64),
        ("chosen", 2048, 16, 1, 512, 32768, 64),
    ),
}
SPARSE["full"] = (
    *SPARSE["quick"],
    ("blocks", 25, 4, 4, 8192, 8192, 64),
    ("blocks", 50, 4, 4, 8192, 8192, 64),
    ("window", 1024, 4, 4, 32768, 32768, 64),
)

# name, B, T, E, H
_LAYERS = (
    ("BERT-base", 8, 128, 768, 12),
    ("ViT-B/16", 8, 197, 768, 12),
    ("MiniLM", 32, 64, 384, 12),  # of the search demo
    ("translation", 64, 32, 256, 8),  # of the translation demo
    ("small", 4, 32, 128, 4),
)
LAYERS: dict[str, tuple[tuple[str, int, int, int, int], ...]] = {
    "smoke": (("tiny", 2, 16, 64, 4),),
    "quick": _LAYERS,
    "full": (*_LAYERS, ("GPT-2", 2, 1024, 768, 12)),
}
ENCODER_LAYERS = 2


class AttentionCase(NamedTuple):
    """One row of the attention suites: sizes as in docs/glossary.md, and what is computed."""

    B: int
    H: int
    T: int
    S: int
    D: int
    dtype: str
    causal: bool
    work: str  # one of WORKS
    option: str = ""  # one of OPTIONS, or none

    @property
    def suite(self) -> str:
        """The suite's name."""
        return "options" if self.option else self.work

    @property
    def H_kv(self) -> int:
        """Heads of keys and values: a quarter with "gqa"."""
        return max(1, self.H // 4) if self.option == "gqa" else self.H

    def __str__(self) -> str:
        """The test's id: ``1x8x128x64-causal-float32-forward``."""
        length = self.T if self.T == self.S else f"{self.T}:{self.S}"
        reach = "causal" if self.causal else "full"
        option = f"-{self.option.replace(' ', '_')}" if self.option else ""
        return f"{self.B}x{self.H}x{length}x{self.D}-{reach}{option}-{self.dtype}-{self.work}"

    @property
    def flop(self) -> float:
        """4 B H D for every pair of a query and a key it may attend; 2.5 times that backward.

        The backward pass has five matrix products, one of them the scores again, the forward two.
        """
        factor = {"forward": 1.0, "backward": 2.5, "forward+backward": 3.5}[self.work]
        return 4.0 * self.B * self.H * self.pairs * self.D * factor

    @property
    def pairs(self) -> float:
        """Queries times keys they attend, by causal and window."""
        whole = self.T * self.S
        if self.option == "window":  # causal as well
            return sum(min(t, WINDOW) + 1 for t in range(self.T))
        return whole * (0.5 if self.causal and self.T > 1 else 1.0)

    @property
    def bytes(self) -> float:
        """What has to be read and written once: q, k, v and out; backward, their gradients too."""
        size = DTYPES[self.dtype].itemsize
        rows = self.B * (2 * self.H * self.T + 2 * self.H_kv * self.S) * self.D * size
        factor = {"forward": 1.0, "backward": 2.0, "forward+backward": 3.0}[self.work]
        return rows * factor


class StatisticsCase(AttentionCase):
    """Ours with statistics, whose rival is ours without."""

    def __str__(self) -> str:
        """The row's name, which says so."""
        return f"{super().__str__()}-statistics"


class CallersCase(AttentionCase):
    """Calls of so many Python threads at once, each on tensors of its own, so many times."""

    callers = 8

    def __str__(self) -> str:
        """The row's name, which says so."""
        return f"{self.callers}-callers-{super().__str__()}"

    @property
    def repeats(self) -> int:
        """Of each thread's call: a thread that starts late is nothing beside them."""
        return max(2, min(200, int(1e9 / super().flop)))

    @property
    def flop(self) -> float:
        """Of all calls."""
        return super().flop * self.callers * self.repeats

    @property
    def bytes(self) -> float:
        """Of all calls."""
        return super().bytes * self.callers * self.repeats


class DecodeCase(NamedTuple):
    """One row of the decode suite: one new token per sequence, over a cache."""

    B: int
    H: int
    H_kv: int
    S: int
    D: int
    dtype: str
    paged: bool

    suite = "decode"

    def __str__(self) -> str:
        """The test's id: ``8x32:8x1024x128-paged-bfloat16``."""
        kind = "paged" if self.paged else "contiguous"
        return f"{self.B}x{self.H}:{self.H_kv}x{self.S}x{self.D}-{kind}-{self.dtype}"

    @property
    def flop(self) -> float:
        """4 B H S D."""
        return 4.0 * self.B * self.H * self.S * self.D

    @property
    def bytes(self) -> float:
        """The keys and values, once."""
        return 2.0 * self.B * self.H_kv * self.S * self.D * DTYPES[self.dtype].itemsize


class VarlenCase(NamedTuple):
    """One row of the varlen suite: self-attention of packed sequences."""

    name: str
    H: int
    D: int
    lengths: tuple[int, ...]
    dtype: str
    causal: bool
    work: str

    suite = "varlen"

    def __str__(self) -> str:
        """The test's id: ``documents-8x12x64-causal-float32-forward``."""
        reach = "causal" if self.causal else "full"
        sizes = f"{len(self.lengths)}x{self.H}x{self.D}"
        return f"{self.name}-{sizes}-{reach}-{self.dtype}-{self.work}"

    @property
    def flop(self) -> float:
        """4 H T T D of every sequence, half of it if causal, 3.5 times with the backward pass."""
        pairs = sum(n * n for n in self.lengths) * (0.5 if self.causal else 1)
        return 4.0 * self.H * self.D * pairs * (3.5 if self.work == "forward+backward" else 1)

    @property
    def bytes(self) -> float:
        """q, k, v and out of the tokens there are; with the backward pass three times that."""
        size = DTYPES[self.dtype].itemsize
        rows = 4.0 * sum(self.lengths) * self.H * self.D * size
        return rows * (3 if self.work == "forward+backward" else 1)


class SparseCase(NamedTuple):
    """One row of the sparse suite: keys left out by a pattern, batch of one."""

    pattern: str
    size: int  # of a window, a mean document or a tree; percent of blocks; keys of each query
    H: int
    H_kv: int
    T: int
    S: int
    D: int
    dtype: str
    work: str

    suite = "sparse"

    def __str__(self) -> str:
        """The test's id: ``window-1024-4x8192x64-float32-forward``."""
        heads = f"{self.H}" if self.H_kv == self.H else f"{self.H}:{self.H_kv}"
        length = f"{self.T}" if self.T == self.S else f"{self.T}:{self.S}"
        sizes = f"{heads}x{length}x{self.D}"
        return f"{self.pattern}-{self.size}-{sizes}-{self.dtype}-{self.work}"

    @property
    def flop(self) -> float:
        """4 H D for about every pair that is attended, 3.5 times with the backward pass."""
        pairs = {
            "window": self.T * min(self.size, self.S),
            "documents": self.T * min(self.size, self.S),
            "tree": self.T * self.S,
            "blocks": self.T * self.S * self.size / 100,
            "chosen": self.T * self.size,
        }[self.pattern]
        return 4.0 * self.H * self.D * pairs * (3.5 if self.work == "forward+backward" else 1)

    @property
    def bytes(self) -> float:
        """q, k, v and out, once; with the backward pass three times that."""
        rows = 2.0 * (self.H * self.T + self.H_kv * self.S) * self.D * DTYPES[self.dtype].itemsize
        return rows * (3 if self.work == "forward+backward" else 1)


class LayerCase(NamedTuple):
    """One row of the module suite: self-attention of ``x`` (B, T, E) by a whole layer."""

    layer: str
    B: int
    T: int
    E: int
    H: int
    dtype: str  # of the parameters too
    mode: str  # "eval": forward without gradients; "train": forward and backward
    weights: bool  # need_weights, averaged over heads
    padding: bool  # a key_padding_mask

    suite = "module"

    def __str__(self) -> str:
        """The test's id: ``BERT-base-8x128x768-12-float32-train-weights-padding``."""
        options = [name for name in ("weights", "padding") if getattr(self, name)] or ["plain"]
        sizes = f"{self.B}x{self.T}x{self.E}-{self.H}"
        return "-".join([self.layer, sizes, self.dtype, self.mode, *options])

    @property
    def flop(self) -> float:
        """The projections, 8 B T E^2, and the attention, 4 B T T E; 3 and 3.5 times in training."""
        projections = 8.0 * self.B * self.T * self.E**2
        core = 4.0 * self.B * self.T**2 * self.E
        return 3 * projections + 3.5 * core if self.mode == "train" else projections + core

    @property
    def bytes(self) -> float:
        """Input, output and parameters; three times in training."""
        size = DTYPES[self.dtype].itemsize
        once = (2.0 * self.B * self.T * self.E + 4 * self.E**2) * size
        return once * (3 if self.mode == "train" else 1)


class EncoderCase(NamedTuple):
    """One row of the encoder suite: ``nn.TransformerEncoder`` of ``ENCODER_LAYERS`` layers.

    Feed-forward width 4E, GELU, without dropout, so that results can be compared.
    """

    layer: str
    B: int
    T: int
    E: int
    H: int
    dtype: str  # "bfloat16": autocast in a step, bf16 parameters in inference
    mode: str  # "inference", or "step": forward, backward and AdamW
    padding: bool

    suite = "encoder"

    def __str__(self) -> str:
        """The test's id: ``BERT-base-8x128x768-12-float32-step-padding``."""
        sizes = f"{self.B}x{self.T}x{self.E}-{self.H}"
        end = "padding" if self.padding else "plain"
        return "-".join([self.layer, sizes, self.dtype, self.mode, end])

    @property
    def flop(self) -> float:
        """Per layer 24 B T E^2 for linears, 4 B T T E for attention; 3 and 3.5 times in a step."""
        linears = 24.0 * self.B * self.T * self.E**2
        core = 4.0 * self.B * self.T**2 * self.E
        one = 3 * linears + 3.5 * core if self.mode == "step" else linears + core
        return ENCODER_LAYERS * one

    @property
    def bytes(self) -> float:
        """Activations between the parts of a layer, and parameters; three times in a step."""
        size = DTYPES[self.dtype].itemsize
        one = (12.0 * self.B * self.T * self.E + 12 * self.E**2) * size
        return ENCODER_LAYERS * one * (3 if self.mode == "step" else 1)


class WatchedCase(EncoderCase):
    """A step of our encoder under `lens.observe`, whose rival is the step without.

    ``layer`` is what is collected: "statistics", or "shares" too.
    """

    def __str__(self) -> str:
        """The row's name, which says so."""
        return f"observed-{super().__str__()}"


Case = AttentionCase | DecodeCase | VarlenCase | SparseCase | LayerCase | EncoderCase


def describe(case: Case) -> dict[str, Any]:
    """A case as a row of results holds it."""
    fields = case._asdict()
    if isinstance(case, AttentionCase):
        fields["H_kv"] = case.H_kv
    return {
        "id": str(case),
        "suite": case.suite,
        "case": fields,
        "flop": float(case.flop),
        "bytes": float(case.bytes),
    }


def padding_mask(B: int, T: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """(B, T), True = padding: a quarter of the batch, the first sequence full, the last half."""
    lengths = torch.linspace(T, T // 2, B, device=device).long()
    return torch.arange(T, device=device) >= lengths[:, None]


def _of(table: dict[str, Any], size: str) -> Any:
    """A table's entry for a size; "gpu" is "full" where it has none of its own."""
    return table.get(size, table["full"])


def attention_cases(work: str, size: str) -> list[AttentionCase]:
    """One of the suites "forward", "backward" and "forward+backward"."""
    if size == "quick":
        return _quick_attention_cases(work)
    shapes = SMOKE if size == "smoke" else CORE + MODELS + LONG
    if size == "gpu":
        shapes = PAPERS + shapes
    cases = [
        AttentionCase(*shape, dtype, causal, work)
        for dtype, shape, causal in itertools.product(MEASURED_DTYPES, shapes, (False, True))
    ]
    extreme = 131072  # keys: causal and bf16 only, or it takes minutes a call
    return [c for c in cases if extreme > c.S or (c.causal and c.dtype == "bfloat16")]


def _quick_attention_cases(work: str) -> list[AttentionCase]:
    """The core shapes, each larger than the one before; what is left of the time is for models."""
    models = {"forward": MODELS, "forward+backward": MODELS[:2], "backward": ()}[work]
    core = CORE[:4] if work == "backward" else CORE
    return [
        AttentionCase(*shape, dtype, causal, work)
        for shape, dtype, causal in itertools.product(core + models, MEASURED_DTYPES, (True, False))
    ]


def option_cases(size: str) -> list[AttentionCase]:
    """Every option, forward and backward; fp32, "full" also bf16."""
    dtypes = MEASURED_DTYPES[:1] if size in ("smoke", "quick") else MEASURED_DTYPES
    works = ("forward", "forward+backward")
    return [
        AttentionCase(*shape, dtype, option == "window", work, option)
        for dtype, shape, option, work in itertools.product(
            dtypes, _of(OPTION_SHAPES, size), OPTIONS, works
        )
    ]


def decode_cases(size: str) -> list[DecodeCase]:
    """Contiguous and paged caches."""
    grid = itertools.product(MEASURED_DTYPES, _of(DECODE, size), (False, True))
    return [DecodeCase(*shape, dtype, paged) for dtype, shape, paged in grid]


def varlen_cases(size: str) -> list[VarlenCase]:
    """Packed sequences."""
    grid = itertools.product(
        MEASURED_DTYPES, _of(VARLEN, size), (False, True), ("forward", "forward+backward")
    )
    return [VarlenCase(*shape, dtype, causal, work) for dtype, shape, causal, work in grid]


def sparse_cases(size: str) -> list[SparseCase]:
    """Patterns; a tree is for decoding."""
    grid = itertools.product(MEASURED_DTYPES, _of(SPARSE, size), ("forward", "forward+backward"))
    return [
        SparseCase(*shape, dtype, work)
        for dtype, shape, work in grid
        if shape[0] != "tree" or work == "forward"
    ]


def layer_cases(size: str) -> list[LayerCase]:
    """The module suite; weights in fp32 only."""
    grid = itertools.product(
        MEASURED_DTYPES, _of(LAYERS, size), ("eval", "train"), (False, True), (False, True)
    )
    cases = [
        LayerCase(*layer, dtype, mode, weights, padding)
        for dtype, layer, mode, weights, padding in grid
        if dtype == "float32" or not weights
    ]
    return sorted(cases, key=lambda x: (x.weights, *_cheapest(x))) if size == "quick" else cases


def encoder_cases(size: str) -> list[EncoderCase]:
    """The encoder suite."""
    grid = itertools.product(
        MEASURED_DTYPES, _of(LAYERS, size), ("inference", "step"), (False, True)
    )
    cases = [EncoderCase(*layer, dtype, mode, padding) for dtype, layer, mode, padding in grid]
    return sorted(cases, key=_cheapest) if size == "quick" else cases


def _cheapest(case: LayerCase | EncoderCase) -> tuple[bool, int]:
    """The quick order of layers: all of them without padding, the smallest first."""
    return case.padding, case.B * case.T * case.E**2


SUITES: dict[str, Callable[[str], list[Any]]] = {
    "forward": lambda size: attention_cases("forward", size),
    "backward": lambda size: attention_cases("backward", size),
    "forward+backward": lambda size: attention_cases("forward+backward", size),
    "options": option_cases,
    "decode": decode_cases,
    "varlen": varlen_cases,
    "sparse": sparse_cases,
    "module": layer_cases,
    "encoder": encoder_cases,
}
# Of the minutes that a run is given, a suite's part.
MINUTES_SHARE = {
    "forward": 115,
    "backward": 30,
    "forward+backward": 180,
    "options": 60,
    "decode": 35,
    "varlen": 35,
    "sparse": 60,
    "module": 65,
    "encoder": 50,
}
