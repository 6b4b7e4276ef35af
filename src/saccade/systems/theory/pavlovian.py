"""Linear attention as conditioning: keys are cues, values what follows them, and a query tests what was associated.

    hebbian          S[t] = trace S[t-1] + k[t] v[t]'                               cue and outcome together
    rescorla-wagner  S[t] = trace S[t-1] + rate k[t] (v[t] - trace S[t-1]' k[t])'   only what was not expected
    out[t] = S[t]' q[t]                                                             q, k of length one

A test with a cue of N random ones of width d gives its outcome, plus the others' by their overlap with it:

    error = E |out - v|² / E |v|² = (N - 1) / d,

so what is remembered with a given error grows as d. If item i of one memory is cue i of the next, and each memory is
read by ``heads`` heads that draw their cues independently, then the answer to the answer, L memories on, has the error

    (1 + (N - 1) / (heads d))^L - 1

(squared, against the part that is right): depth adds it up, width and redundant heads divide it.

Paper: Understanding Transformers through the Lens of Pavlovian Conditioning, arXiv:2508.08289
Code: none

Differs: only the paper's abstracts could be read here (the first version counts O(sqrt(d)) associations without any
error, later ones O(d) on average, and add Rescorla-Wagner's rule and the decaying trace). The formulas for the error
are derived here, for random cues; that of L memories for items that are much wider than a head.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.errors import SpecError
from ...core.linear import LinearAttention, linear_attention
from ...core.linear.features import Feature
from ...nn.backbones import Place
from ..base import ClaimNumbers, LayerSystem, Promises

Rule = Literal["hebbian", "rescorla-wagner"]
CLOSE = 0.1  # measured errors and the exponent of capacity are the predicted ones within this share
DEEP = 0.2  # the same of errors over depth


class UnitLength(Feature):
    """``x / |x|``."""

    def forward(self, x: Tensor, heads: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)


class Pavlovian(LayerSystem):
    """Settings: ``rule``; ``trace``, what is left of an association after a token (1: all)."""

    slug = "pavlovian"
    title = "Linear attention as Pavlovian conditioning"
    paper = "https://arxiv.org/abs/2508.08289"
    promises = Promises(exponent=1.0, nonnegative=False, hosts=())

    def __init__(self, rule: Rule = "hebbian", trace: float = 1.0):
        if rule not in get_args(Rule):
            raise SpecError(f'pavlovian: rule must be "hebbian" or "rescorla-wagner"; got {rule!r}')
        if not 0 < trace <= 1:
            raise SpecError(f"pavlovian: trace is a share above 0 and at most 1; got {trace}")
        self.rule, self.trace = rule, trace

    def layer(self, place: Place) -> LinearAttention:
        """Linear attention with keys of length one, written by the rule."""
        decay = None if self.trace == 1 else math.log(self.trace)
        return LinearAttention(UnitLength(), decay=decay, delta=self.rule == "rescorla-wagner")

    def claim(self) -> ClaimNumbers:
        """Errors of recall against (N - 1) / d, capacity over d, and errors over depth and heads."""
        widths = (16, 32, 64, 128, 256)
        loads = {(d, share): max(2, round(share * d)) for d in widths for share in (0.25, 0.5, 1.0)}
        errors = {case: recall_error(n, case[0]) for case, n in loads.items()}
        off = max(abs(errors[case] * case[0] / (n - 1) - 1) for case, n in loads.items())
        held = {d: capacity(d) for d in widths}
        exponent = math.log(held[256] / held[16]) / math.log(256 / 16)
        corrected = recall_error(32, 64, rule="rescorla-wagner")
        chains = {heads: chain(5, heads) for heads in (1, 2, 4)}
        theory = {heads: predicted(5, heads) for heads in chains}
        drift = max(abs(a / b - 1) for h in chains for a, b in zip(chains[h], theory[h], strict=True))
        return ClaimNumbers.decide(
            {f"error_d{d}_n{n}": round(errors[d, share], 4) for (d, share), n in loads.items()}
            | {"capacity": list(held.values()), "exponent": round(exponent, 3), "largest_misfit": round(off, 3)}
            | {"error_rescorla_wagner": round(corrected, 4), "largest_misfit_of_depth": round(drift, 3)}
            | {f"error_over_depth_heads{h}": [round(x, 4) for x in errors] for h, errors in chains.items()},
            f"Errors of recall are (N - 1) / d within {off:.1%}; what is held with an error of at most 1/2 grows as d"
            f" to the {exponent:.2f} (from {held[16]} in 16 to {held[256]} in 256 dimensions). Over five memories in a"
            f" row the error goes from {chains[1][0]:.3f} to {chains[1][-1]:.3f} with one head, and to"
            f" {chains[4][-1]:.3f} with four, {drift:.0%} off the formula at most. Rescorla and Wagner's rule errs by"
            f" {corrected:.3f} where Hebb's does by {errors[64, 0.5]:.3f}.",
            interference_as_predicted=off <= CLOSE,
            capacity_grows_as_width=abs(exponent - 1) <= CLOSE,
            depth_adds_errors=all(a < b for a, b in pairwise(chains[1])),
            heads_divide_them=chains[1][-1] > chains[2][-1] > chains[4][-1],
            propagation_as_predicted=drift <= DEEP,
            expectation_helps=corrected < errors[64, 0.5],
        )


def recall_error(n: int, width: int, rule: Rule = "hebbian", draws: int = 512, seed: int = 0) -> float:
    """Mean of |out - v|² / |v|² where each of n random cues is tested again after all were associated."""
    source = torch.Generator().manual_seed(seed)
    k, v = (F.normalize(torch.randn(draws, 1, n, width, generator=source), dim=-1) for _ in range(2))
    program = Pavlovian(rule).layer(Place(width, 1, 0, 1, None, None))
    state = linear_attention(k, k, v, program, return_state=True)[1]
    return float((k @ state.S - v).square().sum(-1).mean())


def capacity(width: int, error: float = 0.5) -> int:
    """The most associations that are recalled with at most this error, by bisection."""
    low, high = 1, 4 * width
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if recall_error(middle, width, draws=16) <= error else (low, middle)
    return low


def chain(depth: int, heads: int, n: int = 17, width: int = 64, stream: int = 8192, draws: int = 4) -> list[float]:
    """Squared error of the answer against its right part, after each memory of a chain.

    Items are random directions of the stream; each head of each memory sees them by a random projection of its own.
    """
    source = torch.Generator().manual_seed(1)
    items = F.normalize(torch.randn(depth + 1, n, stream, generator=source), dim=-1)
    test, errors = items[0].expand(draws, -1, -1), []
    program = LinearAttention(causal=False)
    for cue, outcome in pairwise(items):
        eyes = torch.randn(draws, heads, stream, width, generator=source) / math.sqrt(width)
        answer = linear_attention(test[:, None] @ eyes, cue @ eyes, outcome.expand(1, heads, -1, -1), program).mean(1)
        right = (answer * outcome).sum(-1)
        errors.append(float((answer.square().sum(-1) - right**2).mean() / right.mean() ** 2))
        test = F.normalize(answer, dim=-1)
    return errors


def predicted(depth: int, heads: int, n: int = 17, width: int = 64) -> list[float]:
    """What the formula says of the same chain."""
    return [(1 + (n - 1) / (heads * width)) ** memories - 1 for memories in range(1, depth + 1)]
