"""Salient relevance: the relevance of single pixels for a class, then which areas stand out in the map of these.

Relevance R goes from a class's score back to the pixels; a layer y = f(x) with z = f(x) gives to its inputs

    R_x = x * f'(x)^T (R_y / z)            convolutions and poolings (the greatest input of a pool takes all)
    z = x . max(0, weight)                 linear layers
    R_x = R_y                              rectifiers

and their sum stays the score wherever no bias takes a part. Of |R|, each patch p at each scale r stands out by

    d(p, q) = apart in values / (1 + 3 apart in places)         both from 0 to 1
    S[r] = 1 - exp(-mean of d over the 64 most alike q)         q at the scales r, r / 2 and r / 4
    SR = mean over r of S[r] (1 - distance to the nearest place with S[r] > 0.8 max)

Paper: Beyond saliency: understanding convolutional neural networks from saliency prediction on layer-wise relevance
    propagation, arXiv:1712.08268; context-aware saliency: Goferman, Zelnik-Manor and Tal, 2012
Code: https://github.com/Hey1Li/Salient-Relevance-Propagation (Imagenet_Alex vs VGG16.ipynb: relprop)

Differs: the second step has no code there but a link to a program of others; its equations and numbers are those of
Goferman et al. as remembered, without their prior for the middle. Patches are 5 x 5 at every pixel, not 7 x 7 at every
other (their pictures are eight times as large), and values are those of |R|, not Lab colours. The mean over all places,
which AlexNet and VGG have not, shares by z as a convolution does. A layer's stabilizer is the code's 1e-9.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import Unsupported
from ..base import ClaimNumbers, MethodSystem
from ._convolutional import covering, pictures, trained
from ._passing import passing

PASSED = (nn.ReLU, nn.Flatten, nn.Dropout, nn.Identity)
SHARED = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
TINY = 1e-9


class SalientRelevance(MethodSystem):
    """Settings: ``scales`` of the picture; ``patch``, pixels of a side; ``alike``, patches compared with."""

    slug = "salient-relevance"
    title = "Salient relevance maps"
    paper = "https://arxiv.org/abs/1712.08268"
    code = "https://github.com/Hey1Li/Salient-Relevance-Propagation"

    def __init__(self, scales: tuple[float, ...] = (1.0, 0.8, 0.5, 0.3), patch: int = 5, alike: int = 64):
        self.scales, self.patch, self.alike = scales, patch, alike

    def apply(self, model: nn.Module) -> AbstractContextManager[dict[str, tuple[Tensor, Tensor]]]:
        """Keep what goes into and out of each layer, by path, in the order they run; the model answers as it would."""
        return passing(model, lambda path, module: not list(module.children()))

    def relevance(self, model: nn.Module, pixels: Tensor, classes: Tensor) -> list[Tensor]:
        """Relevance of each layer's inputs for the classes ``[B]``, from the pixels' ``[B, 3, H, W]`` to the scores'.

        Raises:
            Unsupported: a layer without a rule, or one that does not take what the layer before gave.
        """
        with torch.no_grad(), self.apply(model) as layers:
            scores = model(pixels)
        steps = list(layers.items())
        for (path, (_, y)), (after, (x, _)) in pairwise(steps):
            if x.numel() != y.numel():
                raise Unsupported(f"{after} does not take what {path} gives: relevance goes through plain chains alone")
        found = [torch.zeros_like(scores).scatter(1, classes[:, None], 1) * scores]
        for path, (x, y) in reversed(steps):
            found.append(backward(path, model.get_submodule(path), x, found[-1].view_as(y)))
        return found[::-1]

    def salience(self, relevance: Tensor) -> Tensor:
        """Areas that stand out ``[B, H, W]`` in relevance ``[B, 3, H, W]``."""
        shown = relevance.abs()
        shown = shown / shown.amax((1, 2, 3), keepdim=True).clamp(min=TINY)
        return torch.stack([self._salience(picture[None]) for picture in shown])

    def _salience(self, picture: Tensor) -> Tensor:
        size, found = picture.shape[-2:], []
        for scale in self.scales:
            some, places = self._patches(picture, scale)
            others = [self._patches(picture, scale / part) for part in (1, 2, 4)]
            apart = torch.cdist(some, torch.cat([patches for patches, _ in others]))
            far = torch.cdist(places, torch.cat([where for _, where in others]))
            d = apart / apart.max().clamp(min=TINY) / (1 + 3 * far)
            out = 1 - (-d.topk(min(self.alike, d.shape[1]), largest=False).values.mean(1)).exp()
            foci = places[out >= 0.8 * out.max()]
            away = torch.cdist(places, foci).amin(1)
            out = out * (1 - away / away.max().clamp(min=TINY))
            small = [max(round(side * scale), 1) for side in size]
            found.append(F.interpolate(out.view(1, 1, *small), size, mode="bilinear", align_corners=False))
        return torch.stack(found).mean(0)[0, 0]

    def _patches(self, picture: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """All patches of a picture ``[1, 3, H, W]`` made smaller ``[places, 3 patch^2]``, and places from 0 to 1."""
        small = [max(round(side * scale), 1) for side in picture.shape[-2:]]
        less = F.interpolate(picture, small, mode="bilinear", align_corners=False, antialias=True)
        edge = self.patch // 2
        patches = F.unfold(F.pad(less, [edge] * 4, mode="replicate"), self.patch)[0].T
        y, x = torch.meshgrid(*[(torch.arange(n) + 0.5) / max(small) for n in small], indexing="ij")
        return patches, torch.stack([y.flatten(), x.flatten()], 1).to(patches.dtype)

    def claim(self) -> ClaimNumbers:
        """Is relevance conserved from layer to layer, and does the area overlap the object more than the pixels do?"""
        from ...study.probes import standard_error, surely_positive

        model, accuracy = trained()
        seen = pictures("salient-relevance", 64)
        said = model(seen.pixels).argmax(1)
        layers = self.relevance(copy.deepcopy(model).double(), seen.pixels.double(), said)
        sums = torch.stack([x.flatten(1).sum(1) for x in layers])  # [layers, B]
        lost = float(((sums - sums[-1]).abs() / sums[-1].abs()).max())
        pixelwise = covering(layers[0].abs().sum(1), seen.masks)
        areas = covering(self.salience(layers[0].float()), seen.masks)
        gain = areas - pixelwise
        error = standard_error(gain)
        numbers: dict[str, Any] = {"accuracy": accuracy, "lrp": float(pixelwise.mean()), "sr": float(areas.mean())}
        return ClaimNumbers.decide(
            {name: round(value, 3) for name, value in numbers.items()} | {"gain_error": round(error, 3), "lost": lost},
            f"Of a class's score at most {lost:.0e} is lost between any two layers; as many pixels as the object has"
            f" overlap it by {numbers['sr']:.2f} (intersection over union) where SR is greatest, by"
            f" {numbers['lrp']:.2f} where LRP is, over {len(gain)} pictures (standard error {error:.3f}).",
            relevance_is_conserved=lost < 1e-4,
            areas_overlap_more_than_pixels=surely_positive(gain),
        )


def backward(path: str, layer: nn.Module, x: Tensor, relevance: Tensor) -> Tensor:
    """Relevance of a layer's inputs, of its outputs'.

    Raises:
        Unsupported: there is no rule for it.
    """
    if isinstance(layer, PASSED):
        return relevance.view_as(x)
    if isinstance(layer, nn.Linear):
        weight = layer.weight.clamp(min=0)
        return x * ((relevance / (x @ weight.T + TINY)) @ weight)
    if not isinstance(layer, SHARED):
        raise Unsupported(f"{path} ({type(layer).__name__}) has no rule: relevance passes {PASSED + SHARED} and Linear")
    with torch.enable_grad():
        given = x.detach().requires_grad_()
        z = layer(given)
        (share,) = torch.autograd.grad(z, given, relevance / (z.detach() + TINY))
    return x * share
