"""SnapKV: the end of a prompt votes for the keys of the prompt that each head keeps.

    votes[h, k]  = sum over the last `window` queries of softmax(q . k / sqrt(D))      keys before the window
    pooled[h, k] = avg_pool1d(votes, kernel, stride 1, zero padding)                   clusters, not single keys
    kept[h]      = the top (budget - window) of pooled[h], and the window itself

What is generated afterwards is kept.

Paper: SnapKV: LLM Knows What You are Looking for Before Generation, arXiv:2404.14469
Code: https://github.com/FasterDecoding/SnapKV (snapkv/monkeypatch/snapkv_utils.py: window 32, kernel 5, avgpool)

Differs: with grouped heads the official code repeats keys and values for every query head before it selects, and so
stores them several times; here the query heads of a group add their votes and share what they keep. A prompt in
chunks is compressed after every chunk, by that chunk's end. A prompt shorter than the window votes with all of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...cache import Look, Policy
from ...core.errors import SpecError
from ...core.stats import Rows, Stat
from ..base import CacheSystem, ClaimNumbers

BYTES = 4  # of English prose in a token
SPEEDUP, SMALLER = 3.6, 8.2  # the paper's, at a prompt of 16k tokens
CAPACITY = 249  # an 8.2th of 2048: like the official code's max_capacity_prompt the same for every length
PROMPT, BUDGET = 16384, 1920  # an 8.2th of the bytes, with what is known of each token and what is generated


class SnapKV(CacheSystem):
    """Settings: ``window`` queries that vote; ``kernel``, the width of the pooling (odd); ``pooling``: avg or max."""

    slug = "snapkv"
    title = "SnapKV"
    paper = "https://arxiv.org/abs/2404.14469"
    code = "https://github.com/FasterDecoding/SnapKV"

    def __init__(self, window: int = 32, kernel: int = 5, pooling: str = "avg"):
        if pooling not in ("avg", "max") or kernel % 2 == 0 or window < 1:
            raise SpecError(
                "SnapKV: expected window >= 1, an odd kernel, and pooling 'avg' or 'max'; got"
                f" window={window}, kernel={kernel}, pooling={pooling!r}"
            )
        self.window, self.kernel, self.pooling = window, kernel, pooling

    def policy(self) -> Policy:
        """Votes of the prompt's last queries."""
        return Votes(self)

    def claim(self) -> ClaimNumbers:
        """Decoding after a prompt of 16k tokens on a random Llama, and needles on the embedded model.

        That model reads bytes, about four to a token of the paper's models, and the pooling is so much wider.
        """
        from ...study.caching import decoding, needles

        speed = decoding(lambda: (self.policy(), BUDGET), prompt=PROMPT)
        wide = SnapKV(self.window, BYTES * self.kernel + 1, self.pooling)
        found = needles(lambda length: (wide.policy(), CAPACITY))
        tight = needles(lambda length: (wide.policy(), max(self.window + 1, length // 8)))["kept"]
        return ClaimNumbers.decide(
            speed | found | {"kept_of_an_eighth": tight},
            f"After {PROMPT} tokens a step takes 1/{speed['speedup']:.1f} of the time and the cache holds"
            f" 1/{speed['smaller']:.1f} of the bytes; needles in 512 to 2048 bytes answered with {CAPACITY} kept:"
            f" {found['kept']:.0%}, with an eighth of each text: {tight:.0%}, with all: {found['dense']:.0%}.",
            speed=speed["speedup"] >= SPEEDUP,
            memory=speed["smaller"] >= SMALLER,
            needle_kept=found["kept"] >= found["dense"] - 0.05,
        )


class Votes(Policy):
    """The policy of :class:`SnapKV`."""

    while_decoding = False

    def __init__(self, setting: SnapKV):
        self.setting = setting

    def stats(self, queries: int) -> Sequence[Stat]:
        """The exact weights of the voting queries; a single step does not vote."""
        return (Rows(range(-min(self.setting.window, queries), 0)),) if queries > 1 else ()

    def score(self, look: Look) -> Tensor:
        """Pooled votes; those that came with a single step stay unscored."""
        if look.new == 1:
            return look.scores
        votes = look.by_key_head(look.seen["rows"].sum(2)).masked_fill(self.stays(look), 0)
        kernel = self.setting.kernel
        pool = F.avg_pool1d if self.setting.pooling == "avg" else F.max_pool1d
        return pool(votes, kernel, stride=1, padding=kernel // 2)

    def stays(self, look: Look) -> Tensor:
        """The window."""
        return look.last(self.setting.window) & torch.ones_like(look.positions, dtype=torch.bool)
