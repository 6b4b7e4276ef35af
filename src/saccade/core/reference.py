"""The reference executor: the whole score matrix at once, through autograd. Slow, plain, the judge of the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .program import Hidden, Program, Veil
from .selectors import Selection
from .tile import At


def scores(program: Program, q: Tensor, k: Tensor) -> Tensor:
    """Scores ``[B, H, N, M]`` of prepared queries and keys, before any modifier."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scale = program.form.scale(q.shape[-1])
    if scale is None:
        return program.form.tile(q, k)
    return (q @ k.mT) * scale


def run(
    program: Program, at: At, selection: Selection | None, q: Tensor, k: Tensor, v: Tensor | None
) -> tuple[Tensor | None, Tensor, list[Any]]:
    """Output (with values given), weights ``[B, H, N, M]``, and the whole tensors of each stat."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    tile = scores(program, q.to(dtype), k.to(dtype))
    hidden = ~program.spec.mask.visible(at).expand(tile.shape)
    if selection is not None:
        chosen = selection.dense(at.n, at.m)
        if chosen.shape[1] > 1:
            chosen = chosen.repeat_interleave(at.heads // chosen.shape[1], 1)
        hidden = hidden | ~chosen
    weights, seen = program.define(tile, at, [Hidden(0, at.m, Veil(hidden))])
    whole = []
    for stat, pieces in zip(program.stats, seen, strict=True):
        if stat.axis == "chosen":
            pieces = tuple(p[:, :, stat.chosen(at.n)] for p in pieces)
        whole.append(list(pieces))
    if v is None:
        return None, weights, whole
    v = v.repeat_interleave(at.heads // v.shape[1], 1)
    return (weights @ v.to(dtype)).to(v.dtype), weights, whole
