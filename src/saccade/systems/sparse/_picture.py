"""A narrow picture of a causal attention matrix: the network that draws it, and which keys its pixels stand for.

Every row has ``length`` pixels; the keys that its query sees, however many, are stretched over them. Paper, code and
equations are in :mod:`.sea`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import SpecError
from ...core.normalizers import HIDDEN
from ._features import linear, orthogonal
from ._vertical_slash import largest

SHRINK, SPLITS = 4, 2  # the picture is drawn this much narrower, in so many channels per head
EDGE = 1e-4  # of a pixel: a key on the edge of two belongs to the lower
ROWS = 128  # queries whose keys are listed at a time


class Estimator(nn.Module):
    """The network of one layer: ``heads`` of ``width``; the other arguments are those of :class:`.sea.Sea`."""

    projection: Tensor

    def __init__(self, heads: int, width: int, keep: int, length: int, context: int, narrow: int, seed: int):
        super().__init__()
        self.heads, self.keep, self.length, inner = heads, keep, length, SPLITS * heads
        features = int(width * math.log(width) / narrow)
        self.register_buffer("projection", orthogonal(features, width, torch.Generator().manual_seed(seed)))
        self.place = nn.Parameter(torch.randn(context, width))
        self.state = nn.Sequential(nn.Linear(3 * width, 2 * width), nn.LayerNorm(2 * width), nn.GELU())
        self.row = nn.Linear(2 * width, length // SHRINK * SPLITS)
        self.before, self.after = nn.LayerNorm(length // SHRINK), nn.LayerNorm(length)
        self.convolutions = nn.ModuleList(nn.Conv2d(inner, inner, 3, dilation=2) for _ in range(2))
        self.merge = nn.Conv2d(inner, heads, 1, padding=(0, 1))
        self.scales = nn.Linear(2 * width, 2)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The picture's scores ``[B, H, N, length]``, and the shares s and a ``[B, H, N, 2]``.

        Args:
            q: queries that carry the scale of the scores ``[B, H, N, D]``; k and v as large.

        Raises:
            SpecError: the text is longer than ``context``.
        """
        n = q.shape[2]
        if n > len(self.place):
            raise SpecError(f"SEA: {n} tokens are more than its context of {len(self.place)}")
        phi_q, phi_k = (F.relu(x * x.shape[-1] ** -0.25 @ self.projection.mT) + 1e-3 for x in (q, k))
        seen = linear(phi_q, phi_k, torch.cat([self.place[:n].expand_as(v), v, torch.ones_like(v[..., :1])], -1), True)
        state = self.state(torch.cat([seen[..., :-1] / (seen[..., -1:] + 1e-6 * phi_q.sum(-1, keepdim=True)), v], -1))
        x = self.row(state).unflatten(-1, (SPLITS, -1)).transpose(2, 3).flatten(1, 2)
        x = self.before(x)
        for convolution in self.convolutions:
            x = F.relu(convolution(F.pad(x, (2, 2, 4, 0))))  # rows above alone: the picture is causal
        x = self.merge(x.repeat_interleave(SHRINK, -1))
        x = F.interpolate(x, (n, self.length), mode="area")
        return self.after(x), self.scales(state).sigmoid()

    def bright(self, scores: Tensor) -> Tensor:
        """Which pixels are read, bool ``[B, H, N, length]``: a row's heads share what there is to keep."""
        flat = scores.detach().softmax(-1).transpose(1, 2).flatten(2)
        visible = torch.arange(1, scores.shape[2] + 1, device=scores.device)[:, None]
        count = (self.heads * self.keep * self.length / visible).round().clamp(min=1)
        return largest(flat, count).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys(self, bright: Tensor) -> Tensor:
        """The keys of those pixels ``[B, H, N, s]``, -1 where a query has fewer."""
        found = []
        for first in range(0, bright.shape[2], ROWS):
            part = bright[:, :, first : first + ROWS]
            most = max(1, int(part.sum(-1).max()))
            on, pixel = part.to(torch.int8).topk(most, -1)
            visible = torch.arange(first + 1, first + 1 + part.shape[2], device=bright.device)[:, None]
            wide = visible.double() / self.length
            start, stop = (((pixel + right + EDGE) * wide - 0.5).ceil().long().clamp(min=0) for right in (0, 1))
            stop = torch.where(pixel + 1 < self.length, stop, visible).minimum(visible)
            start = torch.where(pixel > 0, start, 0)
            key = start[..., None] + torch.arange(max(1, int((stop - start).max())), device=bright.device)
            key = key.masked_fill((key >= stop[..., None]) | (on == 0)[..., None], -1).flatten(-2)
            found.append(key.sort(-1, descending=True).values[..., : max(1, int((key >= 0).sum(-1).max()))])
        size = max(x.shape[-1] for x in found)
        return torch.cat([F.pad(x, (0, size - x.shape[-1]), value=-1) for x in found], 2)

    def stretch(self, picture: Tensor, hidden: float | bool) -> Tensor:
        """A picture ``[B, H, N, length]`` over the keys ``[B, H, N, N]``, ``hidden`` beyond the query: for small N."""
        n = picture.shape[2]
        row, key = torch.arange(n, device=picture.device)[:, None], torch.arange(n, device=picture.device)
        pixel = ((key + 0.5) / (row + 1).double() * self.length - EDGE).floor().long().clamp(0, self.length - 1)
        return picture.gather(-1, pixel.expand(*picture.shape[:2], n, n)).masked_fill(key > row, hidden)

    def map(self, scores: Tensor) -> Tensor:
        """The estimated attention matrix ``[B, H, N, N]``, whole: for small N, to look at and to distill into."""
        return self.stretch(scores, HIDDEN).softmax(-1)
