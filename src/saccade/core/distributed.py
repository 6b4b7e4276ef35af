"""Attention over a sequence that is split across the processes of torch.distributed.

Every rank holds its part of the queries, keys and values. Keys and values go round in a ring, the next ones coming in
while the ones at hand are worked on by the band. Beside its own part a rank holds the keys of two others at most, so
its memory falls with the number of ranks. Rows are merged by their log-sum-exp, exactly. The backward pass goes round
once more, and the gradients of keys and values travel with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import band
from .attend import _Call
from .errors import SpecError, Unsupported
from .normalizers import Normalizer
from .pieces import OF_SCORES, Known, Place, Plan, RowMass, merge, nothing, share, weight_of
from .ring import Chunk, Ring, Sums, chunks, join
from .spec import Attention
from .stats import LogSumExp, Stat
from .strips import Shape
from .tile import At


def positions(
    length: int, group: dist.ProcessGroup | None = None, *, zigzag: bool = True, device: torch.device | str = "cpu"
) -> Tensor:
    """Positions in the whole sequence of what this rank holds, int64: for position embeddings and labels."""
    ring = Ring(group)
    mine = chunks(length, ring.rank, ring.size, zigzag)
    return torch.cat([torch.arange(0, device=device), *(torch.arange(c.start, c.stop, device=device) for c in mine)])


def split(tensor: Tensor, dim: int, group: dist.ProcessGroup | None = None, *, zigzag: bool = True) -> Tensor:
    """This rank's part of a tensor that every rank has.

    Args:
        tensor: of any shape, the same on all ranks.
        dim: the sequence: 2 for queries, keys and values.
        group: a process group; the default one if not given.
        zigzag: two parts to each rank, one from the start and one from the end, so that causal attention gives all
            ranks equal work; otherwise one. Lengths that the ranks do not divide are allowed.

    Raises:
        SpecError: there is no process group, or the sequence is shorter than the group.
    """
    ring = Ring(group)
    length = tensor.shape[dim]
    if length < ring.size:
        raise SpecError(f"a sequence of {length} cannot be split among {ring.size} ranks: each needs a position")
    mine = chunks(length, ring.rank, ring.size, zigzag)
    return torch.cat([tensor.narrow(dim, c.start, len(c)) for c in mine], dim)


def gather(tensor: Tensor, dim: int, group: dist.ProcessGroup | None = None, *, zigzag: bool = True) -> Tensor:
    """The whole of a tensor of which every rank has the part that :func:`split` gives it; without gradient."""
    ring = Ring(group)
    tensor = tensor.detach()
    held = ring.tell(tensor.shape[dim])
    length = sum(held)
    _check_parts({"positions": held}, ring, zigzag)
    room = list(tensor.shape)
    room[dim] = max(held)
    mine = tensor.new_zeros(room)
    mine.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    shards = [mine]
    if ring.size > 1:
        shards = [torch.empty_like(mine) for _ in range(ring.size)]
        dist.all_gather(shards, mine, group=group)
    return join(shards, length, dim, zigzag)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: Attention | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    stats: Sequence[Stat] = (),
    offset: int | None = None,
    zigzag: bool = True,
) -> Any:
    """:func:`saccade.attention` of a sequence of which every rank of a group holds a part.

    All ranks of the group must call it, with the same program and stats, and all must run the backward pass or none.
    Tensors that parts hold (documents, biases, padding) are those of the whole sequence, on every rank.

    Args:
        q: this rank's queries ``[B, H, n, D]``, the part of N that :func:`split` gives it.
        k: its keys ``[B, Hkv, m, D]``, its part of M.
        v: its values ``[B, Hkv, m, Dv]``.
        spec: the program; plain softmax attention if not given.
        group: a process group; the default one if not given.
        stats: parts of :mod:`saccade.stats`: those of queries come as the rank's rows, mass per key as its keys.
        offset: place of the whole sequence's query 0 among the keys, as in :func:`saccade.attention`.
        zigzag: how the sequence is split.

    Returns:
        This rank's rows ``[B, H, n, Dv]``, or, with stats, that and a dict of results by stat name. Gradients are those
        of the sum of all ranks' losses: for the rank's own q, k and v, and, already summed over the ranks, for what the
        program learned.

    Raises:
        SpecError: as :func:`saccade.attention`; or ranks disagree, or hold other parts than :func:`split` gives them.
        Unsupported: a part needs whole rows, so that the ranks' results cannot be merged; the message says which.
    """
    spec = Attention() if spec is None else spec
    ring = Ring(group)
    call, facts = _agree(ring, q, k, v, spec, stats, offset, zigzag)
    n, m = sum(f.queries for f in facts), sum(f.keys for f in facts)
    plan = Plan(spec, stats, m)
    run = _Run(ring, plan, call.shape, n, m, m - n if offset is None else offset, zigzag)
    q, (k, v) = call.q, run.blank(call.k, call.v)
    dtype = q.dtype
    if dtype == torch.float16 and q.device.type == "cpu":  # no fast float16 product on CPUs
        q, k, v = q.float(), k.float(), v.float()
    if plan.divide:  # a column of ones gives the sum of each row
        v = torch.cat([v, v.new_ones(*v.shape[:3], 1)], -1)
    out, *flat = _Across.apply(run, q, k, v, *spec.learned())
    if plan.divide:
        mass = out[..., -1:]
        out = out[..., :-1] / mass.masked_fill(mass == 0, 1)
    if plan.divisor is not None:
        out = out / plan.divisor
    out = out.to(dtype)
    if not stats:
        return out
    return out, {s.label: s.finish(*seen) for s, seen in zip(plan.stats, run.by_stat(flat), strict=True)}


@dataclass(frozen=True)
class _Facts:
    """What the ranks must know of each other before they begin."""

    queries: int
    keys: int
    sizes: dict[str, int]
    dtype: torch.dtype
    stats: list[str]
    offset: int | None
    zigzag: bool
    gradient: bool
    learned: list[tuple[int, ...]]


def _agree(
    ring: Ring, q: Tensor, k: Tensor, v: Tensor, spec: Attention, stats: Sequence[Stat], offset: int | None,
    zigzag: bool,
) -> tuple[_Call, list[_Facts]]:  # fmt: skip
    """The checked call and every rank's facts; all ranks raise if one cannot go on, so that none waits for it."""
    mine: _Facts | Exception
    try:
        call = _Call.check(q, k, v, spec, stats, offset)
        Plan(spec, stats, call.shape.m)
        shape, learned = call.shape, spec.learned()
        mine = _Facts(
            shape.n, shape.m,
            {"batch": shape.batch, "heads": shape.heads, "key heads": shape.kv_heads, "width": q.shape[3],
             "value width": v.shape[3]},
            q.dtype, [f"{s.label} ({type(s).__name__})" for s in stats], offset, zigzag,
            torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *learned)),
            [tuple(x.shape) for x in learned],
        )  # fmt: skip
    except (SpecError, Unsupported) as error:
        mine = error
    told = ring.tell(mine)
    if isinstance(mine, Exception):
        raise mine
    for rank, theirs in enumerate(told):
        if isinstance(theirs, Exception):
            raise SpecError(f"rank {rank} cannot go on: {theirs}")
        for fact in fields(_Facts):
            ours, other = getattr(mine, fact.name), getattr(theirs, fact.name)
            if fact.name not in ("queries", "keys") and ours != other:
                raise SpecError(f"ranks disagree on {fact.name}: {ours} on rank {ring.rank}, {other} on rank {rank}")
    _check_parts({"queries": [f.queries for f in told], "keys": [f.keys for f in told]}, ring, zigzag)
    return call, told


