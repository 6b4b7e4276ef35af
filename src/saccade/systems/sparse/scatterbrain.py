"""Scatterbrain: exact attention to the keys that hashing finds, random features for all the others.

    phi(x)   = exp(+-W x' - |x'|^2 / 2) / sqrt(F),  x' = x sqrt(scale),   so that E phi(q) . phi(k) = exp(scale q . k)
    clusters : in each round, queries and keys sorted by a random projection and cut into equally many runs; before it
               both are lengthened to one norm, so that near means a large product (XBOX+)
    S        = pairs that share a cluster in some round; or, with ``local``, a window around the query
    w[i, j]  = exp(scale q[i] . k[j]) on S, phi(q[i]) . phi(k[j]) elsewhere, divided by their sum over the row
    out      = attention on S, and phi(Q) (phi(K)^T V) less what it says on S, weighted by the sums of their terms

Paper: Scatterbrain: Unifying Sparse and Low-rank Attention Approximation, arXiv:2110.15343
Code: https://github.com/HazyResearch/fly (src/models/attention/sbsmyrf_attention.py, sblocal_attention.py,
    feature_maps_sb.py, hash_utils.py); 2 rounds, clusters and features of 32 are those of its Long Range Arena

This is a function of exact calls of the engine and of one linear pass, and not one program, for a program would visit
every pair. ``apply`` puts it in place of a model's attention for whole prompts. A cluster depends on all tokens, later
ones among them, so it is no causal function of the text, though a causal call reads no later value.

Differs: a pair found in two rounds is hidden in the second (official: halved in both, the same sum). Projections and
features are drawn once, from a seed (official: projections anew in each call). Padding is last in the sort order of
queries too (official: only where there are as many queries as keys). Calls with a cache that is not empty, or with
padding, run exact. Dropout and the stabilizer ``softmax_eps`` (0 by default) are left out. Grouped keys are repeated.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...core.attend import attention
from ...core.errors import SpecError
from ...core.normalizers import Identity
from ...core.scores import Dot
from ...core.spec import Attention
from ...hosts.replaced import read
from ..base import ClaimNumbers, MethodSystem, Promises
from ._clusters import Pairs, clusters, near
from ._features import exponential, linear, orthogonal
from ._merged import Found, exact, merge_sums
from ._temperatures import BETAS, FACTORS, Cases, errors, points, tempered
from ._whole_prompts import on_whole_prompts

SHARE = 32  # of the claim: the budget is this part of a row, as in the paper's vision models
BETTER = 2.1  # times the error of the better of the two parts, as the paper's abstract has it


@dataclass
class Scatter:
    """The mechanism: ``directions`` ``[D + 2, rounds]`` of the sort, ``features`` ``[F / 2, D]``, keys per cluster.

    With ``local``, S is a window of so many keys instead. Without features, or clusters and window, it is one of the
    two parts alone.
    """

    directions: Tensor
    features: Tensor
    cluster: int
    local: int = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, causal: bool = False) -> Tensor:
        """Attention of ``[B, H, N, D]`` to ``[B, Hkv, M, D]`` with ``[B, Hkv, M, Dv]``; N is M where it is causal."""
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        counted = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        phi_q, phi_k, level = exponential(self.features, q, k, scale)
        rest = linear(phi_q, phi_k, counted, causal)
        found: list[Found] = []
        for mask, here, there, back in self.pairs(q, k, causal):
            out, lse = exact(here(q), there(k), there(v), scale, mask)
            found.append((back(out), back(lse[..., None])[..., 0]))
            if len(self.features):
                estimate = Attention(score=[Dot(1.0)], mask=mask, normalizer=Identity())
                rest = rest - back(attention(here(phi_q), there(phi_k), there(counted), estimate, offset=0))
        return merge_sums(found, rest, level)

    def pairs(self, q: Tensor, k: Tensor, causal: bool) -> Iterable[Pairs]:
        """The pairs of S: of each round, or of the window."""
        if self.local:
            return [near(self.local, causal)]
        return clusters(q, k, self.directions, self.cluster, causal) if self.cluster else []


class Scatterbrain(MethodSystem):
    """Settings: keys per ``cluster``, ``rounds`` of sorting, random ``features`` (even), ``local`` window, ``seed``."""

    slug = "scatterbrain"
    title = "Scatterbrain (hashed sparse and low-rank attention)"
    paper = "https://arxiv.org/abs/2110.15343"
    code = "https://github.com/HazyResearch/fly"
    promises = Promises(
        causal=False, decodes=False, padding=False, exponent=1.1, training_free=True, needs_training=False
    )

    def __init__(self, cluster: int = 32, rounds: int = 2, features: int = 32, local: int = 0, seed: int = 0):
        self.cluster, self.rounds, self.features, self.local, self.seed = cluster, rounds, features, local, seed

    def make(self, width: int) -> Scatter:
        """The mechanism for heads of a width, with fresh projections and features.

        Raises:
            SpecError: a negative setting, an odd number of features, or nothing to attend with.
        """
        counts = self.cluster, self.features, self.local
        if min(counts) < 0 or not any(counts) or self.rounds < 1 or self.features % 2:
            raise SpecError(
                f"Scatterbrain: expected counts >= 0, not all 0, a round, and an even number of features; got {self}"
            )
        source = torch.Generator().manual_seed(self.seed)
        directions = torch.randn(width + 2, self.rounds, generator=source)
        return Scatter(directions, orthogonal(self.features // 2, width, source), self.cluster, self.local)

    def apply(self, model: Any) -> AbstractContextManager[None]:
        """Read whole prompts this way, in every layer of a model of transformers, until the context is left."""

        def layer(module: Any, q: Tensor) -> Callable[..., Tensor]:
            return partial(self.make(q.shape[-1]), causal=getattr(module, "is_causal", True))

        return on_whole_prompts(model, layer)

    def claim(self) -> ClaimNumbers:
        """Error by inverse temperature against each part alone at the same budget: the paper's process, and a model."""
        from ...study.probes import embedded
        from ...worlds.text import encode, heldout

        process, model = points(), tempered(read(embedded(), encode(heldout()[:2048])[None]))
        tables = {
            "process": errors(_kinds(process), process, causal=False),
            "model": errors(_kinds(model), model, causal=True),
            "model_with_window": errors(_kinds(model, local=True), model, causal=True),
        }
        mean = {where: {kind: statistics.fmean(row) for kind, row in t.items()} for where, t in tables.items()}
        own = {kind: row[FACTORS.index(1.0)] for kind, row in tables["model"].items()}
        lower = min(own["sparse"], own["low_rank"]) / own["both"]
        below = {f"below_{x}_in_the_{i}": m["both"] < m[x] for i, m in mean.items() for x in ("sparse", "low_rank")}
        said = "; ".join(
            f"in the {where.replace('_', ' ')} {m['both']:.3f} (sparse alone {m['sparse']:.3f}, low-rank alone"
            f" {m['low_rank']:.3f})"
            for where, m in mean.items()
        )
        return ClaimNumbers.decide(
            {"inverse_temperatures": {"process": list(BETAS), "model": list(FACTORS)}}
            | {f"error_{where}_{kind}": [round(x, 4) for x in t[kind]] for where, t in tables.items() for kind in t}
            | {"times_lower_in_the_model": round(lower, 3)},
            f"Relative error of the output at a budget of 1/{SHARE} of a row, mean over inverse temperatures: {said}."
            f" At the model's own temperature {lower:.2f} times lower than the better part.",
            **below,
            as_much_lower_as_in_the_paper=lower >= BETTER,
        )


def _kinds(cases: Cases, local: bool = False) -> dict[str, Scatter]:
    """Both parts, and each alone with all of the budget, for inputs of this size."""
    n, width = cases[0][0].q.shape[2:]
    unit = n // (8 * SHARE) * 2  # of four: keys of two clusters, features of queries, of keys
    kinds = {
        "both": Scatterbrain(unit, 2, unit, local=2 * unit * local),
        "sparse": Scatterbrain(2 * unit, 2, 0, local=4 * unit * local), "low_rank": Scatterbrain(0, 1, 2 * unit),
    }  # fmt: skip
    return {name: system.make(width) for name, system in kinds.items()}
