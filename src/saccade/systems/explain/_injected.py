"""Patterns in attention weights: where they hold, and the edit that puts them into heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...core.edits import Edit
from ...core.errors import SpecError
from ...core.tile import At

CONTENT = ("same", "segment")  # patterns that need the tokens


class Injected(Edit):
    """Patterns in the weights of the first heads; ``tokens [B, M]`` are those of the keys, if they are known."""

    needs_visible = True
    tokens: Tensor | None

    def __init__(self, patterns: Sequence[str], copies: int = 1, separators: Sequence[int] = ()):
        super().__init__()
        unknown = [name for name in patterns if name not in CONTENT and not _offset(name)]
        if unknown:
            raise SpecError(f'a pattern is an offset such as "-1" or "+2", "same" or "segment"; got {unknown[0]!r}')
        self.patterns, self.copies, self.separators = tuple(patterns), copies, tuple(separators)
        self.tokens = None

    def forward(self, weights: Tensor, at: At, visible: Tensor | None) -> Tensor:
        edited = weights
        for number, name in enumerate(self.patterns):
            where = pattern(name, at, self.tokens, self.separators)
            if where is None:
                continue
            where = where.expand_as(weights) if visible is None else where & visible
            kept = where.to(weights.dtype) if name not in CONTENT else torch.where(where, weights, 0)
            total = kept.sum(-1, keepdim=True)
            mine = (at.h % len(self.patterns) == number) & (at.h < self.copies * len(self.patterns)) & (total > 0)
            edited = torch.where(mine, kept / total.masked_fill(total == 0, 1), edited)
        return edited


def pattern(name: str, at: At, tokens: Tensor | None, separators: Sequence[int]) -> Tensor | None:
    """Where a pattern holds, bool, broadcasting against a tile; ``None``: it needs tokens, and they are not known."""
    if name not in CONTENT:
        return at.k == at.row + _offset(name)
    if tokens is None:
        return None
    if tokens.shape[1] != at.m:
        raise SpecError(
            f"pattern {name!r}: there are {at.m} keys, and tokens of {tokens.shape[1]}: give the whole text"
        )
    if name == "same":
        return (tokens[at.b, at.row] == tokens[at.b, at.k]) & (at.row != at.k)
    ends = torch.isin(tokens, torch.tensor(list(separators), device=tokens.device)).long()
    segments = ends.cumsum(1) - ends  # a separator belongs to the segment that it ends
    return segments[at.b, at.row] == segments[at.b, at.k]


def _offset(name: str) -> int:
    """Of "-1", "+2"; 0 if it is none."""
    return int(name) if name[:1] in "+-" and name[1:].isdigit() else 0


def follow(model: nn.Module) -> nn.Module:
    """Let the patterns of a model know the tokens, which are its first argument; the model."""

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        for part in module.modules():
            if isinstance(part, Injected):
                part.tokens = args[0]

    model.register_forward_pre_hook(before)
    return model
