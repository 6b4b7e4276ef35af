"""Zoology's models, their training on multi-query associative recall, and the curves of accuracy over model width.

    stream <- stream + mixer(norm(stream))          a layer; what mixes tokens is all that the models differ in
    stream <- stream + norm(stream)                 official layers have no perceptron, but this residual sum remains

    attention       softmax attention, one head, learned positions                        (mixers/attention.py)
    base-conv       y = conv(u) * (W u + b) + u; conv: 3 taps, then as long as the text    (mixers/base_conv.py)
    based           base-conv of 3 taps, then linear attention, Taylor features of 8      (mixers/based.py)
    learned         base-conv of 3 taps, then y = s(u) attention(u) + u with s learned    (mixers/selective.py)
    programmatic    the same with s = 1 at tokens that occurred before, else 0

:mod:`saccade.systems.bench.zoology` says what is compared, and where it departs from the official code.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import edits, masks
from ..core.errors import SpecError
from ..core.linear import LinearAttention
from ..core.linear.features import Taylor2
from ..core.spec import Attention
from ..nn import MultiHead
from ..nn.backbones import Tokens
from ..nn.init import fresh_seed, initialise
from ..nn.positions import Learned
from ..worlds.batches import IGNORED, Labelled
from ..worlds.mqar import batch, mqar
from . import cells, plots
from .frontier import wilson
from .page import Page, Table
from .runner import engine

SOLVED = 0.9  # accuracy from which on a width solves a length
GAP = 0.1  # in accuracy; less than this is no gap to close
STOP = 0.99  # a training ends as soon as this accuracy is exceeded, as the official one does
DROPOUT = 0.1  # of embeddings, and of the weights of plain attention
TAPS = 3
FEATURES = 8  # width of Based's queries and keys
PENALTY = 0.001  # on more learned selection than the budget
FILLER = 0  # the token between queries


# ---- what mixes tokens: [B, N, width] to [B, N, width] ----


class ShortConvolution(nn.Conv1d):
    """Each channel over its own last few tokens; torch's first weights, as the official one."""

    keeps_start = True

    def __init__(self, width: int, taps: int = TAPS):
        super().__init__(width, width, taps, padding=taps - 1, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mT)[..., : x.shape[1]].mT


class LongConvolution(nn.Module):
    """Each channel over all tokens so far, plus the token itself; the filter is a perceptron of the distance.

    The perceptron reads the distance t / (length - 1), cos(a) and -sin(a) with a = 1e-4 * 2 pi t / length.
    """

    distance: Tensor

    def __init__(self, width: int, length: int, hidden: int = 16):
        super().__init__()
        angle = 1e-4 * 2 * math.pi * torch.arange(length) / length
        self.register_buffer("distance", torch.stack([torch.linspace(0, 1, length), angle.cos(), -angle.sin()], -1))
        self.filter = nn.Sequential(nn.Linear(3, hidden), nn.ReLU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        # Twice the length: what a circular convolution wraps around falls on the padding, and nothing is read early.
        of_input, of_filter = (torch.fft.rfft(y, 2 * n, dim=-2) for y in (x, self.filter(self.distance[:n])))
        return torch.fft.irfft(of_input * of_filter, 2 * n, dim=-2)[:, :n] + x


class BaseConv(nn.Module):
    """Gated convolution: ``conv(u) * (W u + b) + u``."""

    def __init__(self, width: int, convolution: nn.Module):
        super().__init__()
        self.convolution, self.gate = convolution, nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x) * self.gate(x) + x


class Based(MultiHead):
    """Linear attention with narrow queries and keys and one wide value; no biases, and no smaller first weights."""

    additions = 1

    def __init__(self, width: int):
        super().__init__(LinearAttention(Taylor2(), normalize=True, eps=1e-12), width, 1, head_width=FEATURES)
        self.v, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)


class Softmax(MultiHead):
    """Causal softmax attention, one head with biases; weights drop out while it trains."""

    def __init__(self, width: int, dropout: float = 0.0):
        super().__init__(Attention(mask=masks.Causal()), width, 1, bias=True)
        self.whole, self.dropping = self.spec, edits.Dropout(dropout)
        self.dropped = Attention(mask=masks.Causal(), edits=[self.dropping])

    def forward(self, x: Tensor, *args: Any, **given: Any) -> Tensor:
        drops = self.training and self.dropping.p > 0
        if drops:
            self.dropping.reseed()
        self.spec = self.dropped if drops else self.whole
        return super().forward(x, *args, **given)

    def options(self, context: Tensor) -> dict[str, Any]:
        # Of texts as short as these the whole matrix costs less than strips of it.
        return {"backend": "reference"} if self.spec is self.dropped else {}


