"""What one published system declares: where it comes from, what it promises, how it is built, what its paper claims."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import nn

from ..core.spec import Attention

if TYPE_CHECKING:  # the cache needs transformers, the report matplotlib, and a system of another kind neither
    from ..cache.policies import Policy
    from ..nn.backbones import Place
    from ..study.cells import Comparison

Verdict = Literal["holds", "does not hold", "not measured"]


@dataclass(frozen=True)
class Promises:
    """What the laws of :mod:`saccade.study.laws` may hold a system to.

    causal: a query never depends on a later key.
    cross: queries and keys may come from different sequences, of any two lengths.
    exponent: operations grow at most as ``N ** exponent`` (2.0 dense, 1.0 linear).
    decodes: one query at a time over a growing cache gives what the whole sequence gives.
    padding: sequences padded on the right into a batch give what each gives alone.
    unit_rows: the weights of a row that sees a key sum to one.
    unit_size: their absolute values do.
    nonnegative: no weight is below zero.
    training_free: works in a model trained with softmax attention.
    needs_training: has to be trained, or trained on, before it is worth anything.
    hosts: kinds of model it can be installed in, of "transformers", "diffusers" and "timm".
    """

    causal: bool = True
    cross: bool = True
    exponent: float = 2.0
    decodes: bool = True
    padding: bool = True
    unit_rows: bool = False
    unit_size: bool = False
    nonnegative: bool = True
    training_free: bool = False
    needs_training: bool = True
    hosts: tuple[str, ...] = ("transformers",)


@dataclass(frozen=True)
class ClaimNumbers:
    """What a claim measured: numbers by name (JSON values), the verdict, and one sentence that says both."""

    numbers: dict[str, Any]
    verdict: Verdict
    statement: str

    @staticmethod
    def decide(numbers: dict[str, Any], statement: str, **conditions: bool) -> ClaimNumbers:
        """The claim holds if every named condition does; those that fail are named in the statement."""
        failed = [name.replace("_", " ") for name, met in conditions.items() if not met]
        if failed:
            return ClaimNumbers(numbers, "does not hold", f"{statement} Not met: {', '.join(failed)}.")
        return ClaimNumbers(numbers, "holds", statement)


@dataclass(frozen=True)
class Unmeasured(Exception):  # noqa: N818  (not an error: the ledger says "not measured")
    """Raised by a claim that cannot be measured here, with the reason."""

    reason: str


class System:
    """Base of all systems. The constructor's arguments are the settings; it stores each under its own name, untouched.

    Subclasses set the class attributes, store their settings and define :meth:`build` and :meth:`claim`.
    """

    slug: ClassVar[str] = ""
    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    code: ClassVar[str | None] = None
    promises: ClassVar[Promises] = Promises()
    family: ClassVar[str] = "own"  # of a catalogued system: the folder its file lies in

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        package, _, rest = cls.__module__.partition("systems.")
        if package == "saccade." and "." in rest:
            cls.family = rest.split(".")[0]

    def build(self, heads: int) -> Attention:
        """The attention program for one layer of so many query heads, learned parts fresh."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is built: define build(self, heads)")

    def claim(self) -> ClaimNumbers:
        """Measure the paper's headline at small scale, in at most three minutes on two cores."""
        raise Unmeasured("the system defines no claim")

    def promised(self) -> Promises:
        """What this instance promises: the class's promises, unless a setting narrows them.

        A setting called ``causal`` does: what is not causal does not decode either.
        """
        causal = getattr(self, "causal", True)
        return self.promises if causal else replace(self.promises, causal=False, decodes=False)

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """Names and defaults of the settings (``inspect.Parameter.empty`` where one must be given)."""
        if cls.__init__ is object.__init__:
            return {}
        found = list(inspect.signature(cls.__init__).parameters.values())[1:]
        return {p.name: p.default for p in found}

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={getattr(self, name, '?')!r}" for name in self.settings())
        return f"{type(self).__name__}({shown})"


class CacheSystem(System):
    """A system that decides what a cache keeps: subclasses define :meth:`policy`, not :meth:`build`."""

    promises = Promises(training_free=True, needs_training=False)

    def policy(self) -> Policy:
        """The policy of a :class:`saccade.cache.Cache`, with these settings."""
        raise NotImplementedError(f"{type(self).__name__} does not say what is kept: define policy(self)")


class MethodSystem(System):
    """A system that is done to a model of a host library: subclasses define :meth:`apply`, not :meth:`build`."""

    promises = Promises(training_free=True, needs_training=False)

    def apply(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Make an unmodified model work this way until the context is left; then it is as it was."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it does: define apply(self, model)")


class LayerSystem(System):
    """A system that is more than a program: subclasses define :meth:`layer`, not :meth:`build`."""

    def layer(self, place: Place) -> nn.Module:
        """What stands there in a backbone of :mod:`saccade.nn`: a layer of its own, or a program for a MultiHead.

        A layer takes ``(x [B, N, width], cache=, keep=)`` as :class:`saccade.nn.MultiHead` does.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what its layer is: define layer(self, place)")


class StudySystem(System):
    """A comparison of systems with each other, run by ``saccade study SLUG``: subclasses define :meth:`comparison`."""

    promises = Promises(training_free=True, needs_training=False)
    small: ClassVar[dict[str, Any]] = {}  # settings of the smallest sensible run: for a first look, laws and tests

    def comparison(self) -> Comparison:
        """The cells to measure with these settings, and how they become a page."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it compares: define comparison(self)")
