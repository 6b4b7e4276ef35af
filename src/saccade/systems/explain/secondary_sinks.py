"""Secondary sinks: tokens that become attention sinks in middle layers, for some of them, beside the first token.

    score[l, j] = mean over heads and queries more than 8 tokens away of the weight that key j gets in layer l
    sink in a layer:  score above ``times`` the mean score of the layer's keys
    primary: the key with the greatest mean score    secondary: another one, for ``least`` layers in a row or more,
        which begins after the primary does; its level is (layer where it begins, number of layers)
    origin: cosine of what the MLP before its first layer adds to it and the hidden state of the primary there

Scores come from a sum over queries that the engine makes tile by tile, so a long prompt needs no matrix.

Paper: On the Existence and Behaviour of Secondary Attention Sinks, arXiv:2512.22213
Code: https://github.com/JeffreyWong20/Secondary-Attention-Sinks (src/hidden_state_base.py, src/mlp_base.py)

Differs: the official code finds sinks by hidden states (cosine to the first token's above 0.9, for more than 4 layers
and fewer than all but 15), here by what they draw, and hidden states confirm it. ``least`` is 2 layers: our models have
six. The official code compares the MLP's output with its output at the first token; here, as the abstract says, with
the direction of the primary sink.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import Unsupported
from ...hosts.handles import Watching, watch
from ...study.atlas import REACH, FarMass
from ..base import ClaimNumbers, MethodSystem
from ._passing import passing
from ._planted_sinks import planted

ALIGNED = 0.9  # cosine from which a direction is the same, as in the official code
LENGTH, TEXTS = 512, 8


@dataclass(frozen=True)
class Sink:
    """A token that draws attention in layers ``first`` to ``first + layers - 1``; mean score in these."""

    key: int
    first: int
    layers: int
    score: float


class SecondarySinks(MethodSystem):
    """Settings: ``times`` the mean score that a sink is above; ``least``, how many layers in a row."""

    slug = "secondary-sinks"
    title = "Secondary attention sinks"
    paper = "https://arxiv.org/abs/2512.22213"
    code = "https://github.com/JeffreyWong20/Secondary-Attention-Sinks"

    def __init__(self, times: float = 10.0, least: int = 2):
        self.times, self.least = times, least

    def apply(self, model: nn.Module) -> Watching:
        """Watch a causal model, which answers as it would; see :meth:`sinks`."""
        return watch(model, FarMass(), kind="self")

    def scores(self, watching: Watching) -> Tensor:
        """Of the first sample of the last forward, ``[layers, keys]``; of the keys that a quarter of it could see."""
        mass = torch.stack([watching[site.path]["far_mass"][0].mean(0) for site in watching.sites])
        could = mass.shape[1] - 1 - REACH - torch.arange(mass.shape[1], device=mass.device)
        judged = could >= mass.shape[1] / 4
        return mass[:, judged] / could[judged]

    def sinks(self, watching: Watching) -> tuple[Sink, list[Sink]]:
        """The primary sink, and the secondary ones by their level."""
        scores = self.scores(watching)
        draws = scores > self.times * scores.mean(1, keepdim=True)
        primary = int(scores.mean(0).argmax())
        runs = {key: self._longest(draws[:, key], scores[:, key], key) for key in draws.any(0).nonzero()[:, 0].tolist()}
        main = runs.pop(primary, Sink(primary, 0, 0, 0.0))
        others = [sink for sink in runs.values() if sink.layers >= self.least and sink.first > main.first]
        return main, sorted(others, key=lambda sink: (sink.first, sink.layers, sink.key))

    def _longest(self, draws: Tensor, scores: Tensor, key: int) -> Sink:
        """The most layers in a row in which a key draws attention."""
        layers = first = run = 0
        for layer, there in enumerate(draws.tolist()):
            run = run + 1 if there else 0
            if run > layers:
                layers, first = run, layer + 1 - run
        return Sink(key, first, layers, float(scores[first : first + layers].mean()))

    @torch.no_grad()
    def origins(self, model: Any, tokens: Tensor, primary: Sink, secondary: list[Sink]) -> list[float]:
        """For each secondary sink of tokens ``[1, N]``, the cosine of the MLP's output and the primary's direction.

        Raises:
            Unsupported: the model's layers have no ``mlp``.
        """
        with self.apply(model) as watching:
            mlps = [f"{site.path.rpartition('.')[0]}.mlp" for site in watching.sites]
        if not {*mlps} <= {path for path, _ in model.named_modules()}:
            raise Unsupported(f"{type(model).__name__} has no mlp beside its attention, where a sink could come from")
        with passing(model, lambda path, module: path in mlps) as passed:
            hidden = model(tokens, output_hidden_states=True, use_cache=False).hidden_states
        pairs = [(passed[mlps[x.first - 1]][1][0, x.key], hidden[x.first][0, primary.key]) for x in secondary]
        return [float(nn.functional.cosine_similarity(added, main, dim=0)) for added, main in pairs]

    def claim(self) -> ClaimNumbers:
        """Sinks planted in the MLPs of a model, and those of three trained models, with their levels and origins."""
        from transformers import AutoModelForCausalLM

        from ... import zoo
        from ...worlds.text import text

        marked = torch.full((1, LENGTH), 9)
        marked[0, 0], marked[0, 40], marked[0, 200] = 1, 2, 3
        levels, origins = self._look(planted(), marked)
        found = levels == [(40, 2, 3), (200, 3, 2)]
        origin = min(origins, default=0.0)
        numbers: dict[str, Any] = {"planted": levels, "planted_origin": round(origin, 3)}
        texts, aligned = 0, []
        for name in ("lm", "lm-small", "lm-tiny"):
            model = AutoModelForCausalLM.from_pretrained(zoo.path(name), dtype=torch.float32).eval()
            seen = [self._look(model, example.tokens[None]) for example in islice(text(LENGTH, "sinks"), TEXTS)]
            numbers[name] = [levels for levels, _ in seen]
            texts += sum(bool(levels) for levels, _ in seen)
            aligned += [cosine for _, cosines in seen for cosine in cosines]
        share = sum(cosine > ALIGNED for cosine in aligned) / len(aligned) if aligned else 0.0
        numbers |= {"texts_with_sinks": texts, "sinks": len(aligned), "aligned": round(share, 3)}
        return ClaimNumbers.decide(
            numbers,
            f"Planted sinks are found at their levels: {'yes' if found else 'no'}, with cosine"
            f" {numbers['planted_origin']} of what their MLPs add to the primary's direction. In {texts} of {3 * TEXTS}"
            f" texts of {LENGTH} bytes trained models have secondary sinks, {len(aligned)} in all; {share:.0%} of them"
            " come from an MLP.",
            planted_are_found=found,
            planted_come_from_the_mlp=origin > ALIGNED,
            trained_models_have_some=texts > 3 * TEXTS / 2,
            these_come_from_the_mlp=share > 0.5,
        )

    @torch.no_grad()
    def _look(self, model: Any, tokens: Tensor) -> tuple[list[tuple[int, int, int]], list[float]]:
        """Levels of the secondary sinks (key, first layer, layers) and their origins."""
        with self.apply(model) as watching:
            model(tokens, use_cache=False)
        primary, secondary = self.sinks(watching)
        levels = [(sink.key, sink.first, sink.layers) for sink in secondary]
        return levels, self.origins(model, tokens, primary, secondary) if secondary else []
