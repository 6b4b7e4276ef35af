"""Masked mixer: every token takes a fixed, learned mixture of the tokens up to it, whatever they say.

    y[i] = sum over j <= i of W[i, j] x[j] + b[i]                        W [length, length], b [length]
    y = concat over heads h of (W[h] (x P[h]) + b[h]), times Wo          of several heads; P[h]: [width, width / heads]

That is a convolution over tokens with as many channels as places and a kernel of one, its weights below the diagonal.
Nothing is selected, so, the paper argues, less of the input is lost: the last states tell it, and serve retrieval.

Paper: Masked Mixers for Language Generation and Retrieval, arXiv:2409.01482
Code: https://github.com/blbadger/maskedmixers (mixer_lm/mixer_trainer_tinystories.py: MixerBlock; src/utilities/
    mixer_models.py: MixerHead; language_mlp_mixer_representation.py; infonce_retrieval.py); W and b start as a
    Conv1d's, uniform in +- length ** -0.5

Differs: weights above the diagonal are never used; theirs are set to zero before each call. Several heads each have a
projection of their own and add up to the width: the official class computes its projections and then mixes what they
were made from. Two convolutions in a row (expand_conv) and a softmax of W are left out. The block around it is ours.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn

from ...core.errors import SpecError
from ...nn import GPT, KVCache
from ...nn.attention import join, split
from ...nn.backbones import Place
from ..base import ClaimNumbers, LayerSystem, Promises
from ._last_states import contrast, found, pairs, tokens_lost

WIDER = 74  # a mixer's width, as large as a transformer of 64 over 64 tokens
PAIRS, CANDIDATES = 16, 64  # of the retrieval


class Mixer(nn.Module):
    """``[B, N, width]`` to ``[B, N, width]``, N up to ``length``."""

    def __init__(self, width: int, length: int, heads: int, causal: bool):
        super().__init__()
        if width % heads:
            raise SpecError(f"masked-mixer: {heads} heads do not divide a width of {width}")
        self.heads, self.causal = heads, causal
        self.weight = nn.Parameter(torch.empty(heads, length, length).uniform_(-(length**-0.5), length**-0.5))
        self.bias = nn.Parameter(torch.empty(heads, length).uniform_(-(length**-0.5), length**-0.5))
        self.into, self.out = (nn.Linear(width, width) if heads > 1 else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, *, cache: KVCache | None = None, keep: Tensor | None = None) -> Tensor:
        """As :class:`saccade.nn.MultiHead`'s. Raises: SpecError past the last place."""
        if keep is not None:
            x = x.masked_fill(~keep[..., None], 0)  # padding is not mixed in
        v = split(self.into(x), self.heads)
        start = 0 if cache is None else cache.length
        if cache is not None:
            _, v = cache.append(v[..., :0], v)  # there are no keys
        stop, length = v.shape[2], self.bias.shape[1]
        if stop > length:
            raise SpecError(f"masked-mixer mixes {length} tokens, and these are {stop}: give length={stop}")
        weight = self.weight[:, start:stop, :stop]
        mixed = (weight.tril(start) if self.causal else weight) @ v
        return self.out(join(mixed + self.bias[:, start:stop, None]))

    def cache(self) -> KVCache:
        """An empty one; it will hold what is mixed."""
        return KVCache()


class MaskedMixer(LayerSystem):
    """Settings: ``length``, the longest sequence; ``heads``; ``causal`` (the mask)."""

    slug = "masked-mixer"
    title = "Masked mixer"
    paper = "https://arxiv.org/abs/2409.01482"
    code = "https://github.com/blbadger/maskedmixers"
    promises = Promises(cross=False, nonnegative=False, hosts=())

    def __init__(self, length: int = 1024, heads: int = 1, causal: bool = True):
        self.length, self.heads, self.causal = length, heads, causal

    def layer(self, place: Place) -> nn.Module:
        """The mixer alone; it needs no positions."""
        return Mixer(place.width, self.length, self.heads, self.causal)

    def claim(self) -> ClaimNumbers:
        """Small language models: their input read back from their last states, and retrieval by these."""
        from ...study.trainer import Recipe, Setup, Task, compete, language
        from ...worlds.text import BOS

        setup = Setup(steps=500, context=64, batch=16, seeds=(0,))
        models = {
            "transformer": partial(GPT, BOS + 1),
            "mixer": partial(GPT, BOS + 1, WIDER, attention=MaskedMixer(setup.context)),
        }
        trained = compete(models, language(setup), setup)
        held = next(pairs(setup.validation, setup.context, 4, "held"))[1]
        lost = {name: tokens_lost(trained.models[name][0], held) for name in models}
        pretrained = {name: partial(copy.deepcopy, trained.models[name][0]) for name in models}
        candidates = [next(pairs(setup.validation, setup.context, CANDIDATES, i)) for i in range(4)]
        retrieval = Task(
            partial(pairs, setup.training, setup.context, PAIRS), contrast, lambda: candidates, found, "retrieved"
        )
        searched = compete(pretrained, retrieval, Recipe(60, 1e-3, (0, 1)))
        gain = searched.excess("mixer", "transformer")
        return ClaimNumbers.decide(
            trained.numbers() | searched.numbers()
            | {f"tokens_lost_{name}": round(share, 4) for name, share in lost.items()}
            | {f"parameters_{name}": trained.parameters(name) for name in models}
            | {"retrieval_gain": round(gain.mean, 4), "retrieval_gain_error": round(gain.error, 4)},
            f"Inputs that gradient descent finds for the last states miss {lost['mixer']:.1%} of tokens with a mixer"
            f" and {lost['transformer']:.1%} with a transformer of as many parameters (loss on prose"
            f" {trained.mean('mixer'):.3f} and {trained.mean('transformer'):.3f}). Of {CANDIDATES} pages the one that"
            f" half its words were taken from is found in {searched.mean('mixer'):.1%} and"
            f" {searched.mean('transformer'):.1%} of cases (difference {gain.mean:+.1%}, standard error"
            f" {gain.error:.1%}).",
            better_reconstruction=lost["mixer"] < lost["transformer"],
            better_retrieval=gain.above,
            equal_size=abs(trained.parameters("mixer") / trained.parameters("transformer") - 1) < 0.02,
        )  # fmt: skip
