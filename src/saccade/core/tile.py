"""A tile of the score matrix, where it lies, and the base of every part that works on one.

A tile has four dimensions ``[g, r, n, m]``: two that together run over batch and heads, then query rows, then
keys. Executors are free to choose how batch and heads are laid out over the first two; parts never look at the
layout, they use the index tensors of :class:`At`, which broadcast against the tile.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .errors import SpecError


@dataclass(frozen=True)
class At:
    """Where a tile lies in the ``[B, H, N, M]`` matrix.

    ``b, h, q, k`` are int64 index tensors with four dimensions that broadcast against the tile; ``q`` counts the
    queries of this call from 0. ``offset`` is the place of query 0 among the keys, so ``row = q + offset`` and a
    causal query sees the keys ``k <= row``. ``counted`` says that the caller gave the offset: then plain
    functions see ``row``, else they see ``q`` as in FlexAttention.
    """

    b: Tensor
    h: Tensor
    q: Tensor
    k: Tensor
    batch: int
    heads: int
    n: int
    m: int
    offset: int
    counted: bool = False
    first: int | None = None  # the first key, if the tile's keys are a range
    found: dict[Any, Tensor] = field(default_factory=dict, repr=False, compare=False)  # from q and k alone

    @property
    def row(self) -> Tensor:
        """Positions of the queries among the keys."""
        return self._find("row", lambda: self.q + self.offset if self.offset else self.q)

    @property
    def distance(self) -> Tensor:
        """``row - k``: how far back the key lies (negative: in the future)."""
        return self._find("distance", lambda: self.row - self.k)

    def away(self, dtype: torch.dtype) -> Tensor:
        """``|row - k|`` in a floating dtype: four times as fast as by way of :attr:`distance`."""
        return self._find(dtype, lambda: (self.row.to(dtype) - self.k.to(dtype)).abs_())

    def _find(self, name: Any, make: Callable[[], Tensor]) -> Tensor:
        if name not in self.found:
            self.found[name] = make()
        return self.found[name]

    def moved(self, q: Tensor, k: Tensor, first: int | None = None) -> At:
        """The same heads at other queries and keys."""
        return self.but(q=q, k=k, first=first, found={})

    def but(self, **changed: Any) -> At:
        """``dataclasses.replace`` in a quarter of its time: every tile has its place."""
        place = object.__new__(type(self))
        place.__dict__.update(self.__dict__, **changed)
        return place

    @property
    def indices(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``b, h, q, k`` as plain functions see them."""
        return self.b, self.h, self.row if self.counted else self.q, self.k

    def columns(self, start: int, stop: int) -> At:
        """The same place, narrowed to some of the tile's keys."""
        first = None if self.first is None else self.first + start
        return self.moved(self.q, self.k[..., start:stop], first)

    def split_heads(self, tile: Tensor) -> Tensor:
        """View a tile that covers all heads as ``[b, H, n, m]``, for parts that mix heads."""
        return tile.reshape(-1, self.heads, *tile.shape[-2:])

    @staticmethod
    def everywhere(batch: int, heads: int, n: int, m: int, offset: int, counted: bool, device: torch.device) -> At:
        """The place of the whole matrix."""
        b, h, q, k = (torch.arange(size, device=device) for size in (batch, heads, n, m))
        return At(
            b[:, None, None, None],
            h[None, :, None, None],
            q[None, None, :, None],
            k[None, None, None, :],
            batch,
            heads,
            n,
            m,
            offset,
            counted,
        )


class Later(At):
    """A place whose index tensors are made when somebody asks for them: often nobody does."""

    def __init__(self) -> None:  # made by `of` alone
        raise NotImplementedError

    @staticmethod
    def of(whole: At, **makers: Callable[[], Tensor]) -> Later:
        """A place in the same matrix, from functions for ``b``, ``h``, ``q`` and ``k``."""
        place = object.__new__(Later)
        facts = {name: value for name, value in vars(whole).items() if name not in makers}
        place.__dict__.update(facts, first=None, found={}, makers=makers)
        return place

    def __getattr__(self, name: str) -> Any:
        if name not in ("b", "h", "q", "k"):
            raise AttributeError(name)
        self.__dict__[name] = made = self.__dict__["makers"][name]()
        return made


