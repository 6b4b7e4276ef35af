"""Synthetic scans, of which some have a lesion: the data, and the small networks that read them.

A scan is smooth tissue in an ellipse with noise; half of them have one small brighter spot in one of 6 regions, faint
enough that the classifier of this file is right about 8 times in 10.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE, BATCH, STEPS = 32, 32, 300
ROWS, COLUMNS = 2, 3  # regions of a scan


def scans(seed: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scans ``[count, 1, 32, 32]``, whether there is a lesion ``[count]``, and the region of its centre ``[count]``."""
    source = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(SIDE) + 0.5, torch.arange(SIDE) + 0.5, indexing="ij")
    head = ((x - SIDE / 2) / 15).square() + ((y - SIDE / 2) / 15).square() < 1
    tissue = torch.randn(count, 1, SIDE, SIDE, generator=source)
    for _ in range(3):
        tissue = F.avg_pool2d(tissue, 5, 1, 2)
    tissue = 0.3 * tissue / tissue.std() + 0.1 * torch.randn(count, 1, SIDE, SIDE, generator=source)
    sick = torch.randint(2, (count,), generator=source)
    place = 8 + 16 * torch.rand(count, 2, generator=source)  # row and column of the centre
    radius = 1.5 + torch.rand(count, generator=source)
    away = (y - place[:, 0, None, None]).square() + (x - place[:, 1, None, None]).square()
    lesion = (-away / (2 * radius[:, None, None].square())).exp() * sick[:, None, None]
    region = region_of(place[:, 0], place[:, 1])
    return (tissue + lesion[:, None]) * head, sick, region


def region_of(row: Tensor, column: Tensor) -> Tensor:
    """The region that pixels lie in, 0 to 5 row by row."""
    return (row * ROWS / SIDE).long() * COLUMNS + (column * COLUMNS / SIDE).long()


def classifier(seed: int) -> nn.Sequential:
    """A fresh one of scans: three convolutions, each with a pooling after it."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(32, 2),
    )  # fmt: skip


def autoencoder() -> tuple[nn.Sequential, nn.Sequential]:
    """Of scans, to codes ``[B, 8, 8, 8]`` and back."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 8, 1)
    ), nn.Sequential(
        nn.Upsample(scale_factor=2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Upsample(scale_factor=2),
        nn.Conv2d(16, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1),
    )  # fmt: skip


def train(
    parts: Sequence[nn.Module], loss: Callable[[Tensor], Tensor], count: int, tell: Callable[[str, int], None]
) -> None:
    """Some steps of Adam on the parts' parameters; ``loss`` of some numbers ``[BATCH]`` below ``count``."""
    optimizer = torch.optim.Adam([p for part in parts for p in part.parameters()], 3e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        found = loss(torch.randint(count, (BATCH,)))
        found.backward()
        optimizer.step()
        tell(f"loss {found.item():.3f}", 1)


@torch.no_grad()
def accuracy(model: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    """Share of scans of which the model says what is so."""
    return float((model(pixels).argmax(1) == labels).float().mean())


def by_gradient(model: nn.Module, pixels: Tensor) -> Tensor:
    """How much each pixel moves what the model says most ``[B, H, W]``."""
    given = pixels.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(given).amax(1).sum(), given)
    return gradient.abs().mean(1)


def located(saliency: Tensor, regions: Tensor) -> float:
    """Share of scans with most of the saliency in the region ``[B]`` of the lesion."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    places = F.one_hot(region_of(y, x).flatten()).to(saliency.dtype)
    return float(((saliency.flatten(1) @ places).argmax(1) == regions).float().mean())
