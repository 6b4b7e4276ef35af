"""The stream of a model between its blocks: the blocks, and the last token's state, read and replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...hosts.acts import pick
from ...hosts.handles import host_of


def blocks(model: nn.Module, layers: Any = None) -> list[nn.Module]:
    """What holds each self-attention (``layers`` as for :func:`saccade.install`). SpecError: there is no such layer."""
    sites = pick(host_of(model).sites(), type(model).__name__, layers, "self")
    return [model.get_submodule(site.path.rpartition(".")[0]) for site in sites]


def output(found: Any) -> Tensor:
    """The stream ``[B, N, width]`` in what a block gives back: itself, or the first of several."""
    return found if isinstance(found, Tensor) else found[0]


@torch.no_grad()
def state(model: Any, prompts: Tensor, layer: int) -> Tensor:
    """After a layer, at the last token, ``[S, width]``."""
    seen: list[Tensor] = []
    (block,) = blocks(model, layer)
    hook = block.register_forward_hook(lambda module, args, found: seen.append(output(found)[:, -1]))
    try:
        for part in prompts.split(32):
            model(part, use_cache=False, logits_to_keep=1)
    finally:
        hook.remove()
    return torch.cat(seen)


@contextmanager
def replaced(model: nn.Module, layer: int, new: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """At every call's last token, after a layer, ``new(state [B, width])`` in the state's place."""

    def put(module: nn.Module, args: Any, found: Any) -> Any:
        stream = output(found)
        stream = torch.cat([stream[:, :-1], new(stream[:, -1])[:, None]], 1)
        return stream if isinstance(found, Tensor) else (stream, *found[1:])

    (block,) = blocks(model, layer)
    hook = block.register_forward_hook(put)
    try:
        yield
    finally:
        hook.remove()
