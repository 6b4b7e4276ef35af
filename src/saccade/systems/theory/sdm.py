"""Sparse distributed memory read as attention: a key counts by the neurons that both it and the query reach.

    distance = n (1 - cos(q, k)) / 2                        the Hamming distance of addresses of n bits
    I(distance) = #{neurons within ``radius`` of both}      the circle intersection
                = sum over i <= radius of C(n, i)
                  - sum over i < distance / 2 of C(2 i, i) C(n - 2 i - 1, radius - i)
    weight = I / sum over keys of I

log I is nearly linear in the distance, so the read is nearly softmax(beta cos(q, k)) with the slope beta of log I over
the cosine (least squares, distances below the radius).

Paper: Attention Approximates Sparse Distributed Memory, arXiv:2111.05498
Code: https://github.com/TrentBrick/attention-approximates-sdm (SDM_Circ_Inter_Funcs.py: expected_intersection_lune;
    Implementations_Associative_Memory.py: fit_beta, and update_using_cache for Cont_Binary_SDM)

Differs: between whole distances log I is interpolated, so that there is a gradient; the official code rounds down (so
here too it vanishes one whole distance after the last at which it does not). Its regression divides a covariance of
Bessel's kind by a variance of the other: its beta is ours times radius / (radius - 1). A query that shares no neuron
with any key reads zeros; there it keeps what it was. There are 2^n neurons: fewer, at random, scale all of I alike.
``n`` is the width of the heads in the paper, here a setting.
"""

from __future__ import annotations

import math
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import masks, normalizers, scores
from ...core.errors import SpecError
from ...core.spec import Attention
from ...core.tile import At
from ..base import ClaimNumbers, Promises, System
from ._circles import fitted_beta, intersections, radius_of, total_variation

LINEAR, APART = 0.99, 0.1  # R² of log I over the cosine; total variation of I's weights and the softmax's
LEAST, MOST = 5 / 64, 15 / 64  # the radii that are best for capacity and against noise, of heads of 64
SHARES = (1e-9, 1e-8, 1e-5, 3.7e-4, 1e-3, 0.1)  # of all addresses that a circle holds, as the paper's figures


class Sdm(System):
    """Settings: ``n``, bits of an address; ``radius`` of the circles, 15 being the paper's critical one; ``causal``."""

    slug = "sdm"
    title = "Sparse distributed memory as attention"
    paper = "https://arxiv.org/abs/2111.05498"
    code = "https://github.com/TrentBrick/attention-approximates-sdm"
    promises = Promises()

    def __init__(self, n: int = 64, radius: int = 15, causal: bool = True):
        if not 0 < radius < n:
            raise SpecError(f"sdm: a circle among addresses of {n} bits has a radius of 1 to {n - 1}; got {radius}")
        self.n, self.radius, self.causal = n, radius, causal

    def build(self, heads: int) -> Attention:
        """The intersection over its sum."""
        mask = masks.Causal() if self.causal else masks.Full()
        return Attention(Cosine(), mask, CircleIntersection(self.n, self.radius))

    def claim(self) -> ClaimNumbers:
        """How near the exponential is over n and radius; and the betas of the embedded model's heads."""
        grid = [(n, radius_of(n, share)) for n in (64, 100, 256, 784) for share in SHARES]
        fits = {(n, radius): fitted_beta(n, radius) for n, radius in grid if radius > 2}
        apart = {case: total_variation(*case, beta) for case, (beta, _) in fits.items()}
        betas, width = head_betas()
        low, high = (fitted_beta(width, round(share * width))[0] for share in (MOST, LEAST))
        inside = ((betas > low) & (betas < high)).double().mean().item()
        worst = min(r2 for _, r2 in fits.values())
        return ClaimNumbers.decide(
            {"least_r2": round(worst, 4), "mean_total_variation": round(fmean(apart.values()), 4)}
            | {f"n{n}_radius{d}": [round(x, 4) for x in (*fits[n, d], apart[n, d])] for n, d in fits}
            | {"model_betas": [[round(x, 2) for x in layer] for layer in betas.tolist()]}
            | {"beta_range": [round(low, 2), round(high, 2)], "heads_inside": round(inside, 3)},
            f"Over {len(fits)} memories of 64 to 784 bits, log I is linear in the cosine with R² of {worst:.4f} or"
            f" more, and the softmax's weights differ by {fmean(apart.values()):.3f} on average (total variation). Of"
            f" the embedded model's heads {inside:.0%} have a beta between {low:.1f} and {high:.1f}, those of the radii"
            " that are best against noise and for capacity.",
            exponential=worst >= LINEAR,
            near_the_softmax=fmean(apart.values()) <= APART,
            most_heads_inside=inside > 0.5,
        )


class Cosine(scores.Form):
    """``q . k / (|q| |k|)``, of tiles: in float32 at least, as rounded cosines would be steps of the distance."""

    def scale(self, width: int) -> None:
        return None

    def tile(self, q: Tensor, k: Tensor) -> Tensor:
        q, k = (F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1) for x in (q, k))
        return q @ k.mT


class CircleIntersection(normalizers.Normalizer):
    """From a row of cosines to ``I / sum of I``; zeros where no key shares a neuron with the query."""

    table: Tensor

    def __init__(self, n: int, radius: int):
        super().__init__()
        self.n = n
        logs = [math.log(count) for count in intersections(n, radius)]
        self.hold("table", torch.tensor([log - logs[0] for log in logs]))

    def forward(self, scores: Tensor, at: At) -> Tensor:
        distance = self.n * (1 - scores.to(self.table.dtype)) / 2
        last = len(self.table) - 1
        apart = ~(distance < last + 1)
        distance = distance.masked_fill(apart, 0).clamp(0, last)
        low = distance.detach().floor().clamp(max=last - 1).long()
        count = torch.lerp(self.table[low], self.table[low + 1], distance - low).exp().masked_fill(apart, 0)
        total = count.sum(-1, keepdim=True)
        return (count / total.masked_fill(total == 0, 1)).to(scores.dtype)


def head_betas(texts: int = 6, length: int = 512) -> tuple[Tensor, int]:
    """Beta of every head ``[layers, heads]`` of the embedded model, and the heads' width.

    As the official analysis infers it: the greatest input of the last query's softmax, a mean over texts.
    """
    from itertools import islice

    from ...hosts.replaced import read
    from ...study.probes import embedded
    from ...worlds.text import text

    model, found = embedded(), []
    for example in islice(text(length, "sdm"), texts):
        layers = read(model, example.tokens[None])
        grouped = [(r.q[0, :, -1:], r.k[0].repeat_interleave(r.q.shape[1] // r.k.shape[1], 0), r.scale) for r in layers]
        found.append(torch.stack([(q @ k.mT).amax((1, 2)) * scale for q, k, scale in grouped]))
    return torch.stack(found).mean(0), layers[0].q.shape[-1]
