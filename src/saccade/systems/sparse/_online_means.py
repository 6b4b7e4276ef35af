"""Online k-means: for each head, means that move towards the vectors that are nearest to them, call by call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-5


class OnlineMeans(nn.Module):
    """Moving averages, by cluster, of the sum of its vectors over their number, smoothed as in the official code.

    ``means`` ``[H, count, D]`` are drawn at the first call: normal, then normalized, as the vectors are.

    Args:
        count: clusters of each head.
        decay: what remains of the averages at each step.
    """

    means: Tensor | None
    sums: Tensor | None
    counts: Tensor | None

    def __init__(self, count: int, decay: float):
        super().__init__()
        self.count, self.decay = count, decay
        for name in ("means", "sums", "counts"):
            self.register_buffer(name, None)

    def of(self, x: Tensor) -> Tensor:
        """The means, in the dtype of the vectors ``[B, H, N, D]``."""
        if self.means is None:
            drawn = torch.randn(x.shape[1], self.count, x.shape[-1], generator=torch.Generator().manual_seed(0))
            self.means = F.layer_norm(drawn, drawn.shape[-1:], eps=1e-6).to(x.device)
            self.sums, self.counts = self.means.clone(), self.means.new_zeros(self.means.shape[:2])
        return self.means.to(x)

    def move(self, x: Tensor) -> None:
        """One step with normalized vectors ``[B, H, N, D]``."""
        means = self.of(x)
        assert self.sums is not None and self.counts is not None
        hot = F.one_hot((x @ means.mT).argmax(-1), self.count).to(means)
        self.counts = self.decay * self.counts + (1 - self.decay) * hot.sum((0, 2))
        self.sums = self.decay * self.sums + (1 - self.decay) * torch.einsum("bhnc,bhnd->hcd", hot, x.to(means))
        total = self.counts.sum(-1, keepdim=True)
        smooth = (self.counts + EPSILON) / (total + self.count * EPSILON) * total
        self.means = self.sums / smooth[..., None]
