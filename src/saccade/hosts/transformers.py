"""Run an attention program inside an unmodified transformers causal language model.

    with install(model, Attention(mask=masks.Window(256) | masks.Sinks(4))):
        model.generate(...)

The program narrows what the model itself allows: the model's causal and sliding masks, its padding, scale, soft cap
and sink logits stay. Masks of the program count positions from each text's first token, so left padding and a
cache that dropped its oldest keys change nothing; scores, edits and selectors count the keys that are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from ..core.attend import attention
from ..core.errors import SpecError, Unsupported
from ..core.normalizers import Softmax
from ..core.scores import Bias, Dot, SoftCap
from ..core.spec import Attention
from .views import View

NAME = "saccade"
STATE = "_saccade_layer"

Program = Attention | Callable[[int, int], Attention]


def install(model: nn.Module, program: Program, watch: Callable[[LayerCall], None] | None = None) -> Installed:
    """Make a causal language model of transformers run a program, until the handle is closed.

    Args:
        model: any ``PreTrainedModel`` whose attention goes through transformers' attention interface.
        program: one :class:`saccade.Attention` for all layers, or a function ``f(layer, heads) -> Attention``.
        watch: called after each layer's attention with what went in and came out.

    Returns:
        A context manager; leaving it, or ``.remove()``, puts the model back exactly as it was.

    Raises:
        SpecError: the program or the model is of the wrong kind.
        Unsupported: this model cannot run programs; the message says why.
    """
    return Installed(model, program, watch)


@dataclass(frozen=True)
class LayerCall:
    """One layer's attention: queries ``[B, H, N, D]``, keys and values ``[B, Hkv, M, D]``, output ``[B, H, N, Dv]``.

    ``offset`` is the place of query 0 among the keys; ``combine`` puts the model's own mask, scale, soft cap and
    sinks around any program.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    offset: int
    combine: Callable[[Attention], Attention]


@contextmanager
def output_errors(model: nn.Module, program: Program) -> Iterator[dict[int, float]]:
    """Run the model dense and, beside it, the program on every layer's same queries, keys and values.

    Yields a dict that fills while the model runs: by layer, ``|program - dense| / |dense|`` (Frobenius) of the
    attention output of the last call. Positions whose dense output is not finite are an error of the model.
    """
    errors: dict[int, float] = {}
    programs: dict[int, Any] = {}

    def compare(call: LayerCall) -> None:
        if call.layer not in programs:
            programs[call.layer] = _resolve(program, call.layer, call.q.shape[1])
        out = attention(call.q, call.k, call.v, call.combine(programs[call.layer]), offset=call.offset)
        dense = call.out.double()
        errors[call.layer] = float((out.double() - dense).norm() / dense.norm())

    with install(model, Attention(), watch=compare):
        yield errors


def _resolve(program: Program, layer: int, heads: int) -> Attention:
    found = program if isinstance(program, Attention) else cast(Any, program)(layer, heads)
    if not isinstance(found, Attention):
        raise SpecError(f"the program for layer {layer} must be a saccade.Attention; got {type(found).__name__}")
    return found


