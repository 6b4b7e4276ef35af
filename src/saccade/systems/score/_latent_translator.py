"""A recurrent translator whose every word reads one word of the source, which one being unknown: p, and q to learn it.

    p(z = s)   = softmax over words s of v . tanh(Wq h[t] + Wm m[s])
    p(y | s)   = softmax(V tanh(Wc [h[t]; m[s]] + b))
    q(z = s)   = softmax over s of (W b[t]) . a[s];   a, b: LSTMs over the whole source and the whole target, both ways
    h[t], c[t] = LSTM([y[t - 1]; E m], h[t - 1], c[t - 1]),   E m the mean under the last p: no state depends on a draw

What is trained, and where it comes from: :mod:`.variational_attention`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .pointer_networks import Pointing

FIRST = 0.1  # weights are drawn from +- this
HIDDEN = -1e9  # score of padding: finite, so that 0 log(0 / 0) is 0


class Alignment(Pointing):
    """p over words, and what a state becomes that reads one of them, or their mean (as a layer)."""

    def __init__(self, width: int):
        super().__init__(width)
        self.reading = nn.Linear(2 * width, width)

    def prior(self, x: Tensor, memory: Tensor, keep: Tensor) -> Tensor:
        """``log p [B, N, M]`` of states ``[B, N, width]`` over words ``[B, M, width]``, those that ``keep`` marks."""
        return self.logits(x, memory).masked_fill(~keep[:, None], HIDDEN).log_softmax(-1)

    def merge(self, out: Tensor, x: Tensor) -> Tensor:
        return self.read(x, super().merge(out, x))

    def read(self, x: Tensor, word: Tensor) -> Tensor:
        """``tanh(Wc [x; word] + b)``, ``[..., width]`` both."""
        return torch.tanh(self.reading(torch.cat([x, word], -1)))


class Posterior(nn.Module):
    """q over words, from the whole source and the whole target."""

    def __init__(self, width: int):
        super().__init__()
        self.source, self.target = _both_ways(width), _both_ways(width)
        self.bilinear = nn.Linear(width, width, bias=False)

    def forward(self, source: Tensor, target: Tensor, keep: Tensor, said: Tensor) -> Tensor:
        """``log q [B, T, M]`` of embeddings ``[B, M, width]``, ``[B, T, width]`` and which of them are words."""
        score = self.bilinear(_run(self.target, target, said)) @ _run(self.source, source, keep).mT
        return score.masked_fill(~keep[:, None], HIDDEN).log_softmax(-1)


class LatentTranslator(nn.Module):
    """The whole model. ``vocab``: tokens of both languages; ``latent=False``: usual attention, E m in place of m[s]."""

    def __init__(self, vocab: int, width: int, latent: bool = True):
        super().__init__()
        self.latent = latent
        self.table, self.out = nn.Embedding(vocab, width), nn.Linear(width, vocab)
        self.reader, self.writer = _both_ways(width), nn.LSTMCell(2 * width, width)
        self.alignment, self.posterior = Alignment(width), Posterior(width)
        for p in self.parameters():
            nn.init.uniform_(p, -FIRST, FIRST)

    def states(self, source: Tensor, target: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Words ``m [B, M, width]``, decoder states ``h [B, T, width]`` and ``log p [B, T, M]``."""
        memory = _run(self.reader, self.table(source), keep)
        state = cell = mean = torch.zeros_like(memory[:, 0])
        states, priors = [], []
        for word in self.table(target).unbind(1):
            state, cell = self.writer(torch.cat([word, mean], -1), (state, cell))
            states.append(state)
            priors.append(self.alignment.prior(state[:, None], memory, keep)[:, 0])
            mean = (priors[-1].exp()[:, None] @ memory)[:, 0]
        return memory, torch.stack(states, 1), torch.stack(priors, 1)

    def say(self, states: Tensor, word: Tensor) -> Tensor:
        """``log p(y | word) [..., vocab]`` of every y."""
        return self.out(self.alignment.read(states, word)).log_softmax(-1)

    def of_each(self, states: Tensor, memory: Tensor) -> Tensor:
        """``log p(y | s) [B, T, M, vocab]`` of every y, for every word s."""
        shape = len(states), states.shape[1], memory.shape[1], -1
        return self.say(states[:, :, None].expand(shape), memory[:, None].expand(shape))

    def forward(self, source: Tensor, target: Tensor, keep: Tensor) -> Tensor:
        """``log p(y) [B, T, vocab]``, summed over words, of what follows each token of the target ``[B, T]``."""
        memory, states, prior = self.states(source, target, keep)
        if not self.latent:
            return self.say(states, prior.exp() @ memory)
        return (prior[..., None] + self.of_each(states, memory)).logsumexp(2)


def _both_ways(width: int) -> nn.LSTM:
    """An LSTM that reads both ways, half the width each."""
    return nn.LSTM(width, width // 2, batch_first=True, bidirectional=True)


def _run(reader: nn.LSTM, x: Tensor, words: Tensor) -> Tensor:
    """The states of ``x [B, N, width]``, whose rows begin with as many words as ``words [B, N]`` marks."""
    packed = pack_padded_sequence(x, words.sum(1).cpu(), batch_first=True, enforce_sorted=False)
    return pad_packed_sequence(reader(packed)[0], batch_first=True, total_length=x.shape[1])[0]
