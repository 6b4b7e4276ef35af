"""Scores: how a query and a key are compared, and what is done to the result before the normalizer.

The first member of a program's ``score`` may be a :class:`Form` (how scores are made: scaled dot product if none is
given); all others are :class:`Score` modifiers or plain FlexAttention ``score_mod`` functions, applied in order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import SpecError
from .functions import PlainFunction
from .tile import At, Part, per_head, per_row


class Form(Part):
    """How a tile of scores is made from queries ``[..., n, D]`` and keys ``[..., m, D]``."""

    def prepare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """What is done once to all queries and keys (linear in N): both ``[B, H, N, D']`` on return."""
        return q, k

    def scale(self, width: int) -> float | None:
        """Factor of the dot product of prepared queries and keys of this width; ``None``: not a dot product."""
        return width**-0.5

    def tile(self, q: Tensor, k: Tensor) -> Tensor:
        """Scores ``[..., n, m]`` of prepared queries and keys, for a form that is not a dot product."""
        raise NotImplementedError


class Dot(Form):
    """Scaled dot product ``scale * q . k``; the scale is ``D ** -0.5`` if not given."""

    def __init__(self, scale: float | None = None):
        super().__init__()
        self.factor = scale

    def scale(self, width: int) -> float | None:
        return width**-0.5 if self.factor is None else self.factor


class Bilinear(Form):
    """``scale * q W k`` (Luong's general score, arXiv:1508.04025).

    Args:
        weight: ``[Dq, Dk]`` or per head ``[H, Dq, Dk]``.
        scale: 1 if not given, as in the paper.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, scale: float = 1.0):
        super().__init__()
        if weight.ndim not in (2, 3):
            raise SpecError(f"Bilinear: weight must be [Dq, Dk] or [H, Dq, Dk]; got {tuple(weight.shape)}")
        self.hold("weight", weight)
        self.factor = scale

    def prepare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q @ self.weight.to(q.dtype), k

    def scale(self, width: int) -> float | None:
        return self.factor


class Additive(Form):
    """``v . tanh(Wq q + Wk k)`` (Bahdanau, arXiv:1409.0473), without an [N, M, A] tensor.

    Args:
        query, key: projections ``[A, D]``.
        energy: ``[A]``.
    """

    query: Tensor
    key: Tensor
    energy: Tensor

    def __init__(self, query: Tensor, key: Tensor, energy: Tensor):
        super().__init__()
        if query.ndim != 2 or key.ndim != 2 or energy.shape != query.shape[:1] or len(key) != len(query):
            raise SpecError(
                "Additive: query and key must be [A, D] and energy [A]; got"
                f" {tuple(query.shape)}, {tuple(key.shape)}, {tuple(energy.shape)}"
            )
        self.hold("query", query)
        self.hold("key", key)
        self.hold("energy", energy)

    @staticmethod
    def fresh(width: int, inner: int) -> Additive:
        """Freshly initialised projections (uniform, as ``nn.Linear``)."""
        q, k, v = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False), nn.Linear(inner, 1)
        return Additive(q.weight, k.weight, nn.Parameter(v.weight.detach()[0]))

    def prepare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q @ self.query.T.to(q.dtype), k @ self.key.T.to(k.dtype)

    def scale(self, width: int) -> float | None:
        return None

    def tile(self, q: Tensor, k: Tensor) -> Tensor:
        total: Tensor | None = None
        for a, energy in enumerate(self.energy):
            term = energy * torch.tanh(q[..., a, None] + k[..., None, :, a])
            total = term if total is None else total + term
        assert total is not None
        return total


class Score(Part):
    """A modifier of scores. Subclasses define :meth:`forward`; the in-place twin is for speed alone."""

    shift = False  # only adds what does not depend on the score: its derivative is one
    may_hide = True  # may answer -inf, for a key that nobody is to see

    def forward(self, score: Tensor, at: At) -> Tensor:
        """The modified tile, out of place and differentiable: the definition."""
        raise NotImplementedError

    def inplace(self, score: Tensor, at: At) -> Tensor:
        """The same where no gradient is wanted; may overwrite ``score``."""
        return self.forward(score, at)


def as_score(value: Any) -> Score | Form:
    """A score part from a part or from a function ``f(score, b, h, q, k)``."""
    if isinstance(value, (Score, Form)):
        return value
    if callable(value):
        return Function(value)
    raise SpecError(f"a score must be a part of saccade.scores or a function f(score, b, h, q, k); got {value!r}")


class Function(Score):
    """A plain ``score_mod``: ``f(score, b, h, q, k)`` as FlexAttention's, unchanged."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function
        self._call = PlainFunction(function)

    def forward(self, score: Tensor, at: At) -> Tensor:
        return self._call(at, score).to(score.dtype).expand_as(score)


class SoftCap(Score):
    """``cap * tanh(score / cap)`` (Gemma 2, arXiv:2408.00118)."""

    may_hide = False

    def __init__(self, cap: float):
        super().__init__()
        if cap <= 0:
            raise SpecError(f"SoftCap needs a cap above 0; got {cap}")
        self.cap = cap

    def forward(self, score: Tensor, at: At) -> Tensor:
        return self.cap * torch.tanh(score / self.cap)

    def inplace(self, score: Tensor, at: At) -> Tensor:
        return score.div_(self.cap).tanh_().mul_(self.cap)


class ALiBi(Score):
    """``score - slope[h] * |row - k|`` (arXiv:2108.12409).

    Args:
        slopes: ``[H]``; the paper's geometric sequence for the number of heads if not given.
    """

    may_hide = False
    slopes: Tensor | None

    def __init__(self, slopes: Tensor | None = None):
        super().__init__()
        self.hold("slopes", slopes)

    @property
    def shift(self) -> bool:  # type: ignore[override]
        return self.slopes is None or not self.slopes.requires_grad

    @staticmethod
    def geometric(heads: int, device: torch.device | None = None) -> Tensor:
        """The paper's slopes: ``2^(-8 i / H)``, and for other than powers of two its interleaving."""
        whole = 2 ** math.floor(math.log2(heads))
        exponents = [-8 * (i + 1) / whole for i in range(whole)]
        exponents += [-4 * (2 * i + 1) / whole for i in range(heads - whole)]
        return torch.tensor([2.0**e for e in exponents], device=device)

    def by_head(self, heads: int, device: torch.device) -> Tensor:
        """The slopes ``[H]``."""
        return self.geometric(heads, device) if self.slopes is None else self.slopes

    def _slopes(self, at: At) -> Tensor:
        found = per_head(self.by_head(at.heads, at.h.device), at, "ALiBi's slopes")
        assert isinstance(found, Tensor)
        return found

    def forward(self, score: Tensor, at: At) -> Tensor:
        return score - self._slopes(at).to(score.dtype) * at.away(score.dtype)

    def inplace(self, score: Tensor, at: At) -> Tensor:
        return score.addcmul_(self._slopes(at).to(score.dtype), at.away(score.dtype), value=-1)


class RelativeBias(Score):
    """``score + table[h, bucket(k - row)]``, learned.

    With ``buckets`` the distances share buckets as in T5 (arXiv:1910.10683): half exact, half logarithmic up to
    ``reach``; without, every distance up to ``reach`` has its own entry and farther ones share the last.
    """

    table: Tensor

    def __init__(
        self, heads: int, reach: int = 128, *, buckets: int | None = None, bidirectional: bool = True,
        table: Tensor | None = None,
    ):  # fmt: skip
        super().__init__()
        self.reach, self.buckets, self.bidirectional = reach, buckets, bidirectional
        entries = buckets if buckets is not None else (2 * reach + 1 if bidirectional else reach + 1)
        if table is None:
            table = nn.Parameter(torch.zeros(heads, entries))
        if table.shape != (heads, entries):
            raise SpecError(f"RelativeBias: table must be [{heads}, {entries}]; got {tuple(table.shape)}")
        self.hold("table", table)

    def _bucket(self, distance: Tensor) -> Tensor:
        """Entry for ``distance = row - k``."""
        if self.buckets is None:
            clipped = distance.clamp(-self.reach if self.bidirectional else 0, self.reach)
            return clipped + (self.reach if self.bidirectional else 0)
        count = self.buckets // 2 if self.bidirectional else self.buckets
        future = (distance < 0).long() * count if self.bidirectional else 0
        distance = distance.abs() if self.bidirectional else distance.clamp(min=0)
        exact = count // 2
        ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.reach / exact)
        far = (exact + (ratio * (count - exact)).long()).clamp(max=count - 1)
        return future + torch.where(distance < exact, distance, far)

    def forward(self, score: Tensor, at: At) -> Tensor:
        return score + self.table[at.h, self._bucket(at.distance)].to(score.dtype)


