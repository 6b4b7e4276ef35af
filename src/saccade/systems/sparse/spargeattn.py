"""SpargeAttn: blocks whose tokens are alike stand for themselves by their mean; the rest is never skipped.

With K less its mean over all tokens, blocks Q_i of 128 and K_j of 64 tokens, unit(x) = x / |x|:

    alike(X) = |mean(unit(X))| ** 2 > similarity                (the mean cosine of its tokens, each with each)
    p[i] = softmax over the alike K_j of  mean(Q_i) . mean(K_j) / sqrt(D)
    Q_i visits the greatest p[i, j] whose sum is at most mass, one at least; and all K_j if it, or K_j, is not alike

A second filter drops a tile of 32 queries and 64 keys where every score's weight is below 2 ** -skip of the greatest in
its row. :func:`._threshold_tuning.tune` finds similarity and mass for each head: the least work within an error.

Paper: SpargeAttn: Accurate Sparse Attention Accelerating Any Model Inference, arXiv:2502.18137
Code: https://github.com/thu-ml/SpargeAttn (spas_sage_attn/core.py, utils.py: get_block_map_meansim, autotune.py)

Differs: products are exact: ``int8=True`` rounds q and k to 8 bits per block, as the code always does, but brings no
speed here (V is never rounded). ``skip`` compares with a row's greatest weight, the kernel with the greatest so far, so
that it drops less; off by default, as the code's 50 changes no digit of a float32. The first block of keys is kept, as
where the code has tuned, there after and here while tuning, of fewer similarities than its 32, on one text. A block of
queries chooses together, and K's mean is of all tokens: rows depend on later ones. A block with a token that is zero
is judged by the others (NaN there: not alike).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import masks
from ...core.edits import Edit
from ...core.selectors import Select, Selection, pool
from ...core.spec import Attention
from ...core.tile import At
from ..base import ClaimNumbers, Promises, System
from ._int8 import Int8
from ._vertical_slash import largest, listed

ROWS, COLUMNS, WARP = 128, 64, 32
L1 = 0.08  # the paper's bound for its language models
LOST = 0.02  # accuracy that may be lost and still be held
PerHead = float | Sequence[float]


class SpargeAttn(System):
    """Settings: ``similarity`` and ``mass``, of all heads or each; ``sink``: keep the first block; the others above."""

    slug = "spargeattn"
    title = "SpargeAttn"
    paper = "https://arxiv.org/abs/2502.18137"
    code = "https://github.com/thu-ml/SpargeAttn"
    promises = Promises(
        causal=False, decodes=False, padding=False, unit_rows=True, training_free=True, needs_training=False
    )

    def __init__(
        self, similarity: PerHead = 0.6, mass: PerHead = 0.98, skip: float | None = None, sink: bool = True,
        int8: bool = False, causal: bool = True,
    ):  # fmt: skip
        self.similarity, self.mass, self.skip = similarity, mass, skip
        self.sink, self.int8, self.causal = sink, int8, causal

    def promised(self) -> Promises:
        """Without the sink, a query block may visit only keys that its first rows do not see: their weights are 0."""
        return replace(self.promises, unit_rows=self.sink)

    def build(self, heads: int) -> Attention:
        """Softmax over the blocks that are visited."""
        return Attention(
            score=Int8(ROWS, COLUMNS) if self.int8 else None, mask=masks.Causal() if self.causal else masks.Full(),
            select=MeanSim(self.similarity, self.mass, self.sink), edits=[] if self.skip is None else [Skip(self.skip)],
        )  # fmt: skip

    def claim(self) -> ClaimNumbers:
        """Tuned on 2048 bytes of prose: error on others, speed at 8192, and answers of the embedded model."""
        from ...study import prefilling
        from ._threshold_tuning import tune

        tuned = [tune(c.q, c.k, c.v) for c in prefilling.calls(2048)]
        programs = [SpargeAttn(*pair).build(len(pair[0])) for pair in tuned]
        other = prefilling.calls(2048, start=50_000)
        error = prefilling.error(other, lambda layer: programs[layer])
        faster, computed = prefilling.speedup(prefilling.calls(8192), lambda layer: programs[layer])
        dense, ours = prefilling.answers(), prefilling.answers(lambda layer: programs[layer])
        return ClaimNumbers.decide(
            {"error": round(error, 4), "speedup_8192": round(faster, 3), "computed_8192": round(computed, 4)}
            | {"answers_dense": dense, "answers": ours},
            f"Tuned to a relative L1 error of {L1} on one text, it has {error:.3f} on another; attention over 8192"
            f" tokens is {faster:.2f} times as fast as dense, computing {computed:.0%} of it; of the answers at 2048"
            f" {prefilling.mean(ours):.1%} are right (dense {prefilling.mean(dense):.1%}).",
            error_within_the_bound=error <= L1,
            faster=faster > 1,
            answers_held=prefilling.mean(ours) >= prefilling.mean(dense) - LOST,
        )


class MeanSim(Select):
    """The first filter: see the module."""

    similarity: Tensor
    mass: Tensor

    def __init__(self, similarity: PerHead, mass: PerHead, sink: bool):
        super().__init__(ROWS, COLUMNS)
        self.hold("similarity", torch.as_tensor(similarity).reshape(-1, 1))
        self.hold("mass", torch.as_tensor(mass).reshape(-1, 1, 1))
        self.sink = sink

    @torch.no_grad()
    def choose(self, q: Tensor, k: Tensor, codes: Tensor) -> Selection:
        k = (k - k.mean(-2, keepdim=True)).repeat_interleave(q.shape[1] // k.shape[1], 1)
        alike_q, alike_k = self._alike(q, ROWS)[..., None], self._alike(k, COLUMNS)[..., None, :]
        visible = codes > masks.EMPTY
        score = pool(q, ROWS) @ pool(k, COLUMNS).mT * q.shape[-1] ** -0.5
        share = score.masked_fill(~(alike_k & visible), -torch.inf).softmax(-1, dtype=torch.float32).nan_to_num(0)
        count = (share.sort(-1, descending=True).values.cumsum(-1) <= self.mass).sum(-1, keepdim=True)
        keep = (largest(share, count.clamp(min=1)) | ~alike_k | ~alike_q) & visible
        if self.sink:
            keep[..., 0] = visible[..., 0]
        return listed(keep, ROWS, COLUMNS)

    def _alike(self, x: Tensor, size: int) -> Tensor:
        """Bool ``[B, H, blocks]``."""
        return pool(F.normalize(x.float(), dim=-1), size).square().sum(-1) > self.similarity


class Skip(Edit):
    """The second filter: see the module."""

    def __init__(self, skip: float):
        super().__init__()
        self.skip = skip

    def forward(self, weights: Tensor, at: At, visible: Tensor | None) -> Tensor:
        n, m = weights.shape[-2:]
        large = weights.detach() > 2**-self.skip * weights.detach().amax(-1, keepdim=True)
        tiles = F.pad(large, (0, -m % COLUMNS, 0, -n % WARP)).unflatten(-1, (-1, COLUMNS)).unflatten(-3, (-1, WARP))
        kept = tiles.any(-1).any(-2).repeat_interleave(WARP, -2).repeat_interleave(COLUMNS, -1)[..., :n, :m]
        left = weights.masked_fill(~kept, 0)
        return left / left.sum(-1, keepdim=True).clamp(min=torch.finfo(left.dtype).tiny)
