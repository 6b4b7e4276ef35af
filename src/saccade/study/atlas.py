"""The head atlas: what every attention head of a model does on some inputs, how sure that is, and pictures of it.

Scores of a head are shares, means over the queries that have more than 16 tokens before them (half of a short input):

    offset      weight of the token at one distance: the best of the query's own, 8 before and 8 after it
    local       weight of the others of these
    sink        mean weight that the first token gets from queries more than 8 tokens away
    later sink  the same of another token, the greatest (of those that a quarter of the queries could give it)
    induction   weight of the tokens, more than 8 away, before which the query's token and the one before it stood
    retrieval   how often the greatest weight is on the token that is to be said next, where answers are known
    broad       entropy over that of equal weights for all tokens so far (in a causal layer; else all)

A head is called after the score that is the farthest on the way from its threshold to 1, and mixed if none is above.
Thresholds: 0.5 for offset and local (as Clark et al., arXiv:1906.04341, say that a head attends to the token before),
0.3 for sinks (Gu et al., arXiv:2410.10781), 0.1 for retrieval (Wu et al., arXiv:2404.15574); 0.3 for induction (the
prefix matching of Olsson et al., arXiv:2209.11895) and 0.7 for broad are this file's own.
"""

from __future__ import annotations

import inspect
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import SpecError
from ..core.stats import Entropy, MeanDistance, Rows, Stat
from ..core.tile import Tile, per_row
from ..hosts.acts import Call, Site
from ..hosts.handles import Handle
from ..worlds.text import Answer, Example
from . import plots
from .cells import write_whole
from .page import Page, Table
from .progress import bar

REACH = 8  # tokens on each side of a query that are near it
OFFSETS = tuple(range(-REACH, REACH + 1))  # where the key lies, seen from the query
THRESHOLDS = {
    "offset": 0.5, "local": 0.5, "sink": 0.3, "later sink": 0.3, "induction": 0.3, "retrieval": 0.1, "broad": 0.7,
}  # fmt: skip
MIXED = "mixed"
DRAWS = 200  # of the inputs, with replacement, for how sure a label is


@dataclass(frozen=True)
class Head:
    """What one head does.

    Attributes:
        path, layer, head: where it is.
        label: one of :data:`THRESHOLDS`, or "mixed".
        offset: the best one (-1: the token before the query, 0: its own).
        key: the token that gets most as a later sink, in most inputs.
        scores: by name; ``None`` where the inputs say nothing about it.
        distance: mean distance in tokens.
        margin: how much farther the label is on its way to 1 than the next one; of a mixed head to the next threshold.
        sure: share of draws of the inputs that give the same label (and offset); ``None`` for a single input.
    """

    path: str
    layer: int
    head: int
    label: str
    offset: int
    key: int | None
    scores: dict[str, float | None]
    distance: float
    margin: float
    sure: float | None

    @property
    def words(self) -> str:
        """The label as people read it."""
        if self.label != "offset":
            return self.label
        return f"offset {self.offset:+d}" if self.offset else "offset 0 (itself)"


