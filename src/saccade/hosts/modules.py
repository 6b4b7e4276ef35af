"""The host for everything that is not transformers': torch's own attention, timm's, and your own modules.

While a handle is open the attention modules have a ``forward`` of their own on the instance; nothing global is touched.
One at which nothing is done runs the forward of its class. In an ``nn.TransformerEncoder`` the fused layer and nested
tensors, which bypass attention modules, are off: places of padding then hold what they hold in training, not zeros.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from ..core.errors import SpecError, Unsupported
from ..core.masks import Causal, Full, Given, Mask
from . import acts
from .acts import Frame, Site, inside
from .views import View

_CROSS = re.compile(r"cross|encoder_attn|src_attn|AttentionPool", re.IGNORECASE)
_VISION = ("timm.", "torchvision.")


class ModulesHost:
    """A model of ``nn.MultiheadAttention``, of timm's attention, or of modules that call :func:`acts.run`."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._entered: list[list[nn.Module]] = []

    def sites(self) -> list[Site]:
        """Every attention module; its layer is the first number in its path, or else they are counted.

        Raises:
            Unsupported: there is none, or none that can be hosted.
        """
        found: list[Site] = []
        uncounted = 0
        crossing: set[nn.Module] = {
            m.multihead_attn for m in self.model.modules() if isinstance(m, nn.TransformerDecoderLayer)
        }
        for path, module in self.model.named_modules():
            heads = _heads(path, module)
            if heads is None:
                continue
            numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", path)
            kinds = frozenset({_kind(path, module, crossing), _sense(self.model, module)})
            found.append(Site(path, int(numbers[0]) if numbers else uncounted, kinds, heads, module))
            uncounted += not numbers
        if not found:
            raise Unsupported(self._nothing())
        refused = [_refused(s.module) for s in found]
        if all(refused):
            raise Unsupported(f"{found[0].path or type(self.model).__name__} {refused[0]}")
        return found

    def _nothing(self) -> str:
        """What was looked for in vain."""
        name = type(self.model).__name__
        for path, module in self.model.named_modules():
            if any(c.__name__ == "PreTrainedModel" for c in type(module).__mro__):
                return f"{name} holds a model of transformers: give that itself, {name}.{path}"
        return (
            f"{name} has no attention that a program can be put into. Looked for: torch.nn.MultiheadAttention (with"
            " torch's own forward), timm's attention (modules with fused_attn and num_heads), and modules with an int"
            " attribute saccade_heads, whose forward calls saccade.hosts.acts.run"
        )

    def enter(self) -> None:
        held: list[nn.Module] = []
        try:
            for module in self.model.modules():
                if _hold(module):
                    held.append(module)
        except BaseException:
            for module in held:
                _release(module)
            raise
        self._entered.append(held)

    def leave(self) -> None:
        for module in self._entered.pop():
            _release(module)


def _heads(path: str, module: nn.Module) -> int | None:
    """How many heads an attention module has; ``None``: it is not one."""
    if _way(module) is not None:
        return int(module.num_heads)  # type: ignore[arg-type]
    own = getattr(module, "saccade_heads", None)
    if own is not None and (not isinstance(own, int) or own < 1):
        raise SpecError(f"{path or type(module).__name__}: saccade_heads must be its number of heads; got {own!r}")
    return own


def _kind(path: str, module: nn.Module, crossing: set[nn.Module]) -> str:
    own = getattr(module, "saccade_kind", None)
    if own is not None:
        if own not in ("self", "cross"):
            raise SpecError(f'{path or type(module).__name__}: saccade_kind must be "self" or "cross"; got {own!r}')
        return str(own)
    if module in crossing or (isinstance(module, nn.MultiheadAttention) and not module._qkv_same_embed_dim):
        return "cross"
    named = "self" not in path.rpartition(".")[2] and _CROSS.search(f"{path} {type(module).__name__}")
    return "cross" if named else "self"


def _sense(model: nn.Module, module: nn.Module) -> str:
    kinds = [*type(model).__mro__, *type(module).__mro__]
    return "vision" if any(c.__module__.startswith(_VISION) for c in kinds) else "text"


def _refused(module: nn.Module) -> str | None:
    """Why no program can be put into a module."""
    if not isinstance(module, nn.MultiheadAttention):
        return None
    extra = "add_bias_kv" if module.bias_k is not None else "add_zero_attn" if module.add_zero_attn else None
    return extra and (
        f"has a key that is no token ({extra}=True), which masks, edits and stats would count as one: leave that"
        " layer out with layers="
    )


@dataclass
class _Held:
    """What was changed in a module: by how many handles it is held, its hook, and the flag that it had."""

    count: int
    hook: RemovableHandle | None = None
    nested: bool | None = None


