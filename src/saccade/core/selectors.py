"""Selection: from queries and keys to the blocks of keys that each block of queries visits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import SpecError
from .masks import EMPTY, Mask, Span
from .tile import At, Part


@dataclass(frozen=True)
class Selection:
    """Chosen key blocks of every query block.

    ``blocks``: int64 ``[B, Hs, nq, s]``, distinct block numbers, -1 where a query block has fewer; ``Hs`` is 1, the
    number of key heads or the number of query heads. ``rows`` and ``columns``: tokens per query and key block.
    """

    blocks: Tensor
    rows: int
    columns: int

    def dense(self, n: int, m: int) -> Tensor:
        """The same as a bool tensor ``[B, Hs, N, M]``: what it means."""
        count = -(-m // self.columns)
        hit = torch.zeros(*self.blocks.shape[:3], count + 1, dtype=torch.bool, device=self.blocks.device)
        hit.scatter_(-1, self.blocks.remainder(count + 1), True)  # -1 falls into the spare column
        hit = hit[..., :count]
        return hit.repeat_interleave(self.rows, 2)[:, :, :n].repeat_interleave(self.columns, 3)[..., :m]


class Select(Part):
    """Base of all selectors. ``rows`` and ``columns`` are the sides of a block."""

    def __init__(self, rows: int, columns: int):
        super().__init__()
        if rows < 1 or columns < 1:
            raise SpecError(f"{type(self).__name__} needs blocks of at least 1 x 1; got {rows} x {columns}")
        self.rows, self.columns = rows, columns

    def choose(self, q: Tensor, k: Tensor, codes: Tensor) -> Selection:
        """Choose blocks.

        Args:
            q: ``[B, H, N, D]``.
            k: ``[B, Hkv, M, D]``.
            codes: what the mask says of each block (``masks.EMPTY``, ``PARTIAL``, ``FULL``), int8, broadcasting to
                ``[B, H, nq, nk]``. Empty blocks need not be chosen; choosing them is harmless.
        """
        raise NotImplementedError

    def search(self, q: Tensor, k: Tensor, mask: Mask, at: At) -> Selection:
        """Choose blocks in a call at ``at``, the place of its whole matrix: what the engine calls.

        Asks the mask about every block. A selector of single keys overrides this instead of :meth:`choose`: the map
        would have N x M codes.
        """
        span = Span.grid(
            at.n, at.m, self.rows, self.columns, offset=at.offset, batch=at.batch, heads=at.heads, device=q.device
        )
        codes = mask.blocks(span)
        codes = codes[(None,) * (4 - codes.ndim)]
        if not bool((codes > EMPTY).any()):
            raise SpecError("the mask hides every key, so there is nothing to select from")
        return self.choose(q, k, codes)


def pool(x: Tensor, size: int) -> Tensor:
    """Mean of each run of ``size`` tokens (the last may be shorter): ``[..., N, D]`` to ``[..., N / size, D]``."""
    n = x.shape[-2]
    whole = n // size * size
    means = x[..., :whole, :].unflatten(-2, (-1, size)).mean(-2)
    return means if whole == n else torch.cat([means, x[..., whole:, :].mean(-2, keepdim=True)], -2)


class TopKBlocks(Select):
    """The ``keep`` key blocks whose mean key scores highest with the block's mean query, per head.

    Queries of a block choose together, so a query's blocks depend on its block's later queries: exact decoding and
    strict causality need ``rows=1``, which costs more.

    Args:
        keep: blocks per query block, those forced by ``local`` and ``first`` included.
        block: tokens per key block.
        rows: tokens per query block; ``block`` if not given.
        local: newest visible blocks that are always kept (the query's own among them under a causal mask).
        first: blocks at the start that are always kept.
    """

    def __init__(self, keep: int, block: int = 64, rows: int | None = None, local: int = 1, first: int = 0):
        super().__init__(rows or block, block)
        if keep < max(1, local + first):
            raise SpecError(f"TopKBlocks: keep={keep} must be at least 1 and hold local={local} + first={first}")
        self.keep, self.local, self.first = keep, local, first

    def choose(self, q: Tensor, k: Tensor, codes: Tensor) -> Selection:
        with torch.no_grad():
            mean_q, mean_k = pool(q, self.rows), pool(k, self.columns)
            mean_k = mean_k.repeat_interleave(q.shape[1] // k.shape[1], 1)
            score = (mean_q @ mean_k.mT).float()
            visible = codes > EMPTY
            order = torch.arange(score.shape[-1], device=q.device)
            newest = torch.where(visible, order, -1).amax(-1, keepdim=True)
            forced = ((order > newest - self.local) | (order < self.first)) & visible
            score = score.masked_fill(~visible, float("-inf")).masked_fill(forced, float("inf"))
            best, blocks = score.topk(min(self.keep, score.shape[-1]), -1)
            return Selection(blocks.masked_fill(best == float("-inf"), -1), self.rows, self.columns)
