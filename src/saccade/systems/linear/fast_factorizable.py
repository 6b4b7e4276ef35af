"""FAST: a polynomial in place of the exponential, so that attention to all is a few moments of keys and values.

    s[i, j] = q[i] . k[j] / (|q[i]| |k[j]|)
    w[i, j] = f(s[i, j]) / sum over j of f(s[i, j]),   f(s) = 1 + s (degree 1) or 1 + s + s² / 2 (degree 2)

``f(s)`` is a dot product of features, 1 with the coordinates and their products in pairs; what they sum up to over the
keys (``sum of v``, ``of k v'``, ``of k k' v``) takes the place of the keys. Nothing is left out or drawn at random: the
weights are these, at a cost of N times ``D ** (degree + 1)``. Because ``|s| <= 1`` none is negative, and with degree 2
none is more than five times as large as another of its row.

Paper: FAST: Factorizable Attention for Speeding up Transformers, arXiv:2402.07901
Code: https://github.com/armingerami/fastmax (fastmax_cuda_forward.cu, ``normalize=True, lim=1``);
    https://github.com/ryansynk/fastmax-experiments (attention_mechanisms/fastmax.py)

Differs: each query and each key is divided by its own norm. The first of these codes divides all by the greatest norm
among the tokens, later ones included, so that nothing could be decoded; earlier versions also subtract each vector's
mean, and the second divides ``q . k`` by ``8 sqrt(D)`` instead. Products of two coordinates are held once, not twice.
There is no dropout of the features. The CUDA code's other coefficients (1, 7/6, 7/48 for ``lim=2``) are not here.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import SpecError
from ...core.linear import LinearAttention, features, linear_attention
from ...nn.backbones import Place
from ..base import ClaimNumbers, LayerSystem, Promises

EXACT = 1e-5  # greatest difference from the dense definition, float32, of the greatest value
LINEAR = 1.15  # time grows at most as N to this power ("O(N)", and what a shared machine adds)
LENGTHS = 2048, 16384
SHAPE = (1, 8, 16)  # batch, heads, width of a head


class Fast(LayerSystem):
    """Settings: ``degree`` of the polynomial, 1 or 2; ``causal``."""

    slug = "fast-factorizable"
    title = "FAST (factorizable attention, Fastmax)"
    paper = "https://arxiv.org/abs/2402.07901"
    code = "https://github.com/armingerami/fastmax"
    promises = Promises(cross=False, exponent=1.0, unit_rows=True, hosts=())

    def __init__(self, degree: int = 2, causal: bool = True):
        self.degree, self.causal = degree, causal

    def promised(self) -> Promises:
        """Causal as set, and then it decodes; else it takes keys of another sequence."""
        return replace(self.promises, causal=self.causal, decodes=self.causal, cross=not self.causal)

    def program(self) -> LinearAttention:
        """Attention with the polynomial's features."""
        return LinearAttention(Polynomial(self.degree), normalize=True, causal=self.causal, eps=1e-12)

    def layer(self, place: Place) -> nn.Module:
        """The program."""
        return self.program()

    def claim(self) -> ClaimNumbers:
        """Distance from the dense definition, both degrees, causal and not, both ways; and how time grows."""
        gaps = {
            f"degree {degree}, {'causal' if causal else 'full'}": gap(Fast(degree, causal))
            for degree in (1, 2)
            for causal in (True, False)
        }
        growth = {degree: _growth(Fast(degree)) for degree in (1, 2)}
        return ClaimNumbers.decide(
            {f"difference {name}": float(f"{x:.2g}") for name, x in gaps.items()}
            | {f"exponent degree {degree}": round(x, 3) for degree, x in growth.items()},
            f"Outputs and gradients differ from those of the dense definition by at most {max(gaps.values()):.1e} of"
            f" the greatest value. From {LENGTHS[0]} to {LENGTHS[1]} tokens time grows as N^{growth[1]:.2f} (degree 1)"
            f" and N^{growth[2]:.2f} (degree 2).",
            exact=max(gaps.values()) <= EXACT,
            linear=max(growth.values()) <= LINEAR,
        )


class Polynomial(features.Taylor2):
    """Of unit vectors: features whose product is ``1 + s`` (F = 1 + D), or ``1 + s + s² / 2`` as Taylor2's.

    Raises: SpecError for another degree.
    """

    def __init__(self, degree: int):
        super().__init__()
        if degree not in (1, 2):
            raise SpecError(f"FAST has polynomials of degree 1 and 2; got {degree}")
        self.degree = degree

    def forward(self, x: Tensor, heads: Tensor) -> Tensor:
        x = F.normalize(x, dim=-1)
        if self.degree == 1:
            return torch.cat([torch.ones_like(x[..., :1]), x], -1)
        return super().forward(x * x.shape[-1] ** 0.25, heads)  # which divides products by sqrt(D)


def dense(q: Tensor, k: Tensor, v: Tensor, degree: int, causal: bool) -> Tensor:
    """The definition, with all pairs: ``[B, H, N, Dv]``."""
    s = F.cosine_similarity(q[..., :, None, :], k[..., None, :, :], dim=-1)
    w = 1 + s + (s * s / 2 if degree == 2 else 0)
    w = w.tril() if causal else w
    return (w / w.sum(-1, keepdim=True)) @ v


def gap(system: Fast, tokens: int = 300) -> float:
    """Greatest difference from the definition, of the output and the gradients, of the greatest value of each."""
    batch, heads, width = SHAPE
    q, k, v, weight = torch.randn(4, batch, heads, tokens, width, generator=torch.Generator().manual_seed(0)).unbind()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    outs = [linear_attention(q, k, v, system.program()), dense(q, k, v, system.degree, system.causal)]
    ours, wanted = ([out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)] for out in outs)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, wanted, strict=True))


@torch.no_grad()
def _growth(system: Fast) -> float:
    """Exponent with which time grows between the two lengths."""
    from ...study.claims import interleaved

    work = {}
    for n in LENGTHS:
        q, k, v = torch.randn(3, SHAPE[0], SHAPE[1], n, SHAPE[2], generator=torch.Generator().manual_seed(0)).unbind()
        work[str(n)] = partial(linear_attention, q, k, v, system.program())
    short, long = map(str, LENGTHS)
    return math.log(interleaved(work, 7).ratio(long, short)) / math.log(LENGTHS[1] / LENGTHS[0])
