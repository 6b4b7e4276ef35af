"""What the systems around lightning attention share: decays, the norm of the merged heads, and how pace is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.scores import ALiBi

EVEN = 0.1  # "constant" (the catalogue's words: within 10 %): every pace this near to one in their middle


def log_decays(heads: int, layer: int | None = None, layers: int = 1) -> Tensor:
    """Log-decays ``[H]``: ALiBi's slopes, negative; of a given layer times ``1 - layer / (layers - 1) + 1e-5``.

    So each layer remembers longer than the one before, the last nearly for ever. (The official code; with one layer,
    where it would divide by zero, the factor is that of the first.)
    """
    slopes = ALiBi.geometric(heads)
    return -slopes if layer is None else -slopes * (1 - layer / max(layers - 1, 1) + 1e-5)


class SimpleRMSNorm(nn.Module):
    """``x / rms(x)`` without a weight (arXiv:2307.14995, section 3.1.4)."""

    def forward(self, x: Tensor) -> Tensor:
        """The same shape; the root mean square is taken in float32 at least."""
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(exact, x.shape[-1:], eps=1e-6).to(x.dtype)


def both_ways(forward: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Callable[[], Any]:
    """Forward and the gradients of all leaves, as work to be timed."""
    return lambda: torch.autograd.grad(forward().sum(), leaves)


def paces(work: Callable[[int], Callable[[], Any]], lengths: Sequence[int], rounds: int = 5) -> dict[int, float]:
    """Tokens per second at each length relative to the first one, of work on equally many tokens."""
    from ...study.claims import interleaved

    times = interleaved({str(n): work(n) for n in lengths}, rounds)
    return {n: round(times.ratio(str(lengths[0]), str(n)), 3) for n in lengths}


def even(found: dict[int, float]) -> bool:
    """Do all paces lie within :data:`EVEN` of one between them?"""
    return max(found.values()) / min(found.values()) <= (1 + EVEN) / (1 - EVEN)


def said(found: dict[int, float]) -> str:
    """Paces in words."""
    return ", ".join(f"{pace:.2f} at {n}" for n, pace in found.items())
