"""DeCoRe: decoding by the contrast between a model and itself without its retrieval heads.

At the last position of every call, p the model's distribution and p' that of the model with its retrieval heads masked:

    log q  =  (1 + alpha) log p  -  alpha log p'        alpha = -sum_x p(x) log p(x), in nats

What the retrieval heads bring in from the context is amplified, the more so the less sure the model is. The masked
branch has a cache of its own: once it answers, its keys and values are those of the masked model.

Paper: DeCoRe: Decoding by Contrasting Retrieval Heads to Mitigate Hallucinations, arXiv:2410.18860
Code: https://github.com/aryopg/decore (src/models/decore_entropy.py: generate_self_contrast;
    src/utils/modelling_llama.py: block_list)

Differs: nothing in the formula. The paper masks a head by zero output; the official code lets it look at all keys
alike, and so does this. The code's caps and scales of alpha (off by default) and its smaller model for the masked
branch are left out. The masked branch reads the prompt itself instead of copying the model's cache: the same, for heads
are masked from the prompt's last token on. The official lm_score masks the prompt too; here, as in its generation, the
last position is contrasted, and the others keep the model's own log p. Not for beam search, which reorders one cache.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...worlds.text import Answer, Example, encode, heldout, window
from ..base import ClaimNumbers, MethodSystem
from ..explain.retrieval_heads import Heads, RetrievalHeads, retrieval_heads, retrieval_scores


class DeCoRe(MethodSystem):
    """Settings: ``heads``, the (layer, head) pairs to mask, such as ``retrieval_heads`` finds."""

    slug = "decore"
    title = "DeCoRe"
    paper = "https://arxiv.org/abs/2410.18860"
    code = "https://github.com/aryopg/decore"

    def __init__(self, heads: Heads = ((0, 0),)):
        self.heads = heads

    @contextmanager
    def apply(self, model: nn.Module) -> Iterator[None]:
        """Contrast every forward of a causal language model, also in ``generate``. SpecError: there is no such head."""
        masking = RetrievalHeads(self.heads)
        twins: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # the masked branch's cache for each of the model's
        masked: list[Any] = []  # what the masked branch says to the call that is under way

        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            cache = kwargs.get("past_key_values")
            if cache is not None:
                if cache not in twins:
                    twins[cache] = copy.deepcopy(cache)
                kwargs = kwargs | {"past_key_values": twins[cache]}
            with masking.apply(model):
                masked.append(module.forward(*args, **kwargs))

        def after(module: Any, args: tuple[Any, ...], output: Any) -> None:
            other = masked.pop()
            if output.past_key_values is not None:
                twins[output.past_key_values] = other.past_key_values
            output.logits = contrast(output.logits, other.logits)

        with masking.apply(model):
            pass  # heads that are not there are refused before the first call
        hooks = [model.register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def claim(self) -> ClaimNumbers:
        """One-letter changes to held-out prose, in a string to be copied: how often is the changed letter said?"""
        from ...study import probes
        from ...worlds.recall import needle

        model = probes.embedded()
        heads = retrieval_heads(retrieval_scores(model, islice(needle(256, "detect"), 24)))
        tests = list(islice(counterfactuals(256, "test"), 400))
        prompts = torch.stack([example.tokens for example, _ in tests])
        context = torch.tensor([int(e.tokens[e.answers[0].evidence_start]) for e, _ in tests])
        prior = torch.tensor([original for _, original in tests])
        base = _say(model, prompts)
        with DeCoRe(heads).apply(model):
            ours = _say(model, prompts)
        gained = int(((ours == context) & (base != context)).sum())
        lost = int(((ours != context) & (base == context)).sum())
        faithful, recited = ([float((x == y).float().mean()) for x in (base, ours)] for y in (context, prior))
        return ClaimNumbers.decide(
            {"faithful": round(faithful[0], 4), "faithful_decore": round(faithful[1], 4)}
            | {"recited": round(recited[0], 4), "recited_decore": round(recited[1], 4)}
            | {"gained": gained, "lost": lost, "heads": [*map(list, heads)]},
            f"Of {len(tests)} letters changed in prose to be copied the model says {faithful[0]:.1%}, with DeCoRe"
            f" {faithful[1]:.1%} ({gained} gained, {lost} lost); the original letter in {recited[0]:.1%} and"
            f" {recited[1]:.1%}.",
            faithfulness_up=probes.outweighs(gained, lost),
        )


def contrast(base: Tensor, masked: Tensor) -> Tensor:
    """``(1 + alpha) log p - alpha log p'`` from two models' logits ``[..., V]``, alpha the entropy of the first."""
    ours, theirs = base.log_softmax(-1), masked.log_softmax(-1)
    alpha = torch.special.entr(ours.exp()).sum(-1, keepdim=True)
    return (1 + alpha) * ours - alpha * theirs


def counterfactuals(length: int, seed: int | str) -> Iterator[tuple[Example, int]]:
    """Prose with one letter changed, to be said again, and the letter that English would have there.

    tokens ``[length]`` end right before the changed letter, which is the answer to give.
    """
    size, at = 32, 24  # of the string, and of the changed letter in it
    rng = random.Random(f"counterfactuals/{seed}")
    page = heldout()
    while True:
        said = bytearray(window(page, size, rng))
        original = said[at]
        if not said[at - 2 : at + 2].isalpha() or not said[at - 2 : at + 2].islower() or b"\n" in said:
            continue
        said[at] = rng.choice([x for x in range(ord("a"), ord("z") + 1) if x != original])
        head, tail = b"\nCopy: " + said + b".\n", b"\nCopy: " + said[:at]
        filler = window(page, length - 1 - len(head) - len(tail), rng)
        cut = rng.randint(0, len(filler))
        tokens = encode(filler[:cut] + head + filler[cut:] + tail)
        evidence = 1 + cut + len(b"\nCopy: ") + at
        yield Example(tokens, (Answer(length, length + 1, evidence, evidence + 1),)), original


@torch.no_grad()
def _say(model: Any, prompts: Tensor) -> Tensor:
    """The token said after each prompt, ``[B]``."""
    return torch.cat([model(part, logits_to_keep=1).logits[:, -1].argmax(-1) for part in prompts.split(16)])
