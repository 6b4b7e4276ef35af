"""Strips of query rows with exactly the keys that they may see: what the band executor works on.

Queries lie as ``[groups, rep, N, D]`` and keys as ``[groups, M, D]``: a group is one key head of one sample, ``rep``
the query heads that share it. A strip is contiguous (some groups, rows and a range of keys: all views), a stair (steps
down a window's diagonal, also views) or gathered (a list of groups and row blocks, each with its own list of key
blocks, padded to the longest).
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .masks import Mask
from .program import Hidden, Scratch, Veil
from .tile import At, Later


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

    @cached_property
    def everywhere(self) -> At:
        """The place of the whole matrix ``[groups, rep, N, M]``."""
        groups, rep, q, k = (torch.arange(size, device=self.device) for size in (self.groups, self.rep, self.n, self.m))
        heads = (groups % self.kv_heads * self.rep)[:, None] + rep
        return At(
            (groups // self.kv_heads)[:, None, None, None], heads[..., None, None],
            q[None, None, :, None], k[None, None, None, :], self.batch, self.heads, self.n, self.m, self.offset,
            self.counted, 0,
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
    known: dict[tuple[int, ...], Veil]  # what the mask hides, by place, if it depends on the distance alone

    @property
    def first_group(self) -> int:
        """The least of its groups."""
        return self.g0

    @property
    def tile(self) -> tuple[int, int, int, int]:
        """Shape of the tile."""
        return self.g1 - self.g0, self.shape.rep, self.r1 - self.r0, self.k1 - self.k0

    def place(self) -> At:
        """Place of the tile, made anew: strips outlive their tiles, and what a place works out is as large as one."""
        whole, groups = self.shape.everywhere, slice(self.g0, self.g1)
        q, k = whole.q[:, :, self.r0 : self.r1], whole.k[..., self.k0 : self.k1]
        return whole.but(b=whole.b[groups], h=whole.h[groups], q=q, k=k, first=self.k0, found={})

    def with_heads(self, at: At) -> At:
        """The place of a tile with the same rows and keys; what it has worked out is shared."""
        whole, groups = self.shape.everywhere, slice(self.g0, self.g1)
        return at.but(b=whole.b[groups], h=whole.h[groups])

    def beside(self, other: object) -> bool:
        """Has the other one the same rows and keys?"""
        mine = (self.r0, self.r1, self.k0, self.k1)
        return isinstance(other, Strip) and mine == (other.r0, other.r1, other.k0, other.k1)

    def hidden(self, at: At) -> list[Hidden]:
        """Where the mask hides keys."""
        return [Hidden(a, z, self._hidden(at, a, z)) for a, z in self.partial]

    def _hidden(self, at: At, start: int, stop: int) -> Veil:
        if not self.mask.by_distance:
            return Veil(~self.mask.visible(at.columns(start, stop)))
        place = (self.r0 - self.k0 - start, self.r1 - self.r0, stop - start)
        if place not in self.known:
            self.known[place] = Veil(~self.mask.visible(at.columns(start, stop)))
        return self.known[place]

    def rows(self, x: Tensor) -> Tensor:
        """Rows of ``[groups, rep, N, D]``, flat over ``rep``: ``[g, rep * n, D]``."""
        piece = x[self.g0 : self.g1, :, self.r0 : self.r1]
        return piece.reshape(piece.shape[0], -1, piece.shape[-1])

    def keys(self, x: Tensor, room: Scratch | None = None) -> Tensor:
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
        whole[self.g0 : self.g1, self.k0 : self.k1].add_(piece)

    def add_columns(self, whole: Tensor, piece: Tensor) -> None:
        """Add ``[g, rep, m]`` to its keys of ``[groups, rep, M]``."""
        whole[self.g0 : self.g1, :, self.k0 : self.k1].add_(piece)

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
class Stair:
    """Steps of one group under a mask that depends on the distance alone (a window): each as many rows and keys.

    Step ``i`` has the ``rows`` from ``r0 + i * rows`` and the ``width`` keys from ``k0 + i * rows``: the steps' keys
    overlap, and are views. Small steps waste little beyond the window's edges, and a product of many runs well.
    """

    shape: Shape
    group: int
    steps: int
    r0: int
    rows_each: int
    k0: int
    width: int
    partial: list[tuple[int, int]]
    mask: Mask
    may_be_empty: bool
    known: dict[tuple[int, ...], Veil]

    @property
    def first_group(self) -> int:
        """The least of its groups."""
        return self.group

    @property
    def tile(self) -> tuple[int, int, int, int]:
        """Shape of the tile."""
        return self.steps, self.shape.rep, self.rows_each, self.width

    def place(self) -> At:
        """Place of the tile."""
        whole, group = self.shape.everywhere, slice(self.group, self.group + 1)
        q = whole.q[0, 0, self._rows].view(self.steps, 1, self.rows_each, 1)
        k = self._windows(whole.k[0, 0, 0])[:, None, None]
        return whole.but(b=whole.b[group], h=whole.h[group], q=q, k=k, first=None, found={})

    def hidden(self, at: At) -> list[Hidden]:
        """Where the mask hides keys: of every step what it hides of the first."""
        return [Hidden(a, z, self._hidden(at, a, z)) for a, z in self.partial]

    def _hidden(self, at: At, start: int, stop: int) -> Veil:
        place = (self.r0 - self.k0 - start, self.rows_each, stop - start)
        if place not in self.known:
            self.known[place] = Veil(~self.mask.visible(at.moved(at.q[:1], at.k[:1, ..., start:stop])))
        return self.known[place]

    @property
    def _rows(self) -> slice:
        return slice(self.r0, self.r0 + self.steps * self.rows_each)

    def _windows(self, x: Tensor) -> Tensor:
        """``[M, ...]`` as the keys of each step, ``[steps, width, ...]``, without a copy."""
        strides = (self.rows_each * x.stride(0), *x.stride())
        return x.as_strided((self.steps, self.width, *x.shape[1:]), strides, x.storage_offset() + self.k0 * x.stride(0))

    def _each(self, x: Tensor) -> Iterator[Tensor]:
        """The keys of each step among ``[..., M, D]``, to be written one after the other."""
        for i in range(self.steps):
            yield x.narrow(-2, self.k0 + i * self.rows_each, self.width)

    def rows(self, x: Tensor) -> Tensor:
        """Rows of ``[groups, rep, N, D]``, flat over ``rep``: ``[steps, rep * rows, D]``."""
        return self.get_rows(x).flatten(1, 2)

    def keys(self, x: Tensor, room: Scratch | None = None) -> Tensor:
        """Keys of ``[groups, M, D]``: ``[steps, width, D]``."""
        return self._windows(x[self.group])

    def put_rows(self, whole: Tensor, piece: Tensor) -> None:
        """Write ``[steps, rep, rows, ...]`` to its rows of ``[groups, rep, N, ...]``."""
        self.get_rows(whole).copy_(piece)

    def get_rows(self, whole: Tensor) -> Tensor:
        """The rows that :meth:`put_rows` writes, as a view."""
        return whole[self.group, :, self._rows].unflatten(1, (self.steps, self.rows_each)).transpose(0, 1)

    def add_keys(self, whole: Tensor, piece: Tensor) -> None:
        """Add ``[steps, width, D]`` to its keys of ``[groups, M, D]``."""
        for mine, part in zip(self._each(whole[self.group]), piece, strict=True):
            mine.add_(part)

    def add_columns(self, whole: Tensor, piece: Tensor) -> None:
        """Add ``[steps, rep, width]`` to its keys of ``[groups, rep, M]``."""
        for mine, part in zip(self._each(whole[self.group].mT), piece, strict=True):
            mine.add_(part.mT)

    def get_columns(self, whole: Tensor) -> Tensor:
        """The columns of ``[groups, rep, M]`` that :meth:`add_columns` adds to."""
        return self._windows(whole[self.group].mT).mT

    def put_blocks(self, whole: Tensor, piece: Tensor, rows: int) -> None:
        """Write ``[steps, rep, rows_each / rows, nk]`` to its row blocks of ``[groups, rep, N / rows, nk]``."""
        self.get_blocks(whole, rows).copy_(piece)

    def get_blocks(self, whole: Tensor, rows: int) -> Tensor:
        """The row blocks that :meth:`put_blocks` writes, as a view."""
        each, first = self.rows_each // rows, self.r0 // rows
        mine = whole[self.group, :, first : first + self.steps * each]
        return mine.unflatten(1, (self.steps, each)).transpose(0, 1)

    def put_chosen(self, whole: Tensor, tile: Tensor, chosen: list[int]) -> None:
        """Write the chosen rows of a tile to ``[groups, rep, len(chosen), M]``."""
        for i, step, row, keys in self._chosen(chosen):
            whole[self.group, :, i, keys] = tile[step, :, row]

    def get_chosen(self, whole: Tensor, chosen: list[int]) -> Tensor:
        """Gradient of the tile from the gradient of its chosen rows."""
        tile = whole.new_zeros(self.tile)
        for i, step, row, keys in self._chosen(chosen):
            tile[step, :, row] += whole[self.group, :, i, keys]
        return tile

    def _chosen(self, chosen: list[int]) -> Iterator[tuple[int, int, int, slice]]:
        for i, row in enumerate(chosen):
            step, within = divmod(row - self.r0, self.rows_each)
            if 0 <= step < self.steps:
                first = self.k0 + step * self.rows_each
                yield i, step, within, slice(first, first + self.width)


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
    known: dict[tuple[int, ...], Veil]
    run: tuple[int, int] | None = None  # group and first row block, if the tasks are a run of row blocks of one group

    @property
    def first_group(self) -> int:
        """The least of its groups."""
        return int(self.group.min()) if self.run is None else self.run[0]

    @property
    def tile(self) -> tuple[int, int, int, int]:
        """Shape of the tile."""
        return len(self.group), self.shape.rep, self.row_size, self.blocks.shape[1] * self.column_size

    @cached_property
    def _key_blocks(self) -> Tensor:
        """Flat numbers ``[T * s]`` of the key blocks among all groups' blocks."""
        count = -(-self.shape.m // self.column_size)
        return (self.key_group[:, None] * count + self.blocks.clamp(min=0)).flatten()

    def _positions(self, blocks: Tensor) -> Tensor:
        """Padded positions ``[T, s * column_size]`` of the keys of some of the blocks."""
        k = blocks.clamp(min=0)[..., None] * self.column_size
        return (k + torch.arange(self.column_size, device=k.device)).flatten(1)

    @property
    def _rows(self) -> Tensor:
        """Padded query positions ``[T, row_size]``."""
        return self.row_block[:, None] * self.row_size + torch.arange(self.row_size, device=self.shape.device)

    def place(self) -> At:
        """Place of the tile; padding repeats the last row and key, and :meth:`hidden` hides it."""
        return self._place(self.blocks)

    def _place(self, blocks: Tensor) -> At:
        whole = self.shape.everywhere
        return Later.of(
            whole,
            b=lambda: whole.b[self.group],
            h=lambda: whole.h[self.group],
            q=lambda: self._rows.clamp(max=self.shape.n - 1)[:, None, :, None],
            k=lambda: self._positions(blocks).clamp(max=self.shape.m - 1)[:, None, None, :],
        )

    def hidden(self, at: At) -> list[Hidden]:
        """Where the mask hides keys, or there are none."""
        if not self.partial_blocks:
            return []
        width = self.blocks.shape[1] * self.column_size
        looked = self.blocks[:, -self.partial_blocks :]
        start = width - looked.shape[1] * self.column_size
        place = self._place_of_all(looked)
        if place is not None and place in self.known:
            return [Hidden(start, width, self.known[place])]
        positions = self._positions(looked)
        here = self._place(looked)
        seen = self.mask.visible(here.but(q=here.q[:1], k=here.k[:1]) if place is not None else here)
        if place is None:
            seen = (
                seen
                & ((looked >= 0).repeat_interleave(self.column_size, 1) & (positions < self.shape.m))[:, None, None]
            )
            seen = seen & (self._rows < self.shape.n)[:, None, :, None]
        veil = Veil(~seen)
        if place is not None:
            self.known[place] = veil
        return [Hidden(start, width, veil)]

    def _place_of_all(self, looked: Tensor) -> tuple[int, ...] | None:
        """How far the blocks to look at lie from the rows, if that is all the mask asks and the same for all tasks."""
        if not self.mask.by_distance or looked.shape[1] > 4 or looked.device.type != "cpu":
            return None  # elsewhere to ask would be to wait for the device
        # A few small lists: less than the same by operations on tensors.
        blocks, starts = looked.tolist(), [row * self.row_size for row in self.row_block.tolist()]
        if max(starts) + self.row_size > self.shape.n:
            return None
        if min(map(min, blocks)) < 0 or (max(map(max, blocks)) + 1) * self.column_size > self.shape.m:
            return None
        away = {tuple(at - c * self.column_size for c in each) for at, each in zip(starts, blocks, strict=True)}
        return (*away.pop(), self.row_size, self.column_size) if len(away) == 1 else None

    def rows(self, x: Tensor) -> Tensor:
        """Rows of ``[groups, rep, N, D]``, flat over ``rep``: ``[T, rep * row_size, D]``."""
        mine = self.own(x)
        return self.get_rows(x).flatten(1, 2) if mine is None else mine

    def keys(self, x: Tensor, room: Scratch | None = None) -> Tensor:
        """Keys of ``[key groups, M, D]``: ``[T, s * column_size, D]``, in a buffer of ``room`` if given."""
        flat = x.reshape(-1, self.column_size * x.shape[-1])
        out = None if room is None else room((len(self._key_blocks), flat.shape[1]), x.dtype, "keys")
        return torch.index_select(flat, 0, self._key_blocks, out=out).view(len(self.group), -1, x.shape[-1])

    @cached_property
    def _row_blocks(self) -> Tensor:
        """Flat numbers ``[T * rep]`` of the row blocks among all heads' blocks."""
        head = self.group[:, None] * self.shape.rep + torch.arange(self.shape.rep, device=self.group.device)
        return (head * -(-self.shape.n // self.row_size) + self.row_block[:, None]).flatten()

    def put_rows(self, whole: Tensor, piece: Tensor) -> None:
        """Write ``[T, rep, row_size, ...]`` to its rows of ``[groups, rep, N, ...]``."""
        width = self.row_size * whole[0, 0, 0].numel()
        whole.view(-1, width).index_copy_(0, self._row_blocks, piece.reshape(-1, width))

    def own(self, whole: Tensor) -> Tensor | None:
        """Its rows of ``[groups, 1, N, D]`` as a contiguous view ``[T, row_size, D]``, if they lie so."""
        if self.run is None or self.shape.rep > 1:
            return None
        group, first = self.run
        start = first * self.row_size
        mine = whole[group, 0, start : start + len(self.group) * self.row_size]
        return mine.view(len(self.group), self.row_size, -1) if mine.is_contiguous() else None

    def get_rows(self, whole: Tensor) -> Tensor:
        """Read what :meth:`put_rows` wrote."""
        width = self.row_size * whole[0, 0, 0].numel()
        found = whole.reshape(-1, width).index_select(0, self._row_blocks)
        return found.view(len(self.group), self.shape.rep, self.row_size, *whole.shape[3:])

    def add_keys(self, whole: Tensor, piece: Tensor) -> None:
        """Add ``[T, s * column_size, D]`` to its keys of ``[key groups, M, D]``."""
        flat = whole.view(-1, self.column_size * whole.shape[-1])
        flat.index_add_(0, self._key_blocks, piece.reshape(-1, flat.shape[1]).to(flat.dtype))

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
        return head[..., None] * whole.shape[-1] + self._positions(self.blocks)[:, None]

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
            where = self._positions(self.blocks[tasks])[:, None].expand(-1, self.shape.rep, -1)
            line = whole[self.group[tasks], :, i].scatter_add(-1, where, tile[tasks, :, row % self.row_size])
            whole[self.group[tasks], :, i] = line

    def get_chosen(self, whole: Tensor, chosen: list[int]) -> Tensor:
        """Gradient of the tile from the gradient of its chosen rows."""
        tile = whole.new_zeros(self.tile)
        for i, row in enumerate(chosen):
            tasks = self._tasks(row)
            where = self._positions(self.blocks[tasks])[:, None].expand(-1, self.shape.rep, -1)
            tile[tasks, :, row % self.row_size] += whole[self.group[tasks], :, i].gather(-1, where)
        return tile


Piece = Strip | Stair | Gathered


@dataclass
class Layout:
    """All strips of a call, and how whole tensors must be padded for them."""

    shape: Shape
    strips: list[Piece]
    row_multiple: int
    column_multiple: int

    bounds: list[int]  # where runs of groups end that share no strip

    def runs(self) -> list[list[Piece]]:
        """The strips of each run of groups: no two runs add to the same keys."""
        if len(self.bounds) == 1:
            return [self.strips] if self.strips else []
        found: list[list[Piece]] = [[] for _ in self.bounds]
        for strip in self.strips:
            found[bisect.bisect(self.bounds, strip.first_group)].append(strip)
        return [strips for strips in found if strips]

    @staticmethod
    def places(strips: Iterable[Piece]) -> Iterator[tuple[Piece, At]]:
        """Strips with their places; neighbours share what a place works out of rows and keys."""
        before: Piece | None = None
        at: At | None = None
        for strip in strips:
            beside = at is not None and isinstance(strip, Strip) and strip.beside(before)
            at = strip.with_heads(at) if beside else strip.place()  # type: ignore[union-attr, arg-type]
            before = strip
            yield strip, at

    @property
    def covers(self) -> bool:
        """Does some strip write every row?"""
        rows = -(-self.shape.n // self.row_multiple) * self.row_multiple
        return sum(s.tile[0] * s.tile[2] for s in self.strips) == self.shape.groups * rows

    @cached_property
    def most(self) -> int:
        """Cells of the largest tile."""
        return max((torch.Size(s.tile).numel() for s in self.strips), default=0)

    @property
    def visited(self) -> float:
        """Share of the score matrix that is computed."""
        cells = sum(torch.Size(s.tile).numel() for s in self.strips)
        return cells / max(1, self.shape.batch * self.shape.heads * self.shape.n * self.shape.m)
