"""The search of superlinear attention: the blocks of keys that the spans around a query's best anchors touch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import masks
from ...core.normalizers import HIDDEN
from ...core.selectors import Select, Selection
from ...core.tile import At

if TYPE_CHECKING:
    from .superlinear import Spans

COLUMNS = 32  # keys per block: what is visited around a span
CELLS = 1 << 22  # products of queries and anchors held at a time


class SpanSearch(Select):
    """Finds the blocks that the spans and windows of :class:`Spans` touch: no other key has a weight.

    Other keys in those blocks change nothing: the best anchors are the best of any set of keys that holds them.
    """

    def __init__(self, spans: Spans):
        super().__init__(1, COLUMNS)
        self.spans = spans

    def search(self, q: Tensor, k: Tensor, mask: masks.Mask, at: At) -> Selection:
        """Some rows at a time, so that memory grows with N and not with N times anchors."""
        behind = self.spans.stripes(at.offset + at.n, q.device)
        rows = max(1, CELLS // (len(q) * q.shape[1] * max(1, len(behind))))
        with torch.no_grad():
            found = [
                self._some(q[:, :, part.flatten()], k, mask, at.moved(part, at.k), behind)
                for part in at.q.split(rows, 2)
            ]
            most = max(blocks.shape[-1] for blocks in found)
            blocks = torch.cat([F.pad(blocks, (0, most - blocks.shape[-1]), value=-1) for blocks in found], 2)
        return Selection(blocks, self.rows, self.columns)

    def _some(self, q: Tensor, k: Tensor, mask: masks.Mask, at: At, behind: Tensor) -> Tensor:
        """Distinct blocks ``[B, H, n, s]`` of the queries at ``at``, -1 for none."""
        row = at.row[0, 0]
        anchors = row - behind
        seen = (anchors >= 0) & mask.visible(at.moved(at.q, anchors.clamp(min=0)[None, None]))
        score = self._score(q.float() if q.dtype.itemsize < 4 else q, k, int(row[0]), behind.tolist())
        best, place = score.masked_fill(~seen, HIDDEN).topk(min(self.spans.count, len(behind)), -1)
        start, end = self.spans.bounds(row, row - behind[place])
        end = torch.where(best > HIDDEN, end, -1)
        runs = [self._blocks(start, end)]
        if self.spans.window:
            near = self._blocks((row - self.spans.window + 1).clamp(min=0), row)
            runs.append(near.expand(*score.shape[:3], -1))
        blocks = torch.cat(runs, -1).sort(-1).values
        again = F.pad(blocks.diff(dim=-1) == 0, (1, 0))
        blocks = blocks.masked_fill(again, -1).sort(-1, descending=True).values
        return blocks[..., : max(1, int((blocks >= 0).sum(-1).max()))]

    @staticmethod
    def _score(q: Tensor, k: Tensor, first: int, behind: list[int]) -> Tensor:
        """Products of each query with its anchors ``[B, H, N, A]``; ``-inf`` where the sequence has not begun."""
        n, grouped = q.shape[2], q.unflatten(1, (k.shape[1], -1))
        score = q.new_full((len(behind), *grouped.shape[:-1]), HIDDEN)
        for out, gap in zip(score, behind, strict=True):
            skip = min(max(0, gap - first), n)
            keys = k[:, :, None, first + skip - gap : first + n - gap]
            torch.linalg.vecdot(grouped[..., skip:, :], keys.to(q.dtype), out=out[..., skip:])
        return score.permute(1, 2, 3, 4, 0).flatten(1, 2)

    def _blocks(self, start: Tensor, end: Tensor) -> Tensor:
        """Numbers of the blocks that runs of keys ``[..., s]`` touch: ``[..., s * longest]``, -1 for none."""
        low, high = start // self.columns, end.div(self.columns, rounding_mode="floor")
        longest = max([0, *(high - low).flatten(0, -2).amax(0).tolist()]) + 1
        number = low[..., None] + torch.arange(longest, device=start.device)
        return number.masked_fill(number > high[..., None], -1).flatten(-2)