@dataclass(frozen=True)
class Atlas:
    """All heads of a model, and from what: ``atlas[layer, head]``, :meth:`named`, :meth:`table`, :meth:`save`."""

    model: str
    heads: list[Head]
    inputs: int
    tokens: int
    seconds: float
    command: str = "saccade.report(model, inputs)"
    _places: dict[tuple[Any, int], Head] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        layers = Counter((head.layer, head.head) for head in self.heads)
        for head in self.heads:
            self._places[head.path, head.head] = head
            if layers[head.layer, head.head] == 1:
                self._places[head.layer, head.head] = head

    def __getitem__(self, place: tuple[int | str, int]) -> Head:
        if place not in self._places:
            raise SpecError(
                f"no single head at {place}: name one by layer and head, or by its module's path and head, such as"
                f" {(self.heads[0].path, self.heads[0].head)}"
            )
        return self._places[place]

    def named(self, label: str) -> list[Head]:
        """The heads with a label, the clearest first."""
        if label not in (*THRESHOLDS, MIXED):
            raise SpecError(f"labels are {', '.join((*THRESHOLDS, MIXED))}; got {label!r}")
        return sorted((h for h in self.heads if h.label == label), key=lambda h: -h.margin)

    def table(self) -> Any:
        """All heads as a rich table."""
        return self._page([self._rows()]).table()

    def save(self, path: str | Path) -> Path:
        """Write one HTML file with pictures and all numbers, whole or not at all; its path."""
        path = Path(path)
        write_whole(path, self._page([self._map(), self._scores(), self._rows()]).html())
        return path

    def _page(self, parts: Sequence[Any]) -> Page:
        counts = Counter(head.label for head in self.heads)
        told = ", ".join(f"{count} {label}" for label, count in counts.most_common())
        intro = f"{len(self.heads)} heads on {self.inputs} inputs of {self.tokens} tokens in all: {told}."
        return Page(f"Heads of {self.model}", intro, parts, self.command, self.seconds)

    def _rows(self) -> Table:
        columns = ("head", "does", "sure", "margin", *THRESHOLDS, "offset at", "later sink at", "distance")
        return Table(
            "Every head", columns,
            [
                (
                    f"{h.path}, {h.head}" if self._crowded else f"{h.layer}.{h.head}", h.words,
                    *(None if x is None else round(x, 3) for x in (h.sure, h.margin, *h.scores.values())),
                    f"{h.offset:+d}", h.key, round(h.distance, 1),
                )
                for h in self.heads
            ],
            "sure: share of draws of the inputs with the same label; margin: how far it is ahead of the next one; then"
            " the scores; distance in tokens.",
        )  # fmt: skip

    @property
    def _crowded(self) -> bool:
        """Do several modules have the same layer number?"""
        return len({h.path for h in self.heads}) > len({h.layer for h in self.heads})

    def _grid(self) -> tuple[list[str], int]:
        return list(dict.fromkeys(h.path for h in self.heads)), 1 + max(h.head for h in self.heads)

    def _map(self) -> dict[str, str]:
        """Modules by heads, each in the colour of its label, the fainter the less sure."""
        labels = [label for label in (*THRESHOLDS, MIXED) if any(h.label == label for h in self.heads)]
        (figure, [axis]), look = plots.figure(1, 1), plots.looks((*THRESHOLDS, MIXED))
        paths, most = self._grid()
        figure.set_figheight(1.4 + 0.32 * len(paths))
        for label in labels:
            axis.scatter([], [], marker="s", s=80, color=look[label]["color"], label=label)
        for h in self.heads:
            sure = 1.0 if h.sure is None else h.sure
            axis.bar(
                h.head, 0.9, 0.9, paths.index(h.path) - 0.45, color=look[h.label]["color"], alpha=0.25 + 0.75 * sure
            )
            if h.label == "offset":
                axis.text(
                    h.head, paths.index(h.path), f"{h.offset:+d}", ha="center", va="center", fontsize=8, color=plots.INK
                )
        self._axes(axis, paths, most, "What each head does; faint: less sure")
        told = "; ".join(f"{h.path} head {h.head}: {h.words}" for h in self.heads)
        return plots.svg(figure, axis, "What each head does", told)

    def _scores(self) -> dict[str, str]:
        """One map of modules by heads for each score."""
        paths, most = self._grid()
        shown = [kind for kind in THRESHOLDS if any(h.scores[kind] is not None for h in self.heads)]
        figure, axes = plots.figure(-(-len(shown) // 4), 4)
        for axis, kind in zip(axes, shown, strict=False):
            values = torch.full((len(paths), most), torch.nan)
            for h in self.heads:
                value = h.scores[kind]
                values[paths.index(h.path), h.head] = torch.nan if value is None else value
            axis.pcolormesh(values.numpy(), vmin=0, vmax=1, cmap="viridis")
            self._axes(axis, paths, most, f"{kind} (named from {THRESHOLDS[kind]})", 0.5)
        for axis in axes[len(shown) :]:
            axis.set_visible(False)
        told = "; ".join(f"{kind}: greatest {max(h.scores[kind] or 0 for h in self.heads):.2f}" for kind in shown)
        return plots.svg(figure, axes[0], "Scores, from 0 (dark) to 1 (bright)", told)

    def _axes(self, axis: Any, paths: Sequence[str], most: int, title: str, middle: float = 0.0) -> None:
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("head")
        axis.grid(False)
        names = paths if self._crowded else [str(self._layer(p)) for p in paths]
        step = -(-len(paths) // 24)
        axis.set_yticks([i + middle for i in range(0, len(paths), step)], names[::step], fontsize=8)
        axis.set_xticks(
            [i + middle for i in range(0, most, -(-most // 16))], range(0, most, -(-most // 16)), fontsize=8
        )
        axis.set_ylim(len(paths) - 0.5 + middle, middle - 0.5)

    def _layer(self, path: str) -> int:
        return next(h.layer for h in self.heads if h.path == path)


def report(model: nn.Module, inputs: Any, *, layers: Any = None, kind: Any = None) -> Atlas:
    """The head atlas of a hosted model (``saccade.report``). Memory grows with an input's tokens, not their square.

    Args:
        model, layers, kind: as for :func:`saccade.install`.
        inputs: what the model is given, one or a list: a tensor (token ids ``[B, N]``, pictures), a mapping of its
            forward's arguments, or an :class:`~saccade.worlds.text.Example`, whose answers show retrieval. Every sample
            of a batch counts as one. Several are needed to say how sure a label is.

    Raises:
        SpecError: an input is of none of these kinds, is padded, or the model has no such layers.
    """
    several = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
    if not several:
        raise SpecError("report: expected at least one input, got none")
    started, tokens = time.monotonic(), 0
    found: dict[str, list[_Seen]] = {}
    sites: list[Site] = []
    with bar(len(several), "reading") as tell, torch.no_grad():
        for one in several:
            given, ids, answers = _read(model, one)
            handle = _Looking(model, layers, kind, ids, answers, found)
            with handle:
                model(**given) if isinstance(given, Mapping) else model(given)
            sites, tokens = handle.sites, tokens + handle.tokens
            tell("reading", 1)
    if not found:
        raise SpecError(f"{type(model).__name__} ran without attention: there is nothing to report")
    heads = [h for site in sites if site.path in found for h in _judged(site, _Seen.joined(found[site.path]))]
    samples = sum(len(seen.distance) for seen in found[heads[0].path])
    return Atlas(type(model).__name__, heads, samples, tokens, time.monotonic() - started)


def _read(model: nn.Module, one: Any) -> tuple[Any, Tensor | None, Sequence[Answer]]:
    """An input as the model takes it, its token ids ``[B, N]`` if it has some, and its answers."""
    given, ids = one, None
    answers: Sequence[Answer] = ()
    if isinstance(one, Example):
        given, answers = one.tokens[None].to(next(model.parameters()).device), one.answers
    if isinstance(given, Mapping):
        mask = given.get("attention_mask")
        if mask is not None and not bool(torch.as_tensor(mask).all()):
            raise SpecError("report: an input is padded, which would count as tokens: give its samples one by one")
        ids = None if "decoder_input_ids" in given else given.get("input_ids")
    elif isinstance(given, Tensor):
        ids = None if given.is_floating_point() else given
    else:
        raise SpecError(
            "report: an input must be a tensor, a mapping of the forward's arguments or an Example; got"
            f" {type(one).__name__}"
        )
    takes = inspect.signature(model.forward).parameters
    if ids is not None and "input_ids" in takes:  # of a language model the last logits are enough
        spare = {name: value for name, value in (("use_cache", False), ("logits_to_keep", 1)) if name in takes}
        given = spare | dict(given if isinstance(given, Mapping) else {"input_ids": given})
    return given, ids, answers


@dataclass(frozen=True, eq=False)
class _Seen:
    """What one call of a module showed of each sample and head; NaN where nothing could be seen.

    ``profile`` ``[S, H, offsets]``; ``sinks`` ``[S, H, 2]``, of the first and of another token, ``key`` ``[S, H]``;
    the others ``[S, H]``.
    """

    profile: Tensor
    sinks: Tensor
    key: Tensor
    induction: Tensor
    retrieval: Tensor
    broad: Tensor
    distance: Tensor

    @staticmethod
    def joined(seen: Sequence[_Seen]) -> _Seen:
        """All samples of all calls."""
        return _Seen(*(torch.cat([getattr(s, name) for s in seen]).cpu() for name in _Seen.__dataclass_fields__))

    def scores(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Scores ``[..., H, kinds]`` and best offsets ``[..., H]``, means over ``samples [..., S]``."""

        def mean(x: Tensor) -> Tensor:
            return x[samples].nanmean(samples.ndim - 1)

        near = mean(self.profile)
        best, offset = near.max(-1)
        sinks = mean(self.sinks)
        kinds = [best, near.sum(-1) - best, sinks[..., 0], sinks[..., 1], mean(self.induction), mean(self.retrieval)]
        return torch.stack([*kinds, mean(self.broad)], -1), torch.tensor(OFFSETS, device=offset.device)[offset]


class _Looking(Handle):
    """Stats of one forward, reduced as soon as a module has run."""

    def __init__(
        self, model: nn.Module, layers: Any, kind: Any, ids: Tensor | None, answers: Sequence[Answer],
        found: dict[str, list[_Seen]],
    ):  # fmt: skip
        self.found, self.ids, self.tokens = found, ids, 0
        places = [(a.start - 1 + i, a.evidence_start + i) for a in answers for i in range(a.stop - a.start)]
        self.evidence = torch.tensor([key for _, key in places])
        stats: list[Stat] = [Entropy(), MeanDistance(), Offsets(), FarMass()]
        stats += [Repeats(ids)] if ids is not None else []
        stats += [Rows([query for query, _ in places])] if places else []
        super().__init__(model, layers, None, kind, lambda site: {"stats": stats, "see": self._see})

    def _see(self, call: Call, told: dict[str, Any]) -> None:
        (batch, heads, n, _), m, offset = call.q.shape, call.k.shape[2], call.frame.offset
        self.tokens = max(self.tokens, batch * m)
        rows = torch.arange(offset, offset + n, device=call.q.device)
        late = rows >= min(2 * REACH, int(rows[n // 2]))
        causal = not bool(told["offsets"][..., REACH + 1 :].any())
        so_far = (rows[late] + 1 if causal else torch.full_like(rows[late], m)).clamp(min=2)
        first, last = offset, offset + n - 1
        keys = torch.arange(m, device=call.q.device)
        near = ((keys + REACH).clamp(max=last) - (keys - REACH).clamp(min=first) + 1).clamp(min=0)
        could = (last - keys - REACH).clamp(0, n) if causal else n - near  # queries that could give a key far mass
        far = (told["far_mass"] / could.clamp(min=1)).masked_fill(could < n / 4, torch.nan)
        later, key = far[..., 1:].nan_to_num(-1).max(-1) if m > 1 else (far[..., 0] - torch.nan, far[..., 0].long())
        nothing = torch.full((batch, heads), torch.nan, device=call.q.device)
        induction = retrieval = nothing
        if "repeats" in told:
            induction = told["repeats"][..., late].nanmean(-1)
        if "rows" in told and n == m:
            evidence = self.evidence.to(call.q.device)
            retrieval = (told["rows"].argmax(-1) == evidence).float().mean(-1)
        sinks = torch.stack([far[..., 0], later.masked_fill(later < 0, torch.nan)], -1)
        seen = _Seen(
            told["offsets"][:, :, late].mean(2), sinks, key + 1, induction, retrieval,
            (told["entropy"][..., late] / so_far.log()).mean(-1), told["mean_distance"][..., late].mean(-1),
        )  # fmt: skip
        self.found.setdefault(call.site.path, []).append(seen)


def _judged(site: Site, seen: _Seen) -> list[Head]:
    """The heads of a module."""
    samples = len(seen.distance)
    everything = torch.arange(samples)
    scores, offsets = seen.scores(everything)
    label, margin = _named(scores)
    sure = None
    if samples > 1:
        draws = torch.randint(samples, (DRAWS, samples), generator=torch.Generator().manual_seed(0))
        drawn, where = seen.scores(draws)
        same = _named(drawn)[0] == label
        same &= (where == offsets) | (label != 0)
        sure = same.double().mean(0)
    names = (*THRESHOLDS, MIXED)
    return [
        Head(
            site.path, site.layer, h, names[int(label[h])], int(offsets[h]),
            None if bool(scores[h, 3].isnan()) else int(seen.key[:, h].mode().values),
            {
                kind: None if bool(score.isnan()) else float(score)
                for kind, score in zip(THRESHOLDS, scores[h], strict=True)
            },
            float(seen.distance[:, h].mean()), float(margin[h]), None if sure is None else float(sure[h]),
        )
        for h in range(scores.shape[0])
    ]  # fmt: skip


def _named(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Labels ``[...]`` (the last: mixed) and margins from scores ``[..., kinds]``."""
    least = torch.tensor([*THRESHOLDS.values()], device=scores.device)
    way = ((scores - least) / (1 - least)).nan_to_num(-torch.inf)
    (best, second), kinds = way.topk(2).values.unbind(-1), way.argmax(-1)
    mixed = best < 0
    return kinds.masked_fill(mixed, len(least)), torch.where(mixed, -best, best - second.clamp(min=0))


class Offsets(Stat):
    """Weight of the keys at :data:`OFFSETS` from each query, ``[B, H, N, offsets]``; 0 where there is none."""

    def see(self, tile: Tile) -> tuple[Tensor, ...]:
        """By index where the tile's keys are a range."""
        weights, at = tile.weights, tile.at
        if at.first is None:
            return (torch.stack([(weights * (at.distance == -d)).sum(-1) for d in OFFSETS], -1),)
        index = at.row + torch.tensor(OFFSETS, device=weights.device) - at.first
        inside = (index >= 0) & (index < weights.shape[-1])
        index = index.clamp(0, weights.shape[-1] - 1).expand(*weights.shape[:3], -1)
        return (weights.gather(-1, index) * inside,)

    def widths(self, m: int) -> tuple[tuple[int, ...], ...]:
        """One number for each offset."""
        return ((len(OFFSETS),),)


class FarMass(Stat):
    """Mass each key receives from queries more than :data:`REACH` away, ``[B, H, M]``."""

    axis = "keys"

    def see(self, tile: Tile) -> tuple[Tensor, ...]:
        """All but the near ones."""
        far = tile.at.away(tile.weights.dtype) > REACH
        return ((tile.weights * far).sum(-2),)


class Repeats(Stat):
    """Mass of each query on keys more than :data:`REACH` before it that follow the same two tokens, ``[B, H, N]``.

    NaN for a query whose two tokens did not stand there before, and in a layer over other tokens than ``ids [B, N]``.
    """

    def __init__(self, ids: Tensor, name: str | None = None):
        super().__init__(name)
        pairs = torch.stack([ids.roll(1, -1), ids], -1).flatten(0, -2)
        code = pairs.unique(dim=0, return_inverse=True)[1].view(ids.shape)
        code[:, 0] = -1  # nothing stands before the first
        self.query, self.key = code, code.roll(1, -1)
        self.key[:, :2] = -2
        self.found = torch.zeros_like(ids, dtype=torch.bool)
        for b, row in enumerate(code.tolist()):
            first: dict[int, int] = {}
            for i, pair in enumerate(row):
                self.found[b, i] = i - (first.setdefault(pair, i) + 1) > REACH and pair >= 0

    def see(self, tile: Tile) -> tuple[Tensor, ...]:
        """Where the codes of the two tokens are the same."""
        weights, at = tile.weights, tile.at
        if (at.n, at.m) != (self.query.shape[1], self.query.shape[1]):
            return (torch.full_like(weights[..., 0], torch.nan),)
        same = per_row(self.query[:, None], at, "ids") == self.key[at.b, at.k]
        mass = (weights * (same & (at.distance > REACH))).sum(-1)
        return (mass.masked_fill(~per_row(self.found[:, None], at, "ids")[..., 0], torch.nan),)
