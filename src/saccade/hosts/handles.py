"""``install``, ``watch`` and ``edit``: a model's attention as a place where programs, stats and edits can be put."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from ..core.edits import as_edit
from ..core.errors import SpecError
from ..core.linear import LinearAttention
from ..core.spec import Attention
from ..core.stats import check_names
from . import acts
from .acts import Act, Call, Program, Site, Spec
from .regions import Names, names


class Host(Protocol):
    """What a model library's host does: find attention, and lead it through :func:`saccade.hosts.acts.run`."""

    def sites(self) -> list[Site]:
        """Every attention module of the model."""
        ...

    def enter(self) -> None:
        """Lead the model's attention through saccade; called for every handle."""
        ...

    def leave(self) -> None:
        """Undo one :meth:`enter`; after the last one the model is as it was."""
        ...


def host_of(model: nn.Module) -> Host:
    """The host of a model, by the library its class comes from."""
    if not isinstance(model, nn.Module):
        raise SpecError(f"model must be a torch module; got {type(model).__name__}")
    if any(c.__module__.startswith("transformers.") for c in type(model).__mro__):
        from .transformers import TransformersHost

        return TransformersHost(model)
    from .modules import ModulesHost

    return ModulesHost(model)


class Handle:
    """What was done to a model: a context manager, and :meth:`remove` for the same without ``with``.

    ``sites`` says where. Handles nest, compose, and may be removed in any order.
    """

    def __init__(
        self, model: nn.Module, layers: Any, heads: Any, kind: Any, make: Callable[[Site], dict[str, Any]],
        parts: Sequence[Any] = (), regions: Mapping[str, Any] | None = None,
    ):  # fmt: skip
        self.model, self._host = model, host_of(model)
        self.sites = acts.pick(self._host.sites(), type(model).__name__, layers, kind)
        chosen = [acts.pick_heads(site, heads) for site in self.sites]
        used = names(parts)
        self._names = Names(model, used, regions or {}) if used else None
        self._acts = [Act(s, h, names=self._names, **make(s)) for s, h in zip(self.sites, chosen, strict=True)]
        try:
            self._host.enter()
        except BaseException:
            self._forget()
            raise
        self.installed = True
        for act in self._acts:
            acts.add(act)

    def remove(self) -> None:
        """Put the model back as it was; a second call does nothing."""
        if self.installed:
            self.installed = False
            for act in self._acts:
                acts.drop(act)
            self._host.leave()
            self._forget()

    def _forget(self) -> None:
        if self._names is not None:
            self._names.close()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "" if self.installed else ", removed"
        return f"{type(self).__name__}({type(self.model).__name__}{state}: {', '.join(s.path for s in self.sites)})"


class Watching(Handle):
    """What a watched model's attention showed: ``seen[path][stat]``, or by layer number where one site has it.

    After every forward ``seen`` holds that call's results (with ``every=True`` the list of all calls').
    """

    seen: dict[str, Any]

    def __enter__(self) -> Watching:
        return self

    def __getitem__(self, layer: int | str) -> Any:
        if isinstance(layer, str):
            return self.seen[layer]
        paths = [s.path for s in self.sites if s.layer == layer]
        if len(paths) != 1:
            there = [s.path for s in self.sites]
            raise SpecError(f"{len(paths)} watched sites have layer {layer}: name one by its path, of {there}")
        return self.seen[paths[0]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.seen)


