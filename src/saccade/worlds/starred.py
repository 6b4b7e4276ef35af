"""Texts in blocks, with a pass key in each, of which the one that stands in a block with a star is asked for.

    f f k f f | f k f * f | f f f f k | k f f f ?        which key stands in the block of the star?

f is one of FILLER tokens, k one of KEYS; a bar is the token MARK at the end of a block, such as landmark attention
needs. As every block holds a key, a mean over the blocks does not tell the one that is asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

FILLER, KEYS = 32, 8  # different tokens of filler, and different pass keys
STAR, ASK, MARK = range(FILLER + KEYS, FILLER + KEYS + 3)
VOCABULARY = MARK + 1


def starred(count: int, source: torch.Generator, blocks: int, length: int) -> tuple[Tensor, Tensor]:
    """Texts of so many blocks of ``length`` tokens and a mark, the last without, and the keys they ask for at the end.

    Returns:
        int64 ``[count, blocks * (length + 1) - 1]`` and ``[count]``.
    """

    def draw(*given: Any) -> Tensor:
        return torch.randint(*given, generator=source)

    text, page = draw(FILLER, (count, blocks, length)), torch.arange(count)
    key, asked = draw(FILLER, FILLER + KEYS, (count, blocks)), draw(blocks, (count,))
    spot = torch.rand(count, blocks, length - 1, generator=source).argsort(-1)
    text.scatter_(2, spot[..., :1], key[..., None])
    text[page, asked, spot[page, asked, 1]] = STAR
    text[:, -1, -1] = ASK
    return pad(text, (0, 1), value=MARK).flatten(1)[:, :-1], key[page, asked]
