"""LIME: which parts of a picture a class rests on, by a linear model of what is said while some of them are seen."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SQUARE, SAMPLES, KERNEL = 4, 150, 0.25  # pixels of a part's side, pictures asked about, width of the kernel


def lime(says: Callable[[Tensor, Tensor], Tensor], picture: Tensor, label: int) -> Tensor:
    """LIME's map ``[H, W]``: how a linear model of which squares are seen explains the label's probability.

    ``says(pixels, masks)`` gives logits ``[B, classes]``; kernel and ridge as in the official ``lime_image.py``.
    """
    high, wide = (side // SQUARE for side in picture.shape[1:])
    source = torch.Generator().manual_seed(0)
    on = torch.randint(2, (SAMPLES, high * wide), generator=source).bool()
    on[0] = True
    masks = on.view(-1, high, wide).repeat_interleave(SQUARE, 1).repeat_interleave(SQUARE, 2)
    said = says(picture.expand(SAMPLES, -1, -1, -1), masks).softmax(1)[:, label]
    away = 1 - F.cosine_similarity(on.float(), torch.ones(1, high * wide))
    weights = (-away.square() / KERNEL**2).exp().sqrt()[:, None]
    x = on.float() - (weights * on).sum(0) / weights.sum()
    y = said[:, None] - (weights * said[:, None]).sum() / weights.sum()
    slopes = torch.linalg.solve(x.T @ (weights * x) + torch.eye(high * wide), x.T @ (weights * y))
    return slopes.view(high, wide).repeat_interleave(SQUARE, 0).repeat_interleave(SQUARE, 1)
