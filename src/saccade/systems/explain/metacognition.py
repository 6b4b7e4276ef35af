"""Metacognition: can a model report its own activations, and steer them, once it was shown some with labels?

For a sentence with the states h[t] after a layer, and a principal axis of the sentences' mean states:

    score = (mean over t of h[t] - mean) . axis / deviation,    label = score >= 0
    report     "sentence|label" lines: is the label of the next one the likelier of 0 and 1?
    control    "label|sentence" lines, then "1|sentence" and "0|sentence": how much does the score differ?

The labels of a second prompt are flipped, and half the difference between the two counts, so that what the digits
themselves do cancels out.

Paper: Language Models Are Capable of Metacognitive Monitoring and Control of Their Internal Activations,
    arXiv:2505.13763
Code: https://github.com/sakimarquis/llm_neurofeedback (neurofeedback.py: predict_score_by_examples,
    imitate_score_by_examples with imitate_mode="inactive"; analysis/classifiers.py: PCAScorer)

Differs: the embedded model follows no instructions, so lines stand for its chats; sentences are pieces of prose, not of
a labelled set; and axes are principal ones alone, none of a logistic regression. The sentence to control is given (the
official "inactive" mode); the mode in which the model writes it is left out.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import SpecError
from ...hosts.acts import pick
from ...hosts.handles import host_of
from ...worlds.text import BOS
from ..base import ClaimNumbers, MethodSystem
from ._axes import SIZE, Axis, principal, sentences

HIGH, LOW = (1, 2, 4), (32, 128)  # axes of much and of little variance, of those in the official configuration


class Metacognition(MethodSystem):
    """Settings: ``axis`` (``None``: the sum of the last layer's dimensions)."""

    slug = "metacognition"
    title = "Neurofeedback: metacognitive monitoring and control"
    paper = "https://arxiv.org/abs/2505.13763"
    code = "https://github.com/sakimarquis/llm_neurofeedback"

    def __init__(self, axis: Axis | None = None):
        self.axis = axis

    @contextmanager
    def apply(self, model: Any) -> Iterator[list[Tensor]]:
        """Read a model, which answers as it would: each call's activations along the axis, token by token ``[B, N]``.

        Raises:
            SpecError: there is no such layer, or the model is not as wide as the axis.
        """
        width = model.config.get_text_config().hidden_size
        axis = self.axis or Axis(-1, torch.ones(width), torch.zeros(width), 1.0)
        if axis.direction.shape != (width,):
            raise SpecError(f"Metacognition: the axis is {[*axis.direction.shape]}, the model {width} wide")
        (site,) = pick(host_of(model).sites(), type(model).__name__, axis.layer, "self")
        seen: list[Tensor] = []

        def after(module: nn.Module, args: Any, found: Any) -> None:
            state = found if isinstance(found, Tensor) else found[0]
            seen.append((state - axis.mean) @ axis.direction / axis.deviation)

        hook = model.get_submodule(site.path.rpartition(".")[0]).register_forward_hook(after)
        try:
            yield seen
        finally:
            hook.remove()

    def claim(self) -> ClaimNumbers:
        """Reports and control of axes after the middle layer, with up to 32 examples."""
        from ...study import probes

        model = probes.embedded()
        pieces = sentences(256, "axes")
        axes = principal(model, pieces, model.config.num_hidden_layers // 2)
        reported = {k: report(model, axes[k - 1], pieces) for k in HIGH + LOW}
        controlled = {k: control(model, axes[k - 1], pieces) for k in HIGH + LOW}
        high, low = (torch.cat([reported[k] for k in some]) for some in (HIGH, LOW))
        moved, still = (torch.cat([controlled[k] for k in some]) for some in (HIGH, LOW))
        return ClaimNumbers.decide(
            {"report": {str(k): round(float(x.mean()), 3) for k, x in reported.items()}}
            | {"control": {str(k): round(float(x.mean()), 4) for k, x in controlled.items()}, "reports": len(high)},
            f"Labels of the axes with much variance are reported right in {high.mean():.1%} of {len(high)} sentences"
            f" (two standard errors {2 * _error(high):.1%}), of those with little in {low.mean():.1%}. Told which label"
            f" to have, the same sentence scores {moved.mean():+.3f} deviations higher ({2 * _error(moved):.3f}), and"
            f" {still.mean():+.3f} along axes of little variance.",
            reports_above_chance=float(high.mean()) - 0.5 > 2 * _error(high),
            better_where_variance_is_high=bool(high.mean() > low.mean()),
            controls=float(moved.mean()) > 2 * _error(moved),
        )


@torch.no_grad()
def scores(model: Any, axis: Axis, pieces: Sequence[bytes]) -> list[float]:
    """Of sentences that are read alone."""
    with Metacognition(axis).apply(model) as seen:
        model(torch.tensor([[BOS, *piece] for piece in pieces]), use_cache=False, logits_to_keep=1)
    return seen[0][:, 1:].mean(1).tolist()


@torch.no_grad()
def report(model: Any, axis: Axis, pieces: Sequence[bytes], prompts: int = 8, lines: int = 32) -> Tensor:
    """Whether the label of each line in the second half of prompts is the likelier one ``[prompts * lines / 2]``."""
    rng, right = random.Random(0), []
    for _ in range(prompts):
        some = rng.sample(pieces, lines)
        labels = torch.tensor([score >= 0 for score in scores(model, axis, some)])
        page = b"".join(piece + b"|%d\n" % label for piece, label in zip(some, labels, strict=True))
        logits = model(torch.tensor([[BOS, *page]]), use_cache=False).logits[0]
        said = logits[torch.arange(lines) * (SIZE + 3) + SIZE + 1]  # at each mark
        right.append(((said[:, ord("1")] > said[:, ord("0")]) == labels)[lines // 2 :])
    return torch.cat(right).float()


@torch.no_grad()
def control(model: Any, axis: Axis, pieces: Sequence[bytes], prompts: int = 12, lines: int = 24) -> Tensor:
    """How much higher a last sentence scores if its line begins with 1 than with 0 ``[prompts]``; see above."""
    rng, effects = random.Random(1), []
    for _ in range(prompts):
        *some, last = rng.sample(pieces, lines)
        labels = [score >= 0 for score in scores(model, axis, some)]
        pages = []
        for flip in (False, True):
            page = b"".join(b"%d|%s\n" % (label != flip, piece) for piece, label in zip(some, labels, strict=True))
            pages += [[BOS, *page, *(b"%d|%s" % (asked, last))] for asked in (True, False)]
        with Metacognition(axis).apply(model) as seen:
            model(torch.tensor(pages), use_cache=False, logits_to_keep=1)
        one, zero, one_flipped, zero_flipped = seen[0][:, -SIZE:].mean(1).tolist()
        effects.append((one - zero - (one_flipped - zero_flipped)) / 2)
    return torch.tensor(effects)


def _error(values: Tensor) -> float:
    return float(values.std()) / len(values) ** 0.5
