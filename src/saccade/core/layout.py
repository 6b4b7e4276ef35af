"""How the band executor cuts the work: strips of query rows with exactly the keys that they may see.

Queries lie as ``[groups, rep, N, D]`` and keys as ``[groups, M, D]``: a group is one key head of one sample, ``rep``
the query heads that share it. A strip is either contiguous (some groups, rows and a range of keys: all views) or
gathered (a list of groups and row blocks, each with its own list of key blocks, padded to the longest).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .masks import EMPTY, FULL, Full, Mask, Span
from .program import Hidden
from .selectors import Selection
from .tile import At

TILE = 2**21  # elements of a tile: 8 MB in float32, which the last level of cache holds
SMALL = 2**18  # elements of a whole mask that is cheaper to look at than to classify
COLUMNS = 64  # keys per block of the map
WASTE = 1.3  # keys touched per key visited up to which a contiguous range beats a gather


@dataclass(frozen=True)
class Shape:
    """Sizes of a call: ``rep`` query heads share each of ``kv_heads`` key heads."""

    batch: int
    kv_heads: int
    rep: int
    n: int
    m: int
    offset: int
    counted: bool
    device: torch.device

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.kv_heads * self.rep

    @property
    def groups(self) -> int:
        """Key heads over the batch."""
        return self.batch * self.kv_heads

    def at(self, groups: Tensor, q: Tensor, k: Tensor) -> At:
        """The place of a tile ``[len(groups), rep, ...]``; ``q`` and ``k`` already have four dimensions."""
        b = (groups // self.kv_heads)[:, None, None, None]
        h = (groups % self.kv_heads * self.rep)[:, None] + torch.arange(self.rep, device=self.device)
        return At(
            b, h[..., None, None], q, k, self.batch, self.heads, self.n, self.m, self.offset, self.counted
        )  # fmt: skip

    def split_rep(self) -> Shape:
        """The same with every query head its own group, for a selection that differs among them."""
        return replace(self, kv_heads=self.heads, rep=1)


@dataclass
class Strip:
    """Groups ``g0:g1``, rows ``r0:r1``, keys ``k0:k1``."""

    shape: Shape
    g0: int
    g1: int
    r0: int
    r1: int
    k0: int
    k1: int
    partial: list[tuple[int, int]]  # runs of keys, within the strip, where the mask must be looked at
    mask: Mask
    may_be_empty: bool

    @property
    def tile(self) -> tuple[int, int, int, int]:
        """Shape of the tile."""
        return self.g1 - self.g0, self.shape.rep, self.r1 - self.r0, self.k1 - self.k0

    @cached_property
    def at(self) -> At:
        """Place of the tile."""
        device = self.shape.device
        return self.shape.at(
            torch.arange(self.g0, self.g1, device=device),
            torch.arange(self.r0, self.r1, device=device)[None, None, :, None],
            torch.arange(self.k0, self.k1, device=device)[None, None, None, :],
        )

    def hidden(self) -> list[Hidden]:
        """Where the mask hides keys."""
        return [Hidden(a, z, ~self.mask.visible(self.at.columns(a, z))) for a, z in self.partial]

    def rows(self, x: Tensor) -> Tensor:
        """Rows of ``[groups, rep, N, D]``, flat over ``rep``: ``[g, rep * n, D]``."""
        piece = x[self.g0 : self.g1, :, self.r0 : self.r1]
        return piece.reshape(piece.shape[0], -1, piece.shape[-1])

    def keys(self, x: Tensor) -> Tensor:
        """Keys of ``[groups, M, D]``."""
        return x[self.g0 : self.g1, self.k0 : self.k1]

    def put_rows(self, whole: Tensor, piece: Tensor) -> None:
        """Write ``[g, rep, n, ...]`` to its rows of ``[groups, rep, N, ...]``."""
        whole[self.g0 : self.g1, :, self.r0 : self.r1] = piece

    def get_rows(self, whole: Tensor) -> Tensor:
        """Read what :meth:`put_rows` wrote."""
        return whole[self.g0 : self.g1, :, self.r0 : self.r1]

    def add_keys(self, whole: Tensor, piece: Tensor) -> None:
        """Add ``[g, m, D]`` to its keys of ``[groups, M, D]``."""
        whole[self.g0 : self.g1, self.k0 : self.k1] += piece

    def add_columns(self, whole: Tensor, piece: Tensor) -> None:
        """Add ``[g, rep, m]`` to its keys of ``[groups, rep, M]``."""
        whole[self.g0 : self.g1, :, self.k0 : self.k1] += piece

    def get_columns(self, whole: Tensor) -> Tensor:
        """The columns of ``[groups, rep, M]`` that :meth:`add_columns` adds to."""
        return whole[self.g0 : self.g1, :, self.k0 : self.k1]

    def put_blocks(self, whole: Tensor, piece: Tensor, rows: int) -> None:
        """Write ``[g, rep, n / rows, nk]`` to its row blocks of ``[groups, rep, N / rows, nk]``."""
        first = self.r0 // rows
        whole[self.g0 : self.g1, :, first : first + piece.shape[2]] = piece

    def get_blocks(self, whole: Tensor, rows: int) -> Tensor:
        """Read what :meth:`put_blocks` wrote."""
        return whole[self.g0 : self.g1, :, self.r0 // rows : -(-self.r1 // rows)]

    def put_chosen(self, whole: Tensor, tile: Tensor, chosen: list[int]) -> None:
        """Write the chosen rows of a tile to ``[groups, rep, len(chosen), M]``."""
        for i, row in enumerate(chosen):
            if self.r0 <= row < self.r1:
                whole[self.g0 : self.g1, :, i, self.k0 : self.k1] = tile[:, :, row - self.r0]

    def get_chosen(self, whole: Tensor, chosen: list[int]) -> Tensor:
        """Gradient of the tile from the gradient of its chosen rows."""
        tile = whole.new_zeros(self.tile)
        for i, row in enumerate(chosen):
            if self.r0 <= row < self.r1:
                tile[:, :, row - self.r0] += whole[self.g0 : self.g1, :, i, self.k0 : self.k1]
        return tile


@dataclass
class Gathered:
    """Tasks ``(group, row block)``, each with its key blocks; whole tensors are padded to whole blocks.

    ``partial``: the last so many blocks of each task must be looked at (padding included); lists are ordered so.
    """

    shape: Shape
    group: Tensor  # [T]
    key_group: Tensor  # [T]
    row_block: Tensor  # [T]
    blocks: Tensor  # [T, s], -1 for padding
    row_size: int
    column_size: int
    partial_blocks: int
    mask: Mask
    may_be_empty: bool

    @property
    def tile(self) -> tuple[int, int, int, int]:
        """Shape of the tile."""
        return len(self.group), self.shape.rep, self.row_size, self.blocks.shape[1] * self.column_size

    @cached_property
    def _key_blocks(self) -> Tensor:
        """Flat numbers ``[T * s]`` of the key blocks among all groups' blocks."""
        count = -(-self.shape.m // self.column_size)
        return (self.key_group[:, None] * count + self.blocks.clamp(min=0)).flatten()

    @cached_property
    def _positions(self) -> Tensor:
        """Padded key positions ``[T, s * column_size]``."""
        k = self.blocks.clamp(min=0)[..., None] * self.column_size
        return (k + torch.arange(self.column_size, device=k.device)).flatten(1)

    @cached_property
    def _rows(self) -> Tensor:
        """Padded query positions ``[T, row_size]``."""
        return self.row_block[:, None] * self.row_size + torch.arange(self.row_size, device=self.shape.device)

    @cached_property
    def at(self) -> At:
        """Place of the tile; padding repeats the last row and key, and :meth:`hidden` hides it."""
        return self.shape.at(
            self.group,
            self._rows.clamp(max=self.shape.n - 1)[:, None, :, None],
            self._positions.clamp(max=self.shape.m - 1)[:, None, None, :],
        )

    def hidden(self) -> list[Hidden]:
        """Where the mask hides keys, or there are none."""
        width = self._positions.shape[1]
        start = width - self.partial_blocks * self.column_size
        if start == width:
            return []
        keys = (self.blocks >= 0).repeat_interleave(self.column_size, 1) & (self._positions < self.shape.m)
        seen = self.mask.visible(self.at.columns(start, width)) & keys[:, None, None, start:]
        seen = seen & (self._rows < self.shape.n)[:, None, :, None]
        return [Hidden(start, width, ~seen)]

    def rows(self, x: Tensor) -> Tensor:
        """Rows of ``[groups, rep, N, D]``, flat over ``rep``: ``[T, rep * row_size, D]``."""
        return self.get_rows(x).flatten(1, 2)

    def keys(self, x: Tensor) -> Tensor:
        """Keys of ``[key groups, M, D]``: ``[T, s * column_size, D]``."""
        flat = x.reshape(-1, self.column_size * x.shape[-1]).index_select(0, self._key_blocks)
        return flat.view(len(self.group), -1, x.shape[-1])

    def put_rows(self, whole: Tensor, piece: Tensor) -> None:
        """Write ``[T, rep, row_size, ...]`` to its rows of ``[groups, rep, N, ...]``."""
        whole.unflatten(2, (-1, self.row_size))[self.group, :, self.row_block] = piece

    def get_rows(self, whole: Tensor) -> Tensor:
        """Read what :meth:`put_rows` wrote."""
        return whole.unflatten(2, (-1, self.row_size))[self.group, :, self.row_block]

    def add_keys(self, whole: Tensor, piece: Tensor) -> None:
        """Add ``[T, s * column_size, D]`` to its keys of ``[key groups, M, D]``."""
        flat = whole.view(-1, self.column_size * whole.shape[-1])
        flat.index_add_(0, self._key_blocks, piece.reshape(-1, flat.shape[1]))

    def add_columns(self, whole: Tensor, piece: Tensor) -> None:
        """Add ``[T, rep, m]`` to its keys of ``[groups, rep, M]``."""
        index = self._columns(whole)
        whole.view(-1).index_add_(0, index.flatten(), piece.flatten())

    def get_columns(self, whole: Tensor) -> Tensor:
        """The columns of ``[groups, rep, M]`` that :meth:`add_columns` adds to."""
        return whole.reshape(-1)[self._columns(whole)]

    def _columns(self, whole: Tensor) -> Tensor:
        rep = self.shape.rep
        head = self.group[:, None] * rep + torch.arange(rep, device=whole.device)
        return head[..., None] * whole.shape[-1] + self._positions[:, None]

    def put_blocks(self, whole: Tensor, piece: Tensor, rows: int) -> None:
        """Write ``[T, rep, row_size / rows, nk]`` to its row blocks."""
        whole.unflatten(2, (-1, self.row_size // rows))[self.group, :, self.row_block] = piece

    def get_blocks(self, whole: Tensor, rows: int) -> Tensor:
        """Read what :meth:`put_blocks` wrote."""
        return whole.unflatten(2, (-1, self.row_size // rows))[self.group, :, self.row_block]

    def _tasks(self, row: int) -> Tensor:
        return (self.row_block == row // self.row_size).nonzero()[:, 0]

    def put_chosen(self, whole: Tensor, tile: Tensor, chosen: list[int]) -> None:
        """Write the chosen rows of a tile to ``[groups, rep, len(chosen), M]``."""
        for i, row in enumerate(chosen):
            tasks = self._tasks(row)
            where = self._positions[tasks][:, None].expand(-1, self.shape.rep, -1)
            line = whole[self.group[tasks], :, i].scatter_add(-1, where, tile[tasks, :, row % self.row_size])
            whole[self.group[tasks], :, i] = line

    def get_chosen(self, whole: Tensor, chosen: list[int]) -> Tensor:
        """Gradient of the tile from the gradient of its chosen rows."""
        tile = whole.new_zeros(self.tile)
        for i, row in enumerate(chosen):
            tasks = self._tasks(row)
            where = self._positions[tasks][:, None].expand(-1, self.shape.rep, -1)
            tile[tasks, :, row % self.row_size] += whole[self.group[tasks], :, i].gather(-1, where)
        return tile


@dataclass
class Layout:
    """All strips of a call, and how whole tensors must be padded for them."""

    shape: Shape
    strips: list[Strip | Gathered]
    row_multiple: int
    column_multiple: int
    groups_are_heads: bool = False  # every query head is its own group

    @property
    def visited(self) -> float:
        """Share of the score matrix that is computed."""
        cells = sum(torch.Size(s.tile).numel() for s in self.strips)
        return cells / max(1, self.shape.batch * self.shape.heads * self.shape.n * self.shape.m)


def lay_out(shape: Shape, mask: Mask, *, all_heads: bool, row_multiple: int, selection: Selection | None) -> Layout:
    """Cut a call into strips.

    Args:
        shape: sizes of the call.
        mask: which keys are visible.
        all_heads: every tile must cover all heads of a sample (a part mixes them).
        row_multiple: strips must start and end at multiples of this (a stat's blocks).
        selection: chosen key blocks, within the mask.
    """
    if selection is not None:
        return _selected(shape, mask, selection)
    if isinstance(mask, Full):
        rows = _row_count(shape, shape.m, row_multiple)
        strips = [
            Strip(shape, g0, g1, r0, min(r0 + rows, shape.n), 0, shape.m, [], mask, False)
            for g0, g1 in _group_runs(shape, rows, shape.m, all_heads, 0, shape.groups)
            for r0 in range(0, shape.n, rows)
        ]
        return Layout(shape, list(strips), 1, 1)
    if shape.n * shape.m <= SMALL:
        return _looked_at(shape, mask, all_heads)
    return _classified(shape, mask, all_heads, row_multiple)


def _row_count(shape: Shape, keys: float, multiple: int) -> int:
    """Rows per strip: many for the matrix product, few enough that the tile fits and little is wasted."""
    rows = 256 if keys >= 2048 else 128 if keys >= 256 else 64
    while rows > 16 and rows * shape.rep * keys > 2 * TILE:
        rows //= 2
    return -(-min(rows, max(shape.n, 1)) // multiple) * multiple


def _group_runs(
    shape: Shape, rows: int, keys: int, all_heads: bool, first: int, last: int
) -> Iterator[tuple[int, int]]:
    """Cut the groups ``first`` to ``last`` so that a tile fits."""
    step = max(1, TILE // max(1, shape.rep * rows * keys))
    if all_heads:
        step = max(1, step // shape.kv_heads) * shape.kv_heads
    for g in range(first, last, step):
        yield g, min(g + step, last)


def _looked_at(shape: Shape, mask: Mask, all_heads: bool) -> Layout:
    """A small mask (a decode step, a short text): look at it whole and cut to the range of keys that anyone sees."""
    where = shape.at(
        torch.arange(shape.groups, device=shape.device),
        torch.arange(shape.n, device=shape.device)[None, None, :, None],
        torch.arange(shape.m, device=shape.device)[None, None, None, :],
    )
    seen = mask.visible(where)
    anyone = seen.expand(*seen.shape[:3], shape.m).flatten(0, 2).any(0).nonzero()[:, 0]
    if not len(anyone):
        return Layout(shape, [], 1, 1)
    k0, k1 = int(anyone[0]), int(anyone[-1]) + 1
    partial = [] if bool(seen[..., k0:k1].all()) else [(0, k1 - k0)]
    strips = [
        Strip(shape, g0, g1, 0, shape.n, k0, k1, partial, mask, bool(partial))
        for g0, g1 in _group_runs(shape, shape.n, k1 - k0, all_heads, 0, shape.groups)
    ]
    return Layout(shape, list(strips), 1, 1)


def _classified(shape: Shape, mask: Mask, all_heads: bool, row_multiple: int) -> Layout:
    """Strips from the mask's own answer for blocks; a row of blocks with holes is gathered."""
    probe = Span.grid(
        shape.n, shape.m, max(256, shape.n // 32), max(256, shape.m // 32), offset=shape.offset, batch=shape.batch,
        heads=shape.heads, device=shape.device,
    )  # fmt: skip
    share = float((mask.blocks(probe) > EMPTY).double().mean())
    rows = _row_count(shape, share * shape.m, row_multiple)
    blocks = -(-shape.n // rows)
    strips: list[Strip | Gathered] = []
    holes: dict[tuple[int, int], list[tuple[int, list[int], list[int]]]] = {}
    slab = max(1, TILE // max(1, -(-shape.m // COLUMNS)))  # row blocks classified at once
    for first in range(0, blocks, slab):
        span = Span.grid(
            shape.n, shape.m, rows, COLUMNS, offset=shape.offset, batch=shape.batch, heads=shape.heads,
            first=first, last=first + slab, device=shape.device,
        )  # fmt: skip
        for (g0, g1), codes in _codes_by_group(mask.blocks(span), shape):
            for i, (visited, partial) in enumerate(_runs(codes)):
                if not visited:
                    continue
                r0 = (first + i) * rows
                r1 = min(r0 + rows, shape.n)
                low, high = visited[0][0], visited[-1][1]
                count = sum(z - a for a, z in visited)
                if high - low <= WASTE * count + 2:
                    k0, k1 = low * COLUMNS, min(high * COLUMNS, shape.m)
                    gaps = [(a, z) for (_, a), (z, _) in zip(visited, visited[1:], strict=False)]
                    look = [
                        (a * COLUMNS - k0, min(z * COLUMNS, shape.m) - k0)
                        for a, z in _merge(sorted([*partial, *gaps]))
                    ]
                    whole = sum(z - a for a, z in look) < k1 - k0
                    strips += [
                        Strip(shape, a, z, r0, r1, k0, k1, look, mask, not whole)
                        for a, z in _group_runs(shape, rows, k1 - k0, all_heads, g0, g1)
                    ]
                else:
                    looked = {c for a, z in partial for c in range(a, z)}
                    full = [c for a, z in visited for c in range(a, z) if c not in looked]
                    holes.setdefault((g0, g1), []).append((first + i, full, sorted(looked)))
    for (g0, g1), tasks in holes.items():
        strips += _gather_static(shape, mask, rows, tasks, range(g0, g1), all_heads)
    padded = bool(holes)
    return Layout(shape, strips, rows if padded else 1, COLUMNS if padded else 1)


def _codes_by_group(codes: Tensor, shape: Shape) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Codes ``[nq, nk]`` for runs of groups that share them."""
    codes = codes[(None,) * (4 - codes.ndim)]
    if codes.shape[1] > 1:  # query heads that share a key head visit what any of them sees
        apart = codes.unflatten(1, (shape.kv_heads, shape.rep))
        low, high = apart.amin(2), apart.amax(2)
        codes = torch.where(low == high, low, 1).to(torch.int8)
    for b in range(codes.shape[0]):
        for h in range(codes.shape[1]):
            if codes.shape[0] == 1 and codes.shape[1] == 1:
                yield (0, shape.groups), codes[0, 0]
            elif codes.shape[1] == 1:
                yield (b * shape.kv_heads, (b + 1) * shape.kv_heads), codes[b, 0]
            else:
                for sample in range(shape.batch) if codes.shape[0] == 1 else (b,):
                    group = sample * shape.kv_heads + h
                    yield (group, group + 1), codes[b, h]


Runs = list[tuple[int, int]]


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


def _gather_static(
    shape: Shape, mask: Mask, rows: int, tasks: list[tuple[int, list[int], list[int]]], groups: range, all_heads: bool
) -> Iterator[Gathered]:
    device = shape.device
    longest = max(len(full) + len(looked) for _, full, looked in tasks)
    tasks = sorted(tasks, key=lambda t: len(t[1]) + len(t[2]))
    per_task = max(1, shape.rep * rows * longest * COLUMNS)
    for g0, g1 in _group_runs(shape, rows, longest * COLUMNS, all_heads, groups.start, groups.stop):
        step = max(1, TILE // (per_task * (g1 - g0)))
        for start in range(0, len(tasks), step):
            chunk = tasks[start : start + step]
            width = max(len(full) + len(looked) for _, full, looked in chunk)
            lists = [full + looked + [-1] * (width - len(full) - len(looked)) for _, full, looked in chunk]
            ragged = (chunk[-1][0] + 1) * rows > shape.n or any((r + 1) * rows > shape.n for r, _, _ in chunk)
            tail = any(b == shape.m // COLUMNS for _, full, _ in chunk for b in full)
            look = width if ragged or tail else width - min(len(full) for _, full, _ in chunk)
            # Groups vary fastest, so that parts which mix heads find them side by side.
            group = torch.arange(g0, g1, device=device)
            yield Gathered(
                shape,
                group.repeat(len(chunk)),
                group.repeat(len(chunk)),
                torch.tensor([r for r, _, _ in chunk], device=device).repeat_interleave(g1 - g0),
                torch.tensor(lists, device=device).repeat_interleave(g1 - g0, 0),
                rows,
                COLUMNS,
                look,
                mask,
                look == width,
            )


def _selected(shape: Shape, mask: Mask, selection: Selection) -> Layout:
    """Strips from chosen blocks, those that need no look first, tasks of like length together."""
    rows, columns = selection.rows, selection.columns
    chosen = selection.blocks
    device = shape.device
    split = chosen.shape[1] not in (1, shape.kv_heads)
    kv_groups = shape.groups
    rep = shape.rep
    if split:
        shape = shape.split_rep()
    nq, nk = -(-shape.n // rows), -(-shape.m // columns)
    chosen = chosen.expand(shape.batch, shape.kv_heads, nq, -1).reshape(shape.groups, nq, -1)
    span = Span.grid(
        shape.n, shape.m, rows, columns, offset=shape.offset, batch=shape.batch, heads=shape.heads, device=device
    )
    codes = mask.blocks(span)
    codes = codes[(None,) * (4 - codes.ndim)].clone()
    if shape.n % rows:
        codes[:, :, -1:].clamp_(max=1)  # rows of padding
    if shape.m % columns:
        codes[..., -1:].clamp_(max=1)
    if codes.shape[1] > 1:
        codes = codes.unflatten(1, (shape.kv_heads, shape.rep))
        codes = torch.where(codes.amin(2) == codes.amax(2), codes.amin(2), 1)
    codes = codes.expand(shape.batch, shape.kv_heads, nq, nk).reshape(shape.groups, nq, nk)
    kind = codes.gather(-1, chosen.clamp(min=0)).masked_fill(chosen < 0, EMPTY)
    chosen = chosen.masked_fill(kind == EMPTY, -1)
    kind, order = kind.sort(stable=True, dim=-1, descending=True)  # full, partial, padding
    chosen = chosen.gather(-1, order).flatten(0, 1)
    length = (kind > EMPTY).sum(-1).flatten()
    full = (kind == FULL).sum(-1).flatten()
    by_length = length.argsort(descending=True, stable=True)
    by_length = by_length[: int((length > 0).sum())]
    lengths, fulls = length[by_length].tolist(), full[by_length]
    strips: list[Strip | Gathered] = []
    start = 0
    while start < len(lengths):
        width = lengths[start]
        stop = start + max(1, TILE // (shape.rep * rows * columns * width))
        tasks = by_length[start:stop]
        group = tasks // nq
        key_group = group
        if split:
            key_group = group // shape.kv_heads * (kv_groups // shape.batch) + group % shape.kv_heads // rep
        look = width - int(fulls[start:stop].min())
        strips.append(
            Gathered(
                shape, group, key_group, tasks % nq, chosen[tasks, :width], rows, columns, look, mask,
                look == width,
            )
        )  # fmt: skip
        start = stop
    return Layout(shape, strips, rows, columns, groups_are_heads=split)
