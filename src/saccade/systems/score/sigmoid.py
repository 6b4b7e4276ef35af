"""Sigmoid attention: every weight is a sigmoid of its own score, so no row has to be normalized.

    w[i, j] = sigmoid(q[i] . k[j] / sqrt(D) + bias),   bias = -log(length)

The bias makes a row's weights sum to about one at the start of training, as softmax's do; without it the output
grows with the number of keys and training is unstable.

Paper: Theory, Analysis, and Best Practices for Sigmoid Self-Attention, arXiv:2409.04431
Code: https://github.com/apple/ml-sigmoid-attention
    (attention_simulator/src/attention_simulator/layers/attention.py, with attn_activ_fn="sigmoid")

Differs: ``length`` is a setting, the context of the training, and not the number of keys at hand; so decoding with
a growing cache gives what the whole sequence gives, and padding changes nothing. ``length=None`` takes the number of
keys of each call (the paper's formula read literally), and then neither is promised. The official code takes the
bias as a number (its examples use -10). LayerScale, QK norm and hybrid norm are advice about the block around the
attention and belong to the model.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch

from ...core import masks, normalizers
from ...core.attend import attention
from ...core.spec import Attention
from ..base import ClaimNumbers, Promises, System

FASTER = 1.0  # the softmax's time over the sigmoid's must be above this
PARITY = 0.01  # training loss may exceed the softmax's by this share


class Sigmoid(System):
    """Settings: ``length``, the training context (``None``: the keys of each call); ``causal``."""

    slug = "sigmoid"
    title = "Sigmoid self-attention"
    paper = "https://arxiv.org/abs/2409.04431"
    code = "https://github.com/apple/ml-sigmoid-attention"
    promises = Promises()

    def __init__(self, length: int | None = 2048, causal: bool = True):
        self.length, self.causal = length, causal

    def promised(self) -> Promises:
        """Causal as set; no decoding and no padding where the bias follows the number of keys."""
        fixed = self.length is not None
        return replace(self.promises, causal=self.causal, decodes=fixed, padding=fixed)

    def build(self, heads: int) -> Attention:
        """Sigmoid with the bias of the setting."""
        bias = None if self.length is None else -math.log(self.length)
        mask = masks.Causal() if self.causal else masks.Full()
        return Attention(mask=mask, normalizer=normalizers.Sigmoid(bias))

    def claim(self) -> ClaimNumbers:
        """Tiled sigmoid against tiled softmax (full and causal, forward), and a small language model with each."""
        from ...study.trainer import Setup, compare

        speedups = {"full": _speedup(causal=False), "causal": _speedup(causal=True)}
        losses = compare(
            {
                "softmax": lambda setup, layer: Attention(mask=masks.Causal()),
                "sigmoid": lambda setup, layer: Sigmoid(setup.context).build(setup.heads),
            },
            Setup(steps=150),
        )
        excess = losses.excess("sigmoid", "softmax")
        return ClaimNumbers.decide(
            {f"speedup_{name}": round(value, 3) for name, value in speedups.items()}
            | losses.numbers()
            | {"excess_loss": round(excess.mean, 4), "excess_error": round(excess.error, 4)},
            f"Tiled sigmoid runs at {speedups['full']:.2f} times the speed of tiled softmax (full) and"
            f" {speedups['causal']:.2f} (causal); its validation loss differs by {excess.mean:+.4f} nats per byte"
            f" (standard error {excess.error:.4f}) from {losses.mean('softmax'):.4f}.",
            faster_full=speedups["full"] > FASTER,
            faster_causal=speedups["causal"] > FASTER,
            training_parity=excess.mean <= PARITY * losses.mean("softmax"),
        )


def _speedup(causal: bool) -> float:
    """Time of the tiled softmax over that of the tiled sigmoid, forward, 8 heads of 64, 2048 tokens."""
    from ...study.claims import interleaved

    n = 2048
    q, k, v = torch.randn(3, 1, 8, n, 64, generator=torch.Generator().manual_seed(0)).unbind(0)
    ours = Sigmoid(n, causal).build(8)
    run = partial(attention, q, k, v, backend="band")
    return interleaved({"sigmoid": partial(run, ours), "softmax": partial(run, Attention(mask=ours.mask))}, 15).ratio(
        "softmax", "sigmoid"
    )
