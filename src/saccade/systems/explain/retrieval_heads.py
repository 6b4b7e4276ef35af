"""Retrieval heads: the few heads that copy what a model recalls from its context, and what it says without them.

While a model answers a needle test, step t gives the token y[t], and head h looks most at the key j:

    score[h] = sum_t [ j = argmax_k w[h, t, k] lies in the needle and x[j] = y[t] ] / len(needle),

averaged over the tests that the model passes (it gives more than half of the needle's tokens, in any order). A head is
a retrieval head if its score is above 0.1. To mask a head is to let it look at all visible keys alike.

Paper: Retrieval Head Mechanistically Explains Long-Context Factuality, arXiv:2404.15574
Code: https://github.com/nightdessert/Retrieval_Head (retrieval_head_detection.py: retrieval_calculate, decode;
    faiss_attn/source/modeling_llama.py: block_list; needle_in_haystack_with_mask.py)

Differs: the paper counts a needle token once however often it is copied, the official code and this every time. The
official code lets a model answer with 50 tokens or a line, here with as many as the needle has: a score is at most 1.
As there, a head is masked at the prompt's last token and all that follow: the last query of every call.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from ...core import edits
from ...core.errors import SpecError
from ...core.stats import Rows
from ...core.tile import At
from ...hosts.handles import watch
from ...worlds.text import Example
from ..base import ClaimNumbers, MethodSystem
from ._heads import Heads, edited, pairs

THRESHOLD = 0.1  # a retrieval head's score is above this
SPARSE, BROKEN, INTACT = 0.05, 0.5, 0.9  # fewer heads than this; recall left without them, and without others


class RetrievalHeads(MethodSystem):
    """Settings: ``heads``, the (layer, head) pairs to mask, such as :func:`retrieval_heads` finds."""

    slug = "retrieval-heads"
    title = "Retrieval heads"
    paper = "https://arxiv.org/abs/2404.15574"
    code = "https://github.com/nightdessert/Retrieval_Head"

    def __init__(self, heads: Heads = ((0, 0),)):
        self.heads = heads

    def apply(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Mask the heads while the model answers. Raises SpecError if the model has no such layer or head."""
        return edited(model, AllAlike(), self.heads)

    def claim(self) -> ClaimNumbers:
        """Scores on needles in 256 to 1024 tokens; recall in 512 without these heads, and without as many others."""
        from ...study import probes
        from ...worlds.recall import needle

        model = probes.embedded()
        scores = retrieval_scores(model, [e for n in (256, 512, 1024) for e in islice(needle(n, "detect"), 12)])
        found = retrieval_heads(scores)
        others = [pair for pair in pairs(scores) if pair not in found]
        tests = list(islice(needle(512, "test"), 48))
        dense, masked = recall(model, tests), recall(model, tests, found)
        draw = random.Random(0)  # other heads for every test, as in the official code
        unharmed = fmean(recall(model, [test], draw.sample(others, min(len(found), len(others)))) for test in tests)
        share = len(found) / scores.numel()
        shares = {"share": share, "recall": dense, "recall_masked": masked, "recall_others_masked": unharmed}
        numbers: dict[str, Any] = {name: round(value, 3) for name, value in shares.items()}
        numbers |= {"heads": [*map(list, found)], "scores": [[round(x, 3) for x in row] for row in scores.tolist()]}
        return ClaimNumbers.decide(
            numbers,
            f"{len(found)} of {scores.numel()} heads ({share:.0%}) score above {THRESHOLD}. Of needles in 512 tokens"
            f" {dense:.0%} are recalled, {masked:.0%} with these heads masked, {unharmed:.0%} with as many others.",
            few_heads=0 < share < SPARSE,
            masking_breaks_recall=masked <= BROKEN * dense,
            other_heads_do_not_matter=unharmed >= INTACT * dense,
        )


class AllAlike(edits.Mix):
    """The last query of a call looks at all its visible keys alike; the queries before it as they do."""

    def __init__(self) -> None:
        super().__init__("uniform", 1.0)

    def forward(self, weights: Tensor, at: At, visible: Tensor | None) -> Tensor:
        return torch.where(at.q == at.n - 1, super().forward(weights, at, visible), weights)


@torch.no_grad()
def retrieval_scores(model: Any, examples: Iterable[Example]) -> Tensor:
    """The score of every head ``[layers, heads]``, from examples' last answers. SpecError: the model gives none."""
    passed = []
    for example in examples:
        answer = example.answers[-1]
        needle = example.tokens[answer.start : answer.stop].tolist()
        with watch(model, Rows([-1]), kind="self", every=True) as watching:
            said = answers(model, [example])[0].tolist()
        if sum((Counter(said) & Counter(needle)).values()) <= len(needle) / 2:
            continue
        steps = [[step["rows"][0, :, 0].argmax(-1) for step in watching[site.path]] for site in watching.sites]
        key = torch.stack([torch.stack(layer) for layer in steps]).cpu()  # [layers, steps, heads]
        inside = (key >= answer.evidence_start) & (key < answer.evidence_stop)
        same = example.tokens[key] == torch.tensor(said)[:, None]
        passed.append((inside & same).sum(1) / len(needle))
    if not passed:
        raise SpecError("the model passes none of the needle tests, so no head can be seen to copy")
    return torch.stack(passed).mean(0)


def retrieval_heads(scores: Tensor, threshold: float = THRESHOLD) -> list[tuple[int, int]]:
    """The (layer, head) pairs whose score is above the threshold, the highest first."""
    ranked = sorted(pairs(scores), key=lambda pair: -float(scores[pair]))
    return [pair for pair in ranked if scores[pair] > threshold]


@torch.no_grad()
def answers(model: Any, examples: Sequence[Example]) -> Tensor:
    """What a model says where each example's last answer stands, in all at one place: ``[B, answer]``, greedily."""
    start, stop = examples[0].answers[-1].start, examples[0].answers[-1].stop
    prompts = torch.stack([e.tokens[:start] for e in examples]).to(model.device)
    greedy = {"max_new_tokens": stop - start, "do_sample": False, "eos_token_id": None}
    return model.generate(prompts, attention_mask=torch.ones_like(prompts), **greedy)[:, start:].cpu()


def recall(model: Any, examples: Sequence[Example], masked: Heads = ()) -> float:
    """Share of the examples whose last answer a model gives in full while some heads are masked."""
    with RetrievalHeads(masked).apply(model):
        said = torch.cat([answers(model, examples[i : i + 8]) for i in range(0, len(examples), 8)])
    wanted = torch.stack([e.tokens[e.answers[-1].start : e.answers[-1].stop] for e in examples])
    return float((said == wanted).all(-1).float().mean())
