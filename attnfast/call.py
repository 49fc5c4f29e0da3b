"""What a call consists of: its tensors, its options, its results, and the operators made of them.

Every field of a call stands here once, in the order in which the operators take it. Their schemas
are made from these annotations, and whoever gets an operator's arguments takes them apart here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Annotated, Any, NamedTuple, get_type_hints

from torch import Tensor

Open = Annotated[int, "SymInt"]  # an int that a traced program may leave open


class Inputs(NamedTuple):
    """Every tensor of a call, canonical: 4-D, checked, None where absent.

    Varlen calls have B = 1 here: q is ``(1, H, total_q, D)`` and the sequences lie one after
    another, ``cu_seqlens_q[i]`` to ``cu_seqlens_q[i + 1]``.
    """

    q: Tensor  # (B, H, T, D)
    k: Tensor  # (B, H_kv, S, D)
    v: Tensor  # (B, H_kv, S, D_v)
    mask: Tensor | None = None  # (B|1, H|1, T|1, S|1) bool, True = attend
    bias: Tensor | None = None  # (B|1, H|1, T|1, S|1) float
    alibi_slopes: Tensor | None = None  # (1|B, H) fp32
    sinks: Tensor | None = None  # (H,) float
    align: Tensor | None = None  # (B,) int32: t' = t + align[b]
    dropout_seed: Tensor | None = None  # (2,) int64: seed, offset; (6,): see dropout_mask
    cu_seqlens_q: Tensor | None = None  # (sequences + 1,) int32
    cu_seqlens_k: Tensor | None = None  # (sequences + 1,) int32
    indices: Tensor | None = None  # (B, 1|H_kv, T, K) int32: the keys of each query; -1: none
    windows: Tensor | None = None  # (H, 2) int32: left, right of each head; -1: unbounded
    # A BlockMask, of whose R rows and C columns of blocks see block_mask.py
    block_starts: Tensor | None = None  # (B|1, H|1, 2 R + 1 + 2 C + 1) int32
    block_index: Tensor | None = None  # (4, entries) int32
    block_bits: Tensor | None = None  # (partial blocks, size, size / 32) int32


BLOCK_FIELDS = ("block_starts", "block_index", "block_bits")


# The numbers that change a score alone, with which Options and DecodeOptions begin. A caller gives
# None for what is absent. csrc/params.h has the same list.
SCORE_OPTIONS = ("scale", "softcap")


class Options(NamedTuple):
    """Every option of a call that is not a tensor."""

    scale: float
    softcap: float = 0.0  # 0: none
    causal: bool = False
    window_left: Open = -1  # -1: unbounded, or each head has its own
    window_right: Open = -1  # likewise
    align_offset: Open = 0  # t' = t + align_offset, plus S - T with align_bottom_right
    align_bottom_right: bool = False
    dropout_p: float = 0.0
    weights: int = 0  # 0 none, 1 averaged over heads, 2 per head
    stats: int = 0  # 0 none, 1 per query, 2 also received
    deterministic: bool = False
    max_seqlen_q: Open = 0  # varlen only: the longest sequence
    max_seqlen_k: Open = 0


class Sequences(NamedTuple):
    """What a varlen call has beside the arguments of a dense one, as its caller gives them."""

    cu_seqlens_q: Tensor  # (sequences + 1,)
    cu_seqlens_k: Tensor  # (sequences + 1,)
    max_seqlen_q: int
    max_seqlen_k: int


class Outputs(NamedTuple):
    """What a backend's forward returns; None (or an empty tensor) where not asked for."""

    out: Tensor  # (B, H, T, D_v), the dtype and stride order of q
    lse: Tensor  # (B, H, T) fp32, natural log
    # (2, B, H, T) fp32, for the backward of the same backend, in its own units: a maximum m of the
    # row's scores and log l, apart, because m + log l would lose log l beside a large m
    norm: Tensor | None = None
    stats: Tensor | None = None  # (4, B, H, T) fp32: max_logit, entropy, reach, focus
    received: Tensor | None = None  # (B, H, S) fp32
    weights: Tensor | None = None  # (B, H, T, S) or (B, T, S), the dtype of q


class Upstream(NamedTuple):
    """What a backend's backward receives before the inputs."""

    grad_out: Tensor  # (B, H, T, D_v)
    grad_lse: Tensor | None  # (B, H, T) fp32
    grad_entropy: Tensor | None  # (B, H, T) fp32
    grad_weights: Tensor | None  # the shape of weights
    out: Tensor  # the forward's, as the next two
    norm: Tensor  # (2, B, H, T) fp32; (3, ...), the last unused: of more keys than the call has
    entropy: Tensor | None  # (B, H, T) fp32, with grad_entropy
    need_dbias: bool
    need_dsinks: bool

    @classmethod
    def plain(cls, grad_out: Tensor, out: Tensor, norm: Tensor) -> Upstream:
        """What a backward by ``out`` alone receives, for the gradients of q, k and v."""
        return cls(grad_out, None, None, None, out, norm, None, False, False)


class Gradients(NamedTuple):
    """What a backend's backward returns; dbias and dsinks None (or empty) where not wanted."""

    dq: Tensor  # the shape, dtype and stride order of q, as the others of their inputs
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None
    dsinks: Tensor | None


