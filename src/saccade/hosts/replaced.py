"""A model of transformers with another function for attention, and what its layers attend with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

NAME = "saccade_replaced"


class Read(NamedTuple):
    """What a layer attended with: queries ``[B, H, N, D]``, keys and values ``[B, Hkv, N, D]``, scale of the scores."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float


@contextmanager
def replaced(model: Any, attend: Callable[..., tuple[Tensor, Any]]) -> Iterator[None]:
    """Attention is ``attend(module, q, k, v, mask, **given)`` until the context is left; no mask means a whole text."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    before = model.config._attn_implementation
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    try:
        model.set_attn_implementation(NAME)
        yield
    finally:
        model.set_attn_implementation(before)
        for registry in (AttentionInterface, AttentionMaskInterface):
            registry._global_mapping.pop(NAME, None)


@torch.no_grad()
def read(model: Any, tokens: Tensor) -> list[Read]:
    """What each layer attends with as the model reads ``[B, N]``."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    seen: list[Read] = []

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **given: Any) -> Any:
        seen.append(Read(q, k, v, given["scaling"]))
        return sdpa_attention_forward(module, q, k, v, mask, **given)

    with replaced(model, attend):
        model(tokens, use_cache=False, logits_to_keep=1)
    return seen
