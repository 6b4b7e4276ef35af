"""One layer of attention that learns linear regression in context, as arXiv:2503.12734 trains it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from statistics import fmean

import torch
from torch import Tensor, nn

from ...core.linear import LinearAttention
from ...core.spec import Attention
from ...nn import MultiHead

DIM, PAIRS, NOISE = 5, 40, 0.1**0.5  # as in the paper: dimensions, length of the context, deviation of the noise


class Regressor(MultiHead):
    """One layer of heads as wide as the tokens (x, y), from (q, 0) to the context; its one output is the prediction."""

    def __init__(self, heads: int, softmax: bool = True):
        width = DIM + 1
        mean = LinearAttention(causal=False, scale=1 / (PAIRS * math.sqrt(width)))  # over as many as it is trained on
        super().__init__(Attention() if softmax else mean, width, heads, head_width=width)
        self.out = nn.Linear(heads * width, 1, bias=False)

    def predict(self, x: Tensor, y: Tensor, q: Tensor) -> Tensor:
        """Answers ``[B]`` to queries ``[B, DIM]`` after pairs ``[B, L, DIM]`` and ``[B, L]``."""
        asked = torch.cat([q, torch.zeros_like(q[:, :1])], -1)[:, None]
        return self(asked, torch.cat([x, y[..., None]], -1))[:, 0, 0]

    def circuits(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of each head: omega, the greatest other entry of its scores; mu, the greatest other entry of its values."""
        q, k, v = (m.weight.unflatten(0, (self.heads, -1)) for m in (self.q, self.k, self.v))
        kq = torch.einsum("hdi,hdj->hij", q, k)[:, :DIM, :] / math.sqrt(DIM + 1)  # q's own y is 0
        omega = kq.diagonal(dim1=1, dim2=2).mean(1)
        rest = (kq - omega[:, None, None] * torch.eye(DIM, DIM + 1)).abs().amax((1, 2))
        ov = torch.einsum("hd,hdj->hj", self.out.weight.view(self.heads, -1), v)
        return omega, rest, ov[:, -1], ov[:, :-1].abs().amax(1)


Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def contexts(seed: int, batch: int = 256, pairs: int = PAIRS) -> Iterator[Batch]:
    """Endless x ``[B, L, DIM]``, y ``[B, L]``, q ``[B, DIM]`` and its answer ``[B]``; weights of variance 1 / DIM."""
    source = torch.Generator().manual_seed(seed)
    while True:
        weights = torch.randn(batch, DIM, 1, generator=source) / math.sqrt(DIM)
        x = torch.randn(batch, pairs + 1, DIM, generator=source)
        y = (x @ weights)[..., 0] + NOISE * torch.randn(batch, pairs + 1, generator=source)
        yield x[:, 1:], y[:, 1:], x[:, 0], y[:, 0]


def trained(heads: int, softmax: bool = True, steps: int = 2000) -> Regressor:
    """A layer after so many steps of Adam."""
    from ...study.trainer import train

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Regressor(heads, softmax)
    batches = contexts(0)

    def loss() -> Tensor:
        x, y, q, answer = next(batches)
        return (model.predict(x, y, q) - answer).square().mean()

    train(model, loss, steps, lr=1e-2)
    return model


@torch.no_grad()
def loss_of(predict: Callable[[Tensor, Tensor, Tensor], Tensor], batches: list[Batch]) -> float:
    """Mean squared error of predictions from x, y and q."""
    return fmean(float((predict(x, y, q) - answer).square().mean()) for x, y, q, answer in batches)
