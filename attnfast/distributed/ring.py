"""Attention whose keys and values travel from rank to rank; in the backward dk and dv with them.

A block of keys begins at its own rank and goes on to the next as long as any rank after it attends
some of it, which every rank knows from positions alone. The next block is on its way while one is
computed. The order in which a rank meets blocks, and so the order of every sum, is fixed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import Function

from .. import autograd
from ..call import Gradients, Inputs, Options, Outputs, Upstream
from ..checks import dense_rows
from ..ops import Ops
from .layout import Layout
from .merge import Results
from .pieces import Piece, Sight, call_of, last_step, pieces, scores_of


class Ring(NamedTuple):
    """A call over a group of ranks."""

    group: dist.ProcessGroup
    queries: Layout
    keys: Layout
    sight: Sight
    ops: Ops
    inputs: Inputs  # of this rank: q, k, v its shards, mask and bias of its queries and all keys
    options: Options

    @property
    def rank(self) -> int:
        """This rank's place in the group."""
        return dist.get_rank(self.group)

    def met(self, owner: int) -> list[Piece]:
        """What this rank computes with the block of keys of another."""
        return pieces(self.queries.chunks(self.rank), self.keys.chunks(owner), self.sight)

    def last_step(self, owner: int) -> int:
        """The last step at which some rank attends the block of another."""
        return last_step(self.queries, self.keys, self.sight, owner)

    def owner(self, step: int) -> int:
        """Whose block lies here at a step."""
        return (self.rank - step) % self.keys.ranks

    def here(self, step: int) -> bool:
        """Whether a block lies here at a step."""
        return step < self.keys.ranks and step <= self.last_step(self.owner(step))

    def goes_on(self, step: int) -> bool:
        """Whether the block that lies here at a step is the next rank's at the next."""
        return self.here(step) and step < self.last_step(self.owner(step))


class Exchange:
    """Messages on their way: to the next rank, or a later one, and from those before."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank = group, dist.get_rank(group)
        self.ranks = dist.get_world_size(group)
        self.operations: list[dist.P2POp] = []
        self.works: list[dist.Work] = []

    def send(self, x: Tensor, steps: int) -> None:
        """To the rank ``steps`` further on."""
        self._add(dist.isend, x, self.rank + steps)

    def receive(self, x: Tensor, steps: int) -> None:
        """From the rank ``steps`` before."""
        self._add(dist.irecv, x, self.rank - steps)

    def _add(self, what: Any, x: Tensor, rank: int) -> None:
        if x.numel() == 0:  # which gloo may wait for in vain
            return
        peer = rank % self.ranks
        self.operations.append(dist.P2POp(what, x, group=self.group, group_peer=peer))

    def start(self) -> Exchange:
        """Begin; what is sent and received must stay until it is waited for."""
        if self.operations:
            self.works = dist.batch_isend_irecv(self.operations)
        return self

    def wait(self) -> None:
        """Until all of it has arrived."""
        try:
            while self.works:
                self.works.pop().wait()
            self.operations.clear()  # and with them the buffers
        except RuntimeError as error:
            ring = f"the ring of {self.ranks} ranks, seen from rank {self.rank}"
            raise RuntimeError(
                f"context_parallel_attention: {ring}: one has ended, or did not answer within the"
                f" group's timeout: {error}"
            ) from error


class Block(NamedTuple):
    """Keys and values of one rank in one buffer, or their gradients."""

    buffer: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def like(cls, k: Tensor, v: Tensor, dtype: torch.dtype | None = None) -> Block:
        """One for tensors of these shapes."""
        buffer = k.new_empty(k.numel() + v.numel(), dtype=dtype)
        parts = buffer.split([k.numel(), v.numel()])
        return cls(buffer, parts[0].view(k.shape), parts[1].view(v.shape))

    @classmethod
    def zeros(cls, k: Tensor, v: Tensor) -> Block:
        """The beginning of a sum of gradients, fp32."""
        made = cls.like(k, v, torch.float32)
        made.buffer.zero_()
        return made

    @classmethod
    def of(cls, k: Tensor, v: Tensor) -> Block:
        """One that holds these."""
        made = cls.like(k, v)
        made.k.copy_(k), made.v.copy_(v)
        return made


class Travel:
    """The blocks of keys that come by, step after step."""

    def __init__(self, ring: Ring, k: Tensor, v: Tensor) -> None:
        self.ring, self.here, self.step = ring, Block.of(k, v), 0
        self.arriving = self._send_on()

    def _send_on(self) -> tuple[Block, Exchange]:
        coming, exchange = self.here, Exchange(self.ring.group)
        if self.ring.goes_on(self.step):
            exchange.send(self.here.buffer, 1)
        if self.ring.here(self.step + 1):
            coming = Block.like(self.here.k, self.here.v)
            exchange.receive(coming.buffer, 1)
        return coming, exchange.start()

    def next(self) -> None:
        """Wait for the next block, and send it on."""
        self.here, exchange = self.arriving
        exchange.wait()
        self.step += 1
        self.arriving = self._send_on()


def ring_forward(ring: Ring, k: Tensor, v: Tensor) -> Results:
    """Results of this rank's queries over all keys."""
    q, options = ring.inputs.q, ring.options
    found = Results.none(q, v.shape[3], options.stats > 0)
    travel = Travel(ring, k, v)
    for step in range(ring.keys.ranks):
        if ring.here(step):
            inputs = ring.inputs._replace(k=travel.here.k, v=travel.here.v)
            for piece in ring.met(ring.owner(step)):
                found.rows(piece.q.row, piece.q.length).add(forward_of(ring, piece, inputs))
        travel.next()
    return found


