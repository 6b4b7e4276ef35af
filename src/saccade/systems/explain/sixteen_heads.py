"""Sixteen heads: how important each head is, heads removed in that order, and a model from which they really are gone.

    importance[h] = mean over tokens of |head[h] . d loss / d head[h]|,   divided by the length of its layer's
    ablation[h]   = the score with head h silent
    pruning       the least important heads first, one head of each layer always stays

A silent head's output is zero before the layer's output projection; removed, its projections' rows and columns are cut.

Paper: Are Sixteen Heads Really Better than One?, arXiv:1905.10650
Code: https://github.com/pmichel31415/are-16-heads-really-better-than-1 (experiments/BERT/heads_ablation.sh,
    heads_pruning.sh; they run examples/pruning.py and classifier_eval.py of the author's pytorch-pretrained-BERT)

Differs: the paper's importance takes the absolute value once for each input, the official code, as here, for each token
of it. Where query heads share key heads and no longer as many each, every query head gets its own copy of its keys.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import SpecError
from ..base import ClaimNumbers, MethodSystem
from ._heads import Heads, heads, pairs, refuse_others
from ._removed import removed

LENGTH, TEXTS = 256, 24
SAME = 0.01  # of the score: a drop by less is not noticeable
SPARE = 0.2  # of all heads can go without one (the paper: 20% of a translation model's, 40% of BERT's)
CERTAIN = 2.58  # standard errors, p < 0.01 as in the paper


class SixteenHeads(MethodSystem):
    """Settings: ``heads``, the (layer, head) pairs that are silent."""

    slug = "sixteen-heads"
    title = "Are sixteen heads really better than one?"
    paper = "https://arxiv.org/abs/1905.10650"
    code = "https://github.com/pmichel31415/are-16-heads-really-better-than-1"

    def __init__(self, heads: Heads = ((0, 0),)):
        self.heads = heads

    def apply(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Silence the heads. Raises SpecError if the model has no such layer or head."""
        refuse_others(model, self.heads)
        silent = list(self.heads)

        def silence(layer: int, z: Tensor) -> Tensor | None:
            mine = [head for at, head in silent if at == layer]
            return z.index_fill(2, torch.tensor(mine, device=z.device), 0) if mine else None

        return heads(model, silence)

    @torch.no_grad()
    def claim(self) -> ClaimNumbers:
        """Prose read by the embedded model: each head silent alone, more and more of them, half of them removed."""
        from ...study import probes
        from ...study.claims import interleaved
        from ...worlds.text import text

        model = probes.embedded()
        tuning, tests = (
            torch.stack([example.tokens for example in islice(text(LENGTH, seed), TEXTS)]) for seed in ("heads", "test")
        )
        dense = right(model, tests)
        order = ranked(importance(model, tuning.split(4)))
        matters = 0
        for pair in order:
            with SixteenHeads([pair]).apply(model):
                drop = dense - right(model, tests)
            matters += bool(drop.mean() > CERTAIN * drop.std() / len(drop) ** 0.5)
        curve = {}
        for tenth in range(1, 10):
            gone = spared(order, tenth / 10)
            with SixteenHeads(gone).apply(model):
                curve[len(gone) / len(order)] = float(right(model, tests).mean())
        half = removed(model, spared(order, 0.5))
        prompt = next(text(2048, "speed")).tokens[None]
        prefill = {"use_cache": False, "logits_to_keep": 1}
        work = {name: partial(one, prompt, **prefill) for name, one in (("all", model), ("half", half))}
        faster = interleaved(work, 5).ratio("all", "half")
        score = float(dense.mean())
        kept = [share for share, found in curve.items() if found >= score * (1 - SAME)]
        numbers = {
            "score": round(score, 4),
            "curve": {f"{share:.2f}": round(found, 4) for share, found in curve.items()},
            "matter_alone": matters,
            "spare": round(max(kept, default=0.0), 2),
            "half_is_faster": round(faster, 2),
        }
        return ClaimNumbers.decide(
            numbers,
            f"Of {len(order)} heads {matters} lower the share of right next bytes ({score:.1%}) when they alone are"
            f" silent; {numbers['spare']:.0%} can be silent at once within {SAME:.0%} of it. With half of them gone a"
            f" prefill of 2048 tokens is {faster:.2f} times as fast.",
            most_heads_do_not_matter_alone=matters < len(order) / 2,
            many_can_go_together=max(kept, default=0.0) >= SPARE - 1 / len(order),
            removal_is_faster=faster > 1.05,
        )


def importance(model: Any, batches: Iterable[Tensor]) -> Tensor:
    """Of every head ``[layers, heads]``, for the loss of a language model on token ids ``[B, N]``."""
    total: Tensor | None = None
    for tokens in batches:
        seen: list[Tensor] = []

        def keep(layer: int, z: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(z)
            return z

        with torch.enable_grad(), heads(model, keep):
            logits = model(tokens, use_cache=False).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        grads = torch.autograd.grad(loss, seen)
        found = torch.stack([(z * g).sum(-1).abs().sum((0, 1)) for z, g in zip(seen, grads, strict=True)]).detach()
        total = found if total is None else total + found
    if total is None:
        raise SpecError("importance: expected at least one batch of tokens, got none")
    return total / total.norm(dim=1, keepdim=True).clamp(min=1e-20)


def ranked(scores: Tensor) -> list[tuple[int, int]]:
    """All (layer, head) pairs, the least important first."""
    return sorted(pairs(scores), key=lambda pair: float(scores[pair]))


def spared(order: Heads, share: float) -> list[tuple[int, int]]:
    """The first pairs of an order, a share of all; the last one of each layer stays."""
    stays = {layer: (layer, head) for layer, head in order}
    free = [pair for pair in order if pair not in stays.values()]
    return free[: round(share * len(order))]


@torch.no_grad()
def right(model: Any, texts: Tensor) -> Tensor:
    """Share of right next tokens in each of ``[B, N]``."""
    said = torch.cat([model(some, use_cache=False).logits[:, :-1].argmax(-1) for some in texts.split(4)])
    return (said == texts[:, 1:]).double().mean(1)
