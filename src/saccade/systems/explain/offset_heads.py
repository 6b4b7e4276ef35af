"""Offset local attention heads: heads of vision transformers that look at the patch at one side of each patch.

Of a head's weights, without those on tokens that are no patches and divided by what is left:

    offset    mean of (column, row) of the key minus that of the query      the length of it in patches
    distance  mean of the length of that difference                         as a share of the grid's side
    share     of the queries, how many give most weight to the same neighbour of theirs, the best of the eight

A head is an offset local head if its share is above a half: of the queries that have such a neighbour.

Paper: Teaching Matters: Investigating the Role of Supervision in Vision Transformers, arXiv:2212.03862
Code: https://github.com/mwalmer-umd/vit_analysis (analysis/attention_metrics.py: AttentionDistance,
    AvgAlignedAttentionOnToken, average_att_offset)

Differs: paper and code show these heads in pictures of aligned maps (and by their mean offset), without a rule; the
share is ours. Aligned maps take (2 K - 1)^2 numbers a head; here each query's few numbers are reduced from the engine's
tiles, also where the grid is no square. Of the paper's six supervisions the claim has two: labels, and hidden patches
to be reconstructed (SimMIM's form of it, as transformers has it). Pictures are random textures whose direction is the
label, models are small, and positions are fixed sines as in MAE. (Measured first on pictures of shapes and with learned
positions: 500 steps taught neither model its task, and no head was found.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...core.stats import TopK
from ...hosts.handles import Watching, watch
from ...worlds.batches import drawn
from ..base import ClaimNumbers, MethodSystem
from ._patches import Displacement, grid, steps
from ._textures import classified, textures, transformer, uncovered

SHARE = 0.5  # an offset local head's share is above this
NEIGHBOURS = [(x, y) for y in (-1, 0, 1) for x in (-1, 0, 1) if x or y]
PICTURES, BATCH, STEPS = 2048, 32, 400


@dataclass(frozen=True)
class HeadOffset:
    """What a head does: mean offset (columns, rows) and distance, and the neighbour that the share looks at most."""

    layer: int
    head: int
    offset: tuple[float, float]
    distance: float
    neighbour: tuple[int, int]
    share: float


class OffsetHeads(MethodSystem):
    """Settings: ``columns`` of the grid (``None``: as square as can be); ``prefix``, how many tokens come before it."""

    slug = "offset-heads"
    title = "Offset local attention heads"
    paper = "https://arxiv.org/abs/2212.03862"
    code = "https://github.com/mwalmer-umd/vit_analysis"

    def __init__(self, columns: int | None = None, prefix: int = 0):
        self.columns, self.prefix = columns, prefix

    def apply(self, model: nn.Module) -> Watching:
        """Watch a model, which answers as it would; see :meth:`heads`."""
        return watch(model, TopK(1 + self.prefix), Displacement(self.columns, self.prefix), kind="self")

    def heads(self, watching: Watching) -> list[HeadOffset]:
        """Every head, from all samples of the last forward."""
        found = []
        for site in watching.sites:
            seen = watching[site.path]
            greatest = seen["top_k"].keys[:, :, self.prefix :] - self.prefix  # [B, H, patches, 1 + prefix]
            keys = greatest.gather(-1, (greatest >= 0).long().argmax(-1, keepdim=True))[..., 0]  # the first on a patch
            rows, columns = grid(keys.shape[-1], self.columns)
            across, down = steps(torch.arange(keys.shape[-1], device=keys.device), keys, columns)
            shares = []
            for x, y in NEIGHBOURS:
                hit = (across == x) & (down == y) & (keys >= 0)
                there = len(keys) * (rows - abs(y)) * (columns - abs(x))  # queries with such a neighbour
                shares.append(hit.double().sum((0, 2)) / max(there, 1))
            best, which = torch.stack(shares).max(0)
            moved = seen["displacement"][:, :, self.prefix :].mean((0, 2))  # [H, 3]
            edge = max(rows, columns) - 1
            for head, (x, y, away) in enumerate(moved.tolist()):
                near = NEIGHBOURS[int(which[head])]
                found.append(HeadOffset(site.layer, head, (x, y), away / max(edge, 1), near, float(best[head])))
        return found

    def claim(self) -> ClaimNumbers:
        """Offset local heads of vision transformers after training with labels and by reconstruction, and before."""
        from transformers import ViTForImageClassification, ViTForMaskedImageModeling

        from ...study.progress import bar
        from ...study.trainer import Recipe, Task, fit

        pictures = textures(PICTURES + 256)
        batches = partial(drawn, [x[:PICTURES] for x in pictures], BATCH)
        held = [tuple(x[PICTURES:] for x in pictures)]
        kinds = {"labels": (ViTForImageClassification, classified), "hiding": (ViTForMaskedImageModeling, uncovered)}
        numbers: dict[str, Any] = {}
        with bar(len(kinds) * STEPS) as tell:
            for name, (kind, loss) in kinds.items():
                model = transformer(kind)
                before = offset_heads(self.seen(model, held[0][0]))
                score = fit(model, Task(batches, loss, lambda: held), Recipe(STEPS), 0, tell=tell)
                heads = self.seen(model.eval(), held[0][0])
                numbers |= {
                    f"loss_{name}": round(score, 3),
                    f"untrained_{name}": len(before),
                    f"heads_{name}": [[h.layer, h.head, *h.neighbour, round(h.share, 2)] for h in offset_heads(heads)],
                    f"distances_{name}": [round(h.distance, 2) for h in heads],
                }
        counts = [len(numbers[f"heads_{name}"]) for name in kinds]
        untrained = sum(numbers[f"untrained_{name}"] for name in kinds)
        return ClaimNumbers.decide(
            numbers,
            f"Of 12 heads, {counts[0]} look at one neighbour from more than half of the patches after training with"
            f" labels, {counts[1]} after the reconstruction of hidden patches; of both before, {untrained}.",
            found_with_labels=counts[0] > 0,
            found_by_reconstruction=counts[1] > 0,
            none_untrained=untrained == 0,
        )

    @torch.no_grad()
    def seen(self, model: nn.Module, pictures: Tensor) -> list[HeadOffset]:
        """The heads of a vision transformer of transformers, with a class token, on pictures ``[B, 3, H, W]``."""
        system = OffsetHeads(self.columns, 1)
        with system.apply(model) as watching:
            model(pictures)
        return system.heads(watching)


def offset_heads(heads: list[HeadOffset]) -> list[HeadOffset]:
    """Those whose share is above a half."""
    return [head for head in heads if head.share > SHARE]
