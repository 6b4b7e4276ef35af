"""Images whose class needs two far patches, and their classifiers for FIT's claim: its encoder, and a dense one."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fit import FIT, group_size

SIDE, SPOT, COLOURS = 16, 4, 4  # patches of the sides of an image and of its spots, colours of these
BLIND = 1 / COLOURS  # accuracy of whoever sees one of the two spots only
LAYERS, LATENTS = "(1)1(1)1", 2


class Classifier(nn.Module):
    """A classifier of the claim's images ``[B, SIDE, SIDE, 3]``: FIT's mean latent, or a dense stack's mean token."""

    def __init__(self, grouped: bool, width: int = 32, heads: int = 4):
        super().__init__()
        length = SIDE * SIDE
        self.rows = math.isqrt(group_size(length) // 2)
        self.group = self.rows, group_size(length) // self.rows
        with torch.random.fork_rng():
            torch.manual_seed(0)
            n = group_size(length) if grouped else length
            layers = LAYERS if grouped else f"({sum(a + b for a, b in FIT(LAYERS).blocks())})"
            self.body = FIT(layers, n, LATENTS, width, width, heads, heads).encoder(3, length // n)
            self.head = nn.Linear(width, COLOURS**2)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits of the pairs of colours ``[B, COLOURS ** 2]``."""
        if len(self.body.latents) == 1:  # one group of everything, and no global layer: a transformer
            return self.head(self.body(pixels.flatten(1, 2)[:, None])[0].mean((1, 2)))
        tall, wide = self.group
        tiles = pixels.unflatten(2, (-1, wide)).unflatten(1, (-1, tall)).transpose(2, 3)
        return self.head(self.body(tiles.flatten(3, 4).flatten(1, 2))[1].mean((1, 2)))


def images(count: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise ``[count, SIDE, SIDE, 3]`` with a coloured spot in each half; the class is the pair of the colours."""
    pixels = 0.3 * torch.randn(count, SIDE, SIDE, 3, generator=source)
    colours = 2 * torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    spots = torch.randint(COLOURS, (count, 2), generator=source)
    rows = torch.randint(SIDE - SPOT + 1, (count, 2), generator=source)
    columns = torch.randint(SIDE // 2 - SPOT + 1, (count, 2), generator=source) + torch.tensor([0, SIDE // 2])
    within = torch.arange(SPOT)
    each = torch.arange(count)
    down, right = rows[..., None, None] + within[:, None], columns[..., None, None] + within
    pixels[each[:, None, None, None], down, right] += colours[spots][:, :, None, None]
    return pixels, spots[:, 0] * COLOURS + spots[:, 1]


def taught(model: nn.Module, steps: int = 300) -> float:
    """Accuracy on unseen images after a short training."""
    from ...study.trainer import train

    source = torch.Generator().manual_seed(0)

    def loss() -> Tensor:
        pixels, pair = images(16, source)
        return F.cross_entropy(model(pixels), pair)

    train(model, loss, steps, 3e-3)
    pixels, pair = images(1024, source)
    with torch.no_grad():
        return float((model(pixels).argmax(-1) == pair).float().mean())
