"""SEA: a small learned network draws a narrow picture of the attention matrix; attention is exact where it is bright.

    seen    = causal linear attention of phi(q) to phi(k), the values being a learned place and v
    state   = GELU(LayerNorm(Linear(seen, v)));   a row of the picture from it, then two convolutions over rows and
              columns that mix the heads and look up only:   picture[h, i, p], p < length
    pixel(i, j)  = floor((j + 1/2) / (i + 1) * length): every row's keys, however many, are stretched over the picture
    mask[h, i, j] = pixel(i, j) is among the heads * keep * length / (i + 1) brightest of row i, heads together
    near    = softmax attention of q[i] under the mask;   mean = the mean of v up to i
    out     = a s near + (1 - a) mean,   a and s sigmoids of the state

About ``keep`` keys per query and head are read, in work and memory linear in the text as long as a pixel is no wider
than heads * keep keys (a row reads at least one). The picture stretched back
(:meth:`Estimator.map`) is the estimated attention matrix, which the teacher's is distilled into.

Paper: SEA: Sparse Linear Attention with Estimated Attention Mask, arXiv:2310.01777
Code: https://github.com/gmlwns2000/sea-attention (src/models/perlin_attention/attention.py, the causal branch, with
    modules.py and ops/kernels/resize_m_to_t.py); scripts/opt.py: k 64, predictor length 256, features D ln D / 8

A MethodSystem and not a program, for the picture needs the values. ``distill`` fits the estimators to a model's own
attention, ``apply`` puts them in its place for whole prompts.

Differs: causal language models alone (official: a second network for encoders). Calls with a cache that is not empty,
or with padding, run exact (official: a state of sums and of the convolutions' last rows). Features are drawn once
(official: anew every 1000 steps). Estimators are trained layer by layer with the losses of the official attention
module; the model stays as it is, so its LoRA and the losses on the model's output are left out, as are ``k_oversample``
(1 by default) and the jitter of a tenth of the training steps.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.attend import attention
from ...core.errors import SpecError
from ...core.masks import Causal, Window
from ...core.normalizers import HIDDEN
from ...core.scores import Dot
from ...core.spec import Attention
from ...hosts.replaced import Read, read, replaced
from ..base import ClaimNumbers, MethodSystem, Promises
from ._features import linear, orthogonal

SHRINK, SPLITS = 4, 2  # the picture is drawn this much narrower, in so many channels per head
EDGE = 1e-4  # of a pixel: a key on the edge of two belongs to the lower
ROWS = 128  # queries whose keys are listed at a time
SIZE, KEEP, STEPS = 256, 8, 120  # of the claim: bytes of a text, keys read per query and head, texts to learn from
NEAR = 1.1  # perplexity may be so many times the dense one's


def gathered(q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
    """Attention of each query to the keys listed for it ``[B, H, N, s]``, -1 for none; scores are not scaled.

    Every query is a sample of the engine's batch: a program that selects single keys would lay out N x N blocks.
    """

    def rows(q: Tensor, keys: Tensor) -> Tensor:
        index = keys.clamp(min=0).flatten(2)[..., None]
        near_k, near_v = (x.gather(2, index.expand(*index.shape[:3], x.shape[-1])) for x in (k, v))
        near_k, near_v = (x.reshape(-1, 1, keys.shape[3], x.shape[-1]) for x in (near_k, near_v))
        listed = keys.flatten(0, 2) >= 0
        program = Attention(score=[Dot(1.0)], mask=lambda b, h, q, k: listed[b, k])
        out: Tensor = attention(q.reshape(-1, 1, 1, q.shape[-1]), near_k, near_v, program)
        return out.view(*keys.shape[:3], -1)

    return torch.cat([rows(*part) for part in zip(q.split(ROWS, 2), keys.split(ROWS, 2), strict=True)], 2)


class Estimator(nn.Module):
    """The network of one layer: ``heads`` of ``width``; the other arguments are those of :class:`Sea`."""

    projection: Tensor

    def __init__(self, heads: int, width: int, keep: int, length: int, context: int, narrow: int, seed: int):
        super().__init__()
        self.heads, self.keep, self.length, inner = heads, keep, length, SPLITS * heads
        features = int(width * math.log(width) / narrow)
        self.register_buffer("projection", orthogonal(features, width, torch.Generator().manual_seed(seed)))
        self.place = nn.Parameter(torch.randn(context, width))
        self.state = nn.Sequential(nn.Linear(3 * width, 2 * width), nn.LayerNorm(2 * width), nn.GELU())
        self.row = nn.Linear(2 * width, length // SHRINK * SPLITS)
        self.before, self.after = nn.LayerNorm(length // SHRINK), nn.LayerNorm(length)
        self.convolutions = nn.ModuleList(nn.Conv2d(inner, inner, 3, dilation=2) for _ in range(2))
        self.merge = nn.Conv2d(inner, heads, 1, padding=(0, 1))
        self.scales = nn.Linear(2 * width, 2)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The picture's scores ``[B, H, N, length]``, and the shares s and a ``[B, H, N, 2]``.

        Args:
            q: queries that carry the scale of the scores ``[B, H, N, D]``; k and v as large.

        Raises:
            SpecError: the text is longer than ``context``.
        """
        n = q.shape[2]
        if n > len(self.place):
            raise SpecError(f"SEA: {n} tokens are more than its context of {len(self.place)}")
        phi_q, phi_k = (F.relu(x * x.shape[-1] ** -0.25 @ self.projection.mT) + 1e-3 for x in (q, k))
        seen = linear(phi_q, phi_k, torch.cat([self.place[:n].expand_as(v), v, torch.ones_like(v[..., :1])], -1), True)
        state = self.state(torch.cat([seen[..., :-1] / (seen[..., -1:] + 1e-6 * phi_q.sum(-1, keepdim=True)), v], -1))
        x = self.row(state).unflatten(-1, (SPLITS, -1)).transpose(2, 3).flatten(1, 2)
        x = self.before(x)
        for convolution in self.convolutions:
            x = F.relu(convolution(F.pad(x, (2, 2, 4, 0))))  # rows above alone: the picture is causal
        x = self.merge(x.repeat_interleave(SHRINK, -1))
        x = F.interpolate(x, (n, self.length), mode="area")
        return self.after(x), self.scales(state).sigmoid()

    def bright(self, scores: Tensor) -> Tensor:
        """Which pixels are read, bool ``[B, H, N, length]``: a row's heads share what there is to keep."""
        flat = scores.detach().softmax(-1).transpose(1, 2).flatten(2)
        visible = torch.arange(1, scores.shape[2] + 1, device=scores.device)
        count = (self.heads * self.keep * self.length / visible).round().clamp(min=1)
        rank = torch.arange(flat.shape[-1], device=scores.device) < count[:, None]
        hit = torch.zeros_like(flat, dtype=torch.bool)
        hit.scatter_(-1, flat.argsort(dim=-1, descending=True, stable=True), rank.expand_as(flat))
        return hit.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys(self, bright: Tensor) -> Tensor:
        """The keys of those pixels ``[B, H, N, s]``, -1 where a query has fewer."""
        found = []
        for first in range(0, bright.shape[2], ROWS):
            part = bright[:, :, first : first + ROWS]
            most = max(1, int(part.sum(-1).max()))
            on, pixel = part.to(torch.int8).topk(most, -1)
            visible = torch.arange(first + 1, first + 1 + part.shape[2], device=bright.device)[:, None]
            wide = visible.double() / self.length
            start, stop = (((pixel + right + EDGE) * wide - 0.5).ceil().long().clamp(min=0) for right in (0, 1))
            stop = torch.where(pixel + 1 < self.length, stop, visible).minimum(visible)
            start = torch.where(pixel > 0, start, 0)
            key = start[..., None] + torch.arange(max(1, int((stop - start).max())), device=bright.device)
            key = key.masked_fill((key >= stop[..., None]) | (on == 0)[..., None], -1).flatten(-2)
            found.append(key.sort(-1, descending=True).values[..., : max(1, int((key >= 0).sum(-1).max()))])
        size = max(x.shape[-1] for x in found)
        return torch.cat([F.pad(x, (0, size - x.shape[-1]), value=-1) for x in found], 2)

    def stretch(self, picture: Tensor, hidden: float | bool) -> Tensor:
        """A picture ``[B, H, N, length]`` over the keys ``[B, H, N, N]``, ``hidden`` beyond the query: for small N."""
        n = picture.shape[2]
        row, key = torch.arange(n, device=picture.device)[:, None], torch.arange(n, device=picture.device)
        pixel = ((key + 0.5) / (row + 1).double() * self.length - EDGE).floor().long().clamp(0, self.length - 1)
        return picture.gather(-1, pixel.expand(*picture.shape[:2], n, n)).masked_fill(key > row, hidden)

    def map(self, scores: Tensor) -> Tensor:
        """The estimated attention matrix ``[B, H, N, N]``, whole: for small N, to look at and to distill into."""
        return self.stretch(scores, HIDDEN).softmax(-1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        """SEA of ``[B, H, N, D]``, keys and values ``[B, Hkv, N, D]``."""
        q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores, shares = self(q, k, v)
        return self.blend(gathered(q, k, v, self.keys(self.bright(scores))), v, shares)

    @staticmethod
    def blend(near: Tensor, v: Tensor, shares: Tensor) -> Tensor:
        """``a s near + (1 - a) mean``."""
        mean = v.cumsum(2) / torch.arange(1, v.shape[2] + 1, device=v.device)[:, None]
        return torch.lerp(mean, near * shares[..., :1], shares[..., 1:])

    def loss(self, layer: Read) -> Tensor:
        """The official losses against what the layer's dense attention is: of the matrix, and of the output. Dense."""
        q, k, v = (x.repeat_interleave(layer.q.shape[1] // x.shape[1], 1) for x in layer[:3])
        q = q * layer.scale
        future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
        truth = (q @ k.mT).masked_fill(future, HIDDEN).softmax(-1)
        scores, shares = self(q, k, v)
        guess = self.map(scores)
        apart = F.kl_div(guess.clamp(min=1e-30).log().flatten(0, 2), truth.flatten(0, 2), reduction="batchmean")
        kept = truth * self.stretch(self.bright(scores), False)
        near = kept @ v / kept.sum(-1, keepdim=True).clamp(min=1e-30)
        out = self.blend(near, v, shares)
        return 0.1 * apart + F.mse_loss(guess, truth) + F.mse_loss(out, truth @ v)


class Sea(MethodSystem):
    """Settings: ``keep`` keys per query and head, ``length`` of the picture, ``context``, ``narrow``, ``seed``.

    ``length`` is a multiple of four; ``context`` is the longest text; there are ``D ln D / narrow`` features.
    """

    slug = "sea"
    title = "SEA (sparse linear attention with an estimated mask)"
    paper = "https://arxiv.org/abs/2310.01777"
    code = "https://github.com/gmlwns2000/sea-attention"
    promises = Promises(cross=False, decodes=False, padding=False, exponent=1.0)

    def __init__(self, keep: int = 64, length: int = 256, context: int = 2048, narrow: int = 8, seed: int = 0):
        self.keep, self.length, self.context, self.narrow, self.seed = keep, length, context, narrow, seed

    def make(self, heads: int, width: int) -> Estimator:
        """A fresh estimator for a layer.

        Raises:
            SpecError: a setting below 1, a length that is no multiple of four, or no features for heads so narrow.
        """
        if min(self.keep, self.length, self.context, self.narrow) < 1 or self.length % SHRINK:
            raise SpecError(f"SEA: expected settings of at least 1, and length a multiple of {SHRINK}; got {self}")
        if width * math.log(width) < self.narrow:
            raise SpecError(f"SEA: narrow={self.narrow} leaves heads of width {width} without features")
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return Estimator(heads, width, self.keep, self.length, self.context, self.narrow, self.seed)

    def distill(self, model: Any, texts: Sequence[Tensor], rate: float = 1e-3) -> dict[int, Estimator]:
        """Estimators of a model's layers by their number, after a step on each of the texts ``[B, N]``."""
        made: dict[int, Estimator] = {}
        optimizer: torch.optim.Optimizer | None = None
        for tokens in texts:
            layers = read(model, tokens)
            if optimizer is None:
                made = {i: self.make(layer.q.shape[1], layer.q.shape[3]) for i, layer in enumerate(layers)}
                optimizer = torch.optim.AdamW([p for e in made.values() for p in e.parameters()], lr=rate)
            optimizer.zero_grad()
            for i, layer in enumerate(layers):
                made[i].loss(layer).backward()
            optimizer.step()
        return made

    @contextmanager
    def apply(self, model: Any, estimators: dict[int, Estimator] | None = None) -> Iterator[None]:
        """Read whole prompts this way until the context is left, with untrained estimators where none are given."""
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        made = dict(estimators or {})

        def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **given: Any) -> tuple[Tensor, None]:
            if mask is not None or q.shape[2] != k.shape[2]:
                return sdpa_attention_forward(module, q, k, v, mask, **given)  # type: ignore[return-value]
            if module.layer_idx not in made:
                made[module.layer_idx] = self.make(q.shape[1], q.shape[3]).to(q)
            return made[module.layer_idx].attend(q, k, v, given.get("scaling")).transpose(1, 2).contiguous(), None

        with replaced(model, attend):
            yield

    def claim(self) -> ClaimNumbers:
        """The embedded model, distilled briefly: its perplexity, the recall of the mask, and how near the map is."""
        from ...hosts.handles import install
        from ...study.probes import embedded
        from ...worlds.text import heldout, text

        small = Sea(KEEP, length=SIZE // 8, context=SIZE)  # the official ratios, of a text of 2048
        model, cut = embedded(), len(heldout()) * 3 // 4
        learn, held = (
            [example.tokens[None] for example in islice(text(SIZE, "sea", source=part), count)]
            for part, count in ((heldout()[:cut], STEPS), (heldout()[cut:], 8))
        )
        made = small.distill(model, learn, rate=3e-3)
        fresh = {i: small.make(e.heads, e.place.shape[1]) for i, e in made.items()}
        window = Attention(mask=Causal() & Window(KEEP))
        losses = {"dense": _loss(model, held)}
        with small.apply(model, made):
            losses["sea"] = _loss(model, held)
        with install(model, window):
            losses["window"] = _loss(model, held)
        times = {name: math.exp(losses[name] - losses["dense"]) for name in ("sea", "window")}
        found = {
            name: statistics.fmean(x)
            for name, x in _found([(made[i], fresh[i], layer) for t in held for i, layer in enumerate(read(model, t))])
        }
        return ClaimNumbers.decide(
            {f"loss_{name}": round(x, 4) for name, x in losses.items()}
            | {f"perplexity_{name}_of_dense": round(x, 4) for name, x in times.items()}
            | {name: round(x, 4) for name, x in found.items()},
            f"After {STEPS} texts of {SIZE} bytes, reading {KEEP} keys per query and head, the embedded model's"
            f" perplexity is {times['sea']:.3f} times the dense one's ({times['window']:.3f} with the last {KEEP})."
            f" The mask holds {found['recall']:.0%} of the greatest weights (untrained {found['recall_untrained']:.0%},"
            f" the last keys {found['recall_window']:.0%}); the map shares {found['overlap']:.0%} of the dense"
            f" attention's mass (untrained {found['overlap_untrained']:.0%}).",
            perplexity_near_dense=times["sea"] <= NEAR,
            recall_above_a_window=found["recall"] > found["recall_window"],
            the_map_is_learned=found["overlap"] > found["overlap_untrained"],
        )


@torch.no_grad()
def _loss(model: Any, texts: list[Tensor]) -> float:
    """Nats per byte of the second half of each text."""
    half = SIZE // 2
    logits = [model(t, use_cache=False, logits_to_keep=half + 1).logits[0, :-1] for t in texts]
    return statistics.fmean(float(F.cross_entropy(x, t[0, -half:])) for x, t in zip(logits, texts, strict=True))


@torch.no_grad()
def _found(layers: list[tuple[Estimator, Estimator, Read]]) -> Iterable[tuple[str, list[float]]]:
    """By name, one number of each layer for its second half of queries: recall of masks, overlap of maps."""
    numbers: dict[str, list[float]] = {}
    for made, fresh, layer in layers:
        q, k, v = (x.repeat_interleave(layer.q.shape[1] // x.shape[1], 1) for x in layer[:3])
        scores = {"": made(q * layer.scale, k, v)[0], "_untrained": fresh(q * layer.scale, k, v)[0]}
        n, past = q.shape[2], torch.ones(q.shape[2], q.shape[2]).tril().bool()
        truth = (q @ k.mT * layer.scale).masked_fill(~past, HIDDEN).softmax(-1)
        greatest = truth.transpose(1, 2).flatten(2).topk(made.heads * made.keep, -1).indices  # of all heads together
        masks = {name: made.stretch(made.bright(x), False) for name, x in scores.items()}
        masks["_window"] = (past & ~past.tril(-made.keep)).expand_as(truth)
        for name, mask in masks.items():
            hit = mask.transpose(1, 2).flatten(2).gather(-1, greatest)[:, n // 2 :]
            numbers.setdefault(f"recall{name}", []).append(float(hit.float().mean()))
        for name, x in scores.items():
            overlap = made.map(x).minimum(truth).sum(-1)[..., n // 2 :]
            numbers.setdefault(f"overlap{name}", []).append(float(overlap.mean()))
    return numbers.items()