def forward_of(ring: Ring, piece: Piece, inputs: Inputs) -> Outputs:
    """A backend's results for a piece."""
    part, options = call_of(piece, inputs._replace(sinks=None), ring.options)
    # To the CPU a step of decoding, whose norm has other units: twice
    alone = piece.q.length == 1 and inputs.cu_seqlens_q is None
    part = part._replace(q=part.q.repeat(1, 1, 2, 1)) if alone else part
    outputs = Outputs(*autograd.call(ring.ops.fwd, *part, *options))
    return cut_rows(outputs) if alone else outputs


def cut_rows(outputs: Outputs) -> Outputs:
    """The first row of two."""
    out, lse, norm, stats, received, weights = outputs
    stats = None if stats is None or not stats.numel() else stats[..., :1]
    norm = None if norm is None else norm[..., :1]
    return Outputs(out[:, :, :1], lse[..., :1], norm, stats, received, weights)


def ring_backward(
    ring: Ring, k: Tensor, v: Tensor, upstream: Upstream
) -> tuple[Tensor, Block, Tensor | None]:
    """The gradients dq of this rank's queries, dk and dv of its keys, and dbias, all fp32.

    A block's dk and dv follow it by one step, from rank to rank, and then go home.
    """
    q, bias = ring.inputs.q, ring.inputs.bias
    assert bias is not None or not upstream.need_dbias
    dq = torch.zeros_like(q, dtype=torch.float32)
    dbias = torch.zeros_like(bias, dtype=torch.float32) if upstream.need_dbias else None  # type: ignore[arg-type]
    travel = Travel(ring, k, v)
    home = received = Block.zeros(k, v)
    exchanges = [Exchange(ring.group)]
    for step in range(ring.keys.ranks):
        exchange = Exchange(ring.group)
        if ring.here(step):
            found = home if step == 0 else Block.zeros(k, v)
            inputs = ring.inputs._replace(k=travel.here.k, v=travel.here.v)
            for piece in ring.met(ring.owner(step)):
                add_gradients(ring, piece, inputs, upstream, (dq, found.k, found.v, dbias))
            if step > 0:
                exchanges[-1].wait()
                found.buffer.add_(received.buffer)
            if ring.goes_on(step):
                exchange.send(found.buffer, 1)
            elif step > 0:
                exchange.send(found.buffer, -step)
        if ring.here(step + 1):
            received = Block.zeros(k, v)
            exchange.receive(received.buffer, 1)
        if step > 0 and step == ring.last_step(ring.rank):
            exchange.receive(home.buffer, -step)
        exchanges.append(exchange.start())
        travel.next()
    for exchange in exchanges:
        exchange.wait()
    return dq, home, dbias


