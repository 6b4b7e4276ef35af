"""MInference's search: for each head, the pattern nearest to dense attention at a given share of its work."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...core import masks
from ...core.attend import attention
from ...core.spec import Attention
from .minference import BLOCK, MInference, Pattern, keys_of

SHARE = 0.25  # of the causal half that a searched head may compute of the prompt it is searched on

SPACE = (
    Pattern("a-shape", 100, 800), Pattern("vertical-slash", 30, 800), Pattern("vertical-slash", 100, 750),
    Pattern("vertical-slash", 500, 700), Pattern("vertical-slash", 3500, 100), Pattern("block-sparse", 100),
)  # fmt: skip


@torch.no_grad()
def search(
    q: Tensor, k: Tensor, v: Tensor, share: float = SHARE, space: Sequence[Pattern] = SPACE, steps: int = 8
) -> list[Pattern]:
    """The best pattern for each head of a layer, on one text ``[1, H, N, D]``.

    Args:
        q, k, v: queries, keys and values, of as many tokens.
        share: of the causal half of the matrix that a pattern may compute; those that cannot do with so little
            (what is forced counts too) are as small as they can be.
        space: candidates, in any proportion to ``share``.
        steps: halvings until a candidate's size is found.
    """
    rep, found = q.shape[1] // k.shape[1], []
    for h in range(q.shape[1]):
        one = q[:, h : h + 1], k[:, h // rep : h // rep + 1], v[:, h // rep : h // rep + 1]
        dense = attention(*one, Attention(mask=masks.Causal()))
        sized = [_sized(one[0], one[1], pattern, share, steps) for pattern in space]
        errors = [float((attention(*one, MInference([p]).build(1)) - dense).abs().sum()) for p in sized]
        found.append(sized[errors.index(min(errors))])
    return found


def _sized(q: Tensor, k: Tensor, pattern: Pattern, share: float, steps: int) -> Pattern:
    """A pattern with both sizes scaled alike, as large as ``share`` of the causal half allows."""
    n = q.shape[2]
    causal = masks.Causal().blocks(masks.Span.grid(n, n, BLOCK, 1)) > masks.EMPTY
    widest = BLOCK * pattern.a if pattern.kind == "block-sparse" else max(pattern.a, pattern.b)
    low, high = 0.0, n / widest
    for _ in range(steps):
        scaled = _scaled(pattern, middle := (low + high) / 2)
        fits = (keys_of(q, k, scaled) & causal).sum() <= share * causal.sum()
        low, high = (middle, high) if fits else (low, middle)
    return _scaled(pattern, low)


def _scaled(pattern: Pattern, factor: float) -> Pattern:
    return Pattern(pattern.kind, max(1, round(pattern.a * factor)), round(pattern.b * factor))
