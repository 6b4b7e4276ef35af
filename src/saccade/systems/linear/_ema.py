"""Mega's multi-dimensional damped moving average, as a convolution and as a recurrence.

Per channel of the stream, with n dimensions:

    h[t] = (1 - p a) h[t-1] + p beta x[t],   p = sigmoid(delta), a = sigmoid(alpha)             elementwise, [n]
    y[t] = silu(gamma . h[t] / sqrt(n) + omega x[t])

so ``gamma . h`` is a convolution of x with ``kernel[l] = sum over n of gamma p beta (1 - p a)^l / sqrt(n)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn import KVCache


class DampedEMA(nn.Module):
    """The moving average ``[B, N, width]`` to ``[B, N, width]``, first weights as in the official code.

    Args:
        width: of the stream.
        dims: n.
        both_ways: a second average, with weights of its own, runs from the end; both take each token itself.
    """

    def __init__(self, width: int, dims: int = 16, both_ways: bool = False):
        super().__init__()
        self.width, self.both_ways = width, both_ways
        shape = (2 * width if both_ways else width, dims)
        signs = 1 - 2 * (torch.arange(dims) % 2)  # 1, -1, 1, ...
        self.delta, self.alpha = (nn.Parameter(0.2 * torch.randn(shape)) for _ in range(2))
        self.beta = nn.Parameter(signs + 0.02 * torch.randn(shape))
        self.gamma = nn.Parameter(torch.randn(shape))
        self.omega = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor, state: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """Averages of ``x``; what is not kept (bool ``[B, N]``) counts as nothing.

        ``state``: ``[B, width, dims]``, what the tokens before left, see :meth:`after`.
        """
        n = x.shape[1]
        seen = (x if keep is None else x * keep[..., None]).mT
        exact = seen.to(torch.promote_types(x.dtype, torch.float32))  # [B, width, N]
        kernel = self.kernel(n).to(exact.dtype)
        found = convolved(exact, kernel[: self.width])
        if self.both_ways:
            found = found + convolved(exact.flip(-1), kernel[self.width :]).flip(-1)
        if state is not None:
            _, kept, read = self.rates()
            found = found + torch.einsum("bdn,dnl->bdl", state, read[..., None] * powers(kept, n + 1)[..., 1:])
        return F.silu(found.to(x.dtype).mT + x * self.omega)

    def after(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        """h after the last token of ``x [B, N, width]``, ``[B, width, dims]``."""
        written, kept, _ = self.rates()
        past = powers(kept, x.shape[1] + 1)
        new = torch.einsum("bld,dnl->bdn", x, written[..., None] * past[..., :-1].flip(-1))
        return new if state is None else new + state * past[..., -1]

    def rates(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of each dimension ``[D, n]``: what of x is written, what of h is kept, how h is read."""
        p = self.delta.sigmoid()
        return p * self.beta, 1 - p * self.alpha.sigmoid(), self.gamma * self.gamma.shape[-1] ** -0.5

    def kernel(self, length: int) -> Tensor:
        """What a token gives to the one l later, ``[D, length]``."""
        written, kept, read = self.rates()
        return torch.einsum("dn,dnl->dl", written * read, powers(kept, length))


@dataclass
class AverageCache:
    """What decoding needs that attends over the average: its state, and the keys and values that are still seen."""

    seen: KVCache
    average: Tensor | None = None
    length: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.seen.nbytes + (0 if self.average is None else self.average.nbytes)


def powers(base: Tensor, count: int) -> Tensor:
    """``base ** l`` for l = 0 ... count - 1 as a last dimension; base lies in 0 ... 1."""
    log = base.clamp(min=torch.finfo(base.dtype).tiny).log()  # of 0 it would be infinite, and 0 ** 0 no number
    return (log[..., None] * torch.arange(count, device=base.device, dtype=base.dtype)).exp()


def convolved(x: Tensor, kernel: Tensor) -> Tensor:
    """``sum over s <= t of kernel[d, t - s] x[b, d, s]``, ``[B, D, N]``, by Fourier transforms."""
    n = x.shape[-1]
    spectrum = torch.fft.rfft(x, n=2 * n) * torch.fft.rfft(kernel, n=2 * n)
    return torch.fft.irfft(spectrum, n=2 * n)[..., :n]


@torch.no_grad()
def forms_apart(tokens: int = 4096) -> float:
    """Greatest difference of the average token by token from that of the whole, of the greatest value."""
    source = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        average = DampedEMA(32)
    x, state, steps = torch.randn(1, tokens, 32, generator=source), None, []
    for token in x.split(1, 1):
        steps.append(average(token, state))
        state = average.after(token, state)
    whole = average(x)
    return float((torch.cat(steps, 1) - whole).abs().max() / whole.abs().max())
