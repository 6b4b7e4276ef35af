"""How SEA's estimators learn a model's attention, layer by layer, and how near they come: dense, for short texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.normalizers import HIDDEN
from ...hosts.replaced import Read, read
from ._picture import Estimator
from .sea import Sea, blend


def distill(system: Sea, model: Any, texts: Sequence[Tensor], rate: float = 1e-3) -> dict[int, Estimator]:
    """Estimators of a model's layers by their number, after a step on each of the texts ``[B, N]``."""
    made: dict[int, Estimator] = {}
    optimizer: torch.optim.Optimizer | None = None
    for tokens in texts:
        layers = read(model, tokens)
        if optimizer is None:
            made = {i: system.make(layer.q.shape[1], layer.q.shape[3]) for i, layer in enumerate(layers)}
            optimizer = torch.optim.AdamW([p for e in made.values() for p in e.parameters()], lr=rate)
        optimizer.zero_grad()
        for i, layer in enumerate(layers):
            loss(made[i], layer).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return made


def loss(made: Estimator, layer: Read) -> Tensor:
    """The official losses against what the layer's dense attention is: of the matrix, and of the output."""
    q, k, v, truth = dense(layer)
    scores, shares = made(q, k, v)
    guess = made.map(scores)
    apart = F.kl_div(guess.clamp(min=1e-30).log().flatten(0, 2), truth.flatten(0, 2), reduction="batchmean")
    kept = truth * made.stretch(made.bright(scores), False)
    near = kept @ v / kept.sum(-1, keepdim=True).clamp(min=1e-30)
    return 0.1 * apart + F.mse_loss(guess, truth) + F.mse_loss(blend(near, v, shares), truth @ v)


def dense(layer: Read) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries that carry the scale, keys and values of as many heads, and the layer's own attention matrix."""
    q, k, v = (x.repeat_interleave(layer.q.shape[1] // x.shape[1], 1) for x in layer[:3])
    q = q * layer.scale
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    return q, k, v, (q @ k.mT).masked_fill(future, HIDDEN).softmax(-1)


@torch.no_grad()
def nearness(made: Estimator, fresh: Estimator, layer: Read) -> dict[str, float]:
    """Recall of masks and overlap of maps in one layer, for its second half of queries.

    Recall: the share of the greatest weights, as many as are kept, that a mask shows: the estimator's, an untrained
    one's, a window's. Overlap: the share of the dense attention's mass that a map puts where it is.
    """
    q, k, v, truth = dense(layer)
    n = q.shape[2]
    scores = {"": made(q, k, v)[0], "_untrained": fresh(q, k, v)[0]}
    masks = {name: made.stretch(made.bright(x), False) for name, x in scores.items()}
    masks["_window"] = torch.ones(n, n, dtype=torch.bool).tril().triu(1 - made.keep).expand_as(truth)
    greatest = truth.transpose(1, 2).flatten(2).topk(made.heads * made.keep, -1).indices  # of all heads together
    hits = {f"recall{name}": x.transpose(1, 2).flatten(2).gather(-1, greatest) for name, x in masks.items()}
    shared = {f"overlap{name}": made.map(x).minimum(truth).sum(-1).transpose(1, 2) for name, x in scores.items()}
    return {name: float(x[:, n // 2 :].float().mean()) for name, x in (hits | shared).items()}
