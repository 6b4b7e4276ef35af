"""The host for transformers: attention interface and mask interface, nothing patched.

transformers calls one function per attention module, by the name in its config. While a handle is open the model's
configs name :func:`_attend`; modules at which nothing is done run the model's own attention in the engine.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..core.attend import attention
from ..core.errors import SpecError, Unsupported
from ..core.spec import Attention
from . import acts
from .acts import Call, Frame, Looker, Program, Site, inside
from .handles import listen, resolve
from .linear import weighed
from .views import View

NAME = "saccade"
HELD = "_saccade_held"  # what a saccade cache calls itself on the keys that it hands to the model

_CROSS = re.compile(r"cross|encoder_attn|EncDecAttention", re.IGNORECASE)
_VISION = re.compile(r"(^|\.)(visual|vision\w*|vit|image_\w*)(\.|$)")
_AUDIO = re.compile(r"(^|\.)(audio\w*)(\.|$)")

_switched: dict[int, tuple[Any, str, int]] = {}  # by a config's id: it, the name it had, how many handles hold it


class TransformersHost:
    """A ``PreTrainedModel`` whose attention goes through transformers' attention interface."""

    def __init__(self, model: nn.Module):
        from transformers import PreTrainedModel

        name = type(model).__name__
        if not isinstance(model, PreTrainedModel):
            raise SpecError(f"model must be a transformers PreTrainedModel; got {name}")
        self.model: Any = model
        if not self.model._can_set_attn_implementation():
            raise Unsupported(
                f"{name} computes attention in its own code, not through transformers' attention interface, so no"
                " program can be put in its place"
            )
        self.configs = _configs(model)

    def sites(self) -> list[Site]:
        found = [
            Site(path, _layer(path, module), self._kinds(path, module), _heads(module), module)
            for path, module in self.model.named_modules()
            if _calls_interface(type(module))  # type: ignore[arg-type]
        ]
        if not found:
            raise Unsupported(f"{type(self.model).__name__} has no attention that goes through transformers' interface")
        return found

    def _kinds(self, path: str, module: nn.Module) -> frozenset[str]:
        cross = getattr(module, "is_cross_attention", False) or _CROSS.search(path)
        sense = {"pixel_values": "vision", "input_features": "audio"}.get(self.model.main_input_name, "text")
        if _VISION.search(path):
            sense = "vision"
        elif _AUDIO.search(path):
            sense = "audio"
        elif sense == "audio" and re.search(r"(^|\.)decoder\.", path):
            sense = "text"
        return frozenset({"cross" if cross else "self", sense})

    def enter(self) -> None:
        before = [(c, c._attn_implementation_internal) for c in self.configs]
        _register()
        try:
            self.model.set_attn_implementation(NAME)
        except BaseException:
            if not _switched:
                _unregister()
            raise
        for config, name in before:
            _, first, count = _switched.get(id(config), (config, name, 0))
            _switched[id(config)] = config, first, count + 1
        missed = [s.module for s in self.sites() if _implementation(s.module) != NAME]
        if missed:
            kept = f"{type(missed[0]).__name__} of {type(self.model).__name__} kept {_implementation(missed[0])!r}"
            self.leave()
            raise Unsupported(f"{kept} attention when it was set to {NAME!r}")

    def leave(self) -> None:
        for config in self.configs:
            _, first, count = _switched.pop(id(config))
            if count > 1:
                _switched[id(config)] = config, first, count - 1
            else:
                config._attn_implementation_internal = first
        if not _switched:
            _unregister()


@functools.cache
def _calls_interface(kind: Any) -> bool:
    """Does a module's own forward look its attention function up?"""
    if kind.__module__.startswith("torch."):
        return False
    try:
        return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(kind.forward)
    except (OSError, TypeError):  # a class made at run time has no source
        return False


def _implementation(module: Any) -> str:
    return str(module.config._attn_implementation)


def _layer(path: str, module: Any) -> int:
    """The number that the module carries, or the first one in its path."""
    number = getattr(module, "layer_idx", None)
    if number is None:
        numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", path)
        number = numbers[0] if numbers else 0
    return int(number)


def _heads(module: Any) -> int:
    for owner in (module, module.config):
        for name in ("num_heads", "n_heads", "num_attention_heads"):
            if isinstance(getattr(owner, name, None), int):
                return int(getattr(owner, name))
    raise Unsupported(f"{type(module).__name__} does not say how many heads it has")


