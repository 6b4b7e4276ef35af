"""Adaptively sparse attention: alpha-entmax instead of softmax, with an alpha that every head learns.

    w[i] = argmax over p in the simplex of  p . s[i] + H_alpha(p)
         = relu((alpha - 1) s[i] - tau[i]) ** (1 / (alpha - 1)),   tau[i] such that the row sums to one
    alpha[h] = 1 + sigmoid(a[h])

Between softmax (alpha 1) and sparsemax (alpha 2): low scores get exactly zero weight, and each head learns how low.

Paper: Adaptively Sparse Transformers, arXiv:1909.00015
Code: https://github.com/deep-spin/entmax (entmax/root_finding.py: entmax_bisect, with the gradient for alpha)

Differs: the threshold tau is found by Newton's method to the precision of the scores, not by 50 halvings, and its
gradient follows from one more Newton step instead of a formula written out. ``a`` starts as in the paper, at random
(the authors draw it from a standard normal); they also keep alpha at 1.01 or above, which is not needed here: in
float64 the weights agree with bisection to 1e-12 at alpha = 1.0001.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...core import masks, normalizers
from ...core.attend import weights
from ...core.spec import Attention
from ..base import ClaimNumbers, Promises, System

EXACT = 1e-10  # largest difference to bisection in float64
APART = 0.02  # standard deviation of the learned alphas over the heads
ZEROS = 0.1  # share of the visible places that get exactly nothing
COST = 0.01  # share by which the loss may exceed softmax's


class AlphaEntmax(System):
    """Settings: ``alpha``, ``start`` and ``causal``.

    ``alpha`` is one number for all heads, or ``None``: every head learns its own, from ``a = start``, or from a random
    ``a`` as in the paper if ``start`` is ``None``.
    """

    slug = "alpha-entmax"
    title = "Adaptively sparse attention (alpha-entmax)"
    paper = "https://arxiv.org/abs/1909.00015"
    code = "https://github.com/deep-spin/entmax"
    promises = Promises(unit_rows=True)

    def __init__(self, alpha: float | None = None, start: float | None = None, causal: bool = True):
        self.alpha, self.start, self.causal = alpha, start, causal

    def build(self, heads: int) -> Attention:
        """Entmax with a fixed alpha, or with one learned shape per head."""
        normalizer: normalizers.Entmax
        if self.alpha is not None:
            normalizer = normalizers.Entmax(self.alpha)
        else:
            normalizer = normalizers.LearnedEntmax(heads)
            shape = normalizer.get_parameter("alpha")
            if self.start is None:
                nn.init.normal_(shape)
            else:
                nn.init.constant_(shape, self.start)
        return Attention(mask=masks.Causal() if self.causal else masks.Full(), normalizer=normalizer)

    def claim(self) -> ClaimNumbers:
        """Exactness against bisection; then a small model whose heads all start at alpha 1.5, against softmax."""
        from ...study.trainer import Setup, batches, compare

        worst = max(_against_bisection(alpha) for alpha in (1.1, 1.25, 1.5, 1.75, 2.0))
        setup = Setup(seeds=(0, 1))
        result = compare(
            {
                "softmax": lambda setup, layer: Attention(mask=masks.Causal()),
                "entmax": lambda setup, layer: AlphaEntmax(start=0.0).build(setup.heads),
            },
            setup,
        )
        excess = result.excess("entmax", "softmax")
        alphas, zeros = [], []
        for model in result.models["entmax"]:
            tokens = next(batches(setup.validation, setup, 20_000))[:, :-1]
            visible = torch.ones(tokens.shape[1], tokens.shape[1]).tril().bool()
            for spec, q, k in model.inside(tokens):
                alphas.append(1 + torch.sigmoid(spec.normalizer.get_parameter("alpha").detach()))
                zeros.append((weights(q, k, spec)[..., visible] == 0).double().mean())
        learned, empty = torch.cat(alphas), float(torch.stack(zeros).mean())
        spread = float(learned.std())
        return ClaimNumbers.decide(
            result.numbers()
            | {
                "difference_to_bisection": worst,
                "alpha_least": round(float(learned.min()), 3),
                "alpha_greatest": round(float(learned.max()), 3),
                "alpha_spread": round(spread, 4),
                "exact_zeros": round(empty, 3),
                "excess_loss": round(excess.mean, 4),
                "excess_error": round(excess.error, 4),
            },
            f"Differs from bisection by {worst:.0e}. Alphas that all began at 1.5 end between {learned.min():.2f} and"
            f" {learned.max():.2f} (standard deviation {spread:.3f}); {empty:.0%} of the visible weights are exactly"
            f" zero; validation loss {excess.mean:+.4f} nats per byte (standard error {excess.error:.4f}) against"
            f" {result.mean('softmax'):.4f} for softmax.",
            exact=worst < EXACT,
            alphas_differ_between_heads=spread > APART,
            exact_zeros=empty > ZEROS,
            no_cost_in_loss=excess.mean <= COST * result.mean("softmax"),
        )


def _against_bisection(alpha: float) -> float:
    """Largest difference of the weights to a bisection of 100 halvings, float64."""
    q, k = torch.randn(2, 1, 2, 256, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind(0)
    z = (alpha - 1) * (q @ k.mT) / q.shape[-1] ** 0.5

    def row(tau: Tensor) -> Tensor:
        return (z - tau).clamp(min=0) ** (1 / (alpha - 1))

    tau, width = z.amax(-1, keepdim=True) - 1, 1.0
    for _ in range(100):
        width /= 2
        tau = torch.where(row(tau + width).sum(-1, keepdim=True) >= 1, tau + width, tau)
    return float((weights(q, k, AlphaEntmax(alpha, causal=False).build(2)) - row(tau)).abs().max())
