"""How a call is cut into strips: by the mask's own answer for blocks, by a look at a small mask, or by selection."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from .masks import EMPTY, FULL, And, Causal, Full, Mask, Span
from .program import Veil
from .selectors import Selection
from .strips import Gathered, Layout, Piece, Shape, Stair, Strip

SMALL = 2**18  # cells of a whole mask that is cheaper to look at than to classify
COLUMNS = 64  # keys per block of the map
STAIR = 1536  # keys per row up to which the steps of a window are taken together
WASTE = 1.3  # keys touched per key visited up to which a contiguous range beats a gather

Runs = list[tuple[int, int]]


@dataclass(frozen=True)
class Grain:
    """How large a tile may be.

    Measured on two cores: a batch of two products uses both, where one wide product does not; in bfloat16 one product
    of many rows is fastest. ``cells`` of a tile of mean length: 8 MB, which the last level of cache holds.
    """

    cells: int = 2**21
    rows: int = 256
    groups: int = 2

    @staticmethod
    def trained() -> Grain:
        """For forward and backward, which hold several tiles at a time."""
        return Grain(2**20)

    @staticmethod
    def narrow() -> Grain:
        """For two-byte tiles that no float32 copy accompanies."""
        return Grain(2**22, 512, 1)

    @staticmethod
    def own(several: bool) -> Grain:
        """For one of several threads, which does one product at a time; ``several``: it holds more than one tile."""
        return Grain(2**20 if several else 2**21, 256, 1)


def lay_out(
    shape: Shape,
    mask: Mask,
    *,
    all_heads: bool = False,
    row_multiple: int = 1,
    selection: Selection | None = None,
    grain: Grain | None = None,
    apart: int = 1,
) -> Layout:
    """Cut a call into strips.

    Args:
        shape: sizes of the call.
        mask: which keys are visible.
        all_heads: every tile must cover all heads of a sample (a part mixes them).
        row_multiple: strips must start and end at multiples of this (a stat's blocks).
        selection: chosen key blocks, within the mask.
        grain: size of the tiles.
        apart: so many runs of key heads at most, between which no strip lies: see :meth:`Layout.runs`.
    """
    cut = _Cut(shape, mask, all_heads, row_multiple, grain or Grain(), apart)
    if selection is not None:
        return cut.selected(selection)
    if isinstance(mask, Full):
        return cut.full()
    if shape.n * shape.m <= SMALL:
        return cut.looked_at()
    return cut.classified()


@dataclass
class _Step:
    """A row block and the range of keys it visits; ``look``: the runs of them where the mask must be looked at."""

    r0: int
    rows: int
    k0: int
    k1: int
    look: Runs
    may_be_empty: bool

    def follows(self, before: _Step) -> bool:
        """Is it the one before, moved down the diagonal?"""
        rows = before.rows
        moved = (before.r0 + rows, before.k0 + rows, before.k1 + rows, rows, before.look)
        return moved == (self.r0, self.k0, self.k1, self.rows, self.look)


@dataclass
class _Holes:
    """Row blocks ``[R]`` of some groups with blocks between those visited that nobody sees; codes ``[R, nk]``."""

    groups: tuple[int, int]
    rows: Tensor
    codes: Tensor


class _Undecided:
    """Which members of a conjunction the partial blocks are partial by: only these must be asked about their cells."""

    def __init__(self, mask: Mask):
        self.whole, self.members = mask, _members(mask)
        self.asked: set[int] = set()

    def look(self, codes: Tensor, span: Span, shape: Shape) -> None:
        """Take note of another span and its codes."""
        if len(self.members) == 1 or (shape.rep > 1 and codes.ndim > 3 and codes.shape[-3] > 1):
            self.asked = {*range(len(self.members))}
        partial = (codes > EMPTY) & (codes < FULL)
        for i, member in enumerate(self.members):
            if i not in self.asked and bool(((member.blocks(span) != FULL) & partial).any()):
                self.asked.add(i)

    @property
    def mask(self) -> Mask:
        """The conjunction of those members."""
        if len(self.asked) == len(self.members):
            return self.whole
        return reduce(And, [self.members[i] for i in sorted(self.asked)] or [Full()])


def _members(mask: Mask) -> list[Mask]:
    return [*_members(mask.left), *_members(mask.right)] if isinstance(mask, And) else [mask]


@dataclass
class _Cut:
    shape: Shape
    mask: Mask
    all_heads: bool
    row_multiple: int
    grain: Grain
    apart: int

    def __post_init__(self) -> None:
        self._known: dict[tuple[int, ...], Veil] = {}
        self._bounds = self._cut_groups(self.shape.kv_heads if self.all_heads else 1)

    def _cut_groups(self, together: int) -> list[int]:
        """Where the runs of groups end; ``together`` neighbours are never cut."""
        count = self.shape.groups // together
        apart = min(self.apart, count)
        return [count * (i + 1) // apart * together for i in range(apart)]

    def full(self) -> Layout:
        """Every row sees every key."""
        shape = self.shape
        rows = self._rows(shape.m, shape.m)
        strips: list[Piece] = [
            s for r0 in range(0, shape.n, rows) for s in self._strips(r0, rows, 0, shape.m, [], False)
        ]
        return Layout(shape, strips, 1, 1, self._bounds)

    def looked_at(self) -> Layout:
        """A small mask (a decode step, a short text): cut to the range of keys that anyone sees."""
        shape = self.shape
        seen = self.mask.visible(shape.everywhere)
        anyone = seen.expand(*seen.shape[:3], shape.m).flatten(0, 2).any(0).nonzero()[:, 0]
        if not len(anyone):
            return Layout(shape, [], 1, 1, self._bounds)
        k0, k1 = int(anyone[0]), int(anyone[-1]) + 1
        seen = seen.expand(*seen.shape[:3], shape.m)[..., k0:k1]
        whole = bool(seen.all())
        if self.mask.by_distance:
            self._known[-k0, shape.n, k1 - k0] = Veil(~seen)
        strips = self._strips(0, shape.n, k0, k1, [] if whole else [(0, k1 - k0)], not whole)
        return Layout(shape, list(strips), 1, 1, self._bounds)

    def classified(self) -> Layout:
        """Strips from the mask's own answer for blocks; a row of blocks with holes is gathered."""
        shape = self.shape
        mean, most = self._probe()
        # Under a window all rows visit about as many keys.
        stairs = self.mask.by_distance and not self.all_heads and 0.75 * most < mean <= STAIR
        rows = -(-64 // self.row_multiple) * self.row_multiple if stairs else self._fewer(self._rows(mean, most))
        strips: list[Piece] = []
        holes: list[_Holes] = []
        undecided = _Undecided(self.mask)
        slab = max(1, self.grain.cells // -(-shape.m // COLUMNS))  # row blocks classified at once
        for first in range(0, -(-shape.n // rows), slab):
            span = self._span(rows, COLUMNS, first, first + slab)
            whole = self.mask.blocks(span)
            for groups, codes in _codes_by_group(whole, shape):
                holed = _holed(codes)
                if len(holed):
                    undecided.look(whole, span, shape)
                    holes.append(_Holes(groups, first + holed, codes[holed]))
                    codes = codes.index_fill(0, holed, EMPTY)
                steps: list[_Step] = []
                for i, (visited, partial) in enumerate(_runs(codes)):
                    if not visited:
                        continue
                    low, high = visited[0][0], visited[-1][1]
                    gaps = [(a, z) for (_, a), (z, _) in itertools.pairwise(visited)]
                    k0, k1 = low * COLUMNS, min(high * COLUMNS, shape.m)
                    look = [
                        (a * COLUMNS - k0, min(z * COLUMNS, shape.m) - k0) for a, z in _merge(sorted([*partial, *gaps]))
                    ]
                    may_be_empty = sum(z - a for a, z in look) == k1 - k0
                    r0 = (first + i) * rows
                    step = _Step(r0, min(rows, shape.n - r0), k0, k1, look, may_be_empty)
                    if steps and not (stairs and step.follows(steps[-1])):
                        strips += self._stairs(steps, groups)
                        steps = []
                    steps.append(step)
                strips += self._stairs(steps, groups)
        known: dict[tuple[int, ...], Veil] = {}
        for hole in holes:
            strips += self._around(hole, rows, undecided.mask, known)
        multiples = (rows, COLUMNS) if holes else (1, 1)
        return Layout(shape, strips, *multiples, self._bounds)

    def selected(self, selection: Selection) -> Layout:
        """Strips from chosen blocks: tasks of like length together, blocks that need no look first."""
        rows, columns, chosen = selection.rows, selection.columns, selection.blocks
        before = shape = self.shape
        split = chosen.shape[1] not in (1, shape.kv_heads)
        if split:
            shape = self.shape = shape.split_rep()
            self._bounds = self._cut_groups(before.rep)
        nq, nk = -(-shape.n // rows), -(-shape.m // columns)
        chosen = chosen.expand(shape.batch, shape.kv_heads, nq, -1).reshape(shape.groups, nq, -1)
        chosen = chosen.sort(-1).values  # what lies side by side is fetched side by side
        kind = self._kinds(chosen, rows, columns).masked_fill(chosen < 0, EMPTY)
        if shape.n % rows:
            kind[:, -1].clamp_(max=1)  # the padding of rows and keys must be looked at
        if shape.m % columns:
            kind = torch.where(chosen == nk - 1, kind.clamp(max=1), kind)
        kind, order = kind.sort(stable=True, dim=-1, descending=True)  # full, partial, empty
        chosen = chosen.gather(-1, order).masked_fill(kind == EMPTY, -1).flatten(0, 1)
        strips: list[Piece] = []
        for first, last in itertools.pairwise([0, *self._bounds]):
            tasks = torch.arange(first * nq, last * nq, device=shape.device)
            group = key_group = tasks // nq
            if split:
                key_group = group // before.heads * before.kv_heads + group % before.heads // before.rep
            strips += self._gathered(
                chosen, kind.flatten(0, 1), tasks, group, key_group, tasks % nq, rows, columns, self.mask, self._known
            )
        return Layout(shape, strips, rows, columns, self._bounds)

    def _kinds(self, chosen: Tensor, rows: int, columns: int) -> Tensor:
        """What the mask says of chosen blocks ``[groups, nq, s]``."""
        shape, nq = self.shape, chosen.shape[1]
        nk = -(-shape.m // columns)
        if self.mask.by_distance and nq * nk > SMALL:  # ask about these blocks alone
            q = torch.arange(nq, device=shape.device)[:, None] * rows
            k = chosen.clamp(min=0) * columns
            k_hi = (k + columns).clamp(max=shape.m) - 1
            q_hi = (q + rows).clamp(max=shape.n) - 1
            asked = Span(q, q_hi, k, k_hi, shape.batch, shape.heads, shape.n, shape.m, shape.offset)
            return self.mask.blocks(asked)
        codes = self.mask.blocks(self._span(rows, columns))
        codes = _shared_codes(codes[(None,) * (4 - codes.ndim)], shape)
        codes = codes.expand(shape.batch, shape.kv_heads, nq, nk).reshape(-1, nq, nk)
        return codes.gather(-1, chosen.clamp(min=0))

    def _around(self, holes: _Holes, rows: int, mask: Mask, known: dict[tuple[int, ...], Veil]) -> Iterator[Gathered]:
        """Row blocks with holes, for all groups that share them: what they visit is brought together."""
        shape, codes = self.shape, holes.codes
        if shape.n % rows:
            codes = torch.where((holes.rows == shape.n // rows)[:, None], codes.clamp(max=1), codes)
        if shape.m % COLUMNS:
            codes = torch.cat([codes[:, :-1], codes[:, -1:].clamp(max=1)], -1)
        kind, chosen = codes.sort(stable=True, dim=-1, descending=True)
        longest = int((kind > EMPTY).sum(-1).max())
        kind, chosen = kind[:, :longest], chosen[:, :longest].masked_fill(kind[:, :longest] == EMPTY, -1)
        count = len(codes)
        for first, last in itertools.pairwise([0, *self._bounds]):
            groups = torch.arange(max(first, holes.groups[0]), min(last, holes.groups[1]), device=shape.device)
            source = torch.arange(count, device=shape.device)
            if self.all_heads:  # side by side, for parts that mix them
                source, group = source.repeat_interleave(len(groups)), groups.repeat(count)
            else:
                source, group = source.repeat(len(groups)), groups.repeat_interleave(count)
            yield from self._gathered(
                chosen, kind, source, group, group, holes.rows[source], rows, COLUMNS, mask, known,
                len(groups) if self.all_heads else 1,
            )  # fmt: skip

    def _gathered(
        self, chosen: Tensor, kind: Tensor, source: Tensor, group: Tensor, key_group: Tensor, row_block: Tensor,
        rows: int, columns: int, mask: Mask, known: dict[tuple[int, ...], Veil], together: int = 1,
    ) -> Iterator[Gathered]:  # fmt: skip
        """Strips of tasks ``[T]``: task ``t`` visits ``chosen[source[t]]``, full blocks first, then partial ones.

        Tasks of like length are taken together, and never fewer than ``together``.
        """
        shape, nq = self.shape, -(-self.shape.n // rows)
        length, full = (kind > EMPTY).sum(-1)[source], (kind == FULL).sum(-1)[source]
        order = length.argsort(descending=True, stable=True)[: int((length > 0).sum())]
        source, group, key_group, row_block = (x[order] for x in (source, group, key_group, row_block))
        lengths, fulls, numbers = (x.tolist() for x in (length[order], full[order], group * nq + row_block))
        start = 0
        while start < len(lengths):
            width = lengths[start]
            count = self._gathered_cells // (shape.rep * rows * columns * width) // together
            stop = min(start + max(1, count) * together, len(lengths))
            look = width - min(fulls[start:stop])
            run, last = divmod(numbers[start], nq), divmod(numbers[stop - 1], nq)
            side_by_side = run[0] == last[0] and numbers[start:stop] == [
                *range(numbers[start], numbers[start] + stop - start)
            ]
            yield Gathered(
                shape, group[start:stop], key_group[start:stop], row_block[start:stop],
                chosen[source[start:stop], :width], rows, columns, look, mask, look == width, known,
                run if side_by_side else None,
            )  # fmt: skip
            start = stop

    @property
    def _gathered_cells(self) -> int:
        """Half a tile: the keys and values that are brought together for it are about as large."""
        return self.grain.cells // 2

    def _span(self, rows: int, columns: int, first: int = 0, last: int | None = None) -> Span:
        s = self.shape
        return Span.grid(
            s.n, s.m, rows, columns, offset=s.offset, batch=s.batch, heads=s.heads, first=first, last=last,
            device=s.device,
        )  # fmt: skip

    def _probe(self) -> tuple[float, float]:
        """Mean and greatest number of keys that a row visits, from a coarse map."""
        rows, columns = (max(256, -(-size // 64)) for size in (self.shape.n, self.shape.m))
        visited = (self.mask.blocks(self._span(rows, columns)) > EMPTY).sum(-1).float() * columns
        return float(visited.mean()), float(visited.max())

    def _fewer(self, rows: int) -> int:
        """Fewer rows per strip where many together visit much more than each of them sees: a pattern with holes."""

        def cost(size: int) -> float:
            count = -(-self.shape.n // size)
            spans = (self._span(size, COLUMNS, i, i + 1) for i in {count // 4, count // 2, count * 3 // 4, count - 1})
            visited = sum(float((self.mask.blocks(span) > EMPTY).float().mean()) for span in spans)
            return visited * (1 + 16 / size)  # a product of few rows is slower

        sizes = [rows] + [size for size in (128, 64) if size < rows and size % self.row_multiple == 0]
        return rows if len(sizes) == 1 or isinstance(self.mask, Causal) else min(sizes, key=cost)

    def _rows(self, mean: float, most: float) -> int:
        """Rows per strip: many for the matrix product, few where few keys are visited, and so that the tile fits."""
        grain, rep = self.grain, self.shape.rep
        rows = grain.rows if mean >= 1536 else 128 if mean >= 256 else 64
        while rows > 64 and grain.groups * rows // 2 * rep * mean > grain.cells:
            rows //= 2
        while rows > 16 and rows * rep * most > 2 * grain.cells:
            rows //= 2
        return -(-min(rows, self.shape.n) // self.row_multiple) * self.row_multiple

    def _group_runs(self, cells: int, groups: tuple[int, int] | None = None) -> Iterator[tuple[int, int]]:
        """Cut the groups so that a tile with ``cells`` per group fits."""
        first, last = groups or (0, self.shape.groups)
        step = max(self.grain.groups, self.grain.cells // max(1, cells))
        if self.all_heads:
            step = max(1, step // self.shape.kv_heads) * self.shape.kv_heads
        for bound in self._bounds:
            for g in range(first, min(bound, last), step):
                yield g, min(g + step, bound, last)
            first = max(first, bound)

    def _strips(
        self, r0: int, rows: int, k0: int, k1: int, look: Runs, may_be_empty: bool,
        groups: tuple[int, int] | None = None,
    ) -> Iterator[Strip]:  # fmt: skip
        r1 = min(r0 + rows, self.shape.n)
        for g0, g1 in self._group_runs(self.shape.rep * rows * (k1 - k0), groups):
            yield Strip(self.shape, g0, g1, r0, r1, k0, k1, look, self.mask, may_be_empty, self._known)

    def _stairs(self, steps: list[_Step], groups: tuple[int, int]) -> Iterator[Piece]:
        """A row block alone is a strip; several that are alike are a stair of each group."""
        if len(steps) == 1:
            yield from self._strips(**vars(steps[0]), groups=groups)
        elif steps:
            width = steps[0].k1 - steps[0].k0
            most = max(1, self.grain.cells // (self.shape.rep * steps[0].rows * width))
            for group in range(*groups):
                for i in range(0, len(steps), most):
                    s, count = steps[i], len(steps[i : i + most])
                    yield Stair(
                        self.shape, group, count, s.r0, s.rows, s.k0, width, s.look, self.mask, s.may_be_empty,
                        self._known,
                    )  # fmt: skip


def _shared_codes(codes: Tensor, shape: Shape) -> Tensor:
    """Codes ``[B, Hkv, nq, nk]`` from ``[B, H, nq, nk]``: heads that share keys visit what any of them sees."""
    if codes.shape[1] == 1:
        return codes
    apart = codes.unflatten(1, (shape.kv_heads, shape.rep))
    low, high = apart.amin(2), apart.amax(2)
    return torch.where(low == high, low, 1).to(torch.int8)


def _codes_by_group(codes: Tensor, shape: Shape) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Codes ``[nq, nk]`` for runs of groups that share them."""
    codes = _shared_codes(codes[(None,) * (4 - codes.ndim)], shape)
    batch, heads = codes.shape[:2]
    if batch == heads == 1:
        yield (0, shape.groups), codes[0, 0]
    elif heads == 1:
        for b in range(batch):
            yield (b * shape.kv_heads, (b + 1) * shape.kv_heads), codes[b, 0]
    else:
        # Neighbours with the same codes share strips.
        first, before = 0, codes[0, 0]
        for group in range(1, shape.groups + 1):
            b, h = divmod(group, shape.kv_heads)
            own = codes[b if batch > 1 else 0, h] if group < shape.groups else None
            if own is None or not torch.equal(own, before):
                yield (first, group), before
                first, before = group, own if own is not None else before


def _holed(codes: Tensor) -> Tensor:
    """Which rows ``[R]`` of codes ``[nq, nk]`` visit blocks so far apart that they are better gathered."""
    visited = codes > EMPTY
    count, place = visited.sum(-1), torch.arange(codes.shape[-1], device=codes.device)
    high = torch.where(visited, place, -1).amax(-1) + 1
    low = torch.where(visited, place, codes.shape[-1]).amin(-1)
    return (high - low > WASTE * count + 2).nonzero()[:, 0]


def _runs(codes: Tensor) -> Iterator[tuple[Runs, Runs]]:
    """For each row of codes: the runs of blocks that are not empty, and of those that are partial."""
    edges = torch.nn.functional.pad(codes, (1, 1)).diff(dim=-1).ne(0)
    rows, places = edges.nonzero(as_tuple=True)
    kinds = torch.nn.functional.pad(codes, (0, 1))[rows, places].tolist()  # the code that begins here
    visited: list[Runs] = [[] for _ in range(len(codes))]
    partial: list[Runs] = [[] for _ in range(len(codes))]
    open_at, kind_open, row_open = 0, 0, -1
    for row, place, kind in zip(rows.tolist(), places.tolist(), kinds, strict=True):
        if row == row_open and kind_open != EMPTY:
            visited[row].append((open_at, place))
            if kind_open != FULL:
                partial[row].append((open_at, place))
        open_at, kind_open, row_open = place, kind, row
    for whole, looked in zip(visited, partial, strict=True):
        yield _merge(whole), looked


def _merge(runs: Runs) -> Runs:
    """Join runs that touch."""
    merged: Runs = []
    for a, z in runs:
        if merged and merged[-1][1] >= a:
            merged[-1] = (merged[-1][0], max(z, merged[-1][1]))
        else:
            merged.append((a, z))
    return merged
