"""Masks: which keys a query may see, as an algebra that also answers for whole blocks.

A mask says two things: :meth:`Mask.visible`, element by element, and :meth:`Mask.blocks`, in closed form, whether a
block of the matrix is empty, full or partial. The second is what makes a block map cost blocks rather than N²; it
may call a block partial that is not, and is never wrong otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import SpecError
from .functions import PlainFunction
from .tile import At, Part

EMPTY, PARTIAL, FULL = 0, 1, 2


@dataclass(frozen=True)
class Span:
    """Bounds of a grid of blocks: first and last (inclusive) query ``[nq, 1]`` and key ``[1, nk]`` of each."""

    q_lo: Tensor
    q_hi: Tensor
    k_lo: Tensor
    k_hi: Tensor
    batch: int
    heads: int
    n: int
    m: int
    offset: int

    @property
    def distance_lo(self) -> Tensor:
        """Smallest ``row - k`` in each block, ``[nq, nk]``."""
        return self.q_lo + self.offset - self.k_hi

    @property
    def distance_hi(self) -> Tensor:
        """Largest ``row - k`` in each block, ``[nq, nk]``."""
        return self.q_hi + self.offset - self.k_lo

    @staticmethod
    def grid(
        n: int,
        m: int,
        rows: int,
        columns: int,
        *,
        offset: int | None = None,
        batch: int = 1,
        heads: int = 1,
        first: int = 0,
        last: int | None = None,
        device: torch.device | str = "cpu",
    ) -> Span:
        """Blocks of ``rows`` queries by ``columns`` keys; only the query blocks ``first`` to ``last``."""
        stop = -(-n // rows)
        q_lo = torch.arange(first, stop if last is None else min(last, stop), device=device)[:, None] * rows
        k_lo = torch.arange(-(-m // columns), device=device)[None, :] * columns
        return Span(
            q_lo,
            (q_lo + rows).clamp(max=n) - 1,
            k_lo,
            (k_lo + columns).clamp(max=m) - 1,
            batch,
            heads,
            n,
            m,
            m - n if offset is None else offset,
        )


def _code(empty: Tensor, full: Tensor) -> Tensor:
    """Codes from "surely nothing visible" and "surely everything visible"."""
    return torch.where(full, FULL, torch.where(empty, EMPTY, PARTIAL).to(torch.int8)).to(torch.int8)


def _beyond(at: At, stop: int) -> Tensor | None:
    """Keys from ``stop`` on, if there are any."""
    return None if stop >= at.m else at.k >= stop


class Mask(Part):
    """Base of all masks. Combine with ``&``, ``|``, ``~``; a bool tensor or a function may stand on either side."""

    by_distance = False  # depends on ``row - k`` alone, so one look serves all places at the same distance

    def visible(self, at: At) -> Tensor:
        """Bool tensor that broadcasts against the tile at ``at``: may this query see this key?"""
        raise NotImplementedError

    def blocks(self, span: Span) -> Tensor:
        """Codes EMPTY, PARTIAL or FULL, int8, that broadcast to ``[B, H, nq, nk]``."""
        return torch.full((len(span.q_lo), span.k_lo.shape[1]), PARTIAL, dtype=torch.int8, device=span.q_lo.device)

    def unseen(self, at: At) -> Tensor | None:
        """Keys that no query sees, bool, broadcasting to ``[B, H, 1, M]``; ``None``: not known without a look.

        Their keys and values are never read, so that whatever lies in padding stays there.
        """
        return None

    def __and__(self, other: Any) -> Mask:
        return And(self, as_mask(other))

    def __rand__(self, other: Any) -> Mask:
        return And(as_mask(other), self)

    def __or__(self, other: Any) -> Mask:
        return Or(self, as_mask(other))

    def __ror__(self, other: Any) -> Mask:
        return Or(as_mask(other), self)

    def __invert__(self) -> Mask:
        return Not(self)


def as_mask(value: Any) -> Mask:
    """A mask from a mask, ``None`` (full), a bool tensor, or a function ``f(b, h, q, k) -> bool``."""
    if value is None:
        return Full()
    if isinstance(value, Mask):
        return value
    if isinstance(value, Tensor):
        return Given(value)
    if callable(value):
        return Function(value)
    raise SpecError(f"a mask must be a Mask, a bool tensor or a function f(b, h, q, k); got {type(value).__name__}")


class And(Mask):
    """Both masks see the key."""

    def __init__(self, left: Mask, right: Mask):
        super().__init__()
        self.left, self.right = left, right

    @property
    def by_distance(self) -> bool:  # type: ignore[override]
        return self.left.by_distance and self.right.by_distance

    def visible(self, at: At) -> Tensor:
        return self.left.visible(at) & self.right.visible(at)

    def blocks(self, span: Span) -> Tensor:
        return torch.minimum(self.left.blocks(span), self.right.blocks(span))

    def unseen(self, at: At) -> Tensor | None:
        left, right = self.left.unseen(at), self.right.unseen(at)
        return left if right is None else right if left is None else left | right


class Or(Mask):
    """Either mask sees the key."""

    def __init__(self, left: Mask, right: Mask):
        super().__init__()
        self.left, self.right = left, right

    @property
    def by_distance(self) -> bool:  # type: ignore[override]
        return self.left.by_distance and self.right.by_distance

    def visible(self, at: At) -> Tensor:
        return self.left.visible(at) | self.right.visible(at)

    def blocks(self, span: Span) -> Tensor:
        return torch.maximum(self.left.blocks(span), self.right.blocks(span))

    def unseen(self, at: At) -> Tensor | None:
        left, right = self.left.unseen(at), self.right.unseen(at)
        return None if left is None or right is None else left & right


class Not(Mask):
    """The mask does not see the key."""

    def __init__(self, inner: Mask):
        super().__init__()
        self.inner = inner

    @property
    def by_distance(self) -> bool:  # type: ignore[override]
        return self.inner.by_distance

    def visible(self, at: At) -> Tensor:
        return ~self.inner.visible(at)

    def blocks(self, span: Span) -> Tensor:
        return FULL - self.inner.blocks(span)


class Full(Mask):
    """Every query sees every key."""

    def visible(self, at: At) -> Tensor:
        return torch.ones_like(at.q, dtype=torch.bool)

    def blocks(self, span: Span) -> Tensor:
        return torch.full((len(span.q_lo), span.k_lo.shape[1]), FULL, dtype=torch.int8, device=span.q_lo.device)


class Causal(Mask):
    """A query sees itself and the past: ``k <= row``.

    Bottom-right aligned: with fewer queries than keys the queries are the last ones (a chunk on a filled cache).
    """

    by_distance = True

    def visible(self, at: At) -> Tensor:
        return at.distance >= 0

    def blocks(self, span: Span) -> Tensor:
        return _code(span.distance_hi < 0, span.distance_lo >= 0)

    def unseen(self, at: At) -> Tensor | None:
        return _beyond(at, at.n + at.offset)  # the room of a cache that is not full yet


class Window(Mask):
    """Keys less than ``size`` away: ``row - size < k < row + size``; with ``Causal()`` the last ``size`` keys.

    Args:
        size: keys seen to the left, the query's own included.
        right: the same to the right; ``size`` if not given.
    """

    by_distance = True

    def __init__(self, size: int, right: int | None = None):
        super().__init__()
        if size < 1 or (right is not None and right < 1):
            raise SpecError(f"Window needs sizes of at least 1 (a query sees itself); got {size}, right={right}")
        self.size, self.right = size, right

    def visible(self, at: At) -> Tensor:
        return (at.distance < self.size) & (at.distance > -(self.right or self.size))

    def blocks(self, span: Span) -> Tensor:
        lo, hi = span.distance_lo, span.distance_hi
        right = -(self.right or self.size)
        return _code((lo >= self.size) | (hi <= right), (hi < self.size) & (lo > right))

    def unseen(self, at: At) -> Tensor | None:
        return _beyond(at, at.n + at.offset + (self.right or self.size) - 1)


class Dilated(Mask):
    """A window with gaps: ``size`` keys to each side, ``dilation`` apart, the query's own included.

    Visible where ``|row - k| < size * dilation`` and ``dilation`` divides ``row - k`` (Longformer, arXiv:2004.05150).
    """

    by_distance = True

    def __init__(self, size: int, dilation: int):
        super().__init__()
        if size < 1 or dilation < 1:
            raise SpecError(f"Dilated needs size >= 1 and dilation >= 1; got {size}, {dilation}")
        self.size, self.dilation = size, dilation

    def visible(self, at: At) -> Tensor:
        near = at.distance.abs() < self.size * self.dilation
        return near & (at.distance % self.dilation == 0)

    def blocks(self, span: Span) -> Tensor:
        reach = (self.size - 1) * self.dilation
        lo, hi = span.distance_lo.clamp(min=-reach), span.distance_hi.clamp(max=reach)
        some = (lo <= hi) & (hi.div(self.dilation, rounding_mode="floor") * self.dilation >= lo)
        inside = (span.distance_lo >= -reach) & (span.distance_hi <= reach)
        single = (span.distance_lo == span.distance_hi) & some
        return _code(~some, single | inside if self.dilation == 1 else single)


class Sinks(Mask):
    """The first ``count`` keys are visible to every query (StreamingLLM, arXiv:2309.17453)."""

    def __init__(self, count: int):
        super().__init__()
        if count < 0:
            raise SpecError(f"Sinks needs a count of at least 0; got {count}")
        self.count = count

    def visible(self, at: At) -> Tensor:
        return at.k < self.count

    def blocks(self, span: Span) -> Tensor:
        return _code(span.k_lo >= self.count, span.k_hi < self.count)

    def unseen(self, at: At) -> Tensor | None:
        return at.k >= self.count


class Prefix(Mask):
    """The first ``length`` keys, one number or ``[B]``; ``Causal() | Prefix(p)`` is a prefix language model."""

    length: Tensor

    def __init__(self, length: int | Tensor):
        super().__init__()
        self.hold("length", torch.as_tensor(length))

    def visible(self, at: At) -> Tensor:
        return at.k < (self.length[at.b] if self.length.numel() > 1 else self.length)

    def blocks(self, span: Span) -> Tensor:
        length = self.length.reshape(-1, 1, 1, 1)
        return _code(span.k_lo >= length, span.k_hi < length)

    def unseen(self, at: At) -> Tensor | None:
        return ~self.visible(at)


class Padding(Mask):
    """Keys that hold tokens: ``keep`` is a bool (or 0/1) tensor ``[B, M]``, as a tokenizer's attention mask."""

    keep: Tensor

    def __init__(self, keep: Tensor):
        super().__init__()
        if keep.ndim != 2:
            raise SpecError(f"Padding needs [B, M], true where a token is; got shape {tuple(keep.shape)}")
        self.hold("keep", keep.bool())

    def visible(self, at: At) -> Tensor:
        self._check(at.m)
        return self.keep[at.b if len(self.keep) > 1 else 0, at.k]

    def blocks(self, span: Span) -> Tensor:
        self._check(span.m)
        before = torch.nn.functional.pad(self.keep.cumsum(-1), (1, 0))  # kept keys before each position
        kept = before[:, span.k_hi[0] + 1] - before[:, span.k_lo[0]]
        return _code(kept == 0, kept == span.k_hi[0] + 1 - span.k_lo[0])[:, None, None, :]

    def unseen(self, at: At) -> Tensor | None:
        return ~self.visible(at)

    def _check(self, m: int) -> None:
        if self.keep.shape[-1] != m:
            raise SpecError(f"Padding holds {self.keep.shape[-1]} keys, the call has {m}: give one column per key")


