"""What the claims of systems about projections share: small language models with each, and the cost of a step."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ...nn import GPT, KVCache, MultiHead

if TYPE_CHECKING:
    from ...study.claims import Times
    from ...study.trainer import Comparison, Setup


def contest(mechanisms: Mapping[str, Any], setup: Setup, **options: Any) -> Comparison:
    """Train a small GPT with each, on the same prose.

    Args:
        mechanisms: by name, what GPT's ``attention=`` takes, systems with layers of their own included.
        setup: sizes and training.
        options: further arguments of every GPT.
    """
    from ...study.trainer import compete, language
    from ...worlds.text import BOS

    sizes = (BOS + 1, setup.width, setup.layers, setup.heads)
    models = {name: partial(GPT, *sizes, attention=how, **options) for name, how in mechanisms.items()}
    return compete(models, language(setup), setup)


@torch.no_grad()
def step_times(
    layers: Mapping[str, MultiHead], width: int, length: int, *, batch: int = 4, rounds: int = 15
) -> tuple[Times, dict[str, int]]:
    """Seconds of one decoding step behind ``length`` tokens, in turns, and the bytes of each cache.

    Args:
        layers: by name; ``width`` is that of their stream.
    """
    from ...study.claims import interleaved

    stream = torch.randn(batch, length + 1, width, generator=torch.Generator().manual_seed(0))
    caches, work = {}, {}
    for name, layer in layers.items():
        cache = KVCache()
        cache.append(*layer.placed(stream[:, :-1])[1:])  # as a prefill leaves it
        caches[name], work[name] = cache, partial(_step, layer, stream[:, -1:], cache)
    nbytes = {name: cache.nbytes for name, cache in caches.items()}
    return interleaved(work, rounds), nbytes


def _step(layer: MultiHead, token: torch.Tensor, cache: KVCache) -> None:
    layer(token, cache=cache)
