"""What people do to a model's attention, and how it acts together at one place.

A host finds a model's :class:`Site` s and calls :func:`run` wherever attention is computed. An :class:`Act` is what
one call of :func:`saccade.install`, ``watch`` or ``edit`` does at one site. Of several programs the innermost counts;
edits follow one another in the order in which they came; every watcher sees the weights that multiply the values.
"""

from __future__ import annotations

import copy
import fnmatch
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..core.attend import attention
from ..core.edits import Dropout, Edit, OnHeads
from ..core.errors import SpecError, Unsupported
from ..core.linear import LinearAttention
from ..core.masks import Full, as_mask
from ..core.normalizers import Softmax
from ..core.scores import Bias, Dot, SoftCap
from ..core.spec import Attention
from ..core.stats import Stat
from . import linear
from .regions import Names
from .views import View

STATE = "_saccade_acts"

Spec = Attention | LinearAttention
Program = Spec | Callable[[int, int], Spec]
Programs = list[tuple[tuple[int, ...] | None, Attention]]


@dataclass(frozen=True, eq=False)
class Site:
    """One attention module of a model: its path, its layer's number, its kinds ("self", "text", ...) and heads."""

    path: str
    layer: int
    kinds: frozenset[str]
    heads: int
    module: nn.Module

    def __str__(self) -> str:
        return f"{self.path} (layer {self.layer}, {' '.join(sorted(self.kinds))}, {self.heads} heads)"


def _as_it_is(program: Attention) -> Attention:
    return program


@dataclass(frozen=True)
class Frame:
    """A model's own attention at one call, into which programs are put.

    Attributes:
        combine: puts the model's mask, scale, soft cap, sinks and bias around a program (see :func:`inside`); if not
            given the model has none of these.
        offset: the place of query 0 among the keys.
        name: tells frames apart whose ``combine`` differs; ``None``: this one is like no other.
    """

    combine: Callable[[Attention], Attention] = _as_it_is
    offset: int = 0
    name: Any = None


def inside(
    allowed: Any = None, *, scale: float | None = None, biases: Sequence[Tensor] = (), dropout: float = 0.0,
    softcap: float | None = None, sinks: Tensor | None = None,
) -> Callable[[Attention], Attention]:  # fmt: skip
    """What puts a program inside a model's own mask, scale, soft cap, biases, sink logits and dropout.

    Args:
        allowed: what the model lets its queries see: a mask as :class:`saccade.Attention` takes it, or a ``View``.
        scale: of the model's dot product, unless the program has one.
        biases: tensors that broadcast to ``[B, H, N, M]``, added to the scores before the program's own score parts.
        dropout: probability; drawn from torch's generator, so that gradient checkpointing drops the same again.
        softcap: of the model's scores.
        sinks: logits ``[H]`` that take mass and have no value.
    """
    view = allowed if isinstance(allowed, View) else View(as_mask(allowed), 0, 0)
    own = ([SoftCap(softcap)] if softcap is not None else []) + [Bias(b) for b in biases]
    dropped = [Dropout(dropout, seed=int(torch.randint(2**31, ())))] if dropout else []
    return functools.partial(_inside, view, scale, own, sinks, dropped)  # unlike a closure, it can be pickled


