"""Training-free sparse attention as a trade-off: unit, budget, phase, length and size of the model against accuracy.

A page is cut before the query that predicts its first answer. In phase ``prefill`` the context is read sparsely and the
answers densely; in phase ``decode`` the context densely, and each later query sees its own choice of keys, the true
tokens before it given. The two together are one reading of the page, so both phases are measured on the same answers.

    blocks           prefill: per 16 queries the blocks of 16 keys with the best mean q . mean k, the first, the own and
                     the one before among them; decode: per query its own block and those with the best bound of q . k
    vertical-slash   the keys and the distances to which the context's last 64 queries give most weight, as many of
                     each; prefill: a distance is one for 16 queries together; decode: of the keys of the context
    token            per query the keys with the greatest scores: what a perfect choice of so many keys would give
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import __version__, zoo
from ..core.errors import SpecError
from ..core.masks import EMPTY
from ..core.normalizers import TopKSoftmax
from ..core.selectors import Select, Selection, TopKBlocks
from ..core.spec import Attention
from ..core.stats import Stat
from ..core.tile import Tile
from ..hosts.handles import install, listen, watch
from ..systems.sparse._vertical_slash import by_distance, last_weights, listed
from . import cells, models, plots, tasks
from .page import Page, Table
from .runner import engine

PHASES = ("prefill", "decode")
UNITS = ("blocks", "vertical-slash", "token")
BLOCK, LAST = 16, 64  # tokens of a block; queries whose weights rank keys and distances
TOKENS = 4096  # that are read at once: pages of one length go through the model together
ABLE = 0.5  # accuracy that dense attention must reach for a loss of it to mean anything

# ------------------------------------------------------------------------------------------------ units


class Lines(Select):
    """Keys and distances, as many of each as the share allows, in the order in which they gather weight.

    Args:
        share: of the visible places that may be computed, in all; of each query's with ``seen``.
        rows: queries that look at the same keys.
        seen: sums of weights by key and by distance, ``[B, H, m]`` each, of the first m keys; later ones stay. If not
            given: those of this call's last queries.
    """

    def __init__(self, share: float, rows: int, seen: tuple[Tensor, Tensor] | None = None):
        super().__init__(rows, 1)
        self.share, self.seen = share, seen

    @torch.no_grad()
    def choose(self, q: Tensor, k: Tensor, codes: Tensor) -> Selection:
        visible = (codes > EMPTY).expand(*q.shape[:2], *codes.shape[2:])
        n, m, rows = q.shape[2], k.shape[2], self.rows
        by_key, by_far = ranked(q, k) if self.seen is None else self.seen
        vertical = F.pad(_places(by_key), (0, m - by_key.shape[-1]))
        slash = F.pad(_places(by_far), (rows - 1, m - by_far.shape[-1] + rows - 1), value=m)
        # A block of rows meets a key at as many distances as it has rows: the best of them counts.
        best = slash.unfold(-1, rows, 1).amin(-1)
        starts = torch.arange(0, n, rows, device=q.device)[:, None] + m - n
        away = (starts - torch.arange(m, device=q.device) + rows - 1).clamp(min=0)
        needed = torch.minimum(vertical[..., None, :], best[..., away])  # lines of each kind until this place is kept
        worth = visible * (away + 1).clamp(max=rows)  # rows of the block that see the key
        # While decoding each query has a budget of its own, so that it never depends on those after it.
        spent, cost = (x if self.seen else x.flatten(2)[:, :, None] for x in (needed, worth))
        held = torch.zeros(*spent.shape[:3], m + 1, dtype=torch.long, device=q.device).scatter_add_(-1, spent, cost)
        lines = (held.cumsum(-1) <= self.share * cost.sum(-1, keepdim=True)).sum(-1, keepdim=True).clamp(min=1)
        return listed((needed < lines) & visible, rows, 1)


class Pages(Select):
    """Per query its own block and the ``keep`` earlier ones whose keys' bounds allow the greatest scores (Quest).

    score[i, block] = sum over dimensions of max(q[i] * least key, q[i] * greatest key), summed over the query heads
    that share a key head.
    """

    def __init__(self, keep: int, block: int):
        super().__init__(1, block)
        self.keep = keep

    @torch.no_grad()
    def choose(self, q: Tensor, k: Tensor, codes: Tensor) -> Selection:
        short = -k.shape[2] % self.columns
        least, greatest = (
            (F.pad(sign * k, (0, 0, 0, short), value=math.inf).unflatten(2, (-1, self.columns)).amin(3) * sign).mT
            for sign in (1, -1)
        )
        groups = q.unflatten(1, (k.shape[1], -1))  # [B, Hkv, H / Hkv, N, D]
        score = (groups.relu() @ greatest[:, :, None] - (-groups).relu() @ least[:, :, None]).sum(2)
        visible = (codes > EMPTY).expand(-1, -1, q.shape[2], -1)
        order = torch.arange(score.shape[-1], device=q.device)
        own = torch.where(visible, order, -1).amax(-1, keepdim=True)
        score = score.masked_fill(~visible, -math.inf).masked_fill(order == own, math.inf)
        best, blocks = score.topk(min(self.keep + 1, len(order)), -1)
        return Selection(blocks.masked_fill(best == -math.inf, -1), 1, self.columns)


def ranked(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of the last queries summed by key and by distance, ``[B, H, M]``; first key and no distance go first."""
    weights = last_weights(q, k, min(LAST, q.shape[2]))
    sums = weights.sum(-2), by_distance(weights)
    for each in sums:
        each[..., 0] = math.inf
    return sums


