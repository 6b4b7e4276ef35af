"""Pictures of random texture whose direction is their label, and the small vision transformers that read them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SIDE, PATCH, DIRECTIONS, WIDTH = 16, 2, 6, 64


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


def transformer(kind: Any) -> Any:
    """A fresh model of one of transformers' ViT classes: 3 layers of 4 heads, and positions that are not learned."""
    from transformers import ViTConfig

    config = ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, image_size=SIDE,
        patch_size=PATCH, encoder_stride=PATCH, initializer_range=0.1,
    )  # fmt: skip
    config.num_labels = DIRECTIONS
    torch.manual_seed(0)
    model = kind(config)
    model.vit.embeddings.position_embeddings.requires_grad_(False)[0, 1:] = sines(SIDE // PATCH)
    return model


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
