"""Perceiver AR: only the last positions have latents; they read a long input once, and a causal stack works on them.

    x = embed(tokens),   z = latent(x[-L:])
    z = z + attention(norm(z), norm(x)),  query i sees the keys up to position N - L + i;  z = z + mlp(norm(z))
    z = z + causal attention(norm(z));    z = z + mlp(norm(z))                              (``layers`` times)
    logits = head(norm(z)),   mlp(x) = W2 relu(W1 x)²

So L next tokens are predicted from up to N tokens, and each layer after the first costs what L tokens cost. Rotary
positions turn the first half of each head's width; "absolute" ones are sinusoids added to the input. Both count back
from the last token.

Paper: General-purpose, long-context autoregressive modeling with Perceiver AR, arXiv:2202.07765
Code: https://github.com/google-research/perceiver-ar (perceiver_ar/perceiver_ar_model.py: PerceiverAR, with the
    settings of experiment.py: 12 layers of width 1024, 16 heads in the cross-attention too, both widening factors 4)

Differs: all sequences of a batch have the same length, so there is no padding and no latent without a position; fewer
tokens than ``latents`` make fewer latents. What the official code offers beside its settings is left out: dropout of
any kind, several latents per position, more cross-attentions, offset or learned queries, positions given with the
data, a cache for generation.

The network is in :mod:`._perceiver`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import masks
from ...core.errors import SpecError
from ...core.spec import Attention
from ...worlds.text import BOS
from ..base import ClaimNumbers, Promises, System
from ._perceiver import Network

MIRRORED, PROSE = (8, 28, 32), (32, 128)  # contexts of the claim
LATENTS = 32  # for prose
CLOSE = 0.1  # a loss may be so far from that of what is out of sight, nats


class PerceiverAR(System):
    """Settings: ``latents``, ``layers``, ``width``, ``heads``; ``positions`` "rotary" or "absolute"; ``wavelength``.

    ``wavelength``: the longest of the rotary positions; at least the context.
    """

    slug = "perceiver-ar"
    title = "Perceiver AR"
    paper = "https://arxiv.org/abs/2202.07765"
    code = "https://github.com/google-research/perceiver-ar"
    promises = Promises(unit_rows=True, hosts=())

    def __init__(
        self, latents: int = 1024, layers: int = 12, width: int = 1024, heads: int = 16, positions: str = "rotary",
        wavelength: int = 8192,
    ):  # fmt: skip
        self.latents, self.layers, self.width, self.heads = latents, layers, width, heads
        self.positions, self.wavelength = positions, wavelength

    def build(self, heads: int) -> Attention:
        """The program of every attention here: causal, the queries being the last positions of the keys."""
        return Attention(mask=masks.Causal())

    def model(self, vocabulary: int) -> Network:
        """The whole architecture, its weights fresh. Raises: SpecError for settings that do not fit together."""
        if self.positions not in ("rotary", "absolute"):
            raise SpecError(f'PerceiverAR: positions must be "rotary" or "absolute"; got {self.positions!r}')
        if self.latents < 1:
            raise SpecError(f"PerceiverAR: latents must be at least 1; got {self.latents}")
        return Network(self, vocabulary)

    def claim(self) -> ClaimNumbers:
        """Loss on the same tokens with longer context, of mirrored symbols and of prose; costs; and a leak test."""
        from ...study.probes import standard_error, surely_positive
        from . import _mirrored

        mirrored = {context: (_mirrored.trained_loss(context), _mirrored.hidden(context)) for context in MIRRORED}
        shown = ", ".join(f"{loss:.3f} with {context} ({out:.3f})" for context, (loss, out) in mirrored.items())
        stack = [_stack_cost(context) for context in PROSE]
        (short, near), (long, far) = (_prose(context) for context in PROSE)
        gain, leak = short - long, max(near, far)
        mean, error = float(gain.mean()), standard_error(gain)
        prose = {context: float(loss.mean()) for context, loss in zip(PROSE, (short, long), strict=True)}
        return ClaimNumbers.decide(
            {"loss_mirrored": {str(c): round(loss, 4) for c, (loss, _) in mirrored.items()}}
            | {"loss_mirrored_of_what_is_hidden": {str(c): round(out, 4) for c, (_, out) in mirrored.items()}}
            | {"loss_prose": {str(c): round(x, 4) for c, x in prose.items()}}
            | {"gain_prose": round(mean, 4), "gain_prose_error": round(error, 4)}
            | {"operations_of_stack": stack, "leak": leak},
            f"{_mirrored.LATENTS} latents say the end of mirrored symbols with a loss of {shown} tokens of context (in"
            f" brackets: what the symbols out of sight cost). {LATENTS} latents trained on prose have a loss of"
            f" {', '.join(f'{x:.4f} with {c}' for c, x in prose.items())} bytes of context, a gain of {mean:.4f} nats"
            f" per byte (standard error {error:.4f} over pages). The stack costs {stack[-1] / stack[0]:.2f} times as"
            f" much with the longest context as with the shortest; changed later bytes move logits by {leak:.1e}.",
            copies_all_it_sees=all(abs(loss - out) < CLOSE for loss, out in mirrored.values()),
            prose_improves_with_context=surely_positive(gain),
            stack_costs_the_same=len(set(stack)) == 1,
            no_leak=leak < 1e-5,
        )


def small(latents: int, positions: str, vocabulary: int, layers: int = 2) -> Network:
    """A network of width 64, always with the same first weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PerceiverAR(latents, layers, 64, 4, positions, wavelength=128).model(vocabulary)


def _prose(context: int) -> tuple[Tensor, float]:
    """Of a network trained on prose: its loss on unseen pages ``[pages]``, and its leak."""
    from ...study.trainer import Setup, batches, train

    setup = Setup(context=max(PROSE), batch=16)
    model = small(LATENTS, "rotary", BOS + 1)
    source = batches(setup.training, setup, 0)
    train(model, lambda: model.loss(next(source)[:, -context - 1 :]).mean(), 500, 3e-3)
    unseen = batches(setup.validation, setup, 1)
    pages = torch.cat([next(unseen) for _ in range(32)])[:, -context - 1 :]
    with torch.no_grad():
        return model.loss(pages).mean(1), _leak(model, pages[:8])


def _leak(model: Network, pages: Tensor) -> float:
    """How far logits move when only later tokens change."""
    before, moved = model(pages), 0.0
    for later in range(1, model.latents):
        changed = pages.clone()
        changed[:, -later:] = (changed[:, -later:] + 1) % BOS
        moved = max(moved, float((model(changed) - before)[:, :-later].abs().max()))
    return moved


def _stack_cost(context: int) -> int:
    """Operations of the stack alone: what two layers add to a network without any."""
    from ...study.laws import Work

    counts = []
    for layers in (0, 2):
        model = small(LATENTS, "rotary", BOS + 1, layers)
        with torch.no_grad(), Work() as work:
            model(torch.zeros(1, context, dtype=torch.long))
        counts.append(work.count)
    return counts[1] - counts[0]