def _places(score: Tensor) -> Tensor:
    """Of each score its place in its row, 0 the greatest."""
    return score.argsort(dim=-1, descending=True, stable=True).argsort(-1)


def widest(n: int, share: float) -> int:
    """How many of the last n units a row may see so that about ``share`` of all ``n (n + 1) / 2`` places are seen."""
    return max(1, round(n + 0.5 - math.sqrt((n + 0.5) ** 2 - share * n * (n + 1))))


class Seen(dict[int, tuple[Tensor, Tensor]]):
    """Of each layer what :class:`Lines` takes."""


def program(phase: str, unit: str, sparsity: float, context: int, seen: Seen) -> Callable[[int, int], Attention]:
    """What each layer runs, for a context of so many tokens. Small budgets are met as far as the unit allows."""
    share = 1 - sparsity
    if unit == "vertical-slash":
        rows = BLOCK if phase == "prefill" else 1
        return lambda layer, heads: Attention(select=Lines(share, rows, seen.get(layer)))
    if phase == "prefill":
        blocks = max(3, widest(-(-context // BLOCK), share))
        by_unit = {
            "blocks": Attention(select=TopKBlocks(blocks, BLOCK, local=2, first=1)),
            "token": Attention(normalizer=TopKSoftmax(widest(context, share))),
        }
    else:
        by_unit = {
            "blocks": Attention(select=Pages(round(share * context / BLOCK), BLOCK)),
            "token": Attention(normalizer=TopKSoftmax(max(1, round(share * context)))),
        }
    return lambda layer, heads: by_unit[unit]


class Visited(Stat):
    """How many keys each query gives any weight, ``[B, H, N]``."""

    def see(self, tile: Tile) -> tuple[Tensor, ...]:
        return ((tile.weights > 0).sum(-1).to(tile.weights.dtype),)


# --------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Size:
    """A checkpoint: what its floating-point operations follow from. ``matrices``: weights of its linear layers."""

    parameters: int
    matrices: int
    layers: int
    heads: int
    width: int

    def flops(self, phase: str, unit: str, sparsity: float, length: int) -> float:
        """Reading ``length`` tokens (prefill), or one more after them (decode): model, attention, and the choosing."""
        prefill = phase == "prefill"
        tokens, places = (length, length * (length + 1) / 2) if prefill else (1, length)
        choosing = {
            "dense": 0.0,
            "blocks": math.ceil(length / BLOCK) ** 2 if prefill else 2 * math.ceil(length / BLOCK),
            "vertical-slash": LAST * length * prefill,  # chosen once, from the context
            "token": places * sparsity,  # needs every score; those of the kept ones are counted as attention
        }[unit]
        scores = 2 * places * (1 - sparsity) + choosing
        return 2 * self.matrices * tokens + 2 * self.width * self.heads * self.layers * scores


class Loaded(NamedTuple):
    """A model ready to be asked."""

    model: Any
    vocabulary: Any
    size: Size
    fingerprint: str


@functools.cache
def load(name: str, found: Path) -> Loaded:
    """A checkpoint from its directory; kept, since every cell needs it."""
    model, tokenizer = models.load(str(found))
    linear = sum(part.weight.numel() for part in model.modules() if isinstance(part, nn.Linear))
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    size = Size(sum(p.numel() for p in model.parameters()), linear, config.num_hidden_layers, heads, width)
    return Loaded(model, tasks.vocabulary(model, tokenizer), size, models.fingerprint(model))


def where(name: str) -> Path | None:
    """The directory of a zoo checkpoint, or of a model given by its path; ``None``: there is none."""
    try:
        return zoo.path(name)
    except ValueError:
        return Path(name) if (Path(name) / "config.json").is_file() else None


@torch.no_grad()
def readings(
    model: Any, tokens: Tensor, cut: int, phase: str, unit: str, sparsities: Sequence[float], counted: bool = False
) -> Iterator[tuple[Tensor, float | None]]:
    """Pages ``[B, N]`` read at each sparsity in one phase: logits ``[B, N - cut, V]`` of the tokens from ``cut`` on,
    and (``counted``) how sparse that phase was.
    """
    from transformers import DynamicCache

    context, rest = tokens[:, :cut], tokens[:, cut:]
    prefill, seen = phase == "prefill", Seen()
    held = DynamicCache()
    if not prefill:
        with listen(model, lambda call: seen.update({call.site.layer: ranked(call.q, call.k)})):
            model(input_ids=context, past_key_values=held, logits_to_keep=1)
    for sparsity in sparsities:
        looking = watch(model, Visited()) if counted else nullcontext()
        with install(model, program(phase, unit, sparsity, cut, seen)), looking as watching:
            if prefill:
                held = DynamicCache()
                model(input_ids=context, past_key_values=held, logits_to_keep=1)
            else:
                logits = model(input_ids=rest, past_key_values=held).logits
        if prefill:
            logits = model(input_ids=rest, past_key_values=held).logits
        held.crop(-rest.shape[1])
        yield logits, None if watching is None else _sparsity(watching.seen, cut if prefill else 0, cut)


def _sparsity(seen: dict[str, Any], rows: int, cut: int) -> float:
    """Share of the places that the sparse rows (the first ones, or those after the cut) could see and did not."""
    visited = torch.stack([told["visited"] for told in seen.values()])  # [layers, B, H, N]
    ends = torch.arange(visited.shape[-1]) + (1 if rows else cut + 1)
    return 1 - float(visited.double().mean((0, 1, 2)).sum() / ends.sum())


def right(logits: Tensor, page: tasks.Sample, cut: int) -> int:
    """Answers of a page that the logits ``[N - cut, V]`` of its tokens from ``cut`` on get whole."""
    hit = logits[:-1].argmax(-1).cpu() == page.tokens[cut + 1 :]
    return sum(bool(hit[start - 1 - cut : stop - 1 - cut].all()) for start, stop in page.answers)


# -------------------------------------------------------------------------------------------- statistics


def wilson(share: float, n: int, confidence: float) -> tuple[float, float]:
    """Wilson's interval of a share of n trials; wider than need be where a trial can be right in parts."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    middle, scale = share + z * z / (2 * n), 1 + z * z / n
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def unsafe(losses: Sequence[float], tolerance: float) -> float:
    """How likely losses as small as these are, at most, if their true mean is ``tolerance`` or more: a p-value.

    Exact (binomial) where each is 0 or 1; for those between, Hoeffding's bound (1963, theorem 1).
    """
    n, mean = len(losses), fmean(losses)
    if all(loss in (0, 1) for loss in losses):
        return binomial(n, tolerance, round(sum(losses)))
    if mean >= tolerance:
        return 1.0
    rest = (1 - mean) * math.log((1 - mean) / (1 - tolerance))
    return math.exp(-n * (rest + (mean * math.log(mean / tolerance) if mean else 0.0)))


def worse(lost: int, won: int) -> float:
    """McNemar's exact one-sided p-value, of pages on which one of two readings gets more answers right."""
    return binomial(lost + won, 0.5, won)


def binomial(n: int, p: float, most: int) -> float:
    """Probability of at most so many successes in n trials."""
    return math.fsum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(most + 1))


# ----------------------------------------------------------------------------------------------- the study


class Cell(NamedTuple):
    """One model reading one task at one length, sparsely in one phase by one unit, at every sparsity."""

    model: str
    task: str
    length: int
    phase: str
    unit: str


@dataclass(frozen=True)
class Frontier:
    """The comparison: a :class:`saccade.study.cells.Comparison`. Settings as of the system ``sparse-frontier``.

    Raises:
        SpecError: a setting that means nothing.
    """

    models: tuple[str, ...]
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    sparsities: tuple[float, ...]
    phases: tuple[str, ...] = PHASES
    units: tuple[str, ...] = UNITS
    count: int = 100
    tolerance: float = 0.05
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        known = {"tasks": tasks.recall.WORLDS, "phases": PHASES, "units": UNITS}
        for setting, names in known.items():
            if odd := [name for name in getattr(self, setting) if name not in names]:
                raise SpecError(f"{setting}: there are {', '.join(names)}; got {odd[0]!r}")
        if not all(0 < sparsity < 1 for sparsity in self.sparsities):
            raise SpecError(f"sparsities must lie between 0 and 1; got {list(self.sparsities)}")
        if not (0 < self.tolerance < 1 and 0 < self.confidence < 1):
            raise SpecError(f"between 0 and 1: got tolerance={self.tolerance}, confidence={self.confidence}")
        if self.count < 1 or not self.lengths or min(self.lengths) < 8 * BLOCK:
            raise SpecError(f"expected count >= 1 and lengths >= {8 * BLOCK}; got {self.count}, {list(self.lengths)}")
        if not self.cells:
            raise SpecError("expected at least one each of models, tasks, lengths, phases, units")

    @property
    def cells(self) -> list[Cell]:
        """Short lengths first, so that a first look comes early."""
        return [
            Cell(model, task, length, phase, unit)
            for length in sorted(set(self.lengths))
            for model in dict.fromkeys(self.models)
            for task in dict.fromkeys(self.tasks)
            for phase in dict.fromkeys(self.phases)
            for unit in dict.fromkeys(self.units)
        ]

    def name(self, cell: Cell) -> str:
        """Of the cell's file."""
        return ".".join([Path(cell.model).name, *map(str, cell[1:])])

    def key(self, cell: Cell) -> dict[str, Any]:
        """Everything that determines what the cell measures."""
        found = where(cell.model)
        return {
            **cell._asdict(),
            "weights": None if found is None else load(cell.model, found).fingerprint,
            "sparsities": sorted(set(self.sparsities)), "count": self.count, "seed": self.seed,
            "saccade": __version__, "engine": engine(), "source": _source(), "torch": torch.__version__,
        }  # fmt: skip

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Right answers by page, dense and at each sparsity; or ``unable``: why not."""
        found = where(cell.model)
        if found is None:
            return {"unable": f"no checkpoint {cell.model!r} in the zoo, and no directory of that name"}
        model, vocabulary, size, _ = load(cell.model, found)
        try:
            models.fits(model, [cell.length])
            pages = vocabulary.samples(cell.task, cell.length, self.seed, self.count)
        except ValueError as error:  # too long for the model, or too short for the task
            return {"unable": str(error)}
        batches = list(_batches(pages))
        dense = _dense(cell.model, found, cell.task, cell.length, self.seed, self.count)
        result = {"size": asdict(size), "asked": [len(page.answers) for page in pages], "dense": dense}
        if (share := sum(dense) / sum(len(page.answers) for page in pages)) < ABLE:
            return result | {"unable": f"{share:.1%} right with dense attention"}
        levels = sorted(set(self.sparsities))
        rows: list[dict[str, Any]] = [{"wanted": level, "right": []} for level in levels]
        for some in batches:
            cut, counted = some[0].answers[0][0] - 1, some is batches[0]
            read = readings(model, _stacked(some, model), cut, cell.phase, cell.unit, levels, counted)
            for row, (logits, sparsity) in zip(rows, read, strict=True):
                row["right"] += [right(each, page, cut) for each, page in zip(logits, some, strict=True)]
                if sparsity is not None:
                    row["sparsity"] = round(sparsity, 4)
        return result | {"sparse": rows}

    def curves(self, found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """A row for each sparsity of each cell that could be measured, dense (sparsity 0) first."""
        rows = []
        for cell, known in zip(self.cells, found, strict=True):
            result = known["result"]
            if "sparse" not in result:
                continue
            asked, dense, size = result["asked"], result["dense"], Size(**result["size"])
            safe = True
            for read in [{"wanted": 0.0, "sparsity": 0.0, "right": dense}, *result["sparse"]]:
                pairs = [(a / n, b / n) for a, b, n in zip(dense, read["right"], asked, strict=True)]
                share = sum(read["right"]) / sum(asked)
                low, high = wilson(share, len(asked), self.confidence)
                p_unsafe = unsafe([max(0.0, a - b) for a, b in pairs], self.tolerance)
                # Tested from the lowest sparsity on until one fails, each test needs no correction for the others.
                safe = read["wanted"] == 0 or (safe and p_unsafe <= 1 - self.confidence)
                unit = cell.unit if read["wanted"] else "dense"
                rows.append(
                    {
                        **cell._asdict(), "wanted": read["wanted"], "sparsity": read["sparsity"], "accuracy": share,
                        "low": low, "high": high, "p_unsafe": p_unsafe, "safe": safe,
                        "p_worse": worse(sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)),
                        "flops": size.flops(cell.phase, unit, read["sparsity"], cell.length),
                        "parameters": size.parameters,
                    }
                )  # fmt: skip
        return rows

    def summary(self, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The curves; the highest safe sparsity of each cell; whether a larger sparse model is worth its operations."""
        curves = self.curves(found)
        why = {
            (cell.model, cell.task, cell.length): known["result"].get("unable")
            for cell, known in zip(self.cells, found, strict=True)
        }
        safe: dict[Cell, float] = {}
        for row in curves:
            if row["safe"]:
                cell = Cell(*(row[field] for field in Cell._fields))
                safe[cell] = max(row["sparsity"], safe.get(cell, 0.0))
        return {
            "curves": curves,
            "safe": [{**cell._asdict(), "sparsity": sparsity} for cell, sparsity in safe.items()],
            "mean_safe": {
                phase: round(fmean(of), 4)
                for phase in self.phases
                if (of := [sparsity for cell, sparsity in safe.items() if cell.phase == phase])
            },
            "worth": self.worth(curves),
            "not_measured": [dict(zip(("model", "task", "length", "why"), (*at, no), strict=True))
                             for at, no in why.items() if no],
        }  # fmt: skip

    def points(self, curves: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Accuracy, mean over the tasks that every measured model can do at a length, and operations, by setting."""
        able: dict[int, dict[str, set[str]]] = {}
        for row in curves:
            able.setdefault(row["length"], {}).setdefault(row["model"], set()).add(row["task"])
        common = {length: set.intersection(*by_model.values()) for length, by_model in able.items()}
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for row in curves:
            if row["task"] in common[row["length"]]:
                at = row["length"], row["phase"], row["model"], row["unit"], row["wanted"]
                groups.setdefault(at, []).append(row)
        found = []
        for (length, phase, model, unit, wanted), rows in groups.items():
            accuracy = fmean(row["accuracy"] for row in rows)
            low, high = wilson(accuracy, self.count * len(rows), self.confidence)
            found.append(
                {
                    "length": length, "phase": phase, "model": model, "unit": unit, "wanted": wanted,
                    "sparsity": fmean(row["sparsity"] for row in rows), "flops": fmean(row["flops"] for row in rows),
                    "accuracy": accuracy, "low": low, "high": high, "parameters": rows[0]["parameters"],
                    "tasks": len(rows),
                }
            )  # fmt: skip
        return found

    def worth(self, curves: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """For each smaller dense model the best reading by a larger sparse one that takes no more operations."""
        points, rows = self.points(curves), []
        dense = {(p["length"], p["phase"], p["model"]): p for p in points if p["wanted"] == 0}
        largest = max((p["parameters"] for p in points), default=0)
        for (length, phase, _), small in dense.items():
            rivals = [
                p for p in points
                if (p["length"], p["phase"]) == (length, phase) and p["wanted"] and p["flops"] <= small["flops"]
                and p["parameters"] > small["parameters"]
            ]  # fmt: skip
            if small["parameters"] < largest:
                best = max(rivals, key=lambda p: (p["accuracy"], -p["flops"]), default=None)
                rows.append({"small": small, "large": best})
        return rows

    def page(self, found: Sequence[dict[str, Any]], command: str, seconds: float) -> Page:
        """The curves with their intervals, accuracy against operations, and what is safe."""
        summary = self.summary(found)
        curves, longest = summary["curves"], max(self.lengths)
        fewest = math.ceil(math.log(1 - self.confidence) / math.log(1 - self.tolerance))
        enough = "" if self.count >= fewest else f" With fewer than {fewest} pages nothing can be called safe."
        parts: list[dict[str, str] | Table] = [self._safest(summary, [longest])]
        if curves:
            parts += [self._trade_off(curves), self._cost(curves)]
        if len(set(self.lengths)) > 1:
            parts.append(self._safest(summary, sorted(set(self.lengths))))
        worth = [
            [s["length"], s["phase"], s["model"], s["flops"], s["accuracy"]]
            + ([b["model"], b["unit"], b["sparsity"], b["flops"], b["accuracy"]] if b else [None] * 5)
            for s, b in ((row["small"], row["large"]) for row in summary["worth"])
        ]
        parts += [
            Table(
                "Smaller and dense, or larger and sparse",
                ("length", "phase", "dense model", "operations", "accuracy", "larger model", "unit", "sparsity",
                 "its operations", "its accuracy"),
                worth,
                "The best reading by a larger sparse model for no more operations than the smaller dense one takes, of"
                " any unit; a dash: none takes so few. Means over the tasks that all models can do.",
            ),
            Table(
                "Not measured", ("model", "task", "length", "why"), [list(r.values()) for r in summary["not_measured"]],
                f"A task is measured where dense attention gets at least {ABLE:.0%} of it right.",
            ),
            Table(
                "Every measurement",
                ("model", "task", "length", "phase", "unit", "wanted sparsity", "sparsity", "accuracy", "low", "high",
                 "p(unsafe)", "p(worse)"),
                [[*(row[f] for f in Cell._fields), row["wanted"], row["sparsity"], row["accuracy"], row["low"],
                  row["high"], row["p_unsafe"], row["p_worse"]] for row in curves],
                "p(unsafe): of the test behind what is called safe. p(worse): McNemar's exact one-sided test of fewer"
                " answers right than with dense attention on the same pages.",
            ),
        ]  # fmt: skip
        return Page(
            "The sparse frontier",
            f"Attention reads {self.count} pages of each task sparsely in one phase. Sparsity is the share of the"
            " visible (query, key) places without weight, as measured; short contexts leave some units no smaller"
            f" budget. Intervals are Wilson's at {self.confidence:.0%}, a page counting as one trial. A sparsity is"
            f" called safe if, with {self.confidence:.0%} confidence, it loses fewer than {self.tolerance:.0%} of the"
            " answers that dense attention gets right on the same pages (answers gained are not set against them), and"
            f" so does every lower one.{enough}",
            parts, command, seconds,
        )  # fmt: skip

    def _safest(self, summary: dict[str, Any], lengths: Sequence[int]) -> Table:
        safe = {tuple(row[f] for f in Cell._fields): row["sparsity"] for row in summary["safe"]}
        rows = []
        for model, length, phase, unit in {(c.model, c.length, c.phase, c.unit): None for c in self.cells}:
            if length in lengths:
                each = [safe.get((model, task, length, phase, unit)) for task in dict.fromkeys(self.tasks)]
                able = [sparsity for sparsity in each if sparsity is not None]
                rows.append([model, length, phase, unit, *each, min(able, default=None)])
        where_at = f"at {lengths[0]:,} tokens" if len(lengths) == 1 else "at every length"
        return Table(
            f"Highest safe sparsity {where_at}",
            ("model", "length", "phase", "unit", *dict.fromkeys(self.tasks), "all"), rows,
            "0: none of the sparsities measured; a dash: not measured; all: the lowest of the tasks.",
        )  # fmt: skip

    def _trade_off(self, curves: Sequence[dict[str, Any]]) -> dict[str, str]:
        """Accuracy of the largest model at the greatest length over how much less is read, a panel for each task."""
        longest = max(row["length"] for row in curves)
        most = max(row["parameters"] for row in curves if row["length"] == longest)
        rows = [row for row in curves if row["length"] == longest and row["parameters"] == most]
        shown = list(dict.fromkeys(row["task"] for row in rows))
        figure, axes = plots.figure(math.ceil(len(shown) / 3), min(3, len(shown)))
        names = [f"{phase}, {unit}" for phase in self.phases for unit in self.units]
        looks = plots.looks(names)
        for axis, task in zip(axes, shown, strict=False):
            for name in names:
                line = [row for row in rows if row["task"] == task and f"{row['phase']}, {row['unit']}" == name]
                less = [1 / (1 - row["sparsity"]) for row in line]
                accuracy = [row["accuracy"] for row in line]
                bars = [[y - row["low"] for y, row in zip(accuracy, line, strict=True)],
                        [row["high"] - y for y, row in zip(accuracy, line, strict=True)]]  # fmt: skip
                dashed = "--" if name.startswith("decode") else "-"
                axis.errorbar(less, accuracy, bars, label=name, linestyle=dashed, capsize=2, **looks[name])
            axis.set(title=task, xlabel="dense / sparse places", ylabel="accuracy", ylim=(-0.03, 1.03))
            plots.log_if_wide(axis, [1 / (1 - row["sparsity"]) for row in rows])
        for axis in axes[len(shown) :]:
            axis.set_axis_off()
        words = "; ".join(
            f"{r['task']}, {r['phase']}, {r['unit']}: {r['accuracy']:.1%} at {r['sparsity']:.1%} sparsity"
            for r in rows
            if r["wanted"] == max(self.sparsities)
        )
        title = f"Accuracy of {rows[0]['model']} at {longest:,} tokens by how much less is read"
        return plots.svg(figure, axes[0], title, f"{words}.")

    def _cost(self, curves: Sequence[dict[str, Any]]) -> dict[str, str]:
        """Accuracy over operations at the greatest length, a panel for each phase and unit, a line for each model."""
        longest = max(row["length"] for row in curves)
        points = [p for p in self.points(curves) if p["length"] == longest]
        figure, axes = plots.figure(len(self.phases), len(self.units))
        names = sorted({p["model"] for p in points}, key=lambda name: -self.models.index(name))
        looks = plots.looks(names)
        panels = [(phase, unit) for phase in self.phases for unit in self.units]
        for axis, (phase, unit) in zip(axes, panels, strict=True):
            for name in names:
                line = [p for p in points if (p["phase"], p["unit"], p["model"]) == (phase, unit, name)]
                flops, accuracy = [p["flops"] for p in line], [p["accuracy"] for p in line]
                bars = [[p["accuracy"] - p["low"] for p in line], [p["high"] - p["accuracy"] for p in line]]
                axis.errorbar(flops, accuracy, bars, label=name, capsize=2, **looks[name])
                axis.plot(flops[:1], accuracy[:1], "o", color=looks[name]["color"], markersize=11, fillstyle="none")
            axis.set(title=f"{phase}, {unit}", xlabel="operations", ylabel="accuracy", ylim=(-0.03, 1.03), xscale="log")
        words = "; ".join(
            f"{p['phase']}, {p['unit']}, {p['model']}: {p['accuracy']:.1%} for {p['flops']:.3g} at {p['sparsity']:.1%}"
            for p in points
        )
        title = f"Accuracy over floating-point operations at {longest:,} tokens (dense: circled)"
        return plots.svg(figure, axes[0], title, f"Sparsity, mean accuracy and operations: {words}.")


@functools.lru_cache(8)
@torch.no_grad()
def _dense(name: str, found: Path, task: str, length: int, seed: int, count: int) -> list[int]:
    """Right answers of the model as it is, by page: what all cells of a task and length are measured against."""
    model, vocabulary, *_ = load(name, found)
    hits = []
    for some in _batches(vocabulary.samples(task, length, seed, count)):
        logits = model(input_ids=_stacked(some, model), use_cache=False).logits
        hits += [right(each, page, 0) for each, page in zip(logits, some, strict=True)]
    return hits


def _batches(pages: Sequence[tasks.Sample]) -> Iterator[list[tasks.Sample]]:
    """Neighbours of one length that are cut at one place, as many as are read together."""
    for _, group in groupby(pages, lambda page: (len(page.tokens), page.answers[0][0])):
        alike = list(group)
        together = max(1, TOKENS // len(alike[0].tokens))
        yield from (alike[i : i + together] for i in range(0, len(alike), together))


def _stacked(pages: Sequence[tasks.Sample], model: Any) -> Tensor:
    return torch.stack([page.tokens for page in pages]).to(model.device)


@functools.cache
def _source() -> str:
    """A hash of this file and of what ranks the lines; taken once, as they were when this process began to run them."""
    files = Path(__file__), Path(str(sys.modules[by_distance.__module__].__file__))
    return cells.sources(*files)
