"""Visual analytics of vision transformers: which heads matter, how far they look, and what patterns they make.

With ``p`` what the model says of a picture and ``p_without`` the same with the weights of one head set to zero:

    importance  drop        p[label] - p_without[label]
                divergence  Jensen-Shannon divergence of p and p_without
                flips       share of the pictures of which it says another class
    strength[k] weight of a patch on its k-hop neighbours (k patches away along the farther axis), mean over patches
    pattern     of a head's map of patches by patches: the nearest of some centres of ``encoder(map)``, where
                decoder(encoder(map)) ~ map

A head can be pruned in part: only what the class token reads, or only what the patches read.

Paper: How Does Attention Work in Vision Transformers? A Visual Analytics Attempt, arXiv:2303.13731
Code: none

Differs: only abstract and captions could be had here, so the three metrics, the ring in which hops are counted, the
size of the autoencoder (two layers each way, 8 numbers between them, on centred maps) and the grouping of its codes
(k-means) are ours. The paper's views are linked and answer the mouse; here is one page of figures.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...core.edits import Zero
from ...core.errors import SpecError
from ...hosts.handles import Watching, edit, watch
from ..base import ClaimNumbers, MethodSystem
from ._heads import edited
from ._patches import Hops, Maps
from ._patterns import CODE, learned

METRICS = ("drop", "divergence", "flips")
INTRO = "Importance: layers down, heads across. Strength: heads down, hops across. Patterns: of each patch (down)."


class VitVisualAnalytics(MethodSystem):
    """Settings: ``patterns`` to tell apart; ``prefix``, tokens before the patches; ``columns`` (``None``: a square)."""

    slug = "vit-visual-analytics"
    title = "Visual analytics of attention in vision transformers"
    paper = "https://arxiv.org/abs/2303.13731"

    def __init__(self, patterns: int = 6, prefix: int = 1, columns: int | None = None):
        self.patterns, self.prefix, self.columns = patterns, prefix, columns

    def apply(self, model: nn.Module) -> Watching:
        """Watch a model, which answers as it would; see :meth:`strengths` and :meth:`maps`. Maps hold all weights."""
        return watch(model, Hops(self.columns, self.prefix), Maps(), kind="self")

    @torch.no_grad()
    def importance(self, model: nn.Module, pixels: Tensor, labels: Tensor, part: str = "whole") -> Tensor:
        """Every metric of every head ``[layers, heads, 3]``; ``part`` pruned: "whole", "class" or "patches"."""
        parts = {"whole": None, "class": slice(0, self.prefix), "patches": slice(self.prefix, None)}
        if part not in parts:
            raise SpecError(f"part is one of {', '.join(parts)}; got {part!r}")
        before = says(model, pixels)
        found = []
        with self.apply(model) as watching:
            sites = watching.sites
        for site in sites:
            for head in range(site.heads):
                with edit(model, Zero(queries=parts[part]), layers=site.path, heads=head):
                    found.append(changes(before, says(model, pixels), labels))
        return torch.stack(found).unflatten(0, (-1, site.heads))

    def strengths(self, watching: Watching) -> Tensor:
        """Weight of patches on their neighbours by hops, mean over samples: ``[layers, heads, hops]``."""
        return torch.stack([watching[s.path]["hops"][:, :, self.prefix :].mean((0, 2)) for s in watching.sites])

    def maps(self, watching: Watching) -> Tensor:
        """What patches give to patches ``[layers, B, heads, patches, patches]``."""
        return torch.stack([watching[s.path]["maps"][..., self.prefix :, self.prefix :] for s in watching.sites])

    @torch.no_grad()
    def report(self, model: nn.Module, pixels: Tensor, labels: Tensor) -> tuple[dict[str, Any], Any]:
        """What was found, by name, and a page that shows it (``page.html()``). The first half of maps is trained on."""
        from ...study import plots
        from ...study.page import Page

        if len(pixels) < 2:
            raise SpecError("report: expected at least 2 pictures, one to learn patterns from and one to try them on")
        with self.apply(model) as watching:
            says(model, pixels)
        maps, half = self.maps(watching), len(pixels) // 2
        found: dict[str, Any] = {
            "importance": self.importance(model, pixels, labels),
            "strengths": self.strengths(watching),
            "patterns": learned(maps[:, :half].flatten(0, 2), maps[:, half:].flatten(0, 2), self.patterns),
        }
        pictures = {
            "Head importance": (found["importance"].permute(2, 0, 1), METRICS),
            "Strength by hops": (found["strengths"], [f"layer {site.layer}" for site in watching.sites]),
            "Attention patterns": (found["patterns"].maps, [f"pattern {i}" for i in range(self.patterns)]),
        }
        of = type(model).__name__
        parts = [plots.matrices(*shown, title, f"{title} of {of}") for title, shown in pictures.items()]
        return found, Page("Heads of a vision transformer", INTRO, parts, self.slug, 0.0)

    def claim(self) -> ClaimNumbers:
        """The report of the shipped model: is what it calls important so, and do codes tell its maps?"""
        from transformers import ViTForImageClassification

        from ... import zoo
        from ...worlds.shapes import batch, shapes
        from ...zoo.vit import normalized

        model = ViTForImageClassification.from_pretrained(zoo.path("vit")).eval()
        seen, fresh = (batch(shapes(seed), 128) for seed in ("analytics", "analytics/fresh"))
        found, _ = self.report(model, normalized(seen.pixels), seen.classes[:, 0])
        order = found["importance"][..., 1].flatten().argsort(descending=True).tolist()
        heads, half = model.config.num_attention_heads, len(order) // 2

        @torch.no_grad()
        def right(without: list[int]) -> float:
            with edited(model, Zero(), [divmod(place, heads) for place in without]):
                said = says(model, normalized(fresh.pixels)).argmax(-1)
            return float((said == fresh.classes[:, 0]).float().mean())

        numbers = {"all": right([]), "without_important": right(order[:half]), "without_others": right(order[half:])}
        numbers |= {"explained": found["patterns"].explained}
        return ClaimNumbers.decide(
            {name: round(value, 3) for name, value in numbers.items()}
            | {"divergence": [[round(x, 4) for x in layer] for layer in found["importance"][..., 1].tolist()]}
            | {"strengths": [[round(x, 3) for x in layer] for layer in found["strengths"].mean(1).tolist()]},
            f"Accuracy on fresh pictures is {numbers['all']:.2f}, {numbers['without_important']:.2f} without the half"
            f" of heads that matter most and {numbers['without_others']:.2f} without the others; {CODE} numbers tell"
            f" {numbers['explained']:.0%} of the variance of maps of other pictures.",
            important_heads_matter_more=numbers["without_important"] < numbers["without_others"],
            codes_tell_half_of_the_maps=numbers["explained"] > 0.5,
        )


def says(model: nn.Module, pixels: Tensor) -> Tensor:
    """Probabilities of the classes ``[B, classes]``."""
    out = model(pixels)
    return (out if isinstance(out, Tensor) else out.logits).softmax(-1)


def changes(before: Tensor, after: Tensor, labels: Tensor) -> Tensor:
    """The three metrics, of probabilities ``[B, classes]`` before and after: ``[3]``."""
    middle = (before + after) / 2
    divergence = sum((torch.xlogy(p, p) - torch.xlogy(p, middle)).sum(-1) / 2 for p in (before, after))
    drop = (before - after).gather(1, labels[:, None])[:, 0]
    return torch.stack([drop, torch.as_tensor(divergence), (before.argmax(-1) != after.argmax(-1)).float()]).mean(1)
