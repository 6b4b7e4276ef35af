"""A model from which heads really are gone: the rows and columns of their projections are cut."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...core.errors import SpecError, Unsupported
from ._heads import Heads, projections, refuse_others


@torch.no_grad()
def removed(model: nn.Module, gone: Heads) -> Any:
    """A copy of a transformers model without some heads, which says what it says with these silent.

    Raises:
        SpecError: there is no such head, or none is left of a layer.
        Unsupported: its attention does not consist of ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj``.
    """
    refuse_others(model, gone)
    smaller = copy.deepcopy(model)
    for site, out in projections(smaller):
        module: Any = site.module
        mine = {head for layer, head in gone if layer == site.layer}
        if not mine:
            continue
        if not all(isinstance(getattr(module, f"{x}_proj", None), nn.Linear) for x in "qkv"):
            raise Unsupported(f"{site.path} ({type(module).__name__}) has no q_proj, k_proj and v_proj to cut")
        left = [head for head in range(site.heads) if head not in mine]
        if not left:
            raise SpecError(f"none of the {site.heads} heads of {site.path} would be left")
        size = out.in_features // site.heads
        rep = site.heads // (module.k_proj.out_features // size)
        keys = [head // rep for head in left]
        groups = sorted(set(keys))
        counts = {keys.count(group) for group in groups}
        shared = len(counts) == 1  # every key head that is left has as many query heads
        module.q_proj = _rows(module.q_proj, left, size)
        for name in ("k_proj", "v_proj"):
            setattr(module, name, _rows(getattr(module, name), groups if shared else keys, size))
        module.num_key_value_groups = counts.pop() if shared else 1
        columns = torch.cat([torch.arange(h * size, (h + 1) * size) for h in left]).to(out.weight.device)
        out.weight = nn.Parameter(out.weight[:, columns])
        out.in_features = len(columns)
    return smaller


def _rows(linear: nn.Linear, heads: Sequence[int], size: int) -> nn.Linear:
    """A projection onto some heads alone."""
    rows = torch.cat([torch.arange(h * size, (h + 1) * size) for h in heads]).to(linear.weight.device)
    linear.weight = nn.Parameter(linear.weight[rows])
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias[rows])
    linear.out_features = len(rows)
    return linear
