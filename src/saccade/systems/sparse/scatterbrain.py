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

import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from ...core.attend import attention
from ...core.errors import SpecError
from ...core.masks import Causal, Mask, Window
from ...core.normalizers import HIDDEN, Identity
from ...core.scores import Dot
from ...core.spec import Attention
from ...core.stats import LogSumExp
from ...core.tile import At
from ...hosts.replaced import Read, read, replaced
from ..base import ClaimNumbers, MethodSystem, Promises
from ._features import linear, orthogonal

SHARE = 32  # of the claim: the budget is this part of a row, as in the paper's vision models
BETTER = 2.1  # times the error of the better of the two parts, as the paper's abstract has it
BETAS, FACTORS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0), (0.25, 0.5, 1.0, 2.0, 4.0)  # of the process, and of the model
PARTS = ("sparse", "low_rank")

Cut = Callable[..., Tensor]


class Fresh(Mask):
    """Pairs of a cluster that count: keys up to ``limit`` ``[B, H, n]``, not together in an earlier round.

    ``place`` ``[B, H, m]`` is where a key stood; ``homes``: clusters of queries and keys in each earlier round.
    """

    def __init__(self, limit: Tensor, place: Tensor, homes: list[tuple[Tensor, Tensor]]):
        super().__init__()
        self.limit, self.place, self.homes = limit, place, homes

    def visible(self, at: At) -> Tensor:
        seen = self.place[at.b, at.h, at.k] <= self.limit[at.b, at.h, at.q]
        for q_home, k_home in self.homes:
            seen = seen & (q_home[at.b, at.h, at.q] != k_home[at.b, at.h, at.k])
        return seen


