"""Routing attention: tokens are clustered by online k-means, and a query attends within its cluster, causally.

    x          = LayerNorm(q), without scale and bias; keys are the same x (queries and keys are shared)
    cluster[i] = argmax over c of x[i] . means[c];    members[c] = the ``window`` tokens with the largest x . means[c]
    out[i]     = softmax over j in members[cluster[i]], j <= i, of x[i] . x[j], times v[j]
    means[c]   = moving averages of the sum of the x whose cluster is c, over the moving average of their number

The first half of the heads is local: it sees the last ``window`` keys. With about sqrt(N) clusters of sqrt(N) members
scores and values cost N ** 1.5.

Paper: Efficient Content-Based Sparse Attention with Routing Transformers, arXiv:2003.05997
Code: https://github.com/google-research/google-research/tree/master/routing_transformer
    (utils.py: clustered_local_attention_helper, online_kmeans, gather_cluster_attention_items)

Differs: a query attends in the one cluster that it is nearest to, the paper's equation 11, and always to itself. The
code's batched form takes the ``window`` nearest queries of each cluster too, so one in several gets the mean of their
outputs, and one in none gets zero; where clusters are balanced both are the same. Local heads see a sliding window
(official: their block of 256 and the one before) and their queries and keys are normalized too. No relative positions
and no commitment loss (1e-4 of it). Keys stand for themselves where they are grouped or not as many as queries.
As in the official code members are chosen among all tokens, later ones too, though none of these is ever read.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.attend import attention
from ...core.errors import SpecError
from ...core.masks import Causal, Mask
from ...core.scores import Form
from ...core.selectors import Select, Selection
from ...core.spec import Attention
from ...core.tile import At
from ..base import ClaimNumbers, Promises, System
from ._online_means import OnlineMeans


class Shared(Form):
    """Normalized queries against themselves (or normalized keys, see above); no factor, as in the official code."""

    def prepare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        x = F.layer_norm(q, q.shape[-1:], eps=1e-6)
        if q.shape == k.shape:
            return x, x
        real = k.isfinite().all(-1, keepdim=True)  # padding may hold anything, and its gradient must not show it
        return x, torch.where(real, F.layer_norm(k.masked_fill(~real, 0), k.shape[-1:], eps=1e-6), k)

    def scale(self, width: int) -> float:
        return 1.0


class Routing(Select):
    """Single keys for single queries: of the first heads the last ``window``, of the others the cluster's members.

    With ``online`` every call that wants gradients moves the means of the clusters, after it was answered.
    """

    def __init__(self, local: int, clusters: int, window: int, decay: float = 0.999, online: bool = False):
        super().__init__(1, 1)
        if min(clusters, window) < 1 or not 0 <= decay < 1:
            raise SpecError(
                f"Routing needs clusters and window >= 1, 0 <= decay < 1; got {clusters}, {window}, {decay}"
            )
        self.local, self.window, self.online = local, window, online
        self.clusters = OnlineMeans(clusters, decay)

    def search(self, q: Tensor, k: Tensor, mask: Mask, at: At) -> Selection:
        learn = self.online and torch.is_grad_enabled()
        with torch.no_grad():
            m, row = at.m, at.row[0, 0]
            near = row - torch.arange(min(self.window, m), device=q.device)
            near = near.masked_fill(near < 0, -1).expand(len(q), self.local, -1, -1)
            x, y = q[:, self.local :], k.repeat_interleave(q.shape[1] // k.shape[1], 1)[:, self.local :]
            means = self.clusters.of(x)
            members = (y @ means.mT).topk(min(self.window, m), 2).indices.mT  # [B, h, clusters, window]
            own = (x @ means.mT).argmax(-1)[..., None].expand(-1, -1, -1, members.shape[-1])
            far = members.gather(2, own)
            itself = row.expand(*far.shape[:3], 1)
            far = torch.cat([far.masked_fill((far == itself) | (far > row), -1), itself], -1)
            near = F.pad(near, (0, far.shape[-1] - near.shape[-1]), value=-1)
            if learn:
                for z in (x,) if q.shape == k.shape else (x, y):
                    self.clusters.move(z)
            return Selection(torch.cat([near, far], 1), 1, 1)


class RoutingTransformer(System):
    """Settings: ``clusters``, keys per ``window`` of a cluster and of a local head, ``decay`` of the means, and
    whether calls with gradients move them (``online``).
    """  # fmt: skip

    slug = "routing-transformer"
    title = "Routing Transformer (k-means clusters)"
    paper = "https://arxiv.org/abs/2003.05997"
    code = "https://github.com/google-research/google-research/tree/master/routing_transformer"
    promises = Promises(causal=False, cross=False, decodes=False, padding=False, unit_rows=True)

    def __init__(self, clusters: int = 8, window: int = 512, decay: float = 0.999, online: bool = False):
        self.clusters, self.window, self.decay, self.online = clusters, window, decay, online

    def build(self, heads: int) -> Attention:
        """Half of the heads local, half routing."""
        select = Routing(heads // 2, self.clusters, self.window, self.decay, self.online)
        return Attention(score=[Shared()], mask=Causal(), select=select)

    def claim(self) -> ClaimNumbers:
        """Operations as the length grows with sqrt(N) clusters; loss of a small model against local heads alone."""
        from ...study.laws import Work
        from ...study.trainer import Setup, compare

        counts = []
        for n in (1024, 4096):
            q, v = torch.randn(2, 1, 2, n, 32, generator=torch.Generator().manual_seed(0)).unbind(0)
            spec = RoutingTransformer(math.isqrt(n), math.isqrt(n)).build(2)
            with torch.no_grad(), Work() as work:
                attention(q, q, v, spec, backend="band")
            counts.append(work.count)
        exponent = math.log(counts[1] / counts[0]) / math.log(4)
        setup = Setup(layers=3, context=256, batch=4, steps=120, seeds=(0, 1))
        window = math.isqrt(setup.context)
        programs = {  # the local heads see as many keys as a routing query can
            "local": lambda s, layer: Attention([Shared()], Causal(), select=Routing(s.heads, 1, window + 1)),
            "routing": lambda s, layer: RoutingTransformer(window, window, 0.99, online=True).build(s.heads),
        }
        result = compare(programs, setup)
        excess = result.excess("routing", "local")
        return ClaimNumbers.decide(
            result.numbers()
            | {"excess_loss": round(excess.mean, 4), "excess_error": round(excess.error, 4)}
            | {"exponent": round(exponent, 3), "window": window},
            f"With sqrt(N) clusters operations grow as N^{exponent:.2f}. Half of the heads routing, each query seeing"
            f" {window} keys or one more, changes the validation loss by {excess.mean:+.4f} nats per byte (standard"
            f" error {excess.error:.4f}) from {result.mean('local'):.4f} with local heads alone.",
            cost_n_1_5=exponent <= 1.6,
            loss_below_local=excess.mean < -excess.error,
        )
