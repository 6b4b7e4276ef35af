"""Layer masking: a convolutional network sees only the unmasked part of a picture, at every layer.

Along with a layer's input x goes a mask m (1: seen). Before a convolution, unseen places take the mean of their seen
neighbours, ring by ring, as many rings as the kernel is wide; after each layer what is unseen is zero:

    x = x + (1 - m) sum3x3(x) / sum3x3(m),  m = min(1, m + sum3x3(m))      once for each ring
    convolution   y = conv(x) m',           m' = maxpool(m) with the kernel, stride and padding of the convolution
    pooling       y = pool(x) m',           m' = pool(m) > 0
    others        y = f(x m) m
    mean of all   y = mean(x m) / mean(m)

so neither the colour nor (but for the ring's blur) the outline of what was taken away reaches the output.

Paper: Towards Improved Input Masking for Convolutional Neural Networks, arXiv:2211.14646
Code: https://github.com/SriramB-98/layer_masking (sal_layers.py: fast_fmm, MyConv2d and its kin)

Differs: hooks instead of layers of its own, so an unmodified network works, but only a plain chain: where branches meet
the official ResNet multiplies their masks, here sizes that do not fit are refused. Where nothing at all is seen the
mean is 0, as in the code (1e-8 in the divisor). Claim: shapes in clutter instead of ImageNet and its pixel masks; LIME
has squares for superpixels, and its map is held against the object's mask. (Measured first without white: these shapes
are bright, and neither a black hole nor one of the mean colour was taken for one.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import Unsupported
from ..base import ClaimNumbers, MethodSystem
from ._convolutional import covering, pictures, trained
from ._lime import lime

EACH_PLACE = (nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Hardswish, nn.Hardsigmoid, nn.BatchNorm2d)
POOLS = (nn.MaxPool2d, nn.AvgPool2d)


class Masking:
    """``mask`` is what may be seen, 1 or 0, ``[B, 1, H, W]``; while the model runs, of the layer that it is at."""

    mask: Tensor | None = None

    def before(self, path: str, layer: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        """Give a layer what it may see."""
        if self.mask is None:
            return None
        if args[0].shape[-2:] != self.mask.shape[-2:]:
            sizes = f"{tuple(args[0].shape[-2:])}, its mask {tuple(self.mask.shape[-2:])}"
            raise Unsupported(f"{path} takes {sizes}: layer masking goes through plain chains of layers alone")
        rings = layer.kernel_size[-1] if isinstance(layer, nn.Conv2d) else 0
        return (filled(args[0], self.mask, rings),)

    def after(self, layer: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor | None:
        """Take the mask on to the next layer, and take out what is not seen there."""
        mask = self.mask
        if mask is None:
            return None
        if isinstance(layer, nn.AdaptiveAvgPool2d):
            self.mask = None
            return output / (layer.forward(mask) + 1e-8)
        if isinstance(layer, nn.Conv2d):
            mask = F.max_pool2d(mask, layer.kernel_size, layer.stride, layer.padding)  # type: ignore[arg-type]
        elif isinstance(layer, POOLS):
            mask = (layer.forward(mask) > 0).to(mask.dtype)
        self.mask = mask
        return output * mask


class LayerMasking(MethodSystem):
    """No settings. ``apply(model)`` gives a :class:`Masking`; while it has no mask the model answers as it would."""

    slug = "layer-masking"
    title = "Layer masking for convolutional networks"
    paper = "https://arxiv.org/abs/2211.14646"
    code = "https://github.com/SriramB-98/layer_masking"

    @contextmanager
    def apply(self, model: nn.Module) -> Iterator[Masking]:
        """Lead every layer through the mask. Set ``mask`` before each call of the model, which uses it up."""
        masking = Masking()
        with ExitStack() as stack:
            for path, layer in model.named_modules():
                if isinstance(layer, (nn.Conv2d, nn.AdaptiveAvgPool2d, *EACH_PLACE, *POOLS)):
                    stack.callback(layer.register_forward_pre_hook(partial(masking.before, path)).remove)
                    stack.callback(layer.register_forward_hook(masking.after).remove)
            yield masking

    def masked(self, model: nn.Module, pixels: Tensor, mask: Tensor) -> Tensor:
        """What the model says of pixels ``[B, 3, H, W]`` where it sees those of ``mask`` ``[B, H, W]`` alone."""
        with self.apply(model) as masking:
            masking.mask = mask[:, None].to(pixels.dtype)
            return model(pixels)

    @torch.no_grad()
    def claim(self) -> ClaimNumbers:
        """Is the class still told from the hole that the object leaves, and does LIME find the object?"""
        from ...study import probes
        from ...study.progress import bar

        model, accuracy = trained()
        seen = pictures("layer-masking", 300)
        mean = seen.pixels.mean((0, 2, 3))[:, None, None]
        ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "black": lambda x, m: model(torch.where(m[:, None], x, -1)),
            "white": lambda x, m: model(torch.where(m[:, None], x, 1)),
            "grey": lambda x, m: model(torch.where(m[:, None], x, mean)),
            "layer": lambda x, m: self.masked(model, x, m),
        }
        right = model(seen.pixels).argmax(1) == seen.labels
        told = {
            name: float((way(seen.pixels, ~seen.masks).argmax(1) == seen.labels)[right].float().mean())
            for name, way in ways.items()
        }
        found: dict[str, list[Tensor]] = {"black": [], "grey": [], "layer": []}
        with bar(24, "LIME") as tell:
            for picture, label in zip(seen.pixels[:24], seen.labels[:24], strict=True):
                for name, maps in found.items():
                    maps.append(lime(ways[name], picture, int(label)))
                tell("LIME", 1)
        covered = {name: covering(torch.stack(maps), seen.masks[:24]) for name, maps in found.items()}
        gains = [covered["layer"] - covered[name] for name in ("black", "grey")]
        lime_of = {name: float(values.mean()) for name, values in covered.items()}
        return ClaimNumbers.decide(
            {"accuracy": round(accuracy, 3)}
            | {f"told_{name}": round(x, 3) for name, x in told.items()}
            | {f"lime_{name}": round(x, 3) for name, x in lime_of.items()}
            | {"gain_errors": [round(probes.standard_error(gain), 3) for gain in gains]},
            f"With the object taken out along its outline, its class (of 6) is still said in {told['black']:.0%} of the"
            f" pictures with black there, {told['grey']:.0%} with grey, {told['white']:.0%} with white,"
            f" {told['layer']:.0%} with layer masking; LIME covers objects by {lime_of['black']:.2f},"
            f" {lime_of['grey']:.2f} and {lime_of['layer']:.2f} (intersection over union).",
            shape_tells_less=told["layer"] < min(told[name] for name in ("black", "grey", "white")),
            better_lime=all(map(probes.surely_positive, gains)),
        )


def filled(x: Tensor, mask: Tensor, rings: int) -> Tensor:
    """x ``[B, C, H, W]`` where the mask ``[B, 1, H, W]`` is 1; around it, ring by ring, the mean of what is there."""
    x = x * mask
    for _ in range(rings):
        count = F.avg_pool2d(mask, 3, 1, 1, divisor_override=1)
        edge = (1 - mask) * F.avg_pool2d(x, 3, 1, 1, divisor_override=1) / (count + 1e-5)
        x, mask = x + edge.detach(), (mask + count).clamp(max=1)
    return x
