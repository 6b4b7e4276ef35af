"""The mean of a stream up to each of its tokens, kept while it goes on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...nn import KVCache


@dataclass
class MeanCache(KVCache):
    """Keys, values, and the sum of what the layer was given so far ``[B, 1, width]``."""

    total: Tensor | float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of all three."""
        return super().nbytes + (self.total.nbytes if isinstance(self.total, Tensor) else 0)

    def means(self, x: Tensor) -> Tensor:
        """Of the tokens before and those up to each of ``x [B, N, width]``, whose keys are not yet held."""
        sums = x.to(torch.promote_types(x.dtype, torch.float32)).cumsum(1) + self.total
        count = torch.arange(self.length + 1, self.length + 1 + x.shape[1], device=x.device)
        self.total = sums[:, -1:]
        return (sums / count[:, None]).to(x.dtype)
