"""Variational attention: which word is read is a latent variable, and training sums over it, or bounds the sum.

    p(z = s) = softmax over words s of v . tanh(Wq h[t] + Wm m[s])      the alignment, before y[t] is known
    p(y | s) = softmax(V tanh(Wc [h[t]; m[s]] + b))                     what is said of word s
    q(z = s)                                                            once the whole y is known (._latent_translator)

    objective     what is maximised for each y[t]
    "soft"        log p(y | E m), the mean m under p: usual attention, no latent variable
    "exact"       log sum over s of p(s) p(y | s)
    "enumerated"  ELBO = sum over s of q(s) log p(y | s) - KL(q || p), never more than "exact"
    "sampled"     log p(y | s) - KL(q || p) for one s drawn from q, which learns by REINFORCE:
                  its gradient is (log p(y | s) - log p(y | E m)) grad log q(s), soft attention being the baseline
    "gumbel"      log p(y | sum over s of w[s] m[s]) - KL(q || p),   w = softmax((log q + Gumbel noise) / temperature)

A translation is judged by "exact", whatever was trained (of "soft", by "soft"): q is for training alone.

Paper: Latent Alignment and Variational Attention, arXiv:1807.03756
Code: https://github.com/harvardnlp/var-attn (onmt/modules/VariationalAttention.py, onmt/ViModels.py, onmt/Loss.py;
    Generator in onmt/Models.py; by default "sampled" with one sample and a baseline that is not trained; temperature
    and perceptron scores as in va.sh; first weights from -0.1 to 0.1; the decoder starts at zero)

Differs: one layer in each LSTM (two there), one table of embeddings for both languages, no dropout and no label
smoothing. q does not read what pads the shorter targets. As a layer it is the mean, tanh(Wc [h; E m] + b): what is fed
on and what the baseline says. Wake-sleep and the paper's Dirichlet alignments are left out.
"""

from __future__ import annotations

from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import SpecError
from ...nn.backbones import Place
from ..base import ClaimNumbers, LayerSystem, Promises
from ._latent_translator import Alignment, LatentTranslator
from ._translation import BATCH, HELD, aligned, told, vocabulary

if TYPE_CHECKING:
    from ...worlds.translation import Translation

Objective = Literal["soft", "exact", "enumerated", "sampled", "gumbel"]
WIDTH, CORPUS, UNSEEN = 64, 512, 256  # of the claim: the translators, and sentences to learn from and to judge by
MOST = 0.5  # "variational attention retains most of the performance gain": of exact over soft attention


class Translator(LatentTranslator):
    """The translator and what it is trained to maximise."""

    def __init__(self, vocab: int, width: int, objective: Objective, temperature: float):
        super().__init__(vocab, width, latent=objective != "soft")
        self.objective, self.temperature = objective, temperature

    def loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Minus the objective, the mean over the labels; of (source, target, which of the source are words, labels)."""
        source, target, keep, labels = batch
        if self.objective in ("soft", "exact"):
            return F.nll_loss(self(source, target, keep).flatten(0, 1), labels.flatten())
        memory, states, prior = self.states(source, target, keep)
        asked, labels = labels != -100, labels.clamp(min=0)
        log_q = self.posterior(self.table(source), self.table(labels), keep, asked)
        q = log_q.exp()

        def said(log: Tensor) -> Tensor:
            """Of all that could be said ``[B, T, ..., vocab]``, what was."""
            index = labels.view(*labels.shape, *[1] * (log.ndim - 2)).expand(*log.shape[:-1], 1)
            return log.gather(-1, index)[..., 0]

        if self.objective == "enumerated":
            gain = (q * said(self.of_each(states, memory))).sum(-1)
        elif self.objective == "gumbel":
            gain = said(self.say(states, F.gumbel_softmax(log_q, self.temperature) @ memory))
        else:
            drawn = torch.distributions.Categorical(q.detach()).sample()[..., None]
            gain = said(self.say(states, memory.gather(1, drawn.expand_as(states))))
            with torch.no_grad():
                reward = gain - said(self.say(states, prior.exp() @ memory))
            score = log_q.gather(-1, drawn)[..., 0]
            gain = gain + reward * (score - score.detach())  # the value stays, the gradient is REINFORCE's
        kl = (q * (log_q - prior)).sum(-1)
        return (kl - gain)[asked].mean()


class VariationalAttention(LayerSystem):
    """Settings: ``objective`` of the training; ``temperature`` of "gumbel"."""

    slug = "variational-attention"
    title = "Variational attention over latent alignments"
    paper = "https://arxiv.org/abs/1807.03756"
    code = "https://github.com/harvardnlp/var-attn"
    promises = Promises(causal=False, decodes=False, unit_rows=True, hosts=())

    def __init__(self, objective: Objective = "sampled", temperature: float = 0.1):
        self.objective, self.temperature = objective, temperature
        known = get_args(Objective)
        if objective not in known or not temperature > 0:
            raise SpecError(f"variational-attention: objective is one of {known}, temperature above 0; got {self!r}")

    def layer(self, place: Place) -> nn.Module:
        """Attention of a decoder's states: the mean under the prior."""
        return Alignment(place.width)

    def model(self, vocab: int, width: int) -> Translator:
        """The whole translator, its weights fresh."""
        return Translator(vocab, width, self.objective, self.temperature)

    def claim(self) -> ClaimNumbers:
        """Translators of few sentences (of endless ones all end at zero: each has one translation) are given others."""
        from ...study.trainer import Recipe, Task, compete, labelled
        from ...worlds.batches import drawn

        names: list[Objective] = ["soft", "exact", "enumerated", "sampled"]
        corpus, held = _sentences(0, CORPUS), _sentences(HELD, UNSEEN)
        make: dict[str, Any] = {n: partial(VariationalAttention(n).model, vocabulary(), WIDTH) for n in names}
        task = Task(
            lambda seed: drawn(told(corpus), BATCH, seed), Translator.loss,  # type: ignore[arg-type]
            lambda: [told(held)], labelled, "nll",
        )  # fmt: skip
        result = compete(make, task, Recipe(400, 1e-2, (0, 1)))
        gains = {name: result.excess("soft", name) for name in names[1:]}
        right = {
            name: fmean(aligned(model.states(*told(held)[:3])[2], held) for model in result.models[name])
            for name in names
        }
        least = MOST * gains["exact"].mean
        return ClaimNumbers.decide(
            result.numbers()
            | {f"gain_{name}": [round(gain.mean, 4), round(gain.error, 4)] for name, gain in gains.items()}
            | {f"aligned_{name}": round(share, 4) for name, share in right.items()},
            f"After {CORPUS} sentences, others are translated at {result.mean('soft'):.3f} nats per word by soft"
            f" attention, {result.mean('exact'):.3f} by exact marginals, {result.mean('enumerated'):.3f} by the"
            f" enumerated ELBO and {result.mean('sampled'):.3f} by samples. The likeliest word before the answer is"
            f" known is the right one in {', '.join(f'{share:.0%}' for share in right.values())} of cases.",
            exact_below_soft=gains["exact"].mean > 0,
            enumerated_at_or_below_soft=gains["enumerated"].mean >= 0,
            enumerated_keeps_most_of_the_gain=gains["enumerated"].mean >= least,
            sampled_keeps_most_of_the_gain=gains["sampled"].mean >= least,
        )


def _sentences(seed: int, count: int) -> Translation:
    """Sentences of one clause and their translations."""
    from ...worlds.translation import Sizes, batch, translation

    return batch(translation(seed, Sizes(depth=0, clauses=1)), count)