_held: WeakKeyDictionary[nn.Module, _Held] = WeakKeyDictionary()


def _way(module: nn.Module) -> Callable[..., Any] | None:
    """The forward that leads a module's attention through :func:`acts.run`; your own ones call that themselves."""
    kind: Any = type(module)
    if kind.forward is nn.MultiheadAttention.forward:
        return _multihead
    if hasattr(module, "fused_attn") and isinstance(getattr(module, "num_heads", None), int) and _fuses(kind):
        return _fused
    return None


@functools.cache
def _fuses(kind: Any) -> bool:
    """Is a class's forward timm's, with one call of torch's attention function in it?"""
    if not kind.forward.__module__.startswith("timm."):
        return False
    try:
        return inspect.getsource(kind.forward).count("scaled_dot_product_attention(") == 1
    except (OSError, TypeError):  # a class made at run time has no source
        return False


def _hold(module: nn.Module) -> bool:
    """Let a module's attention be led; ``False``: there is nothing to lead."""
    way = _way(module)
    nested = getattr(module, "use_nested_tensor", None) if isinstance(module, nn.TransformerEncoder) else None
    if way is None and nested is None:
        return False
    held = _held.get(module)
    if held is None:
        if way is not None and "forward" in vars(module):
            raise Unsupported(
                f"a {type(module).__name__} already has a forward of its own on the instance (another tool's patch);"
                " remove that first"
            )
        held = _held[module] = _Held(0)
        if way is not None:
            module.__dict__["forward"] = functools.partial(way, module)  # unlike a method, it can be pickled
            # nn.TransformerEncoderLayer reads its parts' weights past their forward, unless one of them has a hook.
            held.hook = module.register_forward_pre_hook(_seen)
        else:
            held.nested = nested
            module.__dict__["use_nested_tensor"] = False
    held.count += 1
    return True


def _release(module: nn.Module) -> None:
    held = _held[module]
    held.count -= 1
    if held.count:
        return
    del _held[module]
    if held.hook is None:
        module.__dict__["use_nested_tensor"] = held.nested
        return
    held.hook.remove()
    if getattr(vars(module).get("forward"), "func", None) is _way(module):  # else someone wrapped it meanwhile
        del module.__dict__["forward"]


def _seen(module: nn.Module, inputs: Any) -> None:
    """A hook that does nothing but be there."""


def _multihead(
    self: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
    need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``nn.MultiheadAttention.forward`` in the engine.

    Weights are never returned, whatever ``need_weights`` says: they are what :func:`saccade.watch` is for. A query
    that sees no key gives zeros where torch may give NaN. Queries of self-attention are the last of the keys if they
    are fewer; elsewhere, and with ``is_causal``, query 0 stands at key 0 as in torch.
    """
    doing = vars(self).get(acts.STATE)
    if doing is None:
        return nn.MultiheadAttention.forward(
            self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )
    refused = _refused(self)
    if refused:
        raise Unsupported(f"{doing.site.path or 'this module'} {refused}")
    if query.is_nested:
        raise Unsupported(
            f"{doing.site.path or 'this module'} was given a nested tensor: give padded ones and key_padding_mask, or,"
            " where an nn.TransformerEncoder made it, open the handle on that and not on its layers"
        )
    if not query.ndim == key.ndim == value.ndim or query.ndim not in (2, 3):
        raise SpecError(
            "query, key and value must all be [B, N, E] (as batch_first says) or all [N, E]; got"
            f" {', '.join(str(list(x.shape)) for x in (query, key, value))}"
        )
    batched = query.ndim == 3
    first = self.batch_first or not batched
    heads = [x.unflatten(-1, (self.num_heads, -1)) for x in _project(self, query, key, value)]
    q, k, v = ((x if batched else x[None]).permute((0, 2, 1, 3) if first else (1, 2, 0, 3)) for x in heads)
    if not batched and key_padding_mask is not None:
        key_padding_mask = key_padding_mask[None]
    if is_causal and attn_mask is None:
        raise SpecError("is_causal=True is a hint about attn_mask, as in torch: give attn_mask as well")
    trusted = is_causal and key_padding_mask is None and not need_weights  # where torch, too, follows the hint
    cross = "cross" in doing.site.kinds
    offset = 0 if cross or is_causal else max(k.shape[2] - q.shape[2], 0)
    mask, biases = (Causal(), []) if trusted else _read(_by_head(attn_mask, q, k), q, k, offset)
    view, added = _pad(mask, key_padding_mask, k, offset, cross)
    out = acts.run(self, q, k, v, _frame(view, biases + added, self.dropout if self.training else 0.0))
    out = out.permute((0, 2, 1, 3) if first else (2, 0, 1, 3)).flatten(2)
    return F.linear(out if batched else out[0], self.out_proj.weight, self.out_proj.bias), None


def _project(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values as ``module`` projects them, in the layout in which they came."""
    bias = module.in_proj_bias
    if module.in_proj_weight is None:
        weights = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
    elif query is key and key is value:
        return F.linear(query, module.in_proj_weight, bias).chunk(3, -1)
    else:
        weights = module.in_proj_weight.chunk(3)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))


