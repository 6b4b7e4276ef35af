"""What linear attention for images shares: the stream as a grid of patches, and the layer that reads it as one."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from ...core.errors import SpecError, Unsupported
from ...nn import MultiHead
from ...nn.attention import join, split
from ...nn.backbones import Place


def sides(tokens: int, rows: int | None = None) -> tuple[int, int]:
    """Rows and columns of a grid of so many tokens; as square as they allow if the rows are not given.

    Raises:
        SpecError: no such grid.
    """
    if rows is None:
        rows = next(r for r in range(math.isqrt(tokens), 0, -1) if tokens % r == 0)
    if rows < 1 or tokens % rows:
        raise SpecError(f"{tokens} tokens are no grid of {rows} rows: give rows= as ViT.grid tells them")
    return rows, tokens // rows


class GridLayer(MultiHead):
    """A multi-head layer over a grid: subclasses define :meth:`read`, what the heads read of the whole grid.

    Projections have biases, as in the vision transformers that these systems change.
    """

    def __init__(self, spec: nn.Module, place: Place, rows: int | None):
        super().__init__(spec, place.width, place.heads, bias=True)
        self.rows = rows

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, cache: Any = None, keep: Tensor | None = None, **given: Any
    ) -> Tensor:
        """What the heads read, ``[B, H, N, D]``. Raises: Unsupported for a cache or padding, a grid has neither."""
        if cache is not None or keep is not None:
            raise Unsupported(f"{type(self).__name__} reads a whole grid of patches: no cache and no padding")
        return self.read(q, k, v, **given)

    def read(self, q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
        """``[B, H, N, D]`` of queries, keys and values as large; ``given`` is what ``options`` returned."""
        raise NotImplementedError

    def picture(self, v: Tensor) -> Tensor:
        """Heads ``[B, H, N, D]`` as a picture ``[B, H * D, rows, columns]``."""
        return join(v).mT.unflatten(-1, sides(v.shape[2], self.rows))

    def heads_of(self, picture: Tensor) -> Tensor:
        """The way back."""
        return split(picture.flatten(2).mT, self.heads)
