"""Laws of the systems that live in a host's model: caches, and methods done to a model.

They run on a small Llama with random weights, sharp enough that what is attended to matters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..cache import Cache
from ..systems.base import CacheSystem, MethodSystem
from .laws import Broken, Skipped

TIGHT = 1e-4  # of float32, relative to the largest logit
BUDGET = 12
LENGTH = 48
ROUNDING = 1e-5  # a change of logits below this share of the largest is float32's own

CACHE_LAWS: dict[str, Callable[[CacheSystem], str]] = {}
METHOD_LAWS: dict[str, Callable[[MethodSystem], str]] = {}


def enter(laws: dict[str, Callable[[Any], str]]) -> Callable[[Callable[[Any], str]], Callable[[Any], str]]:
    """Put a function among ``laws`` under its own name."""

    def law(function: Callable[[Any], str]) -> Callable[[Any], str]:
        laws[function.__name__.replace("_", " ")] = function
        return function

    return law


def small_model(seed: int = 0) -> Any:
    """A Llama of 2 layers, 4 heads over 2 key heads, random and sharp."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for p in model.parameters():
        if p.ndim > 1:
            p.data.mul_(5)
    return model


def some_tokens(batch: int = 2, length: int = LENGTH) -> Tensor:
    """Random tokens ``[batch, length]``, none of them special."""
    return torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(1))


def pieces(tokens: Tensor) -> list[Tensor]:
    """A long prompt, a second chunk, and single steps."""
    return [tokens[:, :30], tokens[:, 30:38], *tokens[:, 38:].split(1, 1)]


@torch.no_grad()
def walk(
    model: Any, cache: Cache, parts: Sequence[Tensor], padding: Tensor | None = None
) -> tuple[Tensor, list[list[dict[int, Tensor]]]]:
    """Logits piece by piece, and what each layer held before each piece: positions ``[B, M]`` by key head."""
    plan: list[list[dict[int, Tensor]]] = []
    found, done = [], 0
    with cache:
        for piece in parts:
            plan.append(
                [{h: s.positions[:, i] for s in held.segments for i, h in enumerate(s.heads.tolist())}
                 for held in cache.held]
            )  # fmt: skip
            done += piece.shape[1]
            keep = None if padding is None else padding[:, :done]
            found.append(model(piece, past_key_values=cache, attention_mask=keep).logits)
    return torch.cat(found, 1), plan


class MaskedModel:
    """The judge of caches: keeps every token, and hides in plain eager attention what the cache had dropped."""

    def __init__(self, model: Any, plan: list[list[dict[int, Tensor]]]):
        self.model, self.plan, self.step = model, plan, 0

    @torch.no_grad()
    def logits(self, parts: Sequence[Tensor], padding: Tensor | None = None) -> Tensor:
        """What the model says piece by piece with the dropped tokens masked out."""
        from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
        from transformers.masking_utils import eager_mask

        before = self.model.config._attn_implementation
        AttentionInterface.register("saccade_judge", self._attend)
        AttentionMaskInterface.register("saccade_judge", eager_mask)
        cache = DynamicCache()  # without a config: it keeps what a sliding layer would drop
        found, done = [], 0
        try:
            self.model.set_attn_implementation("saccade_judge")
            for step, piece in enumerate(parts):
                self.step, done = step, done + piece.shape[1]
                keep = None if padding is None else padding[:, :done]
                found.append(self.model(piece, past_key_values=cache, attention_mask=keep).logits)
        finally:
            self.model.set_attn_implementation(before)
            for registry in (AttentionInterface, AttentionMaskInterface):
                registry._global_mapping.pop("saccade_judge", None)
        return torch.cat(found, 1)

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float,
        softcap: float | None = None, s_aux: Tensor | None = None, **__: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        (batch, heads, new, _), total = query.shape, key.shape[2]
        rep = heads // key.shape[1]
        seen = torch.zeros(batch, key.shape[1], total + 1, dtype=torch.bool)
        for head, positions in self.plan[self.step][module.layer_idx].items():
            seen[:, head].scatter_(1, torch.where(positions < 0, total, positions), True)
        seen = seen[..., :total]
        seen[:, :, total - new :] = True
        visible = seen.repeat_interleave(rep, 1)[:, :, None] & torch.ones(new, total).tril(total - new).bool()
        if attention_mask is not None:
            visible = visible & (attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0)
        score = query @ key.repeat_interleave(rep, 1).mT * scaling
        if softcap is not None:
            score = torch.tanh(score / softcap) * softcap
        score = score.masked_fill(~visible, torch.finfo(score.dtype).min)
        if s_aux is not None:
            score = torch.cat([score, s_aux.view(1, -1, 1, 1).expand(batch, -1, new, 1)], -1)
        weights = score.softmax(-1)[..., :total] * visible
        return (weights @ value.repeat_interleave(rep, 1)).transpose(1, 2).contiguous(), None


