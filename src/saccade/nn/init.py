"""First weights, by the names of those who use them; each weight is drawn from a seed and its own name.

So two models of one seed start from the same numbers wherever they have the same weight, whatever else they have.

    gpt2    normal, deviation 0.02; what is added to the stream 0.02 / sqrt(number of additions) (GPT-2)
    bert    normal, deviation 0.02 (BERT)
    vit     normal, deviation 0.02, cut at -2 and 2 as timm's trunc_normal_ does (ViT, DeiT)
    xavier  uniform by fan-in and fan-out; embeddings normal, deviation width ** -0.5 (the first transformer, fairseq)
"""

from __future__ import annotations

import zlib

import torch
from torch import nn

from ..core.errors import SpecError

NAMES = ("gpt2", "bert", "vit", "xavier")
STD = 0.02


def fresh_seed() -> int:
    """A seed from torch's generator; ask for it before anything else draws."""
    return int(torch.randint(2**31, ()))


@torch.no_grad()
def initialise(model: nn.Module, name: str, seed: int) -> None:
    """Draw the weights of linear, convolution and embedding layers; biases become zero.

    Left as they are: attention programs (``spec``), bare parameters, norms, and modules with ``keeps_start = True``.

    Args:
        model: what is initialised, in place. A module with a number ``additions`` says how often what lies in it adds
            to its stream, by linear layers called ``out`` and ``down``.
        name: one of :data:`NAMES`.
        seed: see :func:`fresh_seed`.

    Raises:
        SpecError: an unknown name.
    """
    if name not in NAMES:
        raise SpecError(f"unknown initialisation {name!r}: there are {', '.join(NAMES)}")
    left: set[nn.Module] = set()
    additions: dict[nn.Module, int] = {}
    for path, module in model.named_modules():
        last = path.rpartition(".")[2]
        if module in left or last == "spec" or getattr(module, "keeps_start", False):
            left.update(module.children())
            continue
        if isinstance(number := getattr(module, "additions", None), int):
            additions |= dict.fromkeys(module.modules(), number)
        if not isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d)):
            continue
        source = torch.Generator().manual_seed(seed + (zlib.crc32(path.encode()) << 31))
        if name == "vit":
            nn.init.trunc_normal_(module.weight, std=STD, generator=source)
        elif name == "xavier" and isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5, generator=source)
        elif name == "xavier":
            nn.init.xavier_uniform_(module.weight, generator=source)
        else:
            added = additions.get(module, 1) if name == "gpt2" and last in ("out", "down") else 1
            nn.init.normal_(module.weight, std=STD / added**0.5, generator=source)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
