"""Cog attention: weights with a sign, so that one head can delete, copy or keep what it looks at.

    w[i, j] = sign(s[i, j]) * softmax(|s[i]|)[j],   s = q . k / sqrt(D)

Paper: More Expressive Attention with Negative Weights, arXiv:2411.07176
Code: https://github.com/trestad/CogAttn (Cogformer/attention.py: CogAttention)

Differs: nothing in the formula. The paper's models keep softmax in their first and last layer; that is a choice of the
model around it: :func:`layered` makes it, and the claim uses it.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...core import masks, normalizers
from ...core.attend import weights
from ...core.spec import Attention
from ..base import ClaimNumbers, Promises, System

if TYPE_CHECKING:
    from ...nn import GPT
    from ...study.trainer import Setup

USED = 0.05  # share of the absolute mass that must be negative
SHORT = 8  # ones in the shortest run


class Cog(System):
    """Settings: ``causal``."""

    slug = "cog"
    title = "Cog attention (negative weights)"
    paper = "https://arxiv.org/abs/2411.07176"
    code = "https://github.com/trestad/CogAttn"
    promises = Promises(unit_size=True, nonnegative=False)

    def __init__(self, causal: bool = True):
        self.causal = causal

    def build(self, heads: int) -> Attention:
        """The signed softmax."""
        mask = masks.Causal() if self.causal else masks.Full()
        return Attention(mask=mask, normalizer=normalizers.Signed())

    def claim(self) -> ClaimNumbers:
        """Small models with and without: loss, use of negative weights, and collapse as the paper measures it."""
        from ...study.trainer import Setup, batches, compare

        setup = Setup()
        result = compare({"softmax": _softmax, "cog": layered}, setup)
        excess = result.excess("cog", "softmax")
        negative = []
        for model in result.models["cog"]:
            tokens = next(batches(setup.validation, setup, 20_000))[:4, :-1]
            for spec, q, k in list(model.inside(tokens))[1:-1]:
                w = weights(q, k, spec)
                negative.append(float(w.clamp(max=0).abs().sum() / w.abs().sum()))
        used = statistics.fmean(negative)
        kept = {name: [_kept(model, setup) for model in models] for name, models in result.models.items()}
        ours, theirs = (statistics.geometric_mean(kept[name]) for name in ("cog", "softmax"))
        return ClaimNumbers.decide(
            result.numbers()
            | {
                "excess_loss": round(excess.mean, 4),
                "excess_error": round(excess.error, 4),
                "negative_mass": round(used, 3),
                "difference_kept_cog": [round(x, 4) for x in kept["cog"]],
                "difference_kept_softmax": [round(x, 4) for x in kept["softmax"]],
            },
            f"{used:.0%} of the absolute mass is negative. Two prompts that differ in one token keep {ours:.2f} of"
            f" their difference as a run of ones grows from {SHORT} to {setup.context} ({theirs:.2f} with softmax)."
            f" Validation loss {excess.mean:+.4f} nats per byte (standard error {excess.error:.4f}) against"
            f" {result.mean('softmax'):.4f} for softmax.",
            negative_weights_used=used > USED,
            less_collapse=ours > theirs,
            loss_at_or_below=excess.mean <= 0,
        )


def _softmax(setup: Setup, layer: int) -> Attention:
    return Attention(mask=masks.Causal())


def layered(setup: Setup, layer: int) -> Attention:
    """The paper's model: softmax in the first and the last layer, Cog attention between them."""
    if layer in (0, setup.layers - 1):
        return _softmax(setup, layer)
    return Cog().build(setup.heads)


def _kept(model: GPT, setup: Setup) -> float:
    """How much of the difference of two prompts' last states is left as a run of ones grows: 1 is all.

    As in the official draw_rep_dif.py: the largest difference within a head's share of the last state, averaged over
    the shares, relative to the shortest run. Geometric mean over longer runs and its two tasks, "count ones" (one more
    or not) and "find a zero" (at the front).
    """

    def apart(one: bytes, other: bytes) -> float:
        with torch.no_grad():
            gap = _last(model, one) - _last(model, other)
        return float(gap.unflatten(-1, (setup.heads, -1)).abs().amax(-1).mean())

    longer = range(setup.context // 4, setup.context, setup.context // 8)
    count = [apart(b"1" * n + b"1", b"1" * n) for n in (SHORT, *longer)]
    search = [apart(b"0" + b"1" * n, b"1" + b"1" * n) for n in (SHORT, *longer)]
    return statistics.geometric_mean(task[i] / task[0] for task in (count, search) for i in range(1, len(task)))


def _last(model: GPT, prompt: bytes) -> Tensor:
    from ...worlds.text import encode

    return model.states(encode(prompt)[None])[0, -1]
