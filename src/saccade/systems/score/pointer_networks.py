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

import torch
from torch import Tensor, nn

from ...core.scores import Additive
from ...core.spec import Attention
from ...nn import MultiHead
from ...nn.backbones import Place
from ..base import ClaimNumbers, LayerSystem, Promises
from ._pointer_network import PointerNetwork
from ._points import area_covered, exactness, problems, tour_length, triangles_found

SIZES, LONGER = (5, 6, 7, 8), 14  # points of a hull, in training and beyond
WIDTH, RATE = 64, 5e-3  # of the claim
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

    def model(self, hidden: int = 256, table: int | None = None) -> PointerNetwork:
        """The whole architecture, its weights fresh."""
        return PointerNetwork(Pointing, hidden, table)

    def claim(self) -> ClaimNumbers:
        """Hulls with pointers and with a table of answers, hulls of more points than in training, triangles, tours."""
        from ...study.trainer import Recipe, compete
        from ...worlds.geometry import hull, tour, triangulation

        pointing = partial(self.model, WIDTH)
        hulls = problems(hull, SIZES, exactness, "accuracy")
        contestants = {"pointing": pointing, "blending": partial(pointing, table=1 + max(SIZES))}
        result = compete(contestants, hulls, Recipe(1200, RATE, (0,)))
        network = result.models["pointing"][0]
        near = fmean(float(area_covered(network, given)) for given in hulls.held())
        (longer,) = problems(hull, (LONGER,), exactness, "accuracy").held()
        far, far_exact = float(area_covered(network, longer)), float(exactness(network, longer))
        found = problems(triangulation, (5,), triangles_found, "found")
        triangles = compete({"pointing": pointing}, found, Recipe(1000, RATE, (0,))).mean("pointing")
        length = problems(tour, (5,), tour_length, "length")
        tours = compete({"pointing": pointing}, length, Recipe(500, RATE, (0,))).mean("pointing")
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