class Selected(nn.Module):
    """Attention for those tokens alone that ``choice`` names: ``y = s * attention(u) + u``."""

    def __init__(self, width: int, choice: nn.Module):
        super().__init__()
        self.attention, self.choice = Softmax(width), choice

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return self.attention(x) * self.choice(x, tokens) + x


class LearnedChoice(nn.Module):
    """``s = sigmoid(w u)``; after training the ``ceil(sqrt(N))`` tokens of greatest s, and no other.

    While it trains, ``penalty`` grows with what the mean of s has above ``sqrt(N) / N``.
    """

    def __init__(self, width: int):
        super().__init__()
        self.select = nn.Linear(width, 1, bias=False)
        self.penalty: Tensor | float = 0.0

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        chosen = self.select(x).sigmoid()
        n = x.shape[1]
        self.penalty = PENALTY * (chosen.mean() - math.sqrt(n) / n).relu()
        if self.training:
            return chosen
        best = chosen.topk(math.ceil(math.sqrt(n)), dim=1)
        return torch.zeros_like(chosen).scatter(1, best.indices, best.values)


class Repeated(nn.Module):
    """``s = 1`` at a token that occurred before, the filler aside."""

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        same = tokens[:, :, None] == tokens[:, None, :]
        return (same.tril(-1).any(-1) & (tokens != FILLER))[..., None].to(x.dtype)


def short_first(second: Callable[[int], nn.Module]) -> Callable[[int, int, int], nn.Module]:
    """Layers in turn: BaseConv of a few taps, and another that takes the width."""
    return lambda layer, width, length: second(width) if layer % 2 else BaseConv(width, ShortConvolution(width))


MIXERS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "attention": lambda layer, width, length: Softmax(width, DROPOUT),
    "base-conv": lambda layer, width, length: BaseConv(
        width, LongConvolution(width, length) if layer % 2 else ShortConvolution(width)
    ),
    "based": short_first(Based),
    "learned": short_first(lambda width: Selected(width, LearnedChoice(width))),
    "programmatic": short_first(lambda width: Selected(width, Repeated())),
}
"""By name, from (number of the layer, width, length) to what mixes tokens there."""


class Layer(nn.Module):
    """One layer of Zoology's models."""

    def __init__(self, mixer: nn.Module, width: int):
        super().__init__()
        self.mixer = mixer
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        seen = self.before(x)
        x = x + (self.mixer(seen, tokens) if isinstance(self.mixer, Selected) else self.mixer(seen))
        return x + self.after(x)


class Model(nn.Module):
    """Tokens ``[B, N]`` to logits of the places that are asked about ``[asked, vocab]``; one table embeds and tells."""

    def __init__(self, mixer: str, vocab: int, width: int, length: int, layers: int = 2):
        super().__init__()
        seed = fresh_seed()
        self.additions = 2 * layers
        self.embed = Tokens(vocab, width, Learned(length, width) if mixer == "attention" else None)
        self.dropout = nn.Dropout(DROPOUT)
        self.layers = nn.ModuleList(Layer(MIXERS[mixer](i, width, length), width) for i in range(layers))
        self.last = nn.LayerNorm(width)
        initialise(self, "gpt2", seed)

    def forward(self, tokens: Tensor, asked: Tensor) -> Tensor:
        """``asked``: bool ``[B, N]``."""
        x = self.dropout(self.embed(tokens))
        for layer in self.layers:
            x = layer(x, tokens)
        return self.last(x[asked]) @ self.embed.table.weight.T

    @property
    def penalty(self) -> Tensor | float:
        """What training adds to the loss of the last call."""
        return sum((m.penalty for m in self.modules() if isinstance(m, LearnedChoice)), 0.0)


# ---- training ----


