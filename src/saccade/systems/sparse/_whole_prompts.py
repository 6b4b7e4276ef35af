"""Another function in place of a model's attention, for whole prompts alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ...hosts.replaced import replaced


@contextmanager
def on_whole_prompts(
    model: Any, make: Callable[[Any, Tensor], Callable[..., Tensor]], least: int = 1
) -> Iterator[None]:  # fmt: skip
    """Attention of whole prompts is ``attend(q, k, v, scale)``, until the context is left.

    Calls with padding, with a cache that is not empty, or of fewer than ``least`` tokens run exact.

    Args:
        model: of transformers.
        make: from a layer's module and its first queries to its ``attend``, which gets ``[B, H, N, D]`` and twice
            ``[B, Hkv, N, D]`` and returns ``[B, H, N, D]``.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    made: dict[int, Callable[..., Tensor]] = {}

    def whole_or_exact(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **given: Any) -> tuple[Tensor, Any]:
        if mask is not None or q.shape[2] != k.shape[2] or q.shape[2] < least:
            return sdpa_attention_forward(module, q, k, v, mask, **given)  # type: ignore[return-value]
        if id(module) not in made:
            made[id(module)] = make(module, q)
        return made[id(module)](q, k, v, given.get("scaling")).transpose(1, 2).contiguous(), None

    with replaced(model, whole_or_exact):
        yield
