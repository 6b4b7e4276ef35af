"""The gated perceptron of arXiv:2002.05202: in the place of a projection, or of a whole layer of attention."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, width: int, inner: int, out: int):
        super().__init__()
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., width]`` to ``[..., out]``."""
        return self.down(F.silu(self.gate(x)) * self.up(x))