class Installed:
    """A model that runs a program: a context manager, and :meth:`remove` for the same without ``with``."""

    _count = 0  # models that run a program now; the last one out takes the name off transformers' registries

    def __init__(self, model: nn.Module, program: Program, watch: Callable[[LayerCall], None] | None):
        if not isinstance(program, Attention) and not callable(program):
            raise SpecError(f"program must be a saccade.Attention or f(layer, heads); got {type(program).__name__}")
        layers = _attention_layers(model)
        programs = [_resolve(program, index, heads) for index, _, heads in layers]
        self.model = cast(Any, model)
        self.modules = [module for _, module, _ in layers]
        self.before = [(c, c._attn_implementation_internal) for c in _configs(model)]
        self.installed = True
        _register()
        Installed._count += 1
        try:
            self.model.set_attn_implementation(NAME)
            missed = [m for m in self.modules if m.config._attn_implementation != NAME]
            if missed:
                raise Unsupported(
                    f"{type(missed[0]).__name__} of {type(model).__name__} kept attention"
                    f" {missed[0].config._attn_implementation!r} when it was set to {NAME!r}"
                )
            for (index, module, _), one in zip(layers, programs, strict=True):
                setattr(module, STATE, _Layer(index, one, watch))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Put the model back as it was; a second call does nothing."""
        if not self.installed:
            return
        self.installed = False
        for module in self.modules:
            module.__dict__.pop(STATE, None)
        for config, name in self.before:
            config._attn_implementation_internal = name
        Installed._count -= 1
        if not Installed._count:
            _unregister()

    def __enter__(self) -> Installed:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


def _attention_layers(model: nn.Module) -> list[tuple[int, Any, int]]:
    """Layer number, module and query heads of every attention layer of a model that can run programs."""
    from transformers import PreTrainedModel

    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise SpecError(f"model must be a transformers PreTrainedModel; got {name}")
    host: Any = model
    if host.config.is_encoder_decoder or host.config.get_text_config() is not host.config:
        raise Unsupported(f"{name} has an encoder or several towers; only decoder-only text models run programs")
    if not host._can_set_attn_implementation():
        raise Unsupported(
            f"{name} computes attention in its own code, not through transformers' attention interface, so no"
            " program can be put in its place"
        )
    found = []
    module: Any
    for module in host.modules():
        layer = getattr(module, "layer_idx", None)
        if layer is None or "Attention" not in type(module).__name__ or not hasattr(module, "config"):
            continue
        if STATE in module.__dict__:
            raise SpecError(f"{name} already runs a program: remove it first")
        found.append((int(layer), module, int(module.config.num_attention_heads)))
    if not found:
        raise Unsupported(f"{name} has no attention layer with a number (layer_idx), so programs cannot be dispatched")
    return sorted(found, key=lambda one: one[0])


def _configs(model: nn.Module) -> list[Any]:
    """Every config that :meth:`set_attn_implementation` may write to, once."""
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


@dataclass
class _Layer:
    """What a layer's module carries while a program is installed."""

    index: int
    program: Attention
    watch: Callable[[LayerCall], None] | None
    combined: dict[Any, Attention] = field(default_factory=dict)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *, dropout: float = 0.0,
    scaling: float | None = None, softcap: float | None = None, s_aux: Tensor | None = None,
    position_bias: Tensor | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The attention function that transformers calls in every layer."""
    layer: _Layer | None = module.__dict__.get(STATE)
    if layer is None:
        raise SpecError(f"{type(module).__name__} is set to {NAME!r} attention but no program is installed in it")
    if dropout:
        raise Unsupported("attention dropout inside a program: use model.eval() or set attention_dropout to 0")
    if position_bias is not None:
        raise Unsupported(f"{type(module).__name__} adds a position bias, which programs do not take over yet")
    view = attention_mask if isinstance(attention_mask, View) else View.given(attention_mask, query, key)
    if view.keys != key.shape[2]:
        raise SpecError(f"layer {layer.index}: the mask was made for {view.keys} keys, the cache gave {key.shape[2]}")

    def combine(program: Attention) -> Attention:
        return _combine(program, view, scaling, softcap, s_aux)

    if view.name is None:
        spec = combine(layer.program)
    else:
        told = (view.name, scaling, softcap, None if s_aux is None else id(s_aux))
        spec = layer.combined.get(told) or layer.combined.setdefault(told, combine(layer.program))
    out = attention(query, key, value, spec, offset=view.offset)
    if layer.watch is not None:
        layer.watch(LayerCall(layer.index, query, key, value, out, view.offset, combine))
    return out.transpose(1, 2).contiguous(), None


def _combine(
    program: Attention, view: View, scaling: float | None, softcap: float | None, sinks: Tensor | None
) -> Attention:
    """A program inside the model's own mask, scale, soft cap and sink logits."""
    form = program.form
    if type(form) is Dot and form.factor is None:
        form = Dot(scaling)
    normalizer = program.normalizer
    if sinks is not None:
        if type(normalizer) is not Softmax or normalizer.sink is not None:
            raise Unsupported(
                f"the model's softmax has sink logits, and {type(normalizer).__name__} would take their place"
            )
        normalizer = Softmax(sink=sinks)
    early = [SoftCap(softcap)] if softcap is not None else []
    bias = [Bias(view.bias)] if view.bias is not None else []
    return Attention(
        score=[form, *early, *bias, *program.modifiers],
        mask=view.narrow(program.mask),
        normalizer=normalizer,
        edits=program.changes,
        select=program.select,
    )
