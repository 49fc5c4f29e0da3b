"""Context parallel attention: every rank has some rows of the sequence."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import checks, dispatch
from ..backends import Problem
from ..block_mask import BlockMask
from ..call import BLOCK_FIELDS, SCORE_OPTIONS, Outputs, Sequences
from ..flex_mask import is_block_mask
from ..functional import attention_problem, packed, results_of
from ..requirements import checks_values, choice, fail, integer, nothing_else, truth
from .agree import agree
from .cost import choose_method, computed_at_once, sent, whole_sequences
from .layout import PARTS, Layout, group_of
from .methods import Call, by_gather, by_heads, by_ring
from .pieces import Sight

ATTENTION = "context_parallel_attention"
VARLEN = "context_parallel_varlen_attention"
# Backends that drop what one process would, and what divides the first key of their calls.
PLACED = {"cpu": 1, "reference": 1, "triton": 8}
MOST_ALIGN = 2**28  # kernels are given it and the distance of chunks in one
CHECKED = (
    *("bias", "causal", "window", "align", "alibi_slopes", "sinks", "indices"),
    *("dropout_p", "dropout_seed", "return_stats", "return_weights", "deterministic"),
)  # fmt: skip
METHODS = {"auto": 0, "ring": 1, "all_to_all": 2, "all_gather": 3, "2d": 4}


def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mesh: Any,
    *,
    layout: str = "zigzag",
    method: str = "auto",
    lengths: tuple[int, int] | None = None,
    mask: Tensor | BlockMask | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | Tensor | None = None,
    align: str | int | Tensor = "top_left",
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    indices: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
    return_stats: bool | str = False,
    return_weights: bool | str = False,
    deterministic: bool | None = None,
    backend: str = "auto",
    **other: Any,
) -> Any:
    """`attnfast.attention` of sequences whose rows are cut over the P ranks of a mesh.

    Every rank calls it with its own shards, as `shard` cuts them, and has its own rows of what
    ``attnfast.attention`` returns for the whole sequences.

    Args:
        q: ``(B, H, T / P, D)``, this rank's queries; see `attnfast.attention`.
        k: ``(B, H_kv, S / P, D)``, its keys.
        v: ``(B, H_kv, S / P, D_v)``.
        mesh: a DeviceMesh, ``mesh["cp"]`` for example, or a process group.
        layout: how sequences are cut, see `shard`: "zigzag" or "contiguous".
        method: "ring": keys and values travel from rank to rank, the next while one block is
            computed, only as far as ``causal`` and ``window`` let anybody attend them, in O(T / P)
            memory (arXiv:2310.01889); "all_to_all": heads are exchanged for rows, and every rank
            attends whole sequences with some of the heads (arXiv:2309.14509); "all_gather": every
            rank has all keys; "auto": see ``choose_method``.
        lengths: T and S where `shard` has padded: what lies past them is nothing. By default all
            rows of all ranks.
        mask: bool, broadcastable to ``(B, H, T / P, S)``: of this rank's queries and all keys. A
            `attnfast.BlockMask` is that of the whole sequences, on every rank, and "all_to_all"
            takes it.
        bias: the same, added. Where it is the same for all queries, its gradient is the sum over
            the ranks, on every rank.
        causal: see `attnfast.attention`, as for all that follow; positions are those of the whole
            sequence.
        window: see `attnfast.attention`.
        align: see `attnfast.attention`; up to 2**28 either way.
        scale: see `attnfast.attention`.
        softcap: see `attnfast.attention`.
        alibi_slopes: see `attnfast.attention`.
        sinks: see `attnfast.attention`; the gradient is the sum over the ranks, on every rank.
        indices: ``(B, T / P, K)``, keys of the whole sequence; "all_gather" takes them.
        dropout_p: see `attnfast.attention`; on the CPU, or by Triton, whose kernels can count from
            another row than their own first. What is dropped is what one process would drop.
        dropout_seed: see `attnfast.attention`; by default drawn by the first rank, for all.
        return_lse: see `attnfast.attention`.
        return_stats: see `attnfast.attention`; with "received" a rank has the sums of its own keys,
            and "all_to_all" and "all_gather" find them.
        return_weights: must be False: weights are T x S.
        deterministic: see `attnfast.attention`. Sums over ranks have a fixed order in any case.
        backend: see `attnfast.attention`.
        other: none, see `attnfast.attention`.

    Returns:
        As `attnfast.attention`, of this rank's rows; zeros past the end of the sequence, with an
        lse of -inf (the sink, where there is one). Ranks of equal shards must give equal options.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or value; or the method or backend does
            not take the call; or, with ``ATTNFAST_CHECK=1``, ranks have called with different
            shapes, dtypes or options, which every one of them then says.
        RuntimeError: There is no process group; or a rank has ended, within the group's timeout.
    """
    return _results(ATTENTION, locals())


def context_parallel_varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    mesh: Any,
    *,
    layout: str = "zigzag",
    method: str = "auto",
    lengths: tuple[int, int] | None = None,
    mask: Tensor | BlockMask | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | Tensor | None = None,
    align: str | int | Tensor = "top_left",
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
    return_stats: bool | str = False,
    return_weights: bool | str = False,
    deterministic: bool | None = None,
    backend: str = "auto",
    **other: Any,
) -> Any:
    """`attnfast.varlen_attention` of sequences whose rows are cut over the P ranks of a mesh.

    The sequences lie one after another, and the whole is cut: they cross the borders of shards.

    Args:
        q: ``(total_q / P, H, D)``, this rank's queries as `shard` cuts them.
        k: ``(total_k / P, H_kv, D)``, its keys.
        v: ``(total_k / P, H_kv, D_v)``.
        cu_seqlens_q: of the whole, the same on every rank, as for all that follow; its values are
            read, which on a GPU waits for it.
        cu_seqlens_k: of the whole.
        max_seqlen_q: of the whole.
        max_seqlen_k: of the whole.
        mesh: see `context_parallel_attention`.
        layout: see `context_parallel_attention`.
        method: see `context_parallel_attention`; ``mask``, ``bias`` and dropout, which count in
            each sequence, need whole sequences: "all_to_all".
        lengths: total_q and total_k where `shard` has padded.
        mask: see `attnfast.varlen_attention`, as for all that follow.
        bias: see `attnfast.varlen_attention`; the gradient is the sum over the ranks.
        causal: see `attnfast.varlen_attention`.
        window: see `attnfast.varlen_attention`.
        align: see `attnfast.varlen_attention`.
        scale: see `attnfast.varlen_attention`.
        softcap: see `attnfast.varlen_attention`.
        alibi_slopes: see `attnfast.varlen_attention`.
        sinks: see `attnfast.varlen_attention`; the gradient is the sum over the ranks.
        dropout_p: see `context_parallel_attention`.
        dropout_seed: see `context_parallel_attention`.
        return_lse: see `attnfast.varlen_attention`.
        return_stats: see `context_parallel_attention`.
        return_weights: must be False.
        deterministic: see `attnfast.varlen_attention`.
        backend: see `attnfast.varlen_attention`.
        other: none.

    Returns:
        As `attnfast.varlen_attention`, of this rank's rows.

    Raises:
        TypeError: As `context_parallel_attention`.
        ValueError: As `context_parallel_attention` and `attnfast.varlen_attention`.
        RuntimeError: As `context_parallel_attention`.
    """
    return _results(VARLEN, locals())


class Plan(NamedTuple):
    """A call, and how it is computed."""

    call: Call
    method: str
    reason: str
    mesh: Any
    given: dict[str, Any]  # the arguments

    def outputs(self) -> Outputs:
        """Compute."""
        call, method = self.call, self.method
        if call.options.dropout_p > 0:
            seed = _seed_of_all(call, method)
            call = call._replace(inputs=call.inputs._replace(dropout_seed=seed))
        if method == "2d":
            outer, inner = (self.mesh.get_group(d) for d in (0, 1))
            return by_heads(call._replace(group=inner), outer)
        return {"ring": by_ring, "all_to_all": by_heads, "all_gather": by_gather}[method](call)

    def explanation(self) -> str:
        """What `attnfast.explain` says of it, beside its `problem`."""
        call, what = self.call, "sends heads within a row, keys from row to row"
        if self.method != "2d":
            forward, backward = (f"{x / 2**20:.4g} MiB" for x in sent(call, self.method))
            what = f"sends {forward} forward, {backward} backward"
        q, k, cut = call.queries, call.keys, self.given["layout"]
        return (
            f"{call.function}: {cut} over {k.ranks} ranks, {q.rows} of {q.length} queries and"
            f" {k.rows} of {k.length} keys here\n"
            f"method: {self.method}, {self.reason}; rank {call.rank} {what}"
        )

    def problem(self) -> Problem:
        """What a backend is given at once."""
        inner = self.mesh.size(1) if self.method == "2d" else self.call.keys.ranks
        inputs = computed_at_once(self.call, self.method, inner)
        return attention_problem(inputs, self.call.options)


def _results(function: str, given: dict[str, Any]) -> Any:
    if checks_values():
        agree(function, given, group_of(function, given["mesh"]))
    planned = plan(function, given)
    outputs, options = planned.outputs(), planned.call.options
    if function == VARLEN:
        outputs = packed(outputs, options)
    if not (given["return_lse"] or options.stats):
        return outputs.out
    return results_of(outputs, given["return_lse"], options)


def plan(function: str, given: dict[str, Any]) -> Plan:
    """A call's arguments, checked, and the method for it; nothing is computed or sent."""
    if given["other"]:
        nothing_else(function, given["other"])
    mesh = given["mesh"]
    given["return_lse"] = truth(function, "return_lse", given["return_lse"])
    group = group_of(function, mesh)
    choice(function, "method", given["method"], METHODS)
    choice(function, "layout", given["layout"], PARTS)
    call = _checked(function, given, group)
    method, reason = given["method"], "named by method"
    meshed = getattr(mesh, "ndim", 1) == 2
    if method == "2d" and not meshed:
        fail(function, "mesh", "of two dimensions with method='2d'", "one")
    if method == "auto":
        method, reason = choose_method(call, meshed)
    _refuse(call, method)
    return Plan(call, method, reason, mesh, given)


