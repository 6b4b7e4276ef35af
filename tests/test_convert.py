"""Conversions of trained models, by what must not change, by closed forms, and by MoH's official router written out."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from saccade import SpecError
from saccade.core.errors import Unsupported
from saccade.hosts.convert import QueryRouter, sites, to_grouped, to_routed, to_shared
from saccade.nn import GPT, MultiHead, gates
from saccade.nn.backbones import Place
from saccade.systems.score.moa_heads import MixtureOfHeads

torch.set_num_threads(1)
SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
TOKENS = torch.randint(3, 60, (2, 13), generator=torch.Generator().manual_seed(0))


def llama(**changed):
    torch.manual_seed(0)
    return sharpened(LlamaForCausalLM(LlamaConfig(**SIZES | changed)))


def qwen():
    """One whose projections have biases."""
    torch.manual_seed(0)
    model = sharpened(Qwen2ForCausalLM(Qwen2Config(**SIZES)))
    for layer in model.model.layers:
        for p in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            nn.init.normal_(p.bias)
    return model


def gpt():
    torch.manual_seed(0)
    return sharpened(GPT(60, 32, 2, 4))


def sharpened(model):
    for p in model.parameters():
        if p.ndim > 1:
            p.data.mul_(5)
    return model.eval()


@torch.no_grad()
def says(model):
    found = model(TOKENS)
    return found if isinstance(found, torch.Tensor) else found.logits


@torch.no_grad()
def tie(model, groups):
    """Make the key and value heads of a group copies of its first."""
    for site in sites(model):
        for linear in (site.k, site.v):
            for p in linear.parameters():
                first = p.unflatten(0, (groups, site.heads[1] // groups, -1))[:, :1]
                p.copy_(first.expand(groups, site.heads[1] // groups, *first.shape[2:]).reshape(p.shape))


MODELS = pytest.mark.parametrize("make", [llama, qwen, gpt])


@MODELS
def test_as_many_groups_as_heads_change_nothing(make):
    model = make()
    same = to_grouped(model, 4)
    assert same is not model and torch.equal(says(same), says(model))


@MODELS
@pytest.mark.parametrize("groups", [2, 1])
def test_grouping_is_exact_where_heads_are_tied_and_nowhere_else(make, groups):
    model = make()
    assert float((says(to_grouped(model, groups)) - says(model)).abs().max()) > 0.1
    tie(model, groups)
    before = says(model)
    torch.testing.assert_close(says(to_grouped(model, groups)), before, atol=1e-4, rtol=1e-4)
    assert torch.equal(says(model), before)


def test_a_grouped_head_is_the_mean_of_its_neighbours():
    model = llama()
    grouped = to_grouped(model, 2)
    old, new = (m.model.layers[1].self_attn.v_proj.weight for m in (model, grouped))
    torch.testing.assert_close(new[:8], (old[:8] + old[8:16]) / 2)
    torch.testing.assert_close(new[8:], (old[16:24] + old[24:]) / 2)
    assert type(grouped) is LlamaForCausalLM and grouped.config.num_key_value_heads == 2
    assert model.config.num_key_value_heads == 4 and not grouped.training


def test_what_is_grouped_is_saved_and_loaded_and_decodes(tmp_path):
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "before")
    model = to_shared(AutoModelForCausalLM.from_pretrained(tmp_path / "before", dtype=torch.bfloat16))
    assert model.dtype == torch.bfloat16 and model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.num_key_value_heads == 1
    assert torch.equal(says(loaded), says(model))
    with torch.no_grad():
        first = model(TOKENS[:, :9], use_cache=True)
        second = model(TOKENS[:, 9:], past_key_values=first.past_key_values)
    assert first.past_key_values.layers[0].keys.shape[1] == 1
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), says(model), atol=0.1, rtol=0.05)


def test_a_layer_of_two_numbers_of_heads_is_grouped_too():
    layer = MultiHead(gpt().attentions[0].spec, 32, 8, kv_heads=(2, 4))
    made = to_grouped(layer, 2)
    assert torch.equal(made.k.weight, layer.k.weight) and made.v.out_features == 8
    assert layer.value_heads == 4 and made.value_heads == 2


def official(model, tokens, shared, keep):
    """MoH-LLaMA3/Inference_code/modeling_llama.py: the 0/1 mask of heads by the norms of queries, for each layer."""
    masks = []

    def look(projection, given, q):
        size = q.view(-1, 4, 8)
        logits = torch.stack([torch.norm(size[:, i], p=2, dim=1) for i in range(shared, 4)], 1)
        order = torch.softmax(logits / logits.std(1, keepdim=True), 1).topk(keep, 1).indices
        mask = nn.functional.one_hot(order, 4 - shared).sum(1).view(*tokens.shape, -1)
        masks.append(torch.cat([torch.ones(*tokens.shape, shared), mask], -1))

    def weigh(projection, given):
        return ((given[0].unflatten(-1, (4, 8)) * masks[-1][..., None]).flatten(-2),)

    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_hook(look)
        layer.self_attn.o_proj.register_forward_pre_hook(weigh)
    return says(model), masks


def test_routing_is_mohs_of_llama():
    model = llama()
    before = says(model)
    expected, masks = official(llama(), TOKENS, 1, 2)
    routed = to_routed(model, active=0.75, shared=0.25)
    torch.testing.assert_close(says(routed), expected)
    assert (
        all(int(mask.sum(-1).unique()) == 3 for mask in masks) and len({*map(str, masks[0].flatten(0, 1).tolist())}) > 1
    )
    assert not torch.allclose(expected, before, atol=0.1)
    assert torch.equal(says(model), before)
    assert type(routed) is LlamaForCausalLM and routed.state_dict().keys() == model.state_dict().keys()


@MODELS
def test_routing_to_all_heads_changes_nothing(make):
    model = make()
    torch.testing.assert_close(says(to_routed(model, active=1.0)), says(model))


@MODELS
def test_what_is_routed_decodes_and_can_be_copied_and_grouped_before(make):
    model = to_routed(to_grouped(make(), 2), active=0.75, shared=0.25)
    torch.testing.assert_close(says(to_grouped(make(), 2)), says(to_routed(to_grouped(make(), 2), active=1.0)))
    if isinstance(model, GPT):
        caches = model.caches()
        parts = [model(part, caches) for part in TOKENS.split([9, 1, 3], 1)]
    else:
        first = model(TOKENS[:, :9], use_cache=True)
        parts = [first.logits, model(TOKENS[:, 9:], past_key_values=first.past_key_values).logits]
    torch.testing.assert_close(torch.cat(parts, 1), says(model), atol=1e-4, rtol=1e-4)


def test_routers_learn_through_the_queries_and_are_balanced():
    model = to_routed(gpt(), active=0.5, shared=0.25).train()
    query = model.attentions[0].q.weight
    logits = model(TOKENS)
    p = model.attentions[0].query_router.balance
    assert p is not None and gates.balance(model) > 0 and p.requires_grad
    logits.square().mean().backward()
    assert bool(query.grad.any())
    router = QueryRouter(4, 1, 1)
    q = torch.randn(1, 1, 32, dtype=torch.float64, requires_grad=True)
    out = torch.randn(1, 1, 32, dtype=torch.float64)

    def routed(q):
        router.read(None, None, q)
        return router.weigh(None, (out,))

    def soft(q):
        size = q.unflatten(-1, (4, 8)).norm(dim=-1)[..., 1:]
        p = (size / size.std(-1, keepdim=True)).softmax(-1)
        gate = torch.cat([torch.ones(1, 1, 1, dtype=q.dtype), p], -1)
        return (out.unflatten(-1, (4, 8)) * gate[..., None]).flatten(-2)

    found, wanted = (torch.autograd.grad(f(q).sum(), q)[0] for f in (routed, soft))
    torch.testing.assert_close(found, wanted)  # straight through: the value is 0 or 1, the gradient that of p


def test_errors_say_what_there_is():
    with pytest.raises(SpecError, match="4 heads of keys and values make 1, 2, 4 groups; got 3"):
        to_grouped(llama(), 3)
    with pytest.raises(SpecError, match="GPT2LMHeadModel has no attention with linear layers q_proj"):
        to_shared(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9)))
    with pytest.raises(SpecError, match="of 4 heads 2 are always used and 0"):
        to_routed(gpt(), active=0.5, shared=0.5)
    with pytest.raises(SpecError, match="at least 2 must be there"):
        to_routed(gpt(), active=1.0, shared=0.75)
    with pytest.raises(SpecError, match="has a router already"):
        to_routed(to_routed(gpt()))
    with pytest.raises(SpecError, match="group the heads first"):
        to_shared(to_routed(llama()))
    with pytest.raises(SpecError, match="LlamaAttention alone"):
        to_shared(llama().model.layers[0].self_attn)
    with pytest.raises(SpecError, match="MixtureOfHeads has no attention"):  # its projections are not of all heads
        to_shared(MixtureOfHeads(gpt().attentions[0].spec, Place(32, 4, 0, 1, None, None), 8))
    with pytest.raises(Unsupported, match="differs in more than projections"):
        to_shared(Olmo2ForCausalLM(Olmo2Config(**SIZES)))  # it has norms of all key heads together
