"""Encoder-only next-token prediction: every prefix is read anew, with every token of it seeing every other.

    logits[t] = tell(encoder(x[1..t])[t])       attention without a causal mask, one pass over each prefix
    decoder:    tell(decoder(x)[t])             one pass over all, where earlier tokens cannot take later ones in

What the tokens become depends on the whole prefix, so nothing can be kept from one token to the next: N tokens cost N
passes, in time as N^3 where a decoder takes N^2. What it buys is functions such as Triplet-Counting,

    f(x[1..n]) = #{(i, j): x[i] + x[j] + x[n] = 0 modulo n} modulo n,

which an encoder computes by looking from the last token and which a decoder's early tokens do not know of.

Paper: ENTP: Encoder-only Next Token Prediction, arXiv:2410.01600
Code: none official found; the task is as in a public copy of the authors' data_generator.py (TripletCounting: 16 seeds
    below 16, then 48 tokens that are f of what stands before; 5000 steps)

Differs: prefixes are padded on the right into one batch and their padding is hidden, which changes nothing. The later
version of the paper (Count3) counts with x[1] in the place of x[n].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from ...core import masks
from ...core.spec import Attention
from ...nn import GPT, Encoder
from ..base import ClaimNumbers, Promises, System

SEEDS, LENGTH = 8, 12  # of the claim's sequences: given tokens below LENGTH / 2, and all that are there
STEPS = 1000  # what a claim has time for; the authors' 5000 are of 64 longer sequences each
SOLVED, FAILED = 0.9, 0.5  # accuracy of what performs the task "easily", and of what "cannot"


class Entp(System):
    """No settings: :class:`EachPrefix` runs an encoder this way, and this is the attention within."""

    slug = "entp"
    title = "Encoder-only next-token prediction"
    paper = "https://arxiv.org/abs/2410.01600"
    promises = Promises(causal=False, decodes=False, unit_rows=True, hosts=())

    def build(self, heads: int) -> Attention:
        """Plain softmax attention over the whole prefix."""
        return Attention(mask=masks.Full())

    def claim(self) -> ClaimNumbers:
        """Triplet-Counting by an encoder and a decoder of one size; and what a token costs each."""
        from ...study.laws import Work
        from ...study.trainer import Recipe, Task, accuracy, compete, labelled

        contestants: dict[str, Callable[[], nn.Module]] = {
            "entp": lambda: EachPrefix(Encoder(LENGTH, 64, 3, 4, attention=Entp(), init="gpt2"), SEEDS - 1),
            "decoder": partial(_Decoder, LENGTH, 64, 3, 4),
        }
        task = Task(triplets, labelled, lambda: islice(triplets(999), 4), measure=accuracy, score="accuracy")
        result = compete(contestants, task, Recipe(steps=STEPS, lr=2e-3, seeds=(0,)))
        tokens, costs = torch.zeros(1, LENGTH, dtype=torch.long), {}
        for name, models in result.models.items():
            with torch.no_grad(), Work() as work:
                models[0](tokens)
            costs[name] = work.count
        entp, decoder = result.mean("entp"), result.mean("decoder")
        return ClaimNumbers.decide(
            result.numbers() | {f"operations_{name}": count for name, count in costs.items()},
            f"Triplet-Counting after {SEEDS} to {LENGTH} tokens, {STEPS} steps: accuracy {entp:.2f} by the encoder,"
            f" {decoder:.2f} by a decoder of its size, which takes 1/{costs['entp'] / costs['decoder']:.0f} of its"
            " operations.",
            encoder_solves_it=entp >= SOLVED,
            decoder_does_not=decoder <= FAILED,
        )


class EachPrefix(nn.Module):
    """An encoder as a language model: tokens ``[B, N]`` to logits ``[B, N - first, vocab]`` after each prefix.

    Args:
        encoder: without classes; its table also tells.
        first: the shortest prefix ends with this token (counted from 0).
    """

    def __init__(self, encoder: Encoder, first: int = 0):
        super().__init__()
        self.encoder, self.first = encoder, first

    def forward(self, tokens: Tensor) -> Tensor:
        """Each prefix by itself."""
        batch, length = tokens.shape
        ends = torch.arange(self.first, length, device=tokens.device)
        keep = torch.arange(length, device=tokens.device) <= ends[:, None]  # [prefixes, N]
        states = self.encoder(tokens.repeat_interleave(len(ends), 0), keep.repeat(batch, 1))
        last = states.unflatten(0, (batch, len(ends)))[:, torch.arange(len(ends)), ends]
        return last @ self.encoder.embed.table.weight.T


class _Decoder(GPT):
    """A GPT that tells what the contestant tells, from the last given token on."""

    def forward(self, tokens: Tensor, caches: object = None) -> Tensor:
        return super().forward(tokens)[:, SEEDS - 1 :]


def triplet_count(x: Tensor) -> Tensor:
    """f of sequences ``[B, n]``: ``[B]``."""
    n = x.shape[1]
    sums = x[:, :, None] + x[:, None, :] + x[:, -1, None, None]
    return (sums % n == 0).sum((1, 2)) % n


def triplets(seed: int, batch: int = 32) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless sequences ``[B, LENGTH]``, and the next tokens from the last given one on ``[B, LENGTH - SEEDS + 1]``."""
    source = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randint(0, LENGTH // 2, (batch, SEEDS), generator=source)
        while x.shape[1] <= LENGTH:
            x = torch.cat([x, triplet_count(x)[:, None]], 1)
        yield x[:, :-1], x[:, SEEDS:]
