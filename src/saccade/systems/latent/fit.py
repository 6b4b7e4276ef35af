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
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core import masks
from ...core.errors import SpecError
from ...core.spec import Attention
from ..base import ClaimNumbers, Promises, System
from ._layers import Layer, perceptron

EPS = 1e-6
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


class Block(nn.Module):
    """Local layers, and unless there are no global ones: read, heed conditions, global layers, write if not last."""

    def __init__(self, system: FIT, local: int, total: int, causal: bool, conditions: bool, last: bool):
        super().__init__()
        wide, deep = system.width, system.latent_width
        own = partial(Layer, activation=nn.GELU(), eps=EPS)
        cross = partial(
            own, heads=min(system.heads, system.latent_heads), spec=Attention(), inner=min(wide, deep), widen=0
        )
        inside = Attention(mask=masks.Causal() if causal else None)
        among = Attention(mask=masks.Causal() | masks.Blocks(system.latents) if causal or system.ordered else None)
        self.causal = causal
        self.local = nn.ModuleList([own(wide, system.heads, inside) for _ in range(local)])
        self.read = cross(deep, source=wide) if total else None
        told = partial(cross, heads=system.latent_heads, inner=deep)
        self.heed = told(deep, source=deep) if total and conditions else None
        self.among = nn.ModuleList([own(deep, system.latent_heads, among) for _ in range(total)])
        self.write = None if last else cross(wide, source=deep)

    def forward(self, x: Tensor, z: Tensor, conditions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens ``[B T, n, width]`` and latents ``[B, T, m, latent_width]`` after this block."""
        for layer in self.local:
            x = layer(x)
        if self.read is None:
            return x, z
        shape = z.shape
        z = self.read(z.flatten(0, 1), x).view(shape).flatten(1, 2)
        if self.heed is not None:
            z = self.heed(z, conditions)
        for layer in self.among:
            z = layer(z)
        z = z.view(shape)
        if self.write is not None:
            # a group's latents have read its last tokens: as a decoder, only later groups may read them
            before = F.pad(z[:, :-1], (0, 0, 0, 0, 1, 0)) if self.causal else z
            x = self.write(x, before.flatten(0, 1))
        return x, z


class Trunk(nn.Module):
    """What the three forms share: positions, latents and blocks."""

    def __init__(self, system: FIT, groups: int, form: str):
        super().__init__()
        self.places = nn.Parameter(torch.empty(system.group, system.width))
        self.latents = nn.Parameter(torch.empty(groups, system.latents, system.latent_width))
        blocks = system.blocks()
        self.blocks = nn.ModuleList(
            [
                Block(system, local, total, form == "decoder", form == "denoiser", i == len(blocks) - 1)
                for i, (local, total) in enumerate(blocks)
            ]
        )
        self.norm = nn.LayerNorm(system.width, EPS)

    def initialize(self) -> None:
        """Weights as Keras draws them: uniform, for heads by its count of a kernel of three dimensions; no biases."""
        self.apply(_initialize)
        for drawn in (self.places, self.latents):
            _cut_normal(drawn)

    def run(self, x: Tensor, more: Tensor | float = 0, conditions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Normed tokens ``[B, T, n, width]`` and latents ``[B, T, m, latent_width]``, to which ``more`` is added."""
        expected = (len(self.latents), *self.places.shape)
        if x.shape[1:] != expected:
            raise SpecError(f"FIT: expected [B, groups, group, width] = [B, {expected}]; got {tuple(x.shape)}")
        groups = x.shape[:2]
        x = (x + self.places).flatten(0, 1)
        z = (self.latents + more).expand(groups[0], *self.latents.shape)
        for block in self.blocks:
            x, z = block(x, z, conditions)
        return self.norm(x).unflatten(0, groups), z


class Encoder(Trunk):
    """The form that reads vectors."""

    def __init__(self, system: FIT, inputs: int, groups: int):
        super().__init__(system, groups, "encoder")
        self.stem = nn.Sequential(nn.Linear(inputs, system.width), nn.LayerNorm(system.width, EPS))
        self.norm_latents = nn.LayerNorm(system.latent_width, EPS)
        self.initialize()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens ``[B, T, n, width]`` and latents ``[B, T, m, latent_width]`` of ``[B, T, n, inputs]``."""
        x, z = self.run(self.stem(x))
        return x, self.norm_latents(z)


class Denoiser(Trunk):
    """The form that takes noise out of vectors, told a time and conditions, and by its latents of the step before."""

    def __init__(self, system: FIT, inputs: int, conditions: int, groups: int):
        super().__init__(system, groups, "denoiser")
        width = system.latent_width
        self.stem = nn.Sequential(nn.Linear(inputs, system.width), nn.LayerNorm(system.width, EPS))
        self.time = nn.Sequential(nn.Linear(width // 4, width), nn.SiLU(), nn.Linear(width, width))
        self.conditions = nn.Linear(conditions, width)
        self.previous, self.norm_previous = perceptron(width, 4, nn.GELU(), EPS), nn.LayerNorm(width, EPS)
        self.out = nn.Linear(system.width, inputs)
        self.initialize()
        nn.init.zeros_(self.norm_previous.weight)

    def forward(
        self, x: Tensor, time: Tensor, conditions: Tensor, previous: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Output ``[B, T, n, inputs]``, and latents for the next call; time ``[B]``, conditions ``[B, S, C]``."""
        clock = self.time(_clock(1000 * time, self.latents.shape[-1] // 4))
        told = torch.cat([clock[:, None], self.conditions(conditions)], 1)
        old = torch.zeros_like(self.latents) if previous is None else previous
        x, z = self.run(self.stem(x), self.norm_previous(old + self.previous(old)), told)
        return self.out(x), z


class Decoder(Trunk):
    """The form that says the next token, groups one after the other."""

    def __init__(self, system: FIT, vocabulary: int, groups: int):
        super().__init__(system, groups, "decoder")
        self.embed = nn.Embedding(vocabulary, system.width)
        self.bias = nn.Parameter(torch.empty(vocabulary))
        self.initialize()
        for drawn in (self.embed.weight, self.bias):
            _cut_normal(drawn)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, T, n, vocabulary]`` of what follows each of the tokens ``[B, T, n]``."""
        return self.run(self.embed(tokens))[0] @ self.embed.weight.T + self.bias


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    if isinstance(module, Layer):
        for part in (module.q, module.k, module.v):
            bound = math.sqrt(6 / (part.in_features * (module.heads + part.out_features // module.heads)))
            nn.init.uniform_(part.weight, -bound, bound)
        bound = math.sqrt(6 / (module.out.in_features + module.heads * module.out.out_features))
        nn.init.uniform_(module.out.weight, -bound, bound)


def _cut_normal(x: Tensor) -> None:
    nn.init.trunc_normal_(x, std=0.02, a=-0.04, b=0.04)


def _clock(time: Tensor, width: int) -> Tensor:
    """Sines, then cosines, of times ``[B]``, ``[B, width]``, each row of mean 0 and deviation 1."""
    angle = time[:, None] * 10_000.0 ** (-torch.arange(0, width, 2, device=time.device) / width)
    code = torch.cat([angle.sin(), angle[:, : width // 2].cos()], -1)
    return (code - code.mean(-1, keepdim=True)) / code.std(-1, correction=0, keepdim=True)


def attention_work(model: nn.Module, *inputs: Tensor) -> int:
    """Operations of the products of scores and of values in every attention of a model, hidden pairs included."""
    total = 0

    def count(spec: nn.Module, given: tuple[Tensor, Tensor, Tensor], out: Tensor) -> None:
        nonlocal total
        q, k, v = given
        total += 2 * q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])

    hooks = [part.register_forward_hook(count) for part in model.modules() if isinstance(part, Attention)]
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return total
