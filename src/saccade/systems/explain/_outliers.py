"""How far states lie from those of a training set, and how well that tells outliers: the higher, the more at home.

Also outliers that need no data of another kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


def mahalanobis(states: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """The score of states ``[S, width]`` by the nearest class mean (arXiv:1807.03888)."""
    states = states.double()
    means = torch.stack([states[labels == c].mean(0) for c in labels.unique()])
    centred = states - means[torch.unique(labels, return_inverse=True)[1]]
    inverse = torch.linalg.pinv(centred.T @ centred / len(states), hermitian=True)

    def score(x: Tensor) -> Tensor:
        off = x.double()[:, None] - means
        return -((off @ inverse) * off).sum(-1).amin(1)

    return score


def nearest(states: Tensor, k: int = 5) -> Callable[[Tensor], Tensor]:
    """The score of states by the k-th nearest of these, all of length 1 (arXiv:2204.06507)."""
    known = F.normalize(states.double(), dim=-1)
    return lambda x: -torch.cdist(F.normalize(x.double(), dim=-1), known).kthvalue(k, 1).values


def fpr95(inside: Tensor, outside: Tensor) -> float:
    """Share of ``outside`` with a score that at least 95% of ``inside`` reach."""
    bar = inside.sort(descending=True).values[-(-95 * len(inside) // 100) - 1]
    return float((outside >= bar).double().mean())


def half_replaced(texts: Iterable[tuple[Tensor, Tensor]], vocabulary: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Batches of tokens ``[B, N]`` (0: padding) and labels, half of the words being any of the vocabulary ``[V]``."""
    source = torch.Generator().manual_seed(0)
    replaced = []
    for tokens, labels in texts:
        drawn = vocabulary[torch.randint(len(vocabulary), tokens.shape, generator=source)]
        swap = (torch.rand(tokens.shape, generator=source) < 0.5) & (tokens != 0)
        replaced.append((torch.where(swap, drawn, tokens), labels))
    return replaced
