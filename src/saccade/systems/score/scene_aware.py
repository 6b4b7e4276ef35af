"""Scene-aware attention: a head of the encoder, or of cross-attention, that is told what happens in which scene.

    together[i, j]: tokens i and j share a scene (a verb and those who take part, as in UCCA); a token may have several
    SASA, a head of the encoder:         w[i] = softmax(q[i] . k / sqrt(D)) * together[i]
    SACrA, a head of cross-attention:    key[j] = sum over i of together[j, i] memory[i, head's coordinates] / N

The other heads are as ever, and there are no new parameters (SACrA's head needs none for its keys).

Paper: Semantics-aware Attention Improves Neural Machine Translation, arXiv:2110.06920
Code: https://github.com/lovodkin93/nematus (branch "generation", nematus/transformer.py: encode, decode_at_train;
    transformer_attention_modules.py: _subtitute_heads)

Differs: the paper, by a summary of it (its text was not at hand), masks SASA's head after the softmax, as here; the
code at hand adds -1e9 before it, so that rows sum to one. N counts the words of a sentence; the code counts padding
too. A token without a scene gives such a head nothing. By default SASA is in the last layer, as in the paper (the
fourth of four), and SACrA in all but the first and the last (the second and third), of three or less in the last.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...core import edits
from ...core.attend import attention
from ...core.errors import SpecError
from ...core.spec import Attention
from ...nn.attention import AnyCache, padded, split
from ...nn.backbones import Place
from ..base import ClaimNumbers, LayerSystem, Promises
from ._structure import Related, translating, translator

LAYERS = 2


def same_scene(scenes: Tensor) -> Tensor:
    """Which tokens share a scene, bool ``[B, N, N]``, of scenes bool ``[B, scenes, N]``."""
    return (scenes.mT.float() @ scenes.float()) > 0


class SceneSelf(Related):
    """Self-attention whose first ``heads_told`` heads keep the weights within a scene alone (SASA)."""

    def __init__(self, place: Place, heads_told: int):
        super().__init__(place)
        self.heads_told = heads_told

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, cache: AnyCache | None = None, keep: Tensor | None = None,
        **given: Any,
    ) -> Tensor:  # fmt: skip
        """What the heads read, ``[B, H, N, Dv]``."""
        together = self.together
        if together is None:
            return super().attend(q, k, v, cache=cache, keep=keep, **given)

        def elsewhere(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (h < self.heads_told) & ~together[b, q, k]

        spec = Attention(edits=[edits.Zero(elsewhere)])
        return attention(q, k, v, spec if keep is None else padded(spec, keep), **given)


class SceneCross(Related):
    """Cross-attention; the keys of its first ``heads_told`` heads are sums of what shares a scene (SACrA)."""

    def __init__(self, place: Place, heads_told: int):
        super().__init__(place)
        self.heads_told = heads_told

    def options(self, context: Tensor) -> dict[str, Any]:
        """The memory too."""
        return {**super().options(context), "memory": context}

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, cache: AnyCache | None = None, keep: Tensor | None = None,
        **given: Any,
    ) -> Tensor:  # fmt: skip
        """What the heads read, ``[B, H, N, Dv]``."""
        memory: Tensor = given.pop("memory")
        if self.together is not None:
            words = memory.shape[1] if keep is None else keep.sum(1)[:, None, None]
            scenes = split(self.together.to(memory.dtype) @ memory / words, self.heads)
            k = torch.cat([scenes[:, : self.heads_told], k[:, self.heads_told :]], 1)
        return super().attend(q, k, v, cache=cache, keep=keep, **given)


class SceneAware(LayerSystem):
    """Settings: ``cross``, SACrA and not SASA; ``heads`` that are told; ``layers`` that have them, counted from 0
    (``None``: see above). A layer learns of the scenes by ``_structure.telling(model, same_scene(scenes))``."""

    slug = "scene-aware"
    title = "Scene-aware attention (SASA, SACrA)"
    paper = "https://arxiv.org/abs/2110.06920"
    code = "https://github.com/lovodkin93/nematus"
    promises = Promises(causal=False, decodes=False, hosts=())

    def __init__(self, cross: bool = False, heads: int = 1, layers: tuple[int, ...] | None = None):
        self.cross, self.heads, self.layers = cross, heads, layers

    def layer(self, place: Place) -> nn.Module:
        """Multi-head attention, of which some heads heed scenes in some layers. Raises: SpecError."""
        if not 1 <= self.heads <= place.heads:
            raise SpecError(f"scene-aware: heads must lie in 1..{place.heads}, the layer's; got {self.heads}")
        middle = tuple(range(1, place.layers - 1))
        chosen = self.layers or (middle if self.cross and len(middle) > 1 else (place.layers - 1,))
        if place.index not in chosen:
            return Related(place)
        return (SceneCross if self.cross else SceneSelf)(place, self.heads)

    def claim(self) -> ClaimNumbers:
        """Translation of sentences with several scenes: loss with SASA, with SACrA and without."""
        from ...study.trainer import Recipe, compete

        task = translating(lambda given: same_scene(given.scenes), measure="loss")
        models = {
            "plain": partial(translator, layers=LAYERS),
            "sasa": partial(translator, self.layer, layers=LAYERS),
            "sacra": partial(translator, cross=SceneAware(cross=True).layer, layers=LAYERS),
        }
        result = compete(models, task, Recipe(steps=250, seeds=(0, 1)))
        excess = {name: result.excess(name, "plain") for name in ("sasa", "sacra")}
        return ClaimNumbers.decide(
            result.numbers() | {f"excess_{name}": [round(x.mean, 4), round(x.error, 4)] for name, x in excess.items()},
            f"With one of 4 heads told the scenes, the loss of translations differs by {excess['sasa'].mean:+.4f} nats"
            f" per word (standard error {excess['sasa'].error:.4f}) with SASA and {excess['sacra'].mean:+.4f}"
            f" ({excess['sacra'].error:.4f}) with SACrA from {result.mean('plain'):.4f} without.",
            sasa_improves=excess["sasa"].mean < 0,
            sacra_improves=excess["sacra"].mean < 0,
        )