class Documents(Mask):
    """Packed sequences: a query sees the keys of its own document.

    Args:
        ids: document of every position, ``[M]`` or ``[B, M]``; negative: belongs to none, sees and is seen by nobody.
        queries: the same for the queries, if they are not the last N of these positions: ``[N]`` or ``[B, N]``.
    """

    ids: Tensor
    queries: Tensor | None

    def __init__(self, ids: Tensor, queries: Tensor | None = None):
        super().__init__()
        for name, value in (("ids", ids), ("queries", queries)):
            if value is not None and value.ndim not in (1, 2):
                raise SpecError(f"Documents: {name} must be [M] or [B, M]; got shape {tuple(value.shape)}")
        self.hold("ids", ids)
        self.hold("queries", queries)

    @staticmethod
    def from_lengths(lengths: Sequence[int] | Tensor) -> Documents:
        """Documents of these lengths, one after the other."""
        sizes = torch.as_tensor(lengths)
        return Documents(torch.repeat_interleave(torch.arange(len(sizes)), sizes))

    @staticmethod
    def _at(ids: Tensor, b: Tensor, position: Tensor) -> Tensor:
        return ids[position] if ids.ndim == 1 else ids[b if len(ids) > 1 else 0, position]

    def visible(self, at: At) -> Tensor:
        self._check(at.m, at.n, at.offset)
        keys = self._at(self.ids, at.b, at.k)
        rows = self._at(self.ids, at.b, at.row) if self.queries is None else self._at(self.queries, at.b, at.q)
        return (rows == keys) & (keys >= 0)

    def blocks(self, span: Span) -> Tensor:
        self._check(span.m, span.n, span.offset)
        own = self.queries is None
        q_lo, q_hi = _extent(
            self.ids if self.queries is None else self.queries,
            span.q_lo[:, 0] + (span.offset if own else 0),
            span.q_hi[:, 0] + (span.offset if own else 0),
        )
        k_lo, k_hi = _extent(self.ids, span.k_lo[0], span.k_hi[0])
        q_lo, q_hi, k_lo, k_hi = q_lo[..., :, None], q_hi[..., :, None], k_lo[..., None, :], k_hi[..., None, :]
        full = (q_lo == q_hi) & (k_lo == k_hi) & (q_lo == k_lo) & (k_lo >= 0)
        codes = _code((q_hi < k_lo) | (k_hi < q_lo) | (k_hi < 0) | (q_hi < 0), full)
        return codes if codes.ndim == 2 else codes[:, None]

    def unseen(self, at: At) -> Tensor | None:
        return self._at(self.ids, at.b, at.k) < 0

    def _check(self, m: int, n: int, offset: int) -> None:
        if self.ids.shape[-1] != m:
            raise SpecError(f"Documents holds {self.ids.shape[-1]} ids, the call has {m} keys: give one id per key")
        if self.queries is None and not 0 <= offset <= m - n:
            raise SpecError(
                f"Documents: queries at positions {offset}..{offset + n - 1} are not among the {m} keys: give"
                " queries=, the document of each query"
            )
        if self.queries is not None and self.queries.shape[-1] != n:
            raise SpecError(f"Documents holds {self.queries.shape[-1]} query ids, the call has {n} queries")


