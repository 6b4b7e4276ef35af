"""Laws of systems that are a layer of their own: each is put where it says it fits, and held to its promises."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.linear import LinearAttention
from ..nn import MultiHead
from ..nn.backbones import Place
from ..nn.init import initialise
from ..systems.base import LayerSystem, Promises
from .hosted_laws import enter
from .laws import GROWTH, TIGHT, Broken, Skipped, Work

WIDTH, HEADS, BATCH, LENGTH = 32, 4, 2, 37
CHUNKS = (20, 9, 1, 1, 6)  # a prefill, a chunk, single steps, a last chunk: LENGTH together
LAYER_LAWS: dict[str, Callable[[LayerSystem], str]] = {}


def layer_of(system: LayerSystem, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The second of two layers that it makes, with first weights that are large enough to matter."""
    torch.manual_seed(0)  # of parts that draw their own first weights; `check` keeps the caller's state
    layer = Place(WIDTH, HEADS, 1, 2, None, None).filled(system.layer)
    initialise(layer, "xavier", 0)
    return layer.to(dtype).eval()


def stream(length: int = LENGTH, dtype: torch.dtype = torch.float64, batch: int = BATCH) -> Tensor:
    """A random stream ``[batch, length, WIDTH]``."""
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype)


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


@enter(LAYER_LAWS)
def settings_are_kept(system: LayerSystem) -> str:
    """The constructor stores each argument under its own name."""
    lost = [name for name in system.settings() if not hasattr(system, name)]
    if lost:
        raise Broken(f"the constructor does not store {lost[0]!r}")
    return f"{len(system.settings())} settings"


@enter(LAYER_LAWS)
def trains_every_part(system: LayerSystem) -> str:
    """The output has the stream's shape, and every parameter and the stream get a finite gradient that is not zero."""
    layer, x = layer_of(system).train(), stream().requires_grad_()
    out = layer(x)
    if out.shape != x.shape:
        raise Broken(f"gives {tuple(out.shape)} for {tuple(x.shape)}")
    out.square().sum().backward()
    named = {"the stream": x, **{name: p for name, p in layer.named_parameters() if p.requires_grad}}
    for name, p in named.items():
        if p.grad is None or not bool(p.grad.isfinite().all()):
            raise Broken(f"{name} gets {'no' if p.grad is None else 'an infinite'} gradient")
    dead = [name for name, p in named.items() if not bool(p.grad.any())]  # type: ignore[union-attr]
    if dead:
        raise Broken(f"{', '.join(dead)}: the gradient is zero")
    return f"{sum(p.numel() for p in layer.parameters())} parameters for width {WIDTH}"


@enter(LAYER_LAWS)
def nothing_flows_from_the_future(system: LayerSystem) -> str:
    """What comes later changes nothing before it, bit for bit in float64 up to rounding."""
    _needs(system.promised(), "causal")
    layer, x = layer_of(system), stream()
    with torch.no_grad():
        before = layer(x)
        for place in (LENGTH // 3, LENGTH - 1):
            changed = x.clone()
            changed[:, place:] = stream()[:, place:].flip(-1) * 3
            gap = _gap(layer(changed)[:, :place], before[:, :place])
            if not gap <= TIGHT:
                raise Broken(f"tokens from {place} on change what stands before them by {gap:.1e}")
    return "two places"


@enter(LAYER_LAWS)
def decoding_equals_prefill(system: LayerSystem) -> str:
    """Chunks and single tokens over a cache give what the whole stream gives."""
    _needs(system.promised(), "decodes")
    layer, x = layer_of(system), stream()
    with torch.no_grad():
        cache = layer.cache()  # type: ignore[operator]
        parts = [layer(part, cache=cache) for part in x.split(CHUNKS, 1)]
        gap = _gap(torch.cat(parts, 1), layer(x))
    if not gap <= TIGHT:
        raise Broken(f"differs by {gap:.1e} of the largest output")
    return f"differs by {gap:.1e}"


@enter(LAYER_LAWS)
def a_batch_equals_each_alone(system: LayerSystem) -> str:
    """Streams of different lengths, padded on the right, give what each gives alone."""
    promises, layer = system.promised(), layer_of(system)
    lengths = (LENGTH, 23) if promises.padding else (LENGTH, LENGTH)
    x = stream()
    keep = torch.arange(LENGTH) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        together = layer(x, keep=keep) if promises.padding else layer(x)
        for row, length in enumerate(lengths):
            gap = _gap(together[row, :length], layer(x[row : row + 1, :length])[0])
            if not gap <= TIGHT:
                raise Broken(f"the stream of {length} tokens differs by {gap:.1e} from itself alone")
    return "with padding" if promises.padding else "of one length (padding is not promised)"


@enter(LAYER_LAWS)
def forms_agree(system: LayerSystem) -> str:
    """Kernelised attention gives the same by its parallel, chunked and recurrent forms."""
    layer, x = layer_of(system), stream()
    heads = [m for m in layer.modules() if isinstance(m, MultiHead) and isinstance(m.spec, LinearAttention)]
    if not heads:
        raise Skipped("no linear attention in it")
    found = {}
    for form in ("parallel", "chunked", "recurrent"):
        for module in heads:
            own = partial(type(module).options, module)
            setattr(module, "options", partial(_with_form, own, form))  # noqa: B010
        with torch.no_grad():
            found[form] = layer(x)
    for form in ("chunked", "recurrent"):
        gap = _gap(found[form], found["parallel"])
        if not gap <= TIGHT:
            raise Broken(f"{form} differs by {gap:.1e} from parallel")
    return "three forms"


@enter(LAYER_LAWS)
def operations_grow_as_promised(system: LayerSystem) -> str:
    """Counted operations of a forward pass grow no faster than the promised power of the length."""
    exponent = system.promised().exponent
    sizes = (512, 1024) if exponent >= 2 else (2048, 4096)
    layer, counts = layer_of(system, torch.float32), []
    for n in sizes:
        with torch.no_grad(), Work() as work:
            layer(stream(n, torch.float32, 1))
        counts.append(work.count)
    slope = math.log(counts[1] / counts[0]) / math.log(sizes[1] / sizes[0])
    if not slope <= exponent + GROWTH:
        raise Broken(f"operations grow as N^{slope:.2f} from N={sizes[0]} to {sizes[1]}; promised {exponent}")
    return f"N^{slope:.2f} from N={sizes[0]} to {sizes[1]}, promised {exponent}"


@enter(LAYER_LAWS)
def low_precision_is_near(system: LayerSystem) -> str:
    """float32 and bfloat16 give finite numbers near those of float64."""
    with torch.no_grad():
        exact = layer_of(system)(stream())
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
            found = layer_of(system, dtype)(stream(dtype=dtype)).double()
            error = float((found - exact).norm() / exact.norm())
            if not error <= tolerance:
                raise Broken(f"{dtype} differs by {error:.1e} of the norm")
    return "float32, bfloat16"


def _with_form(options: Callable[[Tensor], dict[str, Any]], form: str, context: Tensor) -> dict[str, Any]:
    return {**options(context), "form": form}


def _needs(promises: Promises, name: str) -> None:
    if not getattr(promises, name):
        raise Skipped(f"{name.replace('_', ' ')} is not promised")