def _check_parts(held: dict[str, list[int]], ring: Ring, zigzag: bool) -> None:
    for what, lengths in held.items():
        wanted = ring.lengths(sum(lengths), zigzag)
        if lengths != wanted:
            raise SpecError(
                f"the ranks hold {lengths} {what}; zigzag={zigzag} splits {sum(lengths)} into {wanted}: use"
                " saccade.distributed.split with the same zigzag="
            )


@dataclass
class _Piece:
    """Some of this rank's queries against some of a visiting rank's keys."""

    place: Place
    shape: Shape
    rows: slice
    keys: slice


class _Run:
    """One call: what this rank holds, and its rounds of the ring."""

    def __init__(self, ring: Ring, plan: Plan, shape: Shape, n: int, m: int, offset: int, zigzag: bool):
        self.ring, self.plan, self.shape = ring, plan, shape
        self.n, self.m, self.offset, self.zigzag = n, m, offset, zigzag
        self.lengths = ring.lengths(m, zigzag)
        self.rows = chunks(n, ring.rank, ring.size, zigzag)

    def blank(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Blank the keys and values that nobody may see: 0 times what lies there might not be 0."""
        s = self.shape
        at = At.everywhere(s.batch, s.heads, self.n, self.m, self.offset, s.counted, s.device)
        unseen = self.plan.spec.mask.unseen(at)
        if unseen is None:
            return k, v
        unseen = unseen.expand(*unseen.shape[:3], self.m)
        if unseen.shape[1] > 1:
            unseen = unseen.unflatten(1, (s.kv_heads, s.rep)).all(2)
        mine = chunks(self.m, self.ring.rank, self.ring.size, self.zigzag)
        gone = torch.cat([unseen[:, :, 0, c.start : c.stop] for c in mine], -1)[..., None]
        return k.masked_fill(gone, 0), v.masked_fill(gone, 0)

    def by_stat(self, flat: Sequence[Any]) -> list[list[Any]]:
        """One list for each stat from the tensors of all."""
        found, rest = [], list(flat)
        for stat in self.plan.stats:
            count = len(stat.widths(self.m))
            found.append(rest[:count])
            rest = rest[count:]
        return found

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None, list[list[Tensor]]]:
        """Output in the accumulation dtype, the log-sum-exp of a softmax's keys, and what each stat saw."""
        plan = self.plan
        if not plan.softmax:
            return self._round(None, q, k, v, plan.stats)
        if not plan.one_pass:  # stats and edits see true weights, which take the log-sum-exp of the whole row
            _, lse, _ = self._round(None, q, k, None, [])
            assert lse is not None
            out, _, whole = self._round(plan.total(lse), q, k, v, plan.stats)
            return out, lse, whole
        out, lse, whole = self._round(None, q, k, v, plan.stats)
        assert lse is not None
        if plan.sink is not None:
            out *= weight_of(lse, plan.total(lse))[..., None]
        return out, lse, whole

    def _round(
        self, total: Tensor | None, q: Tensor, k: Tensor, v: Tensor | None, stats: Sequence[Stat]
    ) -> tuple[Tensor, Tensor | None, list[list[Tensor]]]:
        """Once round the ring: pieces of a softmax are merged by their log-sum-exp unless the ``total`` is known."""
        merged = self.plan.softmax and total is None
        watched = [*([LogSumExp()] if merged else []), *stats]
        wide = band.ACCUMULATE.get(q.dtype, q.dtype)
        out = q.new_zeros(*q.shape[:3], 1 if v is None else v.shape[-1], dtype=wide)
        whole = [[] if s.axis == "keys" else nothing(s, out[..., 0]) for s in watched]
        sums = Sums(self.ring, self.lengths)
        for owner, visiting in self.ring.visits([k] if v is None else [k, v], self.lengths):
            masses = self._meet(owner, visiting, q, total, watched, out, whole)
            if masses:
                sums.add(masses)
        home = iter(sums.home() if sums.step else [])
        whole = [found or [next(home)] for found in whole]
        return out, whole[0][0] if merged else None, whole[1:] if merged else whole

    def _meet(
        self, owner: int, visiting: list[Tensor], q: Tensor, total: Tensor | None, watched: list[Stat], out: Tensor,
        whole: list[list[Tensor]],
    ) -> list[Tensor]:  # fmt: skip
        """Add what a visiting rank's keys give this rank's rows; returns what these give the stats of the keys."""
        plan, keys, values = self.plan, visiting[0], visiting[-1]
        if len(visiting) == 1:
            values = keys[..., :1]
        by_key = [i for i, stat in enumerate(watched) if stat.axis == "keys"]
        masses = [out.new_zeros(*q.shape[:2], keys.shape[2]) for _ in by_key]
        for piece in self._pieces(owner):
            rows = piece.rows
            normalizer = plan.normalizer if total is None else Known(total[:, :, rows])
            program = plan.program(piece.place, normalizer, watched)
            part, seen = band.run(
                program, piece.shape, None, q[:, :, rows], keys[:, :, piece.keys], values[:, :, piece.keys]
            )
            if plan.softmax and total is None:
                before, found = whole[0][0][:, :, rows], seen[0][0]
                after = torch.logaddexp(before, found)
                out[:, :, rows] *= weight_of(before, after)[..., None]
                part = part.to(out.dtype).mul_(weight_of(found, after)[..., None])
            out[:, :, rows] += part
            for stat, into, new in zip(watched, whole, seen, strict=True):
                if stat.axis != "keys":
                    for x, y in zip(into, merge(stat, [x[:, :, rows] for x in into], new), strict=True):
                        x[:, :, rows] = y
            for mass, i in zip(masses, by_key, strict=True):
                mass[:, :, piece.keys] += seen[i][0]
            del part, seen  # before the next piece needs as much
        return masses

    def _pieces(self, owner: int) -> Iterator[_Piece]:
        """What there is to compute of this rank's queries and another's keys: pieces in which the mask sees a key."""
        for rows in self.rows:
            for keys in chunks(self.m, owner, self.ring.size, self.zigzag):
                piece = self._piece(rows, keys)
                if piece.place.sees(self.plan.spec.mask, piece.shape):
                    yield piece

    def _piece(self, rows: Chunk, keys: Chunk) -> _Piece:
        s = self.shape
        place = Place(rows.start, keys.start, self.n, self.m, self.offset, s.counted)
        shape = Shape(s.batch, s.kv_heads, s.rep, len(rows), len(keys), 0, s.counted, s.device)  # the place tells more
        return _Piece(place, shape, rows.here, keys.here)

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, learned: Sequence[Tensor], out: Tensor, lse: Tensor | None,
        whole: list[list[Tensor]], d_out: Tensor, d_whole: list[list[Tensor | None]],
    ) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
        """Gradients of prepared q, k and v, and this rank's share of those of learned tensors."""
        plan = self.plan
        looks = self._looks(whole, d_whole, q.device)
        d_learned = [torch.zeros_like(x) for x in learned]
        total = pull = None
        if lse is not None:
            total = plan.total(lse)
            if plan.rescales and all(isinstance(look.stat, OF_SCORES) for look in looks):
                pull = -(d_out * out).sum(-1)
            else:
                pull = self._pull(total, q, k, v, looks, d_out)
            self._sink(lse, pull, learned, d_learned)
            if looks or not self._closed(q, total):  # the total's part comes as the gradient of the rows' mass
                looks = [_Look(RowMass(), [pull], [pull]), *looks]
        wide = band.ACCUMULATE.get(q.dtype, q.dtype)
        dq = torch.zeros_like(q, dtype=wide)
        sums = Sums(self.ring, self.lengths)
        for owner, visiting in self.ring.visits([k, v, *_by_key(looks)], self.lengths):
            d_keys = [torch.zeros_like(x, dtype=wide) for x in visiting[:2]]
            for piece in self._pieces(owner):
                normalizer = plan.normalizer
                if total is not None and pull is not None:
                    normalizer = Known(total[:, :, piece.rows], pull[:, :, piece.rows])
                found = self._gradients(piece, normalizer, q, visiting, looks, d_out, learned)
                dq[:, :, piece.rows] += found[0]
                for into, more in zip(d_keys, found[1:3], strict=True):
                    into[:, :, piece.keys] += more
                for into, more in zip(d_learned, found[3:], strict=True):
                    into += more
                del found, more  # before the next piece needs as much
            sums.add(d_keys)
        return [dq, *sums.home()], d_learned

    def _looks(
        self, whole: list[list[Tensor]], grads: list[list[Tensor | None]], device: torch.device
    ) -> list[_Look]:  # fmt: skip
        """The stats through which a gradient comes on any rank: all ranks must go the same rounds."""
        asked = torch.tensor([any(g is not None for g in found) for found in grads], device=device).to(torch.int32)
        if len(grads):
            self.ring.reduce(asked, dist.ReduceOp.MAX)
        return [
            _Look(stat, saw, [torch.zeros_like(x) if g is None else g for x, g in zip(saw, found, strict=True)])
            for stat, saw, found, wanted in zip(self.plan.stats, whole, grads, asked.tolist(), strict=True)
            if wanted
        ]

    def _closed(self, q: Tensor, total: Tensor) -> bool:
        """Can the band's backward do without autograd?"""
        place = Place(0, 0, self.n, self.m, self.offset, self.shape.counted)
        scale = self.plan.spec.form.scale(q.shape[-1])
        return scale is not None and self.plan.program(place, Known(total), []).closed_backward

    def _sink(self, lse: Tensor, pull: Tensor, learned: Sequence[Tensor], d_learned: list[Tensor]) -> None:
        """Gradient of a learned sink, from that of the total."""
        for tensor, into in zip(learned, d_learned, strict=True):
            if tensor is self.plan.sink:
                with torch.enable_grad():
                    total = self.plan.total(lse)
                into += torch.autograd.grad(total, tensor, pull)[0]

    def _pull(self, total: Tensor, q: Tensor, k: Tensor, v: Tensor, looks: list[_Look], d_out: Tensor) -> Tensor:
        """Gradient of a softmax's total ``[B, H, n]``, by a round of its own."""
        pull = torch.zeros_like(total)
        for owner, visiting in self.ring.visits([k, v, *_by_key(looks)], self.lengths):
            for piece in self._pieces(owner):
                leaf = total[:, :, piece.rows].clone().requires_grad_()
                pull[:, :, piece.rows] += self._gradients(piece, Known(leaf), q, visiting, looks, d_out, [leaf])[-1]
        return pull

    def _gradients(
        self, piece: _Piece, normalizer: Normalizer, q: Tensor, visiting: list[Tensor], looks: list[_Look],
        d_out: Tensor, others: Sequence[Tensor],
    ) -> list[Tensor]:  # fmt: skip
        """Gradients of the piece's queries, keys and values, and of other tensors.

        Visiting are keys, values, and the gradients of stats of keys.
        """
        rows, keys = piece.rows, piece.keys
        k, v, *d_seen = visiting
        leaves = [x.detach().requires_grad_() for x in (q[:, :, rows], k[:, :, keys], v[:, :, keys])]
        program = self.plan.program(piece.place, normalizer, [look.stat for look in looks])
        with torch.enable_grad():
            out, seen = band.run(program, piece.shape, None, *leaves)
        outputs, gradients = [out], [d_out[:, :, rows].to(out.dtype)]
        by_key = iter(d_seen)
        for look, new in zip(looks, seen, strict=True):
            if look.stat.axis == "keys":
                shares = [next(by_key)[:, :, keys]]
            else:
                saw, grads = ([x[:, :, rows] for x in tensors] for tensors in (look.saw, look.grads))
                shares = share(look.stat, saw, grads, new)
            for x, gradient in zip(new, shares, strict=False):  # key numbers have none
                outputs.append(x)
                gradients.append(gradient)
        wanted = [*leaves, *others]
        found = torch.autograd.grad(outputs, wanted, gradients, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True)]