def _apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@enter(CACHE_LAWS)
def equals_the_model_with_dropped_tokens_masked(system: CacheSystem) -> str:
    """A prompt, a second chunk and single steps give what the same model gives when what was dropped is hidden."""
    model, tokens = small_model(), some_tokens()
    cache = Cache(model, system.policy(), budget=BUDGET)
    found, plan = walk(model, cache, pieces(tokens))
    apart = _apart(found, MaskedModel(model, plan).logits(pieces(tokens)))
    if not apart < TIGHT:
        raise Broken(f"differs by {apart:.1e} of the largest logit")
    if _apart(found, walk(model, Cache(model), pieces(tokens))[0]) < TIGHT:
        raise Broken(f"with a budget of {BUDGET} of {LENGTH} tokens nothing changed: nothing was dropped")
    return f"differs by {apart:.1e} of the largest logit"


@enter(CACHE_LAWS)
def keeps_to_the_budget(system: CacheSystem) -> str:
    """After every call no head holds more than the budget (on average over a layer's heads, if they share it).

    A policy that drops nothing while decoding is held to it after the prompt and its chunks.
    """
    model, tokens = small_model(), some_tokens()
    policy = system.policy()
    cache, most = Cache(model, policy, budget=BUDGET), 0.0
    with torch.no_grad(), cache:
        for piece in pieces(tokens):
            model(piece, past_key_values=cache)
            for layer in cache.kept() if piece.shape[1] > 1 or policy.while_decoding else ():
                most = max(most, sum(layer) / len(layer) if policy.shared else max(layer))
    # Samples of a batch hold equally many of a head, which may cost a shared budget some slots.
    if most > BUDGET * (1.5 if policy.shared else 1):
        raise Broken(f"{most:g} tokens were held with a budget of {BUDGET}")
    return f"at most {most:g} tokens with a budget of {BUDGET}"


@enter(CACHE_LAWS)
def a_budget_above_the_length_changes_nothing(system: CacheSystem) -> str:
    """With room for everything the model says what it says without."""
    model, tokens = small_model(), some_tokens()
    found, _ = walk(model, Cache(model, system.policy(), budget=2 * LENGTH), pieces(tokens))
    with torch.no_grad():
        apart = _apart(found, model(tokens, use_cache=False).logits)
    if not apart < TIGHT:
        raise Broken(f"differs by {apart:.1e} of the largest logit")
    return f"differs by {apart:.1e}"


@enter(CACHE_LAWS)
def padding_is_not_held(system: CacheSystem) -> str:
    """A left-padded text in a batch is answered as with its dropped tokens masked, and padding takes no real slot."""
    model, tokens = small_model(), some_tokens()
    padding = torch.ones_like(tokens)
    padding[0, :9] = 0
    cache = Cache(model, system.policy(), budget=BUDGET)
    found, plan = walk(model, cache, pieces(tokens), padding)
    real = padding.bool()
    apart = _apart(found[real], MaskedModel(model, plan).logits(pieces(tokens), padding)[real])
    held = [s.positions[0] for layer in cache.held for s in layer.segments]
    if any(bool(((p >= 0) & (p < 9)).any()) for p in held):
        raise Broken("padding is held as if it were text")
    if not apart < TIGHT:
        raise Broken(f"differs by {apart:.1e} of the largest logit")
    return f"differs by {apart:.1e}"


@enter(METHOD_LAWS)
def does_something_and_leaves_no_trace(system: MethodSystem) -> str:
    """Inside the context the model answers otherwise; afterwards it is, and answers, exactly as before."""
    model, tokens = small_model(), some_tokens()
    state = [sorted(vars(m)) for m in model.modules()]
    with torch.no_grad():
        before = model(tokens, use_cache=False).logits
        with system.apply(model):
            inside = model(tokens, use_cache=False).logits
        after = model(tokens, use_cache=False).logits
    if not torch.equal(before, after):
        raise Broken(f"afterwards the model answers otherwise, by {_apart(after, before):.1e} of the largest logit")
    if state != [sorted(vars(m)) for m in model.modules()]:
        raise Broken("afterwards the model's modules carry other attributes than before")
    change = _apart(inside, before)
    if not bool(inside.isfinite().all()):
        raise Broken("inside, logits are not finite")
    if change < ROUNDING:
        raise Skipped("a forward pass alone is not changed (the method acts on decoding, on training, or reads only)")
    return f"changes logits by {change:.1e} of the largest"


@enter(METHOD_LAWS)
def generates(system: MethodSystem) -> str:
    """``generate`` with a cache, greedy, gives as many tokens as asked for."""
    model, tokens = small_model(), some_tokens()
    with torch.no_grad(), system.apply(model):
        found = model.generate(tokens, max_new_tokens=5, do_sample=False, eos_token_id=None)
    if found.shape != (2, LENGTH + 5):
        raise Broken(f"gave {tuple(found.shape)}, not {(2, LENGTH + 5)}")
    return "5 tokens for a batch of 2"
