"""Pointer networks: the weights of attention are the answer, a position of the input for every step of the output.

    e[1..n] = LSTM of the points;   e[0] a learned vector, "the end"
    d[i] = LSTM, from the encoder's last state, of the points pointed at so far
    u[i, j] = v . tanh(W1 e[j] + W2 d[i]);   p(answer i is j) = softmax(u[i])[j]

So there are as many answers to choose from as the input has positions, whatever their number was in training. As a
layer (:class:`Pointing`) the same weights blend what they point at: content-based attention, what the paper compares
with, there with a fixed table of answers behind it.

Paper: Pointer Networks, arXiv:1506.03134
Code: https://github.com/devsisters/pointer-network-tensorflow (layers.py, model.py), not the authors': an embedding of
    the points, a learned e[0] that ends an answer, one layer of 256, first weights uniform in +- 0.08

Differs: from that code, no glimpse before pointing (not in the paper; num_glimpse=0 there); the decoder reads embedded
points, as the paper's, and not e, and is trained through them; LSTMs are torch's, and all their numbers are drawn. The
baseline does not feed what it blended to its next step. The claim has a quarter of the width, is trained by AdamW on
some 10^5 examples, where the paper took SGD and a million, and decodes greedily, where the paper searches a beam.
"""

from __future__ import annotations

from functools import partial
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.scores import Additive
from ...core.spec import Attention
from ...nn import MultiHead
from ...nn.backbones import Place
from ..base import ClaimNumbers, LayerSystem, Promises
from ._points import Posed, area, covered, detour, exact, mixed, posed

FIRST = 0.08  # weights are drawn from +- this
SIZES, LONGER = (5, 6, 7, 8), 14  # points of a hull, in training and beyond
WIDTH, BATCH, HELD, RATE = 64, 128, 512, 5e-3  # of the claim
CLOSE = 0.9  # area of the hull and beyond the lengths of training: "approximate solutions" (the paper's: 0.99)
TRIANGLES = 0.8  # of 5 points that must be found (the paper's: 0.93, and 0.81 of 10 points)
DETOUR = 1.05  # length of a tour of 5 points, of the shortest one's (the paper's: 1.00)


class Pointing(MultiHead):
    """One head whose weights point: ``softmax(v . tanh(W1 context + W2 x))``; its output is what they blend."""

    def __init__(self, width: int):
        super().__init__(Attention(Additive.fresh(width, width)), width, 1)
        self.q = self.k = self.v = self.out = nn.Identity()  # type: ignore[assignment]

    def logits(self, x: Tensor, context: Tensor) -> Tensor:
        """``u [B, N, M]`` of queries ``[B, N, width]`` and ``[B, M, width]``."""
        form = self.spec.form
        assert isinstance(form, Additive)
        q, k = form.prepare(x, context)
        return torch.tanh(q[:, :, None] + k[:, None]) @ form.energy  # so few points that [N, M, width] is cheap


