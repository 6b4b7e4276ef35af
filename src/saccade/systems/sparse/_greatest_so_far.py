"""Which keys are among the greatest up to a query: a mask that needs one threshold per row and skips whole blocks."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from ...core.masks import Mask, Span
from ...core.tile import At
from .block_masks import codes


class AtLeast(Mask):
    """Keys whose rank is at least what a query asks for.

    Args:
        rank: of the keys, ``[B, G, M]``, G a divisor of the number of heads.
        least: of the queries, ``[B, G, N]``.
    """

    rank: Tensor
    least: Tensor

    def __init__(self, rank: Tensor, least: Tensor):
        super().__init__()
        self.hold("rank", rank)
        self.hold("least", least)

    def visible(self, at: At) -> Tensor:
        group = at.h // (at.heads // self.rank.shape[1])
        return self.rank[at.b, group, at.k] >= self.least[at.b, group, at.q]

    def blocks(self, span: Span) -> Tensor:
        lowest, highest = _extent(self.rank, span.k_lo[0], span.k_hi[0])
        easiest, hardest = _extent(self.least, span.q_lo[:, 0], span.q_hi[:, 0])
        found = codes(highest[..., None, :] < easiest[..., None], lowest[..., None, :] >= hardest[..., None])
        return found.repeat_interleave(span.heads // self.rank.shape[1], 1)


def _extent(x: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest of ``x[..., lo:hi + 1]`` for each of these runs."""
    width = int((hi - lo).max()) + 1
    runs = x[..., torch.minimum(lo[:, None] + torch.arange(width, device=x.device), hi[:, None])]
    return runs.amin(-1), runs.amax(-1)


@torch.no_grad()
def strongest(bias: Tensor, window: int, start: int = 0) -> AtLeast:
    """For the queries from ``start`` on, the ``window`` keys of greatest bias ``[B, G, M]`` up to each; later ones too
    where they are greater, so it needs a causal mask beside it."""
    rank = bias.argsort(stable=True).argsort()
    rows = []
    for ranks in rank.flatten(0, 1).tolist():
        best = heapq.nlargest(window, ranks[:start])
        best = [-1] * (min(window, len(ranks)) - len(best)) + best[::-1]  # ascending, so it is a heap
        least = []
        for each in ranks[start:]:
            heapq.heappushpop(best, each)
            least.append(best[0])
        rows.append(least)
    return AtLeast(rank, torch.tensor(rows, device=bias.device).unflatten(0, bias.shape[:2]))