@dataclass(frozen=True)
class Training:
    """Sizes: tokens of the vocabulary, examples to train on and how often, of a batch, held out; tokens per pair."""

    vocab: int = 8192
    examples: int = 100_000
    epochs: int = 64
    batch: int = 512
    test: int = 3000
    tokens_per_pair: int = 16

    def data(self, length: int, seed: str, count: int) -> Labelled:
        """So many examples as one batch."""
        pairs = max(1, length // self.tokens_per_pair)
        stream = mqar(length, seed, vocab_size=self.vocab, num_kv_pairs=pairs, random_non_queries=False)
        return batch(stream, count)


_data = functools.lru_cache(maxsize=2)(Training.data)  # trainings that follow each other share their examples


def train(mixer: str, length: int, width: int, lr: float, seed: int, training: Training) -> dict[str, Any]:
    """Train one model: AdamW, a cosine by epoch down to 0, no warm-up and no clipping; accuracy on held examples."""
    examples = _data(training, length, str(seed), training.examples)
    held = _data(training, length, "held", training.test)
    steps = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Model(mixer, training.vocab, width, length)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.epochs)
        for _ in range(training.epochs):
            for rows in torch.randperm(training.examples).split(training.batch):
                inputs, labels = examples.inputs[rows], examples.labels[rows]
                asked = labels != IGNORED
                loss = F.cross_entropy(model(inputs, asked), labels[asked]) + model.penalty
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                steps += 1
            accuracy = judge(model, held)
            if accuracy > STOP:
                break
            schedule.step()
    answers = int((held.labels != IGNORED).sum())
    return {"accuracy": accuracy, "answers": answers, "loss": loss.item(), "steps": steps}


@torch.no_grad()
def judge(model: Model, held: Labelled) -> float:
    """Share of right answers."""
    model.eval()
    asked = held.labels != IGNORED
    right = model(held.inputs, asked).argmax(-1) == held.labels[asked]
    model.train()
    return right.float().mean().item()


# ---- the study ----


class Cell(NamedTuple):
    """One training."""

    mixer: str
    length: int
    width: int
    lr: float
    seed: int


class Point(NamedTuple):
    """A mixer at a width on a length: the best learning rate of each seed, mean over the seeds.

    ``low`` and ``high``: Wilson's interval at 95 %, each held-out question one trial. ``lr``: the first seed's.
    """

    mixer: str
    length: int
    width: int
    accuracy: float
    low: float
    high: float
    lr: float


@dataclass(frozen=True)
class Zoology:
    """The study's cells: every mixer, length, width, learning rate and seed."""

    mixers: tuple[str, ...]
    lengths: tuple[int, ...]
    widths: tuple[int, ...]
    lrs: tuple[float, ...]
    seeds: tuple[int, ...]
    training: Training

    def __post_init__(self) -> None:
        unknown = [name for name in self.mixers if name not in MIXERS]
        if unknown or not self.mixers:
            raise SpecError(f"unknown mixers {unknown}: mixers= takes some of {', '.join(MIXERS)}")

    @property
    def cells(self) -> list[Cell]:
        """The cheap ones first."""
        grid = product(sorted(self.lengths), sorted(self.widths), self.mixers, self.lrs, self.seeds)
        return [Cell(mixer, length, width, lr, seed) for length, width, mixer, lr, seed in grid]

    def name(self, cell: Cell) -> str:
        """Unique among the cells."""
        return f"{cell.mixer}-length{cell.length}-width{cell.width}-lr{cell.lr:.4g}-seed{cell.seed}"

    def key(self, cell: Cell) -> dict[str, Any]:
        """What determines a training."""
        return {**cell._asdict(), "training": asdict(self.training), "engine": engine(), "source": _source()}

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Train it."""
        return train(*cell, training=self.training)

    def points(self, found: Sequence[dict[str, Any]]) -> list[Point]:
        """The curves."""
        results = {cell: kept["result"] for cell, kept in zip(self.cells, found, strict=True)}
        points = []
        for mixer, length, width in product(self.mixers, sorted(self.lengths), sorted(self.widths)):
            tried = [[(results[Cell(mixer, length, width, lr, s)], lr) for lr in self.lrs] for s in self.seeds]
            best = [max(runs, key=lambda run: run[0]["accuracy"]) for runs in tried]
            accuracy = statistics.fmean(run["accuracy"] for run, _ in best)
            low, high = wilson(accuracy, sum(run["answers"] for run, _ in best), 0.95)
            points.append(Point(mixer, length, width, accuracy, low, high, best[0][1]))
        return points

    def summary(self, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The curves; the least width that solves each length; of each hybrid what it closes of the gap."""
        points = self.points(found)
        return {
            "curves": [point._asdict() for point in points],
            "solved_width": {
                mixer: {str(n): solved(points, mixer, n) for n in sorted(self.lengths)} for mixer in self.mixers
            },
            "gap_closed": gap_closed(points),
        }

    def page(self, found: Sequence[dict[str, Any]], command: str, seconds: float) -> Page:
        """Curves, solved widths, and every point."""
        points, told = self.points(found), self.summary(found)
        training = self.training
        widths = Table(
            "Solved width",
            ["mixer", *(f"N = {n}" for n in sorted(self.lengths)), "gap closed"],
            [[m, *by.values(), told["gap_closed"].get(m)] for m, by in told["solved_width"].items()],
            f"The least width whose accuracy is at least {SOLVED:.0%}; a dash: none up to {max(self.widths)}."
            " Gap closed: of the accuracy that base-conv lacks to attention, mean over lengths and widths."
            f" {self.in_words(told['solved_width'])}",
        )
        every = Table(
            "Accuracy", [*Point._fields], points,
            "The best learning rate of each seed, chosen on the held-out examples as in the paper, mean over the seeds"
            f" ({len(self.seeds)}). low and high: Wilson's interval at 95 %, each question one trial: it tells of the"
            " questions, not of other trainings.",
        )  # fmt: skip
        intro = (
            "Keys with their values, then keys again in random places, where the value is asked. How wide must a model"
            f" of two layers be to answer? A vocabulary of {training.vocab:,}, a pair to {training.tokens_per_pair}"
            f" tokens; at most {training.epochs} epochs of {training.examples:,} examples in batches of"
            f" {training.batch}; learning rates {', '.join(f'{lr:.2g}' for lr in self.lrs)}."
        )
        return Page("Zoology: recall over width", intro, [drawn(points), widths, every], command, seconds)

    def in_words(self, widths: dict[str, dict[str, int | None]]) -> str:
        """Which widths grow with the length."""
        lines = []
        for mixer, by_length in widths.items():
            found = [math.inf if width is None else width for width in by_length.values()]
            shown = ", ".join("-" if width is None else str(width) for width in by_length.values())
            how = "does not solve the task" if min(found) == math.inf else "needs the same width at every length"
            if len(set(found)) > 1:
                how = "needs more width at greater length" if found == sorted(found) else "has no clear trend"
            lines.append(f"{mixer} {how} ({shown}).")
        return " ".join(lines)