class DecodeInputs(NamedTuple):
    """Every tensor of a decode call."""

    q: Tensor  # (B, H, T, D)
    k_cache: Tensor  # (B, H_kv, S, D), or pages (P, page, H_kv, D)
    v_cache: Tensor  # (B, H_kv, S, D_v), or pages (P, page, H_kv, D_v)
    cache_seqlens: Tensor  # (B,) int32
    page_table: Tensor | None = None  # (B, n) int32
    bias: Tensor | None = None  # (B|1, H|1, T|1, S|1) float
    alibi_slopes: Tensor | None = None  # (1|B, H) fp32
    sinks: Tensor | None = None  # (H,) float
    mask: Tensor | None = None  # (B|1, H|1, T|1, T|1) bool, of the last T keys
    windows: Tensor | None = None  # (H, 2) int32: left, right of each head; -1: unbounded

    def as_inputs(self, k: Tensor, v: Tensor, align: Tensor | None = None) -> Inputs:
        """Those of a call without a cache and mask, of keys and values ``(B, H_kv, S, D)``."""
        return Inputs(
            self.q,
            k,
            v,
            bias=self.bias,
            alibi_slopes=self.alibi_slopes,
            sinks=self.sinks,
            align=align,
            windows=self.windows,
        )


class DecodeOptions(NamedTuple):
    """Every option of a decode call that is not a tensor; see `Options`."""

    scale: float
    softcap: float = 0.0
    window_left: Open = -1
    window_right: Open = -1
    received: bool = False  # column sums are wanted

    def as_options(self, masked: bool = False) -> Options:
        """Those of a call without a cache: decoding is causal, unless a mask decides."""
        given = self._asdict()
        options = Options(causal=True, stats=2 if given.pop("received") else 0, **given)
        return options._replace(causal=False, window_right=-1) if masked else options


class DecodeOutputs(NamedTuple):
    """What a backend's decoding returns."""

    out: Tensor  # (B, H, T, D_v), the dtype and stride order of q
    lse: Tensor  # (B, H, T) fp32, natural log
    received: Tensor | None = None  # (B, H, S) fp32, of the cache's capacity S


# What a cell of pooled probabilities holds; DISTANCES are the columns of the last.
MEAN, LARGEST, BY_DISTANCE = range(3)
DISTANCES = 66


class Pooling(NamedTuple):
    """What ``NAME_pooled`` receives after the call: which cells are wanted of what T x S would be.

    Of a head's (in varlen a sequence's) T queries and S keys, row r of ``rows`` has the queries
    ``r * T // rows`` to ``(r + 1) * T // rows``, column c of ``columns`` such a part of the keys. A
    cell may be empty: it is 0. Of the probabilities p, before dropout and 0 where masked, it has:

    MEAN
        the mean;
    LARGEST
        the largest;
    BY_DISTANCE
        sums over the row's queries, of columns for d = t' - s, how far back a key is: 32 has d = 0,
        33 + floor(log2 d) what lies before and 31 - floor(log2 -d) what lies after; 64 has the
        first key; 65 the keys with the query's own token, but for d = 0.
    """

    norm: Tensor  # (2, B, H, T) fp32: the same backend's forward's
    tokens_q: Tensor | None  # (B, T) int32, of BY_DISTANCE; varlen: (1, total_q)
    tokens_k: Tensor | None  # (B, S) int32, of BY_DISTANCE; varlen: (1, total_k)
    kind: int  # MEAN, LARGEST or BY_DISTANCE
    rows: Open
    columns: Open  # with BY_DISTANCE: DISTANCES


# Of each operator: the records that it takes, one after another, and the one that it returns,
# or Tensor.
OPERATORS: dict[str, tuple[tuple[Any, ...], Any]] = {
    "fwd": ((Inputs, Options), Outputs),
    "bwd": ((Upstream, Inputs, Options), Gradients),
    "decode": ((DecodeInputs, DecodeOptions), DecodeOutputs),
    "pooled": ((Inputs, Options, Pooling), Tensor),
}
TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Open: "SymInt",
    int: "int",
    float: "float",
    bool: "bool",
}


def schema(operator: str) -> str:
    """An operator's schema, without its name; results that nobody asked for are empty tensors."""
    taken, returned = OPERATORS[operator]
    results = "Tensor"
    if returned is not Tensor:
        results = f"({', '.join(f'Tensor {name}' for name in returned._fields)})"
    return f"({parameters(*taken)}) -> {results}"


def parameters(*records: Any) -> str:
    """The fields of records, one after another, as a schema names them."""
    fields = itertools.chain.from_iterable(map(_annotations, records))
    return ", ".join(f"{TYPES[kind]} {name}" for name, kind in fields)


def forward_call(args: Iterable[Any]) -> tuple[Inputs, Options]:
    """The arguments of ``NAME_fwd``, or something for each of them."""
    inputs, options = cut(args, Inputs, Options)
    return inputs, options


def backward_call(args: Iterable[Any]) -> tuple[Upstream, Inputs, Options]:
    """The arguments of ``NAME_bwd``, or something for each of them."""
    upstream, inputs, options = cut(args, Upstream, Inputs, Options)
    return upstream, inputs, options


def decode_call(args: Iterable[Any]) -> tuple[DecodeInputs, DecodeOptions]:
    """The arguments of ``NAME_decode``, or something for each of them."""
    inputs, options = cut(args, DecodeInputs, DecodeOptions)
    return inputs, options


def pooled_call(args: Iterable[Any]) -> tuple[Inputs, Options, Pooling]:
    """The arguments of ``NAME_pooled``, or something for each of them."""
    inputs, options, pooling = cut(args, Inputs, Options, Pooling)
    return inputs, options, pooling


def cut(args: Iterable[Any], *kinds: Any) -> list[Any]:
    """Values one after another as records of these kinds."""
    left = iter(args)
    return [kind(*itertools.islice(left, len(kind._fields))) for kind in kinds]


def _annotations(record: Any) -> Iterable[tuple[str, Any]]:
    return get_type_hints(record, include_extras=True).items()
