"""Conversions of a trained model: from one key head for each query head to grouped, shared or routed heads.

    to_grouped  key and value heads become the means of neighbours (GQA, arXiv:2305.13245, section 2.1)
    to_shared   the mean of all (MQA, arXiv:1911.02150)
    to_routed   some heads always, of the others the best few for each token (MoH, arXiv:2410.11842)

Each takes a causal language model of transformers with separate projections (``q_proj``, ``k_proj``, ``v_proj``,
``o_proj``: Llama, Mistral, Qwen and their like), or a layer or model of :mod:`saccade.nn`, and returns a copy that
works; the original stays as it was. What a conversion costs is regained by a short tuning.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..core.errors import SpecError, Unsupported
from ..nn.attention import MultiHead
from ..nn.gates import best, load_balance

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")
ROUTER = "query_router"  # what a router is called in its attention module
EPSILON = 1e-6
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Site:
    """One attention module: its path in the model, its projections, and its heads of queries, keys and values."""

    path: str
    module: Any
    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    out: nn.Linear
    heads: tuple[int, int, int]


def to_grouped(model: Model, groups: int) -> Model:
    """With ``groups`` heads of keys and values, each the mean of as many neighbours.

    A model of transformers is the same class with another ``num_key_value_heads``: it can be saved and loaded.

    Raises:
        SpecError: ``groups`` does not divide the heads of keys and values, there is no attention to convert, or it is
            routed already.
        Unsupported: the class holds more by key head than the projections.
    """
    for site in sites(model):
        if hasattr(site.module, ROUTER):
            raise SpecError("to_grouped: a router would be lost: group the heads first, then route them")
        for heads in site.heads[1:]:
            if groups < 1 or heads % groups:
                divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
                raise SpecError(f"to_grouped: {heads} heads of keys and values make {divisors} groups; got {groups}")
    if all(isinstance(site.module, MultiHead) for site in sites(model)):
        return _regrouped(copy.deepcopy(model), groups)
    return _remade(model, groups)


def to_shared(model: Model) -> Model:
    """With one head of keys and values for all query heads; see :func:`to_grouped`."""
    return to_grouped(model, 1)


def to_routed(model: Model, active: float = 0.75, shared: float = 0.5) -> Model:
    """With a parameter-free router in every attention: the weights, the class and its saved form stay the same.

    As MoH-LLaMA3-8B: the first half of the heads shared, three quarters of all in use. A saved model is to be converted
    again when it is loaded. For tuning, add :func:`saccade.nn.gates.balance` to the loss.

    Args:
        model: to be copied.
        active: share of the heads that a token uses, rounded down as in the official code.
        shared: share of the heads, the first ones, that every token uses.

    Raises:
        SpecError: no routed head would be in use, or too few are left to choose from; or the model is routed already.
    """
    made = copy.deepcopy(model)
    for site in sites(made):
        if hasattr(site.module, ROUTER):
            raise SpecError(f"to_routed: {site.path or type(model).__name__} has a router already")
        always = int(shared * site.heads[0] + EPSILON)
        router = QueryRouter(site.heads[0], int(active * site.heads[0] + EPSILON) - always, always)
        site.module.add_module(ROUTER, router)
        site.q.register_forward_hook(router.read)
        site.out.register_forward_pre_hook(router.weigh)
    return made


class QueryRouter(nn.Module):
    """MoH's router for a trained model: a head is chosen by the length of its query.

        score = |q[h]| / (deviation of the |q| of the token's routed heads);   p = softmax(score)
        gate  = 1 for shared heads and for the ``keep`` routed ones with the greatest p, else 0

    Gates of 1 leave the output's size alone. In the backward pass a routed gate is p (a straight-through estimator), so
    that queries learn whom to choose. ``balance`` is as :class:`saccade.nn.gates.HeadRouter`'s. The forward pass is the
    official code's (MoH-LLaMA3/Inference_code/modeling_llama.py); the training code was not released, so the backward
    pass and the balance are the paper's, from memory.
    """

    def __init__(self, heads: int, keep: int, shared: int):
        super().__init__()
        routed = heads - shared
        if shared < 0 or routed < 2 or not 1 <= keep <= routed:
            raise SpecError(
                f"to_routed: of {heads} heads {shared} are always used and {keep} of the other {routed} by choice; at"
                " least 2 must be there to choose from, and 1 chosen: change active= or shared="
            )
        self.heads, self.keep, self.shared = heads, keep, shared
        self.gate: Tensor | None = None
        self.balance: Tensor | None = None

    def read(self, projection: nn.Module, given: Any, q: Tensor) -> None:
        """A forward hook of the query projection, which gives ``[..., H * D]``."""
        size = q.unflatten(-1, (self.heads, -1)).norm(dim=-1)
        routed = size[..., self.shared :]
        p = (routed / routed.std(-1, keepdim=True).clamp(min=EPSILON)).softmax(-1)
        kept = best(p, self.keep)
        self.balance = load_balance(p, kept) if self.training else None
        self.gate = torch.cat([torch.ones_like(size[..., : self.shared]), kept + (p - p.detach())], -1)

    def weigh(self, projection: nn.Module, given: tuple[Tensor]) -> Tensor:
        """A forward pre-hook of the output projection, which is given ``[..., H * D]``."""
        assert self.gate is not None
        gate, self.gate = self.gate, None
        return (given[0].unflatten(-1, (self.heads, -1)) * gate[..., None]).flatten(-2)


def sites(model: nn.Module) -> list[Site]:
    """Every attention module that has separate projections.

    Raises:
        SpecError: there is none.
    """
    found = []
    for path, module in model.named_modules():
        names = ("q", "k", "v", "out") if isinstance(module, MultiHead) else NAMES
        parts: list[Any] = [getattr(module, name, None) for name in names]
        if all(isinstance(part, nn.Linear) for part in parts):
            q, k, v, out = parts
            heads = _heads(module, q, k, v)
            if heads is not None:
                found.append(Site(path, module, q, k, v, out, heads))
    if not found:
        raise SpecError(
            f"{type(model).__name__} has no attention with linear layers {', '.join(NAMES)}, and no"
            " saccade.nn.MultiHead: only these can be converted"
        )
    return found


def _heads(module: Any, q: nn.Linear, k: nn.Linear, v: nn.Linear) -> tuple[int, int, int] | None:
    """Heads of queries, keys and values; ``None`` where the projections are of something else."""
    if isinstance(module, MultiHead):
        if type(module).project is not MultiHead.project:
            return None
        heads = module.heads, module.key_heads, module.value_heads
        widths = {linear.out_features / n for linear, n in zip((q, k, v), heads, strict=True)}
        return heads if widths == {module.head_width} else None
    width = getattr(module, "head_dim", None)
    if not isinstance(width, int):
        return None
    return q.out_features // width, k.out_features // width, v.out_features // width


def _regrouped(model: Model, groups: int) -> Model:
    """A model of :mod:`saccade.nn`, changed in place."""
    for site in sites(model):
        for name, old, heads in zip("kv", (site.k, site.v), site.heads[1:], strict=True):
            new = nn.Linear(old.in_features, groups * site.module.head_width, old.bias is not None, device="meta")
            for key, value in old.named_parameters():
                setattr(new, key, nn.Parameter(_pooled(value.detach(), heads, groups), value.requires_grad))
            setattr(site.module, name, new)
        site.module.key_heads = site.module.value_heads = groups
    return model


def _remade(model: Any, groups: int) -> Any:
    """A model of transformers, made anew by its class."""
    from transformers import PreTrainedModel

    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise SpecError(f"to_grouped: a layer of transformers is grouped with its model; got {name} alone")
    config = copy.deepcopy(model.config)
    config.get_text_config().num_key_value_heads = groups
    state = {name: x.clone() for name, x in model.state_dict().items()}
    for site in sites(model):
        for projection, heads in zip(NAMES[1:3], site.heads[1:], strict=True):
            for key in (f"{site.path}.{projection}.weight", f"{site.path}.{projection}.bias"):
                if key in state:
                    state[key] = _pooled(state[key], heads, groups)
    with torch.device("meta"):
        made: Any = type(model)(config)
    try:
        made.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise Unsupported(
            f"to_grouped: {name} of {groups} key heads differs in more than projections: {error}"
        ) from error
    for path, buffer in model.named_buffers():  # those that are in no state too
        parent, _, leaf = path.rpartition(".")
        made.get_submodule(parent)._buffers[leaf] = buffer.clone()
    made.tie_weights()
    return made.train(model.training)


def _pooled(x: Tensor, heads: int, groups: int) -> Tensor:
    """``[heads * D, ...]`` to ``[groups * D, ...]``, means of neighbouring heads."""
    return x.unflatten(0, (groups, heads // groups, -1)).mean(1).flatten(0, 1)
