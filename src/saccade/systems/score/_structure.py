"""What systems share whose layers are told, batch by batch, which tokens of a sentence belong together.

    with telling(model, together):      bool [B, N, N], False wherever there is no token
        model(...)

A layer that is told nothing attends as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...core import masks
from ...core.errors import SpecError
from ...core.spec import Attention
from ...nn import EncoderDecoder, MultiHead
from ...nn.backbones import Place
from ...nn.positions import RoPE
from ._translation import HELD, pairs, told, vocabulary

if TYPE_CHECKING:
    from ...study.trainer import Task
    from ...worlds.translation import Translation
    from ...worlds.trees import Split

WIDTH, HEADS = 64, 4
Make = Callable[[Place], nn.Module]


class Related(MultiHead):
    """Multi-head attention over sentences that can be told which tokens belong together; this one does not heed it."""

    together: Tensor | None = None

    def __init__(self, place: Place, causal: bool = False):
        spec = Attention(mask=masks.Causal() if causal else masks.Full())
        super().__init__(spec, place.width, place.heads, positions=place.positions)

    def options(self, context: Tensor) -> dict[str, Any]:
        """Of sentences the whole matrix costs less than strips of it."""
        return {"backend": "reference"}


@contextmanager
def telling(model: nn.Module, together: Tensor) -> Iterator[None]:
    """Tell the layers of a model which tokens belong together, until the context is left.

    Raises:
        SpecError: no layer can be told, or ``together`` is no bool ``[B, N, N]``.
    """
    layers = [module for module in model.modules() if isinstance(module, Related)]
    if not layers:
        raise SpecError(f"{type(model).__name__} has no layer that could be told which tokens belong together")
    if together.dtype != torch.bool or together.ndim != 3 or together.shape[1] != together.shape[2]:
        raise SpecError(f"together must be bool [B, N, N]; got {together.dtype} {tuple(together.shape)}")
    before = [layer.together for layer in layers]
    for layer in layers:
        layer.together = together
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.together = old


def translator(encoder: Make = Related, cross: Make = Related, layers: int = 2) -> EncoderDecoder:
    """A small model whose encoder's attention and whose cross-attention are made by these."""

    def made(make: Make) -> Callable[[int, int], nn.Module]:
        place = Place(WIDTH, HEADS, 0, layers, RoPE(), None)
        return lambda index, heads: make(replace(place, index=index))

    decoder = partial(Related, causal=True)
    return EncoderDecoder(
        vocabulary(), WIDTH, layers, HEADS, attention=made(encoder), decoder=made(decoder), cross=made(cross)
    )


def translating(
    together: Callable[[Translation], Tensor], learned: Split = "any", asked: Split = "any", measure: str = "accuracy"
) -> Task:
    """Translation by models that are told what ``together`` says of a batch; "accuracy" or "loss" on other sentences.

    Args:
        together: bool ``[B, N, N]`` of the source's tokens.
        learned, asked: which combinations of words occur.
    """
    from ...study import trainer

    def run(function: Callable[..., Tensor], model: nn.Module, given: Translation) -> Tensor:
        with telling(model, together(given)):
            return function(model, told(given))

    held = list(islice(pairs(HELD, asked), 8))
    measured = trainer.accuracy if measure == "accuracy" else trainer.labelled
    return trainer.Task(
        partial(pairs, split=learned), partial(run, trainer.labelled), lambda: held, partial(run, measured), measure
    )
