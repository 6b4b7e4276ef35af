"""Linear attention in a model: inside what the model lets it see, from step to step, and in tiles when it is looked at.

A state has no weights that could be seen or changed. Where somebody watches or edits, :func:`weighed` gives the same
program as scores and a quotient, which the engine runs in tiles like any other: quadratic time, no N x N memory.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..core.errors import SpecError, Unsupported
from ..core.linear import LinearAttention, LinearState, linear_attention
from ..core.linear.features import Feature
from ..core.masks import And, Causal, Full, Mask, Padding
from ..core.normalizers import HIDDEN, Identity, Normalizer
from ..core.scores import Form, Score
from ..core.spec import Attention
from ..core.tile import At, per_head
from .views import Placed


def sight(own: Attention, program: LinearAttention, where: str) -> Tensor | None:
    """Which keys are tokens, bool ``[B, M]`` (``None``: all), where a model's own attention can be linear.

    Raises:
        SpecError: the model is causal and the program is not, or the other way round.
        Unsupported: the model hides, adds or drops what a state cannot.
    """
    masks = _parts(own.mask)
    others = [m for m in masks if type(m) not in (Full, Causal, Padding)]
    leave = "leave the layer out with layers="
    why = None
    if any(isinstance(m, Placed) for m in others):
        why = "a saccade.cache.Cache with padding or masks hides keys head by head: give transformers' DynamicCache"
    elif others:
        why = f"a state holds every key so far, and the model's mask is {type(others[0]).__name__}: {leave}"
    elif own.modifiers:
        why = f"a state has no scores for the model's {type(own.modifiers[0]).__name__}: {leave}"
    elif getattr(own.normalizer, "sink", None) is not None:
        why = f"a state has no softmax for the model's sink logits: {leave}"
    elif own.changes:
        why = "a state has no weights for the model's dropout: call model.eval() or set it to 0 in the config"
    if why is not None:
        raise Unsupported(f"{where} cannot run a LinearAttention program: {why}")
    causal = any(isinstance(m, Causal) for m in masks)
    if causal != program.causal:
        raise SpecError(
            f"{where} is {'causal' if causal else 'not causal'}: install LinearAttention(..., causal={causal}) there,"
            " or leave it out (layers=, kind=)"
        )
    keep = None
    for padding in masks:
        if isinstance(padding, Padding):
            keep = padding.keep if keep is None else keep & padding.keep
    return keep


def _parts(mask: Mask) -> list[Mask]:
    return [*_parts(mask.left), *_parts(mask.right)] if isinstance(mask, And) else [mask]


@dataclass(frozen=True, eq=False)
class Known:
    """The states after ``tokens`` keys of a cache, by program, while its keys and values stay as they are."""

    tokens: int
    keep: Tensor | None
    values: weakref.ref[Tensor]
    versions: tuple[int, int]
    states: dict[LinearAttention, LinearState]

    def fits(self, tokens: int, keep: Tensor | None) -> bool:
        """Are the states those after so many tokens, of which these are no padding?"""
        if self.tokens != tokens or keep is None or self.keep is None:
            return self.tokens == tokens and keep is self.keep
        return torch.equal(keep[:, :tokens], self.keep)


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # by the tensor of keys: when a cache grows, it is another


def known_of(k: Any, v: Any) -> Known | None:
    """What is known of these very keys and values, if nobody wrote to them since."""
    known: Known | None = _known.get(k) if isinstance(k, Tensor) and isinstance(v, Tensor) else None
    same = known is not None and known.versions == (k._version, v._version) and known.values() is v
    return known if same else None


def known_in(cache: Any, layer: Any) -> Known | None:
    """The same of one layer of a transformers cache."""
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", ())
    if not isinstance(layer, int) or layer >= len(layers):
        return None
    return known_of(getattr(layers[layer], "keys", None), getattr(layers[layer], "values", None))


def run(
    program: LinearAttention, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, offset: int, before: Known | None
) -> Tensor:
    """The program's output ``[B, H, N, Dv]``.

    Args:
        keep: of :func:`sight`; keys that are no tokens write nothing.
        offset: place of query 0 among the keys, if the program is causal.
        before: what is known of the keys before it in their cache; else their state is summed from them again.

    Raises:
        Unsupported: the queries' own keys are not there.
    """
    start, stop = (offset, offset + q.shape[2]) if program.causal else (0, k.shape[2])
    if not 0 <= start <= stop <= k.shape[2]:
        raise Unsupported(f"queries at {start} to {stop - 1} of {k.shape[2]} keys: the cache has dropped some")
    done = start if program.causal else stop
    lasts = not (torch.is_grad_enabled() or k.is_inference() or v.is_inference())  # else gradients, or writes, are lost
    known = before if program.causal else known_of(k, v)
    state = known.states.get(program) if lasts and known is not None and known.fits(done, keep) else None
    if state is not None:
        start = done
    elif start:  # any queries do: only what the keys leave behind is wanted
        state = _step(program, q[:, :, :1].expand(-1, -1, start, -1), k, v, keep, slice(0, start), None)[1]
    out, after = _step(program, q, k, v, keep, slice(start, stop), state)
    if lasts:
        known = known_of(k, v)
        others = known.states if known is not None and known.fits(stop, keep) else {}
        mine = None if keep is None else keep[:, :stop]
        _known[k] = Known(stop, mine, weakref.ref(v), (k._version, v._version), others | {program: after})
    return out


def _step(
    program: LinearAttention, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, keys: slice,
    state: LinearState | None,
) -> tuple[Tensor, LinearState]:  # fmt: skip
    """Output, and the state after some of the keys."""
    k, v, beta = k[:, :, keys], v[:, :, keys], None
    if keep is not None:
        there = keep[:, None, keys]
        beta = there.to(q.dtype)
        k, v = (x.masked_fill(~there[..., None], 0) for x in (k, v))  # 0 times what lies in padding might not be 0
    found: tuple[Tensor, LinearState] = linear_attention(q, k, v, program, beta=beta, state=state, return_state=True)
    return found


def weighed(program: Attention | LinearAttention) -> Attention:
    """A program whose weights can be looked at and changed; of a linear one its twin.

    Raises:
        Unsupported: the delta rule, whose weights are no function of one query and one key.
    """
    if isinstance(program, Attention):
        return program
    if program.delta:
        raise Unsupported(
            "what the delta rule reads of a key depends on every later key, so its weights cannot be watched or edited"
            " tile by tile: saccade.linear_weights shows them for small N"
        )
    fading = [] if program.decay is None else [Fading(program.decay.log)]
    normalizer = Quotient(program.eps) if program.normalize else Identity()
    return Attention([Features(program.feature, program.scale), *fading], normalizer=normalizer)


class Features(Form):
    """``scale f(q) . f(k)``."""

    def __init__(self, feature: Feature, scale: float):
        super().__init__()
        self.feature, self.factor = feature, scale

    def prepare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Features. A key that several query heads share has those of each, side by side; a query is 0 in the others'.

        So heads stay grouped where each query head has a map of its own.
        """
        batch, heads, shared = q.shape[0], q.shape[1], k.shape[1]
        rep, kind = heads // shared, torch.promote_types(q.dtype, torch.float32)
        index = torch.arange(heads, device=q.device).repeat(batch)
        f_q = self.feature.query(q.to(kind).flatten(0, 1), index).unflatten(0, (batch, shared, rep))
        f_k = self.feature.key(k.to(kind).repeat_interleave(rep, 1).flatten(0, 1), index)
        f_k = f_k.unflatten(0, (batch, shared, rep)).movedim(2, 3).flatten(3)
        own = torch.eye(rep, dtype=kind, device=q.device)[:, None, :, None]
        return (f_q[..., None, :] * own).flatten(4).flatten(1, 2), f_k

    def scale(self, width: int) -> float | None:
        """Of the program."""
        return self.factor


class Fading(Score):
    """``score * exp(log * (row - k))`` for log-decays ``[H]`` or one for all."""

    may_hide = False
    log: Tensor

    def __init__(self, log: Tensor):
        super().__init__()
        self.hold("log", log)

    def forward(self, score: Tensor, at: At) -> Tensor:
        """The faded tile; what lies in the future is hidden anyway."""
        log = torch.as_tensor(per_head(self.log.squeeze() if self.log.numel() == 1 else self.log, at, "decay"))
        far = at.distance
        return score * torch.where(far > 0, log.to(score.dtype) * far, 0).exp()


class Quotient(Normalizer):
    """``s / (sum s + eps)``."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    def forward(self, scores: Tensor, at: At) -> Tensor:
        """Weights; 0 where a key is hidden."""
        scores = scores.masked_fill(scores == HIDDEN, 0)
        return scores / (scores.sum(-1, keepdim=True) + self.eps)
