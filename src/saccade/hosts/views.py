"""What a transformers model lets its queries see, as saccade's masks: causal, sliding, padded, or the user's own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.errors import Unsupported
from ..core.masks import EMPTY, PARTIAL, And, Causal, Full, Function, Given, Mask, Or, Padding, Span, Window
from ..core.tile import At

FOREVER = 2**40  # a window side that never ends


@dataclass(frozen=True)
class View:
    """What the model lets its queries see, as saccade's parts; transformers hands it on in place of a mask tensor.

    ``mask`` counts the ``keys`` that are there, ``offset`` is the place of query 0 among them. ``first`` ``[B]`` is
    where each text begins, in the same count: positive after left padding, negative where a cache dropped keys.
    ``text`` ``[B, tokens so far]`` is the padding as the model was given it.
    ``name`` says in a few words what all this is, if it depends on nothing else: then programs combined with it are
    kept.
    """

    mask: Mask
    keys: int
    offset: int
    padding: Tensor | None = None
    first: Tensor | None = None
    bias: Tensor | None = None
    text: Tensor | None = None
    positions: Tensor | None = None
    name: Any = None

    # What transformers asks of a mask that it made for a static cache and hands to the model as one of the user's.
    ndim = 4

    def contiguous(self) -> View:
        """Itself."""
        return self

    @staticmethod
    def of(
        *, q_length: int, kv_length: int, q_offset: Any = 0, kv_offset: Any = 0, mask_function: Any,
        attention_mask: Any = None, device: Any = None, **_: Any,
    ) -> View:  # fmt: skip
        """The mask function that transformers calls, once per forward and kind of layer."""
        if isinstance(attention_mask, View):
            return attention_mask
        dropped, offset = int(kv_offset), int(q_offset) - int(kv_offset)
        name, mask = _recognise(mask_function)
        if name is None and dropped:
            mask = Shifted(mask, torch.tensor([-dropped], device=device))
        first = torch.tensor([-dropped], device=device) if dropped else None
        if attention_mask is None or bool(attention_mask.all()):
            return View(mask, kv_length, offset, first=first, name=name if first is None else None)
        first = attention_mask.to(torch.int64).argmax(-1) - dropped
        padding = attention_mask[:, dropped : dropped + kv_length]
        padding = pad(padding, (0, kv_length - padding.shape[1]))
        return View(mask, kv_length, offset, padding, first if bool(first.any()) else None, text=attention_mask)

    @staticmethod
    def given(mask: Any, query: Tensor, key: Tensor, causal: bool) -> View:
        """A four-dimensional mask that the user made: it stands in for the model's own. ``None``: all, or causal."""
        n, m = query.shape[2], key.shape[2]
        if mask is None:
            return View(Causal(), m, m - n, name="causal") if causal else View(Full(), m, 0, name="full")
        if not isinstance(mask, Tensor) or mask.ndim != 4:
            raise Unsupported(f"the model handed over a mask of an unknown kind: {type(mask).__name__}")
        mask = mask[..., :m]
        if mask.dtype == torch.bool:
            return View(Given(mask), m, m - n)
        hidden = mask <= torch.finfo(mask.dtype).min / 2  # additive masks write -inf or the dtype's least number
        return View(Given(~hidden), m, m - n, bias=mask.masked_fill(hidden, 0))

    def at(self, positions: Tensor, seen: int, new: int, narrowed: bool) -> View:
        """The same for a cache that holds the tokens at logical ``positions`` ``[B, Hkv, M]`` (-1: none) of ``seen``.

        The new queries are the last ``new`` tokens seen. ``narrowed``: a program's mask will ask for positions.
        """
        keys, offset = positions.shape[2], seen - new
        if isinstance(self.mask, Causal) and not narrowed and bool((positions >= 0).all()):
            # All that is held is past or new, so slots do as well as positions.
            return View(self.mask, keys, keys - new, name=("held", keys, new))
        first = None if self.text is None else self.text.to(torch.int64).argmax(-1)
        return View(Placed(self.mask, positions), keys, offset, first=first, positions=positions)

    def narrow(self, mask: Mask) -> Mask:
        """The program's mask within the model's."""
        if not isinstance(mask, Full):
            mask = mask if self.first is None else Shifted(mask, self.first)
            mask = mask if self.positions is None else Placed(mask, self.positions)
        parts = [] if isinstance(mask, Full) else [mask]
        implied = isinstance(self.mask, Causal) and self.first is None and any(map(_is_causal, parts))
        if not implied and not (isinstance(self.mask, Full) and parts):
            parts.insert(0, self.mask)
        if self.padding is not None:
            parts.append(Padding(self.padding))
        whole = parts[0]
        for part in parts[1:]:
            whole = And(whole, part)
        return whole


def _is_causal(mask: Mask) -> bool:
    """Does the mask already hide the future?"""
    return isinstance(mask, Causal) or (isinstance(mask, And) and (_is_causal(mask.left) or _is_causal(mask.right)))


