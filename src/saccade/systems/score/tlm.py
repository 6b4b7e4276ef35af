"""Token-level masking (TLM): while a model trains, each layer hides a few tokens from the others or from themselves.

    hidden[j] ~ Bernoulli(rate),  alone[j] ~ Bernoulli(1/2)        drawn anew in every layer and step, for all heads
    a token that is not hidden sees the keys that are not
    a hidden token sees itself alone ("siblings-masking"), or all others but not itself ("self-masking")
    w[i] = softmax(q[i] . k / sqrt(D)) over the keys that i sees;      in use: over all

So no token can count on one neighbour, and some must be told from their surroundings alone.

Paper: TLM: Token-Level Masking for Transformers, arXiv:2310.18738
Code: https://github.com/Young1993/tlm (transformers/models/bert/modeling_bert.py: BertEncoder._d_expand_mask; its
    masking_rate is the share that stays, 0.9 by default, 0.95 in the script for RTE)

Differs: in self-masking the official code lets a token see padding too. In its decoder of BART the ones and zeros of
the mask are added to the scores, where BERT's hide; here a causal layer hides as BERT's, and a token that may see
nothing reads zeros. Nothing is hidden from a layer that decodes with a cache.
"""

from __future__ import annotations

from functools import partial
from itertools import cycle, islice

import torch
from torch import Tensor, nn

from ...core import masks
from ...core.attend import attention
from ...core.errors import SpecError
from ...core.spec import Attention
from ...core.tile import At
from ...nn.backbones import Place
from ..base import ClaimNumbers, LayerSystem, Promises
from ._regularized import BATCH, DroppedHeads, DroppedWeights, Parser, Regularized, parsed

BATCHES = 8  # of sentences that the encoders of the claim learn from
HELD = 999  # the seed of others


class Drawn(masks.Mask):
    """What one draw lets each token see: which are hidden, and which of these see themselves alone, bool ``[B, N]``."""

    hidden: Tensor
    alone: Tensor

    def __init__(self, hidden: Tensor, alone: Tensor):
        super().__init__()
        self.hold("hidden", hidden)
        self.hold("alone", alone)

    def visible(self, at: At) -> Tensor:
        """Bool, broadcasting against the tile."""
        own = at.row == at.k
        return torch.where(self.hidden[at.b, at.row], own == self.alone[at.b, at.row], ~self.hidden[at.b, at.k])


class Masked(Regularized):
    """Multi-head attention that hides tokens while it trains."""

    def noisy(self, q: Tensor, k: Tensor, v: Tensor, spec: Attention) -> Tensor:
        """Each token reads what the draw lets it see."""
        hidden, alone = torch.rand(2, len(k), k.shape[2], device=k.device)
        return attention(q, k, v, Attention(mask=spec.mask & Drawn(hidden < self.rate, alone < 0.5)))


class TLM(LayerSystem):
    """Settings: ``rate``, the share of tokens that a layer hides; ``causal``."""

    slug = "tlm"
    title = "Token-level masking (TLM)"
    paper = "https://arxiv.org/abs/2310.18738"
    code = "https://github.com/Young1993/tlm"
    promises = Promises(unit_rows=True, hosts=())

    def __init__(self, rate: float = 0.1, causal: bool = True):
        if not 0 <= rate < 1:
            raise SpecError(f"tlm: rate must be at least 0 and below 1; got {rate}")
        self.rate, self.causal = rate, causal

    def layer(self, place: Place) -> nn.Module:
        """Softmax attention, masked by token in training."""
        return Masked(place, self.rate, self.causal)

    def claim(self) -> ClaimNumbers:
        """Encoders that name each word's head, taught with few sentences: accuracy on others, by what regularizes."""
        from ...study.trainer import Recipe, Task, accuracy, compete, labelled

        kinds: dict[str, type[Regularized]] = {"tlm": Masked, "dropout": DroppedWeights, "drophead": DroppedHeads}
        models = {name: partial(Parser, partial(kind, rate=self.rate)) for name, kind in kinds.items()}
        models["nothing"] = partial(Parser, partial(DroppedWeights, rate=0.0))
        held = list(islice(parsed(HELD), 8))
        task = Task(lambda seed: cycle(islice(parsed(seed), BATCHES)), labelled, lambda: held, accuracy, "accuracy")
        result = compete(models, task, Recipe(steps=300))
        above = {name: result.excess("tlm", name) for name in models if name != "tlm"}
        return ClaimNumbers.decide(
            result.numbers()
            | {f"above_{name}": [round(excess.mean, 4), round(excess.error, 4)] for name, excess in above.items()},
            f"Taught with {BATCHES * BATCH} sentences, an encoder names the heads of {result.mean('tlm'):.2%} of other"
            f" sentences' words with TLM, {result.mean('dropout'):.2%} with attention dropout,"
            f" {result.mean('drophead'):.2%} with DropHead and {result.mean('nothing'):.2%} with nothing (standard"
            f" errors of the differences {above['dropout'].error:.2%}, {above['drophead'].error:.2%},"
            f" {above['nothing'].error:.2%}).",
            above_attention_dropout=above["dropout"].mean > 0,
            above_drophead=above["drophead"].mean > 0,
        )
