"""Magic words: which next tokens a short prompt can bring about, and what no prompt can make self-attention put out.

A language model is a system, the tokens x its state, the k tokens u in front of them its control input, and y is
reachable if some u makes it the likeliest next token. Greedy search, from the back:

    u = [v, *u]   with the token v for which the loss of y after [*u, *x] is least, until y is the likeliest

The k-epsilon curve: the share of y that no prompt of at most k tokens was found for. And for one head of self-attention
over [u, x], where no row of u is longer than M and none of x longer than X, with s the greatest singular value:

    g[i] = sum_j exp(x[i] Wq . x[j] Wk / sqrt(D)),    t = k exp(s(Wq) s(Wk) M X / sqrt(D))
    |part of out[i] that is orthogonal to out[i] without u| <= M s(Wv) t / (g[i] + t)

Paper: What's the Magic Word? A Control Theory of LLM Prompting, arXiv:2310.04444
Code: https://github.com/amanb2000/Magic_Words (magic_words/backoff_hack_qa.py, magic_words/prompt_hack.py)

Differs: only the paper's abstract could be read here, and the bound was derived anew from what it names: with u the
output is (1 - c) out + c * (a mean of u Wv), c the weight of u, which is at most t / (g + t). From four tokens on the
official code searches by gradients (GCG), for a vocabulary of 50,000; over 256 bytes the greedy search just goes on.
Prompts come after the token that begins a text. The 75 likeliest are of 259 tokens, not of tens of thousands.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ...core.errors import SpecError
from ...worlds.text import text
from ..base import ClaimNumbers, MethodSystem
from ._control import attention_of, tightness

REACHED, REACHED_LIKELY = 0.97, 0.85  # of true next tokens, and of the 75 likeliest, within 10 tokens
LIKELY = 75

Search = Callable[[Tensor, int], list[int] | None]


class MagicWord(MethodSystem):
    """Settings: ``longest``, the tokens of a prompt at most; ``among``, how many token ids it may have, from 0."""

    slug = "magic-word"
    title = "Magic words: control theory of prompting"
    paper = "https://arxiv.org/abs/2310.04444"
    code = "https://github.com/amanb2000/Magic_Words"

    def __init__(self, longest: int = 10, among: int = 256):
        if longest < 0 or among < 1:
            raise SpecError(f"MagicWord: expected longest >= 0 and among >= 1; got {longest} and {among}")
        self.longest, self.among = longest, among

    @contextmanager
    def apply(self, model: Any) -> Iterator[Search]:
        """A search for the prompt that makes ``y`` follow a state ``x [N]``: its tokens, or ``None``; see above."""
        size = min(self.among, model.config.get_text_config().vocab_size)

        @torch.no_grad()
        def search(x: Tensor, y: int) -> list[int] | None:
            first, rest, tried = x[:1], x[1:], torch.arange(size)[:, None]
            prompt: list[int] = []
            logits = model(x[None], use_cache=False, logits_to_keep=1).logits[0, -1]
            while logits.argmax() != y and len(prompt) < self.longest:
                after = torch.cat([torch.tensor(prompt, dtype=torch.int64), rest]).expand(size, -1)
                asked = torch.cat([first.expand(size, 1), tried, after], 1)
                every = model(asked, use_cache=False, logits_to_keep=1).logits[:, -1]
                best = int(every.log_softmax(-1)[:, y].argmax())
                prompt, logits = [best, *prompt], every[best]
            return prompt if logits.argmax() == y else None

        yield search

    def claim(self) -> ClaimNumbers:
        """Prompts for bytes that follow 16 of prose, true ones and likely ones; and the bound in every head."""
        from transformers import AutoModelForCausalLM

        from ...zoo import path

        model = AutoModelForCausalLM.from_pretrained(path("lm-tiny"), dtype=torch.float32).eval()
        states, rng = [e.tokens for e in islice(text(18, "magic"), 32)], random.Random(0)
        lengths: dict[str, list[float]] = {"true": [], "likely": []}
        with self.apply(model) as search:
            for state in states:
                with torch.no_grad():
                    ranked = model(state[None, :-1]).logits[0, -1].argsort(descending=True)[:LIKELY]
                for name, y in (("true", int(state[-1])), ("likely", int(ranked[rng.randrange(LIKELY)]))):
                    found = search(state[:-1], y)
                    lengths[name].append(math.inf if found is None else len(found))
        curves = {
            name: [round(fmean(n > k for n in each), 3) for k in range(self.longest + 1)]
            for name, each in lengths.items()
        }
        ratios = torch.cat([tightness(*head, control=4) for head in attention_of(model, states[0])])
        true, likely = (1 - curve[-1] for curve in curves.values())
        return ClaimNumbers.decide(
            {f"epsilon_{name}": curve for name, curve in curves.items()}
            | {"of_the_bound": round(float(ratios.max()), 4), "rows": len(ratios)},
            f"Within {self.longest} bytes a prompt is found for {true:.0%} of true next bytes, and for {likely:.0%} of"
            f" bytes drawn from the {LIKELY} likeliest. In {len(ratios)} rows of all heads four control tokens, found"
            f" by gradients, reach at most {ratios.max():.0%} of the bound.",
            true_bytes_reachable=true >= REACHED,
            likely_bytes_reachable=likely >= REACHED_LIKELY,
            bound_holds=float(ratios.max()) <= 1 + 1e-5,
        )
