"""Syntax-guided attention: in the encoder a word sees itself, its head and its dependents, and no other word.

    together[i, j] = (i = j) or (j is the head of i) or (i is the head of j)       by the dependency parse of a sentence
    w[i] = softmax(q[i] . k / sqrt(D)) over the j with together[i, j]

in all heads of all layers; what lies n steps away in the tree arrives after n layers. All layers of the encoder are
one and the same (:func:`shared`), so that it does not matter in which of them a word is met.

Paper: Syntax-Guided Transformers: Elevating Compositional Generalization and Grounding in Multimodal Environments,
    arXiv:2311.04364
Code: https://github.com/HLR/Syntax-Guided-Transformers (reascan/src/utils/parse.py:
    DKStanfordDependencyParser.get_parse_tree_masking; src/components/language.py; share_l_layers in
    src/model_dual.py), masks of both directions, in 6 layers

Differs: no ROOT is put before the sentence (in the official code it sees the root word and itself), and hidden keys
are hidden, not 10000 less likely. The images of the paper, and its co-attention with them, are left out.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...core.attend import attention
from ...core.spec import Attention
from ...nn import EncoderDecoder, Stack
from ...nn.attention import AnyCache, padded
from ...nn.backbones import Place
from ..base import ClaimNumbers, LayerSystem, Promises
from ._structure import Related, translating, translator

TIMES = 4  # that the encoders of the claim use their layer


def dependencies(heads: Tensor) -> Tensor:
    """Which words of each sentence see each other, bool ``[B, N, N]``.

    Args:
        heads: place of each word's head ``[B, N]``; -1: it is the root, less: no word.
    """
    place = torch.arange(heads.shape[1], device=heads.device)
    below = heads[:, :, None] == place
    own = (place[:, None] == place) & (heads >= -1)[:, :, None]
    return below | below.mT | own


def shared(stack: Stack, times: int) -> None:
    """Make a stack do with its first block, so many times."""
    stack.blocks = nn.ModuleList([stack.blocks[0]] * times)


class Guided(Related):
    """Multi-head attention among the tokens that belong together."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, cache: AnyCache | None = None, keep: Tensor | None = None,
        **given: Any,
    ) -> Tensor:  # fmt: skip
        """What the heads read, ``[B, H, N, Dv]``."""
        if self.together is None:
            return super().attend(q, k, v, cache=cache, keep=keep, **given)
        spec = Attention(mask=self.together[:, None])
        return attention(q, k, v, spec if keep is None else padded(spec, keep), **given)


class SyntaxGuided(LayerSystem):
    """No settings. A layer learns of the parse by ``_structure.telling(model, dependencies(heads))``."""

    slug = "syntax-guided"
    title = "Syntax-guided transformer"
    paper = "https://arxiv.org/abs/2311.04364"
    code = "https://github.com/HLR/Syntax-Guided-Transformers"
    promises = Promises(causal=False, decodes=False, unit_rows=True, hosts=())

    def layer(self, place: Place) -> nn.Module:
        """Multi-head attention that heeds a parse."""
        return Guided(place)

    def claim(self) -> ClaimNumbers:
        """Translation of sentences with pairs of words that were never seen together, with and without the parse."""
        from ...study.trainer import Recipe, compete

        task = translating(lambda given: dependencies(given.heads), "train", "test")
        models = {"guided": partial(_translator, Guided), "unmasked": partial(_translator, Related)}
        result = compete(models, task, Recipe(steps=300, seeds=(0, 1)))
        above = result.excess("guided", "unmasked")
        return ClaimNumbers.decide(
            result.numbers() | {"above_unmasked": round(above.mean, 4), "above_error": round(above.error, 4)},
            f"Of the words of sentences with unseen pairs of words, {result.mean('guided'):.2%} are translated right"
            f" where the shared layer of the encoder follows the parse, {result.mean('unmasked'):.2%} where it sees"
            f" every word (difference {above.mean:+.2%}, standard error {above.error:.2%}).",
            above_unmasked=above.mean > 0,
        )


def _translator(encoder: type[Related]) -> EncoderDecoder:
    model = translator(encoder)
    shared(model.encoder, TIMES)
    return model
