"""Loss of context awareness: a chat template turns a tuned model away from the user's text; steering turns it back.

At the keys of the prompt that are not the user's (the template, the answer's beginning), in chosen heads:

    w'[n, j] = s[j] * w[n, j] / sum_k s[k] * w[n, k]     s = alpha at those keys, 1 at the user's and at generated ones

Tuning can keep the use of context: its examples are told apart by how much a tuned model looks at the user's tokens,

    score = mean over the answer's tokens n of max over the heads h of sum over the user's tokens j of w[h, n, j],

in one layer. Requests whose score is high get an indicator, " [IND]", at their end; a model so tuned uses the context
when the indicator tells it to.

Paper: On the Loss of Context-awareness in General Instruction Fine-tuning, arXiv:2411.02688
Code: https://github.com/YihanWang617/context_awareness (UserSteeredWrapper.py; PASTA/pastalib/pasta.py:
    edit_multisection_attention; analyse_dataset/utils.py: get_batch_user_attention; process_dataset.py: modify_prompt)

Differs: the equation holds in every layer. The official code, told to steer whole layers, adds log alpha in place to
the one mask that all layers share: the n-th of them multiplies by alpha ** n, layers after the last of them go on so.
There, of several user turns each is scaled for every other. Newlines in the user's text count as the user's. Layer 15
of TinyLlama's 22 becomes the same depth of another model, and a score is high among the highest tenth, as many as need
the context (official: above 0.6, where here all examples lie). What the model knows by itself it learns in the tuning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ...core.edits import Renormalize, Scale
from ...core.errors import SpecError
from ...core.stats import RegionMass
from ...hosts.handles import edit, watch
from ...worlds.text import heldout
from ..base import ClaimNumbers, MethodSystem
from ._chat import ANSWER, DIGITS, INDICATOR, NEEDS, USER, looking, more, needles, pairs, right, tune

DEPTH = 15 / 22  # of the layer whose attention is the score


class ContextAwarenessLoss(MethodSystem):
    """Settings: ``around``, ``alpha``, ``heads``.

    around: where the prompt's tokens stand that are not the user's, as the regions of :func:`saccade.edit` say it; the
        default is an example, a template of eight tokens in front.
    alpha: what their weights are multiplied by. heads: by layer those to steer, ``None``: all; ``None``: all layers'.
    """

    slug = "context-awareness-loss"
    title = "Loss of context awareness"
    paper = "https://arxiv.org/abs/2411.02688"
    code = "https://github.com/YihanWang617/context_awareness"

    def __init__(
        self, around: Any = slice(0, 8), alpha: float = 0.9, heads: Mapping[int, Sequence[int] | None] | None = None
    ):
        if not 0 < alpha <= 1:
            raise SpecError(f"ContextAwarenessLoss: expected 0 < alpha <= 1, the less the stronger; got {alpha}")
        self.around, self.alpha, self.heads = around, alpha, heads

    def apply(self, model: nn.Module) -> ExitStack:
        """Steer every forward towards the user's tokens. Raises SpecError if the model has no such layer or head."""
        steer, regions = (Scale(self.alpha, keys="around"), Renormalize()), {"around": self.around}
        places: Mapping[Any, Any] = {None: None} if self.heads is None else self.heads
        with ExitStack() as stack:
            for layer, heads in places.items():
                stack.enter_context(edit(model, *steer, layers=layer, heads=heads, regions=regions))
            return stack.pop_all()

    def claim(self) -> ClaimNumbers:
        """Needles in 160 bytes, raw and in a template, of a model tuned to answer from memory; steered; told."""
        from ...study.probes import auroc, embedded

        base = embedded("lm-tiny")
        page = heldout()
        ours, theirs = page[: len(page) // 2], page[len(page) // 2 :]
        examples, asked = list(islice(pairs("tune", ours), 1000)), needles("test", theirs, 400)
        needs, known = torch.tensor([p.needs for p in examples]), [p for p in examples if not p.needs][:200]
        raw, chat, told = (torch.stack([p.tokens(form) for p in asked]) for form in (b"", USER, INDICATOR))
        plain, users = [p.tokens() for p in examples], torch.stack([p.users() for p in examples])
        tuned = tune(base, plain)
        parts = zip(torch.stack(plain).split(100), users.split(100), strict=True)
        scores = torch.cat([score(tuned, *part) for part in parts])
        high = scores > scores.quantile(1 - NEEDS)
        conditional = tune(base, [p.tokens(INDICATOR if h else USER) for p, h in zip(examples, high, strict=True)])

        around = ~asked[0].users()
        around[-DIGITS:] = False  # generated, not prompted
        tries = torch.stack([p.tokens() for p in needles("choose", ours, 100)])
        found = {a: right(tuned, tries, ContextAwarenessLoss(around, a)) for a in (0.9, 0.7, 0.5, 0.3, 0.1, 0.01)}
        alpha = max(found, key=lambda a: int(found[a].sum()))
        said = {
            "untuned": right(base, chat), "raw": right(tuned, raw), "template": right(tuned, chat),
            "steered": right(tuned, chat, ContextAwarenessLoss(around, alpha)),
            "conditional": right(conditional, chat), "told": right(conditional, told),
        }  # fmt: skip
        memory = torch.stack([p.tokens() for p in known])
        said |= {"memory": right(tuned, memory), "memory_conditional": right(conditional, memory)}
        share = {name: round(float(x.float().mean()), 3) for name, x in said.items()}
        without, within = looking(tuned, asked)
        left, looks = without - within, [round(float(x.mean()), 3) for x in (without, within)]
        return ClaimNumbers.decide(
            share
            | {"alpha": alpha, "attention_to_user": looks}
            | {"score_auroc": round(auroc(scores, needs), 3), "needy_indicated": int((high & needs).sum())}
            | {"needy": int(needs.sum()), "indicated": int(high.sum()), "lowest_score": round(float(scores.min()), 3)},
            f"Tuned to answer from memory, the model finds {share['raw']:.1%} of needles without the template,"
            f" {share['template']:.1%} with it, {share['steered']:.1%} steered (alpha {alpha}); tuned with indicators,"
            f" {share['conditional']:.1%}, and {share['told']:.1%} when told. The head that looks most at the user"
            f" gives {looks[0]:.1%} without the template, {looks[1]:.1%} with it. Of {int(needs.sum())} examples that"
            f" need their context {int((high & needs).sum())} are among the {int(high.sum())} indicated.",
            template_lowers_context_use=more(said["raw"], said["template"]),
            attention_leaves_the_user=float(left.mean()) > 2 * float(left.std()) / len(left) ** 0.5,
            steering_recovers=more(said["steered"], said["template"]),
            indicator_recovers=more(said["told"], said["template"]),
            memory_is_kept=not more(said["memory"], said["memory_conditional"]),
        )


@torch.no_grad()
def score(model: Any, tokens: Tensor, users: Tensor, answer: int = ANSWER) -> Tensor:
    """How much the last ``answer`` of ``tokens [B, N]`` look at the user's (bool ``[B, N]``): ``[B]``, 0 to 1."""
    layer = round(DEPTH * model.config.num_hidden_layers)
    with watch(model, RegionMass({"user": "user"}), layers=layer, regions={"user": users}) as seen:
        model(tokens, use_cache=False, logits_to_keep=1)
    return seen[layer]["region_mass"]["user"].amax(1)[:, -answer:].mean(1)