def _extent(values: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest of ``values[..., lo:hi + 1]`` for runs of one length (the last may be shorter)."""
    width = int((hi - lo).max()) + 1
    first = int(lo[0])
    count = len(lo)
    piece = values[..., first : int(hi[-1]) + 1]
    missing = count * width - piece.shape[-1]
    if missing:
        piece = torch.cat([piece, piece[..., -1:].expand(*piece.shape[:-1], missing)], -1)
    runs = piece.unflatten(-1, (count, width))
    return runs.amin(-1), runs.amax(-1)


class Blocks(Mask):
    """A pattern of blocks: query block i sees key block j where ``layout[i, j]``; by default its own alone.

    Args:
        size: side of a block, in tokens.
        layout: bool ``[nq, nk]`` or ``[H, nq, nk]``, counted in blocks from position 0 of the keys.
    """

    layout: Tensor | None

    def __init__(self, size: int, layout: Tensor | None = None):
        super().__init__()
        if size < 1:
            raise SpecError(f"Blocks needs a size of at least 1; got {size}")
        if layout is not None and layout.ndim not in (2, 3):
            raise SpecError(f"Blocks: layout must be [nq, nk] or [H, nq, nk]; got {tuple(layout.shape)}")
        self.size = size
        self.hold("layout", None if layout is None else layout.bool())

    def visible(self, at: At) -> Tensor:
        row, column = at.row // self.size, at.k // self.size
        if self.layout is None:
            return row == column
        return self.layout[row, column] if self.layout.ndim == 2 else self.layout[at.h, row, column]

    def blocks(self, span: Span) -> Tensor:
        q_lo, q_hi = (span.q_lo + span.offset) // self.size, (span.q_hi + span.offset) // self.size
        k_lo, k_hi = span.k_lo // self.size, span.k_hi // self.size
        if self.layout is None:
            one = (q_lo == q_hi) & (k_lo == k_hi)
            return _code((q_hi < k_lo) | (q_lo > k_hi), one & (q_lo == k_lo))
        # Visible cells in a rectangle of the layout, from its table of sums.
        table = torch.nn.functional.pad(self.layout.to(torch.int64).cumsum(-1).cumsum(-2), (1, 0, 1, 0))
        corners = [(q_hi + 1, k_hi + 1), (q_lo, k_hi + 1), (q_hi + 1, k_lo), (q_lo, k_lo)]
        a, b, c, d = (table[..., i, j] for i, j in corners)
        seen = a - b - c + d
        codes = _code(seen == 0, seen == (q_hi - q_lo + 1) * (k_hi - k_lo + 1))
        return codes if codes.ndim == 2 else codes[None]


class Neighborhood(Mask):
    """Neighbors on a grid of one to three dimensions, flattened row by row, as in NATTEN (arXiv:2204.07143).

    Each axis has its kernel size, dilation and causality. Without causality every query has exactly ``kernel``
    neighbors on an axis: near a border the window shifts inward. With it: the ``kernel`` last, clipped at the border.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        kernel: int | Sequence[int],
        dilation: int | Sequence[int] = 1,
        causal: bool | Sequence[bool] = False,
    ):
        super().__init__()
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        axes = len(self.shape)
        if not 1 <= axes <= 3:
            raise SpecError(f"Neighborhood works in 1 to 3 dimensions; got shape {self.shape}")
        self.kernel = _spread(kernel, axes, "kernel")
        self.dilation = _spread(dilation, axes, "dilation")
        self.causal = _spread(causal, axes, "causal")
        for length, width, gap in zip(self.shape, self.kernel, self.dilation, strict=True):
            if width < 1 or gap < 1 or width * gap > length:
                raise SpecError(
                    f"Neighborhood: kernel x dilation must lie in 1..length on each axis; got kernel {width},"
                    f" dilation {gap}, length {length}"
                )

    def _coordinates(self, index: Tensor) -> list[Tensor]:
        inner = [math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape))]
        return [index // size % length for size, length in zip(inner, self.shape, strict=True)]

    def visible(self, at: At) -> Tensor:
        self._check(at.n + at.offset, at.m)
        seen: Tensor | None = None
        for axis, (i, j) in enumerate(zip(self._coordinates(at.row), self._coordinates(at.k), strict=True)):
            gap = self.dilation[axis]
            start, stop = self._window(axis, i)
            near = (i % gap == j % gap) & (j // gap >= start) & (j // gap < stop)
            seen = near if seen is None else seen & near
        assert seen is not None
        return seen

    def _window(self, axis: int, i: Tensor) -> tuple[Tensor, Tensor]:
        """First neighbor and the one after the last, counted within the dilation group of coordinate ``i``."""
        width, gap, length = self.kernel[axis], self.dilation[axis], self.shape[axis]
        place = i // gap
        if self.causal[axis]:
            return (place - width + 1).clamp(min=0), place + 1
        group = (length - 1 - i % gap) // gap + 1
        start = torch.minimum((place - width // 2).clamp(min=0), group - width)
        return start, start + width

    def blocks(self, span: Span) -> Tensor:
        self._check(span.n + span.offset, span.m)
        empty = full = None
        inner = 1
        for axis in reversed(range(len(self.shape))):
            length, width, gap = self.shape[axis], self.kernel[axis], self.dilation[axis]
            i_lo, i_hi = _run_extent(span.q_lo + span.offset, span.q_hi + span.offset, inner, length)
            j_lo, j_hi = _run_extent(span.k_lo, span.k_hi, inner, length)
            inner *= length
            if gap == 1:  # window borders grow with the coordinate, so the ends of the run bound them all
                first, last = self._window(axis, i_lo), self._window(axis, i_hi)
                none = (j_hi < first[0]) | (j_lo >= last[1])
                every = (j_lo >= last[0]) & (j_hi < first[1])
            else:
                reach = (width - 1) * gap
                ahead = 0 if self.causal[axis] else reach
                none = (j_hi < i_lo - reach) | (j_lo > i_hi + ahead)
                every = torch.zeros_like(none)
            empty = none if empty is None else empty | none
            full = every if full is None else full & every
        assert empty is not None and full is not None
        return _code(empty, full & ~empty)

    def _check(self, rows: int, m: int) -> None:
        size = math.prod(self.shape)
        if rows != size or m != size:
            raise SpecError(f"Neighborhood on {self.shape} needs {size} queries and keys; got {rows} and {m}")


def _spread(value: Any, axes: int, name: str) -> tuple:
    values = tuple(value) if isinstance(value, Sequence) else (value,) * axes
    if len(values) != axes:
        raise SpecError(f"Neighborhood: {name} needs one value or one per axis ({axes}); got {values}")
    return values


def _run_extent(lo: Tensor, hi: Tensor, inner: int, length: int) -> tuple[Tensor, Tensor]:
    """Least and greatest coordinate, on an axis with ``inner`` tokens per step, of the flat run ``lo..hi``."""
    first, last = lo // inner, hi // inner
    wraps = (last - first >= length) | (first % length > last % length)
    return torch.where(wraps, 0, first % length), torch.where(wraps, length - 1, last % length)


class Given(Mask):
    """A bool tensor that broadcasts to ``[B, H, N, M]``. It costs what it weighs; prefer a mask in closed form."""

    keep: Tensor

    def __init__(self, keep: Tensor):
        super().__init__()
        if keep.dtype != torch.bool or not 2 <= keep.ndim <= 4:
            raise SpecError(
                f"a tensor mask must be bool and broadcast to [B, H, N, M]; got {keep.dtype} {tuple(keep.shape)}."
                " Additive masks are scores: use scores.Bias."
            )
        self.hold("keep", keep[(None,) * (4 - keep.ndim)])

    def visible(self, at: At) -> Tensor:
        self._check((at.batch, at.heads, at.n, at.m))
        index = (at.b, at.h, at.q, at.k)
        return self.keep[
            tuple(i if s > 1 else torch.zeros_like(i) for i, s in zip(index, self.keep.shape, strict=True))
        ]

    def blocks(self, span: Span) -> Tensor:
        self._check((span.batch, span.heads, span.n, span.m))
        first, last = max(0, int(span.q_lo.min())), int(span.q_hi.max()) + 1  # of all rows only those asked about
        q_lo, q_hi = span.q_lo[:, 0] - first, span.q_hi[:, 0] - first
        keep = self.keep.expand(*self.keep.shape[:2], span.n, span.m)[:, :, first:last]
        k_lo, k_hi = _extent(keep.to(torch.uint8), span.k_lo[0], span.k_hi[0])  # [.., N, nk]
        least, most = k_lo.transpose(-1, -2), k_hi.transpose(-1, -2)
        least = _extent(least, q_lo, q_hi)[0].transpose(-1, -2)
        most = _extent(most, q_lo, q_hi)[1].transpose(-1, -2)
        return _code(most == 0, least == 1)

    def unseen(self, at: At) -> Tensor | None:
        return ~self.keep.any(2, keepdim=True)

    def _check(self, wanted: tuple[int, ...]) -> None:
        if any(s not in (1, w) for s, w in zip(self.keep.shape, wanted, strict=True)):
            raise SpecError(f"the mask tensor is {tuple(self.keep.shape)}, which does not broadcast to {list(wanted)}")


class Function(Mask):
    """A plain function ``f(b, h, q, k) -> bool``, as FlexAttention's ``mask_mod``: evaluated tile by tile."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function
        self._call = PlainFunction(function)

    def visible(self, at: At) -> Tensor:
        return self._call(at).bool()


@dataclass(frozen=True)
class BlockMap:
    """Codes EMPTY (0), PARTIAL (1), FULL (2) of every block, int8, broadcasting to ``[B, H, nq, nk]``."""

    codes: Tensor
    rows: int
    columns: int

    @property
    def visited(self) -> float:
        """Share of the blocks that are not empty."""
        return float((self.codes > EMPTY).double().mean())


def block_map(
    mask: Any,
    n: int,
    m: int | None = None,
    *,
    rows: int = 128,
    columns: int = 128,
    offset: int | None = None,
    batch: int = 1,
    heads: int = 1,
) -> BlockMap:
    """Classify every block of an N x M matrix in closed form: time and memory grow with blocks, not with N·M."""
    mask = as_mask(mask)
    m = n if m is None else m
    devices = {b.device for b in mask.buffers()} or {"cpu"}
    span = Span.grid(n, m, rows, columns, offset=offset, batch=batch, heads=heads, device=devices.pop())
    return BlockMap(mask.blocks(span), rows, columns)