def _recognise(function: Any) -> tuple[Any, Mask]:
    """A transformers mask function as a mask in closed form, with a name; as it is (no name) if it is a stranger.

    The functions are closures; they are known by where they were defined and what they close over.
    """
    kind = getattr(function, "__qualname__", "")
    inside = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    if kind == "causal_mask_function":
        return "causal", Causal()
    if kind == "bidirectional_mask_function":
        return "full", Full()
    if kind == "sliding_window_bidirectional_overlay.<locals>.inner_mask":
        return ("both sides", inside[0]), Window(inside[0] + 1)
    if kind == "sliding_window_overlay.<locals>.inner_mask":
        return ("window", inside[0]), Window(inside[0], right=FOREVER)
    if kind in ("and_masks.<locals>.and_mask", "or_masks.<locals>.or_mask") and len(inside) == 1:
        join = And if kind.startswith("and") else Or
        names, parts = zip(*map(_recognise, inside[0]), strict=True)
        whole = parts[0]
        for part in parts[1:]:
            whole = join(whole, part)
        return (None if None in names else (join.__name__, names)), whole
    return None, Function(function)


class Placed(Mask):
    """A mask that is asked about logical ``positions`` ``[B, Hkv, M]`` of the keys; -1: there is no key."""

    def __init__(self, inner: Mask, positions: Tensor):
        super().__init__()
        self.inner: Mask = inner
        self.positions: Tensor
        self.hold("positions", positions)

    def visible(self, at: At) -> Tensor:
        """As the inner mask sees the keys at their positions."""
        rep = at.heads // self.positions.shape[1]
        k = self.positions[at.b, at.h // rep, at.k]
        return self.inner.visible(at.moved(at.q, k.clamp(min=0))) & (k >= 0)

    def blocks(self, span: Span) -> Tensor:
        """Codes of the inner mask for the range of positions that each block holds, ``[B, Hkv * rep, nq, nk]``."""
        width = int((span.k_hi - span.k_lo).max()) + 1
        within = span.k_lo[0][:, None] + torch.arange(width, device=span.k_lo.device)
        held = self.positions[..., torch.minimum(within, span.k_hi[0][:, None])]  # [B, Hkv, nk, width]
        least = held.masked_fill(held < 0, torch.iinfo(held.dtype).max).amin(-1)
        most, whole = held.amax(-1), (held >= 0).all(-1)
        samples = []
        for b in range(len(held)):
            heads = []
            for h in range(held.shape[1]):
                high = most[b, h][None]
                moved = replace(span, k_lo=torch.minimum(least[b, h][None], high.clamp(min=0)), k_hi=high.clamp(min=0))
                found = self.inner.blocks(moved)
                if found.ndim == 4:  # of samples and heads of its own: look where they differ
                    low, top = found.amin((0, 1)), found.amax((0, 1))
                    found = torch.where(low == top, low, PARTIAL).to(low.dtype)
                heads.append(found.clamp(max=1 + whole[b, h].to(found.dtype)).masked_fill(high < 0, EMPTY))
            samples.append(torch.stack(heads))
        return torch.stack(samples).repeat_interleave(span.heads // held.shape[1], 1)


class Shifted(Mask):
    """A mask that counts positions from each sample's ``first`` place ``[B]`` (or ``[1]``) on.

    Places before it are taken for the first one: they are padding, which another mask hides.
    """

    def __init__(self, inner: Mask, first: Tensor):
        super().__init__()
        self.inner: Mask = inner
        self.first: Tensor
        self.hold("first", first)

    def _move(self, at: At) -> At:
        first = self.first[at.b] if len(self.first) > 1 else self.first
        return at.moved((at.q - first).clamp(min=-at.offset), (at.k - first).clamp(min=0), at.first)

    def visible(self, at: At) -> Tensor:
        """As the inner mask sees the moved places."""
        return self.inner.visible(self._move(at))

    def unseen(self, at: At) -> Tensor | None:
        """As the inner mask sees the moved places."""
        return self.inner.unseen(self._move(at))

    def blocks(self, span: Span) -> Tensor:
        """Codes of the inner mask for every sample's move, ``[B or 1, ...]``."""
        codes = []
        for sample, first in enumerate(self.first.tolist()):
            moved = replace(
                span,
                q_lo=(span.q_lo - first).clamp(min=-span.offset),
                q_hi=(span.q_hi - first).clamp(min=-span.offset),
                k_lo=(span.k_lo - first).clamp(min=0),
                k_hi=(span.k_hi - first).clamp(min=0),
            )
            found = self.inner.blocks(moved)
            found = found[(None,) * (4 - found.ndim)]
            codes.append(found[min(sample, len(found) - 1)])
        return torch.stack(torch.broadcast_tensors(*codes))
