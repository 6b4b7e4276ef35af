"""FIT: tokens in groups; local layers inside a group, global layers on a few latents of all groups, by turns.

    per block of ``layers``, such as "(2)4(1)", for tokens x [B T, n, width] and latents z [B, T m, latent_width]:
    x = x + attention(norm(x));        x = x + mlp(norm(x))     local times, in each group
    z = z + attention(norm(z), norm(x of the same group))       groups to latents
    z = z + attention(norm(z));        z = z + mlp(norm(z))     global times, over the latents of all groups
    x = x + attention(norm(x), norm(z of the same group))       latents to groups, but not in the last block

With L tokens in groups of n, a local layer compares L n pairs and a global one (m L / n)²; n = L^(1/3) makes both grow
as L^(4/3). Three forms: an encoder of vectors; a denoiser, whose latents also read a time and conditions in each block;
a decoder of tokens, causal in each group, where a group's latents see those of earlier groups and their own, and
tokens read the latents of the group before.

Paper: FIT: Far-reaching Interleaved Transformers, arXiv:2305.12689
Code: https://github.com/google-research/pix2seq (architectures/transformers.py: FIT, FITDenoiser, FITAR)

Differs: learned positions only; no dropout; extra tokens beside each group (``y``), perceptrons in the denoiser's cross
attention, an output embedding of its own and a second feature of the time are left out. ``layers`` is the example of
the official code, which gives no other sizes: those here are small. How the paper words its rule for the size of a
group was not at hand; the rule here is what its exponent asks for. ``build`` gives the attention of a local layer over
tokens that were not grouped.

Blocks are in :mod:`._interleaved`, the three forms in :mod:`._fit_forms`.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import partial

import torch

from ...core import masks
from ...core.errors import SpecError
from ...core.spec import Attention
from ..base import ClaimNumbers, Promises, System
from ._fit_forms import Decoder, Denoiser, Encoder

LENGTHS = 512, 4096, 32768  # of the claim, whose work is counted
SLACK, MARGIN, PARITY = 0.05, 0.1, 0.02  # allowed of the exponent, asked above the blind, allowed below dense


def group_size(length: int) -> int:
    """The divisor of a length nearest to its cube root."""
    return min((n for n in range(1, length + 1) if length % n == 0), key=lambda n: abs(n - length ** (1 / 3)))


class FIT(System):
    """Settings: ``layers``, "(local)global" for each block, the last without global layers if it ends with a bracket;
    ``group``, tokens of a group; ``latents`` of a group; ``width`` and ``heads`` of tokens and of latents; ``form``
    "encoder", "denoiser" or "decoder"; ``ordered``: a group's latents do not see those of later groups (always so in
    the decoder).
    """

    slug = "fit"
    title = "FIT (far-reaching interleaved transformer)"
    paper = "https://arxiv.org/abs/2305.12689"
    code = "https://github.com/google-research/pix2seq"
    promises = Promises(exponent=1.0, unit_rows=True, hosts=())

    def __init__(
        self, layers: str = "(2)4(2)", group: int = 16, latents: int = 2, width: int = 128, latent_width: int = 256,
        heads: int = 4, latent_heads: int = 8, form: str = "encoder", ordered: bool = False,
    ):  # fmt: skip
        self.layers, self.group, self.latents, self.form, self.ordered = layers, group, latents, form, ordered
        self.width, self.latent_width, self.heads, self.latent_heads = width, latent_width, heads, latent_heads

    def promised(self) -> Promises:
        """Causal, and so able to decode, as a decoder."""
        return replace(self.promises, causal=self.form == "decoder", decodes=self.form == "decoder")

    def build(self, heads: int) -> Attention:
        """A local layer's program: a token sees its own group, as a decoder up to itself. Raises: SpecError."""
        if self.form not in ("encoder", "denoiser", "decoder"):
            raise SpecError(f'FIT: form must be "encoder", "denoiser" or "decoder"; got {self.form!r}')
        inside = masks.Blocks(self.group)
        return Attention(mask=masks.Causal() & inside if self.form == "decoder" else inside)

    def encoder(self, inputs: int, groups: int) -> Encoder:
        """From ``[B, groups, group, inputs]`` to tokens and latents."""
        return Encoder(self, inputs, groups)

    def denoiser(self, inputs: int, conditions: int, groups: int) -> Denoiser:
        """From ``[B, groups, group, inputs]``, a time and conditions to the same shape."""
        return Denoiser(self, inputs, conditions, groups)

    def decoder(self, vocabulary: int, groups: int) -> Decoder:
        """From tokens ``[B, groups, group]`` to the logits of what follows each."""
        return Decoder(self, vocabulary, groups)

    def claim(self) -> ClaimNumbers:
        """Growth of the attention's work under the rule; quality and time beside dense where far patches matter."""
        from ...study.claims import interleaved
        from ...study.measure import attention_work
        from ._far_spots import BLIND, LATENTS, LAYERS, SIDE, Classifier, images, taught

        work = {}
        for length in LENGTHS:
            n = group_size(length)
            model = FIT(LAYERS, n, LATENTS, 16, 16, 2, 2).encoder(3, length // n)
            work[length] = attention_work(model, torch.zeros(1, length // n, n, 3))
        slope = math.log(work[LENGTHS[-1]] / work[LENGTHS[-2]]) / math.log(LENGTHS[-1] / LENGTHS[-2])
        models = {"fit": Classifier(grouped=True), "dense": Classifier(grouped=False)}
        right = {name: taught(model) for name, model in models.items()}
        pixels = images(8, torch.Generator().manual_seed(2))[0]
        with torch.no_grad():
            ratio = interleaved({name: partial(model, pixels) for name, model in models.items()}).ratio("dense", "fit")
        return ClaimNumbers.decide(
            {
                "attention_work": {str(length): count for length, count in work.items()},
                "exponent": round(slope, 3),
                "accuracy_fit": round(right["fit"], 4),
                "accuracy_dense": round(right["dense"], 4),
                "accuracy_from_one_spot": BLIND,
                "dense_time_over_fit": round(ratio, 2),
            },
            f"With groups of L^(1/3) the attention's work grows as L^{slope:.3f} up to L={LENGTHS[-1]}. Images of"
            f" {SIDE * SIDE} patches, to be classed by the colours of two far spots: {right['fit']:.1%} right, a"
            f" dense transformer of as many layers {right['dense']:.1%} ({BLIND:.1%} from one spot);"
            f" its forward pass takes {ratio:.1f} times as long.",
            exponent_of_four_thirds=slope <= 4 / 3 + SLACK,
            far_patches_are_used=right["fit"] > BLIND + MARGIN,
            dense_quality=right["fit"] >= right["dense"] - PARITY,
        )

    def blocks(self) -> list[tuple[int, int]]:
        """Local and global layers of each block. Raises: SpecError if ``layers`` cannot be read."""
        text = self.layers + "0" * self.layers.endswith(")")
        found = [(int(a), int(b)) for a, b in re.findall(r"\((\d+)\)(\d+)", text)]
        if not re.fullmatch(r"(\(\d+\)\d+)+", text) or not all(b for _, b in found[:-1]):
            raise SpecError(
                f'FIT: layers must be like "(2)4(2)", global layers in all blocks but the last; got {text!r}'
            )
        return found
