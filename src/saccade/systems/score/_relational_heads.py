"""The relational heads of :mod:`.dual_attention`, whose equations are there, and the symbols that they blend.

Sums change places: sum over j of b r[l, i, j] is the product of a query with the sum over j of b times the relation's
keys, so relations never need a tensor of N² R.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...nn import MultiHead
from ...nn.attention import join, split


class Symbols(nn.Module):
    """A vector of a learned library for each token, by attention to learned templates."""

    def __init__(self, width: int, count: int, heads: int):
        super().__init__()
        self.heads, self.query = heads, nn.Linear(width, width)
        self.templates, self.library = nn.Parameter(torch.randn(count, width)), nn.Parameter(torch.randn(count, width))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, width]`` of a stream ``[B, N, width]``."""
        keys, values = (split(table[None], self.heads) for table in (self.templates, self.library))
        q = split(self.query(x), self.heads)
        return join((q @ keys.mT * q.shape[-1] ** -0.5).softmax(-1) @ values)


class Relational(MultiHead):
    """Relational heads: ``[B, N, width]`` to ``[B, N, heads * head_width]``.

    Args:
        spec, width, heads, head_width, positions: as :class:`MultiHead`'s.
        symbols: how many, and heads that retrieve them.
        symmetric: relations whose queries are their keys.
    """

    def __init__(
        self, spec: nn.Module, width: int, heads: int, head_width: int, positions: nn.Module | None,
        symbols: tuple[int, int], symmetric: bool,
    ):  # fmt: skip
        super().__init__(spec, width, heads, head_width=head_width, positions=positions)
        inner = heads * head_width
        self.out = nn.Linear(inner, inner, bias=False)
        self.symbols = Symbols(width, *symbols)
        self.related_q = nn.Linear(width, inner, bias=False)
        self.related_k = self.related_q if symmetric else nn.Linear(width, inner, bias=False)
        self.related = nn.Parameter(torch.empty(heads, head_width, heads))  # Wr: [H, D, R]
        nn.init.kaiming_uniform_(self.related, 5**0.5)

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys of the selection; values are a head's symbols, and beside them the keys of all relations."""
        symbols = split(self.v(self.symbols(context)), self.heads)
        keys = self.related_k(context)[:, None].expand(-1, self.heads, -1, -1)
        return split(self.q(x), self.heads), split(self.k(context), self.heads), torch.cat([symbols, keys], -1)

    def merge(self, out: Tensor, x: Tensor) -> Tensor:
        """What was selected ``[B, H, N, D + R D]``: symbols, and keys that meet the queries of their relations."""
        symbols, keys = out.tensor_split((self.head_width,), -1)
        q = self.related_q(x).unflatten(-1, (self.heads, -1))
        relations = torch.einsum("bnrp,bhnrp->bhnr", q, keys.unflatten(-1, (self.heads, -1))) * q.shape[-1] ** -0.5
        return self.out(join(symbols + relations @ self.related.mT))
