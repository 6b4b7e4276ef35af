"""Pass keys for claims about static patterns: a small model is taught to say which key stood somewhere in filler."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.spec import Attention
from ..nn import GPT
from .trainer import Setup, tiny

FILLER, KEYS = 32, 8  # different tokens of filler, and different pass keys
ASK = FILLER + KEYS
LENGTH = 128


def pages(count: int, source: torch.Generator, length: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    """Filler with one pass key and a question at the end ``[count, length]``; the keys and their places ``[count]``."""
    tokens = torch.randint(FILLER, (count, length), generator=source)
    key = torch.randint(FILLER, ASK, (count,), generator=source)
    at = torch.randint(length - 1, (count,), generator=source)
    tokens[torch.arange(count), at], tokens[:, -1] = key, ASK
    return tokens, key, at


def teach(spec: Attention, heads: int, layers: int = 3, steps: int = 480) -> GPT:
    """A model of so many layers of this program, taught to answer; pages grow to LENGTH in four stages."""
    model = tiny(Setup(layers=layers, heads=heads, width=32), lambda setup, layer: spec, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 20, 1))
    source = torch.Generator().manual_seed(0)
    for step in range(steps):
        tokens, key, _ = pages(32, source, LENGTH >> (3 - 4 * step // steps))
        optimizer.zero_grad()
        F.cross_entropy(model(tokens)[:, -1], key).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warmup.step()
    return model


@torch.no_grad()
def found(model: GPT) -> tuple[Tensor, Tensor]:
    """Which of 1024 unseen pass keys a model finds, 0. or 1., and where they stood, ``[1024]`` each."""
    tokens, key, at = pages(1024, torch.Generator().manual_seed(1))
    return (model(tokens)[:, -1].argmax(-1) == key).float(), at
