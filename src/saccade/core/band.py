"""The band executor: pure PyTorch, any device, forward and backward by recomputation.

For each strip (see :mod:`layout`) the scores of its rows against exactly the keys they may see go into one reused
buffer; they are masked, normalized and edited there, stats are reduced, and the product with the values is written.
Memory beyond the results is one tile, whatever N is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .crew import hands, share
from .layout import Grain, lay_out
from .program import Program
from .reach import narrowed
from .selectors import Selection
from .spec import Attention
from .stats import Stat
from .strips import Gathered, Layout, Piece, Shape, Strip
from .tile import At

ACCUMULATE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


def why_not(spec: Attention, stats: Sequence[Stat]) -> str | None:
    """The reason why the band cannot run this, or ``None``."""
    if spec.select is None:
        return None
    if spec.mixes_heads:
        return "a part mixes heads, and select= gives each head its own keys"
    for stat in stats:
        if spec.select.rows % stat.block[0]:
            return (
                f"{type(stat).__name__} counts blocks of {stat.block[0]} rows, which do not divide the selection's"
                f" {spec.select.rows}"
            )
    return None


def run(
    program: Program, shape: Shape, selection: Selection | None, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, list[list[Tensor]]]:
    """Attention and the whole tensors of each stat.

    Args:
        program: spec and stats.
        shape: sizes.
        selection: chosen blocks, if the spec selects.
        q: prepared queries ``[B, H, N, D]``.
        k, v: prepared keys ``[B, Hkv, M, D]`` and values.
    """
    multiple = max((s.block[0] for s in program.stats), default=1)
    for stat in program.stats:
        while multiple % stat.block[0]:
            multiple += max(s.block[0] for s in program.stats)
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *program.spec.learned()))
    narrow = program.plain and q.dtype in ACCUMULATE and not trained
    # Threads may share rows as they come, but the keys of a group are summed by one of them alone.
    count = hands(shape.device, shape.batch * shape.heads * shape.n * shape.m)
    summed = trained or any(s.axis == "keys" for s in program.stats)
    if summed and (shape.batch if program.spec.mixes_heads else shape.groups) < count:
        count = 1
    several = trained or "scores" in program.needs
    grain = Grain.own(several) if count > 1 else Grain.narrow() if narrow else Grain.trained() if trained else Grain()
    layout = lay_out(
        shape, narrowed(program, shape, q, k), all_heads=program.spec.mixes_heads, row_multiple=multiple,
        selection=selection, grain=grain, apart=2 * count if summed and count > 1 else 1,
    )  # fmt: skip
    n, m = shape.n, shape.m
    inner = layout.shape
    q = _pad(q.reshape(inner.groups, inner.rep, n, q.shape[-1]), layout.row_multiple)
    k = _pad(k.reshape(shape.groups, m, k.shape[-1]), layout.column_multiple)
    v = _pad(v.reshape(shape.groups, m, v.shape[-1]), layout.column_multiple)
    if torch.is_grad_enabled():
        out, *flat = _Band.apply(program, layout, count, q, k, v, *program.spec.learned())
    else:
        out, *flat = _forward(program, layout, count, q, k, v)
    out = out[:, :, :n].reshape(shape.batch, shape.heads, n, v.shape[-1])
    whole: list[list[Tensor]] = []
    for stat in program.stats:
        count = len(stat.widths(m))
        tensors, flat = flat[:count], flat[count:]
        trimmed = []
        for x in tensors:
            x = x.reshape(shape.batch, shape.heads, *x.shape[2:])
            if stat.axis == "rows":
                x = x[:, :, :n]
            elif stat.axis in ("keys", "chosen"):
                x = x[..., :m]
            else:
                x = x[:, :, : -(-n // stat.block[0])]
            trimmed.append(x)
        whole.append(trimmed)
    return out, whole


def _pad(x: Tensor, multiple: int) -> Tensor:
    missing = -x.shape[-2] % multiple
    return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x


class _Scratch:
    """Buffers that every tile of a thread reuses, one per dtype and purpose, large enough for the largest tile."""

    def __init__(self, device: torch.device, cells: int):
        self.device, self.cells = device, cells
        self.buffers: dict[tuple[torch.dtype, str], Tensor] = {}

    def __call__(self, shape: Sequence[int], dtype: torch.dtype, purpose: str) -> Tensor:
        size = torch.Size(shape).numel()
        buffer = self.buffers.get((dtype, purpose))
        if buffer is None or buffer.numel() < size:
            buffer = self.buffers[dtype, purpose] = torch.empty(max(size, self.cells), dtype=dtype, device=self.device)
        return buffer[:size].view(shape)


def _scores(program: Program, strip: Piece, q: Tensor, k: Tensor, scratch: _Scratch) -> Tensor:
    """Scores of a strip in the accumulation dtype (in the input's own if the program is plain)."""
    scale = program.form.scale(q.shape[-1])
    rows, keys = strip.rows(q), strip.keys(k, scratch)
    if scale is None:
        _, rep, n, _ = strip.tile
        tile = program.form.tile(rows.unflatten(1, (rep, n)), keys[:, None])
        return tile.to(ACCUMULATE.get(tile.dtype, tile.dtype))
    # A power of two costs no precision on the queries, and the product without a scale is faster.
    if scale > 0 and math.log2(scale).is_integer():
        rows, scale = rows * scale, 1.0
    flat = scratch((rows.shape[0], rows.shape[1], keys.shape[1]), q.dtype, "scores")
    tile = _product(rows, keys.mT, flat, scale).view(strip.tile)
    wide = ACCUMULATE.get(q.dtype, q.dtype)
    return tile if wide == q.dtype or program.plain else scratch(strip.tile, wide, "wide").copy_(tile)


def _one_by_one(a: Tensor) -> bool:
    """Is a batch of products of this left factor faster one plain product at a time?"""
    return a.device.type == "cpu" and a.dtype in ACCUMULATE and a.shape[1] >= 64


def _product(a: Tensor, b: Tensor, out: Tensor, scale: float = 1.0) -> Tensor:
    """``scale * bmm``, scaled before it is rounded; narrow dtypes on a CPU are faster one plain product at a time."""
    if not _one_by_one(a):
        return torch.bmm(a, b, out=out) if scale == 1 else torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)
    for left, right, whole in zip(a, b, out, strict=True):
        if scale == 1:
            torch.mm(left, right, out=whole)
        else:
            torch.addmm(whole, left, right, beta=0, alpha=scale, out=whole)
    return out


