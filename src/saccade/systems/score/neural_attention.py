"""Neural Attention: a small perceptron compares query and key, where a dot product would.

    a[i], b[j] = q[i] Wq + bq, k[j] Wk + bk                                        [inner]: D is reduced first
    s[i, j] = w3 . relu(W2 relu(W1 [a[i]; b[j]] + b1) + b2)                        D -> inner -> inner / 2 -> 1
    y = softmax(s) v

All heads of a layer share the perceptron. W1 [a; b] is a sum of a part of the query and a part of the key, so what is
made for each pair is ``inner`` numbers and no vector of 2 inner: memory grows with a tile, not with N².

Paper: Neural Attention: A Novel Mechanism for Enhanced Expressive Power in Transformer Models, arXiv:2502.17206
Code: https://github.com/awayfromzel/neural-attention-research (nlp_neural_attention/Models/NeuralAttention.py; inner 2
    for heads of 64; in the first layer alone, dot products in all others: SimpleTransformer.py)

Differs: w3 has no bias, which a softmax does not see. Every layer it is given is neural; the claim's model has one in
its first layer, as theirs. The expressiveness task is ours: the paper's was not at hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core import masks
from ...core.attend import attention
from ...core.errors import SpecError
from ...core.scores import Form
from ...core.spec import Attention
from ...nn import MultiHead
from ...nn.backbones import Place
from ..base import ClaimNumbers, LayerSystem, Promises

KEYS, CLASSES, WIDTH, INNER = 8, 8, 32, 8  # of the expressiveness task and its one head
SOLVED = 0.8  # accuracy; q . k only finds the greatest or the least key, the nearest in a third of cases
LOWER = 0.02  # "a reduction in perplexity of over 2 percent"


class Perceptron(Form):
    """Scores ``w3 . relu(W2 relu(W1 [q Wq + bq; k Wk + bk] + b1) + b2)`` for heads of ``width``."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        if inner < 2:
            raise SpecError(f"neural-attention: inner={inner} must be at least 2, its second layer has half of it")
        self.query, self.key = nn.Linear(width, inner), nn.Linear(width, inner)
        self.first, self.second = nn.Linear(2 * inner, inner), nn.Linear(inner, inner // 2)
        self.third = nn.Linear(inner // 2, 1, bias=False)

    def prepare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """The two parts of ``W1 [a; b] + b1``, each ``[B, H, N, inner]``."""
        of_query, of_key = self.first.weight.chunk(2, 1)
        return F.linear(self.query(q), of_query, self.first.bias), F.linear(self.key(k), of_key)

    def scale(self, width: int) -> float | None:
        return None

    def tile(self, q: Tensor, k: Tensor) -> Tensor:
        hidden = [torch.relu(q[..., a, None] + k[..., None, :, a]) for a in range(q.shape[-1])]
        total = torch.zeros((), dtype=q.dtype, device=q.device)
        for row, bias, factor in zip(self.second.weight, self.second.bias, self.third.weight[0], strict=True):
            unit = sum((weight * x for weight, x in zip(row, hidden, strict=True)), bias)
            total = total + factor * torch.relu(unit)
        return total


class NeuralAttention(LayerSystem):
    """Settings: ``inner``, the width to which heads are reduced (d' in the paper); ``causal``."""

    slug = "neural-attention"
    title = "Neural Attention"
    paper = "https://arxiv.org/abs/2502.17206"
    code = "https://github.com/awayfromzel/neural-attention-research"
    promises = Promises(unit_rows=True, hosts=())

    def __init__(self, inner: int = 2, causal: bool = True):
        self.inner, self.causal = inner, causal

    def layer(self, place: Place) -> nn.Module:
        """The program, for a MultiHead."""
        return self.program(place.width // place.heads)

    def program(self, head_width: int) -> Attention:
        """Softmax over a fresh perceptron's scores of heads of this width."""
        return Attention(Perceptron(head_width, self.inner), masks.Causal() if self.causal else masks.Full())

    def claim(self) -> ClaimNumbers:
        """A task whose scores are no dot products, the perplexity of small language models, and the time."""
        from ...study.claims import interleaved
        from ...study.trainer import Recipe, Setup, Task, accuracy, compare, compete, labelled

        task = Task(_nearest, labelled, lambda: [next(_nearest(999, 2000))], accuracy, "accuracy")
        full = NeuralAttention(INNER, causal=False)
        readers = {"dot": lambda: Reader(Attention()), "neural": lambda: Reader(full.program(WIDTH))}
        read = compete(readers, task, Recipe(steps=1500))

        setup, plain = Setup(steps=100, seeds=(0, 1)), Attention(mask=masks.Causal())
        width = setup.width // setup.heads
        models = {"dot": lambda s, layer: plain, "neural": lambda s, layer: plain if layer else self.program(width)}
        text = compare(models, setup)
        excess = text.excess("neural", "dot")
        perplexity = float(torch.tensor(excess.mean).exp()) - 1

        q, k, v = torch.randn(3, 1, 8, 1024, 64, generator=torch.Generator().manual_seed(0)).unbind(0)
        programs = {"dot": plain, "neural": self.program(64)}
        with torch.no_grad():
            cost = interleaved({n: partial(attention, q, k, v, spec) for n, spec in programs.items()}, 7)
        slower = cost.ratio("neural", "dot")
        return ClaimNumbers.decide(
            read.numbers() | text.numbers()
            | {"excess_loss": round(excess.mean, 4), "excess_error": round(excess.error, 4),
               "perplexity_change": round(perplexity, 4), "slowdown_1024": round(slower, 2)},
            f"To read the class of the nearest of {KEYS} numbers, one neural head learns with {read.mean('neural'):.1%}"
            f" accuracy, one of dot products with {read.mean('dot'):.1%}. With the first of {setup.layers} layers"
            f" neural, perplexity on prose changes by {perplexity:+.1%} (loss {excess.mean:+.4f} nats per byte,"
            f" standard error {excess.error:.4f}, from {text.mean('dot'):.4f}). At 1024 tokens it takes {slower:.1f}"
            " times as long.",
            task_solved=read.mean("neural") >= SOLVED,
            dot_product_fails=read.mean("dot") < SOLVED,
            perplexity_lower_by_two_percent=perplexity <= -LOWER,
        )  # fmt: skip


class Reader(nn.Module):
    """One head and nothing that is not linear around it: queries ``[B, Q, 2]`` read keys ``[B, M, 2 + CLASSES]``."""

    def __init__(self, spec: Attention):
        super().__init__()
        self.queries, self.keys = nn.Linear(2, WIDTH, bias=False), nn.Linear(2 + CLASSES, WIDTH, bias=False)
        self.read, self.head = MultiHead(spec, WIDTH, 1), nn.Linear(WIDTH, CLASSES)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Logits ``[B, Q, CLASSES]``."""
        return self.head(self.read(self.queries(queries), self.keys(keys)))


def _nearest(seed: int, size: int = 64) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless batches: numbers (and a 1), other numbers with a class each, and the class of the nearest of these."""
    source = torch.Generator().manual_seed(seed)
    while True:
        asked, said = (2 * torch.rand(2, size, KEYS, 1, generator=source) - 1).unbind(0)
        classes = torch.randint(CLASSES, (size, KEYS), generator=source)
        labels = classes.gather(1, (asked - said.mT).abs().argmin(-1))
        one = torch.ones_like(asked)
        yield torch.cat([asked, one], -1), torch.cat([said, one, F.one_hot(classes, CLASSES)], -1), labels