@dataclass
class Tile:
    """What a stat looks at: weights, their place, and what else it asked for.

    ``scores`` are the masked ones, 0 instead of ``-inf`` where a key is hidden; ``maximum`` and ``lse`` are row
    statistics of the masked scores, ``[g, r, n]``. ``softmax``: the weights are the softmax of the scores, unedited.
    ``factor``: the weights are those given times it, ``[g, r, n, 1]`` (only for stats with ``takes_factor``).
    """

    at: At
    weights: Tensor
    scores: Tensor | None = None
    maximum: Tensor | None = None
    lse: Tensor | None = None
    softmax: bool = False
    factor: Tensor | None = None


class Part(nn.Module):
    """A piece of an attention program. Learned tensors are parameters, given ones are buffers."""

    def hold(self, name: str, value: Tensor | float | None) -> None:
        """Keep a tensor so that ``.to()`` moves it, gradients reach it, and a parameter stays one."""
        if isinstance(value, nn.Parameter) or not isinstance(value, Tensor):
            setattr(self, name, value)
        else:
            self.register_buffer(name, value, persistent=False)

    def extra_repr(self) -> str:
        """Show settings, and tensors by shape."""
        shown = {k: v for k, v in vars(self).items() if not k.startswith("_") and k != "training"}
        shown |= {k: tuple(v.shape) for k, v in self.named_parameters(recurse=False)}
        shown |= {k: tuple(v.shape) for k, v in self.named_buffers(recurse=False)}
        return ", ".join(f"{k}={getattr(v, '__name__', v)}" for k, v in shown.items())

    def learned(self) -> list[Tensor]:
        """Every tensor that wants a gradient: parameters, given tensors, and what plain functions captured."""
        found: dict[int, Tensor] = {}
        for part in self.modules():
            for tensor in [*part.parameters(recurse=False), *part.buffers(recurse=False)]:
                found[id(tensor)] = tensor
            function = getattr(part, "function", None)
            if callable(function):
                found |= {id(t): t for t in captured(function)}
        return [t for t in found.values() if t.requires_grad]


def captured(function: Any, depth: int = 4) -> Iterator[Tensor]:
    """Yield the tensors a function closes over: closures, partials, bound methods, modules, containers."""
    if isinstance(function, Tensor):
        yield function
    elif depth == 0:
        return
    elif isinstance(function, nn.Module):
        yield from function.parameters()
        yield from function.buffers()
    elif isinstance(function, (list, tuple)):
        for item in function:
            yield from captured(item, depth - 1)
    elif isinstance(function, dict):
        yield from captured(list(function.values()), depth)
    elif isinstance(function, functools.partial):
        yield from captured([function.func, *function.args, *function.keywords.values()], depth - 1)
    elif isinstance(function, types.MethodType):
        yield from captured([function.__self__, function.__func__], depth - 1)
    elif isinstance(function, types.FunctionType):
        cells = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
        names = function.__code__.co_names
        cells += [function.__globals__[n] for n in names if isinstance(function.__globals__.get(n), Tensor)]
        yield from captured([*cells, *(function.__defaults__ or ())], depth)


def _filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  (an empty cell raises)
    except ValueError:
        return False
    return True


def per_row(tensor: Tensor, at: At, what: str) -> Tensor:
    """Look up a tensor that broadcasts to ``[B, H, N]`` at a tile's rows: a tensor ``[g, r, n, 1]`` or smaller."""
    if tensor.ndim > 3:
        raise SpecError(f"{what} must broadcast to [B, H, N]; got shape {tuple(tensor.shape)}")
    full = tensor[(None,) * (3 - tensor.ndim)]
    for size, wanted, name in zip(full.shape, (at.batch, at.heads, at.n), ("B", "H", "N"), strict=True):
        if size not in (1, wanted):
            raise SpecError(
                f"{what} has shape {tuple(tensor.shape)}, which does not broadcast to [B, H, N] ="
                f" {[at.batch, at.heads, at.n]}: {name} is {wanted} here. Shape per-head values [H, 1]."
            )
    index = (at.b, at.h, at.q)
    return full[tuple(i if size > 1 else torch.zeros_like(i) for i, size in zip(index, full.shape, strict=True))]


