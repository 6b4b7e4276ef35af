"""Attention Buckets: the model reads its context in several streams, each with another RoPE base, and the streams vote.

    logits[j]  = the model's with rotary frequencies  inv_freq[i] * factors[j] ** (-2 i / d)
    weights    = softmax over j of max over the vocabulary of logits[j]
    logits     = sum over j of weights[j] * logits[j]

With one base attention falls and rises with distance, and what lies in a trough is overlooked. Another base has its
troughs elsewhere, and the stream that sees the evidence is the most confident one. The streams are rows of one batch.

Paper: Fortify the Shortest Stave in Attention: Enhancing Context Awareness of Large Language Models for Effective
    Tool Use, arXiv:2312.04455
Code: https://github.com/AlibabaResearch/DAMO-ConvAI (attention-buckets/modeling_llama.py: LlamaForCausalLM.forward,
    with set_base_mean; attention-buckets/inference/config.py)

Differs: bases are multiples of the model's own, ``base * factor``, which scales any model's frequencies as the
official bases (10000, 17500, 18000, 19000, 20000, 25000) scale those of a Llama trained with 10000. The search that
found these (peaks over troughs of ``sum cos``, basic.py) is not repeated. The paper's figure sums
distributions, the official code logits: so does this one. It fuses the last position of one text; here every
position of a batch is fused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import SpecError, Unsupported
from ..base import ClaimNumbers, MethodSystem

GIVEN = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")


class AttentionBuckets(MethodSystem):
    """Settings: ``factors`` of the model's RoPE base, one stream each."""

    slug = "attention-buckets"
    title = "Attention Buckets (several RoPE bases, fused by confidence)"
    paper = "https://arxiv.org/abs/2312.04455"
    code = "https://github.com/AlibabaResearch/DAMO-ConvAI/tree/main/attention-buckets"

    def __init__(self, factors: Sequence[float] = (1.0, 1.75, 1.8, 1.9, 2.0, 2.5)):
        self.factors = factors

    @contextmanager
    def apply(self, model: Any) -> Iterator[None]:
        """Run all streams and fuse their logits until the context is left. The cache holds ``factors * batch`` rows.

        Greedy decoding and sampling work; beam search reorders rows of the cache and does not.

        Raises:
            SpecError: there is no factor, or one that is not positive.
            Unsupported: the model has no rotary embedding of fixed frequencies.
        """
        if not self.factors or min(self.factors) <= 0:
            raise SpecError(f"AttentionBuckets: expected at least one factor, all above 0; got {self.factors}")
        rotary = [m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]
        if not rotary or any(getattr(m, "rope_type", "default") in ("dynamic", "longrope") for m in rotary):
            raise Unsupported(f"{type(model).__name__} has no rotary embedding of fixed frequencies to scale")
        streams = len(self.factors)

        def multiply(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            """Every text once per stream: row ``j * batch + b`` is text b of stream j."""
            if args:
                raise SpecError("while several streams run, give the model its inputs by name")
            there = {name: given[name] for name in GIVEN if given.get(name) is not None}
            batch = len(there["input_ids"] if "input_ids" in there else there["inputs_embeds"])
            many = {n: x.expand(batch, *x.shape[1:]).repeat(streams, *[1] * (x.ndim - 1)) for n, x in there.items()}
            return args, given | many

        def turn(module: Any, args: tuple[Any, ...], given: dict[str, Any], found: Any) -> tuple[Tensor, Tensor]:
            """The rotary module's cosines and sines, for each stream with its own frequencies."""
            own: Tensor = module.inv_freq
            share = torch.arange(len(own), device=own.device) / len(own)
            x, positions = args[0], given["position_ids"] if "position_ids" in given else args[1]
            batch, parts = len(x) // streams, []
            try:
                for j, factor in enumerate(self.factors):
                    module.inv_freq = own * factor**-share
                    at = positions if len(positions) == 1 else positions[j * batch : (j + 1) * batch]
                    parts.append([turned.expand(batch, -1, -1) for turned in module.forward(x, at)])
            finally:
                module.inv_freq = own
            cos, sin = (torch.cat(turned) for turned in zip(*parts, strict=True))
            return cos, sin

        with ExitStack() as stack:
            stack.callback(model.base_model.register_forward_pre_hook(multiply, with_kwargs=True).remove)
            for module in rotary:
                stack.callback(module.register_forward_hook(turn, with_kwargs=True).remove)
            vote = model.get_output_embeddings().register_forward_hook(
                lambda module, args, logits: fuse(logits.unflatten(0, (streams, -1)))
            )
            stack.callback(vote.remove)
            yield

    def claim(self) -> ClaimNumbers:
        """Losses by the depth of the evidence, with the streams and without, on 1024 tokens of key-value pairs."""
        from ...study import curves, probes

        model = probes.embedded()
        before = curves.position_curve(curves.reuse(model), 1024, 20, seed=1)
        with self.apply(model):
            after = curves.position_curve(curves.reuse(model), 1024, 20, seed=1)
        return curves.judge(before, after, "one stream", f"With {len(self.factors)} streams")


def fuse(logits: Tensor) -> Tensor:
    """Logits ``[streams, ..., V]``, weighted by the softmax over the streams of their greatest: ``[..., V]``."""
    weights = logits.amax(-1).float().softmax(0).to(logits.dtype)
    return (weights[..., None] * logits).sum(0)