class PointerNetwork(nn.Module):
    """Points ``[B, N, 2]`` and an answer so far to logits of the next position; 0 is the end, points count from 1.

    Args:
        hidden: width of both LSTMs.
        table: answers of the paper's baseline, which blends instead of pointing; ``None``: a pointer network.
    """

    def __init__(self, hidden: int = 256, table: int | None = None):
        super().__init__()
        self.embed = nn.Linear(2, hidden, bias=False)
        self.encoder, self.decoder = (nn.LSTM(hidden, hidden, batch_first=True) for _ in range(2))
        self.end = nn.Parameter(torch.zeros(hidden))
        self.pointing = Pointing(hidden)
        self.table = None if table is None else nn.Linear(2 * hidden, table)
        for p in self.parameters():
            nn.init.uniform_(p, -FIRST, FIRST)

    def forward(self, points: Tensor, answer: Tensor) -> Tensor:
        """Logits ``[B, M + 1, N + 1]`` of what follows each of the answer ``[B, M]`` (what follows its end is junk)."""
        read, keys, state = self.encode(points)
        return self.step(read, keys, F.pad(answer.clamp(min=0), (1, 0)), state)[0]

    def encode(self, points: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """What the decoder reads and what it points at, ``[B, N + 1, hidden]`` each, and its first state."""
        read = self.embed(points)
        keys, state = self.encoder(read)
        end = self.end.expand(len(points), 1, -1)
        return torch.cat([end, read], 1), torch.cat([end, keys], 1), state

    def step(
        self, read: Tensor, keys: Tensor, last: Tensor, state: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Logits after each of ``last [B, n]`` and the new state."""
        out, state = self.decoder(read.gather(1, last[..., None].expand(-1, -1, read.shape[-1])), state)
        logits = self.pointing.logits(out, keys)
        if self.table is not None:
            logits = self.table(torch.cat([out, logits.softmax(-1) @ keys], -1))
        return logits, state

    @torch.no_grad()
    def solve(self, points: Tensor, most: int, *, tour: bool = False) -> Tensor:
        """The likeliest answers, one after the other: ``[B, most]``, 0 from the end on. ``tour``: all points once."""
        read, keys, state = self.encode(points)
        last = torch.zeros(len(points), 1, dtype=torch.long, device=points.device)
        ended, said = torch.zeros_like(last, dtype=torch.bool), torch.zeros_like(keys[..., 0], dtype=torch.bool)
        found = []
        for _ in range(most):
            logits, state = self.step(read, keys, last, state)
            if tour:
                said[:, 0] = True
                logits = logits.masked_fill(said[:, None], -torch.inf)
            last = logits[..., : keys.shape[1]].argmax(-1)
            ended |= last == 0
            last = last.masked_fill(ended, 0)
            said.scatter_(1, last, True)
            found.append(last)
        return torch.cat(found, 1)


class PointerNetworks(LayerSystem):
    """No settings."""

    slug = "pointer-networks"
    title = "Pointer networks"
    paper = "https://arxiv.org/abs/1506.03134"
    code = "https://github.com/devsisters/pointer-network-tensorflow"
    promises = Promises(causal=False, decodes=False, unit_rows=True, hosts=())

    def layer(self, place: Place) -> nn.Module:
        """Content-based attention, the pointers being its weights."""
        return Pointing(place.width)

    def model(self, hidden: int = 256) -> PointerNetwork:
        """The whole architecture, its weights fresh."""
        return PointerNetwork(hidden)

    def claim(self) -> ClaimNumbers:
        """Hulls with pointers and with a table of answers, hulls of more points than in training, triangles, tours."""
        from ...study.trainer import Recipe, Task, compete, labelled
        from ...worlds.geometry import hull, tour, triangulation

        def task(world: Any, sizes: tuple[int, ...], judge: Any, score: str) -> Task:
            held = [posed(world(n, "held"), HELD) for n in sizes]
            return Task(lambda seed: mixed(world, sizes, BATCH, seed), labelled, lambda: held, judge, score)

        small = partial(PointerNetwork, WIDTH)
        hulls = task(hull, SIZES, _exact, "accuracy")
        contestants = {"pointing": small, "blending": partial(small, table=1 + max(SIZES))}
        result = compete(contestants, hulls, Recipe(1200, RATE, (0,)))
        network = result.models["pointing"][0]
        near = fmean(float(_area(network, given)) for given in hulls.held())
        longer = posed(hull(LONGER, "held"), HELD)
        far, far_exact = float(_area(network, longer)), float(_exact(network, longer))
        triangles, tours = (
            compete({"pointing": small}, task(world, (5,), judge, score), Recipe(steps, RATE, (0,))).mean("pointing")
            for world, judge, score, steps in ((triangulation, _covered, "found", 1000), (tour, _detour, "length", 500))
        )
        return ClaimNumbers.decide(
            result.numbers()
            | {
                "area": round(near, 4), "area_longer": round(far, 4), "accuracy_longer": round(far_exact, 4),
                "triangles_found": round(triangles, 4), "tour_length_of_shortest": round(tours, 4),
            },
            f"Of hulls of {min(SIZES)} to {max(SIZES)} points {result.mean('pointing'):.1%} are right with pointers and"
            f" {result.mean('blending'):.1%} with blended keys and a table of answers; they cover {near:.1%} of the"
            f" area, and of {LONGER} points, never seen in training, {far:.1%} ({far_exact:.1%} right). Of 5 points"
            f" {triangles:.1%} of Delaunay's triangles are found, and tours are {tours:.3f} times as long as the"
            " shortest.",
            better_than_blending=result.mean("pointing") > result.mean("blending"),
            hulls_covered=near >= CLOSE,
            longer_hulls_covered=far >= CLOSE,
            triangles_found=triangles >= TRIANGLES,
            tours_short=tours <= DETOUR,
        )  # fmt: skip


def _exact(network: Any, given: Posed) -> Tensor:
    points, told, _ = given
    return exact(network.solve(points, told.shape[1] + 1), told)


def _area(network: Any, given: Posed) -> Tensor:
    points, told, _ = given
    return area(points, network.solve(points, points.shape[1]), told)


def _covered(network: Any, given: Posed) -> Tensor:
    points, told, _ = given
    return covered(network.solve(points, told.shape[1]), told)


def _detour(network: Any, given: Posed) -> Tensor:
    points, told, _ = given
    return detour(points, network.solve(points, told.shape[1], tour=True), told)
