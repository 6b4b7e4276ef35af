"""Soft injection: what examples in the prompt make each head say is kept, and mixed in where there are no examples.

With z[l, h] the output of head h of layer l at a prompt's last token:

    embeddings[l, h] = mean of z[l, h] over few-shot prompts                        made once for a task
    z'[l, h] = (1 - mix[l, h]) z[l, h] + mix[l, h] embeddings[l, h]                 mix[l, h] in [0, 1]

mix is learned: the least cross-entropy of the answers to prompts without examples; the model stays as it is.

Paper: Soft Injection of Task Embeddings Outperforms Prompt-Based In-Context Learning, arXiv:2507.20906
Code: none

Differs: only the paper's abstract and the overview of its method (50 prompts of 10 examples each, last token) could be
read here. How it makes mix and optimizes it is not known to us: here sigmoids that begin at one half, and Adam. Each
call's last token is mixed, so those that are decoded too. The tasks are such as a model of bytes can be shown.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...core.errors import SpecError
from ...worlds.letters import shown, tasks
from ..base import ClaimNumbers, MethodSystem
from ..explain._heads import heads, projections

SHOTS, PROMPTS = 10, 50  # of a prompt, and prompts of a task's embeddings
GAIN = 0.1  # over few-shot prompts, on average over the tasks: the least of the paper's


class SoftInjection(MethodSystem):
    """Settings: ``embeddings [layers, H, D]`` (``None``: zeros) and ``mix``, a share or ``[layers, H]``."""

    slug = "soft-injection"
    title = "Soft injection of task embeddings"
    paper = "https://arxiv.org/abs/2507.20906"

    def __init__(self, embeddings: Tensor | None = None, mix: float | Tensor = 0.5):
        self.embeddings, self.mix = embeddings, mix

    def apply(self, model: nn.Module) -> AbstractContextManager[None]:
        """Mix at every call's last token. SpecError: embeddings or mix are of other layers or heads than the model."""
        sites = [site for site, _ in projections(model)]
        shape = (len(sites), sites[0].heads)
        mix = self.mix if isinstance(self.mix, Tensor) else torch.full(shape, self.mix)
        given = torch.zeros(*shape, 1) if self.embeddings is None else self.embeddings
        if mix.shape != shape or given.shape[:2] != shape:
            raise SpecError(
                f"SoftInjection: the model has layers and heads {[*shape]}; got embeddings {[*given.shape]} and"
                f" mix {[*mix.shape]}"
            )
        place = {site.layer: i for i, site in enumerate(sites)}

        def inject(layer: int, z: Tensor) -> Tensor:
            share, into = mix[place[layer]][:, None], given[place[layer]]
            return torch.cat([z[:, :-1], (1 - share) * z[:, -1:] + share * into], 1)

        return heads(model, inject)

    def claim(self) -> ClaimNumbers:
        """Six tasks of one letter: accuracy with no examples, with ten, and with no examples and their embeddings."""
        from ...study import probes

        model = probes.embedded().requires_grad_(False)
        found: dict[str, list[float]] = {}
        for name, task in tasks().items():
            seen = shown(task, SHOTS, PROMPTS, f"{name}/embeddings")
            system = learn(model, embed(model, seen[0]), shown(task, 0, 128, f"{name}/mix"))
            zero, few = (shown(task, shots, 64, f"{name}/test") for shots in (0, SHOTS))
            found[name] = [accuracy(model, *zero), accuracy(model, *few), accuracy(model, *zero, system)]
        zero_shot, few_shot, ours = (fmean(column) for column in zip(*found.values(), strict=True))
        return ClaimNumbers.decide(
            {name: [round(x, 3) for x in each] for name, each in found.items()}
            | {"zero_shot": round(zero_shot, 3), "few_shot": round(few_shot, 3), "injected": round(ours, 3)},
            f"On average over {len(found)} tasks {zero_shot:.1%} of the answers are right without examples,"
            f" {few_shot:.1%} with {SHOTS}, and {ours:.1%} without examples but with their embeddings mixed in.",
            above_few_shot=ours >= few_shot + GAIN,
        )


@torch.no_grad()
def embed(model: Any, prompts: Tensor) -> Tensor:
    """What the heads put out at the last token, mean over prompts ``[B, N]``: ``[layers, H, D]``."""
    seen: list[Tensor] = []
    with heads(model, lambda layer, z: seen.append(z[:, -1].mean(0))):
        model(prompts, use_cache=False, logits_to_keep=1)
    return torch.stack(seen)


def learn(
    model: Any, embeddings: Tensor, shown: tuple[Tensor, Tensor], steps: int = 60, batch: int = 16, rate: float = 0.2
) -> SoftInjection:
    """The mix with which prompts ``[S, N]`` are followed by their answers ``[S]``."""
    prompts, answers = shown
    logits = torch.zeros(embeddings.shape[:2], requires_grad=True)
    solver, source = torch.optim.Adam([logits], rate), torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randperm(len(prompts), generator=source)[:batch]
        with SoftInjection(embeddings, logits.sigmoid()).apply(model):
            said = model(prompts[rows], use_cache=False, logits_to_keep=1).logits[:, -1]
        solver.zero_grad()
        cross_entropy(said, answers[rows]).backward()
        solver.step()
    return SoftInjection(embeddings, logits.detach().sigmoid())


@torch.no_grad()
def accuracy(model: Any, prompts: Tensor, answers: Tensor, system: SoftInjection | None = None) -> float:
    """Share of prompts ``[S, N]`` that the model, with a system applied if there is one, follows by the answer."""
    with (system or SoftInjection(mix=0.0)).apply(model):
        said = model(prompts, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1)
    return float((said == answers).float().mean())