def _configs(model: nn.Module) -> list[Any]:
    """Every config that ``set_attn_implementation`` may write to, once."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    for config in list(configs.values()):
        for key in getattr(config, "sub_configs", {}):
            sub = getattr(config, key, None)
            if sub is not None:
                configs[id(sub)] = sub
    return [c for c in configs.values() if hasattr(c, "_attn_implementation_internal")]


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, View.of)


def _unregister() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    for registry in (AttentionInterface, AttentionMaskInterface):
        registry._global_mapping.pop(NAME, None)  # there is a public way in and none out


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *, dropout: float = 0.0,
    scaling: float | None = None, softcap: float | None = None, s_aux: Tensor | None = None,
    position_bias: Tensor | None = None, is_causal: bool | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The attention function that transformers calls in every layer."""
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    view = attention_mask if isinstance(attention_mask, View) else View.given(attention_mask, query, key, causal)
    held = getattr(key, HELD, None)
    if view.keys != key.shape[2] and held is None:
        raise SpecError(f"{type(module).__name__}: the mask was made for {view.keys} keys, there are {key.shape[2]}")
    if position_bias is not None and not bool(position_bias.any()):  # what T5's cross-attention is given
        position_bias = None

    def frame(view: View, sinks: Tensor | None = s_aux) -> Frame:
        biases = [b for b in (view.bias, position_bias) if b is not None]
        combine = inside(view, scale=scaling, biases=biases, dropout=dropout, softcap=softcap, sinks=sinks)
        like_no_other = view.name is None or position_bias is not None or dropout
        told = None if like_no_other else (view.name, scaling, softcap, None if sinks is None else id(sinks))
        return Frame(combine, view.offset, told)

    if held is None:
        out = acts.run(module, query, key, value, frame(view))
    else:
        out = _attend_held(module, query, held, view, frame, s_aux)
    return out.transpose(1, 2).contiguous(), None


def _attend_held(
    module: nn.Module, query: Tensor, held: Any, view: View, frame: Callable[..., Frame], sinks: Tensor | None
) -> Tensor:
    """Attention over what a :class:`saccade.cache.Cache` holds, which then drops what its policy does not want."""
    new = query.shape[2]
    if view.text is not None:
        held.hide(view.text)
    stats = held.owner.policy.stats(new)
    grouped = query.unflatten(1, (sum(len(s.heads) for s in held.segments), -1))
    out: Tensor | None = None
    for segment in held.segments:
        looker = Looker(stats, functools.partial(held.settle, segment, new))
        keys, values = segment.now
        mine = view.at(segment.positions, held.seen, new, acts.narrows(module))
        if len(held.segments) == 1:
            out = acts.run(module, query, keys, values, frame(mine), looker)
            break
        if acts.at_work(module):
            raise Unsupported("a program, edit or stat on heads of which each holds another number of tokens")
        own = segment.heads.to(query.device)
        theirs = None if sinks is None else sinks.view(grouped.shape[1], -1)[own].flatten()
        q = grouped[:, own].flatten(1, 2)
        found = acts.run(_nobody, q, keys, values, frame(mine, theirs), looker)
        if out is None:
            out = found.new_empty(*grouped.shape[:-1], found.shape[-1])
        out[:, own] = found.unflatten(1, (len(own), -1))
    held.close(new)
    assert out is not None
    return out if out.ndim == 4 else out.flatten(1, 2)


_nobody = nn.Identity()  # a module at which nothing is done


@contextmanager
def output_errors(model: nn.Module, program: Program) -> Iterator[dict[int, float]]:
    """Run the model dense and, beside it, the program on every layer's same queries, keys and values.

    Yields a dict that fills while the model runs: by layer, ``|program - dense| / |dense|`` (Frobenius) of the
    attention output of the last call. Positions whose dense output is not finite are an error of the model.
    """
    errors: dict[int, float] = {}
    programs: dict[str, Attention] = {}

    def compare(call: Call) -> None:
        path = call.site.path
        if path not in programs:
            programs[path] = weighed(resolve(program, call.site))
        out = attention(call.q, call.k, call.v, call.frame.combine(programs[path]), offset=call.frame.offset)
        dense = call.out.double()
        errors[call.site.layer] = float((out.double() - dense).norm() / dense.norm())

    with listen(model, compare):
        yield errors
