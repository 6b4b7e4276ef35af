"""ACT (Attention Calibration Technique): take weight from attention sinks beyond the first, give it to other keys.

In a chosen head, with weights w[n, j] and the mean weight of a key over the queries that come after it:

    S        = the keys with mean[j] = sum_n w[n, j] / (N - j) > threshold, without the first of them
    w'[n, j] = beta * w[n, j]                                                       j in S
    w'[n, j] = w[n, j] * (1 + (1 - beta) * sum_S w[n, s] / sum_not-S w[n, s])       elsewhere

Rows still sum to one. Chosen are the heads that, calibrated alone, raise the accuracy on a small calibration set.

Paper: Unveiling and Harnessing Hidden Attention Sinks, arXiv:2406.15765
Code: https://github.com/GATECH-EIC/ACT (models/llama_modelling_aug.py: atten_process_eval; scripts/calibration.sh:
    beta 0.4, threshold 0.1; layers 2 to 30 of 32)

Differs: nothing for a prompt of one text; as in the official code the first key above the threshold is spared, token 0
or not. A row with all its mass on S stays as it is (the official code divides by zero). At a decoding step the official
code takes the mean over that one query and sets the weight of token 0 to one; here the mean goes on over all queries so
far, of one batch of texts at a time. Sinks are known only when all queries have looked, so a layer's attention runs
twice, in tiles; other programs, edits and stats there see the first run. A query's weights depend on later queries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ...core.attend import attention
from ...core.edits import Redistribute
from ...core.errors import SpecError
from ...core.spec import Attention
from ...core.stats import KeyMass
from ...hosts.acts import Call, Site, pick, pick_heads
from ...hosts.handles import Handle, host_of
from ...worlds.text import text
from ..base import ClaimNumbers, MethodSystem, Promises


class ACT(MethodSystem):
    """Settings: ``heads``, the (layer, head) pairs to calibrate (``None``: all); ``beta``; ``threshold``."""

    slug = "act"
    title = "ACT (attention calibration)"
    paper = "https://arxiv.org/abs/2406.15765"
    code = "https://github.com/GATECH-EIC/ACT"
    promises = Promises(training_free=True, needs_training=False, causal=False, decodes=False, unit_rows=True)

    def __init__(self, heads: Sequence[tuple[int, int]] | None = None, beta: float = 0.4, threshold: float = 0.1):
        if not (0 <= beta <= 1 and 0 <= threshold < 1):
            raise SpecError(f"ACT: expected 0 <= beta <= 1 and 0 <= threshold < 1; got {beta} and {threshold}")
        self.heads, self.beta, self.threshold = heads, beta, threshold

    def apply(self, model: nn.Module) -> ExitStack:
        """Calibrate the heads in every forward. Raises SpecError if the model has no such layer or head."""
        layers = [None] if self.heads is None else sorted({layer for layer, _ in self.heads})

        def make(site: Site) -> dict[str, Any]:
            mine = None if self.heads is None else [head for layer, head in self.heads if layer == site.layer]
            return {"stats": [KeyMass()], "see": Calibration(self, pick_heads(site, mine))}

        with ExitStack() as stack:
            for layer in layers:
                stack.enter_context(Handle(model, layer, None, "self", make))
            return stack.pop_all()

    def claim(self) -> ClaimNumbers:
        """The byte that follows 63 of held-out prose: heads chosen on 200 texts, accuracy with and without on 600."""
        from ...study import probes

        model = probes.embedded()
        seen, unseen = prose(64, "calibration", 200), prose(64, "test", 600)
        chosen = choose(model, lambda m: float(right(m, *seen).float().mean()))
        base = right(model, *unseen)
        with ACT(chosen).apply(model):
            ours = right(model, *unseen)
        gained, lost = int((ours & ~base).sum()), int((base & ~ours).sum())
        dense, found = (round(float(x.float().mean()), 4) for x in (base, ours))
        return ClaimNumbers.decide(
            {"heads": [*map(list, chosen)], "accuracy": dense, "calibrated": found, "gained": gained, "lost": lost},
            f"{len(chosen)} heads raise accuracy on the calibration set, each alone. With all of them {found:.1%} of"
            f" {len(base)} other texts are continued correctly, {dense:.1%} without ({gained} gained, {lost} lost).",
            accuracy_up=probes.outweighs(gained, lost),
        )


class Calibration:
    """What happens at one layer: heads (``None``: all) whose sinks are found in one run and lowered in a second."""

    def __init__(self, setting: ACT, heads: tuple[int, ...] | None):
        self.setting, self.heads = setting, heads
        self.begin, self.end = 0, 0  # the queries that the mass counts
        self.mass: Tensor | None = None

    def __call__(self, call: Call, told: dict[str, Tensor]) -> None:
        """Put the calibrated output in the place of the call's."""
        mass, offset, before = told["key_mass"].detach(), call.frame.offset, self.mass
        if before is not None and offset == self.end > 0 and before.shape[:2] == mass.shape[:2]:
            mass = mass + pad(before, (0, mass.shape[2] - before.shape[2]))
        else:
            self.begin = offset
        self.mass, self.end = mass, offset + call.q.shape[2]
        looked = self.end - torch.arange(mass.shape[2], device=mass.device).clamp(min=self.begin)
        sinks = find_sinks(mass, looked, self.setting.threshold)
        if self.heads is not None:
            sinks[:, [h for h in range(sinks.shape[1]) if h not in self.heads]] = False
        program = call.frame.combine(Attention(edits=[take(sinks, self.setting.beta)]))
        call.out.copy_(attention(call.q, call.k, call.v, program, offset=offset))


def find_sinks(mass: Tensor, looked: Tensor, threshold: float) -> Tensor:
    """Keys whose ``mass`` ``[B, H, M]``, by query of ``looked`` ``[M]``, is above the threshold, but for the first."""
    above = mass / looked.clamp(min=1) > threshold
    return above & (above.cumsum(-1) > 1)


def take(sinks: Tensor, beta: float) -> Redistribute:
    """The edit that leaves the sinks (bool ``[B, H, M]``) ``beta`` of their weight and gives the rest to the others."""
    return Redistribute(lambda b, h, q, k: sinks[b, h, k], lambda b, h, q, k: ~sinks[b, h, k], share=1 - beta)


def choose(model: nn.Module, accuracy: Callable[[nn.Module], float], layers: Any = slice(2, -1)) -> list[Any]:
    """The (layer, head) pairs, of ``layers`` as in :func:`saccade.install`, whose calibration alone raises accuracy."""
    best, chosen = accuracy(model), []
    for site in pick(host_of(model).sites(), type(model).__name__, layers, "self"):
        for head in range(site.heads):
            with ACT([(site.layer, head)]).apply(model):
                if accuracy(model) > best:
                    chosen.append((site.layer, head))
    return chosen


def prose(length: int, seed: int | str, count: int) -> tuple[Tensor, Tensor]:
    """Prompts of held-out prose ``[count, length]``, and the byte that follows each ``[count]``."""
    tokens = torch.stack([example.tokens for example in islice(text(length + 1, seed), count)])
    return tokens[:, :-1], tokens[:, -1]


@torch.no_grad()
def right(model: Any, prompts: Tensor, following: Tensor) -> Tensor:
    """Whether a model's next token is the one that follows, ``[B]``."""
    said = [model(part, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1) for part in prompts.split(50)]
    return torch.cat(said) == following
