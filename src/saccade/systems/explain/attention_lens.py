"""Attention Lens: what each attention head says, in tokens, by a linear map that is learned for it.

    out[h] = z[h] Wo[h]                                  what head h adds to the stream, [N, width]
    lens[h] = out[h] W[h] + b[h]                         its tokens, [N, V];  W[h] = unembedding, b[h] = 0 at first
    loss = KL(softmax(logits) || softmax(sum_h lens[h]))

The lenses of a layer learn together: their sum is to say what the whole model says. The model stays as it is.

Paper: Attention Lens: A Tool for Mechanistically Interpreting the Attention Head Information Retrieval Mechanism,
    arXiv:2310.16270
Code: https://github.com/msakarvadia/AttentionLens (attention_lens/lens/registry/lensA.py,
    attention_lens/train/lightning_lens.py: kl_loss; Adam, rate 1e-3)

Differs: every position of a text trains the lenses, where the official code takes a text's last. Lenses of all layers
learn in one go, each from its own loss. The official bias is the unembedding's, which in GPT-2 is zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from ...worlds.text import Example, heldout
from ..base import ClaimNumbers, MethodSystem
from ._heads import heads, pairs, projections
from .retrieval_heads import retrieval_heads, retrieval_scores

SAYS = 0.5  # of the tests: the lens of a head that copies says the token that is copied
SPECIALISED = 0.5  # others' lenses say it at most this share as often


class AttentionLens(MethodSystem):
    """Settings: ``layers``, as for :func:`saccade.install`, whose heads are read (``None``: all)."""

    slug = "attention-lens"
    title = "Attention Lens"
    paper = "https://arxiv.org/abs/2310.16270"
    code = "https://github.com/msakarvadia/AttentionLens"

    def __init__(self, layers: Any = None):
        self.layers = layers

    @contextmanager
    def apply(self, model: nn.Module) -> Iterator[dict[int, Tensor]]:
        """Read a model, which answers as it would: by layer, what its heads added ``[B, N, H, width]``, last call.

        Raises:
            SpecError: the model has no such layer.
            Unsupported: its attention has no ``o_proj``.
        """
        seen: dict[int, Tensor] = {}
        into = {site.layer: projection.weight for site, projection in projections(model, self.layers)}

        def read(layer: int, z: Tensor) -> None:
            seen[layer] = torch.einsum("bnhd,whd->bnhw", z, into[layer].unflatten(1, z.shape[-2:]))

        with heads(model, read, self.layers):
            yield seen

    def train(self, model: Any, batches: Iterable[Tensor], rate: float = 1e-3) -> dict[int, Lens]:
        """Lenses by layer, after a step of Adam for each batch of token ids ``[B, N]``."""
        unembed = model.get_output_embeddings()
        lenses = {site.layer: Lens(unembed, site.heads) for site, _ in projections(model, self.layers)}
        solver = torch.optim.Adam([p for lens in lenses.values() for p in lens.parameters()], rate)
        for tokens in batches:
            solver.zero_grad()
            torch.stack([*self.losses(model, lenses, tokens).values()]).sum().backward()
            solver.step()
        return lenses

    def losses(self, model: Any, lenses: dict[int, Lens], tokens: Tensor) -> dict[int, Tensor]:
        """Of each layer's lenses on texts ``[B, N]``, in nats, the mean over all positions."""
        with torch.no_grad(), self.apply(model) as seen:
            logits = model(tokens, use_cache=False).logits
        return {layer: divergence(logits, lens(seen[layer]).sum(-2)) for layer, lens in lenses.items()}

    def claim(self) -> ClaimNumbers:
        """Lenses learned on needles in prose; what they say at the first digit of others, head by head."""
        from ...study import probes
        from ...worlds.recall import needle

        model, half = probes.embedded(), len(heldout()) // 2
        pages = needle(192, "lens", haystack=heldout()[:half], needles=3)
        lenses = self.train(model, (torch.stack([e.tokens for e in islice(pages, 6)]) for _ in range(100)))
        tests = list(islice(needle(192, "test", haystack=heldout()[half:]), 48))
        held_out = torch.stack([e.tokens for e in tests])
        plain = {layer: Lens(model.get_output_embeddings(), lens.heads) for layer, lens in lenses.items()}
        with torch.no_grad():
            before, after = (
                [float(x) for x in self.losses(model, some, held_out).values()] for some in (plain, lenses)
            )
        rates = said(self, model, lenses, tests)
        copying = retrieval_heads(retrieval_scores(model, tests[:12]))
        ours = fmean(float(rates[pair]) for pair in copying)
        others = fmean(float(rates[pair]) for pair in pairs(rates) if pair not in copying)
        return ClaimNumbers.decide(
            {"loss_unembedding": [round(x, 3) for x in before], "loss_lens": [round(x, 3) for x in after]}
            | {"copying_heads": [*map(list, copying)], "said_copying": round(ours, 3), "said_others": round(others, 3)}
            | {"said": [[round(x, 3) for x in row] for row in rates.tolist()]},
            f"By layer, lenses are {min(after):.2f} to {max(after):.2f} nats from what the model says, the unembedding"
            f" {min(before):.2f} to {max(before):.2f}. Where a digit is copied, the lenses of the {len(copying)} heads"
            f" that copy say it in {ours:.0%} of the tests, those of the others in {others:.0%}.",
            nearer_than_the_unembedding=all(x < y for x, y in zip(after, before, strict=True)),
            lens_says_what_its_head_copies=ours >= SAYS,
            heads_are_specialised=others <= SPECIALISED * ours,
        )


class Lens(nn.Module):
    """The lenses of one layer: ``[..., H, width]`` to tokens ``[..., H, V]``, at first by the model's unembedding."""

    def __init__(self, unembed: nn.Linear, heads: int):
        super().__init__()
        weight = unembed.weight.detach()
        bias = weight.new_zeros(len(weight)) if unembed.bias is None else unembed.bias.detach()
        self.heads = heads
        self.weight = nn.Parameter(weight.T.repeat(heads, 1, 1))
        self.bias = nn.Parameter(bias.repeat(heads, 1))

    def forward(self, out: Tensor) -> Tensor:
        return torch.einsum("...hw,hwv->...hv", out, self.weight) + self.bias


def divergence(logits: Tensor, lens: Tensor) -> Tensor:
    """Mean KL(p || q) of the model's and the lenses' distributions, from logits ``[..., V]``, in nats."""
    p, q = logits.log_softmax(-1), lens.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


@torch.no_grad()
def said(system: AttentionLens, model: Any, lenses: dict[int, Lens], tests: Sequence[Example]) -> Tensor:
    """How often the token that a head's lens holds most likely is the answer's first, ``[layers, H]``."""
    tokens = torch.stack([e.tokens for e in tests])
    at = torch.tensor([e.answers[-1].start for e in tests])
    rows = torch.arange(len(at))
    with system.apply(model) as seen:
        model(tokens, use_cache=False, logits_to_keep=1)
    told = torch.stack([lens(seen[layer][rows, at - 1]).argmax(-1) for layer, lens in lenses.items()])
    return (told == tokens[rows, at][:, None]).float().mean(1)
