"""PowerAttention: each block of queries sees blocks at power-of-two distances, so that d layers reach 2**d blocks.

    away        = q // block - k // block
    visible     = (k <= q) and (away < window  or  away & (away - 1) == 0  or  k < block)

Any distance below 2**d is a sum of at most d powers of two, so it takes at most d layers to get there, while a query
sees no more than ``window + log2(blocks) + 1`` blocks. A sliding window of the same cost reaches d times its width.

Paper: PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse Attention, arXiv:2503.03588
Code: https://github.com/w568w/PowerAttention (could not be read here; this is the paper's Algorithm 1)

Differs: nothing in the pattern. Blocks are 64 tokens by default and not the paper's 256, which it fits to a GPU and to
contexts of 32K; its window of 5 blocks and its one block of sinks are kept. The claim trains models of three layers
from scratch on pass keys of one token; the paper goes on training a model of 7B, and mixes in layers of full attention.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...core import masks
from ...core.attend import attention
from ...core.errors import SpecError
from ...core.masks import Mask, Span
from ...core.spec import Attention
from ...core.tile import At
from ..base import ClaimNumbers, Promises, System
from .block_masks import NearBlocks, apart, apart_extent, codes

MARGIN = 0.05  # the paper's least lead over other static patterns
COMPARABLE = 1.5  # time over that of the window with as many keys


class PowerBlocks(Mask):
    """Keys whose block of ``size`` tokens lies less than ``window``, or a power of two, blocks before the query's.

    Raises:
        SpecError: a size or a window below 1.
    """

    def __init__(self, size: int, window: int):
        super().__init__()
        if size < 1 or window < 1:
            raise SpecError(f"PowerBlocks needs a size and a window of at least 1; got {size} and {window}")
        self.size, self.window = size, window

    def visible(self, at: At) -> Tensor:
        away = apart(at, self.size)
        return (away < self.window) | (away & (away - 1) == 0)

    def blocks(self, span: Span) -> Tensor:
        lo, hi = apart_extent(span, self.size)
        near = (hi.clamp(max=self.window - 1) - lo + 1).clamp(min=0)
        seen = near + (_powers(hi) - _powers(lo.clamp(min=self.window) - 1)).clamp(min=0)
        return codes(seen == 0, seen == hi - lo + 1)


def _powers(x: Tensor) -> Tensor:
    """How many of 1, 2, 4, 8, ... are at most ``x``."""
    return torch.frexp(x.clamp(min=0).double())[1]


class PowerAttention(System):
    """Settings: ``block``, tokens of a block; ``window``, blocks of the local window."""

    slug = "powerattention"
    title = "PowerAttention (power-of-two offsets)"
    paper = "https://arxiv.org/abs/2503.03588"
    code = "https://github.com/w568w/PowerAttention"
    promises = Promises(exponent=1.5, unit_rows=True)

    def __init__(self, block: int = 64, window: int = 5):
        self.block, self.window = block, window

    def build(self, heads: int) -> Attention:
        """Window, powers and sinks, causal. Raises SpecError for sizes below 1."""
        seen = PowerBlocks(self.block, self.window) | masks.Sinks(self.block)
        return Attention(mask=masks.Causal() & seen)

    def claim(self) -> ClaimNumbers:
        """Reach of d layers, counted; small models taught pass keys with this and with a window; time at 16384."""
        from ...study import passkeys
        from ...study.claims import interleaved

        n, block = passkeys.LENGTH, 4
        ours = PowerAttention(block, 2).build(2)  # on 32 blocks: 0, 1, 2, 4, 8, 16 and the sinks
        window = _window(block, 6)
        cost = [float(spec.mask.visible(_whole(n)).double().sum(-1).mean()) for spec in (ours, window)]
        alone = reach(masks.Causal() & PowerBlocks(block, 1), n, 5)
        away = apart(_whole(n), block)[0, 0]
        past = masks.Causal().visible(_whole(n))[0, 0]
        complete = all(bool(seen[past & (away < 2**d)].all()) for d, seen in enumerate(alone, 1))
        numbers: dict[str, object] = {"keys": round(cost[0], 2), "keys_window": round(cost[1], 2)}
        right = {}
        for name, spec in (("power", ours), ("window", window)):
            seen = reach(spec.mask, n, 3)
            found, at = passkeys.found(passkeys.teach(spec, 2))
            inside = seen[-1, -1][at]
            right[name] = float(found.mean())
            numbers |= {
                f"reached_{name}": [round(float(x[-1].double().mean()), 3) for x in seen],
                f"accuracy_{name}": round(right[name], 3),
                f"accuracy_in_reach_{name}": round(float(found[inside].mean()), 3),
                f"accuracy_beyond_{name}": round(float(found[~inside].mean()), 3),
            }
        q, k, v = torch.randn(3, 1, 2, 16384, 64, generator=torch.Generator().manual_seed(0)).unbind(0)
        run = partial(attention, q, k, v)
        programs = {
            "power": PowerAttention(256).build(2), "window": _window(256, 9), "dense": Attention(mask=masks.Causal())
        }  # fmt: skip
        times = interleaved({name: partial(run, spec) for name, spec in programs.items()}, 3)
        slower, faster = times.ratio("power", "window"), times.ratio("dense", "power")
        return ClaimNumbers.decide(
            numbers | {"time_over_window": round(slower, 3), "speedup": round(faster, 3)},
            f"In d layers of the pattern alone a query reaches every block less than 2**d away (d to 5). Models of 3"
            f" layers find {right['power']:.0%} of the pass keys, {right['window']:.0%} with a window of no fewer keys."
            f" At 16384 tokens in blocks of 256 the pattern takes {slower:.2f} times as long as the paper's window and"
            f" is {faster:.2f} times as fast as dense attention.",
            reach_is_complete=complete,
            equal_cost=cost[0] <= cost[1],
            more_pass_keys=right["power"] - right["window"] >= MARGIN,
            comparable_time=slower <= COMPARABLE,
            faster_than_dense=faster > 1,
        )


def _window(block: int, count: int) -> Attention:
    """The paper's baseline: a local window of ``count`` blocks, and one block of sinks."""
    return Attention(mask=masks.Causal() & (NearBlocks(block, count) | masks.Sinks(block)))


def _whole(n: int) -> At:
    return At.everywhere(1, 1, n, n, 0, False, torch.device("cpu"))


def reach(mask: Mask, n: int, layers: int) -> Tensor:
    """Which keys can tell a query something through 1, 2, ... layers, bool ``[layers, n, n]``."""
    step = mask.visible(_whole(n)).expand(1, 1, n, n)[0, 0].float()
    found = [step]
    for _ in range(layers - 1):
        found.append((step @ found[-1]).clamp(max=1))
    return torch.stack(found) > 0