def per_head(value: Tensor | float, at: At, what: str) -> Tensor | float:
    """Look up a scalar, a float or a tensor ``[H]`` at a tile's heads."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if value.shape != (at.heads,):
        raise SpecError(f"{what} must be a scalar or one value per head [{at.heads}]; got {tuple(value.shape)}")
    return value[at.h]


class Region:
    """A set of (query, key, head) places given by what is at hand: slices, indices, masks, a function.

    ``keys`` and ``queries`` count positions among the keys: a slice, an int, a list or tensor of ints, a bool
    tensor ``[M]`` or ``[B, M]``, or a callable ``f(b, h, q, k) -> bool``; in a hosted model
    also a name. ``heads``: an int, a list or a slice.
    ``None`` means all.
    """

    def __init__(self, keys: Any = None, queries: Any = None, heads: Any = None):
        self.keys, self.queries, self.heads = keys, queries, heads

    def __repr__(self) -> str:
        parts = [f"{n}={v}" for n, v in vars(self).items() if v is not None]
        return f"Region({', '.join(parts)})"

    def where(self, at: At) -> Tensor | None:
        """Bool tensor that broadcasts against the tile; ``None`` for everywhere."""
        found = None
        for chosen, index, size, name in (
            (self.keys, at.k, at.m, "keys"),
            (self.queries, at.row, at.n + at.offset, "queries"),
            (self.heads, at.h, at.heads, "heads"),
        ):
            if chosen is None:
                continue
            inside = self._inside(chosen, index, size, name, at)
            found = inside if found is None else found & inside
        return found

    def columns(self, at: At) -> tuple[int, int]:
        """The tile's columns outside of which the region surely is empty."""
        width = at.k.shape[-1]
        if at.first is None or not isinstance(self.keys, slice):
            return 0, width
        start, stop, _ = self.keys.indices(at.m)
        low = min(max(start - at.first, 0), width)
        return low, max(low, min(stop - at.first, width))

    def is_columns(self, at: At) -> bool:
        """Is the region, in this tile, all of the columns that :meth:`columns` gives?"""
        keys = self.keys
        ranged = at.first is not None and isinstance(keys, slice) and keys.step in (None, 1)
        return ranged and self.queries is None and self.heads is None

    @staticmethod
    def _inside(chosen: Any, index: Tensor, size: int, name: str, at: At) -> Tensor:
        if callable(chosen) and not isinstance(chosen, Tensor):
            return chosen(*at.indices)
        if isinstance(chosen, slice):
            start, stop, step = chosen.indices(size)
            if step < 1:
                raise SpecError(f"{name}={chosen}: a region's slice must run forward (step >= 1)")
            inside = (index >= start) & (index < stop)
            return inside if step == 1 else inside & ((index - start) % step == 0)
        if isinstance(chosen, str):
            raise SpecError(f"{name}={chosen!r}: a name has a meaning in a model alone (saccade.edit, saccade.watch)")
        table = torch.as_tensor(chosen, device=index.device)
        if table.dtype == torch.bool:
            if table.shape[-1] != size or table.ndim > 2:
                raise SpecError(f"{name}: a bool tensor must be [{size}] or [B, {size}]; got {tuple(table.shape)}")
            return table[index] if table.ndim == 1 else table[at.b, index]
        table = table.reshape(-1)
        outside = table[(table < -size) | (table >= size)]
        if len(outside):
            raise SpecError(f"{name}: {outside.tolist()} lie outside 0..{size - 1}")
        return torch.isin(index, table % size)
