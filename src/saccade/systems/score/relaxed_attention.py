"""Relaxed attention: weights mixed with the uniform distribution, in training alone or always.

    w'[i] = (1 - share) softmax(q[i] . k / sqrt(D)) + share / M        M visible keys

In the encoder's self-attention, in training alone, it regularizes. In cross-attention, also when the model is used
("matched inference"), it hides the source a little, so that the decoder's own language model learns less and one from
outside helps more.

Paper: Relaxed Attention for Transformer Models, arXiv:2209.09735
Code: none official; that of espresso (relaxed_attention_weight of https://github.com/freewym/espresso's fairseq
    MultiheadAttention) relaxes in training, before dropout

Differs: M counts the keys that a query may see; espresso's code counts padding too, and gives it weight. The paper
tunes ``share`` for each task; 0.1 is a value of ours.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import cycle, islice

import torch
from torch import Tensor, nn

from ...core import edits, masks
from ...core.errors import SpecError
from ...core.spec import Attention
from ...core.tile import At
from ...nn import GPT, EncoderDecoder
from ..base import ClaimNumbers, Promises, System
from ._translation import HELD, pairs, told, vocabulary

FUSIONS = [i / 20 for i in range(13)]  # weights of the external language model that are tried


class Relax(edits.Mix):
    """``(1 - share) * weights + share / visible keys``; unless ``matched``, not in evaluation."""

    def __init__(self, share: float, matched: bool):
        super().__init__("uniform", share)
        self.matched = matched

    def forward(self, weights: Tensor, at: At, visible: Tensor | None) -> Tensor:
        """The relaxed tile."""
        return super().forward(weights, at, visible) if self.training or self.matched else weights


class RelaxedAttention(System):
    """Settings: ``share`` of the uniform distribution; ``matched``, relaxed in use too; ``causal``."""

    slug = "relaxed-attention"
    title = "Relaxed attention"
    paper = "https://arxiv.org/abs/2209.09735"
    code = "https://github.com/freewym/espresso"
    promises = Promises(unit_rows=True)

    def __init__(self, share: float = 0.1, matched: bool = False, causal: bool = True):
        if not 0 <= share <= 1:
            raise SpecError(f"relaxed-attention: share must lie in 0..1; got {share}")
        self.share, self.matched, self.causal = share, matched, causal

    def build(self, heads: int) -> Attention:
        """Softmax, then the mixture."""
        mask = masks.Causal() if self.causal else masks.Full()
        return Attention(mask=mask, edits=[Relax(self.share, self.matched)])

    def claim(self) -> ClaimNumbers:
        """Translation from 256 pairs: loss on others, and what a language model of 20 times the text adds to it."""
        from ...study.trainer import Recipe, Task, compete, labelled

        models: dict[str, Callable[[], nn.Module]] = {
            "softmax": lambda: EncoderDecoder(vocabulary()),
            "encoder": lambda: EncoderDecoder(vocabulary(), attention=RelaxedAttention(causal=False)),
            "cross": lambda: EncoderDecoder(vocabulary(), cross=RelaxedAttention(matched=True, causal=False)),
        }
        held = [told(given) for given in islice(pairs(HELD), 4)]
        recipe = Recipe(steps=160)
        result = compete(models, Task(_few, labelled, lambda: held), recipe)
        external = Task(lambda seed: (told(x)[1::2] for x in pairs(seed + 50)), labelled, lambda: [held[0][1::2]])
        language = compete({"language": lambda: GPT(vocabulary(), layers=2)}, external, replace(recipe, seeds=(0,)))
        fused = {
            name: [_fused(model, language.models["language"][0], held) for model in trained]
            for name, trained in result.models.items()
        }
        less = result.excess("encoder", "softmax")
        more = [a - b for a, b in zip(fused["cross"], fused["softmax"], strict=True)]
        gain = {name: statistics.fmean(values) for name, values in fused.items()}
        return ClaimNumbers.decide(
            result.numbers()
            | {f"fusion_gain_{name}": [round(x, 4) for x in values] for name, values in fused.items()}
            | {"excess_encoder": round(less.mean, 4), "excess_error": round(less.error, 4)},
            f"Relaxed in the encoder, the loss on other sentences differs by {less.mean:+.4f} nats per word (standard"
            f" error {less.error:.4f}) from {result.mean('softmax'):.3f}. An external language model takes"
            f" {gain['cross']:.4f} off where cross-attention is relaxed, {gain['softmax']:.4f} where it is not.",
            regularizes=less.mean < 0,
            language_model_helps_more=statistics.fmean(more) > 0,
        )


def _few(seed: int) -> Iterator[tuple[Tensor, ...]]:
    """The same eight batches over and over."""
    return cycle([told(given) for given in islice(pairs(seed), 8)])


@torch.no_grad()
def _fused(model: nn.Module, language: nn.Module, held: list[tuple[Tensor, ...]]) -> float:
    """By how many nats per word the best fusion ``log p + weight * log p(language model)`` lowers the loss."""
    told_by = [(model(*x[:3]), language(x[1]).log_softmax(-1), x[3]) for x in held]
    cross_entropy = partial(nn.functional.cross_entropy, ignore_index=-100)
    losses = [
        statistics.fmean(
            float(cross_entropy((own.log_softmax(-1) + weight * other).flatten(0, 1), labels.flatten()))
            for own, other, labels in told_by
        )
        for weight in FUSIONS
    ]
    return losses[0] - min(losses)
