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

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...core.stats import Stat, TopK
from ...core.tile import Tile
from ...hosts.handles import Watching, watch
from ..base import ClaimNumbers, MethodSystem
from ..linear._grid import sides

SHARE = 0.5  # an offset local head's share is above this
NEIGHBOURS = [(x, y) for y in (-1, 0, 1) for x in (-1, 0, 1) if x or y]
SIDE, PATCH, PICTURES, BATCH, STEPS, DIRECTIONS, WIDTH = 16, 2, 2048, 32, 400, 6, 64


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
        return watch(model, TopK(1), Displacement(self.columns, self.prefix), kind="self")

    def heads(self, watching: Watching) -> list[HeadOffset]:
        """Every head, from all samples of the last forward."""
        found = []
        for site in watching.sites:
            seen = watching[site.path]
            keys = seen["top_k"].keys[:, :, self.prefix :, 0] - self.prefix  # [B, H, patches]
            n = keys.shape[-1]
            wide = self.columns or sides(n)[1]
            patches = torch.arange(n, device=keys.device)
            across, down = keys % wide - patches % wide, keys // wide - patches // wide
            shares = []
            for x, y in NEIGHBOURS:
                there = (patches % wide + x >= 0) & (patches % wide + x < wide)
                there &= (patches // wide + y >= 0) & (patches // wide + y < n // wide)
                hit = (across == x) & (down == y) & (keys >= 0)
                shares.append((hit & there).double().sum((0, 2)) / (there.sum() * len(keys)).clamp(min=1))
            best, which = torch.stack(shares).max(0)
            moved = seen["displacement"][:, :, self.prefix :].mean((0, 2))  # [H, 3]
            edge = max(wide, n // wide) - 1
            for head, (x, y, away) in enumerate(moved.tolist()):
                near = NEIGHBOURS[int(which[head])]
                found.append(HeadOffset(site.layer, head, (x, y), away / max(edge, 1), near, float(best[head])))
        return found

    def claim(self) -> ClaimNumbers:
        """Offset local heads of vision transformers after training with labels and by reconstruction, and before."""
        from transformers import ViTConfig, ViTForImageClassification, ViTForMaskedImageModeling

        from ...study.progress import bar
        from ...study.trainer import Recipe, Task, fit

        pixels, labels = textures(PICTURES + 256)
        config = ViTConfig(
            hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, image_size=SIDE,
            patch_size=PATCH, encoder_stride=PATCH, initializer_range=0.1,
        )  # fmt: skip
        config.num_labels = DIRECTIONS

        def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
            source = torch.Generator().manual_seed(seed)
            while True:
                some = torch.randint(PICTURES, (BATCH,), generator=source)
                yield pixels[some], labels[some]

        held = [(pixels[PICTURES:], labels[PICTURES:])]
        kinds = {"labels": (ViTForImageClassification, classified), "hiding": (ViTForMaskedImageModeling, uncovered)}
        numbers: dict[str, Any] = {}
        with bar(len(kinds) * STEPS) as tell:
            for name, (kind, loss) in kinds.items():
                torch.manual_seed(0)
                model: Any = kind(config)
                places = model.vit.embeddings.position_embeddings.requires_grad_(False)
                places[0, 1:] = sines(SIDE // PATCH)
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


def textures(count: int) -> tuple[Tensor, Tensor]:
    """Pictures ``[count, 3, SIDE, SIDE]`` that are smooth along one of some directions, and which ``[count]``."""
    source = torch.Generator().manual_seed(0)
    labels = torch.randint(DIRECTIONS, (count,), generator=source)
    noise = torch.randn(count, 3, SIDE, SIDE, generator=source)
    angle = (labels * torch.pi / DIRECTIONS)[:, None, None]
    y, x = torch.meshgrid(*[torch.fft.fftfreq(SIDE, 1 / SIDE)] * 2, indexing="ij")  # waves in a picture
    along, across = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    kept = torch.exp(-((along / 3).square()) - (across / 0.8).square())
    pictures = torch.fft.ifft2(torch.fft.fft2(noise) * kept[:, None]).real
    return pictures / pictures.std((1, 2, 3), keepdim=True), labels


def sines(side: int) -> Tensor:
    """Positions of a grid ``[side * side, WIDTH]``, half of each of its column and half of its row, as MAE's."""
    y, x = torch.meshgrid(*[torch.arange(side).double()] * 2, indexing="ij")
    rates = 10000 ** (-torch.arange(WIDTH // 4) / (WIDTH // 4))
    angles = [z.flatten()[:, None] * rates for z in (x, y)]
    return torch.cat([f(z) for z in angles for f in (torch.sin, torch.cos)], 1).float()


def classified(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy of the labels."""
    return model(batch[0], labels=batch[1]).loss


def uncovered(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Absolute error of the pixels of half of the patches, drawn anew, that the model was not shown."""
    hidden = torch.rand(len(batch[0]), (SIDE // PATCH) ** 2) < 0.5
    return model(batch[0], bool_masked_pos=hidden).loss


class Displacement(Stat):
    """From each query, under its weights on patches: columns to the right, rows down, and the distance in patches.

    ``[B, H, N, 3]``; 0 for a query without weight on a patch.
    """

    def __init__(self, columns: int | None = None, prefix: int = 0, name: str | None = None):
        super().__init__(name)
        self.columns, self.prefix = columns, prefix

    def see(self, tile: Tile) -> tuple[Tensor, ...]:
        """Means over the tile's keys."""
        at, wide = tile.at, self.columns or sides(max(tile.at.m - self.prefix, 1))[1]
        key, query = at.k - self.prefix, at.row - self.prefix
        across, down = key % wide - query % wide, key // wide - query // wide
        weights = tile.weights * (key >= 0)
        total = weights.sum(-1)
        away = (across.square() + down.square()).to(weights.dtype).sqrt()
        moved = torch.stack([(weights * x).sum(-1) for x in (across, down, away)], -1)
        return (moved / total.masked_fill(total == 0, math.inf)[..., None],)

    def widths(self, m: int) -> tuple[tuple[int, ...], ...]:
        """Three numbers."""
        return ((3,),)
