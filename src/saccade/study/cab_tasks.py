"""The tasks of the study ``cab``: two small generated ones for each attention pattern, one backbone, one training.

The patterns are those of Comprehensive Attention Benchmark (CAB, arXiv:2210.07661):

    noncausal self    every token reads all tokens
    causal self       a token reads itself and those before
    noncausal cross   queries of one sequence read all of another; each may know every other query
    causal cross      the same, and what a query gets must not depend on later *queries*; all keys are in sight

In a cross pattern only the cross-attention is the mechanism under test; all other attention is dense, as in CAB.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.attend import weights
from ..core.spec import Attention
from ..nn.attention import MultiHead
from ..nn.backbones import Stack
from ..nn.init import fresh_seed, initialise
from ..nn.positions import Learned
from ..worlds.batches import IGNORED
from ..worlds.text import heldout

PATTERNS = ("noncausal self", "causal self", "noncausal cross", "causal cross")
BYTES, HIDDEN = 256, 256  # the bytes, and the token that hides one
SYMBOLS = 16
LOWER, HIGHER = -1, 1  # which way a metric is better


@dataclass(frozen=True)
class Training:
    """Sizes of the backbone and the training, the same for all; ``length``: tokens that are read."""

    length: int = 128
    width: int = 64
    heads: int = 4
    layers: int = 2
    steps: int = 200
    batch: int = 16
    lr: float = 3e-3
    test: int = 128  # examples that are measured


@dataclass(frozen=True)
class Batch:
    """What is read ``[B, M]`` or ``[B, M, F]``, what must come out, and what the decoder is given, if there is one."""

    source: Tensor
    target: Tensor
    before: Tensor | None = None


class Task:
    """Base: a generator of batches, its loss and its metrics.

    pattern: one of :data:`PATTERNS`; after: the tasks of CAB it stands for; metrics: whether high or low is better;
    reads, says: tokens or features of the input and the output; queries: how many, in a noncausal cross task;
    given: features of what the decoder of a causal cross task is given; ordered: the source has positions.
    """

    name: ClassVar[str]
    pattern: ClassVar[str]
    after: ClassVar[str]
    metrics: ClassVar[dict[str, int]]
    reads: ClassVar[int]
    says: ClassVar[int]
    tokens: ClassVar[bool] = True
    queries: ClassVar[int] = 32
    ordered: ClassVar[bool] = True

    def draw(self, count: int, length: int, rng: torch.Generator, held: bool) -> Batch:
        """A batch; ``held``: of what is never trained on."""
        raise NotImplementedError

    def loss(self, out: Tensor, target: Tensor) -> Tensor:
        """What is trained: cross entropy of the tokens that are asked."""
        return F.cross_entropy(out.flatten(0, 1), target.flatten(), ignore_index=IGNORED)

    def measure(self, out: Tensor, target: Tensor) -> dict[str, float]:
        """The metrics: share of the asked tokens that are right."""
        asked = target != IGNORED
        return {"accuracy": float((out.argmax(-1) == target)[asked].float().mean())}


class Masked(Task):
    """A seventh of the bytes of a page is hidden (BERT's 15%): which are they?"""

    name, pattern, after = "masked", "noncausal self", "masked language modelling (MLM)"
    metrics: ClassVar[dict[str, int]] = {"perplexity": LOWER}
    reads, says = BYTES + 1, BYTES

    def draw(self, count: int, length: int, rng: torch.Generator, held: bool) -> Batch:
        """Pages with holes, and what stood there."""
        page = _pages(count, length, rng, held)
        hole = torch.rand(page.shape, generator=rng) < 0.15
        return Batch(page.masked_fill(hole, HIDDEN), page.masked_fill(~hole, IGNORED))

    def measure(self, out: Tensor, target: Tensor) -> dict[str, float]:
        """exp of the mean loss in nats."""
        return {"perplexity": math.exp(self.loss(out, target))}


class Mirror(Task):
    """Every place says the symbol at the mirrored place: half of what is asked lies later, most of it far away."""

    name, pattern, after = "mirror", "noncausal self", "dependencies over the whole length (TTS, Sum, SR)"
    metrics: ClassVar[dict[str, int]] = {"accuracy": HIGHER}
    reads = says = SYMBOLS

    def draw(self, count: int, length: int, rng: torch.Generator, held: bool) -> Batch:
        """Random symbols and their mirror image."""
        symbols = torch.randint(SYMBOLS, (count, length), generator=rng)
        return Batch(symbols, symbols.flip(1))


class Language(Masked):
    """The next byte of a page."""

    name, pattern, after = "language", "causal self", "language modelling (LM)"
    reads = BYTES

    def draw(self, count: int, length: int, rng: torch.Generator, held: bool) -> Batch:
        """Pages and the same one byte on."""
        page = _pages(count, length + 1, rng, held)
        return Batch(page[:, :-1], page[:, 1:])


class Echo(Task):
    """Random symbols, then the same again: what follows in the second half?"""

    name, pattern, after = "echo", "causal self", "dependencies over half the length (TTS, Sum)"
    metrics: ClassVar[dict[str, int]] = {"accuracy": HIGHER}
    reads = says = SYMBOLS

    def draw(self, count: int, length: int, rng: torch.Generator, held: bool) -> Batch:
        """Symbols said twice; the first time they cannot be known and are not asked."""
        once = torch.randint(SYMBOLS, (count, (length + 1) // 2), generator=rng)
        twice = torch.cat([once, once], 1)[:, : length + 1]
        target = twice[:, 1:].clone()
        target[:, : once.shape[1] - 1] = IGNORED
        return Batch(twice[:, :-1], target)


class Points(Task):
    """Points of an ellipse without a quarter of it, in any order: where is the missing arc?

    Metrics as point cloud completion has them (PoinTr): Chamfer distances by length and by its square, and the F-score
    at a distance of 0.1 (the half axes lie in 0.3 .. 1).
    """

    name, pattern, after = "points", "noncausal cross", "point cloud completion (PCC)"
    metrics: ClassVar[dict[str, int]] = {"CD-l1": LOWER, "CD-l2": LOWER, "F-score": HIGHER}
    reads = says = 2
    tokens = ordered = False
    near = 0.1

    def draw(self, count: int, length: int, rng: torch.Generator, held: bool) -> Batch:
        """Points ``[B, length, 2]``, and the arc as ``[B, queries, 2]``."""

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand(count, *shape, generator=rng)

        axes, turn, centre = uniform(0.3, 1, 1, 2), uniform(0, math.pi, 1), uniform(-0.3, 0.3, 1, 2)
        start = uniform(0, math.tau, 1)

        def place(angle: Tensor) -> Tensor:
            x, y = (axes * torch.stack([angle.cos(), angle.sin()], -1)).unbind(-1)
            return centre + torch.stack([x * turn.cos() - y * turn.sin(), x * turn.sin() + y * turn.cos()], -1)

        seen = start + math.tau / 4 + uniform(0, math.tau * 3 / 4, length)
        missing = start + torch.linspace(0, math.tau / 4, self.queries)
        return Batch(place(seen), place(missing))

    def loss(self, out: Tensor, target: Tensor) -> Tensor:
        """The Chamfer distance by length."""
        return torch.stack([one.mean() for one in _nearest(out, target)]).mean()

    def measure(self, out: Tensor, target: Tensor) -> dict[str, float]:
        """Both distances and the F-score, means over the examples."""
        precise, recalled = _nearest(out, target)
        p, r = ((one < self.near).float().mean(-1) for one in (precise, recalled))
        score = 2 * p * r / (p + r).clamp(min=1e-9)
        return {
            "CD-l1": float((precise.mean() + recalled.mean()) / 2),
            "CD-l2": float(precise.square().mean() + recalled.square().mean()),
            "F-score": float(score.mean()),
        }


class Forecast(Task):
    """Two sinusoids and noise: how do they go on?"""

    name, pattern, after = "forecast", "noncausal cross", "long sequence time-series forecasting (LSTF)"
    metrics: ClassVar[dict[str, int]] = {"MSE": LOWER, "MAE": LOWER}
    reads = says = 1
    tokens = False

    def draw(self, count: int, length: int, rng: torch.Generator, held: bool) -> Batch:
        """A series ``[B, length, 1]`` and its next values ``[B, queries, 1]``."""
        amplitude = 0.5 + 0.5 * torch.rand(count, 2, 1, generator=rng)
        period = 16 + 48 * torch.rand(count, 2, 1, generator=rng)
        phase = math.tau * torch.rand(count, 2, 1, generator=rng)
        time = torch.arange(length + self.queries)
        series = (amplitude * (math.tau * time / period + phase).sin()).sum(1)
        series = (series + 0.1 * torch.randn(series.shape, generator=rng))[..., None]
        return Batch(series[:, :length], series[:, length:])

    def loss(self, out: Tensor, target: Tensor) -> Tensor:
        """The mean square error."""
        return F.mse_loss(out, target)

    def measure(self, out: Tensor, target: Tensor) -> dict[str, float]:
        """Mean square and mean absolute error."""
        return {"MSE": float(F.mse_loss(out, target)), "MAE": float(F.l1_loss(out, target))}


class Speech(Task):
    """Symbols to frames: each sounds in a way of its own. The decoder is given the frames before.

    Metrics as speech synthesis has them: the distance of the frames (mel cepstral distortion without its constant),
    and the square of that distance.
    """

    name, pattern, after = "speech", "causal cross", "text to speech (TTS)"
    metrics: ClassVar[dict[str, int]] = {"distance": LOWER, "square": LOWER}
    reads, says, given = SYMBOLS, 8, 8

    def draw(self, count: int, length: int, rng: torch.Generator, held: bool) -> Batch:
        """Symbols ``[B, length]`` and their frames ``[B, length, 8]``."""
        symbols = torch.randint(SYMBOLS, (count, length), generator=rng)
        frames = _voice()[symbols]
        return Batch(symbols, frames, F.pad(frames, (0, 0, 1, 0))[:, :-1])

    def loss(self, out: Tensor, target: Tensor) -> Tensor:
        """The mean square error."""
        return F.mse_loss(out, target)

    def measure(self, out: Tensor, target: Tensor) -> dict[str, float]:
        """Mean distance of a frame from the right one, and its square."""
        distance = (out - target).norm(dim=-1)
        return {"distance": float(distance.mean()), "square": float(distance.square().mean())}


class Summary(Task):
    """A sequence to one half as long: every second symbol from the end on, each by its word in a dictionary."""

    name, pattern, after = "summary", "causal cross", "summarisation (Sum)"
    metrics: ClassVar[dict[str, int]] = {"accuracy": HIGHER}
    reads, says = SYMBOLS, SYMBOLS

    def draw(self, count: int, length: int, rng: torch.Generator, held: bool) -> Batch:
        """Symbols ``[B, length]``, their summary, and the summary one place later behind a first symbol."""
        symbols = torch.randint(SYMBOLS, (count, length), generator=rng)
        target = (symbols.flip(1)[:, ::2] * 5 + 3) % SYMBOLS
        return Batch(symbols, target, F.pad(target, (1, 0), value=SYMBOLS)[:, :-1])


TASKS: dict[str, Task] = {
    task.name: task for task in (Masked(), Mirror(), Language(), Echo(), Points(), Forecast(), Speech(), Summary())
}


class Model(nn.Module):
    """The backbone with the mechanism in the place of the task's pattern; all else does not depend on the mechanism."""

    def __init__(self, task: Task, training: Training, mechanism: Any):
        super().__init__()
        seed, width = fresh_seed(), training.width
        causal, crosses = task.pattern.startswith("causal"), task.pattern.endswith("cross")
        self.read = nn.Embedding(task.reads, width) if task.tokens else nn.Linear(task.reads, width)
        self.places = Learned(training.length, width) if task.ordered else nn.Identity()
        self.encoder = Stack(width, 1, training.heads) if crosses else None
        own, cross = (None, mechanism) if crosses else (mechanism, False)
        self.stack = Stack(width, training.layers, training.heads, own, causal=causal, cross=cross)
        self.queries = Learned(training.length if causal else task.queries, width) if crosses else None
        self.given: nn.Module | None = None
        if crosses and causal:
            size = getattr(task, "given", None)
            self.given = nn.Embedding(task.says + 1, width) if size is None else nn.Linear(size, width)
        self.say = nn.Linear(width, task.says)
        initialise(self, "xavier", seed)

    def forward(self, batch: Batch) -> Tensor:
        """What the task compares with ``batch.target``: one output for each token, or for each query."""
        x = self.places(self.read(batch.source))
        if self.encoder is None or self.queries is None:
            return self.say(self.stack(x))
        blank = x.new_zeros(len(x), self.queries.table.num_embeddings, x.shape[-1])
        asked = self.queries(blank if self.given is None else self.given(batch.before))
        return self.say(self.stack(asked, self.encoder(x)))

    @property
    def tested(self) -> list[nn.Module]:
        """The layers of attention that the mechanism fills."""
        return [block.attention if self.encoder is None else block.cross for block in self.stack.blocks]  # type: ignore


def train(task: Task, training: Training, mechanism: Any, seed: int) -> dict[str, Any]:
    """Train and measure: the metrics on held examples, and ``read``, the share of places with a weight that is not 0.

    ``read`` is counted against all places of the pattern (under the diagonal where it is causal self); ``None`` where
    a layer is not a :class:`saccade.Attention`.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Model(task, training, mechanism)
        optimizer = torch.optim.AdamW(model.parameters(), training.lr, betas=(0.9, 0.95), weight_decay=0.01)
        warmup = max(1, training.steps // 20)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * step / training.steps))
        )
        rng = torch.Generator().manual_seed(seed)
        for _ in range(training.steps):
            batch = task.draw(training.batch, training.length, rng, held=False)
            optimizer.zero_grad()
            task.loss(model(batch), batch.target).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        return measured(model.eval(), task, training)


@torch.no_grad()
def measured(model: Model, task: Task, training: Training) -> dict[str, Any]:
    """The metrics of a model on the test examples, always the same."""
    rng = torch.Generator().manual_seed(10_000)
    batch = task.draw(training.test, training.length, rng, held=True)
    found = task.measure(model(batch), batch.target)
    few = replace(batch, source=batch.source[:4], before=None if batch.before is None else batch.before[:4])
    return found | {"read": _read(model, few, task.pattern == "causal self")}


def _read(model: Model, batch: Batch, causal: bool) -> float | None:
    shares: list[float] = []

    def count(layer: MultiHead, given: Any) -> None:
        q, k, _ = layer.placed(*given)
        w = weights(q, k, layer.spec, offset=0)  # type: ignore[arg-type]
        places = torch.ones(w.shape[-2:]).tril() if causal else torch.ones(w.shape[-2:])
        shares.append(float((w != 0).float().mean((0, 1)).sum() / places.sum()))

    if not all(isinstance(layer, MultiHead) and isinstance(layer.spec, Attention) for layer in model.tested):
        return None
    handles = [layer.register_forward_pre_hook(count) for layer in model.tested]
    try:
        model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return statistics.fmean(shares)


@cache
def _text() -> Tensor:
    return torch.frombuffer(bytearray(heldout()), dtype=torch.uint8).long()


def _pages(count: int, length: int, rng: torch.Generator, held: bool) -> Tensor:
    """Pages ``[B, length]`` of the shipped prose; its last tenth is held."""
    cut = len(_text()) * 9 // 10
    source = _text()[cut:] if held else _text()[:cut]
    start = torch.randint(len(source) - length, (count, 1), generator=rng)
    return source[start + torch.arange(length)]


@cache
def _voice() -> Tensor:
    """How each symbol sounds, ``[symbols, features]``; so soft that frames, read linearly, do not drown positions."""
    return 0.25 * torch.randn(SYMBOLS, Speech.given, generator=torch.Generator().manual_seed(0))


def _nearest(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Of each point of ``a`` the distance to the nearest of ``b``, and the other way around."""
    distance = (a[:, :, None] - b[:, None]).square().sum(-1).clamp(min=1e-12).sqrt()
    return distance.amin(2), distance.amin(1)
