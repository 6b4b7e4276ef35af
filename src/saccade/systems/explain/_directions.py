"""What a head reads of the stream: the directions in which its score is a sum of few terms, and what lies in them."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import Unsupported
from ...core.stats import Rows
from ...hosts.acts import Site
from ...hosts.handles import watch
from ._heads import projections
from .attention_lens import AttentionLens

FIRES = 0.5  # a weight above this


@dataclass(frozen=True)
class Reading:
    """One layer's input: x ``[B, N, width]`` of root mean square 1, what it was divided by, rms ``[B, N, 1]``."""

    x: Tensor
    rms: Tensor


@torch.no_grad()
def read(model: Any, tokens: Tensor) -> tuple[dict[int, Reading], dict[int, Tensor]]:
    """By layer: what attention reads of texts ``[B, N]``, and what each head adds ``[B, N, H, width]``."""
    inputs: dict[int, Reading] = {}

    def before(layer: int, norm: Any) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor]) -> None:
            rms = (args[0].square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
            inputs[layer] = Reading(args[0] / rms, rms)

        return hook

    with ExitStack() as stack:
        for site, _ in projections(model):
            norm = _norm(model, site)
            stack.callback(norm.register_forward_pre_hook(before(site.layer, norm)).remove)
        added = stack.enter_context(AttentionLens().apply(model))
        model(tokens, use_cache=False, logits_to_keep=1)
    return inputs, added


def omega(model: Any, where: tuple[int, int], query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u ``[P, width, D]``, s ``[P, D]``, v ``[P, width, D]`` of a head for P queries and keys, by their places."""
    a, ra, b, rb = (part.double() for w in weights(model, where) for part in torch.linalg.qr(w.T))
    turn = rotations(model, query).mT @ rotations(model, key)
    p, s, q = torch.linalg.svd(ra @ turn.double() @ rb.T)
    return (a @ p).float(), s.float(), (b @ q.mT).float()


def least(terms: Tensor, share: float = 1.0) -> list[int]:
    """The fewest of a score's terms ``[D]``, greatest first, whose sum is above a share of all terms' sum."""
    total = terms.sum()
    order = terms.argsort(descending=bool(total > 0))
    enough = ((terms[order].cumsum(0) / total) > share).nonzero()
    return order[: int(enough[0]) + 1 if len(enough) else None].tolist()


def terms_of(model: Any, where: tuple[int, int], x: tuple[Tensor, Tensor], at: tuple[Tensor, Tensor]) -> Tensor:
    """terms ``[P, D]`` of a head's scores, from what queries and keys ``[P, width]`` read, and their places ``[P]``."""
    u, s, v = omega(model, where, *at)
    return s * (x[0][:, None] @ u)[:, 0] * (x[1][:, None] @ v)[:, 0]


@torch.no_grad()
def firings(model: Any, tokens: Tensor, most: int = 40) -> tuple[Tensor, Tensor]:
    """How many directions, and how many of a head's own coordinates, scores of firings take; ``most`` for a head.

    A firing is a weight above ``FIRES`` on another key than the first, with a score above zero.
    """
    with watch(model, Rows(range(tokens.shape[1])), kind="self") as watching:
        inputs, _ = read(model, tokens)
    found: list[list[int]] = [[], []]
    source = torch.Generator()
    for site in watching.sites:
        for head in range(site.heads):
            b, i, j = (watching.seen[site.path]["rows"][:, head] > FIRES).nonzero().T
            b, i, j = (place[j > 0] for place in (b, i, j))
            b, i, j = (place[torch.randperm(len(b), generator=source.manual_seed(0))[:most]] for place in (b, i, j))
            where, xi, xj = (site.layer, head), inputs[site.layer].x[b, i], inputs[site.layer].x[b, j]
            terms, (wq, wk) = terms_of(model, where, (xi, xj), (i, j)), weights(model, where)
            q, k = ((rotations(model, at) @ (x @ w.T)[..., None])[..., 0] for x, w, at in ((xi, wq, i), (xj, wk, j)))
            for mine, plain in zip(terms, q * k, strict=True):
                if mine.sum() > 0:
                    found[0].append(len(least(mine)))
                    found[1].append(len(least(plain)))
    return torch.tensor(found[0]), torch.tensor(found[1])


def _norm(model: nn.Module, site: Site) -> Any:
    """The norm before an attention."""
    return model.get_submodule(site.path.rpartition(".")[0]).input_layernorm


def weights(model: Any, where: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Wq and Wk of a head ``[D, width]``, of a stream of root mean square 1. Unsupported: they have biases."""
    ((site, _),) = projections(model, where[0])
    scale, found = _norm(model, site).weight, []
    module: Any = site.module
    for projection in (module.q_proj, module.k_proj):
        if projection.bias is not None:
            raise Unsupported(f"{site.path}: directions of queries and keys that have biases")
        each = projection.weight.unflatten(0, (-1, model.config.head_dim))
        found.append(each[where[1] * len(each) // site.heads] * scale)
    return found[0], found[1]


def rotations(model: Any, places: Tensor) -> Tensor:
    """``[P, D, D]``: what a query or key is multiplied by at its place."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    unit = torch.eye(model.config.head_dim).expand(1, len(places), -1, -1)
    cos, sin = model.base_model.rotary_emb(unit, places[None])
    return apply_rotary_pos_emb(unit, unit, cos, sin, unsqueeze_dim=2)[0][0].mT
