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
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core import masks
from ...core.errors import SpecError
from ...core.spec import Attention
from ...worlds.text import BOS
from ..base import ClaimNumbers, Promises, System
from ._layers import Layer
from ._training import train

LATENTS = 8, 32  # of the claim: for mirrored symbols, for prose
MIRRORED, PROSE = (8, 28, 32), (32, 128)  # contexts
SYMBOLS, HALF = 32, 16  # of the mirrored sequences
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
        from ...study.laws import Work
        from ...study.trainer import Setup, batches

        mirrored = {context: _mirrored(context) for context in MIRRORED}
        shown = ", ".join(f"{loss:.3f} with {context} ({_hidden(context):.3f})" for context, loss in mirrored.items())
        setup = Setup(context=max(PROSE), batch=16)
        prose, leak = {}, 0.0
        for context in PROSE:
            model = _small(LATENTS[1], "rotary", BOS + 1)
            source = batches(setup.training, setup, 0)
            train(model, lambda: model.loss(next(source)[:, -context - 1 :]).mean(), 500, 3e-3)  # noqa: B023
            unseen = batches(setup.validation, setup, 1)
            with torch.no_grad():
                pages = torch.cat([next(unseen) for _ in range(32)])[:, -context - 1 :]
                prose[context] = model.loss(pages).mean(1)
                leak = max(leak, _leak(model, pages[:8]))
        costs = {}
        for layers in (0, 2):
            for context in PROSE:
                model = _small(LATENTS[1], "rotary", BOS + 1, layers)
                with torch.no_grad(), Work() as work:
                    model(torch.zeros(1, context, dtype=torch.long))
                costs[layers, context] = work.count
        stack = [costs[2, context] - costs[0, context] for context in PROSE]
        gain = prose[PROSE[0]] - prose[PROSE[-1]]
        mean, error = float(gain.mean()), float(gain.std() / len(gain) ** 0.5)
        means = {context: float(loss.mean()) for context, loss in prose.items()}
        return ClaimNumbers.decide(
            {
                "loss_mirrored": {str(c): round(x, 4) for c, x in mirrored.items()},
                "loss_mirrored_of_what_is_hidden": {str(c): round(_hidden(c), 4) for c in mirrored},
                "loss_prose": {str(c): round(x, 4) for c, x in means.items()},
                "gain_prose": round(mean, 4),
                "gain_prose_error": round(error, 4),
                "operations_of_stack": stack,
                "operations": [costs[2, context] for context in PROSE],
                "leak": leak,
            },
            f"{LATENTS[0]} latents say the end of mirrored symbols with a loss of {shown} tokens of context (in"
            f" brackets: what the symbols out of sight cost). {LATENTS[1]} latents trained on prose have a loss of"
            f" {', '.join(f'{x:.4f} with {c}' for c, x in means.items())} bytes of context, a gain of {mean:.4f} nats"
            f" per byte (standard error {error:.4f} over pages). The stack costs {stack[-1] / stack[0]:.2f} times as"
            f" much with the longest context as with the shortest; changed later bytes move logits by {leak:.1e}.",
            copies_all_it_sees=all(abs(loss - _hidden(context)) < CLOSE for context, loss in mirrored.items()),
            prose_improves_with_context=mean > 2 * error,
            stack_costs_the_same=len(set(stack)) == 1,
            no_leak=leak < 1e-5,
        )


