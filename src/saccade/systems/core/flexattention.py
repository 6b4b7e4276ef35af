"""FlexAttention: attention variants as two small functions, one of the score and one of what may be seen.

    w[i] = softmax over j with mask_mod(b, h, i, j) of  score_mod(q[i] . k[j] / sqrt(D), b, h, i, j)

Both functions are taken as they are written for ``torch.nn.attention.flex_attention``; where FlexAttention compiles
them into a kernel, here they run on tiles of scores.

Paper: Flex Attention: A Programming Model for Generating Optimized Attention Kernels, arXiv:2412.05496
Code: https://github.com/pytorch/pytorch (torch/nn/attention/flex_attention.py)

Differs: nothing has to be compiled (``saccade.attention(..., compile=True)`` fuses the score function). Gradients exist
on the CPU. A ``mask_mod`` is evaluated where it is used and not turned into a block mask beforehand; to skip blocks,
use the masks of :mod:`saccade.masks`, which classify whole blocks in closed form. With an ``offset`` given,
``q`` counts from it, so that the same function serves prefill and decoding.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ...core import edits, normalizers, stats
from ...core.attend import attention
from ...core.spec import Attention
from ..base import ClaimNumbers, Promises, System, Unmeasured

ScoreMod = Callable[..., Tensor]  # f(score, b, h, q, k)
MaskMod = Callable[..., Tensor]  # f(b, h, q, k)

LENGTH, HEADS, WIDTH = 2048, 8, 64  # of the claim's speed runs


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The usual ``mask_mod``."""
    return q >= k


class FlexAttention(System):
    """Settings: ``score_mod`` and ``mask_mod``, each a FlexAttention function or ``None``."""

    slug = "flexattention"
    title = "FlexAttention: score and mask as functions"
    paper = "https://arxiv.org/abs/2412.05496"
    code = "https://github.com/pytorch/pytorch/blob/main/torch/nn/attention/flex_attention.py"
    promises = Promises(unit_rows=True, training_free=True, needs_training=False)

    def __init__(self, score_mod: ScoreMod | None = None, mask_mod: MaskMod | None = causal):
        self.score_mod, self.mask_mod = score_mod, mask_mod

    def promised(self) -> Promises:
        """Of a function nobody has read, no more is known than that it is one."""
        known = self.score_mod is None and self.mask_mod in (None, causal)
        return replace(self.promises, causal=self.mask_mod is causal, decodes=known, padding=known)

    def build(self, heads: int) -> Attention:
        """The two functions as they are."""
        return Attention(score=self.score_mod, mask=self.mask_mod)

    def claim(self) -> ClaimNumbers:
        """The published examples against FlexAttention itself; what it refuses; its speed, eager and compiled."""
        if shutil.which("g++") is None and shutil.which("clang++") is None:
            raise Unmeasured("compiling FlexAttention needs a C++ compiler, and there is none")
        gaps = _gaps()
        agree = sum(gap < 1e-12 for gap in gaps.values())
        error = _gradient_error()
        speed = _speed("alibi", None) | _speed("softcap", causal)
        eager, compiled = (
            min(v for k, v in speed.items() if k.startswith(f"{how}_over_ours")) for how in ("eager", "compiled")
        )
        return ClaimNumbers.decide(
            {"examples": len(gaps), "agree": agree, "largest_difference": max(gaps.values())}
            | {"cpu_gradient_error": error}
            | speed,
            f"{agree} of {len(gaps)} published examples run unchanged and agree with FlexAttention to"
            f" {max(gaps.values()):.0e}. On {LENGTH} tokens FlexAttention takes {eager:.1f} times as long eagerly, and"
            f" {compiled:.2f} times as long compiled, as the same functions here (the worse of two programs). A"
            f" program with sigmoid, edit and entropy trains on the CPU, where FlexAttention refuses every gradient.",
            all_examples_agree=agree == len(gaps),
            trains_on_cpu=error < 1e-12,
            faster_than_eager=eager > 1,
            at_or_above_compiled_speed=compiled >= 1,
        )


def _inputs(n: int, heads: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    return list(torch.randn(3, 1, heads, n, width, dtype=dtype, generator=torch.Generator().manual_seed(0)).unbind(0))


def _gaps() -> dict[str, float]:
    """Largest difference to FlexAttention's own (eager) result for every published example, float64."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    from ._published import published

    n, heads = 144, 4
    q, k, v = _inputs(n, heads, 24, torch.float64)
    gaps = {}
    for name, (score_mod, mask_mod) in published(n, heads).items():
        block_mask = None if mask_mod is None else create_block_mask(mask_mod, 1, heads, n, n, device="cpu")
        theirs = flex_attention(q, k, v, score_mod=score_mod, block_mask=block_mask)
        assert isinstance(theirs, Tensor)
        ours = attention(q, k, v, FlexAttention(score_mod, mask_mod).build(heads), backend="band")
        gaps[name] = float((ours - theirs).abs().max())
    return gaps


def _gradient_error() -> float:
    """Tiled against dense gradient, relative, of a program FlexAttention has no words for, on the CPU, float64."""
    q, k, v = (x.requires_grad_() for x in _inputs(200, 2, 24, torch.float64))
    spec = Attention(mask=causal, normalizer=normalizers.Sigmoid(), edits=[edits.Scale(0.5, keys=slice(0, 4))])
    grads = []
    for backend in ("band", "reference"):
        out, seen = attention(q, k, v, spec, stats=[stats.Entropy()], backend=backend)
        loss = out.square().mean() + seen["entropy"].mean()
        grads.append(torch.stack(torch.autograd.grad(loss, [q, k, v])))
    return float((grads[0] - grads[1]).abs().max() / grads[1].abs().max())


def _speed(name: str, mask_mod: MaskMod | None) -> dict[str, float]:
    """How many times as long as ours FlexAttention takes with a published score, compiled (steady state) and eager.

    Ours is the better of with and without ``compile=True``.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    from ...study.claims import interleaved
    from ._published import published

    q, k, v = _inputs(LENGTH, HEADS, WIDTH, torch.float32)
    score_mod = published(LENGTH, HEADS)[name][0]
    block_mask = create_block_mask(mask_mod, 1, HEADS, LENGTH, LENGTH, device="cpu") if mask_mod else None
    ours = partial(attention, q, k, v, FlexAttention(score_mod, mask_mod).build(HEADS), backend="band")
    theirs = {"score_mod": score_mod, "block_mask": block_mask}
    work = {
        "ours": ours,
        "fused": partial(ours, compile=True),
        "compiled": partial(torch.compile(flex_attention), q, k, v, **theirs),
    }
    steady = interleaved(work, rounds=9)
    eager = interleaved({"ours": ours, "eager": partial(flex_attention, q, k, v, **theirs)}, rounds=3)
    return {
        f"compiled_over_ours_{name}": round(max(steady.ratio("compiled", own) for own in ("ours", "fused")), 3),
        f"eager_over_ours_{name}": round(eager.ratio("eager", "ours"), 2),
    }