def install(model: nn.Module, program: Program, *, layers: Any = None, heads: Any = None, kind: Any = None) -> Handle:
    """Make a model run a program, until the handle is closed.

    Args:
        model: an unmodified model of transformers, of timm, or of torch's own attention modules.
        program: a :class:`saccade.Attention`, or ``f(layer, heads) -> Attention``. It narrows what the model itself
            allows: the model's masks, padding, scale, soft cap, sinks and position bias stay. Masks of the program
            count from each text's first token; scores, edits and selectors count the keys that are there.
            Also a :class:`saccade.LinearAttention`, as causal as the layer, where the model has no other mask than
            that and padding, and no soft cap, sinks or bias. It has its own scale in place of the model's.
        layers: a number (negative: from the end), several, a slice, a pattern of module paths, or a function of a
            site; all if not given.
        heads: an int, several, or a slice; all if not given.
        kind: ``"self"``, ``"cross"``, ``"vision"``, ``"text"``, ``"audio"``, or several, all of which must hold.

    Returns:
        A context manager; leaving it, or ``.remove()``, puts the model back exactly as it was. ``.sites`` says
        where the program runs.

    Raises:
        SpecError: the program or the model is of the wrong kind, or the selectors name nothing (with what there is).
        Unsupported: this model cannot run programs; the message says why.
    """
    if not isinstance(program, (Attention, LinearAttention)) and not callable(program):
        raise SpecError(
            "program must be a saccade.Attention, a saccade.LinearAttention or f(layer, heads); got"
            f" {type(program).__name__}"
        )
    return Handle(model, layers, heads, kind, lambda site: {"program": resolve(program, site)})


def edit(
    model: nn.Module, *edits: Any, layers: Any = None, heads: Any = None, kind: Any = None,
    regions: Mapping[str, Any] | None = None,
) -> Handle:  # fmt: skip
    """Change a model's attention weights while it runs, until the handle is closed.

    Args:
        edits: parts of :mod:`saccade.edits`, or functions ``f(weight, b, h, q, k)``, in their order. Their regions may
            name their keys: ``edits.Scale(0.5, keys="image")``.
        model, layers, heads, kind: as for :func:`install`.
        regions: what the names mean, found anew for each sample: a slice, an int or a list (places counted from each
            text's first token), a bool tensor ``[B, N]`` of the prompt, or a function of a call's token ids ``[B, N]``
            that gives bool ``[B, N]``. "image" is known where the model's config has an image token.
    """
    if not edits:
        raise SpecError("edit: expected at least one edit, such as edits.Zero(keys=0); got none")
    parts = [as_edit(e) for e in edits]
    return Handle(model, layers, heads, kind, lambda site: {"edits": parts}, parts, regions)


def watch(
    model: nn.Module, *stats: Any, layers: Any = None, heads: Any = None, kind: Any = None, every: bool = False,
    regions: Mapping[str, Any] | None = None,
) -> Watching:  # fmt: skip
    """Look at a model's attention weights while it runs, without ever holding all of them.

    Args:
        stats: parts of :mod:`saccade.stats`.
        every: keep what every call showed (decoding: one per step), not the last one's alone.
        model, layers, heads, kind: as for :func:`install`; regions: as for :func:`edit`.

    Returns:
        A context manager whose ``seen[path][stat]`` (or ``handle[layer][stat]``) fills while the model runs.
    """
    if not stats:
        raise SpecError("watch: expected at least one stat, such as stats.Entropy(); got none")
    check_names(stats)
    seen: dict[str, Any] = {}

    def see(call: Call, told: dict[str, Any]) -> None:
        if every:
            seen.setdefault(call.site.path, []).append(told)
        else:
            seen[call.site.path] = told

    handle = Watching(model, layers, heads, kind, lambda site: {"stats": stats, "see": see}, stats, regions)
    handle.seen = seen
    return handle


def listen(model: nn.Module, hear: Callable[[Call], None], **where: Any) -> Handle:
    """Call ``hear`` after every attention of a model, with what went in and came out."""
    return Handle(
        model, where.get("layers"), where.get("heads"), where.get("kind"),
        lambda site: {"see": lambda call, told: hear(call)},
    )  # fmt: skip


def lead(model: nn.Module) -> Handle:
    """Lead a model's attention through the engine and do nothing to it."""
    return Handle(model, None, None, None, lambda site: {})


def resolve(program: Program, site: Site) -> Spec:
    """The program for a site."""
    kinds = (Attention, LinearAttention)
    found = program if isinstance(program, kinds) else program(site.layer, site.heads)
    if not isinstance(found, kinds):
        raise SpecError(
            f"the program for layer {site.layer} must be a saccade.Attention or a saccade.LinearAttention; got"
            f" {type(found).__name__}"
        )
    return found


__all__: Sequence[str] = ("Handle", "Watching", "edit", "install", "listen", "watch")
