"""The attention program: what is computed, and nothing about how."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from .edits import Edit, as_edit
from .errors import SpecError
from .masks import Mask, as_mask
from .normalizers import Normalizer, Softmax
from .scores import Dot, Form, Score, as_score
from .selectors import Select
from .tile import Part


class Attention(nn.Module):
    """An attention mechanism as a small program: it denotes a weight matrix W(q, k), and attention is W v.

    The parts act in this order: ``score`` compares queries and keys, ``mask`` and ``select`` say which keys a query
    may see, ``normalizer`` turns a row of scores into weights, ``edits`` change the weights.

    Args:
        score: a part of :mod:`saccade.scores`, a FlexAttention ``score_mod``, or a sequence of them.
        mask: a part of :mod:`saccade.masks`, a bool tensor, or a FlexAttention ``mask_mod``.
        normalizer: a part of :mod:`saccade.normalizers`; softmax if not given.
        edits: parts of :mod:`saccade.edits`, or functions ``f(weight, b, h, q, k)``, in order.
        select: a part of :mod:`saccade.selectors`: content-dependent blocks of keys, within the mask.

    Raises:
        SpecError: a part is of the wrong kind.
    """

    def __init__(
        self,
        score: Any = None,
        mask: Any = None,
        normalizer: Normalizer | None = None,
        edits: Iterable[Any] = (),
        select: Select | None = None,
    ):
        super().__init__()
        chain = [as_score(s) for s in (score if isinstance(score, Sequence) else [score] if score is not None else [])]
        form = chain.pop(0) if chain and isinstance(chain[0], Form) else Dot()
        late = [s for s in chain if isinstance(s, Form)]
        if late:
            raise SpecError(f"{type(late[0]).__name__} makes the scores, so it must come first in score=[...]")
        if normalizer is not None and not isinstance(normalizer, Normalizer):
            raise SpecError(f"normalizer must be a part of saccade.normalizers; got {normalizer!r}")
        if select is not None and not isinstance(select, Select):
            raise SpecError(f"select must be a part of saccade.selectors; got {select!r}")
        if isinstance(edits, Edit) or callable(edits):
            edits = [edits]
        assert isinstance(form, Form)
        self.form: Form = form
        self.scores = nn.ModuleList(chain)
        self.mask: Mask = as_mask(mask)
        self.normalizer: Normalizer = normalizer or Softmax()
        self.edits = nn.ModuleList([as_edit(e) for e in edits])
        self.select = select

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        """:func:`saccade.attention` with this program."""
        from .attend import attention

        return attention(q, k, v, self, **options)

    @property
    def parts(self) -> list[Part]:
        """All parts, in the order in which they act."""
        selected = [] if self.select is None else [self.select]
        return [self.form, *self.scores, self.mask, *selected, self.normalizer, *self.edits]  # type: ignore[list-item]

    @property
    def modifiers(self) -> list[Score]:
        """The score modifiers, typed."""
        return list(self.scores)  # type: ignore[arg-type]

    @property
    def changes(self) -> list[Edit]:
        """The edits, typed."""
        return list(self.edits)  # type: ignore[arg-type]

    @property
    def mixes_heads(self) -> bool:
        """Does a part need to see all heads at once?"""
        return any(getattr(p, "mixes_heads", False) for p in self.parts)

    def learned(self) -> list[Tensor]:
        """Every tensor that wants a gradient, those that plain functions captured included."""
        found = {id(t): t for part in self.parts for t in part.learned()}
        return list(found.values())
