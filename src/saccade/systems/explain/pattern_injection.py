"""Pattern injection: what heads of a trained model were seen to do is built into heads of a new one.

    relevance(head, P) = mean over queries i, and texts, of  sum over j of w[i, j] [P(i, j)]
    a pattern P is discovered if that of some head is large enough

    head of an offset o ("-1", "+1")       w[i, j] = [j = i + o]                    fixed: nothing is compared
    head of "same" (equal tokens, j != i)  w[i] = softmax of the scores over the keys with P(i, j)
    head of "segment" (one sentence)       the same; separators end a segment
    a query without such a key, and the other heads: softmax over all keys

Paper: Human Guided Exploitation of Interpretable Attention Patterns in Summarization and Topic Segmentation,
    arXiv:2112.05364
Code: https://github.com/raymondzmc/Attention-Pattern-Exploitation (models/summarization.py: get_dynamic_mask;
    models/encoders/modeling_bert.py; what is injected is its -match_token_attn mask -inter_sent_attn mask
    -positional_attn synthesize)

Differs: a query at a text's end without the neighbour of its offset looks at all keys by its own scores, where the
official code makes it look at them alike; its offset of 2 is both neighbours. The human who names a head's pattern is a
list of patterns, each measured on every head; relevance is not corrected for chance, so one that covers most keys is
always relevant. Patterns in PALs, beside a model's own attention, are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ...core import masks
from ...core.attend import weights
from ...core.errors import SpecError
from ...core.spec import Attention
from ...core.tile import At
from ...nn import Encoder, MultiHead
from ...nn.attention import padded
from ..base import ClaimNumbers, Promises, System
from ..score._regularized import Parser, parsed
from ._injected import CONTENT, Injected, follow, pattern

CANDIDATES = ("-2", "-1", "+1", "+2", *CONTENT)
RELEVANT = 0.3  # share of its weight that a discovered head gives to the pattern
MOST = 3  # patterns that the claim injects in its four heads


class PatternInjection(System):
    """Settings: ``patterns``, one for each head from the first on; ``copies`` of them; ``separators``; ``causal``.

    Where :func:`follow` does not tell the tokens, heads of "same" and "segment" look at all keys.
    """

    slug = "pattern-injection"
    title = "Injected attention patterns"
    paper = "https://arxiv.org/abs/2112.05364"
    code = "https://github.com/raymondzmc/Attention-Pattern-Exploitation"
    promises = Promises(unit_rows=True)

    def __init__(
        self, patterns: Sequence[str] = ("same", "segment", "+1", "-1"), copies: int = 1,
        separators: Sequence[int] = (), causal: bool = True,
    ):  # fmt: skip
        self.patterns, self.copies, self.separators, self.causal = patterns, copies, separators, causal

    def build(self, heads: int) -> Attention:
        """Softmax, with patterns in the first heads. Raises SpecError: there are more patterns than heads."""
        if len(self.patterns) * self.copies > heads:
            raise SpecError(f"{self}: {len(self.patterns) * self.copies} heads are asked for, of {heads}")
        mask = masks.Causal() if self.causal else masks.Full()
        return Attention(mask=mask, edits=[Injected(self.patterns, self.copies, self.separators)])

    def claim(self) -> ClaimNumbers:
        """Patterns of an encoder that names each word's head, injected in a new one: accuracy of both."""
        from ...study.trainer import Recipe, Task, accuracy, compete, labelled
        from ...worlds.grammar import words

        plain = partial(Parser, partial(layer, PatternInjection((), causal=False)))
        task = Task(parsed, labelled, lambda: islice(parsed(999), 6), accuracy, "accuracy")
        teacher = compete({"teacher": plain}, task, Recipe(steps=200, seeds=(9,))).models["teacher"][0]
        separators = (words()["and0"],)
        seen = discover(teacher.encoder, next(parsed(998))[0], separators)
        found = tuple(sorted((p for p in seen if seen[p] >= RELEVANT), key=lambda p: -seen[p])[:MOST])
        injected = partial(Parser, partial(layer, PatternInjection(found, 1, separators, causal=False)))
        result = compete({"plain": plain, "injected": lambda: follow(injected())}, task, Recipe(steps=120))
        gain = result.excess("injected", "plain")
        return ClaimNumbers.decide(
            result.numbers()
            | {f"relevance {name}": round(value, 3) for name, value in seen.items()}
            | {"patterns": list(found), "gain": [round(x, 4) for x in gain]},
            f"Heads of a trained encoder show the patterns {', '.join(found) or 'none'}. After 120 steps a new one with"
            f" them names {result.mean('injected'):.1%} of the heads of words, one without {result.mean('plain'):.1%}"
            f" (standard error of the difference {gain.error:.1%}).",
            patterns_are_found=bool(found),
            more_accurate=gain.above,
        )


def layer(system: PatternInjection, place: Any) -> nn.Module:
    """Multi-head attention with the patterns of a system."""
    return MultiHead(system.build(place.heads), place.width, place.heads, positions=place.positions)


@torch.no_grad()
def discover(encoder: Encoder, tokens: Tensor, separators: Sequence[int] = ()) -> dict[str, float]:
    """Of each candidate the relevance for the head that shows it most, on texts ``[B, N]`` (0: padding)."""
    x, keep, found = encoder.embed(tokens), tokens != 0, dict.fromkeys(CANDIDATES, 0.0)
    blocks: Any = encoder.stack.blocks
    for block in blocks:
        q, k, _ = block.attention.placed(block.before(x))
        seen = weights(q, k, padded(block.attention.spec, keep))
        for name, most in found.items():
            found[name] = max(most, *relevance(seen, name, tokens, separators).tolist())
        x = block(x, keep=keep)
    return found


def relevance(seen: Tensor, name: str, tokens: Tensor, separators: Sequence[int] = ()) -> Tensor:
    """Share of the weights ``[B, H, N, N]`` that lies on a pattern, for each head; over queries with such a key."""
    batch, heads, n, m = seen.shape
    at = At.everywhere(batch, heads, n, m, 0, True, seen.device)
    where = pattern(name, at, tokens, separators)
    assert where is not None
    keep = tokens != 0
    where = where & keep[:, None, None] & keep[:, None, :, None]
    rows = where.any(-1)
    mass = torch.where(where, seen, 0).sum(-1) * rows
    return mass.sum((0, 2)) / rows.expand_as(mass).sum((0, 2)).clamp(min=1)
