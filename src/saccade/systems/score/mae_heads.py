"""Mixture of attentive experts: each expert is all heads but one, and a gate weighs the experts by the input.

    expert[i] = h / (h - 1) * sum over heads j other than i of head[j] Wo[j]
    g         = softmax(W2 tanh(norm(W1 mean(x))))               one number per expert; norm: over the batch
    y         = sum over i of g[i] expert[i]
              = sum over j of h / (h - 1) * (1 - g[j]) head[j] Wo[j]        (g uniform: multi-head attention)

Trained by block coordinate descent, see :func:`alternating`, in steps of two kinds:

    F    one expert is drawn from g for each input and gives y alone; the gates do not learn
    G    y is the mixture, as it is in use; the gates alone learn

Paper: A Mixture of h - 1 Heads is Better than h Heads, arXiv:2005.06537
Code: https://github.com/Noahs-ARK/MAE says "Coming soon" and no more

Differs: a step is a G step with a probability of 1 / 6, in the place of an epoch of G steps after 5 of F steps. That
and the gate's form (its hidden width 256, half the stream's) are told from memory: the paper's text was not at hand.
mean(x) is that of the sequence that is attended to; in a causal layer of the tokens so far, each with a gate (and in an
F step a draw) of its own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core import masks
from ...core.errors import SpecError
from ...core.spec import Attention
from ...nn import EncoderDecoder, MultiHead
from ...nn.attention import AnyCache
from ...nn.backbones import Place, mean
from ..base import ClaimNumbers, LayerSystem, Promises
from ._routed_heads import Loss, held, scarce, still
from ._running_mean import MeanCache
from ._translation import vocabulary

G_SHARE = 1 / 6  # of the steps


class AttentiveExperts(MultiHead):
    """Multi-head attention whose heads are weighed by the mixture, or by one expert that is drawn (``drawn``)."""

    def __init__(self, spec: nn.Module, place: Place, causal: bool):
        super().__init__(spec, place.width, place.heads, kv_heads=place.kv_heads, positions=place.positions)
        inner = place.width // 2
        self.experts = nn.Sequential(
            nn.Linear(place.width, inner, bias=False), nn.BatchNorm1d(inner), nn.Tanh(), nn.Linear(inner, place.heads)
        )
        self.causal, self.drawn = causal, False

    def cache(self) -> MeanCache:
        """Of a causal layer, with room for the mean."""
        return MeanCache()

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, cache: AnyCache | None = None, keep: Tensor | None = None
    ) -> Tensor:
        """As :meth:`MultiHead.forward`; the gate reads what is attended to.

        Raises: SpecError for a context where a causal gate or a cache goes on with the stream.
        """
        if context is not None and (self.causal or cache is not None):
            raise SpecError("mae-heads: for cross-attention give causal=False and no cache: these follow the stream")
        seen = self.seen(x if context is None else context, cache, keep)
        q, k, v = self.placed(x, context, 0 if cache is None else cache.length)
        out = self.attend(q, k, v, cache=cache, keep=keep)
        return self.merge(out * self.factors(seen).mT[..., None], x)

    def seen(self, x: Tensor, cache: AnyCache | None, keep: Tensor | None) -> Tensor:
        """The mean of the stream ``[B, 1, width]``, or of its tokens up to each ``[B, N, width]``."""
        if not self.causal:
            return mean(x, keep)[:, None]
        return (cache if isinstance(cache, MeanCache) else MeanCache()).means(x)

    def factors(self, seen: Tensor) -> Tensor:
        """What each head is multiplied by ``[B, N or 1, heads]``."""
        g = self.experts(seen.flatten(0, 1)).softmax(-1)
        if self.drawn:
            g = F.one_hot(torch.multinomial(g.detach(), 1)[:, 0], self.heads).to(g)
        return self.heads / (self.heads - 1) * (1 - g).unflatten(0, seen.shape[:2])


class MAEHeads(LayerSystem):
    """Settings: ``causal`` (not for cross-attention)."""

    slug = "mae-heads"
    title = "Mixture of attentive experts (MAE)"
    paper = "https://arxiv.org/abs/2005.06537"
    code = "https://github.com/Noahs-ARK/MAE"
    promises = Promises(cross=False, hosts=())

    def __init__(self, causal: bool = True):
        self.causal = causal

    def layer(self, place: Place) -> nn.Module:
        """As many experts as heads. Raises: SpecError for a single head, without which nothing is left."""
        if place.heads < 2:
            raise SpecError("mae-heads: an expert is all heads but one, so there must be at least 2; got 1")
        spec = Attention(mask=masks.Causal() if self.causal else masks.Full())
        return AttentiveExperts(spec, place, self.causal)

    def claim(self) -> ClaimNumbers:
        """Translation from 256 pairs: held-out loss of h heads and of mixtures of h - 1."""
        from ...study.trainer import Recipe, Task, compete, labelled

        full, unseen = MAEHeads(causal=False), held()
        contestants = {
            "mha": lambda: EncoderDecoder(vocabulary()),
            "mae": lambda: EncoderDecoder(vocabulary(), attention=full, decoder=self, cross=full),
        }
        task = Task(scarce, alternating(labelled), lambda: unseen, labelled)
        result = compete(contestants, task, Recipe(steps=120))
        excess = result.excess("mae", "mha")
        more = result.parameters("mae") / result.parameters("mha")
        return ClaimNumbers.decide(
            result.numbers()
            | {"excess_loss": round(excess.mean, 4), "excess_error": round(excess.error, 4),
               "parameters_ratio": round(more, 3)},
            f"On sentences that were not trained on, the loss of mixtures of h - 1 heads differs by {excess.mean:+.4f}"
            f" nats per word (standard error {excess.error:.4f}) from {result.mean('mha'):.3f} of h heads, with"
            f" {more:.2f} times the parameters.",
            better_than_h_heads=excess.below,
        )  # fmt: skip


def alternating(plain: Loss) -> Loss:
    """A task's loss in steps of the two kinds, in training; that of a model without experts stays as it is."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        layers = [m for m in model.modules() if isinstance(m, AttentiveExperts)]
        if not layers or not model.training:
            return plain(model, batch)
        gates = {p for layer in layers for p in layer.experts.parameters()}
        drawn = float(torch.rand(())) >= G_SHARE
        try:
            for layer in layers:
                layer.drawn = drawn
            with still(p for p in model.parameters() if (p in gates) == drawn):
                return plain(model, batch)
        finally:
            for layer in layers:
                layer.drawn = False

    return loss