def add_gradients(
    ring: Ring,
    piece: Piece,
    inputs: Inputs,
    upstream: Upstream,
    sums: tuple[Tensor, Tensor, Tensor, Tensor | None],
) -> None:
    """Add a piece's gradients to dq, dk, dv and dbias."""
    dq, dk, dv, dbias = sums
    q, k, _ = piece
    part, options = call_of(piece, inputs._replace(sinks=None), ring.options)

    def of_rows(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.narrow(2, q.row, q.length).contiguous()

    given = upstream._replace(
        grad_out=upstream.grad_out.narrow(2, q.row, q.length),
        grad_lse=of_rows(upstream.grad_lse),
        grad_entropy=of_rows(upstream.grad_entropy),
        out=upstream.out.narrow(2, q.row, q.length),
        norm=upstream.norm.narrow(3, q.row, q.length).contiguous(),
        entropy=of_rows(upstream.entropy),
    )
    found = Gradients(*autograd.call(ring.ops.bwd, *given, *part, *options))
    dq.narrow(2, q.row, q.length).add_(found.dq)
    dk.narrow(2, k.row, k.length).add_(found.dk)
    dv.narrow(2, k.row, k.length).add_(found.dv)
    if dbias is not None and found.dbias is not None:
        of_piece = scores_of(dbias, q, k)
        assert of_piece is not None
        of_piece.add_(found.dbias)


class RingFunction(Function):
    """Attention over a ring: (ring, gathered, q, k, v, bias, sinks) -> (out, lse, stats).

    ``gathered`` finds the same from the tensors with all keys at hand, where gradients are to have
    gradients of their own.
    """

    @staticmethod
    def forward(ctx: Any, ring: Ring, gathered: Any, *tensors: Tensor | None) -> Any:
        """This rank's results."""
        q, k, v, bias, sinks = tensors
        assert q is not None
        assert k is not None
        assert v is not None
        given = ring._replace(inputs=ring.inputs._replace(q=q, bias=bias, sinks=sinks))
        found = ring_forward(given, k, v)
        if sinks is not None:
            found.add_sinks(sinks)
        out = found.out.to(q.dtype)
        stats = found.lse.new_empty(0) if found.stats is None else found.stats
        norm = torch.cat((found.norm, found.norm[1:]))  # of more keys than a piece has: Upstream
        ctx.save_for_backward(*tensors, out, found.lse, norm, stats)
        ctx.ring, ctx.gathered = ring, gathered
        ctx.set_materialize_grads(False)
        if found.stats is None:
            ctx.mark_non_differentiable(stats)
        return out, found.lse, stats

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the tensors."""
        if torch.is_grad_enabled():
            return None, None, *gathered_gradients(ctx, grads)
        to_out, to_lse, to_stats = grads
        q, k, v, bias, sinks, out, lse, norm, stats = ctx.saved_tensors
        ring = ctx.ring._replace(inputs=ctx.ring.inputs._replace(q=q, bias=bias, sinks=sinks))
        need_dbias, need_dsinks = ctx.needs_input_grad[-2:]
        upstream = Upstream(
            torch.zeros_like(out) if to_out is None else dense_rows(to_out),
            to_lse,
            None if to_stats is None else to_stats[1],
            None,
            out,
            norm,
            None if to_stats is None else stats[1],
            need_dbias,
            False,
        )
        dq, home, dbias = ring_backward(ring, k, v, upstream)
        return (
            None,
            None,
            dq.to(q.dtype),
            home.k.to(k.dtype),
            home.v.to(v.dtype),
            None if dbias is None else dbias.to(bias.dtype),
            sinks_gradient(sinks, lse, upstream) if need_dsinks else None,
        )


def gathered_gradients(ctx: Any, grads: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Gradients of the tensors, differentiable."""
    tensors = ctx.saved_tensors[:5]
    results = ctx.gathered(*tensors)
    known = [i for i, grad in enumerate(grads) if grad is not None]
    wanted = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
    found = torch.autograd.grad(
        [results[i] for i in known],
        [tensors[i] for i in wanted],
        [grads[i] for i in known],
        create_graph=True,
        allow_unused=True,
    )
    gradients: list[Tensor | None] = [None] * len(tensors)
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    return gradients


def sinks_gradient(sinks: Tensor, lse: Tensor, upstream: Upstream) -> Tensor:
    """The sinks' gradient from this rank's rows: a sink is a key whose value is zero."""
    depth = sinks.float()[None, :, None] - lse  # log p of the sink
    term = -(upstream.grad_out.float() * upstream.out.float()).sum(3)
    if upstream.grad_lse is not None:
        term = term + upstream.grad_lse
    if upstream.grad_entropy is not None:
        assert upstream.entropy is not None
        term = term - upstream.grad_entropy * (depth + upstream.entropy)
    return (depth.exp() * term).sum((0, 2)).to(sinks.dtype)