@functools.cache
def _source() -> str:
    """A hash of what trains and is trained, beside the engine."""
    here = Path(__file__).parent.parent
    files = [Path(__file__), here / "worlds" / "mqar.py", *here.glob("nn/*.py"), *here.glob("core/linear/*.py")]
    return cells.sources(*files)


def solved(points: Sequence[Point], mixer: str, length: int) -> int | None:
    """The least width that solves a length."""
    enough = [p.width for p in points if (p.mixer, p.length) == (mixer, length) and p.accuracy >= SOLVED]
    return min(enough, default=None)


def gap_closed(points: Sequence[Point]) -> dict[str, float]:
    """By mixer, (accuracy - base-conv's) / (attention's - base-conv's), of means over lengths and widths.

    Nothing where attention is hardly better than base-conv.
    """
    by_mixer: dict[str, list[float]] = {}
    for point in points:
        by_mixer.setdefault(point.mixer, []).append(point.accuracy)
    mean = {mixer: statistics.fmean(found) for mixer, found in by_mixer.items()}
    low, high = mean.pop("base-conv", math.nan), mean.pop("attention", math.nan)
    return {mixer: (found - low) / (high - low) for mixer, found in mean.items()} if high - low >= GAP else {}


def drawn(points: Sequence[Point]) -> dict[str, str]:
    """Accuracy over width, one picture for each length."""
    lengths = sorted({point.length for point in points})
    figure, axes = plots.figure(1, len(lengths))
    for axis, length in zip(axes, lengths, strict=True):
        here = [point for point in points if point.length == length]
        for mixer, look in plots.looks(dict.fromkeys(p.mixer for p in here)).items():
            curve = [p for p in here if p.mixer == mixer]
            axis.plot([p.width for p in curve], [p.accuracy for p in curve], label=mixer, **look)
            axis.fill_between(
                [p.width for p in curve], [p.low for p in curve], [p.high for p in curve],
                color=look["color"], alpha=0.15, linewidth=0,
            )  # fmt: skip
        axis.axhline(SOLVED, color=plots.INK, linewidth=0.8, linestyle=":")
        axis.set(title=f"N = {length}", xlabel="width", ylabel="accuracy", ylim=(-0.03, 1.03), xscale="log")
        widths = sorted({p.width for p in here})
        axis.set_xticks(widths, [str(width) for width in widths])
        axis.minorticks_off()
    words = " ".join(f"N = {p.length}, {p.mixer}, width {p.width}: {p.accuracy:.0%}." for p in points)
    return plots.svg(figure, axes[0], "Accuracy over width", words)
