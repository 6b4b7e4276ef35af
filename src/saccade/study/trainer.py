"""A tiny byte-level language model and a fair training, for claims about training: same data, steps and seeds for all.

The model is a pre-norm transformer with rotary positions, as small as shows a difference in minutes on two cores. What
is compared differs in its attention program alone; every weight outside of it starts from the same numbers.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.attend import attention
from ..core.spec import Attention
from ..worlds.text import BOS, heldout, text


@dataclass(frozen=True)
class Setup:
    """Sizes of the model and the training. ``text``: bytes to learn; the shipped prose if not given."""

    layers: int = 4
    heads: int = 4
    width: int = 64
    context: int = 128
    batch: int = 8
    steps: int = 200
    lr: float = 3e-3
    seeds: tuple[int, ...] = (0, 1, 2)
    text: bytes | None = field(default=None, repr=False)

    @property
    def training(self) -> bytes:
        """What is learned from."""
        return self._source[: self._cut]

    @property
    def validation(self) -> bytes:
        """What is never trained on: the last tenth."""
        return self._source[self._cut :]

    @property
    def _source(self) -> bytes:
        return heldout() if self.text is None else self.text

    @property
    def _cut(self) -> int:
        return len(self._source) * 9 // 10


Builder = Callable[[Setup, int], Attention]
"""From the setup and the number of a layer to the attention program of that layer."""


class Layer(nn.Module):
    """Attention and a perceptron, each on a normalized input and added to the stream ``[B, N, width]``."""

    def __init__(self, setup: Setup):
        super().__init__()
        width = setup.width
        self.heads = setup.heads
        self.before, self.between = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.spec: nn.Module = nn.Identity()  # set after the other weights were drawn

    def qk(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys with rotary positions, and values, ``[B, H, N, D]``."""
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return rotate(q), rotate(k), v

    def forward(self, x: Tensor) -> Tensor:
        """The stream after this layer."""
        q, k, v = self.qk(x)
        assert isinstance(self.spec, Attention)
        x = x + self.out(attention(q, k, v, self.spec).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.between(x))))


class TinyLM(nn.Module):
    """The model. The seed decides every weight but those of the attention programs, which are drawn last."""

    def __init__(self, setup: Setup, build: Builder, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(BOS + 1, setup.width)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.layers = nn.ModuleList([Layer(setup) for _ in range(setup.layers)])
        self.last = nn.RMSNorm(setup.width)
        for index, layer in enumerate(self.layers):
            layer.spec = build(setup, index)

    def states(self, tokens: Tensor) -> Tensor:
        """Last hidden states ``[B, N, width]`` of tokens ``[B, N]``."""
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.last(x)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next byte ``[B, N, 257]``."""
        return self.states(tokens) @ self.embed.weight.T

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross entropy in nats per byte."""
        return F.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    @torch.no_grad()
    def inside(self, tokens: Tensor) -> Iterator[tuple[Attention, Tensor, Tensor]]:
        """Program, queries and keys of each layer as it reads the tokens, to look at the weights."""
        x = self.embed(tokens)
        for layer in self.layers:
            assert isinstance(layer, Layer) and isinstance(layer.spec, Attention)
            q, k, _ = layer.qk(x)
            yield layer.spec, q, k
            x = layer(x)


def rotate(x: Tensor, theta: float = 10_000.0) -> Tensor:
    """Rotary positions (arXiv:2104.09864) on ``[B, H, N, D]``: halves are the two coordinates."""
    half = x.shape[-1] // 2
    speed = theta ** (-torch.arange(half, device=x.device) / half)
    angle = torch.arange(x.shape[-2], device=x.device)[:, None] * speed
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def batches(source: bytes, setup: Setup, seed: int) -> Iterator[Tensor]:
    """Endless batches of windows ``[batch, context + 1]``."""
    stream = text(setup.context + 1, seed, source=source)
    while True:
        yield torch.stack([example.tokens for example in islice(stream, setup.batch)])


def train(build: Builder, setup: Setup, seed: int) -> tuple[TinyLM, float]:
    """A trained model and its validation loss (nats per byte)."""
    model = TinyLM(setup, build, seed)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=setup.lr, betas=(0.9, 0.95))
    warmup = max(1, setup.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * step / setup.steps)),
    )
    for tokens in islice(batches(setup.training, setup, seed), setup.steps):
        optimizer.zero_grad()
        model.loss(tokens).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        held = [float(model.loss(tokens)) for tokens in islice(batches(setup.validation, setup, 10_000), 4)]
    return model, statistics.fmean(held)


class Excess(NamedTuple):
    """Mean of paired differences over the seeds, and its standard error."""

    mean: float
    error: float


@dataclass
class Comparison:
    """Validation loss and trained model of every contestant, one per seed."""

    losses: dict[str, list[float]]
    models: dict[str, list[TinyLM]]

    def mean(self, name: str) -> float:
        """Mean loss over the seeds, nats per byte."""
        return statistics.fmean(self.losses[name])

    def excess(self, name: str, other: str) -> Excess:
        """How much greater the loss of ``name`` is than that of ``other`` on the same seeds and data."""
        gaps = [a - b for a, b in zip(self.losses[name], self.losses[other], strict=True)]
        error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else math.inf
        return Excess(statistics.fmean(gaps), error)

    def numbers(self) -> dict[str, Any]:
        """The losses as the ledger keeps them."""
        return {f"loss_{name}": [round(x, 4) for x in losses] for name, losses in self.losses.items()}


def compare(builders: dict[str, Builder], setup: Setup | None = None) -> Comparison:
    """Train every contestant on every seed: same data in the same order, same first weights, same steps."""
    setup = setup or Setup()
    result = Comparison({name: [] for name in builders}, {name: [] for name in builders})
    state = torch.get_rng_state()
    for seed in setup.seeds:
        for name, build in builders.items():
            model, loss = train(build, setup, seed)
            result.losses[name].append(loss)
            result.models[name].append(model)
    torch.set_rng_state(state)
    return result
