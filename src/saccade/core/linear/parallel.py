"""The parallel form's meaning: the dense weights."""

from __future__ import annotations

import torch
from torch import Tensor

from .forms import decay_of
from .spec import LinearAttention


def weights(
    spec: LinearAttention, q: Tensor, k: Tensor, log_decay: Tensor | None, beta: Tensor | None, visible: Tensor | None
) -> Tensor:
    """Weights ``[G, N, M]`` from features ``q [G, N, F]`` and ``k [G, M, F]``; ``visible``: where, if not causal.

    The delta rule: token t writes ``beta (v - sum of (k[t] . k[s]) decayed times what s wrote)``, so with A those
    products times beta below the diagonal, ``weights = scores (1 + A)^-1 beta``.
    """
    beta = None if beta is None else beta.to(q.dtype)
    if not spec.causal:
        found = q @ k.mT
        found = found if visible is None else found.masked_fill(~visible, 0)
    else:
        decay = decay_of(log_decay, q, q.shape[1])
        found = decay.scores(q[:, None], k[:, None])[:, 0]
        if spec.delta:
            assert beta is not None
            seen = decay.scores((k * beta[..., None])[:, None], k[:, None], -1)[:, 0]
            found = torch.linalg.solve_triangular(seen, found, upper=False, left=False, unitriangular=True)
    if beta is not None:
        found = found * beta[:, None]
    return found / (found.sum(-1, keepdim=True) + spec.eps) if spec.normalize else found
