"""HyperAttention: what hashing finds is attended to exactly, the rest is estimated from keys drawn at random.

    hash(x)  = g ^ (g >> 1),  g the bits x . planes > 0      queries and keys are sorted by it, each on their own
    near     = attention of each block of sorted queries to the same block of sorted keys
    far      = attention to ``samples`` keys drawn with replacement, those of the own block hidden, times M / samples
    out      = near and far, weighted by the sums of their exponentials
    causal   : both halves by the same rule again, and the second half to the first as above; exact up to ``shortest``

Paper: HyperAttention: Long-context Attention in Near-Linear Time, arXiv:2310.05869
Code: https://github.com/insuhan/hyper-attn (models/attention/hyper_attn.py, angular_lsh.py, utils.py)

This is a function of exact calls of the engine, merged by their log-sum-exp, and not one program: every level of the
causal recursion sorts anew, and a key that is drawn twice counts twice. ``apply`` puts it in place of a model's
attention for whole prompts, as the official code does. A query's block depends on all queries of its half, later ones
among them, so it is no causal function of the text, though no later value is ever read.

Differs: keys that only pad the last block are hidden (official: zeros that take mass). Samples hide their own block, as
in the official code without its ``cuda`` flag; with it they count twice. Calls with a cache that is not empty, or with
padding, run exact (official: refused). Planes and draws follow a seed. Grouped keys are repeated. The hash is the
code's, whose neighbouring values differ in one bit only up to two planes; the paper wants it for all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from ...core.errors import SpecError
from ...core.masks import Causal
from ..base import ClaimNumbers, MethodSystem, Promises
from ._hashed_blocks import HashedBlocks
from ._merged import Found, exact, merge
from ._spectral import spectral_error
from ._whole_prompts import on_whole_prompts

SPEEDUP = 5.0  # at 131072 tokens, causal, as the paper has it
FEW, MANY = 64, 1024  # samples of the error's two ends; a sampling error falls by four between them
FALLS = 2.0  # how many times it must fall at least


class Hyper(HashedBlocks):
    """The mechanism: ``unmasked``, and by recursion causal."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, causal: bool = False) -> Found:
        """Attention of ``[B, H, N, D]``; causal needs as many queries as keys."""
        n, scale = k.shape[2], q.shape[-1] ** -0.5 if scale is None else scale
        if not causal:
            return self.unmasked(q, k, v, scale)
        if n <= self.shortest:
            return exact(q, k, v, scale, Causal())
        q, k, v = (pad(x, (0, 0, 0, n % 2)) for x in (q, k, v))
        half = q.shape[2] // 2
        halves = [x.unflatten(2, (2, half)).flatten(1, 2) for x in (q, k, v)]
        out, lse = self(halves[0], halves[1], halves[2], scale, causal=True)
        out, lse = (x.unflatten(1, (-1, 2)).flatten(2, 3) for x in (out, lse))
        far = self.unmasked(q[:, :, half:], k[:, :, :half], v[:, :, :half], scale)
        low, low_lse = merge((out[:, :, half:], lse[:, :, half:]), far)
        return torch.cat([out[:, :, :half], low], 2)[:, :, :n], torch.cat([lse[..., :half], low_lse], -1)[..., :n]


class HyperAttention(MethodSystem):
    """Settings: ``planes`` of the hash, keys per ``block``, ``samples``, the ``shortest`` length, ``seed``."""

    slug = "hyperattention"
    title = "HyperAttention (LSH-sorted blocks and sampled columns)"
    paper = "https://arxiv.org/abs/2310.05869"
    code = "https://github.com/insuhan/hyper-attn"
    promises = Promises(  # N log N
        causal=False, decodes=False, padding=False, exponent=1.1, training_free=True, needs_training=False
    )

    def __init__(self, planes: int = 7, block: int = 256, samples: int = 256, shortest: int = 4096, seed: int = 0):
        self.planes, self.block, self.samples, self.shortest, self.seed = planes, block, samples, shortest, seed

    def make(self, width: int) -> Hyper:
        """The mechanism for heads of a width, with fresh planes.

        Raises:
            SpecError: a block without keys, or a negative count.
        """
        if self.block < 1 or min(self.planes, self.samples) < 0 or self.shortest < 1:
            raise SpecError(f"HyperAttention: expected block and shortest of at least 1, other counts >= 0; got {self}")
        source = torch.Generator().manual_seed(self.seed)
        planes = torch.randn(width, self.planes, generator=source)
        return Hyper(planes, self.block, self.samples, self.shortest, source)

    def apply(self, model: Any) -> AbstractContextManager[None]:
        """Read whole prompts this way, in every layer of a causal model of transformers, until the context is left."""

        def layer(module: Any, q: Tensor) -> Callable[..., Tensor]:
            hyper = self.make(q.shape[-1])

            def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
                k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
                return hyper(q, k, v, scale, causal=True)[0]

            return attend

        return on_whole_prompts(model, layer, self.shortest + 1)

    def claim(self) -> ClaimNumbers:
        """Error in the theorem's norm by the number of samples, what the hash is worth, and time against SDPA."""
        plain, planted = _inputs(planted=False), _inputs(planted=True)
        errors = {s: spectral_error(HyperAttention(samples=s, shortest=1).make(64), *plain) for s in (FEW, MANY)}
        hashed = spectral_error(HyperAttention(shortest=1).make(64), *planted)
        unhashed = spectral_error(HyperAttention(planes=0, shortest=1).make(64), *planted)
        speedup = {}
        for n, rounds in ((32768, 3), (131072, 1)):
            q, k, v = torch.randn(3, 1, 1, n, 64, generator=torch.Generator().manual_seed(0)).unbind(0)
            hyper = partial(self.make(64), q, k, v, causal=True)
            sdpa = partial(scaled_dot_product_attention, q, k, v, is_causal=True)
            with torch.no_grad():
                speedup[n] = statistics.median(_seconds(sdpa) / _seconds(hyper) for _ in range(rounds))
        return ClaimNumbers.decide(
            {f"error_{s}_samples": round(e, 5) for s, e in errors.items()}
            | {"error_planted": round(hashed, 5), "error_planted_without_hash": round(unhashed, 5)}
            | {f"speedup_{n}": round(x, 2) for n, x in speedup.items()},
            f"The error in the operator norm, of |W||V|, falls from {errors[FEW]:.4f} with {FEW} samples to"
            f" {errors[MANY]:.4f} with {MANY}; where queries have heavy keys it is {hashed:.4f}, without the hash"
            f" {unhashed:.4f}. Causal, {speedup[32768]:.1f} times as fast as SDPA at 32768 tokens,"
            f" {speedup[131072]:.1f} at 131072.",
            error_falls_with_samples=errors[FEW] > FALLS * errors[MANY],
            the_hash_finds_heavy_keys=hashed < unhashed,
            faster_at_32768=speedup[32768] > 1,
            five_times_as_fast_at_131072=speedup[131072] > SPEEDUP,
        )


def _seconds(work: Callable[[], Any]) -> float:
    """Of the processor: nobody repeats a minute of SDPA to be rid of what else the machine did."""
    start = time.process_time()
    work()
    return time.process_time() - start


def _inputs(planted: bool, n: int = 4096, width: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Normal queries, keys and values ``[1, 2, N, D]``; planted: each query has a key of its own with much weight."""
    source = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, 1, 2, n, width, generator=source).unbind(0)
    if planted:
        q = 1.1 * k[:, :, torch.randperm(n, generator=source)] + 0.2 * q
    return q, k, v
