"""Fair small trainings for claims: same data in the same order, same steps, same first weights, several seeds.

    contestants   functions to a fresh model (weights that two of them share by name start equal)
    Task          batches of a world, the loss of a model on one, and what a model is judged by
    Recipe        steps, learning rate, seeds
    compete       trains every contestant on every seed; Comparison: their scores, paired by seed
    train         a single model by Adam, its data in the hands of the caller

:func:`compare` does that for the language model that most claims about training use: what differs between its
contestants is the attention program alone.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import SpecError
from ..nn import GPT
from ..worlds.text import BOS, heldout, text
from .progress import Tell, bar

SAVE_EVERY = 10.0  # seconds


@dataclass(frozen=True)
class Recipe:
    """How every contestant is trained: AdamW, a short warm-up, a cosine down to a tenth, gradients clipped at 1."""

    steps: int = 200
    lr: float = 3e-3
    seeds: tuple[int, ...] = (0, 1, 2)

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        warmup = max(1, self.steps // 20)
        return self.lr * min((step + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * step / self.steps))


@dataclass(frozen=True)
class Task:
    """What is learned, and how it is judged.

    Attributes:
        batches: from a seed to an endless stream of batches; the same seed gives the same stream.
        loss: of a model on a batch, a scalar.
        held: batches that are never trained on.
        measure: of a model on one of them, a scalar (the loss if not given); its mean over them is the score.
        score: what the score is called in the ledger.
    """

    batches: Callable[[int], Iterator[Any]]
    loss: Callable[[nn.Module, Any], Tensor]
    held: Callable[[], Iterable[Any]]
    measure: Callable[[nn.Module, Any], Tensor] | None = None
    score: str = "loss"


def labelled(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Cross entropy on ``(*inputs, labels)``: one label per row or per token, -100 where nothing is asked.

    Of a classifier ``(images, labels)``, of a language model ``(tokens, labels)``, of an encoder and decoder
    ``(source, target, labels)``.
    """
    *inputs, labels = batch
    return F.cross_entropy(model(*inputs).flatten(0, -2), labels.flatten())


def next_token(model: nn.Module, tokens: Tensor) -> Tensor:
    """Cross entropy of each next token of ``[B, N]``, in nats."""
    return labelled(model, (tokens[:, :-1], tokens[:, 1:]))


def accuracy(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Share of the labels of ``(*inputs, labels)`` that the model likes best; those of -100 do not count."""
    *inputs, labels = batch
    asked = labels != -100
    return (model(*inputs).argmax(-1) == labels)[asked].float().mean()


def fit(
    model: nn.Module, task: Task, recipe: Recipe, seed: int, *, file: Path | None = None, tell: Tell | None = None
) -> float:
    """Train a model in place; its score.

    Args:
        model: with its first weights.
        task, recipe: what and how.
        seed: of the batches, and of what the model draws while it trains.
        file: kept up to date every few seconds: an interrupted training goes on from it, a finished one is found there.
        tell: progress, see :mod:`.progress`.

    Raises:
        SpecError: the file is of another training.
    """
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95))
    saved = None if file is None else _Saved(file, model, optimizer, recipe, seed, _first_loss(model, task, seed))
    with _seeded(seed):
        first = 0 if saved is None else saved.load()
        if tell is not None:
            tell(f"seed {seed}", first)
        model.train()
        for step, batch in enumerate(islice(task.batches(seed), first, recipe.steps), first):
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(step)
            optimizer.zero_grad()
            loss = task.loss(model, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if tell is not None:
                tell(f"seed {seed}, loss {loss.item():.3f}", 1)
            if saved is not None and (saved.due or step + 1 == recipe.steps):
                saved.save(step + 1)
        return judge(model, task)


def train(model: nn.Module, loss: Callable[[], Tensor], steps: int, lr: float, last: float = 0.1) -> None:
    """Train a model in place: Adam, a warm-up of 50 steps, a cosine to a share of the rate, gradients clipped at 1.

    Args:
        loss: that of a fresh batch.
        last: the share.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, last + (1 - last) * (1 + math.cos(math.pi * step / steps)) / 2)
    )
    with bar(steps, "training") as tell:
        for _ in range(steps):
            optimizer.zero_grad()
            found = loss()
            found.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            tell(f"training, loss {found.item():.3f}", 1)