class Bias(Score):
    """``score + bias``: a tensor that broadcasts to ``[B, H, N, M]`` (an additive mask, a pair representation)."""

    bias: Tensor

    def __init__(self, bias: Tensor):
        super().__init__()
        if not 2 <= bias.ndim <= 4:
            raise SpecError(f"Bias must broadcast to [B, H, N, M]; got shape {tuple(bias.shape)}")
        self.hold("bias", bias)

    @property
    def shift(self) -> bool:  # type: ignore[override]
        return not self.bias.requires_grad

    def forward(self, score: Tensor, at: At) -> Tensor:
        return score + look_up(self.bias, at, "Bias").to(score.dtype)


def look_up(tensor: Tensor, at: At, what: str) -> Tensor:
    """The part of a tensor that broadcasts to ``[B, H, N, M]`` that lies at a tile."""
    full = tensor[(None,) * (4 - tensor.ndim)]
    wanted = (at.batch, at.heads, at.n, at.m)
    if any(s not in (1, w) for s, w in zip(full.shape, wanted, strict=True)):
        raise SpecError(f"{what} is {tuple(tensor.shape)}, which does not broadcast to [B, H, N, M] = {list(wanted)}")
    index = zip((at.b, at.h, at.q, at.k), full.shape, strict=True)
    return full[tuple(i if size > 1 else torch.zeros_like(i) for i, size in index)]


