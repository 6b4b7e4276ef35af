"""Log-normal attention's features, matched to softmax's moments, and how the weights are distributed that they give.

far[i, j] = sum over d of exp(alpha q[i, d]) exp(beta k[j, d]),  over its sum over j
sigma²    = (std(q)² std(k)² - B) / (2 A),   alpha = sigma / std(q),   beta = sigma / std(k)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.linear import LinearAttention, features, linear_weights

A, B = 0.14855178144710912, -0.35487039130661086  # the official fit
MOST = 60.0  # exponent of a key: float32 ends at 88


def program(causal: bool) -> LinearAttention:
    """Linear attention with exponential features, of queries and keys that :func:`factors` has scaled."""
    return LinearAttention(features.Pair(_queries, _keys), normalize=True, causal=causal, eps=1e-8)


def factors(spread: Tensor) -> Tensor:
    """``alpha`` and ``beta`` ``[2]`` for the standard deviations of queries and keys ``[2]``."""
    return ((spread.prod() ** 2 - B) / (2 * A)).sqrt() / spread


def _queries(q: Tensor) -> Tensor:
    return (q - q.amax(-1, keepdim=True)).exp()  # the greatest cancels in the quotient


def _keys(k: Tensor) -> Tensor:
    return k.clamp(max=MOST).exp()


@torch.no_grad()
def shapes(spread: float, tokens: int = 512, width: int = 64) -> dict[str, dict[str, float]]:
    """Weights over normal queries and keys: of softmax, of these features as matched, and with alpha = beta = 1."""
    from ...study.probes import shape_of_weights

    q, k = spread * torch.randn(2, 1, 4, tokens, width, generator=torch.Generator().manual_seed(0))
    alpha, beta = factors(torch.stack([q.std(), k.std()]))
    weights = {
        "softmax": (q @ k.mT * width**-0.5).softmax(-1),
        "matched": linear_weights(alpha * q, beta * k, program(causal=False)),
        "unmatched": linear_weights(q, k, program(causal=False)),
    }
    return {name: shape_of_weights(w) for name, w in weights.items()}
