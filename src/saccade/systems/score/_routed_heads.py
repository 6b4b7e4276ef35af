"""What the claims about heads that are not all in use share: two kinds of training, and how important each head is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...nn import GPT, MultiHead
from ._translation import HELD, pairs, told

if TYPE_CHECKING:
    from ...study.trainer import Comparison, Setup

Loss = Callable[[nn.Module, Any], Tensor]
SCARCE = 8  # batches of 32 pairs, over and over: what regularizes shows where there is little to learn from


def contest(mechanisms: Mapping[str, Any], setup: Setup, around: Callable[[Loss], Loss]) -> Comparison:
    """Small GPTs on the same prose, one for each ``attention=``, judged by the loss of the next byte.

    Args:
        mechanisms: by name, what GPT's ``attention=`` takes.
        setup: sizes and training.
        around: what becomes of that loss in training.
    """
    from ...study.trainer import compete, language, next_token
    from ...worlds.text import BOS

    task = replace(language(setup), loss=around(next_token), measure=next_token)
    sizes = (BOS + 1, setup.width, setup.layers, setup.heads)
    return compete({name: partial(GPT, *sizes, attention=how) for name, how in mechanisms.items()}, task, setup)


def scarce(seed: int) -> Iterator[tuple[Tensor, ...]]:
    """The same few batches of sentences and their translations, over and over."""
    return cycle([told(given) for given in islice(pairs(seed), SCARCE)])


def held(count: int = 4) -> list[tuple[Tensor, ...]]:
    """Batches that are never trained on."""
    return [told(given) for given in islice(pairs(HELD), count)]


@contextmanager
def still(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """These get no gradient, so an optimizer leaves them alone, until the context is left."""
    learning = [p for p in parameters if p.requires_grad]
    try:
        for p in learning:
            p.requires_grad_(False)
        yield
    finally:
        for p in learning:
            p.requires_grad_(True)


def importance(model: nn.Module, batch: Any, loss: Loss, layers: Sequence[MultiHead] | None = None) -> Tensor:
    """Of every head ``[layers * heads]`` the mean over the batch of ``|d loss / d its factor|`` (arXiv:1905.10650).

    A factor's gradient is the head's output times that output's gradient. All of the model's layers, if none are given.
    """
    if layers is None:
        layers = [m for m in model.modules() if isinstance(m, MultiHead)]
    read: dict[MultiHead, Tensor] = {}

    def look(layer: MultiHead, projection: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
        read[layer] = given[0].unflatten(-1, (layer.heads, -1))
        return (read[layer].flatten(-2),)

    hooks = [layer.out.register_forward_pre_hook(partial(look, layer)) for layer in layers]
    try:
        with torch.enable_grad():
            found = loss(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    outputs = [read[layer] for layer in layers]
    slopes = torch.autograd.grad(found, outputs)
    return torch.cat([(x * g).sum((1, 3)).abs().mean(0).detach() for x, g in zip(outputs, slopes, strict=True)])