@torch.no_grad()
def judge(model: nn.Module, task: Task) -> float:
    """The score of a model: the mean of the task's measure over the held batches."""
    measure = task.measure or task.loss
    model.eval()
    return statistics.fmean(float(measure(model, batch)) for batch in task.held())


class Excess(NamedTuple):
    """Mean of paired differences over the seeds, and its standard error."""

    mean: float
    error: float

    @property
    def above(self) -> bool:
        """Is the mean above 0 by more than two standard errors?"""
        return self.mean > 2 * self.error

    @property
    def below(self) -> bool:
        """Is the mean below 0 by more than two standard errors?"""
        return self.mean < -2 * self.error


@dataclass
class Comparison:
    """Of every contestant the score (``score`` says of what), the trained model and the seconds, one per seed."""

    scores: dict[str, list[float]]
    models: dict[str, list[Any]]
    seconds: dict[str, list[float]]
    score: str = "loss"

    def mean(self, name: str) -> float:
        """Mean score over the seeds."""
        return statistics.fmean(self.scores[name])

    def excess(self, name: str, other: str) -> Excess:
        """How much greater the score of ``name`` is than that of ``other`` on the same seeds and data."""
        gaps = [a - b for a, b in zip(self.scores[name], self.scores[other], strict=True)]
        error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else math.inf
        return Excess(statistics.fmean(gaps), error)

    def parameters(self, name: str) -> int:
        """How many numbers a contestant learns."""
        return sum(p.numel() for p in self.models[name][0].parameters() if p.requires_grad)

    def numbers(self) -> dict[str, Any]:
        """The scores as the ledger keeps them."""
        return {f"{self.score}_{name}": [round(x, 4) for x in scores] for name, scores in self.scores.items()}


def compete(
    contestants: Mapping[str, Callable[[], nn.Module]], task: Task, recipe: Recipe, *, folder: Path | str | None = None
) -> Comparison:
    """Train every contestant on every seed. What torch draws elsewhere is not disturbed.

    Args:
        contestants: by name, functions to a model with its first weights; called once for each seed, with torch's
            generator seeded by it.
        task, recipe: the same for all.
        folder: for trainings that may be interrupted: called again, they go on from there.

    Raises:
        SpecError: the folder holds a training of this name and seed that was another.
    """
    result = Comparison(
        {name: [] for name in contestants}, {name: [] for name in contestants}, {name: [] for name in contestants},
        task.score,
    )  # fmt: skip
    with bar(len(contestants) * len(recipe.seeds) * recipe.steps) as tell:
        for seed in recipe.seeds:
            for name, make in contestants.items():
                with _seeded(seed):
                    model = make()
                file = None if folder is None else Path(folder) / f"{name}-{seed}.safetensors"
                start = time.perf_counter()
                score = fit(model, task, recipe, seed, file=file, tell=partial(_named, tell, name))
                result.scores[name].append(score)
                result.models[name].append(model)
                result.seconds[name].append(time.perf_counter() - start)
    return result


def _named(tell: Tell, name: str, what: str, steps: int) -> None:
    tell(f"{name}, {what}", steps)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Torch's generator seeded inside, and as it was afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def _first_loss(model: nn.Module, task: Task, seed: int) -> float:
    """Loss before any step. It knows a training: by data, first weights, mechanism and loss at once."""
    with _seeded(seed):
        return float(task.loss(model, next(task.batches(seed))))


