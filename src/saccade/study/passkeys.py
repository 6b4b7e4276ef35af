"""Pass keys for claims about sparse patterns: a small model is taught to say which key stood somewhere in filler.

:func:`teach` hides one in plain filler; :func:`teach_starred` one in every block, of which the starred one is asked for
(:mod:`saccade.worlds.starred`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.spec import Attention
from ..nn import GPT
from ..worlds import starred
from .progress import bar
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
    source = torch.Generator().manual_seed(0)
    train(model, lambda stage: pages(32, source, LENGTH >> (3 - stage))[:2], steps, warmup=20)
    return model


def train(model: GPT, pages: Callable[[int], tuple[Tensor, Tensor]], steps: int, warmup: int = 1) -> None:
    """Teach a model in place to answer at the end of pages: ``pages(stage)`` gives tokens ``[B, N]`` and answers
    ``[B]`` of the stages 0 to 3, one after the other."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / warmup, 1))
    with bar(steps, "pass keys") as tell:
        for step in range(steps):
            tokens, answers = pages(4 * step // steps)
            optimizer.zero_grad()
            F.cross_entropy(model(tokens)[:, -1], answers).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            tell("pass keys", 1)


@torch.no_grad()
def found(model: GPT) -> tuple[Tensor, Tensor]:
    """Which of 1024 unseen pass keys a model finds, 0. or 1., and where they stood, ``[1024]`` each."""
    tokens, key, at = pages(1024, torch.Generator().manual_seed(1))
    return (model(tokens)[:, -1].argmax(-1) == key).float(), at


def teach_starred(program: Attention, heads: int, blocks: int, length: int, steps: int = 720) -> GPT:
    """A model of two layers, without positions, taught to answer; its texts grow to so many blocks in four stages."""
    source = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT(starred.VOCABULARY, 32, 2, heads, positions=None, attention=lambda layer, heads: program)
    train(model, lambda stage: starred.starred(32, source, blocks >> (3 - stage), length), steps)
    return model


@torch.no_grad()
def read_starred(model: GPT, program: Attention, blocks: int, length: int) -> tuple[Tensor, float]:
    """Logits at the end of 64 unseen texts, with a program in every layer, and the share of their keys found."""
    for layer in model.attentions:
        layer.spec = program
    tokens, key = starred.starred(64, torch.Generator().manual_seed(1), blocks, length)
    logits = torch.cat([model(some)[:, -1] for some in tokens.split(16)])
    return logits, float((logits.argmax(-1) == key).float().mean())
