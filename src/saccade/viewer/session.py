"""What the page asks of a run, and the answers: maps at a level of detail, exact rows, one score taken apart."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, validate_call
from torch import Tensor

from ..core.errors import SpecError
from .capture import Capture, Layer, Pooled

TILE = 64, 256  # query blocks and key blocks of one tile of a map
GLANCE = 48  # most blocks along a side of a thumbnail
LOOK = 2**23  # scores computed for a strip of tiles at once: above it, of each block some queries stand for all
JOBS = 64  # exact maps that wait for the engine; the oldest are forgotten
KEPT = 2**30  # bytes of maps that are kept
QUIET = 0.5  # seconds without a question before the engine passes over a layer

Index = Annotated[int, Field(ge=0)]
Stat = Literal["mass", "most"]


class Session:
    """One run, or several of the same model side by side (before and after an edit).

    Every answer is bytes: JSON, or a JSON header and float32 (see :func:`packed`). A map that would take long is
    answered at once from some of its queries (``step`` in its header says one in how many), and exactly when it has
    been computed in the background.

    Args:
        sides: runs by name, of the same model on the same sample.

    Raises:
        SpecError: the runs do not have the same layers and lengths.
    """

    def __init__(self, sides: Mapping[str, Capture]):
        shapes = {tuple((y.site.path, y.heads, y.n, y.m) for y in run.layers) for run in sides.values()}
        if len(shapes) != 1:
            raise SpecError("runs side by side must have the same layers, heads and lengths")
        self.sides = dict(sides)
        self.answers: dict[str, Callable[..., bytes]] = {
            a.__name__: validate_call(a) for a in (self.session, self.glance, self.tile, self.row, self.score)
        }
        self._runs = list(self.sides.values())
        self._kept = _Kept(KEPT)
        self._one_at_a_time = threading.Lock()
        self._wanted: OrderedDict[Any, Callable[[], Pooled]] = OrderedDict()  # what is to be exact, the last one first
        self._more = threading.Condition()
        self._closed = False
        self._asked = 0.0  # when the last answer was asked for

    def answer(self, key: str) -> bytes:
        """The answer to a request such as ``"row?side=0&layer=1&head=2&row=3"``.

        Raises:
            SpecError: there is no such thing in this session.
        """
        self._asked = time.monotonic()
        name, _, query = key.partition("?")
        if name not in self.answers:
            raise SpecError(f"there is no answer {name!r}: there are {', '.join(self.answers)}")
        try:
            return self.answers[name](**dict(pair.split("=", 1) for pair in query.split("&") if pair))
        except ValueError as error:  # pydantic's too
            raise SpecError(f"{key}: {error}") from error

    def session(self) -> bytes:
        """What there is: sides, layers and sequences."""
        first = self._runs[0]
        layers = [
            {
                "path": y.site.path, "number": y.site.layer, "kinds": sorted(y.site.kinds), "heads": y.heads, "n": y.n,
                "m": y.m, "queries": y.queries, "keys": y.keys, "levels": levels(y.block), "offset": y.offset,
            }
            for y in first.layers
        ]  # fmt: skip
        sequences = {
            name: {
                "tokens": s.tokens, "grid": s.grid, "prefix": s.prefix,
                "image": s.image and "data:image/png;base64," + base64.b64encode(s.image).decode(),
            }
            for name, s in first.sequences.items()
        }  # fmt: skip
        whole = {"name": first.name, "sides": list(self.sides), "layers": layers, "sequences": sequences, "tile": TILE}
        return json.dumps(whole).encode()

    def glance(self, side: Index, layer: Index, stat: Stat) -> bytes:
        """Thumbnails of all heads of a layer: ``[heads, nq, nk]``."""
        found = self._layer(side, layer)
        block = found.block
        while max(found.n, found.m) > GLANCE * block:
            block *= 2
        exact = self._overview(side, layer, first=False)
        if exact is not None:
            return packed(getattr(_coarser(exact, found, block), stat), step=1, block=block)

        def sketch() -> Pooled:
            heads = list(range(found.heads))
            return found.pooled(heads, 0, found.n, block, max(1, found.heads * found.n * found.m // LOOK))

        some = self._kept.get(("glance", side, layer), self._one_at_a_time, sketch)
        return packed(getattr(some, stat), step=some.step, block=block)

    def tile(self, side: Index, layer: Index, head: Index, stat: Stat, block: int, row: Index, column: Index) -> bytes:
        """One tile of a head's map at blocks of so many tokens: ``[nq, nk]``, at most ``TILE``."""
        found = self._layer(side, layer, head)
        if block not in levels(found.block):
            raise SpecError(f"there are blocks of {levels(found.block)} tokens; got {block}")
        high, wide = TILE
        begin = row * high * block
        if begin >= found.n or column * wide * block >= found.m:
            raise SpecError(f"tile {row}, {column} lies outside the map")
        exact = self._overview(side, layer, first=True) if block == found.block else None
        if exact is not None:
            part, step = getattr(exact, stat)[head, row * high : (row + 1) * high], 1
        else:
            end = min(found.n, begin + high * block)
            # A strip of the coarsest map is one of many, so it gets its share of what a look may cost.
            look = 4 * LOOK // -(-found.n // (high * block)) if block == found.block else LOOK

            def strip(step: int = max(1, (end - begin) * found.m // look)) -> Pooled:
                return found.pooled([head], begin, end, block, step)

            key = side, layer, head, block, row
            some = self._kept.get(key, self._one_at_a_time, strip)
            if some.step > 1 and block < found.block:
                self._later(key, lambda: strip(1))
            part, step = getattr(some, stat)[0], some.step
        return packed(part[:, column * wide : (column + 1) * wide], step=step)

    def row(self, side: Index, layer: Index, head: Index, row: Index) -> bytes:
        """Exact weights of one query: ``[M]``."""
        found = self._layer(side, layer, head)
        if row >= found.n:
            raise SpecError(f"there are queries 0 to {found.n - 1}; got {row}")
        return packed(found.rows(head, torch.tensor([row], device=found.q.device))[0])

    def score(self, side: Index, layer: Index, head: Index, row: Index, key: Index) -> bytes:
        """One score taken apart: query and key as they are compared, scale, score after its modifiers, weight."""
        found = self._layer(side, layer, head)
        if row >= found.n or key >= found.m:
            raise SpecError(f"there are {found.n} queries and {found.m} keys; got {row} and {key}")
        spec = found.program(head)
        q, k = spec.form.prepare(found.q, found.k)
        scale = spec.form.scale(q.shape[-1])
        weight = found.rows(head, torch.tensor([row], device=q.device))[0, key]
        told = {
            "weight": float(weight),
            "score": float(found.scores(head, row)[key]),
            "parts": [type(part).__name__ for part in spec.parts],
            "scale": scale,
        }
        if scale is not None:  # else it is no sum over the width
            told["q"] = q[0, head, row].tolist()
            told["k"] = k[0, head // (found.heads // k.shape[1]), key].tolist()
        return json.dumps(told).encode()

    def start(self) -> None:
        """Begin to compute exact overviews in the background: what is looked at first, then all others."""
        threading.Thread(target=self._work, daemon=True, name="saccade viewer").start()

    def close(self) -> None:
        """End the background work after the layer at hand."""
        with self._more:
            self._closed = True
            self._more.notify()

    def settle(self, side: int = 0, layer: int = 0) -> None:
        """Compute a layer's exact overview now."""
        self._kept.put(("overview", side, layer), _on_cpu(self._layer(side, layer).overview()))

    def _work(self) -> None:
        rest = [(side, layer) for side in range(len(self._runs)) for layer in range(len(self._runs[0].layers))]
        while True:
            with self._more:
                while not self._closed and not self._wanted and (not rest or self._kept.full):
                    self._more.wait()
                if self._closed:
                    return
            while time.monotonic() - self._asked < QUIET:  # whoever looks goes first
                time.sleep(QUIET / 5)
            with self._more:
                if not self._wanted:
                    side, layer = rest.pop(0)
                    self._wanted["overview", side, layer] = self._layer(side, layer).overview
                key, make = self._wanted.popitem(last=False)
            there = self._kept.find(key)
            if there is None or there.step > 1:
                self._kept.put(key, _on_cpu(make()))

    def _later(self, key: Any, make: Callable[[], Pooled], first: bool = True) -> None:
        """Let the background compute something, before or after all else that is wanted."""
        with self._more:
            if first or key not in self._wanted:
                self._wanted[key] = make
                self._wanted.move_to_end(key, last=not first)
            while len(self._wanted) > JOBS:
                self._wanted.popitem()
            self._more.notify()

    def _overview(self, side: int, layer: int, first: bool) -> Pooled | None:
        found = self._kept.find(("overview", side, layer))
        if found is None:
            self._later(("overview", side, layer), self._layer(side, layer).overview, first)
        return found

    def _layer(self, side: int, layer: int, head: int = 0) -> Layer:
        if side >= len(self._runs) or layer >= len(self._runs[side].layers):
            raise SpecError(
                f"there are {len(self._runs)} sides of {len(self._runs[0].layers)} layers; got {side}, {layer}"
            )
        found = self._runs[side].layers[layer]
        if head >= found.heads:
            raise SpecError(f"{found.site.path} has heads 0 to {found.heads - 1}; got {head}")
        return found


def levels(block: int) -> list[int]:
    """Tokens per block of the maps that there are, from the coarsest to single weights."""
    return [block] if block == 1 else [block, *levels(max(1, block // 4))]


def packed(values: Tensor, **header: Any) -> bytes:
    """Bytes of the header's length (uint32), the header as JSON with the shape, and the values as float32."""
    told = json.dumps({"shape": list(values.shape), **header}).encode()
    told += b" " * (-len(told) % 4)
    return len(told).to_bytes(4, "little") + told + values.to("cpu", torch.float32).contiguous().numpy().tobytes()


def _on_cpu(pooled: Pooled) -> Pooled:
    return Pooled(pooled.mass.float().cpu(), pooled.most.float().cpu(), pooled.step)


def _coarser(fine: Pooled, layer: Layer, block: int) -> Pooled:
    """The same in greater blocks."""
    times = block // layer.block
    nq = fine.mass.shape[1]
    counts = torch.full((nq,), layer.block).float()
    counts[-1] = layer.n - (nq - 1) * layer.block

    def grouped(x: Tensor) -> Tensor:
        x = torch.nn.functional.pad(x, (0, -x.shape[-1] % times, 0, -x.shape[-2] % times))
        return x.unflatten(-1, (-1, times)).unflatten(-3, (-1, times))

    rows = torch.nn.functional.pad(counts, (0, -nq % times)).unflatten(0, (-1, times)).sum(-1)
    mass = grouped(fine.mass * counts[:, None]).sum((-1, -3)) / rows[:, None]
    return Pooled(mass, grouped(fine.most).amax((-1, -3)))


class _Kept:
    """Maps that were computed, the last used ones, up to so many bytes."""

    def __init__(self, most: int):
        self.most, self.held = most, 0
        self._maps: OrderedDict[Any, Pooled] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def full(self) -> bool:
        return self.held > self.most // 2

    def find(self, key: Any) -> Pooled | None:
        with self._lock:
            if key in self._maps:
                self._maps.move_to_end(key)
            return self._maps.get(key)

    def put(self, key: Any, found: Pooled) -> None:
        with self._lock:
            self.held += _size(found) - (_size(self._maps[key]) if key in self._maps else 0)
            self._maps[key] = found
            while self.held > self.most and len(self._maps) > 1:
                self.held -= _size(self._maps.popitem(last=False)[1])

    def get(self, key: Any, lock: threading.Lock, make: Callable[[], Pooled]) -> Pooled:
        """What is kept, or else what is made, by one caller at a time."""
        found = self.find(key)
        if found is None:
            with lock:
                found = self.find(key)  # another caller may have made it meanwhile
                if found is None:
                    found = _on_cpu(make())
                    self.put(key, found)
        return found


def _size(pooled: Pooled) -> int:
    return 2 * pooled.mass.numel() * pooled.mass.element_size()