class Temperature(Score):
    """``score / temperature``: a number, or a tensor that broadcasts to ``[B, H, N]`` (one per query)."""

    may_hide = False
    temperature: Tensor

    def __init__(self, temperature: Tensor | float):
        super().__init__()
        self.hold("temperature", torch.as_tensor(temperature))

    def forward(self, score: Tensor, at: At) -> Tensor:
        return score / per_row(self.temperature, at, "Temperature").to(score.dtype)

    def inplace(self, score: Tensor, at: At) -> Tensor:
        return score.div_(per_row(self.temperature, at, "Temperature").to(score.dtype))


class MixHeads(Score):
    """``score'[h] = sum_g matrix[h, g] * score[g]``: talking heads before the normalizer (arXiv:2003.02436)."""

    may_hide = False
    mixes_heads = True

    matrix: Tensor

    def __init__(self, matrix: Tensor):
        super().__init__()
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise SpecError(f"MixHeads needs [H, H]; got {tuple(matrix.shape)}")
        self.hold("matrix", matrix)

    def forward(self, score: Tensor, at: At) -> Tensor:
        return mix_heads(score, at, self.matrix)


def mix_heads(tile: Tensor, at: At, matrix: Tensor) -> Tensor:
    """Mix a tile that covers all heads with a matrix ``[H, H]``."""
    if len(matrix) != at.heads:
        raise SpecError(f"MixHeads has a matrix for {len(matrix)} heads, the call has {at.heads}")
    return torch.einsum("hg,bgnm->bhnm", matrix.to(tile.dtype), at.split_heads(tile)).reshape(tile.shape)