def _inside(
    view: View, scale: float | None, own: Sequence[Any], sinks: Tensor | None, dropped: Sequence[Edit],
    program: Attention,
) -> Attention:  # fmt: skip
    form, normalizer = program.form, program.normalizer
    if scale is not None and type(form) is Dot and form.factor is None:
        form = Dot(scale)
    if sinks is not None:
        if type(normalizer) is not Softmax or normalizer.sink is not None:
            raise Unsupported(
                f"the model's softmax has sink logits, and {type(normalizer).__name__} would take their place"
            )
        normalizer = Softmax(sink=sinks)
    return Attention(
        score=[form, *own, *program.modifiers], mask=view.narrow(program.mask), normalizer=normalizer,
        edits=[*program.changes, *dropped], select=program.select,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a site's attention: queries ``[B, H, N, D]``, keys and values ``[B, Hkv, M, D]``, output."""

    site: Site
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    frame: Frame


@dataclass(frozen=True)
class Looker:
    """Stats that a host itself wants of a call, and who is told of them."""

    stats: Sequence[Stat]
    tell: Callable[[dict[str, Any]], None]


@dataclass(eq=False)
class Act:
    """What one handle does at one site; ``heads``: on these alone."""

    site: Site
    heads: tuple[int, ...] | None = None
    program: Spec | None = None
    edits: Sequence[Edit] = ()
    stats: Sequence[Stat] = ()
    see: Callable[[Call, dict[str, Any]], None] | None = None
    names: Names | None = None  # what the names of its regions mean
    hook: RemovableHandle | None = None  # looks at a linear program's cache before it grows


_NOWHERE = Site("", 0, frozenset(), 0, nn.Identity())


@dataclass(eq=False)
class Acts:
    """All acts at one module, and the programs they make with the frames seen so far."""

    site: Site
    acts: list[Act] = field(default_factory=list)
    combined: dict[Any, Attention] = field(default_factory=dict)
    before: linear.Known | None = None  # of the keys that this call's cache already held

    def programs(self) -> list[tuple[tuple[int, ...] | None, Spec]]:
        """Programs by head: the first for all heads, later ones for those they name."""
        found: list[tuple[tuple[int, ...] | None, Spec]] = [(None, Attention())]
        for act in self.acts:
            if act.program is not None:
                found = [*found, (act.heads, act.program)] if act.heads is not None else [(None, act.program)]
        return found

    def ran(self, call: Call) -> Programs:
        """The same as they ran in a call: with all edits, inside the model's frame, linear ones by their weights."""
        keys = call.k.shape[2]
        return [(heads, self.whole(p, i, call.frame, keys)) for i, (heads, p) in enumerate(self.programs())]

    def edits(self, keys: int) -> list[Edit]:
        """All edits, those of some heads confined to them, their names those of the keys that are there."""
        found = []
        for act in self.acts:
            for edit in act.edits if act.names is None else [act.names.bind(e, keys) for e in act.edits]:
                found.append(edit if act.heads is None else OnHeads(edit, act.heads))
        return found

    def keep(self, program: LinearAttention, frame: Frame) -> Tensor | None:
        """Which keys a linear program takes for tokens, if it can run inside the model's frame."""
        key = None if frame.name is None else ("own", frame.name)
        own = self.combined.get(key) or frame.combine(Attention())
        if key is not None:
            self.combined[key] = own
        return linear.sight(own, program, self.site.path or type(self.site.module).__name__)

    def whole(self, program: Spec, index: int, frame: Frame, keys: int) -> Attention:
        """A program with all edits inside the model's frame."""
        named = any(act.names is not None for act in self.acts)
        key = None if frame.name is None or named else (index, frame.name)
        if key is not None and key in self.combined:
            return self.combined[key]
        if isinstance(program, LinearAttention):
            self.keep(program, frame)
            program = linear.weighed(program)
        spec = frame.combine(program)
        edits = self.edits(keys)
        if edits:
            spec = Attention(
                score=[spec.form, *spec.modifiers], mask=spec.mask, normalizer=spec.normalizer,
                edits=[*spec.changes, *edits], select=spec.select,
            )  # fmt: skip
        if key is not None:
            self.combined[key] = spec
        return spec


def add(act: Act) -> None:
    """Let an act take part at its site's module."""
    acts = act.site.module.__dict__.setdefault(STATE, Acts(act.site))
    acts.acts.append(act)
    acts.combined.clear()
    if isinstance(act.program, LinearAttention):
        act.hook = act.site.module.register_forward_pre_hook(_look_before, with_kwargs=True)


def drop(act: Act) -> None:
    """Take an act away, and with the last one every trace."""
    acts = act.site.module.__dict__[STATE]
    acts.acts.remove(act)
    acts.combined.clear()
    if act.hook is not None:
        act.hook.remove()
    if not acts.acts:
        del act.site.module.__dict__[STATE]


def _look_before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Before a module adds its keys to a cache of transformers: the states after those that are there."""
    module.__dict__[STATE].before = linear.known_in(kwargs.get("past_key_values"), getattr(module, "layer_idx", None))


def at_work(module: nn.Module) -> bool:
    """Is anything done to this module?"""
    acts: Acts | None = module.__dict__.get(STATE)
    return acts is not None and any(a.program is not None or a.edits or a.stats or a.see for a in acts.acts)


def narrows(module: nn.Module) -> bool:
    """Does a program at this module have a mask?"""
    acts: Acts | None = module.__dict__.get(STATE)
    return acts is not None and any(
        isinstance(program, Attention) and not isinstance(program.mask, Full) for _, program in acts.programs()
    )


def run(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, frame: Frame, looker: Looker | None = None) -> Tensor:
    """Attention of a module with all that is done to it: ``[B, H, N, Dv]``.

    Your own attention module is hosted by calling this in place of its attention function. ``looker``: the host's
    own stats and who is told of them, beside those of the acts.
    """
    acts: Acts = module.__dict__.get(STATE) or Acts(_NOWHERE)
    if not acts.acts and looker is None:
        return attention(q, k, v, frame.combine(Attention()), offset=frame.offset)
    watching = [act for act in acts.acts if act.stats]
    keys = k.shape[2]
    stats: list[Stat] = []
    for i, act in enumerate(watching):
        own = act.stats if act.names is None else [act.names.bind(s, keys) for s in act.stats]
        stats += [_labelled(s, f"{i}/{s.label}") for s in own]
    stats += looker.stats if looker is not None else ()
    by_weights = bool(stats) or any(act.edits for act in acts.acts)
    before, acts.before = acts.before, None
    out: Tensor | None = None
    seen: dict[str, Any] = {}
    for index, (heads, program) in enumerate(acts.programs()):
        if isinstance(program, LinearAttention) and not by_weights:
            mine, looked = linear.run(program, q, k, v, acts.keep(program, frame), frame.offset, before), {}
        else:
            spec = acts.whole(program, index, frame, keys)
            found = attention(q, k, v, spec, stats=stats, offset=frame.offset)
            mine, looked = found if stats else (found, {})
            mine = mine.to(q.dtype)  # the features of a linear program are wider
        if heads is None:
            out, seen = mine, looked
        else:
            of = torch.tensor(heads, device=q.device)
            out = _put(out, mine, of)
            seen = {name: _put(seen[name], looked[name], of) for name in seen}
    assert out is not None
    for act in acts.acts:
        if act.see is not None:
            told = {}
            if act.stats:
                i = watching.index(act)
                told = {s.label: _take(seen[f"{i}/{s.label}"], act.heads) for s in act.stats}
            act.see(Call(acts.site, q, k, v, out, frame), told)
    if looker is not None:
        looker.tell({s.label: seen[s.label] for s in looker.stats})
    return out


def _labelled(stat: Stat, label: str) -> Stat:
    renamed = copy.copy(stat)
    renamed.label = label
    return renamed


def _over(function: Callable[..., Tensor], *results: Any) -> Any:
    """Apply a function to the tensors ``[B, H, ...]`` of a stat's results: a tensor, a dict or a named tuple."""
    first = results[0]
    if isinstance(first, Tensor):
        return function(*results)
    if isinstance(first, dict):
        return {name: _over(function, *(r[name] for r in results)) for name in first}
    return type(first)(*(_over(function, *parts) for parts in zip(*results, strict=True)))


def _put(whole: Any, part: Any, heads: Tensor) -> Any:
    return _over(lambda a, b: a.index_copy(1, heads, b.index_select(1, heads)), whole, part)


def _take(whole: Any, heads: tuple[int, ...] | None) -> Any:
    return whole if heads is None else _over(lambda a: a[:, list(heads)], whole)


def pick(sites: Sequence[Site], model: str, layers: Any, kind: str | Iterable[str] | None) -> list[Site]:
    """The sites that the selectors name.

    Args:
        sites: all of the model's.
        model: its name, for the error.
        layers: a number (negative: from the end), several, a slice, a pattern of paths (``"*.cross_attn"``) or a
            function of a :class:`Site`; ``None``: all.
        kind: ``"self"``, ``"cross"``, ``"vision"``, ``"text"``, ``"audio"``, or several: all must hold.

    Raises:
        SpecError: nothing is named; the message lists what there is.
    """
    kinds = {kind} if isinstance(kind, str) else set(kind or ())
    among = [s for s in sites if kinds <= s.kinds]
    count = max((s.layer for s in among), default=-1) + 1
    if layers is None:
        chosen = among
    elif isinstance(layers, str):
        chosen = [s for s in among if fnmatch.fnmatchcase(s.path, layers)]
    elif callable(layers):
        chosen = [s for s in among if layers(s)]
    else:
        if isinstance(layers, slice):
            numbers = set(range(count)[layers])
        else:
            asked = [layers] if isinstance(layers, int) else [int(i) for i in layers]
            numbers = {i + count if i < 0 else i for i in asked}
            missing = sorted(numbers - {s.layer for s in among})
            if missing and among:
                raise SpecError(f"layers={layers}: {model} has no layer {missing}; it has {_there(among)}")
        chosen = [s for s in among if s.layer in numbers]
    if not chosen:
        told = ", ".join(f"{n}={v!r}" for n, v in (("layers", layers), ("kind", kind)) if v is not None)
        raise SpecError(f"{told or 'this model'} matches no attention layer of {model}; it has {_there(sites)}")
    return chosen


def pick_heads(site: Site, heads: Any) -> tuple[int, ...] | None:
    """Heads as numbers from 0: an int, several, or a slice; ``None``: all."""
    if heads is None:
        return None
    if isinstance(heads, slice):
        chosen = tuple(range(site.heads)[heads])
    else:
        asked = [heads] if isinstance(heads, int) else [int(h) for h in heads]
        outside = [h for h in asked if not -site.heads <= h < site.heads]
        if outside:
            raise SpecError(f"heads={heads}: {site.path} has heads 0 to {site.heads - 1}, not {outside}")
        chosen = tuple(dict.fromkeys(h % site.heads for h in asked))
    if not chosen:
        raise SpecError(f"heads={heads} names none of the {site.heads} heads of {site.path}")
    return chosen


def _there(sites: Sequence[Site]) -> str:
    """What there is, one line per sort of layer."""
    sorts: dict[tuple[str, ...], list[Site]] = {}
    for s in sites:
        sorts.setdefault(tuple(sorted(s.kinds)), []).append(s)
    return "; ".join(
        f"{' '.join(kinds)} layers {sorted({s.layer for s in some})} ({some[0].path} ...)"
        for kinds, some in sorts.items()
    )
