"""Attention as a marginal probability: which key a query is linked to is unknown, and values are averaged over it.

    p(link[i] = j | q, k) = p(j) f(q[i], k[j]) / sum over keys of the same,     f = exp(q . k / sqrt(D))
    out[i] = E v[link[i]] = sum over j of p(link[i] = j | q, k) v[j]

    case         what is assumed                                        the program
    soft         any key alike before the data: p(j) the same           softmax
    hard         the likeliest link alone                               the best key (sampled: soft in the mean)
    positional   near keys likelier: p(j) ~ exp(-slope |i - j|)         softmax with the log of the prior added (ALiBi)
    slot         each key links to one query: sum over i of p = 1,      softmax of scores less the log of their sum over
                 and a query averages over the keys linked to it        queries

Paper: Attention: Marginal Probability is All You Need?, arXiv:2304.04556
Code: none

Differs: written from the paper's abstract and its well-known special cases; what it says of predictive coding and of
iterating is not here. ``hard`` is the mode of the posterior, as the temperature goes to 0. ``positional`` takes ALiBi's
prior: any positional bias is a prior, normalised or not. ``slot`` is one step of slot attention without its learned
updates.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from ...core import masks, normalizers, scores
from ...core.attend import attention, weights
from ...core.errors import SpecError
from ...core.spec import Attention
from ..base import ClaimNumbers, Promises, System

Case = Literal["soft", "hard", "positional", "slot"]
EQUAL = 1e-9  # greatest difference from the enumerated posterior, in float64
DRAWS = 4000


class BayesianAttention(System):
    """Settings: ``case``; ``causal`` (not of slots: later queries compete for earlier keys)."""

    slug = "bayesian-attention"
    title = "Attention as a marginal over links"
    paper = "https://arxiv.org/abs/2304.04556"
    promises = Promises(unit_rows=True)

    def __init__(self, case: Case = "soft", causal: bool = True):
        if case not in get_args(Case):
            raise SpecError(f"bayesian-attention: case must be one of {', '.join(get_args(Case))}; got {case!r}")
        self.case, self.causal = case, causal

    def promised(self) -> Promises:
        """Causal as set; of slots nothing that adds queries holds."""
        alone = self.case != "slot"
        return replace(self.promises, causal=self.causal and alone, decodes=alone, padding=alone)

    def build(self, heads: int) -> Attention:
        """The program of the case."""
        mask = masks.Causal() if self.causal and self.case != "slot" else masks.Full()
        if self.case == "hard":
            return Attention(mask=mask, normalizer=normalizers.TopKSoftmax(1))
        return Attention({"positional": scores.ALiBi(), "slot": Competing()}.get(self.case), mask)

    def claim(self) -> ClaimNumbers:
        """Each program's weights against the posterior by enumeration, and sampled links against the soft ones."""
        source = torch.Generator().manual_seed(0)
        q, k, v = torch.randn(3, 2, 4, 40, 16, generator=source, dtype=torch.float64)
        off = {}
        for case in get_args(Case):
            spec = BayesianAttention(case, causal=False).build(4)
            off[case] = float((weights(q, k, spec) - posterior(q, k, case)).abs().max())
        soft = BayesianAttention("soft", causal=False).build(4)
        p, exact = posterior(q, k, "soft"), attention(q, k, v, soft)
        links = torch.multinomial(p.flatten(0, 2), DRAWS, replacement=True, generator=source).unflatten(0, p.shape[:3])
        sampled = v.gather(2, links.flatten(2)[..., None].expand(-1, -1, -1, 16)).unflatten(2, links.shape[2:])
        error = (sampled.mean(3) - exact) / (sampled.std(3) / DRAWS**0.5)
        spread = float(error.square().mean().sqrt())
        return ClaimNumbers.decide(
            {f"difference_{case}": value for case, value in off.items()} | {"sampling_z": round(spread, 3)},
            f"The weights of all four cases are the enumerated posterior within {max(off.values()):.0e}; the mean of"
            f" {DRAWS} sampled links differs from soft attention by {spread:.2f} standard errors (root mean square).",
            equal=max(off.values()) <= EQUAL,
            sampling_is_soft_in_the_mean=0.9 < spread < 1.1,
        )


class Competing(scores.Form):
    """``q . k / sqrt(D) - log sum over all queries of exp(q . k / sqrt(D))``, which softmax makes slot attention of."""

    def prepare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Keys carry that sum as more coordinates, one for each query head that shares them; a query reads its own."""
        share = q.shape[1] // k.shape[1]
        q = q.unflatten(1, (k.shape[1], share)) * q.shape[-1] ** -0.5  # [B, Hkv, share, N, D]
        known = k.masked_fill(k.isnan().any(-1, keepdim=True), 0)  # padding may hold NaN: it reaches no gradient here
        claimed = (known[:, :, None] @ q.mT).logsumexp(-1)  # [B, Hkv, share, M]
        own = torch.eye(share, dtype=q.dtype, device=q.device)[:, None].expand(*q.shape[:-1], share)
        return torch.cat([q, own], -1).flatten(1, 2), torch.cat([k, -claimed.mT], -1)

    def scale(self, width: int) -> float:
        return 1.0


def posterior(q: Tensor, k: Tensor, case: Case) -> Tensor:
    """The weights ``[B, H, N, M]`` by Bayes' rule, every link enumerated: prior times likelihood, over the evidence."""
    n, m = q.shape[2], k.shape[2]
    likelihood = torch.einsum("bhid,bhjd->bhij", q, k / q.shape[-1] ** 0.5).exp()
    prior = torch.full((1, 1, n, m), 1 / m, dtype=q.dtype)
    if case == "positional":
        slopes = torch.tensor([2.0 ** (-8 * (h + 1) / q.shape[1]) for h in range(q.shape[1])], dtype=q.dtype)
        away = (torch.arange(n)[:, None] + (m - n) - torch.arange(m)).abs()
        prior = torch.exp(-slopes[:, None, None] * away)[None]
        prior = prior / prior.sum(-1, keepdim=True)
    joint = prior * likelihood
    if case == "hard":
        return (joint == joint.amax(-1, keepdim=True)).to(q.dtype)
    if case == "slot":
        linked = joint / joint.sum(-2, keepdim=True)  # of each key, over the queries
        return linked / linked.sum(-1, keepdim=True)
    return joint / joint.sum(-1, keepdim=True)
