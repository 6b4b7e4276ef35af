"""FlexPrefill: each head decides by itself, from the prompt, which blocks of keys its prefill needs, and how many.

With a, the exact weights of the last block of queries, a head is query-aware if pooling foresees them:

    JSD(softmax(mean(q_last) . mean(K_j) / sqrt(D)), sums of a by block) ** 0.5 < tau

    vertical-slash   the key blocks, and the block diagonals, that hold most of a: as many as gamma of it fills
    query-aware      the least number of both, and of softmax(mean(Q_i) . mean(K_j) / sqrt(D)), over all i and j
                     together, the greatest whose sum is at most gamma * (blocks of queries)

The first block of keys and the diagonal are always kept.

Paper: FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference, arXiv:2502.20766
Code: https://github.com/ByteDance-Seed/FlexPrefill (flex_prefill/ops/flex_prefill_attention.py: get_active_blocks)

Differs: blocks are counted in ``block`` tokens (the code counts them in 128 whatever their size); a block that holds
nothing of a counts as nothing in the divergence (NaN there: never query-aware). Dense where the code is, for a few
blocks, and where it refuses: queries that are not as many as keys, so decoding and chunks. The last block of queries
decides for all, so earlier rows depend on later tokens; the scale is 1 / sqrt(D), whatever the model's.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from ...core import masks
from ...core.selectors import Select, Selection, pool
from ...core.spec import Attention
from ..base import ClaimNumbers, Promises, System
from ._vertical_slash import by_distance, largest, last_weights, listed

GAMMAS = (0.5, 0.7, 0.9, 0.99)
LOST = 0.02  # accuracy that may be lost and still be held


class FlexPrefill(System):
    """Settings: ``gamma``, share of a's mass to cover; ``tau``; ``least`` tokens of keys and diagonals; ``block``."""

    slug = "flexprefill"
    title = "FlexPrefill"
    paper = "https://arxiv.org/abs/2502.20766"
    code = "https://github.com/ByteDance-Seed/FlexPrefill"
    promises = Promises(
        causal=False, cross=False, decodes=False, padding=False, unit_rows=True, training_free=True,
        needs_training=False,
    )  # fmt: skip

    def __init__(self, gamma: float = 0.9, tau: float = 0.1, least: int = 512, block: int = 128):
        self.gamma, self.tau, self.least, self.block = gamma, tau, least, block

    def build(self, heads: int) -> Attention:
        """Causal softmax over the blocks that each head finds."""
        return Attention(mask=masks.Causal(), select=Flex(self.gamma, self.tau, self.least, self.block))

    def claim(self) -> ClaimNumbers:
        """Error against gamma, answers held, and speed, in the embedded model, which this needs no training for."""
        from ...study import prefilling

        own, seen = self.build(6), prefilling.calls(2048)

        def off(program: Attention) -> float:
            return prefilling.error(seen, lambda layer: program)

        errors = {gamma: off(FlexPrefill(gamma).build(6)) for gamma in GAMMAS}
        faster, computed = prefilling.speedup(prefilling.calls(8192), lambda layer: own)
        dense, ours = prefilling.answers(), prefilling.answers(lambda layer: own)
        return ClaimNumbers.decide(
            {"error": {str(gamma): round(e, 4) for gamma, e in errors.items()}, "speedup_8192": round(faster, 3)}
            | {"computed_8192": round(computed, 4), "answers_dense": dense, "answers": ours},
            f"The outputs' relative L1 error falls from {errors[GAMMAS[0]]:.3f} at gamma {GAMMAS[0]} to"
            f" {errors[GAMMAS[-1]]:.3f} at {GAMMAS[-1]}; at {self.gamma}, attention over 8192 tokens is {faster:.2f}"
            f" times as fast as dense, computing {computed:.0%} of it, and of the answers at 2048 tokens"
            f" {prefilling.mean(ours):.1%} are right (dense {prefilling.mean(dense):.1%}).",
            error_falls_with_gamma=all(a >= b for a, b in pairwise(errors.values())),
            faster=faster > 1,
            answers_held=prefilling.mean(ours) >= prefilling.mean(dense) - LOST,
        )


class Flex(Select):
    """The paper's algorithms 1 to 4: see the module."""

    def __init__(self, gamma: float, tau: float, least: int, block: int):
        super().__init__(block, block)
        self.gamma, self.tau, self.least, self.block = gamma, tau, math.ceil(least / block), block

    @torch.no_grad()
    def choose(self, q: Tensor, k: Tensor, codes: Tensor) -> Selection:
        visible = (codes > masks.EMPTY).expand(*q.shape[:2], *codes.shape[2:])
        if q.shape[2] != k.shape[2] or q.shape[2] <= self.block * max(2, self.least):
            return listed(visible, self.block, self.block)
        seen = last_weights(q, k, self.block)
        vertical, slash = seen.mean(-2), by_distance(seen).flip(-1) / self.block
        counts = [self._count(x) for x in (vertical, slash)]
        vertical, slash = self._by_block(vertical), self._by_block(slash).flip(-1)
        aware, foreseen = self._aware(q, k, vertical)
        nearest = torch.arange(visible.shape[-1], device=q.device)
        vertical[..., 0] = slash[..., 0] = torch.inf
        columns, diagonals = (
            largest(x, count.masked_fill(aware, self.least)[..., None])
            for x, count in zip((vertical, slash), counts, strict=True)
        )
        keep = columns[..., None, :] | diagonals[..., (nearest[:, None] - nearest).clamp(min=0)]
        return listed((keep | foreseen) & visible, self.block, self.block)

    def _count(self, share: Tensor) -> Tensor:
        """How many blocks' worth of tokens it takes to cover more than gamma: ``[B, H]``."""
        tokens = (share.sort(-1, descending=True).values.cumsum(-1) <= self.gamma).sum(-1) + 1
        return (tokens // self.block + 1).clamp(self.least, math.ceil(share.shape[-1] / self.block))

    def _by_block(self, share: Tensor) -> Tensor:
        missing = -share.shape[-1] % self.block
        return torch.nn.functional.pad(share, (0, missing)).unflatten(-1, (-1, self.block)).sum(-1)

    def _aware(self, q: Tensor, k: Tensor, vertical: Tensor) -> tuple[Tensor, Tensor]:
        """Which heads are query-aware ``[B, H]``, and the blocks that pooling finds for them ``[B, H, nq, nk]``."""
        means = pool(k, self.block).repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[-1] ** -0.5
        guess = (q[:, :, -self.block :].mean(-2, keepdim=True) @ means).softmax(-1, dtype=torch.float32)[..., 0, :]
        entropies = [torch.special.entr(x).sum(-1) for x in ((guess + vertical) / 2, guess, vertical)]
        divergence = entropies[0] - (entropies[1] + entropies[2]) / 2
        aware = divergence.clamp(min=0).sqrt() < self.tau
        score = pool(q, self.block) @ means
        future = torch.ones(score.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        score = score.masked_fill(future, -torch.inf).softmax(-1, dtype=torch.float32)
        share, order = score.flatten(-2).sort(-1, descending=True)
        covered = share.cumsum(-1) <= self.gamma * score.shape[-1]
        foreseen = torch.zeros_like(covered).scatter_(-1, order, covered).view(score.shape)
        return aware, foreseen & aware[..., None, None]
