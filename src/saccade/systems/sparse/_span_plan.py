"""How MoA plans spans: what hiding a block would do to the loss, and the rules within a density that hide the least."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

from ...core.attend import weights
from ...core.errors import SpecError
from ...core.spec import Attention
from ...hosts.acts import Call
from ...hosts.handles import listen
from ...worlds.text import Example
from .moa_spans import Rule, cost, window


def profile(model: nn.Module, pages: Sequence[Example], block: int) -> Tensor:
    """Mean influence on the loss of the answers, summed in blocks: ``[layers, H, N // block, N // block]``."""
    total: Tensor | None = None
    for page in pages:
        calls: list[Call] = []
        with torch.enable_grad(), listen(model, calls.append):
            logits = model(page.tokens[None], use_cache=False).logits[0]
        asked = torch.cat([torch.arange(a.start, a.stop) for a in page.answers])
        loss = cross_entropy(logits[asked - 1], page.tokens[asked])
        gradients = torch.autograd.grad(loss, [call.out for call in calls])
        found = torch.stack([influence(call, up, block) for call, up in zip(calls, gradients, strict=True)])
        total = found if total is None else total + found
    if total is None:
        raise SpecError("profile: expected pages with answers; got none")
    return total / len(pages)


@torch.no_grad()
def influence(call: Call, up: Tensor, block: int) -> Tensor:
    """Influence of one call of one text, given the gradient of its output, in blocks ``[H, n, n]``."""
    a = weights(call.q, call.k, call.frame.combine(Attention()), offset=call.frame.offset)[0]
    g = up[0] @ call.v[0].repeat_interleave(call.q.shape[1] // call.k.shape[1], 0).mT
    alone = a * g
    found = a * (g - alone.sum(-1, keepdim=True)) / (torch.finfo(a.dtype).eps + 1 - a)
    found[:, 0] = alone[:, 0]  # the first query has no other key
    return avg_pool2d(found.abs(), block) * block**2


def search(
    maps: Sequence[Tensor], lengths: Sequence[int], longest: int, density: float, block: int, betas: int = 9
) -> list[list[Rule]]:
    """The rules that hide the least influence, by layer and head.

    Args:
        maps: influence ``[layers, H, n, n]`` in blocks, one for each of ``lengths``.
        longest: the length up to which, from the greatest of ``lengths`` on, the mean span keeps to ``density``:
            between the two the cost of every rule is linear but for rounding, so they bound what lies between them.
    """
    low, high = min(lengths), max(lengths)
    rules = [(float(a), i / (betas - 1)) for a in range(-low, high + 1, high // 8) for i in range(betas)]
    rules = [(a, b) for a, b in rules if a + b * low > 0 and a + b * high <= high and a + b * longest <= longest]
    hidden = [[_hidden(m, window(r, n, block)) for r in rules] for m, n in zip(maps, lengths, strict=True)]
    losses = sum((torch.stack(row, -1) for row in hidden), torch.zeros(()))
    count = losses[..., 0].numel()
    costs = [(cost(r, high, block), cost(r, longest, block)) for r in rules]
    bounds = [int(density * count * (n // block)) for n in (high, longest)]
    chosen = knapsack(losses.flatten(0, 1), costs, (bounds[0], bounds[1]))
    layers, heads = losses.shape[:2]
    return [[rules[chosen[layer * heads + head]] for head in range(heads)] for layer in range(layers)]


def _hidden(influence: Tensor, count: int) -> Tensor:
    """Influence ``[layers, H]`` of the blocks out of a window of ``count`` blocks and of the sinks."""
    return influence.tril(-count)[..., 1:].sum((-2, -1))


def knapsack(losses: Tensor, costs: Sequence[tuple[int, int]], bounds: tuple[int, int]) -> list[int]:
    """One option for each row of ``losses`` ``[R, options]`` with the least sum, costs within both bounds.

    Raises:
        SpecError: nothing keeps to the bounds.
    """
    best = torch.full((bounds[0] + 1, bounds[1] + 1), torch.inf, dtype=torch.float64)
    best[0, 0] = 0
    picked = []
    for row in losses.double().tolist():
        after, pick = torch.full_like(best, torch.inf), torch.zeros(best.shape, dtype=torch.long)
        for option, ((x, y), loss) in enumerate(zip(costs, row, strict=True)):
            if x > bounds[0] or y > bounds[1]:
                continue
            moved = best[: best.shape[0] - x, : best.shape[1] - y] + loss
            better = moved < after[x:, y:]
            after[x:, y:] = torch.where(better, moved, after[x:, y:])
            pick[x:, y:] = pick[x:, y:].masked_fill(better, option)
        best = after
        picked.append(pick)
    if not best.isfinite().any():
        raise SpecError(f"no choice keeps to the bounds {bounds}: raise the density")
    x, y = divmod(int(best.argmin()), best.shape[1])
    chosen = []
    for pick in reversed(picked):
        chosen.append(int(pick[x, y]))
        x, y = x - costs[chosen[-1]][0], y - costs[chosen[-1]][1]
    return chosen[::-1]