class Network(nn.Module):
    """The whole architecture of the settings of ``system``, for tokens below ``vocabulary``."""

    def __init__(self, system: PerceiverAR, vocabulary: int):
        super().__init__()
        width, heads = system.width, system.heads
        self.latents, self.absolute = system.latents, system.positions == "absolute"
        place = None if self.absolute else partial(rotate, wavelength=system.wavelength)
        layer = partial(Layer, width, heads, activation=SquaredReLU(), place=place)
        self.embed, self.latent = nn.Embedding(vocabulary, width), nn.Linear(width, width)
        self.cross = layer(system.build(heads), source=width)
        self.stack = nn.ModuleList([layer(system.build(heads)) for _ in range(system.layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)
        self.apply(_initialize)
        nn.init.trunc_normal_(self.embed.weight)
        nn.init.zeros_(self.head.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, min(latents, N), vocabulary]`` of what follows each of the last tokens of ``[B, N]``."""
        x = self.embed(tokens)
        if self.absolute:
            x = x + sinusoids(tokens.shape[1], x.shape[-1]).to(x)
        z = self.cross(self.latent(x[:, -self.latents :]), x)
        for layer in self.stack:
            z = layer(z)
        return self.head(self.norm(z))

    def loss(self, tokens: Tensor) -> Tensor:
        """Cross entropy ``[B, min(latents, N)]`` in nats of the last of the tokens ``[B, N + 1]``."""
        logits = self(tokens[:, :-1])
        return F.cross_entropy(logits.mT, tokens[:, -logits.shape[1] :], reduction="none")


class SquaredReLU(nn.Module):
    """``relu(x)²``."""

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return F.relu(x).square()


def _initialize(module: nn.Module) -> None:
    """Haiku's variance scaling: a normal of variance 1 / inputs, cut at two deviations; no biases."""
    if isinstance(module, nn.Linear):
        scale = 1 / (0.87962566 * math.sqrt(module.in_features))  # what the cut takes from the deviation
        nn.init.trunc_normal_(module.weight, std=scale, a=-2 * scale, b=2 * scale)
        nn.init.zeros_(module.bias)


def rotate(x: Tensor, wavelength: float, fraction: float = 0.5) -> Tensor:
    """Rotary positions on the first channels of ``[B, H, N, D]``: neighbours are the two coordinates."""
    turned = int(x.shape[-1] * fraction) // 2 * 2
    speed = wavelength ** -torch.linspace(0, 1, turned // 2, dtype=x.dtype, device=x.device)
    place = torch.arange(x.shape[-2] - 1, -1, -1, dtype=x.dtype, device=x.device)
    angle = place[:, None] * speed
    a, b = x[..., :turned:2], x[..., 1:turned:2]
    pairs = torch.stack([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)
    return torch.cat([pairs.flatten(-2), x[..., turned:]], -1)


def sinusoids(length: int, width: int, longest: float = 10_000.0) -> Tensor:
    """Sines, then cosines, of the distance to the last position, ``[length, width]``."""
    half = width // 2
    speed = longest ** -torch.linspace(0, 1, half)
    angle = torch.arange(length - 1, -1, -1)[:, None] * speed
    return F.pad(torch.cat([angle.sin(), angle.cos()], -1), (0, width - 2 * half))


def _small(latents: int, positions: str, vocabulary: int, layers: int = 2) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PerceiverAR(latents, layers, 64, 4, positions, wavelength=128).model(vocabulary)


def _mirrored(context: int) -> float:
    """Loss of a model trained to end what begins with random symbols and goes back through them."""
    model = _small(LATENTS[0], "absolute", SYMBOLS + 1)

    def pages(count: int, source: torch.Generator) -> Tensor:
        first = torch.randint(SYMBOLS, (count, HALF), generator=source)
        return torch.cat([torch.full((count, 1), SYMBOLS), first, first.flip(1)], 1)[:, -context - 1 :]

    source = torch.Generator().manual_seed(0)
    train(model, lambda: model.loss(pages(32, source)).mean(), 600, 1e-3)
    with torch.no_grad():
        return float(model.loss(pages(256, source)).mean())


def _hidden(context: int) -> float:
    """The least loss possible: nothing is known of a symbol that first stood before the context."""
    return math.log(SYMBOLS) * min(1, max(0, 2 * HALF - 1 - context) / LATENTS[0])


@torch.no_grad()
def _leak(model: Network, pages: Tensor) -> float:
    """How far logits move when only later tokens change."""
    before, moved = model(pages), 0.0
    for later in range(1, model.latents):
        changed = pages.clone()
        changed[:, -later:] = (changed[:, -later:] + 1) % BOS
        moved = max(moved, float((model(changed) - before)[:, :-later].abs().max()))
    return moved