def _by_head(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """An ``attn_mask`` of nn.MultiheadAttention as one that broadcasts to ``[B, H, N, M]``."""
    batch, heads, n, m = *q.shape[:3], k.shape[2]
    if mask is None or mask.shape == (n, m):
        return mask
    if mask.shape == (batch * heads, n, m):
        return mask.unflatten(0, (batch, heads))
    raise SpecError(
        f"attn_mask must be [N, M] = {[n, m]} or [B * H, N, M] = {[batch * heads, n, m]}; got {list(mask.shape)}"
    )


def _pad(mask: Mask, padding: Tensor | None, k: Tensor, offset: int, cross: bool) -> tuple[View, list[Tensor]]:
    """What is seen with a ``key_padding_mask`` ``[B, M]``, and what that adds to the scores."""
    batch, m = k.shape[0], k.shape[2]
    if padding is not None and padding.shape != (batch, m):
        raise SpecError(f"key_padding_mask must be [B, M] = {[batch, m]}; got {list(padding.shape)}")
    hidden, added = (None, None) if padding is None else _split(padding)
    biases = [] if added is None else [added[:, None, None, :]]
    if hidden is None or not bool(hidden.any()):
        name = {Full: "full", Causal: "causal"}.get(type(mask))
        return View(mask, m, offset, name=name), biases
    left = not cross and bool(hidden[:, 0].any())
    first = hidden.long().argmin(-1) if left else None
    return View(mask, m, offset, padding=~hidden, first=first), biases


def _fused(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of a timm module's class, with :func:`acts.run` where it calls torch's attention function."""
    own = type(self).forward
    doing = vars(self).get(acts.STATE)
    if doing is None:
        return own(self, *args, **kwargs)
    fused, scale = bool(self.fused_attn), getattr(self, "scale", None)
    try:
        self.fused_attn = True  # type: ignore[assignment]  # else it does the same with no function to stand in for
        with _InPlace(self, doing.site, scale if isinstance(scale, float) and not fused else None):
            return own(self, *args, **kwargs)
    finally:
        self.fused_attn = fused  # type: ignore[assignment]


class _InPlace(TorchFunctionMode):
    """Runs a module's acts in place of ``F.scaled_dot_product_attention``."""

    def __init__(self, module: nn.Module, site: Site, scale: float | None):
        super().__init__()
        self.module, self.site, self.scale = module, site, scale

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._attend(*args, **(kwargs or {}))

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        if query.ndim != 4 or query.shape[1] != self.site.heads:
            raise Unsupported(
                f"{self.site.path} attends with queries {list(query.shape)}, not [B, {self.site.heads} heads, N, D]:"
                " leave its layer out with layers="
            )
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = ~attn_mask  # to torch's modules True means hidden, to its functions visible
        mask, biases = (Causal(), []) if is_causal else _read(attn_mask, query, key, 0)
        view, _ = _pad(mask, None, key, 0, False)
        return acts.run(self.module, query, key, value, _frame(view, biases, dropout_p, scale or self.scale))


def _frame(view: View, biases: list[Tensor], dropout: float, scale: float | None = None) -> Frame:
    name = None if view.name is None or biases or dropout else (view.name, scale)
    return Frame(inside(view, scale=scale, biases=biases, dropout=dropout), view.offset, name)


def _split(mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """What one of torch's masks hides, bool, and what it adds to the scores."""
    if mask.dtype == torch.bool:
        return mask, None
    if not mask.is_floating_point():
        raise SpecError(f"a mask must be bool (True: hidden) or of floats to add to the scores; got {mask.dtype}")
    hidden = mask == -torch.inf
    added = mask.masked_fill(hidden, 0)
    return hidden, added if added.requires_grad or bool(added.any()) else None


def _read(mask: Tensor | None, q: Tensor, k: Tensor, offset: int) -> tuple[Mask, list[Tensor]]:
    """A mask that broadcasts to ``[B, H, N, M]``, in closed form if it is causal, and what it adds to the scores."""
    if mask is None:
        return Full(), []
    hidden, added = _split(mask)
    biases = [] if added is None else [added]
    if not bool(hidden.any()):
        return Full(), biases
    future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=mask.device).triu(offset + 1)
    if hidden.shape == future.shape and bool((hidden == future).all()):
        return Causal(), biases
    return Given(~hidden), biases