def _put_values(
    strip: Piece, weights: Tensor, v: Tensor, factor: Tensor | None, out: Tensor, scratch: _Scratch
) -> None:
    """Write weights times values (times a factor of each row) to the strip's rows of ``[groups, rep, N, D]``."""
    g, rep, n, m = strip.tile
    flat = weights.reshape(g, rep * n, m).to(v.dtype)
    if rep == 1 and factor is None and isinstance(strip, Strip) and _one_by_one(flat):
        _product(flat, strip.keys(v), strip.get_rows(out)[:, 0])
        return
    mine = strip.own(out) if isinstance(strip, Gathered) else None
    if mine is not None:
        _product(flat, strip.keys(v, scratch), mine)
        if factor is not None:
            mine.mul_(factor[:, 0])
        return
    values = _product(flat, strip.keys(v, scratch), v.new_empty(g, rep * n, v.shape[-1])).view(g, rep, n, -1)
    strip.put_rows(out, values if factor is None else values.mul_(factor))


class _Places:
    """Where each stat's tensors are written, and read back for their gradients."""

    def __init__(self, program: Program, layout: Layout):
        self.stats, self.shape = program.stats, layout.shape
        self.rows = -(-self.shape.n // layout.row_multiple) * layout.row_multiple
        self.columns = -(-self.shape.m // layout.column_multiple) * layout.column_multiple

    def empty(self, like: Tensor) -> list[list[Tensor]]:
        """Zeros (what a row or key that no tile touches gets) for every stat."""
        shape = self.shape
        heads = (shape.groups, shape.rep)
        whole = []
        for stat in self.stats:
            fill = float("-inf") if stat.needs & {"lse", "maximum"} else 0.0
            if stat.axis == "rows":
                sizes = [(*heads, self.rows, *width) for width in stat.widths(shape.m)]
            elif stat.axis == "keys":
                sizes = [(*heads, self.columns)]
            elif stat.axis == "blocks":
                sizes = [(*heads, -(-self.rows // stat.block[0]), -(-shape.m // stat.block[1]))]
            else:
                sizes = [(*heads, len(stat.chosen(shape.n)), self.columns)]
            whole.append(
                [
                    like.new_full(size, -1, dtype=torch.long) if i in stat.keys else like.new_full(size, fill)
                    for i, size in enumerate(sizes)
                ]
            )
        return whole

    def put(self, strip: Piece, whole: list[list[Tensor]], seen: list[tuple[Tensor, ...]]) -> None:
        for stat, tensors, pieces in zip(self.stats, whole, seen, strict=True):
            for i, piece in enumerate(pieces):
                if stat.axis == "rows":
                    strip.put_rows(tensors[i], piece)
                elif stat.axis == "keys":
                    strip.add_columns(tensors[i], piece)
                elif stat.axis == "blocks":
                    strip.put_blocks(tensors[i], piece, stat.block[0])
                else:
                    strip.put_chosen(tensors[i], piece, stat.chosen(self.shape.n))

    def take(self, strip: Piece, index: int, grad: Tensor) -> Tensor:
        stat = self.stats[index]
        if stat.axis == "rows":
            return strip.get_rows(grad)
        if stat.axis == "keys":
            return strip.get_columns(grad)
        if stat.axis == "blocks":
            return strip.get_blocks(grad, stat.block[0])
        return strip.get_chosen(grad, stat.chosen(self.shape.n))


def _forward(program: Program, layout: Layout, count: int, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Output and the tensors of all stats, tile by tile, with ``count`` threads."""
    places = _Places(program, layout)
    whole = places.empty(torch.empty(0, dtype=ACCUMULATE.get(q.dtype, q.dtype), device=q.device))
    out = (v.new_empty if layout.covers else v.new_zeros)(*q.shape[:3], v.shape[-1])

    def work(strips: Iterable[Piece]) -> None:
        scratch = _Scratch(q.device, layout.most)
        for strip, at in layout.places(strips):
            tile = _scores(program, strip, q, k, scratch)
            weights, seen, factor = program.fast(tile, at, strip.hidden(at), _may_be_empty(program, strip), scratch)
            _put_values(strip, weights, v, factor, out, scratch)
            places.put(strip, whole, seen)

    if count == 1 or any(stat.axis == "keys" for stat in program.stats):
        share(layout.runs(), work, count)
    else:
        # Whoever is free takes the next; the last ones first, which are a causal mask's longest.
        share([reversed(layout.strips)] * count, work, count)
    return [out, *(x for tensors in whole for x in tensors)]


class _Band(torch.autograd.Function):
    """Forward and backward of a whole call; the graph holds the inputs, never a tile."""

    @staticmethod
    def forward(
        ctx: Any, program: Program, layout: Layout, count: int, q: Tensor, k: Tensor, v: Tensor, *learned: Tensor
    ) -> tuple[Tensor, ...]:
        out, *flat = _forward(program, layout, count, q, k, v)
        ctx.mark_non_differentiable(*[x for x in flat if not x.is_floating_point()])
        ctx.program, ctx.layout, ctx.count, ctx.learned = program, layout, count, learned
        ctx.save_for_backward(q, k, v)
        ctx.set_materialize_grads(False)
        return (out, *flat)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, *grad_seen: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        program, layout, learned = ctx.program, ctx.layout, ctx.learned
        if grad_out is None:
            grad_out = v.new_zeros(*q.shape[:3], v.shape[-1])
        steps = _Backward(program, layout, (q, k, v), grad_out, grad_seen, learned)
        d_learned = [torch.zeros_like(t) for t in learned]
        for found in share(layout.runs(), steps.run, ctx.count):
            for total, part in zip(d_learned, found, strict=True):
                total += part
        return None, None, None, steps.dq, steps.dk.to(k.dtype), steps.dv.to(v.dtype), *d_learned


def _may_be_empty(program: Program, strip: Piece) -> bool:
    """Could a row of this strip see nothing? Scores may hide keys too, by -inf."""
    return strip.may_be_empty or program.scores_hide


class _Backward:
    """Gradients of a call, gathered strip by strip; each strip is computed again."""

    def __init__(
        self, program: Program, layout: Layout, inputs: tuple[Tensor, ...], grad_out: Tensor,
        grad_seen: Sequence[Tensor | None], learned: Sequence[Tensor],
    ):  # fmt: skip
        self.program, self.layout = program, layout
        self.q, self.k, self.v = q, k, v = inputs
        self.grad_out, self.grad_seen, self.learned = grad_out, grad_seen, learned
        wide = ACCUMULATE.get(q.dtype, q.dtype)
        self.dq = torch.zeros_like(q)
        self.dk, self.dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        closed = program.closed_backward and program.form.scale(q.shape[-1]) is not None
        self.closed = closed and all(g is None for g in grad_seen)

    def run(self, strips: Iterable[Piece]) -> list[Tensor]:
        """Gradients of these strips; those of learned tensors are returned."""
        scratch = _Scratch(self.q.device, self.layout.most)
        d_learned = [torch.zeros_like(t) for t in self.learned]
        for strip, at in self.layout.places(strips):
            if self.closed:
                self._closed(strip, at, scratch)
            else:
                self._through_autograd(strip, at, scratch, d_learned)
        return d_learned

    def _closed(self, strip: Piece, at: At, scratch: _Scratch) -> None:
        """One strip, from its weights alone."""
        program = self.program
        g, rep, n, m = strip.tile
        tile = _scores(program, strip, self.q, self.k, scratch)
        weights = program.normalize(tile, at, strip.hidden(at), _may_be_empty(program, strip))
        edited = weights
        if program.edits:
            edited = scratch(weights.shape, weights.dtype, "edited").copy_(weights)
            for edit in program.edits:
                edited = edit.inplace(edited, at, None)
        d_rows = strip.get_rows(self.grad_out).reshape(g, rep * n, -1)
        strip.add_keys(self.dv, torch.bmm(edited.reshape(g, rep * n, m).mT.to(d_rows.dtype), d_rows))
        d_flat = scratch((g, rep * n, m), self.q.dtype, "grad")
        torch.bmm(d_rows, strip.keys(self.v).mT, out=d_flat)
        d_tile = d_flat.view(strip.tile)
        if d_tile.dtype != weights.dtype:
            d_tile = scratch(strip.tile, weights.dtype, "wide grad").copy_(d_tile)
        for edit in program.edits:  # each multiplies by what does not depend on the weights, so the order is free
            d_tile = edit.inplace(d_tile, at, None)
        d_scores = program.normalizer.backward_inplace(weights, d_tile, at)
        assert d_scores is not None
        self._products(strip, d_scores)

    def _through_autograd(self, strip: Piece, at: At, scratch: _Scratch, d_learned: list[Tensor]) -> None:
        """One strip, through autograd over the definition of the tile."""
        program = self.program
        g, rep, n, m = strip.tile
        d_rows = strip.get_rows(self.grad_out).reshape(g, rep * n, -1)
        dot = program.form.scale(self.q.shape[-1]) is not None
        if dot:
            sources = [_scores(program, strip, self.q, self.k, scratch)]
        else:
            sources = [strip.rows(self.q), strip.keys(self.k)]
        sources = [x.detach().requires_grad_() for x in sources]
        with torch.enable_grad():
            tile = sources[0]
            if not dot:
                tile = program.form.tile(sources[0].unflatten(1, (rep, n)), sources[1][:, None])
                tile = tile.to(ACCUMULATE.get(tile.dtype, tile.dtype))
            weights, seen = program.define(tile, at, strip.hidden(at))
        d_weights = torch.bmm(d_rows, strip.keys(self.v).mT).view(strip.tile).to(weights.dtype)
        told = [(weights, d_weights)]
        places = _Places(program, self.layout)
        flat = iter(self.grad_seen)
        for index, pieces in enumerate(seen):
            for piece in pieces:
                grad = next(flat)
                if grad is not None:
                    told.append((piece, places.take(strip, index, grad).view(piece.shape)))
        told = [pair for pair in told if pair[0].requires_grad]  # a score may ignore what it is given
        found: Sequence[Tensor | None] = [None] * len([*sources, *self.learned])
        if told:
            outputs, gradients = zip(*told, strict=True)
            found = torch.autograd.grad(outputs, [*sources, *self.learned], gradients, allow_unused=True)
        for total, part in zip(d_learned, found[len(sources) :], strict=True):
            if part is not None:
                total += part
        flat_weights = weights.detach().reshape(g, rep * n, m).to(d_rows.dtype)
        strip.add_keys(self.dv, torch.bmm(flat_weights.mT, d_rows))
        if dot:
            if found[0] is not None:
                self._products(strip, found[0])
            return
        d_query, d_key = found[:2]
        if d_query is not None:
            strip.put_rows(self.dq, d_query.view(g, rep, n, -1))
        if d_key is not None:
            strip.add_keys(self.dk, d_key)

    def _products(self, strip: Piece, d_scores: Tensor) -> None:
        """What the gradient of the scores gives the queries and keys of a dot product."""
        g, rep, n, m = strip.tile
        scale = self.program.form.scale(self.q.shape[-1])
        assert scale is not None
        flat = d_scores.reshape(g, rep * n, m).to(self.q.dtype)
        strip.put_rows(self.dq, torch.bmm(flat, strip.keys(self.k)).mul_(scale).view(g, rep, n, -1))
        strip.add_keys(self.dk, torch.bmm(flat.mT, strip.rows(self.q)).mul_(scale))
