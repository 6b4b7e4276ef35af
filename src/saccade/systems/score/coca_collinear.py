"""Collinear constrained attention: a key is the query itself, scaled by a factor per pair, turned by its distance.

    t[n] = relu(mean of the two halves of x[n] Wt)                one factor per pair of dimensions
    score(m, n) = sum over pairs of t[n] |q[m]|² cos((m - n) speed) / sqrt(D)

With rotary positions a query and a key start at any angle, so that a near key may score less than a far one, and
distances never trained on bring angles never seen; here the angle at distance 0 is 0, where each pair scores highest.

Paper: Cure the headache of Transformers via Collinear Constrained Attention, arXiv:2309.08646
Code: https://github.com/codefuse-ai/Collinear-Constrained-Attention (model/llama/modeling_llama.py: LlamaAttention,
    and model/gpt_neox/modeling_gpt_neox.py)

Differs: nothing with ``official=True``. The default is the score that the paper derives, which the code's contraction
``q * turned q * turned t`` is not: turning and product with q do not commute (:class:`saccade.nn.positions.Collinear`).
"""

from __future__ import annotations

import math
import statistics
from itertools import islice

import torch
from torch import nn

from ...core import masks
from ...core.spec import Attention
from ...nn import MultiHead
from ...nn.backbones import Place
from ...nn.positions import Collinear
from ..base import ClaimNumbers, LayerSystem, Promises
from ._projections import contest

LONGER = 16  # times the length of the training
STEADY = 1.1  # by what the perplexity may grow there; rotary positions "fail" if theirs grows by more


class CoCA(LayerSystem):
    """Settings: ``base`` of the speeds; ``official``, as the authors' code computes it.

    The layer brings its own positions; those of the backbone are left aside.
    """

    slug = "coca-collinear"
    title = "Collinear constrained attention (CoCA)"
    paper = "https://arxiv.org/abs/2309.08646"
    code = "https://github.com/codefuse-ai/Collinear-Constrained-Attention"
    promises = Promises(unit_rows=True, hosts=())

    def __init__(self, base: float = 10_000.0, official: bool = False):
        self.base, self.official = base, official

    def layer(self, place: Place) -> nn.Module:
        """Multi-head attention whose keys are factors of the queries."""
        positions = Collinear(self.base, self.official)
        return MultiHead(Attention(mask=masks.Causal()), place.width, place.heads, positions=positions)

    def claim(self) -> ClaimNumbers:
        """Small language models of 64 bytes of context, read on 1024 bytes: CoCA's perplexity and RoPE's."""
        from ...study.trainer import Setup, next_token
        from ...worlds.text import text

        setup = Setup(steps=150, context=64)
        result = contest({"rope": None, "coca": self, "official": CoCA(official=True)}, setup)
        perplexity: dict[str, dict[int, list[float]]] = {name: {} for name in result.models}
        for times in (1, 4, LONGER):
            stream = text(setup.context * times + 1, 20_000, source=setup.validation)
            tokens = torch.stack([example.tokens for example in islice(stream, 64 // times)])
            for name, models in result.models.items():
                with torch.no_grad():
                    perplexity[name][times] = [math.exp(float(next_token(model, tokens))) for model in models]
        mean = {name: {n: statistics.fmean(p) for n, p in found.items()} for name, found in perplexity.items()}
        growth = {name: found[LONGER] / found[1] for name, found in mean.items()}
        return ClaimNumbers.decide(
            result.numbers()
            | {f"perplexity_{name}_{n}x": round(p, 3) for name, found in mean.items() for n, p in found.items()},
            f"From {setup.context} to {LONGER * setup.context} bytes, the perplexity per byte of a model of"
            f" {setup.context} grows by {growth['coca'] - 1:+.1%} with the paper's score ({mean['coca'][1]:.2f} to"
            f" {mean['coca'][LONGER]:.2f}), by {growth['official'] - 1:+.1%} with the code's and by"
            f" {growth['rope'] - 1:+.1%} with rotary positions ({mean['rope'][1]:.2f} to {mean['rope'][LONGER]:.2f}).",
            coca_extrapolates=growth["coca"] <= STEADY,
            rope_fails=growth["rope"] > STEADY,
        )
