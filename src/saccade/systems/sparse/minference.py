"""MInference: each head has one of three sparse patterns, found once by search, whose indices come from each prompt.

    a-shape          the first ``a`` keys and the last ``b``
    vertical-slash   the ``a`` keys and the ``b`` distances that gather most weight from the last 64 queries
    block-sparse     per block of 64 queries the ``a`` blocks of 64 keys with the greatest mean(Q_i) . mean(K_j)

A distance means, for a block of 64 queries, the 64 keys that lie so far from them. The search gives every candidate the
same work, then takes the one whose output is nearest to the dense one.

Paper: MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention, arXiv:2407.02490
Code: https://github.com/microsoft/MInference (minference/modules/minference_forward.py, csrc/vertical_slash_index.cu,
    minference/ops/block_sparse_flash_attention.py)

Differs: where ranges of keys overlap their union is computed (the CUDA index rounds it up to whole blocks), and an
a-shape is cut to blocks of queries as the others are. The search is the paper's, by the outputs' L1 error (the code
counts entries that are off by 0.005, or recalls weights), over the code's candidates, scaled to equal work: their sizes
are for 30k tokens and more. Dense where queries are not as many as keys: decoding (as there), and chunks. The last
queries decide for all, so earlier rows depend on later tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ...core import masks
from ...core.errors import SpecError
from ...core.selectors import Select, Selection, pool
from ...core.spec import Attention
from ..base import ClaimNumbers, Promises, System
from ._vertical_slash import by_distance, largest, last_weights, listed

BLOCK = 64
FORCED = 30, 100  # first keys and least distances that are among the chosen
LOST = 0.02  # accuracy that may be lost and still be held


class Pattern(NamedTuple):
    """What one head looks at: ``a`` and ``b`` as in the module."""

    kind: Literal["a-shape", "vertical-slash", "block-sparse"]
    a: int
    b: int = 0


class MInference(System):
    """Settings: ``patterns``, one for each head, such as :func:`._pattern_search.search` finds, or one for all."""

    slug = "minference"
    title = "MInference 1.0"
    paper = "https://arxiv.org/abs/2407.02490"
    code = "https://github.com/microsoft/MInference"
    promises = Promises(
        causal=False, cross=False, decodes=False, padding=False, unit_rows=True, training_free=True,
        needs_training=False,
    )  # fmt: skip

    def __init__(self, patterns: Sequence[Pattern] = (Pattern("vertical-slash", 1000, 6096),)):
        self.patterns = patterns

    def build(self, heads: int) -> Attention:
        """Causal softmax over what the patterns find. SpecError: not one pattern for each head."""
        if len(self.patterns) not in (1, heads):
            raise SpecError(f"MInference: give one pattern or one for each of {heads} heads; got {len(self.patterns)}")
        return Attention(mask=masks.Causal(), select=Patterns(list(self.patterns) * (heads // len(self.patterns))))

    def claim(self) -> ClaimNumbers:
        """Patterns of the embedded model's heads, found on one page of keys and values, as in the paper."""
        from ...study import prefilling
        from ...worlds import recall
        from ._pattern_search import SHARE, SPACE, search

        seen = prefilling.calls_on(next(recall.recall(2048, "search")).tokens)
        found = [search(c.q, c.k, c.v) for c in seen]
        programs = [MInference(patterns).build(len(patterns)) for patterns in found]
        kinds = [pattern.kind for layer in found for pattern in layer]
        counts = {kind: kinds.count(kind) for kind in dict.fromkeys(p.kind for p in SPACE)}
        speeds = {n: prefilling.speedup(prefilling.calls(n), lambda i: programs[i])[0] for n in (2048, 4096, 8192)}
        dense, ours = prefilling.answers(), prefilling.answers(lambda layer: programs[layer])
        return ClaimNumbers.decide(
            {"speedup": {str(n): round(s, 3) for n, s in speeds.items()}, "heads": counts}
            | {
                "error": round(prefilling.error(seen, lambda i: programs[i]), 4),
                "answers_dense": dense,
                "answers": ours,
            },
            f"Patterns of {SHARE:.0%} of the work at 2048 tokens ({counts}) make attention"
            f" {', '.join(f'{s:.2f} times as fast at {n}' for n, s in speeds.items())} tokens; of the answers at 2048"
            f" {prefilling.mean(ours):.1%} are right (dense {prefilling.mean(dense):.1%}).",
            speedup_grows=all(a < b for a, b in pairwise(speeds.values())),
            faster=max(speeds.values()) > 1,
            answers_held=prefilling.mean(ours) >= prefilling.mean(dense) - LOST,
        )


class Patterns(Select):
    """The keys of each block of 64 queries, by the pattern of each head."""

    def __init__(self, patterns: Sequence[Pattern]):
        super().__init__(BLOCK, 1)
        self.patterns = list(patterns)

    @torch.no_grad()
    def choose(self, q: Tensor, k: Tensor, codes: Tensor) -> Selection:
        visible = (codes > masks.EMPTY).expand(*q.shape[:2], *codes.shape[2:])
        if q.shape[2] != k.shape[2]:
            return listed(visible, self.rows, 1)
        rep = q.shape[1] // k.shape[1]
        keep = [keys_of(q[:, h : h + 1], k[:, h // rep : h // rep + 1], p) for h, p in enumerate(self.patterns)]
        return listed(torch.cat(keep, 1) & visible, self.rows, 1)


def keys_of(q: Tensor, k: Tensor, pattern: Pattern) -> Tensor:
    """Which keys each block of queries of one head may look at, bool ``[B, 1, nq, N]``, the future among them."""
    n, (kind, a, b) = q.shape[2], pattern
    if kind == "block-sparse":
        score = pool(q, BLOCK) @ pool(k, BLOCK).mT
        future = torch.ones(score.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        best = largest(score.masked_fill(future, float("-inf")), a)
        return best.repeat_interleave(BLOCK, -1)[..., :n]
    places = torch.arange(n, device=q.device)
    if kind == "a-shape":
        vertical, slash = ((places < size).expand(len(q), 1, n) for size in (a, b))
    else:
        seen = last_weights(q, k, min(BLOCK, n))
        ranked = [seen.sum(-2), by_distance(seen)]
        for score, forced in zip(ranked, FORCED, strict=True):
            score[..., :forced] = float("inf")
        vertical, slash = (largest(x, max(size, low)) for x, size, low in zip(ranked, (a, b), (30, 50), strict=True))
    # A key at distance x from a block's first query is met at every distance from x to x + BLOCK - 1.
    before = torch.nn.functional.pad(slash.int(), (BLOCK, BLOCK - 1)).cumsum(-1)
    met = before[..., BLOCK:] > before[..., :-BLOCK]
    starts = torch.arange(0, n, BLOCK, device=q.device)[:, None]
    return met[..., (starts - places + BLOCK - 1).clamp(min=0)] | vertical[..., None, :]
