"""One run of a model, kept as queries and keys: any weight of it can be had again, and no matrix of N² is made."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..core.attend import attention
from ..core.errors import SpecError
from ..core.masks import EMPTY, Span
from ..core.normalizers import Identity
from ..core.program import Hidden, Program, Veil
from ..core.reference import scores
from ..core.selectors import Selection
from ..core.spec import Attention
from ..core.stats import BlockMax, BlockMean
from ..core.tile import At
from ..hosts import acts
from ..hosts.acts import Call, Site
from ..hosts.handles import listen

CELLS = 2**24  # scores of one tile of rows: 64 MB in float32
SIDE = 512  # blocks along the longer side of a layer's coarsest map


@dataclass(frozen=True)
class Sequence:
    """What a query or key stands for.

    Attributes:
        tokens: one string per place.
        image: PNG, if the places are patches of one; ``grid`` are its rows and columns of patches, which come after
            ``prefix`` other tokens.
    """

    tokens: list[str]
    image: bytes | None = None
    grid: tuple[int, int] | None = None
    prefix: int = 0


Places = Sequence | Callable[[int], Sequence]


@dataclass(frozen=True)
class Pooled:
    """Blocks of weights, both ``[heads, nq, nk]``.

    ``mass``: what a query of the block gives to all keys of the block, mean over the queries. ``most``: the greatest
    weight (at least 0). Both over one query in ``step``.
    """

    mass: Tensor
    most: Tensor
    step: int = 1


@dataclass(frozen=True, eq=False)
class Layer:
    """One attention module's call: queries ``[1, H, N, D]``, keys ``[1, Hkv, M, D]``, and its programs by head.

    ``queries`` and ``keys`` name the sequences; ``offset`` is the place of query 0 among the keys.
    """

    site: Site
    q: Tensor
    k: Tensor
    offset: int
    programs: list[tuple[tuple[int, ...] | None, Attention]]
    queries: str
    keys: str
    _selected: dict[int, Selection | None] = field(default_factory=dict, repr=False)

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    @property
    def n(self) -> int:
        return self.q.shape[2]

    @property
    def m(self) -> int:
        return self.k.shape[2]

    @cached_property
    def block(self) -> int:
        """Tokens along the side of a block of the coarsest map: a power of 2."""
        size = 1
        while max(self.n, self.m) > SIDE * size:
            size *= 2
        return size

    def program(self, head: int) -> Attention:
        """What a head runs."""
        return next(spec for heads, spec in reversed(self.programs) if heads is None or head in heads)

    @torch.no_grad()
    def rows(self, head: int, rows: Tensor) -> Tensor:
        """Exact weights ``[rows, M]`` of some queries (int64, from 0) of one head, as the program defines them."""
        found = self.q.new_zeros(len(rows), self.m, dtype=self._dtype)
        for at, start, weights in self._tiles(self.program(head), [head], rows):
            found[at, start : start + weights.shape[-1]] = weights[0]
        return found

    @torch.no_grad()
    def scores(self, head: int, row: int) -> Tensor:
        """Scores ``[M]`` of one query after all that modifies them; 0 where a key is hidden."""
        own = self.program(head)
        bare = Attention([own.form, *own.modifiers], own.mask, Identity(), select=own.select)
        [(_, start, found)] = self._tiles(bare, [head], torch.tensor([row], device=self.q.device), own)
        whole = found.new_zeros(self.m)
        whole[start : start + found.shape[-1]] = found[0, 0]
        return whole

    @torch.no_grad()
    def pooled(self, heads: list[int], first: int, last: int, block: int, step: int = 1) -> Pooled:
        """Blocks of the queries ``first`` (a multiple of ``block``) to ``last``, from exact rows: one in ``step``."""
        step = min(step, block)
        rows = torch.arange(first, last, device=self.q.device)
        rows = rows[(rows - first) % block % step == 0]  # every block has its first, however short it is
        shape = len(heads), -(-(last - first) // block), -(-self.m // block)
        mass, most = (self.q.new_zeros(shape, dtype=self._dtype) for _ in range(2))
        counts = mass.new_zeros(shape[1])
        group = (rows - first) // block
        counts.index_add_(0, group, torch.ones_like(group, dtype=counts.dtype))
        for index, spec in self._by_program(heads):
            for at, start, weights in self._tiles(spec, [heads[i] for i in index], rows):
                early, blocks = start % block, start // block
                padded = torch.nn.functional.pad(weights, (early, -(early + weights.shape[-1]) % block))
                cells = padded.unflatten(-1, (-1, block))
                low, high = int(group[at][0]), int(group[at][-1]) + 1
                to = (group[at] - low)[None, :, None]
                for whole, part, reduce in ((mass, cells.sum(-1), "sum"), (most, cells.amax(-1), "amax")):
                    here = whole[index, low:high, blocks : blocks + cells.shape[-2]]
                    whole[index, low:high, blocks : blocks + cells.shape[-2]] = here.scatter_reduce(
                        1, to.expand_as(part), part, reduce
                    )
        return Pooled(mass / counts.clamp(min=1)[:, None], most, step)

    @torch.no_grad()
    def overview(self) -> Pooled:
        """The coarsest map of all heads, exact, by the engine's statistics while the tiles pass."""
        block, last = self.block, self.n
        if any(spec.select is not None and spec.select.rows % block for _, spec in self.programs):
            return self.pooled(list(range(self.heads)), 0, last, block)  # the engine's blocks would cut selected ones
        stats = [BlockMean(block), BlockMax(block)]
        mass, most = None, None
        for heads, spec in self.programs:
            _, seen = attention(self.q, self.k, self.k[..., :1], spec, stats=stats, offset=self.offset)
            if mass is None or most is None:
                mass, most = seen["block_mean"][0], seen["block_max"][0]
            else:
                mass[list(heads or ())], most[list(heads or ())] = (
                    seen[s][0, list(heads or ())] for s in ("block_mean", "block_max")
                )
        assert mass is not None and most is not None
        width = torch.full((mass.shape[-1],), block, device=mass.device)
        width[-1] = self.m - (len(width) - 1) * block
        return Pooled(mass * width, most)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self.q.dtype, torch.float32)

    def _by_program(self, heads: list[int]) -> list[tuple[list[int], Attention]]:
        """Places in ``heads`` that run the same program."""
        found: dict[int, tuple[list[int], Attention]] = {}
        for i, head in enumerate(heads):
            spec = self.program(head)
            found.setdefault(id(spec), ([], spec))[0].append(i)
        return list(found.values())

    def _selection(self, spec: Attention) -> Selection | None:
        """The blocks that a program's selector chose for all queries (a choice may depend on all of them)."""
        if spec.select is None:
            return None
        if id(spec.select) not in self._selected:
            span = Span.grid(
                self.n, self.m, spec.select.rows, spec.select.columns, offset=self.offset, heads=self.heads,
                device=self.q.device,
            )  # fmt: skip
            codes = spec.mask.blocks(span)
            chosen = spec.select.choose(*spec.form.prepare(self.q, self.k), codes[(None,) * (4 - codes.ndim)])
            self._selected[id(spec.select)] = chosen
        return self._selected[id(spec.select)]

    def _tiles(self, spec: Attention, heads: list[int], rows: Tensor, chooser: Attention | None = None) -> Any:
        """Weights ``[heads, n, m]`` of tiles of rows: yields (slice of ``rows``, first key, weights).

        The definition of a tile, at the places that it has in the whole matrix, over the keys that its rows may see.
        """
        selection = self._selection(chooser or spec)
        q, k = spec.form.prepare(self.q, self.k)
        all_heads = list(range(self.heads)) if spec.mixes_heads else heads
        which = torch.tensor(all_heads, device=q.device)
        k = k[:, which // (self.heads // k.shape[1])] if k.shape[1] > 1 else k
        whole = At.everywhere(1, self.heads, self.n, self.m, self.offset, True, q.device)
        program = Program(spec)
        height = max(1, CELLS // (len(all_heads) * self.m))
        for begin in range(0, len(rows), height):
            some = rows[begin : begin + height]
            start, stop = self._reach(spec, int(some.min()), int(some.max()))
            at = whole.but(
                h=which[None, :, None, None], q=some[None, None, :, None], k=whole.k[..., start:stop], first=start,
                found={},
            )  # fmt: skip
            mine = q[:, which][:, :, some].to(self._dtype)
            tile = scores(program, mine, k[:, :, start:stop].to(self._dtype))
            hidden = ~spec.mask.visible(at).expand(tile.shape)
            if selection is not None:
                hidden = hidden | ~self._chosen(selection, which, some, start, stop)
            weights, _ = program.define(tile, at, [Hidden(0, stop - start, Veil(hidden))])
            kept = weights[0, heads] if spec.mixes_heads else weights[0]
            yield slice(begin, begin + len(some)), start, kept

    def _reach(self, spec: Attention, first: int, last: int) -> tuple[int, int]:
        """The range of keys outside of which the mask surely hides all from these queries."""
        size = 64
        k_lo = torch.arange(0, self.m, size, device=self.q.device)[None]
        low, high = (torch.tensor([[x]], device=self.q.device) for x in (first, last))
        span = Span(low, high, k_lo, (k_lo + size).clamp(max=self.m) - 1, 1, self.heads, self.n, self.m, self.offset)
        seen = (spec.mask.blocks(span) > EMPTY).flatten(0, -2).any(0).expand(k_lo.shape[1]).nonzero()
        if not len(seen):
            return 0, 1
        return int(seen[0]) * size, min(self.m, (int(seen[-1]) + 1) * size)

    def _chosen(self, selection: Selection, heads: Tensor, rows: Tensor, start: int, stop: int) -> Tensor:
        """What a selection lets these rows of these heads see of a range of keys: bool ``[1, heads, rows, keys]``."""
        own = heads // (self.heads // selection.blocks.shape[1])
        blocks = selection.blocks[0][own][:, rows // selection.rows]
        count = -(-self.m // selection.columns)
        hit = torch.zeros(*blocks.shape[:2], count + 1, dtype=torch.bool, device=heads.device)
        hit.scatter_(-1, blocks.remainder(count + 1), True)  # -1 falls into the spare column
        return hit[None, ..., torch.arange(start, stop, device=heads.device) // selection.columns]


@dataclass(frozen=True)
class Capture:
    """A run of a model: its layers in the order in which they ran, and what its places stand for."""

    name: str
    layers: list[Layer]
    sequences: dict[str, Sequence]

    @property
    def bytes(self) -> int:
        """Memory of the kept queries and keys."""
        return sum(x.numel() * x.element_size() for layer in self.layers for x in (layer.q, layer.k))

    @staticmethod
    def of(
        model: nn.Module, inputs: Mapping[str, Any], sequences: Mapping[str, Places] | None = None, *,
        layers: Any = None, name: str | None = None,
    ) -> Capture:  # fmt: skip
        """Run a model once on one sample and keep the queries and keys of its attention.

        Installed programs and edits are seen as they run.

        Args:
            model: as for :func:`saccade.install`.
            inputs: of the model's forward; a batch of 1.
            sequences: what the places stand for, by name: "text", "source" and "target" of an encoder-decoder, "image",
                "queries" and "keys" of other cross-attention; or functions of their length. Others are numbered.
            layers: as for :func:`saccade.install`.

        Raises:
            SpecError: the batch is not 1, a sequence is not as long as the attention is, or the model never attended.
        """
        kept: list[Layer] = []
        seq2seq = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))

        def keep(call: Call) -> None:
            if call.q.shape[0] != 1:
                raise SpecError(f"the viewer shows one sample; the batch is {call.q.shape[0]}")
            state: acts.Acts = call.site.module.__dict__[acts.STATE]
            q, k = (x.detach().contiguous() for x in (call.q, call.k))
            kept.append(Layer(call.site, q, k, call.frame.offset, state.ran(call), *_names(call.site, seq2seq)))

        with torch.no_grad(), listen(model, keep, layers=layers):
            model(**inputs)
        if not kept:
            raise SpecError(f"{type(model).__name__} ran without attention: nothing to show")
        whole: dict[str, Sequence] = {}
        for layer in kept:
            for label, length in ((layer.queries, layer.n), (layer.keys, layer.m)):
                there = whole.get(label) or (sequences or {}).get(label) or Sequence([str(i) for i in range(length)])
                there = there(length) if callable(there) else there
                if len(there.tokens) != length:
                    raise SpecError(
                        f"{layer.site.path} attends over {length} places of {label!r}, which has {len(there.tokens)}"
                    )
                whole[label] = there
        return Capture(name or type(model).__name__, kept, whole)


def _names(site: Site, seq2seq: bool) -> tuple[str, str]:
    """The sequences that a site's queries and keys come from."""
    if "cross" in site.kinds:
        return ("target", "source") if seq2seq else ("queries", "keys")
    if seq2seq:
        name = "target" if re.search(r"(^|\.)decoder\.", site.path) else "source"
    else:
        name = next((there for kind, there in (("vision", "image"), ("audio", "audio")) if kind in site.kinds), "text")
    return name, name