def _checked(function: str, given: dict[str, Any], group: dist.ProcessGroup) -> Call:
    """The call that a rank's arguments are."""
    varlen = function == VARLEN
    q, k, v = (given[name] for name in "qkv")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dim() != (3 if varlen else 4):
            requirement = f"a {3 if varlen else 4}-D Tensor"
            error = ValueError if isinstance(x, Tensor) else TypeError
            fail(function, name, requirement, getattr(x, "shape", type(x).__name__), error)
    dim = 0 if varlen else 2
    rows = tuple(x.shape[dim] for x in (q, k, v))
    queries, keys = _layouts(function, rows, given, dist.get_world_size(group))
    if keys.rows == 0 or rows[2] != keys.rows:
        fail(function, "k and v", "of equally many rows, at least one", (k.shape, v.shape))

    def whole(x: Tensor) -> Tensor:
        sizes = list(x.shape)
        sizes[dim] = keys.length
        return x.detach().narrow(dim, 0, 1).expand(sizes)

    mask, blocks, sequences = given["mask"], None, None
    if not varlen and is_block_mask(mask):  # of the whole: attention_call has our rows of queries
        mask, blocks = None, mask
    if varlen:
        sequences = Sequences(*(given[name] for name in Sequences._fields))
    checked: dict[str, Any] = {name: given.get(name) for name in CHECKED}
    scores = tuple(given[name] for name in SCORE_OPTIONS)
    inputs, options = checks.attention_call(
        function, q, whole(k), whole(v), mask, scores=scores, sequences=sequences, **checked
    )
    if blocks is not None:
        sizes = (*q.shape[:2], queries.length, keys.length)
        fields = checks.block_mask(function, "mask", blocks, q, sizes)
        inputs = inputs._replace(**dict(zip(BLOCK_FIELDS, fields, strict=True)))
    if varlen:
        every_row = inputs.q[:, :, :1].expand(-1, -1, queries.length, -1)
        checks.sequence_values(function, inputs._replace(q=every_row), options)
        k, v = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
    k, v = checks.autocast(function, ("k", "v"), k, v)
    inputs = inputs._replace(k=k, v=v)
    if options.align_bottom_right and not varlen:
        offset = keys.length - queries.length
        options = options._replace(align_offset=offset, align_bottom_right=False)
    sight = Sight.of(inputs, options)
    return Call(function, inputs, options, queries, keys, sight, group, given["backend"])


