"""How much a language model's last states tell: its input, and from which page the words of a question are.

After arXiv:2409.01482 (language_mlp_mixer_representation.py and infonce_retrieval.py of its code); questions that are
half of a page's words are ours.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn import GPT

CLOSEST, ITERATIONS, RATES = 5, 500, (0.02, 0.002)  # of the reconstruction, theirs
TEMPERATURE = 0.02  # of the retrieval


def tokens_lost(model: GPT, tokens: Tensor) -> float:
    """Share of tokens not among the closest of an input with the same last states, found by gradient descent."""

    def states(x: Tensor) -> Tensor:
        for block in model.stack.blocks:
            x = block(x)
        return x

    table = model.embed.table.weight.detach()
    with torch.no_grad():
        target = states(table[tokens])
    x = torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
    for i in range(ITERATIONS):
        x.requires_grad_()
        (grad,) = torch.autograd.grad((states(x) - target).abs().sum(), x)
        x = x.detach() - (RATES[0] + (RATES[1] - RATES[0]) * i / ITERATIONS) * grad
    closest = (x @ torch.linalg.pinv(table)).topk(CLOSEST).indices
    return float((closest != tokens[..., None]).all(-1).float().mean())


def pairs(source: bytes, length: int, size: int, seed: int | str) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless pairs of questions and pages ``[size, length]``: half of a page's words, in order, and the page."""
    from ...worlds.text import encode, window

    rng = random.Random(f"pairs/{seed}")
    while True:
        pages = [window(source, length - 1, rng) for _ in range(size)]
        kept = [b" ".join(word for word in page.split() if rng.random() < 0.5).rjust(length - 1) for page in pages]
        yield torch.stack([encode(page) for page in kept]), torch.stack([encode(page) for page in pages])


def _similar(model: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
    """Cosine ``[size, size]`` of the last token's states: each question with each page."""
    questions, pages = (F.normalize(model.states(x)[:, -1], dim=-1) for x in given)  # type: ignore[operator]
    return questions @ pages.mT


def contrast(model: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
    """InfoNCE: every question's page against all others of the batch."""
    return F.cross_entropy(_similar(model, given) / TEMPERATURE, torch.arange(len(given[0])))


def found(model: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
    """Share of questions whose page is the closest."""
    return (_similar(model, given).argmax(-1) == torch.arange(len(given[0]))).float().mean()
