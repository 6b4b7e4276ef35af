"""Attention that leaves projections out: Optimised has no Wv, Efficient no Wk either, Super mixes the values by place.

    optimised   q, k = x Wq, x Wk      v = x                 3/4 of the parameters
    efficient   q, k = x Wq, x         v = x                 1/2
    super       q, k = x Wq, x         v = A x               1/2, and A [length, length]
    y = concat over heads h of softmax(q[h] . k[h] / sqrt(D)) v[h], times Wo

where a head h reads its own slice of D coordinates of x. Wv and Wo are two matrices in a row, and so are Wq and Wk: one
of each pair can take over what the other does. A is one matrix for all heads, lower triangular where attention is
causal, that mixes the tokens before they are weighed.

Paper: You Need to Pay Better Attention, arXiv:2403.01643, of S. Hosseini and M. Hosseini
Code: none official; compared with https://github.com/NMesaC/pay-better-attention-pytorch-keras, written with the
    authors' help

Differs: the softmax is over the keys, as in the paper (the PyTorch version of that code has it over the queries). No
biases (theirs has some everywhere, on A too). A's first weights are the backbone's. A is a table for ``length`` tokens,
of which shorter sequences use the first rows and columns; longer ones are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ...core import masks
from ...core.errors import SpecError
from ...core.spec import Attention
from ...nn import KVCache, MultiHead
from ...nn.attention import AnyCache
from ...nn.backbones import Place
from ..base import ClaimNumbers, LayerSystem, Promises
from ._projections import contest

Kind = Literal["optimised", "efficient", "super"]
SHARES = {"optimised": 3 / 4, "efficient": 1 / 2}  # of the parameters of the layer
PARITY = 0.01  # "on par": the loss may be greater by this share


@dataclass
class MixedCache(KVCache):
    """Keys and mixed values so far, and the values ``[B, H, M, D]`` as they were: later tokens mix them anew."""

    raw: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all three."""
        return super().nbytes + (0 if self.raw is None else self.raw.nbytes)


class Reduced(MultiHead):
    """Multi-head attention without Wv, and without Wk if ``kind`` says so; ``length`` is A's, for ``"super"``."""

    def __init__(self, place: Place, kind: Kind, length: int, causal: bool):
        spec = Attention(mask=masks.Causal() if causal else masks.Full())
        super().__init__(spec, place.width, place.heads, positions=place.positions)
        self.v = nn.Identity()  # type: ignore[assignment]
        if kind != "optimised":
            self.k = nn.Identity()  # type: ignore[assignment]
        self.causal = causal
        self.mixing = nn.Linear(length, length, bias=False) if kind == "super" else None

    def cache(self) -> AnyCache:
        """An empty one."""
        return KVCache() if self.mixing is None else MixedCache()

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, cache: AnyCache | None = None, keep: Tensor | None = None,
        **given: Any,
    ) -> Tensor:  # fmt: skip
        """What the heads read; of ``"super"`` from mixed values."""
        if self.mixing is not None:
            if keep is not None:
                v = v.masked_fill(~keep[:, None, :, None], 0)  # padding is not mixed in
            if isinstance(cache, MixedCache):
                v = cache.raw = v if cache.raw is None else torch.cat([cache.raw, v], 2)
            v = self.mixture(v.shape[2] - q.shape[2], v.shape[2]) @ v
        return super().attend(q, k, v, cache=cache, keep=keep, **given)

    def mixture(self, start: int, stop: int) -> Tensor:
        """A's rows from ``start`` on, over tokens before ``stop``. Raises: SpecError past the last."""
        assert self.mixing is not None
        table = self.mixing.weight
        if stop > len(table):
            raise SpecError(f"super-attention mixes {len(table)} tokens, and these are {stop}: give length={stop}")
        rows = table[start:stop, :stop]
        return rows.tril(start) if self.causal else rows


class SuperAttention(LayerSystem):
    """Settings: ``kind``; ``length``, the longest sequence (``"super"``); ``causal``."""

    slug = "super-attention"
    title = "Optimised, Efficient and Super Attention"
    paper = "https://arxiv.org/abs/2403.01643"
    promises = Promises(hosts=())

    def __init__(self, kind: Kind = "super", length: int = 1024, causal: bool = True):
        if kind not in get_args(Kind):
            raise SpecError(f'super-attention: kind must be "optimised", "efficient" or "super"; got {kind!r}')
        self.kind, self.length, self.causal = kind, length, causal

    def layer(self, place: Place) -> nn.Module:
        """Multi-head attention with fewer projections."""
        return Reduced(place, self.kind, self.length, self.causal)

    def claim(self) -> ClaimNumbers:
        """Parameters, time of a forward pass, and the loss of small language models with each."""
        from ...study.claims import interleaved
        from ...study.trainer import Setup

        setup = Setup(steps=100)
        kinds = get_args(Kind)
        ours: dict[str, LayerSystem] = {kind: SuperAttention(kind, setup.context) for kind in kinds}
        place = Place(512, 8, 0, 1, None, None)
        plain = MultiHead(Attention(mask=masks.Causal()), place.width, place.heads)
        layers: dict[str, nn.Module] = {"standard": plain} | {name: how.layer(place) for name, how in ours.items()}
        counts = {name: sum(p.numel() for p in layer.parameters()) for name, layer in layers.items()}
        x = torch.randn(8, setup.context, place.width, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            times = interleaved({name: partial(layer, x) for name, layer in layers.items()}, 9)
        faster = {kind: times.ratio("standard", kind) for kind in kinds}
        result = contest({"standard": None, **ours}, setup)
        excess = {kind: result.excess(kind, "standard") for kind in kinds}
        bound = PARITY * result.mean("standard")
        return ClaimNumbers.decide(
            result.numbers()
            | {f"share_{kind}": counts[kind] / counts["standard"] for kind in kinds}
            | {f"speedup_{kind}": round(faster[kind], 2) for kind in kinds}
            | {f"excess_{kind}": [round(x, 4) for x in excess[kind]] for kind in kinds},
            "; ".join(
                f"{kind}: {counts[kind] / counts['standard']:.3f} of the parameters, {faster[kind]:.2f} times as fast,"
                f" {excess[kind].mean:+.4f} nats per byte (standard error {excess[kind].error:.4f})"
                for kind in kinds
            ) + f", from {result.mean('standard'):.4f}.",
            parameters=all(counts[kind] == share * counts["standard"] for kind, share in SHARES.items()),
            faster=all(ratio > 1 for ratio in faster.values()),
            optimised_on_par=excess["optimised"].mean <= bound,
            efficient_on_par=excess["efficient"].mean <= bound,
            super_better=excess["super"].below,
        )  # fmt: skip
