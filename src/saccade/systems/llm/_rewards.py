"""A small model that learns by rewards on a recall task."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from ..explain._prompts import NEW, ask

if TYPE_CHECKING:
    from .preplan_anchor import Credit, PreplanAnchor


def reinforced(
    system: PreplanAnchor, kind: Credit, seed: int, steps: int = 15, prompts: int = 8, answers: int = 4
) -> float:
    """Accuracy of lm-tiny on recalled variables after steps of policy gradient, each of prompts and sampled answers."""
    from ...study.probes import embedded

    model = embedded("lm-tiny")
    solver = torch.optim.Adam(model.parameters(), 3e-4)
    torch.manual_seed(seed)
    size = 4  # digits of an answer
    for step in range(steps):
        asked = ask(NEW, prompts, 32, seed=1000 * seed + step)
        several = asked.tokens.repeat_interleave(answers, 0)
        said = model.generate(
            several, attention_mask=torch.ones_like(several), do_sample=True, top_k=0, max_new_tokens=size,
            eos_token_id=None,
        )  # fmt: skip
        reward = (said[:, -size:] == asked.answers.repeat_interleave(answers, 0)).all(1).float().view(prompts, answers)
        advantage = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-6)
        with system.apply(model) as watching:
            logits = model(said, use_cache=False).logits[:, -size - 1 : -1]
        waad, fai = (x[:, -size:].detach() for x in system.rhythm(watching))
        losses = cross_entropy(logits.transpose(1, 2), said[:, -size:], reduction="none")
        solver.zero_grad()
        (losses * system.credit(waad, fai, kind) * advantage.view(-1, 1)).mean().backward()
        solver.step()
    tests = ask(NEW, 128, 32, seed=-1)
    with torch.no_grad():
        said = model.generate(
            tests.tokens, attention_mask=torch.ones_like(tests.tokens), do_sample=False, max_new_tokens=size,
            eos_token_id=None,
        )  # fmt: skip
    return float((said[:, -size:] == tests.answers).all(1).float().mean())
