"""Which dimensions of a model's hidden states tell a token's place: those whose mean runs monotonically with it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ._stream import blocks, output


@torch.no_grad()
def positional_dims(model: Any, samples: int = 200, length: int = 1000, seed: int = 0) -> list[int]:
    """Hidden dimensions whose mean over random texts runs monotonically with position, the smoothest first.

    A dimension counts if it does so, in one direction, in more than a quarter of the layers.

    Args:
        model: a causal language model of transformers.
        samples: random texts to average over.
        length: their tokens; no more than the model's context.
    """
    config = model.config.get_text_config()
    length = min(length, config.max_position_embeddings)
    source = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (samples, length), generator=source).to(model.device)
    layers = blocks(model)
    total = torch.zeros(len(layers), length, config.hidden_size, dtype=torch.float64)

    def add(layer: int, found: Any) -> None:
        total[layer] += output(found).double().sum(0).cpu()

    with ExitStack() as stack:
        for layer, block in enumerate(layers):
            hook = block.register_forward_hook(lambda module, args, found, layer=layer: add(layer, found))
            stack.callback(hook.remove)
        for some in tokens.split(8):
            model(input_ids=some, use_cache=False, logits_to_keep=1)
    return positional_order(total / samples)


def positional_order(mean: Tensor) -> list[int]:
    """The same from mean states ``[layers, N, hidden]``, one for each layer's output."""
    layers, n, _ = mean.shape
    inner = mean[2:-1] if layers > 3 else mean
    monotone = _direction(inner[:, round(0.3 * n) :])  # the beginning, where much else happens, is left out
    rising, falling = (monotone == 1), (monotone == -1)
    chosen = torch.where(rising.sum(0) > falling.sum(0), rising, falling)
    rough = _roughness(inner[:, round(0.2 * n) :]).masked_fill(~chosen, torch.inf).amin(0)
    found = (chosen.sum(0) > layers // 4).nonzero()[:, 0]
    return [int(d) for d in found[rough[found].argsort()]]


def _direction(curves: Tensor) -> Tensor:
    """1 where the cubic fitted to a curve along dimension 1 rises throughout, -1 where it falls, else 0."""
    x = torch.linspace(-1, 1, curves.shape[1], dtype=curves.dtype)
    basis = torch.linalg.qr(torch.stack([x**i for i in range(4)], 1))[0]
    steps = (basis @ (basis.T @ curves)).diff(dim=1)
    return (steps >= 0).all(1).int() - (steps <= 0).all(1).int()


def _roughness(curves: Tensor) -> Tensor:
    """Sum of squared second differences of curves scaled to [0, 1] and smoothed by cubics over windows of 10."""
    low, high = curves.amin(1, keepdim=True), curves.amax(1, keepdim=True)
    x = torch.arange(10, dtype=curves.dtype) - 4.5
    middle = torch.linalg.pinv(torch.stack([x**i for i in range(4)], 1))[0]
    smooth = ((curves - low) / (high - low)).unfold(1, 10, 1) @ middle
    return smooth.diff(n=2, dim=1).square().sum(1)
