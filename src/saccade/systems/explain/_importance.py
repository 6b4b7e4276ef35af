"""Importance of words for what a model says, by attention or by gradients: the measures of :mod:`.recursive_roar`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.stats import Rows
from ...hosts.handles import watch
from ._classifier import Classifier

Measure = Literal["attention", "gradient", "input x gradient", "integrated gradient", "random"]
Logits = Callable[[Tensor], Tensor]
"""From embeddings ``[B, N, width]`` to logits ``[B, classes]``."""


def of_model(model: Any, tokens: Tensor, measure: Measure, samples: int = 20) -> Tensor:
    """Importance ``[B, N]`` of a prompt for the likeliest next token of a model of transformers.

    Attention is the last query's, in all layers and heads.
    """
    embed = model.get_input_embeddings()

    def logits(embedded: Tensor) -> Tensor:
        return model(inputs_embeds=embedded, use_cache=False).logits[:, -1]

    with torch.no_grad(), watch(model, Rows([-1])) as watching:
        best = logits(embed(tokens)).argmax(-1)
    rows = [watching.seen[site.path]["rows"][:, :, 0].mean(1) for site in watching.sites]
    return _by(measure, tokens, torch.stack(rows).mean(0), logits, embed, best, samples)


def of_classifier(model: Classifier, tokens: Tensor, labels: Tensor, measure: Measure, samples: int = 20) -> Tensor:
    """Importance ``[B, N]`` of tokens for their labels ``[B]``, by a small classifier."""
    attention = model.read(tokens).weights.detach()
    return _by(measure, tokens, attention, model.of_embeddings(tokens), model.embed, labels, samples)


def _by(
    measure: Measure, tokens: Tensor, attention: Tensor, logits: Logits, embed: Any, labels: Tensor, samples: int
) -> Tensor:
    """By the measure, from the attention to tokens, the logits as a function of embeddings, and what embeds tokens."""
    if measure == "random":
        return torch.rand(tokens.shape, device=tokens.device)
    if measure == "attention":
        return attention
    embedded = embed(tokens)
    if measure == "integrated gradient":
        return integrated(logits, embedded, labels, samples).abs()
    found = gradient(logits, embedded, labels)
    if measure == "gradient":
        return (found @ embed.weight.detach().T).norm(dim=-1)
    return (found * embedded.detach()).sum(-1).abs()


def gradient(logits: Logits, embedded: Tensor, labels: Tensor) -> Tensor:
    """Gradient of the labels' logits ``[B, classes]`` by embeddings ``[B, N, width]``, of which they are a function."""
    at = embedded.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(logits(at).gather(1, labels[:, None]).sum(), at)[0]


def integrated(logits: Logits, embedded: Tensor, labels: Tensor, samples: int = 20) -> Tensor:
    """Integrated gradients from embeddings of zero (arXiv:1703.01365), signed, ``[B, N]``; Captum's."""
    from captum.attr import IntegratedGradients

    # One step at a time, since ``logits`` knows these sentences' lengths.
    found = IntegratedGradients(logits).attribute(
        embedded.detach(), target=labels, n_steps=samples, method="riemann_right", internal_batch_size=len(embedded)
    )
    return found.sum(-1)


def importance(model: Classifier, tokens: Tensor) -> Tensor:
    """Gradient importance ``[B, N]``: length of the gradient of the likeliest class's logit by each embedding."""
    return gradient(model.of_embeddings(tokens), model.embed(tokens), model(tokens).argmax(-1)).norm(dim=-1)


def correlation(model: Classifier, tokens: Tensor) -> Tensor:
    """Pearson's correlation of attention weights and gradient importance over a sentence's words, mean over them."""
    keep = (tokens != 0).double()
    with torch.no_grad():
        pair = [model.read(tokens).weights.double(), importance(model, tokens).double()]
    a, b = ((x - (x * keep).sum(1, True) / keep.sum(1, True)) * keep for x in pair)
    return F.cosine_similarity(a, b, dim=1).mean()
