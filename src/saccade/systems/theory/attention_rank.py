"""Attention whose heads have a rank of their own choice: what one head of full rank does, many of low rank cannot.

    score[h] = (Wq[h] y) . (Wk[h] x) / sqrt(rank)        Wq[h], Wk[h]: [rank, width]
    out = sum over heads h of softmax(score[h]) x Wvo[h]  Wvo[h]: [width, width]

The usual layer has rank = width / heads. Here rank and heads are free, and values are never narrowed: only the rank of
the scores is in question. The target is the nearest neighbour, for x and y on the unit sphere the x with the greatest
x . y: one head with Wq = temperature sqrt(width) I, Wk = Wvo = I is it, as the temperature grows, for any number of
keys. Of heads of low rank exponentially many are needed.

Paper: On the Benefits of Rank in Attention Layers, arXiv:2407.16153
Code: https://github.com/NoahAmsel/attention-formers (models.py: SoftMultiheadAttention, HardMultiheadAttention,
    PerfectFullRank; task.py: NearestPointDataset; constructions.py lies in its history, before commit b248b89)

Differs: Wvo is one linear layer of all heads. First weights are the official ones, uniform by the fans of one head's
Wq and Wk and of all heads' Wvo, not the backbone's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice, pairwise
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core import masks, normalizers
from ...core.errors import SpecError
from ...core.spec import Attention
from ...nn import MultiHead
from ...nn.backbones import Place
from ..base import ClaimNumbers, LayerSystem, Promises

WIDTH, POINTS = 16, 16  # of the claim's nearest neighbours
MORE = 8  # times as many heads of low rank as the usual width / rank


class RankedHeads(MultiHead):
    """Heads that score with ``rank`` and carry whole values; ``hard``: each query reads its best key alone."""

    keeps_start = True

    def __init__(self, place: Place, rank: int, causal: bool, hard: bool):
        mask = masks.Causal() if causal else masks.Full()
        spec = Attention(mask=mask, normalizer=normalizers.TopKSoftmax(1) if hard else None)
        width, heads = place.width, place.heads
        super().__init__(spec, width, heads, kv_heads=(heads, 1), head_width=rank, positions=place.positions)
        self.v = nn.Identity()  # type: ignore[assignment]
        self.out = nn.Linear(heads * width, width, bias=False)
        for weight in (self.q.weight, self.k.weight):
            nn.init.uniform_(weight, -1, 1).data.mul_(math.sqrt(6 / (rank + width)))
        nn.init.xavier_uniform_(self.out.weight)


class AttentionRank(LayerSystem):
    """Settings: ``rank`` of a head's scores (``None``: width / heads, as usual); ``causal``; ``hard``."""

    slug = "attention-rank"
    title = "Heads of free rank"
    paper = "https://arxiv.org/abs/2407.16153"
    code = "https://github.com/NoahAmsel/attention-formers"
    promises = Promises(hosts=())

    def __init__(self, rank: int | None = None, causal: bool = True, hard: bool = False):
        if rank is not None and rank < 1:
            raise SpecError(f"attention-rank: a head's rank is 1 or more; got {rank}")
        self.rank, self.causal, self.hard = rank, causal, hard

    def layer(self, place: Place) -> RankedHeads:
        """Multi-head attention whose rank is not tied to the number of heads."""
        rank = max(1, place.width // place.heads) if self.rank is None else self.rank
        return RankedHeads(place, rank, self.causal, self.hard)

    def claim(self) -> ClaimNumbers:
        """Squared error of trained layers on nearest neighbours, for several ranks and numbers of heads."""
        usual = {rank: WIDTH // rank for rank in (1, 2, 4, 8, 16)}
        sizes = [*usual.items(), *((rank, MORE * usual[rank]) for rank in (1, 2, 4))]
        error = {size: _trained_error(*size) for size in sizes}
        full, many = error[WIDTH, 1], [error[rank, MORE * usual[rank]] for rank in (1, 2, 4)]
        ranked = [error[rank, usual[rank]] for rank in usual]
        return ClaimNumbers.decide(
            {f"error_rank{rank}_heads{heads}": round(value, 4) for (rank, heads), value in error.items()},
            f"Nearest of {POINTS} points in {WIDTH} dimensions, squared error: one head of full rank {full:.3f}; heads"
            f" of rank 1, 2, 4 and 8, width / rank of them, {', '.join(f'{x:.3f}' for x in ranked[:-1])}; {MORE} times"
            f" as many of rank 1, 2 and 4, {', '.join(f'{x:.3f}' for x in many)}.",
            error_falls_with_rank=all(a > b for a, b in pairwise(ranked)),
            full_rank_at_most_half_of_rank_one=full <= ranked[0] / 2,
            more_heads_do_not_make_up=min(many) > full,
        )


def nearest(seed: int, batch: int = 64, queries: int = 16) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless points ``[B, POINTS, WIDTH]`` and queries ``[B, queries, WIDTH]`` on the sphere, and their nearest."""
    source = torch.Generator().manual_seed(seed)
    while True:
        x = F.normalize(torch.randn(batch, POINTS, WIDTH, generator=source), dim=-1)
        y = F.normalize(torch.randn(batch, queries, WIDTH, generator=source), dim=-1)
        best = (y @ x.mT).argmax(-1, keepdim=True)
        yield x, y, x.gather(1, best.expand(-1, -1, WIDTH))


def squared_error(layer: RankedHeads, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Mean of |layer(y, x) - nearest|²; that of always answering 0 is 1."""
    x, y, target = batch
    return (layer(y, x) - target).square().sum(-1).mean()


def _trained_error(rank: int, heads: int, steps: int = 400) -> float:
    """Of a layer trained by Adam at the official rate, on fresh points."""
    from ...study.trainer import train

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = AttentionRank(rank, causal=False).layer(Place(WIDTH, heads, 0, 1, None, None))
    batches = nearest(0)
    train(layer, lambda: squared_error(layer, next(batches)), steps, lr=1e-2)
    with torch.no_grad():
        return fmean(float(squared_error(layer, batch)) for batch in islice(nearest(999), 8))
