"""Context knob: one direction of the stream at which a model decides between its context and what it knows.

At the last token, after one layer, with h the state and u of length one:

    h' = h + (value - u . h) u                                        the knob, set to a value
    h' = h + (u . source - u . h) u                                   how u is found: DAS, with one dimension

u is trained so that a question that asks for the context's answer, given the state of another question that asks for
the model's own, is answered with the model's own, and the other way round. The model was fine-tuned to be told which is
wanted; ``value`` is the mean of u . h where it was told so.

Paper: Controllable Context Sensitivity and the Knob Behind It, arXiv:2411.07404
Code: https://github.com/kdu4108/context-vs-prior-finetuning (analysis/circuit_utils/steering.py: SteerHook;
    analysis/circuit_utils/das.py: compute_loss)

Differs: the embedded model's knowledge is spelling. A letter in prose is changed, then the prose said again: the
context has the changed letter, English the other. What tells which is wanted is a word before it. The layer is the
first where the state at the last token that belongs to the other word turns most answers around; the paper narrows
layers down with more care. The official code sets the last token's state at every call, also while decoding; so does
this.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from ...core.errors import SpecError
from ..base import ClaimNumbers, MethodSystem
from ._stream import replaced, state
from ._told import CONTEXT, CUES, NEITHER, PRIOR, Questions, shares, teach

SOLVED = 0.85  # of both kinds, once fine-tuned: the least of the paper's
STEERED = 0.5  # of the questions, with the knob at either end


class ContextKnob(MethodSystem):
    """Settings: ``direction [width]`` (``None``: all dimensions alike), ``value``, ``layer``."""

    slug = "context-knob"
    title = "Context knob"
    paper = "https://arxiv.org/abs/2411.07404"
    code = "https://github.com/kdu4108/context-vs-prior-finetuning"

    def __init__(self, direction: Tensor | None = None, value: float | Tensor = 6.0, layer: int = -1):
        self.direction, self.value, self.layer = direction, value, layer

    @contextmanager
    def apply(self, model: Any) -> Iterator[None]:
        """Set the knob at every call's last token. Raises SpecError: no such layer, or a direction of another width."""
        width = model.config.get_text_config().hidden_size
        given = torch.ones(width) if self.direction is None else self.direction
        if given.shape != (width,):
            raise SpecError(f"ContextKnob: expected a direction [{width}], as the model is wide; got {[*given.shape]}")
        u = normalize(given, dim=0)
        with replaced(model, self.layer, lambda h: h + (torch.as_tensor(self.value) - h @ u)[:, None] * u):
            yield

    def claim(self) -> ClaimNumbers:
        """The model learns to be told; its knob set against what it is told; and the same in the untaught model."""
        from ...study import probes

        base, taught = probes.embedded(), probes.embedded()
        seen, new = Questions.of(base, 480, "taught"), Questions.of(base, 64, "asked")
        teach(taught, seen)
        solved = {cue: shares(taught, new, cue)[cue == PRIOR] for cue in (CONTEXT, PRIOR)}
        layer, u, values = find(taught, seen[slice(160)])
        knobs = {cue: ContextKnob(u, values[cue], layer) for cue in (CONTEXT, PRIOR)}
        steered, untaught = ({cue: shares(m, new, NEITHER, knobs.get(cue)) for cue in CUES} for m in (taught, base))
        against = shares(taught, new, PRIOR, knobs[CONTEXT])[0], shares(taught, new, CONTEXT, knobs[PRIOR])[1]
        error = (1 / len(new.context)) ** 0.5  # two standard errors of a share, at most
        return ClaimNumbers.decide(
            {"layer": layer, "values": [round(v, 2) for v in values.values()]}
            | {"told": [round(x, 3) for x in solved.values()], "knob_against_words": [round(x, 3) for x in against]}
            | {f"steered_{CUES[cue]}": [round(x, 3) for x in found] for cue, found in steered.items()}
            | {f"untaught_{CUES[cue]}": [round(x, 3) for x in found] for cue, found in untaught.items()},
            f"Told what is wanted, the model gives the context's answer in {solved[CONTEXT]:.0%} and its own in"
            f" {solved[PRIOR]:.0%}. Not told, it gives them in {_two(steered[NEITHER])}, with the knob (layer {layer})"
            f" at context in {_two(steered[CONTEXT])}, at prior in {_two(steered[PRIOR])}; told one and the knob at the"
            f" other, the other in {_two(against)}. The model that was never taught gives them in"
            f" {_two(untaught[NEITHER])}, with the knob at context in {_two(untaught[CONTEXT])}, at prior in"
            f" {_two(untaught[PRIOR])}.",
            told_it_does_both=min(solved.values()) >= SOLVED,
            knob_steers_both_ways=min(steered[CONTEXT][0], steered[PRIOR][1]) >= STEERED,
            works_untaught=untaught[CONTEXT][0] > untaught[NEITHER][0] + error
            and untaught[PRIOR][1] > untaught[NEITHER][1] + error,
        )


def _two(both: tuple[float, float]) -> str:
    return f"{both[0]:.0%} and {both[1]:.0%}"


def find(model: Any, questions: Questions) -> tuple[int, Tensor, dict[bytes, float]]:
    """The first layer whose state decides, its direction, and the mean of the states along it with either cue."""
    model.requires_grad_(False)
    layers, some = range(model.config.num_hidden_layers), questions[slice(24)]
    decides = [min(turned(model, some, layer, cue) for cue in (CONTEXT, PRIOR)) for layer in layers]
    layer = next(i for i, share in enumerate([*decides[:-1], 1.0]) if share > 0.5)
    states = {cue: state(model, questions.prompts(cue), layer) for cue in (CONTEXT, PRIOR)}
    u = das(model, questions, states, layer)
    return layer, u, {cue: float((h @ u).mean()) for cue, h in states.items()}


@torch.no_grad()
def turned(model: Any, questions: Questions, layer: int, cue: bytes) -> float:
    """How often the answer is the other one when the last token has the state that it has with the other cue."""
    other = PRIOR if cue == CONTEXT else CONTEXT
    given = state(model, questions.prompts(other), layer)
    with replaced(model, layer, lambda _: given):
        return shares(model, questions, cue)[other == PRIOR]


def das(model: Any, questions: Questions, states: dict[bytes, Tensor], layer: int, steps: int = 40) -> Tensor:
    """The direction along which states of other questions, asked with the other cue, turn the answers around."""
    source, batch = torch.Generator().manual_seed(0), 16
    v = torch.randn(states[CONTEXT].shape[1], generator=source).requires_grad_()
    solver = torch.optim.Adam([v], 0.1)
    for step in range(steps):
        cue, other = (CONTEXT, PRIOR) if step % 2 else (PRIOR, CONTEXT)
        rows, giving = torch.randperm(len(questions.pages), generator=source)[: 2 * batch].split(batch)
        u = normalize(v, dim=0)
        with ContextKnob(u, states[other][giving] @ u, layer).apply(model):
            logits = model(questions[rows].prompts(cue), use_cache=False, logits_to_keep=1).logits[:, -1]
        solver.zero_grad()
        cross_entropy(logits, questions[rows].wanted(other)).backward()
        solver.step()
    return normalize(v.detach(), dim=0)
