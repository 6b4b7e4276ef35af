"""Luong attention: a recurrent decoder looks back at all source words, or only at those around a place it chooses.

    score[t, s] = h[t] . m[s]   "dot"          h[t] W m[s]  "general"
                  v . tanh(Wh h[t] + Wm m[s])  "concat"     (W h[t])[s]  "location"
    w[t] = softmax(score[t]) over all words s, or over the window |s - floor(p[t])| <= D
    local-m: p[t] = min(t, S - 1)
    local-p: p[t] = S sigmoid(v . tanh(W h[t])), and then w[t, s] <- w[t, s] exp(-(s - p[t])^2 / (2 (D / 2)^2))
    y[t] = tanh(Wc [sum over s of w[t, s] m[s]; h[t]]), which the next step reads too ("input feeding", ._recurrent)

Paper: Effective Approaches to Attention-based Neural Machine Translation, arXiv:1508.04025
Code: https://github.com/lmthang/nmt.matlab (code/layers/attnLayerForward.m, distLayerForward.m; D = 10, first weights
    from -0.1 to 0.1; https://github.com/lmthang/nmt.hybrid goes on from it)

Differs: "concat" has a matrix for the words as in the paper; in the official code they have none. "location" has the
first ``length`` places (the paper's sources have up to 50 words). The paper turns its sources around; here they stay.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ...core import masks, scores
from ...core.attend import attention
from ...core.errors import SpecError
from ...core.spec import Attention
from ...nn.backbones import Place
from ..base import ClaimNumbers, LayerSystem, Promises

SCORES = "dot", "general", "concat", "location"
LENGTHS, WIDTH = (1024, 8192), 64  # words of the texts that are timed, and numbers in a state


class Attend(nn.Module):
    """From decoder states and source states to attentional states."""

    def __init__(self, system: Luong, width: int):
        super().__init__()
        self.local, self.reach = system.local, system.reach
        self.form: scores.Form = scores.Dot(1.0)
        self.query: nn.Linear | None = None
        if system.score in ("general", "location"):
            self.query = nn.Linear(width, width if system.score == "general" else system.length, bias=False)
        elif system.score == "concat":
            self.form = scores.Additive.fresh(width, width)
        self.places = system.length if system.score == "location" else None
        self.out = nn.Linear(2 * width, width, bias=False)
        if self.local == "p":
            self.inner, self.point = nn.Linear(width, width, bias=False), nn.Linear(width, 1, bias=False)
        for p in self.parameters():
            nn.init.uniform_(p, -0.1, 0.1)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, cache: None = None, keep: Tensor | None = None,
        start: int = 0,
    ) -> Tensor:  # fmt: skip
        """``[B, N, width]`` from states ``[B, N, width]``, the first of which is at ``start``; ``context`` and ``keep``
        as :class:`MultiHead`'s."""
        memory = x if context is None else context
        q, k = x if self.query is None else self.query(x), memory
        if self.places is not None:
            if self.places < k.shape[1]:
                raise SpecError(f"luong: location scores have {self.places} places for {k.shape[1]} words: length=")
            k = torch.eye(k.shape[1], self.places, dtype=x.dtype, device=x.device).expand(len(k), -1, -1)
        if self.local is None:
            spec = Attention(self.form, None if keep is None else masks.Padding(keep))
            backend = "reference" if x.shape[1] == 1 else "auto"  # of a single row the whole matrix is no more
            read = attention(q[:, None], k[:, None], memory[:, None], spec, offset=0, backend=backend)[:, 0]
        else:
            words = torch.tensor([[k.shape[1]]], device=x.device) if keep is None else keep.sum(1, keepdim=True)
            read = self.window(q, k, memory, words, self.look(x, words, start))
        return torch.tanh(self.out(torch.cat([read, x], -1)))

    def look(self, x: Tensor, words: Tensor, start: int) -> Tensor:
        """The place ``[B, N]`` in a source of ``words [B, 1]`` that each state looks at, float32 at least."""
        exact = torch.promote_types(x.dtype, torch.float32)
        if self.local == "p":
            return words * torch.sigmoid(self.point(torch.tanh(self.inner(x)))[..., 0].to(exact))
        return torch.minimum(torch.arange(start, start + x.shape[1], device=x.device), words - 1).to(exact)

    def window(self, q: Tensor, k: Tensor, v: Tensor, words: Tensor, place: Tensor) -> Tensor:
        """What is read ``[B, N, width]`` from the words around each place, each query with a window of its own."""
        near = place.long()[..., None] + torch.arange(-self.reach, self.reach + 1, device=q.device)
        there = ((near >= 0) & (near < words[..., None])).flatten(0, 1)[:, None, None]
        rows = torch.arange(len(q), device=q.device)[:, None, None], near.clamp(0, k.shape[1] - 1)
        decay = torch.exp(-2 * ((near - place[..., None]) / self.reach) ** 2).flatten(0, 1).to(q.dtype)
        edit = [lambda w, b, h, q, k: w * decay[b, k]] if self.local == "p" else []
        q, k, v = q.flatten(0, 1)[:, None, None], k[rows].flatten(0, 1)[:, None], v[rows].flatten(0, 1)[:, None]
        read = attention(q, k, v, Attention(self.form, there, edits=edit), backend="reference")  # all of it is near
        return read[:, 0, 0].unflatten(0, place.shape)


