"""The rhythm in prose: how often anchors come right after preplan tokens."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...worlds.text import text

if TYPE_CHECKING:
    from .preplan_anchor import PreplanAnchor


@torch.no_grad()
def following(system: PreplanAnchor, model: Any) -> Tensor:
    """Share of anchors at or up to two tokens after a preplan token ``[2, texts]``: in texts, and if shifted."""
    shares = []
    for example in islice(text(384, "rhythm"), 12):
        with system.apply(model) as watching:
            model(example.tokens[None], use_cache=False, logits_to_keep=1)
        waad, fai = (x[:, 1 : -system.near] for x in system.rhythm(watching))  # later tokens have no future
        preplan, anchor = (x[0] for x in system.chosen(waad, fai))
        near = torch.stack([pad(preplan, (i, 0))[: len(preplan)] for i in range(3)]).amax(0)
        shifted = torch.stack([near.roll(i) for i in range(20, len(near) - 20, 8)]).mean(0)
        shares.append([float((x * anchor).sum() / anchor.sum()) for x in (near, shifted)])
    return torch.tensor(shares).T