@dataclass
class _Look:
    """A stat through which a gradient comes: what it saw of this rank's rows (or keys), and the gradients of that."""

    stat: Stat
    saw: list[Tensor]
    grads: list[Tensor]


def _by_key(looks: list[_Look]) -> list[Tensor]:
    """Gradients of stats of keys, which go round with them."""
    return [look.grads[0] for look in looks if look.stat.axis == "keys"]


class _Across(torch.autograd.Function):
    """Forward and backward of a whole call on one rank; the graph holds what the rank owns."""

    @staticmethod
    def forward(ctx: Any, run: _Run, q: Tensor, k: Tensor, v: Tensor, *learned: Tensor) -> tuple[Tensor, ...]:
        out, lse, whole = run.forward(*run.plan.spec.form.prepare(q, k), v)
        flat = [x for tensors in whole for x in tensors]
        ctx.mark_non_differentiable(*[x for x in flat if not x.is_floating_point()])
        ctx.run, ctx.learned = run, learned
        ctx.save_for_backward(q, k, v, out, lse, *flat)
        ctx.set_materialize_grads(False)
        return (out, *flat)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, *d_flat: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *flat = ctx.saved_tensors
        run, learned = ctx.run, ctx.learned
        d_out = torch.zeros_like(out) if d_out is None else d_out
        form = run.plan.spec.form
        raw = [x.detach().requires_grad_() for x in (q, k)]
        with torch.enable_grad():
            prepared = form.prepare(*raw)
        (dq, dk, dv), d_learned = run.backward(
            *(x.detach() for x in prepared), v, learned, out, lse, run.by_stat(flat), d_out, run.by_stat(d_flat)
        )
        dq, dk, *more = torch.autograd.grad(
            prepared, [*raw, *learned], [dq.to(q.dtype), dk.to(k.dtype)], allow_unused=True
        )
        for into, part in zip(d_learned, more, strict=True):
            if part is not None:
                into += part
            run.ring.reduce(into)
        return None, dq, dk, dv.to(v.dtype), *d_learned
