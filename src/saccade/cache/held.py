"""A transformers cache whose layers really hold fewer tokens, each head its own.

The model's attention runs in the engine while the cache is open; after each layer's attention the policy scores what
the layer holds, and what is over the budget is dropped then and there, so that a prefill never holds more than one
whole layer. Logical positions stay right: every slot knows the position of its token, and masks are asked about those.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache as HostCache
from transformers.cache_utils import DynamicLayer

from ..core.errors import SpecError
from ..hosts.handles import lead
from ..hosts.transformers import HELD
from .packed import Packed
from .policies import All, Look, Policy

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}

Budget = int | float | str | Sequence[int] | Callable[[int], Any]


@dataclass
class Segment:
    """Key heads that hold equally many tokens: keys and values ``[B, h, M, D]``, positions and scores ``[B, h, M]``."""

    heads: Tensor
    keys: Tensor | Packed
    values: Tensor | Packed
    positions: Tensor
    scores: Tensor
    # During a call: keys and values with this call's own as they came, and scores with what stays at the top.
    now: tuple[Tensor, Tensor] | None = None
    worth: Tensor | None = None

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch dimension to all that is held."""
        self.keys, self.values = _each(self.keys, change), _each(self.values, change)
        self.positions, self.scores = change(self.positions), change(self.scores)

    def append(self, keys: Tensor, values: Tensor, positions: Tensor, bits: int | None) -> None:
        """Hold new tokens too, in so many bits."""
        self.keys, all_keys = _append(self.keys, keys, bits)
        self.values, all_values = _append(self.values, values, bits)
        self.now = all_keys, all_values
        self.positions = torch.cat([self.positions, positions], 2)
        self.scores = torch.nn.functional.pad(self.scores, (0, positions.shape[2]))

    def keep(self, slots: Tensor) -> None:
        """Drop all but some slots ``[B, h, count]``."""

        def pick(x: Tensor) -> Tensor:
            return x.gather(2, slots[..., None].expand(-1, -1, -1, x.shape[-1]))

        self.keys, self.values = _each(self.keys, pick), _each(self.values, pick)
        self.positions, self.scores = self.positions.gather(2, slots), self.scores.gather(2, slots)
        self.now = self.worth = None

    def best(self, count: int) -> Tensor:
        """The slots of greatest worth in their order, ``[B, h, count]``."""
        worth = self.scores if self.worth is None else self.worth
        return worth.topk(count, -1).indices.sort(-1).values

    def apart(self) -> Iterator[Segment]:
        """Each head as a segment of its own."""
        for i in range(len(self.heads)):

            def one(x: Tensor, i: int = i) -> Tensor:
                return x[:, i : i + 1]

            worth = None if self.worth is None else one(self.worth)
            yield Segment(
                self.heads[i : i + 1], _each(self.keys, one), _each(self.values, one), one(self.positions),
                one(self.scores), worth=worth,
            )  # fmt: skip

    @staticmethod
    def together(some: Sequence[Segment]) -> Segment:
        """Segments of equally many tokens as one."""

        def join(name: str) -> Any:
            parts = [getattr(s, name) for s in some]
            if isinstance(parts[0], Tensor):
                return torch.cat(parts, 1)
            codes, low, step = (torch.cat([getattr(p, f) for p in parts], 1) for f in ("codes", "low", "step"))
            return Packed(codes, low, step, parts[0].bits)

        heads = torch.cat([s.heads for s in some])
        return Segment(heads, *(join(name) for name in ("keys", "values", "positions", "scores")))

    @property
    def tokens(self) -> int:
        """Slots of a head."""
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and what is known of each token."""
        return sum(x.nbytes for x in (self.keys, self.values, self.positions, self.scores))


def _each(stored: Tensor | Packed, change: Callable[[Tensor], Tensor]) -> Tensor | Packed:
    return change(stored) if isinstance(stored, Tensor) else stored.each(change)


def _append(stored: Tensor | Packed, new: Tensor, bits: int | None) -> tuple[Tensor | Packed, Tensor]:
    """What is stored with the new tokens, and the same as a tensor with these as they came."""
    if isinstance(stored, Tensor) and bits is None:
        whole = torch.cat([stored, new], 2)
        return whole, whole
    packed = Packed.pack(new, bits or 8)
    if isinstance(stored, Tensor):
        return packed, new
    return stored.then(packed), torch.cat([stored.unpack(), new], 2)


class Layer(DynamicLayer):
    """One layer of a :class:`Cache`."""

    def __init__(self, owner: Cache, index: int):
        super().__init__()
        self.owner, self.index = owner, index
        self.seen = 0
        self.segments: list[Segment] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.owner.open:
            raise SpecError("a saccade Cache runs inside `with Cache(model, ...) as cache:`; this one is not open")
        batch, heads, new, width = key_states.shape
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            nothing = key_states.new_empty(batch, heads, 0, width)
            index = torch.empty(batch, heads, 0, dtype=torch.int64, device=key_states.device)
            self.segments = [
                Segment(torch.arange(heads), nothing, value_states[:, :, :0], index, index.to(torch.float32))
            ]
        if sum(len(s.heads) for s in self.segments) != heads or self.segments[0].keys.shape[0] != batch:
            raise SpecError(
                f"layer {self.index} holds {sum(len(s.heads) for s in self.segments)} heads of a batch of"
                f" {self.segments[0].keys.shape[0]}; got {heads} heads and a batch of {batch}: this cache is another"
                " model's or another batch's, make a new one"
            )
        place = torch.arange(self.seen, self.seen + new, device=key_states.device)
        for s in self.segments:
            own = s.heads.to(key_states.device)
            here = place.expand(batch, len(own), new)
            s.append(key_states[:, own], value_states[:, own], here, self.owner.bits)
        self.seen += new
        now = self.segments[0].now
        if len(self.segments) == 1 and now is not None:
            keys, values = now
        else:
            # Heads of unequal length make no tensor: these have the shape and no memory, the host asks `segments`.
            keys, values = (
                x.new_zeros(()).expand(batch, heads, self.physical, x.shape[-1]) for x in (key_states, value_states)
            )
        setattr(keys, HELD, self)
        return keys, values

    @property
    def physical(self) -> int:
        """Slots of the longest head."""
        return max((s.tokens for s in self.segments), default=0)

    def hide(self, padding: Tensor) -> None:
        """Forget that there are tokens where ``padding`` ``[B, seen]`` is false."""
        for s in self.segments:
            there = padding.bool()[:, None].expand(-1, len(s.heads), -1).gather(2, s.positions.clamp(min=0))
            s.positions = s.positions.masked_fill(~there, -1)

    def settle(self, segment: Segment, new: int, told: dict[str, Any]) -> None:
        """Score what a segment holds, after its attention ran."""
        assert segment.now is not None
        look = Look(told, *segment.now, segment.positions, segment.scores, new, self.seen, self.index)
        scores = self.owner.policy.score(look)
        name = type(self.owner.policy).__name__
        if scores.shape != segment.positions.shape:
            raise SpecError(f"{name} must score [B, Hkv, M] = {tuple(segment.positions.shape)}; got {scores.shape}")
        if bool(scores.isnan().any()):
            raise SpecError(f"{name} gave NaN for {int(scores.isnan().sum())} tokens of layer {self.index}")
        stays = self.owner.policy.stays(look)
        worth = scores if stays is None else scores.masked_fill(stays, torch.inf)
        segment.scores, segment.worth = scores.float(), worth.float().masked_fill(segment.positions < 0, -torch.inf)

    def close(self, new: int) -> None:
        """End a call in which ``new`` tokens came: drop what is over the budget, and what the call alone needed."""
        self._evict(new)
        for s in self.segments:
            s.now = s.worth = None

    def _evict(self, new: int) -> None:
        if new == 1 and not self.owner.policy.while_decoding:
            return
        budget = self.owner.tokens(self)
        if self.physical <= budget + (self.owner.slack if self.seen > budget else 0):
            return
        if self.owner.policy.shared:
            self._share(budget)
            return
        for s in self.segments:
            if s.tokens > budget:
                s.keep(s.best(budget))

    def _share(self, budget: int) -> None:
        """One budget for the heads of the layer: the best of all of them are kept, as many for every sample."""
        heads = [one for s in self.segments for one in s.apart()]
        whole = max(one.tokens for one in heads)
        worth = [one.scores if one.worth is None else one.worth for one in heads]
        worth = [torch.nn.functional.pad(w, (0, whole - w.shape[-1]), value=-torch.inf) for w in worth]
        flat = torch.cat(worth, 1).flatten(1)
        best = flat.topk(min(budget * len(heads), flat.shape[1]), -1).indices // whole
        lengths: dict[int, list[Segment]] = {}
        for i, one in enumerate(heads):
            # Samples of a batch keep equally many of a head: as many as the sample that wants most of them.
            count = min(max(1, int((best == i).sum(-1).amax())), one.tokens)
            one.keep(one.best(count))
            lengths.setdefault(count, []).append(one)
        self.segments = [Segment.together(some) for some in lengths.values()]

    # What transformers asks of a layer.

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.physical + query_length, self.seen - self.physical

    def crop(self, tokens_to_remove: int) -> None:
        self.seen -= abs(tokens_to_remove)
        for s in self.segments:
            stay = s.positions < self.seen
            count = int(stay.sum(-1).max())
            s.positions = s.positions.masked_fill(~stay, -1)
            s.keep(s.positions.topk(count, -1).indices.sort(-1).values)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for s in self.segments:
            s.change(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        for s in self.segments:
            s.change(lambda x: x[indices.to(x.device)])

    def offload(self) -> None:
        for s in self.segments:
            s.change(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        for s in self.segments:
            s.change(lambda x: x.to(self.device, non_blocking=True))

    def reset(self) -> None:
        self.segments, self.seen, self.is_initialized = [], 0, False


class Cache(HostCache):
    """A cache that holds at most ``budget`` tokens of every layer and key head.

    Args:
        model: an unmodified transformers causal LM.
        policy: what is worth keeping; ``None`` keeps all.
        budget: tokens per key head (int), a share of the tokens seen (float up to 1), bytes of the whole cache
            (``"8MiB"``), one of these per layer (a sequence), or a function of the layer's number.
        slack: tokens over the budget up to which nothing is dropped while decoding.
        bits: 8 or 4: keys and values are held in so many bits (a range for each token and head); ``None``: as they are.

    Raises:
        SpecError: a budget below one token, a policy that is none, a model that has another cache.
        Unsupported: this model cannot run programs.
    """

    def __init__(
        self, model: nn.Module, policy: Policy | None = None, budget: Budget | None = None, slack: int = 0,
        bits: int | None = None,
    ):  # fmt: skip
        config: Any = model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
        if policy is not None and not isinstance(policy, Policy):
            raise SpecError(f"policy must be one of saccade.cache, such as SnapKV(); got {policy!r}")
        if (policy is None) != (budget is None):
            raise SpecError("a policy needs a budget, and a budget a policy: give both, or none to keep all")
        if bits not in (None, 4, 8):
            raise SpecError(f"bits must be 8, 4 or None; got {bits!r}")
        self.model, self.policy, self.budget = model, policy or All(), budget
        self.slack, self.bits = slack, bits
        self.open = False
        self.held = [Layer(self, i) for i in range(config.num_hidden_layers)]
        super().__init__(layers=list(self.held))
        for layer in self.held:
            self._check(self._asked(layer.index))

    def _asked(self, layer: int) -> Any:
        budget = self.budget
        if callable(budget):
            return budget(layer)
        if isinstance(budget, Sequence) and not isinstance(budget, str):
            if len(budget) != len(self.layers):
                raise SpecError(f"budget: expected one for each of {len(self.layers)} layers; got {len(budget)}")
            return budget[layer]
        return budget

    @staticmethod
    def _check(budget: Any) -> None:
        if budget is None:
            return
        bad = isinstance(budget, bool) or not isinstance(budget, (int, float, str))
        if isinstance(budget, str):
            bad = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b", budget.strip().lower()) is None
        elif isinstance(budget, float):
            bad = not 0 < budget <= 1
        elif isinstance(budget, int) and not bad:
            bad = budget < 1
        if bad:
            raise SpecError(
                f"budget must be at least 1 token (int), a share above 0 and up to 1 (float), or bytes such as"
                f" '8MiB'; got {budget!r}"
            )

    def tokens(self, layer: Layer) -> int:
        """Tokens that each key head of a layer may hold now."""
        budget = self._asked(layer.index)
        if budget is None:
            return layer.physical
        if isinstance(budget, float):
            return max(1, math.ceil(budget * layer.seen))
        if isinstance(budget, int):
            return budget
        number, unit = re.fullmatch(r"([\d.]+)\s*(\w*?)b", budget.strip().lower()).groups()  # type: ignore[union-attr]
        held = layer.segments[0]
        token = held.nbytes / max(1, held.tokens * len(held.heads)) * sum(len(s.heads) for s in layer.segments)
        found = int(float(number) * UNITS[unit] / len(self.layers) / token)
        if found < 1:
            raise SpecError(f"budget={budget!r} is less than one token of each of {len(self.layers)} layers")
        return found

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers."""
        return sum(s.nbytes for layer in self.held for s in layer.segments)

    def kept(self) -> list[list[int]]:
        """Tokens held by layer and key head (slots of the batch's longest sample)."""
        found = []
        for layer in self.held:
            of = {h: s.tokens for s in layer.segments for h in s.heads.tolist()}
            found.append([of[h] for h in sorted(of)])
        return found

    def __deepcopy__(self, memo: Any) -> Cache:
        """What is held is copied, the model and the policy are not."""
        policy = None if self.budget is None else self.policy
        twin = Cache(self.model, policy, self.budget, self.slack, self.bits)
        twin.open = self.open
        for mine, own in zip(twin.held, self.held, strict=True):
            mine.__dict__ |= {k: copy.deepcopy(v, memo) for k, v in vars(own).items() if k != "owner"}
        return twin

    def __enter__(self) -> Cache:
        self.handle = lead(self.model)
        self.open = True
        return self

    def __exit__(self, *exc: object) -> None:
        self.open = False
        self.handle.remove()