def _as_it_is(x: Tensor) -> Tensor:
    return x


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``[B, H, S]`` of ``[B, H, N, D]``."""
    return x.gather(2, index[..., None].expand(*index.shape, x.shape[-1]))


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
        phi_q, phi_k, level = self.phi(q, k, scale)
        rest = linear(phi_q, phi_k, counted, causal)
        found: list[tuple[Tensor, Tensor]] = []
        for mask, here, there, back in self.pairs(q, k, causal):
            exact = Attention(score=[Dot(scale)], mask=mask)
            near, seen = attention(here(q), there(k), there(v), exact, stats=[LogSumExp()], offset=0)
            found.append((back(near), back(seen["log_sum_exp"][..., None])[..., 0]))
            if len(self.features):
                estimate = Attention(score=[Dot(1.0)], mask=mask, normalizer=Identity())
                rest = rest - back(attention(here(phi_q), there(phi_k), there(counted), estimate, offset=0))
        top = torch.stack([level, *(lse for _, lse in found)]).amax(0).detach()
        top = top.masked_fill(top == HIDDEN, 0)  # causal, without features: a row of whose keys none was found
        low = torch.exp(level - top)[..., None] * rest
        total, mass = low[..., :-1], low[..., -1:].clamp(min=0)
        for near, lse in found:
            share = torch.exp(lse - top)[..., None]
            total, mass = total + share * near, mass + share
        return total / mass.clamp(min=1e-6)

    def phi(self, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Features ``[B, H, N, F]`` of queries and keys, to be multiplied by ``exp(level)``, ``[B, H, N]``."""
        half = scale**0.5 * self.features.to(q)
        if not len(half):
            return q[..., :0], k[..., :0], torch.full_like(q[..., 0], HIDDEN)
        turned_q, turned_k = (torch.cat([x @ half.mT, -x @ half.mT], -1) for x in (q, k))
        size_q, size_k = (scale / 2 * x.square().sum(-1, keepdim=True) for x in (q, k))
        top_q, top_k = turned_q.amax(-1, keepdim=True), (turned_k - size_k).amax((-2, -1), keepdim=True)
        level = (top_q - size_q + top_k)[..., 0] - math.log(2 * len(half))
        return torch.exp(turned_q - top_q), torch.exp(turned_k - size_k - top_k), level

    def orders(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys by each projection, ``[rounds, B, H, N]``."""
        norms = [x.square().sum(-1, keepdim=True) for x in (q, k)]
        longest = norms[0].amax(-2, keepdim=True) + norms[1].amax(-2, keepdim=True)
        more_q, more_k = ((longest - norm).sqrt() for norm in norms)
        ways = self.directions.to(q)
        by_q, by_k = q @ ways[:-2] + more_q * ways[-1], k @ ways[:-2] + more_k * ways[-2]
        return by_q.movedim(-1, 0).argsort(-1), by_k.movedim(-1, 0).argsort(-1)

    def pairs(self, q: Tensor, k: Tensor, causal: bool) -> Iterator[tuple[Mask, Cut, Cut, Cut]]:
        """The pairs of each round: a mask, how queries and keys are laid out for it, and how results are put back."""
        if self.local:
            window = Window(self.local // 2 + 1, (self.local + 1) // 2)
            yield window & Causal() if causal else window, _as_it_is, _as_it_is, _as_it_is
        if self.local or not self.cluster:
            return
        (batch, heads, n, _), m = q.shape, k.shape[2]
        count = -(-m // self.cluster)
        rows = -(-n // count)
        orders = [x.detach() for x in self.orders(q, k)]
        homes = [x.argsort(-1) // size for x, size in zip(orders, (rows, self.cluster), strict=True)]
        place = torch.arange(m, device=q.device).expand(batch, heads, m)
        limit = place[..., :n] if causal else place.new_full((batch, heads, n), m - 1)

        def cut(x: Tensor, order: Tensor, size: int, fill: int = 0) -> Tensor:
            """``[B, H, N, ...]`` in this order and padded, ``[B * H, clusters, size, ...]``."""
            x = pad(take(x, order), (0, 0, 0, count * size - order.shape[-1]), value=fill)
            return x.reshape(batch * heads, count, size, -1)

        for round, (order, key_order) in enumerate(zip(*orders, strict=True)):
            here, there = partial(cut, order=order, size=rows), partial(cut, order=key_order, size=self.cluster)
            earlier = [(here(a[..., None])[..., 0], there(b[..., None])[..., 0]) for a, b in zip(*homes, strict=True)]
            mask = Fresh(here(limit[..., None])[..., 0], there(place[..., None], fill=m)[..., 0], earlier[:round])

            def back(x: Tensor, order: Tensor = order) -> Tensor:
                return take(x.reshape(batch, heads, count * rows, -1), order.argsort(-1))

            yield mask, here, there, back


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
        self.cluster, self.rounds, self.features = cluster, rounds, features
        self.local, self.seed = local, seed

    def make(self, width: int) -> Scatter:
        """The mechanism for heads of a width, with fresh projections and features.

        Raises:
            SpecError: a negative setting, an odd number of features, or nothing to attend with.
        """
        if min(self.cluster, self.features, self.local) < 0 or self.rounds < 1 or self.features % 2:
            raise SpecError(f"Scatterbrain: expected counts >= 0, a round, and an even number of features; got {self}")
        if not self.cluster and not self.features and not self.local:
            raise SpecError("Scatterbrain: cluster=0, local=0 and features=0 leave nothing to attend with")
        source = torch.Generator().manual_seed(self.seed)
        directions = torch.randn(width + 2, self.rounds, generator=source)
        return Scatter(directions, orthogonal(self.features // 2, width, source), self.cluster, self.local)

    @contextmanager
    def apply(self, model: Any) -> Iterator[None]:
        """Read whole prompts this way, in every layer of a model of transformers, until the context is left."""
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        made: dict[int, Scatter] = {}

        def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **given: Any) -> tuple[Tensor, None]:
            if mask is not None or q.shape[2] != k.shape[2]:
                return sdpa_attention_forward(module, q, k, v, mask, **given)  # type: ignore[return-value]
            scatter = made.setdefault(id(module), self.make(q.shape[-1]))
            causal = getattr(module, "is_causal", True)
            return scatter(q, k, v, given.get("scaling"), causal).transpose(1, 2).contiguous(), None

        with replaced(model, attend):
            yield

    def claim(self) -> ClaimNumbers:
        """Error by inverse temperature against each part alone at the same budget: the paper's process, and a model."""
        from ...study.probes import embedded
        from ...worlds.text import encode, heldout

        text = encode(heldout()[:2048])[None]
        layers = read(embedded(), text)
        tables = {
            "process": _table(_process(), causal=False), "model": _table(_model(layers), causal=True),
            "model_with_window": _table(_model(layers), causal=True, local=True),
        }  # fmt: skip
        mean = {where: {kind: statistics.fmean(row) for kind, row in t.items()} for where, t in tables.items()}
        own = {kind: row[FACTORS.index(1.0)] for kind, row in tables["model"].items()}
        lower = min(own["sparse"], own["low_rank"]) / own["both"]
        below = {f"below_{part}_in_the_{where}": m["both"] < m[part] for where, m in mean.items() for part in PARTS}
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


def _table(cases: Iterable[list[Read]], causal: bool, local: bool = False) -> dict[str, list[float]]:
    """Mean error over the layers of each case, for both parts and for each alone with all of the budget."""
    found: dict[str, list[float]] = {"both": [], **{part: [] for part in PARTS}}
    for layers in cases:
        unit = layers[0].q.shape[2] // (8 * SHARE) * 2  # of four: keys of two clusters, features of queries, of keys
        kinds = {
            "both": Scatterbrain(unit, 2, unit, local=2 * unit * local),
            "sparse": Scatterbrain(2 * unit, 2, 0, local=4 * unit * local), "low_rank": Scatterbrain(0, 1, 2 * unit),
        }  # fmt: skip
        for kind, system in kinds.items():
            found[kind].append(statistics.fmean(_error(system, layer, causal) for layer in layers))
    return found


@torch.no_grad()
def _error(system: Scatterbrain, read: Read, causal: bool) -> float:
    """Of the output: the norm of what is wrong over that of what is right."""
    exact = scaled_dot_product_attention(read.q, read.k, read.v, is_causal=causal, scale=read.scale, enable_gqa=True)
    off = system.make(read.q.shape[-1])(read.q, read.k, read.v, read.scale, causal) - exact
    return float(off.norm() / exact.norm())


def _process(n: int = 3136, width: int = 64, members: int = 8, spread: float = 0.5) -> Iterator[list[Read]]:
    """The paper's process: ``members`` points around each normal center of length 1 are both queries and keys."""
    source = torch.Generator().manual_seed(1)
    centers, noise, v = torch.randn(3, 1, 2, n, width, generator=source).unbind(0)
    x = (centers[:, :, : n // members].repeat_interleave(members, 2) + spread * noise) * width**-0.5
    for beta in BETAS:
        yield [Read(x, x, v, beta)]


def _model(layers: list[Read]) -> Iterator[list[Read]]:
    """What a model's layers attend with, at other inverse temperatures too."""
    for factor in FACTORS:
        yield [layer._replace(scale=factor * layer.scale) for layer in layers]