def _layouts(
    function: str, rows: tuple[int, ...], given: dict[str, Any], ranks: int
) -> tuple[Layout, Layout]:
    """How queries and keys are cut, from the rows of a shard."""
    lengths, name = given["lengths"], given["layout"]
    if lengths is None:
        lengths = rows[0] * ranks, rows[1] * ranks
    if not isinstance(lengths, (tuple, list)) or len(lengths) != 2:
        fail(function, "lengths", "(T, S), of the whole sequences", lengths, TypeError)
    found = []
    for what, own, length in zip(("q", "k"), rows, lengths, strict=False):
        length = integer(function, "lengths", length, low=0)
        layout = Layout.of_sequence(length, ranks, name)
        if own != layout.rows:
            requirement = f"of {layout.rows} rows ({length} over {ranks} ranks, {name}, see shard)"
            fail(function, what, requirement, own)
        found.append(layout)
    return found[0], found[1]


def _seed_of_all(call: Call, method: str) -> Tensor:
    """The dropout seed of all ranks, drawn by the first where none is given, with a place."""
    function, inputs, options = call.function, call.inputs, call.options
    row = dispatch.select(attention_problem(inputs, options), call.backend, function=function)
    if row.name not in PLACED:
        requirement = f"0 on the backend {row.name!r}, which counts from its own first row"
        fail(function, "dropout_p", requirement, options.dropout_p)
    eights = PLACED[row.name]
    if method in ("ring", "2d") and call.keys.size % eights:
        requirement = f"0 where chunks of {call.keys.size} keys, not of whole {eights}s, travel"
        fail(
            function, "dropout_p", f"{requirement}, on the backend {row.name!r}", options.dropout_p
        )
    seed = inputs.dropout_seed
    if seed is None:
        seed = torch.randint(1 << 32, (2,), dtype=torch.int64, device=inputs.q.device)
        dist.broadcast(seed, group=call.group, group_src=0)
    return torch.cat((seed, seed.new_tensor([inputs.q.shape[1], 0, 0, 0])))


def _refuse(call: Call, method: str) -> None:
    """Raise where a method does not take a call."""
    function, inputs, options = call[:3]
    if options.weights:
        fail(function, "return_weights", "False: weights are T x S, on no rank whole", True)
    if abs(options.align_offset) > MOST_ALIGN:
        fail(function, "align", f"at most {MOST_ALIGN} either way", options.align_offset)
    if inputs.indices is not None and method != "all_gather":
        requirement = "given with method='all_gather', where all keys are at hand"
        fail(function, "indices", requirement, method)
    if options.stats == 2 and method in ("ring", "2d"):
        fail(function, "return_stats", "True: 'received' needs another way round the ring", "it")
    if method != "all_to_all" and (needs := whole_sequences(inputs, options)) is not None:
        requirement = "'all_to_all', where a rank has whole sequences"
        fail(function, f"method with {needs}", requirement, repr(method))
