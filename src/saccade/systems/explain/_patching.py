"""Path patching: how much of what a head says reaches the answer, or another head's query, by one path."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ._heads import Heads, heads, pairs, projections
from ._prompts import Prompts

TOP = 4  # heads of a stage, and heads that repair


@torch.no_grad()
def path_patching(model: Any, prompts: Prompts, receivers: Heads = ()) -> Tensor:
    """The effect of every head ``[layers, H]`` on the logits, by way of the receivers' queries if there are any."""
    from transformers import DynamicCache

    (clean, before), (other, after) = (_last(model, tokens, prompts) for tokens in (prompts.tokens, prompts.other))
    cache = DynamicCache(config=model.config)
    model(prompts.tokens[:, :-1], past_key_values=cache, logits_to_keep=1)

    def run() -> float:
        logits = model(prompts.tokens[:, -1:], past_key_values=cache).logits[:, -1]
        cache.crop(-1)
        return prompts.metric(logits)

    effects = torch.zeros(len(clean), clean[0].shape[-2])
    for layer, head in set(pairs(effects)) - set(receivers):
        sent = dict(clean)
        sent[layer] = clean[layer].clone()
        sent[layer][:, :, head] = other[layer][:, :, head]
        queries: dict[int, Tensor] = {}
        with heads(model, lambda at, z, sent=sent: sent[at]), _queries(model, receivers, queries):  # type: ignore[misc]
            metric = run()
        if receivers:
            with _queries(model, receivers, queries):
                metric = run()
        effects[layer, head] = (metric - before) / (after - before)
    return effects


def _last(model: Any, tokens: Tensor, prompts: Prompts) -> tuple[dict[int, Tensor], float]:
    """What the heads put out at the last token, by layer ``[B, 1, H, D]``, and the metric."""
    seen: dict[int, Tensor] = {}
    with heads(model, lambda layer, z: seen.update({layer: z[:, -1:]})):
        return seen, prompts.metric(model(tokens, use_cache=False, logits_to_keep=1).logits[:, -1])


def _queries(model: nn.Module, receivers: Heads, queries: dict[int, Tensor]) -> ExitStack:
    """Fill ``queries`` with the layers' ``[B, 1, H, D]``; where they are given, let the receivers ask them."""

    def hook(layer: int, count: int, module: nn.Module, args: Any, found: Tensor) -> Tensor | None:
        q = found.unflatten(-1, (count, -1)).clone()
        if layer not in queries:
            queries[layer] = q
            return None
        mine = [head for at, head in receivers if at == layer]
        q[:, :, mine] = queries[layer][:, :, mine]
        return q.flatten(-2)

    with ExitStack() as stack:
        for site, _ in projections(model, sorted({layer for layer, _ in receivers})) if receivers else ():
            projection: Any = site.module.q_proj
            stack.callback(projection.register_forward_hook(partial(hook, site.layer, site.heads)).remove)
        return stack.pop_all()


def circuit(model: Any, prompts: Prompts) -> list[tuple[int, int]]:
    """The heads with the greatest effect, either way, on the logits, and then on these heads' queries."""
    first = _strongest(path_patching(model, prompts))
    return first + _strongest(path_patching(model, prompts, first))


def _strongest(effects: Tensor) -> list[tuple[int, int]]:
    return sorted(pairs(effects), key=lambda pair: -abs(float(effects[pair])))[:TOP]
