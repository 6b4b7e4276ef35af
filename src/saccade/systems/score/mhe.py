"""Multi-head embedding attention: one projection for all heads, which differ by an embedding each.

    Q, K, V = x Wq, x Wk, x Wv                     one head's width d each
    mul     q[h] = Q * (1 + e_q[h]), and k[h] and v[h] alike
    add     q[h] = Q + e_q[h],       and k[h] and v[h] alike
    y = sum over heads of softmax(q[h] . k[h] / sqrt(d)) v[h] Wo[h]

So n heads cost 3 n d parameters more than one, where separate projections cost 3 (n - 1) n d².

Paper: Pit One Against Many: Leveraging Attention-head Embeddings for Parameter-efficient Multi-head Attention,
    arXiv:2310.07911
Code: https://github.com/HUIYINXUE/simpleMHE holds a title and no code

Differs: from what the embeddings start is not known to us; here they are embeddings to :mod:`saccade.nn.init` (normal,
deviation 0.02 in GPT and Encoder), as BERT's position embeddings, which gave the paper its idea. The output projection
keeps one matrix per head, as in the paper's counts. The cache holds the keys and values of every head: the paper saves
parameters, not cache.
"""

from __future__ import annotations

import statistics
from itertools import islice
from typing import Literal

import torch
from torch import Tensor, nn

from ...core import masks
from ...core.errors import SpecError
from ...core.spec import Attention
from ...nn import MultiHead
from ...nn.backbones import Place
from ..base import ClaimNumbers, LayerSystem, Promises
from ._projections import contest

Kind = Literal["mul", "add"]
RETAINED = 0.95  # share of the accuracy of multi-head attention that "high retention" must keep


class HeadEmbeddings(MultiHead):
    """Multi-head attention with shared projections and an embedding of each head in queries, keys and values."""

    def __init__(self, spec: nn.Module, width: int, heads: int, kind: Kind, positions: nn.Module | None = None):
        super().__init__(spec, width, heads, positions=positions)
        self.q, self.k, self.v = (nn.Linear(width, self.head_width, bias=False) for _ in "qkv")
        self.embeddings = nn.ModuleList(nn.Embedding(heads, self.head_width) for _ in "qkv")
        self.kind = kind

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[B, heads, N, D]``."""
        shared = self.q(x), self.k(context), self.v(context)
        embeddings = (table.get_parameter("weight")[:, None] for table in self.embeddings)
        q, k, v = (self._headed(a[:, None], e) for a, e in zip(shared, embeddings, strict=True))
        return q, k, v

    def _headed(self, shared: Tensor, embedding: Tensor) -> Tensor:
        """``[B, 1, N, D]`` and ``[heads, 1, D]`` to ``[B, heads, N, D]``."""
        return shared * (1 + embedding) if self.kind == "mul" else shared + embedding


class MHE(LayerSystem):
    """Settings: ``kind``, how an embedding changes the shared projection: ``"mul"`` or ``"add"``; ``causal``."""

    slug = "mhe"
    title = "Multi-head embedding attention"
    paper = "https://arxiv.org/abs/2310.07911"
    code = "https://github.com/HUIYINXUE/simpleMHE"
    promises = Promises(unit_rows=True, hosts=())

    def __init__(self, kind: Kind = "mul", causal: bool = True):
        if kind not in ("mul", "add"):
            raise SpecError(f'mhe: kind must be "mul" or "add"; got {kind!r}')
        self.kind, self.causal = kind, causal

    def layer(self, place: Place) -> nn.Module:
        """Multi-head attention with shared projections."""
        spec = Attention(mask=masks.Causal() if self.causal else masks.Full())
        return HeadEmbeddings(spec, place.width, place.heads, self.kind, place.positions)

    def claim(self) -> ClaimNumbers:
        """The count of parameters, and the share of multi-head attention's next-byte accuracy that stays."""
        from ...study.trainer import Setup, accuracy, batches

        setup = Setup(steps=120)
        n, d = setup.heads, setup.width // setup.heads
        result = contest({"mha": None, "mul": MHE("mul"), "add": MHE("add")}, setup)
        held = [(x[:, :-1], x[:, 1:]) for x in islice(batches(setup.validation, setup, 10_000), 4)]
        with torch.no_grad():
            right = {
                name: statistics.fmean(float(accuracy(model, x)) for model in models for x in held)
                for name, models in result.models.items()
            }
        saved = (result.parameters("mha") - result.parameters("mul")) / setup.layers
        retained = {kind: right[kind] / right["mha"] for kind in ("mul", "add")}
        return ClaimNumbers.decide(
            result.numbers()
            | {f"accuracy_{name}": round(value, 4) for name, value in right.items()}
            | {"parameters_saved_per_layer": saved},
            f"{n} heads of {d} save {saved:.0f} parameters a layer; of the {right['mha']:.1%} of next bytes that"
            f" multi-head attention tells, embeddings that multiply keep {retained['mul']:.1%} and embeddings that add"
            f" {retained['add']:.1%}.",
            parameters_as_counted=saved == (3 * n * n - 3 * n) * d * d - 3 * n * d,
            retained_by_mul=retained["mul"] >= RETAINED,
            retained_by_add=retained["add"] >= RETAINED,
        )
