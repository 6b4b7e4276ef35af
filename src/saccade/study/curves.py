"""Position curves: how well a language model answers, by the depth at which the evidence lies."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..systems.base import ClaimNumbers
from ..worlds import recall

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SURE = 0.95  # share of the resamplings in which a difference of two position curves must show

Curve = tuple[Tensor, Tensor]
"""Losses and right answers, as :func:`position_curve` gives them."""

Run = Callable[[Tensor, int], Tensor]
"""Tokens ``[N]`` and a number of positions to logits ``[that many last ones, V]``."""


def reuse(model: Any) -> Run:
    """Run a model on texts that begin alike and keep the cache of the beginning they share."""
    from transformers import DynamicCache

    cache, held = DynamicCache(), torch.empty(0, dtype=torch.int64)

    def run(tokens: Tensor, keep: int) -> Tensor:
        nonlocal held
        most = min(len(held), len(tokens) - keep)
        same = int((held[:most] == tokens[:most]).long().cumprod(0).sum())
        if same < len(held):
            cache.crop(same - len(held))
        held = tokens
        return model(input_ids=tokens[None, same:], past_key_values=cache, logits_to_keep=keep).logits[0]

    return run


@torch.no_grad()
def position_curve(run: Run, length: int, count: int, seed: int) -> Curve:
    """Loss (nats per byte) of answers whose evidence lies at each of ``DEPTHS``, and whether all bytes were right.

    Both are ``[depths, count]``; the same ``count`` texts of key-value pairs are asked at every depth.
    """
    loss, right = torch.zeros(2, len(DEPTHS), count)
    asked = zip(*(islice(recall.lookup(length, seed, depth=depth), count) for depth in DEPTHS), strict=True)
    for i, same_text in enumerate(asked):
        for d, example in enumerate(same_text):
            answer = example.answers[0]
            wanted = example.tokens[answer.start : answer.stop]
            logits = run(example.tokens[: answer.stop - 1], len(wanted))
            loss[d, i] = cross_entropy(logits, wanted)
            right[d, i] = (logits.argmax(-1) == wanted).all()
    return loss, right


def compare_curves(before: Tensor, after: Tensor) -> tuple[dict[str, Any], float, float]:
    """Numbers of two position curves ``[depths, count]``, and how sure it is that the second is flatter, and lower.

    Sure: the share of 2000 resamplings of the texts in which it is so. Flatter: less between the greatest mean loss of
    a depth and the least.
    """
    count = before.shape[1]
    drawn = torch.randint(count, (2001, count), generator=torch.Generator().manual_seed(0))
    drawn[0] = torch.arange(count)
    curves = {"before": before[:, drawn].mean(-1), "after": after[:, drawn].mean(-1)}
    spread = {name: c.amax(0) - c.amin(0) for name, c in curves.items()}
    mean = {name: c.mean(0) for name, c in curves.items()}
    flatter = float((spread["after"] < spread["before"])[1:].float().mean())
    lower = float((mean["after"] < mean["before"])[1:].float().mean())
    numbers: dict[str, Any] = {"depths": list(DEPTHS)}
    for name in curves:
        numbers[f"loss_{name}"] = rounded(curves[name][:, :1])
        numbers[f"spread_{name}"] = round(float(spread[name][0]), 4)
        numbers[f"mean_{name}"] = round(float(mean[name][0]), 4)
    return numbers | {"sure_flatter": round(flatter, 3), "sure_lower": round(lower, 3)}, flatter, lower


def rounded(values: Tensor) -> list[float]:
    """Means over the last dimension, to four places."""
    return [round(x, 4) for x in values.mean(-1).tolist()]


def judge(before: Curve, after: Curve, without: str, what: str) -> ClaimNumbers:
    """Does a method flatten the curve of losses, and lower it? ``without`` and ``what`` name the two in words."""
    numbers, sure_flatter, sure_lower = compare_curves(before[0], after[0])
    return ClaimNumbers.decide(
        numbers | {"accuracy_before": rounded(before[1]), "accuracy_after": rounded(after[1])},
        f"{what} the loss of an answer varies by {numbers['spread_after']:.3f} nats per byte with the depth of its"
        f" evidence ({without} {numbers['spread_before']:.3f}); its mean is {numbers['mean_after']:.3f}"
        f" ({without} {numbers['mean_before']:.3f}).",
        flatter=sure_flatter > SURE,
        lower_on_average=sure_lower > SURE,
    )
