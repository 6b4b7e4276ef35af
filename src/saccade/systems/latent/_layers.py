"""What the latent architectures are made of: attention from a stream to itself or to a source, and a perceptron."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ...core.errors import SpecError
from ...core.spec import Attention

Function = Callable[[Tensor], Tensor]


def perceptron(width: int, widen: int, activation: nn.Module, eps: float) -> nn.Sequential:
    """``[..., width]`` normalized, ``widen`` times as wide, and back."""
    hidden = widen * width
    return nn.Sequential(nn.LayerNorm(width, eps), nn.Linear(width, hidden), activation, nn.Linear(hidden, width))


class Layer(nn.Module):
    """``x + attention(norm(x), norm(source))``, then ``x + perceptron(norm(x))``; all projections have biases.

    Args:
        width: of the stream ``[B, N, width]``.
        heads: of the attention.
        spec: its program.
        activation: of the perceptron, between its two matrices.
        source: width of what is read, ``[B, M, source]``; the stream itself if not given.
        inner: width of queries, keys and values; ``width`` if not given.
        widen: hidden width of the perceptron, in widths of the stream; 0: no perceptron.
        place: what gives queries and keys ``[B, H, N, D]`` their positions.
        eps: of the layer norms.

    Raises:
        SpecError: the heads do not divide the inner width.
    """

    def __init__(
        self, width: int, heads: int, spec: Attention, activation: nn.Module, *, source: int | None = None,
        inner: int | None = None, widen: int = 4, place: Function | None = None, eps: float = 1e-5,
    ):  # fmt: skip
        super().__init__()
        inner = width if inner is None else inner
        if inner % heads:
            raise SpecError(f"{heads} heads do not divide the width {inner} of queries, keys and values")
        self.heads, self.spec, self.place = heads, spec, place
        self.norm = nn.LayerNorm(width, eps)
        self.norm_source = None if source is None else nn.LayerNorm(source, eps)
        read = width if source is None else source
        self.q, self.k, self.v = nn.Linear(width, inner), nn.Linear(read, inner), nn.Linear(read, inner)
        self.out = nn.Linear(inner, width)
        self.perceptron = perceptron(width, widen, activation, eps) if widen else None

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        """The stream after this layer."""
        own = self.norm(x)
        read = own if self.norm_source is None else self.norm_source(source)
        q, k, v = (
            part(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part, y in ((self.q, own), (self.k, read), (self.v, read))
        )
        if self.place is not None:
            q, k = self.place(q), self.place(k)
        x = x + self.out(self.spec(q, k, v).transpose(1, 2).flatten(2))
        return x if self.perceptron is None else x + self.perceptron(x)
