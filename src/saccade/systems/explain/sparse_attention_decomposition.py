"""Sparse attention decomposition: the few directions of the stream that make a head look, and who wrote into them.

With x the stream after the norm (its weight folded into Wq and Wk), R the rotation of a place, for the query i, key j:

    omega = Wq' R[i]' R[j] Wk = sum_k s[k] u[k] v[k]'            a score is x[i]' omega x[j] = sum of terms
    terms[k] = s[k] (x[i] . u[k]) (x[j] . v[k])
    used = the least number of greatest terms whose sum is above share * score
    written[a] = sum_used sign(x[i] . u[k]) sqrt(s[k]) v[k] . out[a, j] / rms[j]      by head a, for the key; for the
                                                                                     query with u[k] and out[a, i]

An edge from a to the head is cut by taking the directions of ``used`` out of what a adds to the stream at that token.

Paper: Sparse Attention Decomposition Applied to Circuit Tracing, arXiv:2410.00340
Code: https://github.com/gaabrielfranco/sparse-attention-decomposition (utils.py: get_omega_decomposition_all_ahs,
    get_components_used, get_contrib_src_dest, projection_intervention; share 1, a head fires above 0.5)

Differs: GPT-2 has no rotations, so there a head has one omega; here one for each two places. Its biases, by a dimension
of ones, are left out (the embedded model has none, others are refused). The norm's weight is folded in, so that
directions are the stream's own. A score that no terms exceed (share 1, all positive) uses all; the official code fails.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...hosts.acts import Site
from ..base import ClaimNumbers, MethodSystem
from ._directions import FIRES, firings, least, omega, read, terms_of
from ._heads import pairs, projections
from ._prompts import KNOWN, ask
from .circuit_reuse import looks

FEW = 0.25  # of a head's directions


@dataclass(frozen=True)
class Edge:
    """To cut: orthonormal ``directions [B, width, R]`` of what ``sender`` (layer, head) adds at ``places [B]``."""

    sender: tuple[int, int]
    places: Tensor
    directions: Tensor


class SparseAttentionDecomposition(MethodSystem):
    """Settings: ``edges``, each an :class:`Edge` to cut."""

    slug = "sparse-attention-decomposition"
    title = "Sparse attention decomposition"
    paper = "https://arxiv.org/abs/2410.00340"
    code = "https://github.com/gaabrielfranco/sparse-attention-decomposition"

    def __init__(self, edges: Sequence[Edge] = ()):
        self.edges = edges

    @contextmanager
    def apply(self, model: nn.Module) -> Iterator[None]:
        """Cut the edges. Raises SpecError if the model has no such layer."""

        def cut(site: Site, edge: Edge) -> Any:
            def after(module: nn.Linear, args: tuple[Tensor], added: Tensor) -> Tensor:
                rows, head = torch.arange(len(edge.places)), edge.sender[1]
                z = args[0].unflatten(-1, (site.heads, -1))[rows, edge.places, head]
                out = (z @ module.weight.unflatten(1, (site.heads, -1))[:, head].T)[..., None]
                return added.index_put(
                    (rows, edge.places), -(edge.directions @ (edge.directions.mT @ out))[..., 0], True
                )

            return after

        with ExitStack() as stack:
            for edge in self.edges:
                for site, projection in projections(model, edge.sender[0]):
                    stack.callback(projection.register_forward_hook(cut(site, edge)).remove)
            yield

    def claim(self) -> ClaimNumbers:
        """Directions of all firings on pass-key prompts; the strongest edge into each head that finds the key, cut."""
        from ...study import probes

        model, prompts = probes.embedded(), ask(KNOWN, 48)
        size, mass = model.config.head_dim, looks(model, prompts)
        used, plain = firings(model, prompts.tokens[:6])
        finders = [pair for pair in pairs(mass) if pair[0] and mass[pair] > FIRES]
        query, key = torch.full((len(prompts.tokens),), prompts.tokens.shape[1] - 1), torch.tensor(prompts.places)
        traced = {finder: trace(model, prompts.tokens, finder, query, key) for finder in finders}
        ours, others = torch.cat([drops for _, drops in traced.values()], 1)
        few, many, more = float(used.median()), float(plain.median()), ours - others
        edges = [[*edge, "to", *finder] for finder, (edge, _) in traced.items()]
        return ClaimNumbers.decide(
            {"firings": len(used), "directions": few, "coordinates": many, "size": size, "edges": edges}
            | {"drop": round(float(ours.mean()), 3), "drop_others": round(float(others.mean()), 3)},
            f"Half of {len(used)} firings take at most {few:g} of a head's {size} directions (of its own coordinates:"
            f" {many:g}). Cutting the strongest edge into each of the {len(finders)} heads that find the key takes"
            f" {ours.mean():.0%} of their score, cutting as many others of its directions {others.mean():.0%}.",
            few_directions=few <= FEW * size,
            fewer_than_coordinates=few < many,
            traced_edges_carry_the_score=float(more.mean()) > 2 * float(more.std()) / len(more) ** 0.5,
        )


@torch.no_grad()
def trace(
    model: Any, tokens: Tensor, where: tuple[int, int], query: Tensor, key: Tensor
) -> tuple[tuple[int, int, str], Tensor]:
    """The edge (layer, head, side) that writes most into a head's firings, one for each text, and what cutting it does.

    Returns:
        The edge, and the share of the score that goes ``[2, texts]``: without its directions, and without others.
    """
    (inputs, added), rows = read(model, tokens), torch.arange(len(tokens))
    x, rms = inputs[where[0]].x, inputs[where[0]].rms
    at, xi = {"query": query, "key": key}, x[rows, query]
    terms, (u, s, v) = terms_of(model, where, (xi, x[rows, key]), (query, key)), omega(model, where, query, key)
    basis, used = {"query": u, "key": v}, torch.zeros_like(terms)
    for row, mine in zip(used, terms, strict=True):
        row[least(mine)] = 1
    signs = ((xi[:, None] @ u)[:, 0].sign() * s.sqrt() * used)[..., None]
    written = {
        (layer, head, side): float((out[rows, p, head] * (basis[side] @ signs)[..., 0] / rms[rows, p]).mean(0).sum())
        for layer, out in added.items() if layer < where[0] for head in range(out.shape[2]) for side, p in at.items()
    }  # fmt: skip
    edge = max(written, key=lambda one: written[one])
    draw = torch.rand(terms.shape, generator=torch.Generator().manual_seed(0)) - 2 * used
    others = (draw.argsort(-1, descending=True).argsort(-1) < used.sum(-1, keepdim=True)) * (1 - used)
    drops = []
    for taken in (used, others):
        cut = Edge(edge[:2], at[edge[2]], basis[edge[2]] * taken[:, None])
        with SparseAttentionDecomposition([cut]).apply(model):
            after = read(model, tokens)[0][where[0]].x
        left = terms_of(model, where, (after[rows, query], after[rows, key]), (query, key))
        drops.append(1 - left.sum(-1) / terms.sum(-1))
    return edge, torch.stack(drops)[:, terms.sum(-1) > 0]