class Luong(LayerSystem):
    """Settings: ``score``; ``local``, "m", "p" or ``None`` (global); ``reach`` D; ``length``, places of "location"."""

    slug = "luong"
    title = "Global and local attention of recurrent translation (Luong)"
    paper = "https://arxiv.org/abs/1508.04025"
    code = "https://github.com/lmthang/nmt.matlab"
    promises = Promises(causal=False, decodes=False, hosts=())

    def __init__(self, score: str = "general", local: str | None = "p", reach: int = 10, length: int = 50):
        self.score, self.local, self.reach, self.length = score, local, reach, length
        if score not in SCORES or local not in (None, "m", "p") or reach < 1:
            raise SpecError(f"luong: score is one of {SCORES}, local None, m or p, reach 1 at least; got {self!r}")

    def promised(self) -> Promises:
        """Linear where local; rows of weights sum to one, unless local-p lowers them."""
        return replace(self.promises, exponent=2.0 if self.local is None else 1.0, unit_rows=self.local != "p")

    def layer(self, place: Place) -> nn.Module:
        """Attention of a decoder's states, one head."""
        return Attend(self, place.width)

    def claim(self) -> ClaimNumbers:
        """BLEU of recurrent translators between small languages, and the time of attention in long texts."""
        from ...study.trainer import Recipe, Task, compete, labelled
        from ._recurrent import Translator, bleu
        from ._translation import HELD, pairs, told, vocabulary

        make = {"none": partial(Translator, vocabulary(), WIDTH, None)}
        for name, system in {"global": Luong(local=None), "local": Luong()}.items():
            make[name] = partial(Translator, vocabulary(), WIDTH, partial(Attend, system, WIDTH))
        task = Task(lambda seed: map(told, pairs(seed)), labelled, lambda: [next(pairs(HELD))], bleu, "bleu")
        result = compete(make, task, Recipe(steps=250, seeds=(0, 1)))
        above = {name: result.excess(name, "none") for name in ("global", "local")}
        ratios = {n: _global_over_local(n) for n in LENGTHS}
        return ClaimNumbers.decide(
            result.numbers()
            | {f"above_none_{name}": [round(x.mean, 2), round(x.error, 2)] for name, x in above.items()}
            | {f"global_time_over_local_{n}": round(ratio, 2) for n, ratio in ratios.items()},
            f"BLEU {result.mean('none'):.1f} without attention, {result.mean('global'):.1f} with global and"
            f" {result.mean('local'):.1f} with local-p attention. In texts of {LENGTHS} words global attention takes"
            f" {', '.join(f'{ratio:.1f}' for ratio in ratios.values())} times as long as local.",
            global_above_none=above["global"].mean > 0,
            local_above_none=above["local"].mean > 0,
            local_costs_less_in_the_longer=ratios[max(ratios)] > 1,
        )


def _global_over_local(words: int) -> float:
    """How many times as long global attention takes, from as many states to as many words."""
    from ...study.claims import interleaved

    text = torch.randn(1, words, WIDTH, generator=torch.Generator().manual_seed(0))
    layers = {name: Attend(Luong(local=name), WIDTH).requires_grad_(False) for name in (None, "p")}
    return interleaved({str(name): partial(layer, text) for name, layer in layers.items()}, 5).ratio("None", "p")
