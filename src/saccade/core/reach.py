"""Keys too far away to matter: under a penalty that grows with the distance, most softmax weights are exactly zero.

A query sees its own position, so the greatest of its scores is at least ``-c``, with ``c`` the product of the greatest
norms and the scale. A key whose penalty exceeds ``2 c`` and the exponent below which the dtype has no number left gets
the weight 0 whatever else it is: leaving it out changes nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .edits import Renormalize
from .masks import EMPTY, FULL, And, Causal, Full, Mask, Span
from .program import Program
from .scores import ALiBi, Dot
from .strips import Shape
from .tile import At


class Near(Mask):
    """Blocks with a key within ``radius`` ``[H]`` of one of their queries; all keys of such a block."""

    by_distance = True

    def __init__(self, radius: Tensor):
        super().__init__()
        self.radius: Tensor
        self.hold("radius", radius)

    def visible(self, at: At) -> Tensor:
        """All: what is left out is left out in blocks."""
        return torch.ones_like(at.k, dtype=torch.bool)

    def blocks(self, span: Span) -> Tensor:
        """``[1, H, nq, nk]``."""
        nearest = torch.maximum(span.distance_lo, -span.distance_hi).clamp(min=0)
        return torch.where(nearest > self.radius[:, None, None], EMPTY, FULL).to(torch.int8)[None]


def narrowed(program: Program, shape: Shape, q: Tensor, k: Tensor) -> Mask:
    """The program's mask, without blocks whose weights are exactly zero where that can be told beforehand."""
    spec, mask = program.spec, program.spec.mask
    penalty = program.modifiers[0] if len(program.modifiers) == 1 else None
    told = (
        program.softmax
        and isinstance(program.form, Dot)
        and spec.select is None
        and isinstance(mask, (Full, Causal))
        and 0 <= shape.offset <= shape.m - shape.n  # every query's own position is among the keys
        and all(edit.linear or isinstance(edit, Renormalize) for edit in program.edits)
    )
    if not told or not isinstance(penalty, ALiBi):
        return mask
    slopes = penalty.by_head(shape.heads, q.device)
    if slopes.shape != (shape.heads,):
        return mask
    scale = program.form.scale(q.shape[-1])
    assert scale is not None
    with torch.no_grad():
        wide = torch.promote_types(q.dtype, torch.float32)
        longest = k.to(wide).norm(dim=-1).amax(-1).repeat_interleave(shape.rep, 1)
        c = abs(scale) * (q.to(wide).norm(dim=-1).amax(-1) * longest).amax(0)
        least = math.log(torch.finfo(wide).smallest_normal) - math.log(2) * (52 if wide == torch.float64 else 23)
        slopes = slopes.to(wide)
        radius = torch.where(slopes > 0, (2 * c - least + 1) / slopes, torch.inf).nan_to_num(nan=math.inf)
    if bool((radius >= max(shape.n, shape.m)).all()):
        return mask
    return Near(radius) if isinstance(mask, Full) else And(mask, Near(radius))
