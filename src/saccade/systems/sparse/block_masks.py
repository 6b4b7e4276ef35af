"""Masks counted in blocks of tokens from position 0, shared by the static block patterns."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.errors import SpecError
from ...core.masks import EMPTY, FULL, PARTIAL, Mask, Span
from ...core.tile import At


def apart(at: At, size: int) -> Tensor:
    """How many blocks of ``size`` tokens the key's block lies before the query's (negative: after it), int32."""
    return (at.row // size).int() - (at.k // size).int()  # half the time of int64, and every tile asks


def apart_extent(span: Span, size: int) -> tuple[Tensor, Tensor]:
    """Least and greatest of :func:`apart` in each block of the grid, ``[nq, nk]``; all between them occur too."""
    q_lo, q_hi = (span.q_lo + span.offset) // size, (span.q_hi + span.offset) // size
    return q_lo - span.k_hi // size, q_hi - span.k_lo // size


def codes(empty: Tensor, full: Tensor) -> Tensor:
    """EMPTY, FULL or PARTIAL, int8, from "surely nothing visible" and "surely everything visible"."""
    return torch.where(full, FULL, torch.where(empty, EMPTY, PARTIAL)).to(torch.int8)


class NearBlocks(Mask):
    """Keys of the query's own block of ``size`` tokens, of the ``count - 1`` blocks before it, and of all after it.

    Args:
        size: tokens of a block.
        count: blocks seen, at least 1; one number, or int ``[H]`` for a number per head.

    Raises:
        SpecError: a size or a count below 1, or counts of another shape.
    """

    count: Tensor

    def __init__(self, size: int, count: int | Tensor):
        super().__init__()
        counts = torch.as_tensor(count)
        if size < 1 or counts.ndim > 1 or counts.numel() < 1 or int(counts.min()) < 1:
            raise SpecError(f"NearBlocks needs a size and counts of at least 1, one or [H]; got {size}, {count}")
        self.size = size
        self.hold("count", counts)

    def visible(self, at: At) -> Tensor:
        return apart(at, self.size) < (self.count[at.h] if self.count.ndim else self.count)

    def blocks(self, span: Span) -> Tensor:
        lo, hi = apart_extent(span, self.size)
        count = self.count[:, None, None] if self.count.ndim else self.count
        return codes(lo >= count, hi < count)