class _Saved:
    """The file of one training: weights, moments, torch's generator, and what training it is."""

    def __init__(
        self, file: Path, model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe, seed: int, loss: float
    ):
        self.file, self.model, self.optimizer = file, model, optimizer
        self.about = {"steps": recipe.steps, "lr": recipe.lr, "seed": seed, "first_loss": loss}
        self.last = time.monotonic()

    @property
    def due(self) -> bool:
        """Is it time to save again?"""
        return time.monotonic() - self.last > SAVE_EVERY

    def save(self, done: int) -> None:
        """Write the state after so many steps, whole or not at all."""
        from safetensors.torch import save_file

        held: dict[str, Tensor] = {f"p/{name}": p for name, p in self.model.named_parameters()}
        held |= {f"b/{name}": b for name, b in self.model.named_buffers()}
        for name, p in self.model.named_parameters():
            held |= {f"m/{name}/{key}": value for key, value in self.optimizer.state[p].items()}
        held["generator"] = torch.get_rng_state()
        whole = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in held.items()}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_name(f".{self.file.name}.{os.getpid()}.part")
        save_file(whole, part, {"about": json.dumps(self.about | {"done": done})})
        part.replace(self.file)
        self.last = time.monotonic()

    @torch.no_grad()
    def load(self) -> int:
        """Go to the state that was saved: how many steps were done, 0 if there is none."""
        from safetensors import SafetensorError, safe_open

        if not self.file.exists():
            return 0
        try:
            with safe_open(self.file, "pt") as opened:
                found = json.loads((opened.metadata() or {}).get("about", "{}"))
                held = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (it is no dict)
        except SafetensorError as error:
            raise SpecError(f"{self.file} is no training that could go on ({error}): delete it") from error
        done = found.pop("done", 0)
        if not self._same(found, {name[2:]: x.shape for name, x in held.items() if name.startswith("p/")}):
            raise SpecError(
                f"{self.file} is of another training: {found} there, {self.about} asked for. Give another folder, or"
                " delete it"
            )
        for name, p in self.model.named_parameters():
            p.copy_(held[f"p/{name}"])
            moments = [key for key in held if key.startswith(f"m/{name}/")]
            self.optimizer.state[p] = {key.rpartition("/")[2]: held[key] for key in moments}
        for key in (key for key in held if key.startswith("b/")):
            path, _, leaf = key[2:].rpartition(".")
            setattr(self.model.get_submodule(path), leaf, held[key])  # a buffer may have been None until trained
        torch.set_rng_state(held["generator"])
        return done

    def _same(self, found: dict[str, Any], shapes: dict[str, torch.Size]) -> bool:
        """Is that this training? The first losses may differ by rounding."""
        losses = [about.get("first_loss", math.nan) for about in (found, self.about)]
        weights = {name: p.shape for name, p in self.model.named_parameters()}
        close = math.isclose(*losses, rel_tol=1e-5) and shapes == weights
        return close and found | {"first_loss": 0} == self.about | {"first_loss": 0}


# ---- language models on the shipped prose ----


@dataclass(frozen=True)
class Setup(Recipe):
    """Sizes of the language model and its training. ``text``: bytes to learn; the shipped prose if not given."""

    layers: int = 4
    heads: int = 4
    width: int = 64
    context: int = 128
    batch: int = 8
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


Builder = Callable[[Setup, int], nn.Module]
"""From the setup and the number of a layer to the attention program of that layer, or a layer of its own."""


def tiny(setup: Setup, build: Builder, seed: int | None = None) -> GPT:
    """A byte-level GPT with this attention; first weights from the seed, or from torch's generator as it stands."""
    with nullcontext() if seed is None else _seeded(seed):
        return GPT(BOS + 1, setup.width, setup.layers, setup.heads, attention=lambda layer, heads: build(setup, layer))


def batches(source: bytes, setup: Setup, seed: int) -> Iterator[Tensor]:
    """Endless batches of windows ``[batch, context + 1]``."""
    stream = text(setup.context + 1, seed, source=source)
    while True:
        yield torch.stack([example.tokens for example in islice(stream, setup.batch)])


def language(setup: Setup) -> Task:
    """Next bytes of prose; the score is the loss on four held batches, in nats per byte."""
    return Task(
        partial(batches, setup.training, setup), next_token, lambda: islice(batches(setup.validation, setup, 10_000), 4)
    )


def compare(
    builders: Mapping[str, Builder], setup: Setup | None = None, *, folder: Path | str | None = None
) -> Comparison:
    """:func:`compete` for language models that differ in their attention programs alone."""
    setup = setup or Setup()
    contestants = {name: partial(tiny, setup, build) for name, build in builders.items()}
    return compete(contestants, language(setup), setup, folder=folder)
