"""NormGrad: a place matters as much as it would move the weights of a convolution that stood there.

With x [C, h, w] a layer's output, g the gradient of a class's score by it, and an identity layer put behind it, the
gradient of that layer's weights is a sum over the places u; a map is the norm of each place's share:

    scaling   || x[u] * g[u] ||          conv1x1   || x[u] g[u]^T || = || x[u] || || g[u] ||
    bias      || g[u] ||                 conv3x3   || x around u || || g[u] ||
    grad-cam  max(0, sum over C of mean(g) * x[u]),   for comparison

    combined  product over layers of the enlarged maps, each from 0 to 1
    meta      the same maps after one step  weights - rate * gradient of the class's cross entropy

Paper: There and Back Again: Revisiting Backpropagation Saliency Methods, arXiv:2004.02866
Code: https://github.com/srebuffi/revisiting_saliency (resnet50_grid_saliency.py: Extract_Aggregate);
    https://github.com/ruthcfong/TorchRay, branch normgrad (torchray/attribution/norm_grad.py, meta_saliency.py)

Differs: the aggregation is the norm alone (the code has sum, max and the norm of positive parts too). The norm of
conv1x1 and conv3x3 is the product that it equals, no matrix is made. A map that is the same everywhere stays zero when
it is stretched from 0 to 1, where the code divides by zero. Claim: a small network and pictures of one shape; a point
must hit the shape's own pixels, and the meta step has a rate of 0.01. (Measured first without asking for two standard
errors: at the first convolution the gain is smaller than one.)
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import SpecError
from ..base import ClaimNumbers, MethodSystem
from ._convolutional import enlarged, pictures, pointing, trained
from ._passing import passing

RECTIFIED = ("1", "4", "7", "9")  # of the claim's network: what follows each convolution
KINDS = ("scaling", "conv1x1", "conv3x3", "bias", "grad-cam")


class NormGrad(MethodSystem):
    """Settings: ``kind`` of the identity layer; ``layers``, by path; ``rate`` of the step of :meth:`meta`."""

    slug = "normgrad"
    title = "NormGrad saliency"
    paper = "https://arxiv.org/abs/2004.02866"
    code = "https://github.com/srebuffi/revisiting_saliency"

    def __init__(self, kind: str = "conv1x1", layers: Sequence[str] | None = None, rate: float = 1e-4):
        if kind not in KINDS:
            raise SpecError(f"kind is one of {', '.join(KINDS)}; got {kind!r}")
        self.kind, self.layers, self.rate = kind, layers, rate

    def apply(self, model: nn.Module) -> AbstractContextManager[dict[str, tuple[Tensor, Tensor]]]:
        """Keep what goes through the layers (``None``: every nn.Conv2d), by path; the model answers as it would."""
        layers = self.layers
        return passing(model, lambda path, module: isinstance(module, nn.Conv2d) if layers is None else path in layers)

    @torch.enable_grad()
    def maps(self, model: nn.Module, pixels: Tensor, classes: Tensor) -> dict[str, Tensor]:
        """Of the classes ``[B]`` for pixels ``[B, 3, H, W]``: each layer's map ``[B, h, w]``, by its path."""
        with self.apply(model) as kept:
            score = model(pixels.detach().requires_grad_()).gather(1, classes[:, None]).sum()
        if not kept:
            raise SpecError(f"{type(model).__name__} ran no layer {self.layers or 'of nn.Conv2d'} to make a map of")
        outputs = {path: y for path, (_, y) in kept.items()}
        grads = torch.autograd.grad(score, list(outputs.values()))
        return {path: saliency(outputs[path].detach(), g, self.kind) for path, g in zip(outputs, grads, strict=True)}

    def combined(self, model: nn.Module, pixels: Tensor, classes: Tensor) -> Tensor:
        """The product of the maps of all layers at the pixels: ``[B, H, W]``."""
        found = self.maps(model, pixels, classes)
        return torch.stack([stretched(enlarged(map_, pixels.shape[-2:])) for map_ in found.values()]).prod(0)

    @torch.enable_grad()
    def meta(self, model: nn.Module, pixels: Tensor, classes: Tensor) -> dict[str, Tensor]:
        """The maps of :meth:`maps` of a copy of the model, for each picture after one step towards its class."""
        found: list[dict[str, Tensor]] = []
        for picture, label in zip(pixels.split(1), classes.split(1), strict=True):
            stepped = copy.deepcopy(model).requires_grad_()
            grads = torch.autograd.grad(F.cross_entropy(stepped(picture), label), list(stepped.parameters()))
            with torch.no_grad():
                for p, g in zip(stepped.parameters(), grads, strict=True):
                    p.sub_(self.rate * g)
            found.append(self.maps(stepped, picture, label))
        return {path: torch.cat([one[path] for one in found]) for path in found[0]}

    def claim(self) -> ClaimNumbers:
        """The pointing game at every layer against Grad-CAM's, layers combined, and what the meta step changes."""
        from ...study import probes

        model, accuracy = trained()
        seen = pictures("normgrad", 400)
        system, cam = NormGrad(self.kind, RECTIFIED), NormGrad("grad-cam", RECTIFIED)
        hits = {
            one.kind: {path: pointing(x, seen.masks) for path, x in one.maps(model, seen.pixels, seen.labels).items()}
            for one in (system, cam)
        }
        gains = {path: hits[self.kind][path] - hits["grad-cam"][path] for path in RECTIFIED}
        hits[self.kind]["combined"] = pointing(system.combined(model, seen.pixels, seen.labels), seen.masks)
        points = {kind: {path: float(of.mean()) for path, of in found.items()} for kind, found in hits.items()}
        few = seen.pixels[:48]
        likely, unlikely = model(few).argmax(1), model(few).argmin(1)
        alike_by = {
            name: alike(make(model, few, likely), make(model, few, unlikely))
            for name, make in (("plain", system.maps), ("meta", NormGrad(self.kind, RECTIFIED, 0.01).meta))
        }
        errors = {path: probes.standard_error(gain) for path, gain in gains.items()}
        numbers = {"gain_errors": errors} | {f"points_{kind}": found for kind, found in points.items()}
        numbers |= {f"alike_{name}": found for name, found in alike_by.items()}
        ours, theirs, (first, second, _, last) = points[self.kind], points["grad-cam"], RECTIFIED
        return ClaimNumbers.decide(
            {"accuracy": round(accuracy, 3), "chance": round(float(seen.masks.float().mean()), 3)}
            | {name: {path: round(x, 3) for path, x in found.items()} for name, found in numbers.items()},
            f"The greatest place lies on the shape in {ours[first]:.0%} of the pictures with NormGrad at the first"
            f" convolution and {theirs[first]:.0%} with Grad-CAM there (standard error of the gain"
            f" {errors[first]:.3f}), {ours[last]:.0%} and {theirs[last]:.0%} at the last,"
            f" {ours['combined']:.0%} with all layers; at the last, maps of the likeliest and the least likely class"
            f" correlate by {alike_by['plain'][last]:.2f}, after the meta step {alike_by['meta'][last]:.2f}.",
            above_grad_cam_at_the_first_convolution=probes.surely_positive(gains[first]),
            above_grad_cam_at_the_second=probes.surely_positive(gains[second]),
        )


def saliency(x: Tensor, g: Tensor, kind: str) -> Tensor:
    """The map ``[B, h, w]`` of a layer's output and the gradient by it, ``[B, C, h, w]`` each."""
    if kind == "grad-cam":
        return (g.mean((2, 3), keepdim=True) * x).sum(1).relu()
    if kind == "conv3x3":
        around = F.avg_pool2d(x.square().sum(1, keepdim=True), 3, 1, 1, divisor_override=1)
        return around[:, 0].sqrt() * g.norm(dim=1)
    factor = {"scaling": x.abs(), "bias": torch.ones_like(x), "conv1x1": x.norm(dim=1, keepdim=True)}[kind]
    return (factor * g).norm(dim=1)


def stretched(maps: Tensor) -> Tensor:
    """Each map from 0 to 1."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low).masked_fill(high == low, 1)


def alike(some: dict[str, Tensor], others: dict[str, Tensor]) -> dict[str, float]:
    """Mean correlation of the maps of two classes, by layer."""

    def centred(maps: Tensor) -> Tensor:
        return (maps - maps.mean((1, 2), keepdim=True)).flatten(1)

    return {path: float(F.cosine_similarity(centred(x), centred(others[path])).mean()) for path, x in some.items()}
