"""hedgehog: its maps against the formula and a model's own weights; conversion; what distillation does."""

import math

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from saccade import linear_weights
from saccade.hosts.replaced import Read, read
from saccade.nn.backbones import Place
from saccade.systems.linear._mimicry import softmax_weights, weight_shapes
from saccade.systems.linear.hedgehog import Hedgehog, score, tune


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def llama(heads=4, kv_heads=2):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=8, max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tokens(batch, length, seed=0):
    return torch.randint(40, (batch, length), generator=torch.Generator().manual_seed(seed))


def map_of(x, weight):
    y = x @ weight
    parts = [p.exp() / p.exp().sum(-1, keepdim=True) for p in (y, -y)]
    return torch.cat(parts, -1)


def test_weights_are_the_formula():
    spec = Hedgehog().program(2, 6)
    with torch.no_grad():
        for part, seed in ((spec.feature.queries, 5), (spec.feature.keys, 6)):
            part.weight.copy_(draw(2, 6, 6, seed=seed))
    q, k = draw(1, 2, 9, 6), draw(1, 2, 9, 6, seed=1)
    scores = torch.stack([
        map_of(q[0, h], spec.feature.queries.weight[h]) @ map_of(k[0, h], spec.feature.keys.weight[h]).T for h in (0, 1)
    ]).tril()  # fmt: skip
    assert_close(linear_weights(q, k, spec)[0], scores / scores.sum(-1, keepdim=True))


def test_the_maps_start_as_the_identity_and_apart():
    layer = Place(24, 3, 0, 1, None, None).filled(Hedgehog().layer)
    queries, keys = layer.spec.feature.queries.weight, layer.spec.feature.keys.weight
    assert_close(queries.detach(), torch.eye(8).expand(3, 8, 8))
    assert queries.data_ptr() != keys.data_ptr()


def test_wider_maps_add_rotations_that_queries_and_keys_share():
    spec = Hedgehog(expand=3).program(2, 8)
    queries, keys = (part.weight.detach() for part in (spec.feature.queries, spec.feature.keys))
    assert_close(queries, keys)
    first, *others = queries[1].split(8, 1)
    assert_close(first, torch.eye(8))
    for turn in others:
        assert_close(turn @ turn.T, torch.eye(8), atol=1e-5, rtol=0)
        assert float((turn - first).abs().max()) > 0.1


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_converted_model_attends_with_the_maps_of_each_query_head(kv_heads):
    model, text = llama(4, kv_heads), tokens(2, 12)
    system = Hedgehog()
    made = system.distill(model, [text])
    before = model(text).logits
    layer = read(model, text)[0]
    with torch.no_grad(), system.apply(model, made):
        seen = []
        hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda m, given: seen.append(given[0]))
        found = model(text, use_cache=False).logits
        hook.remove()
    k, v = (x.repeat_interleave(4 // kv_heads, 1) for x in (layer.k, layer.v))
    feature = made[0].feature
    f_q, f_k = (map_of(x, part.weight) for x, part in ((layer.q, feature.queries), (k, feature.keys)))
    scores = (f_q @ f_k.mT).tril()
    want = (scores / scores.sum(-1, keepdim=True)) @ v
    assert_close(seen[0].unflatten(-1, (4, 8)).transpose(1, 2), want, rtol=1e-4, atol=1e-5)
    assert float((found - before).detach().abs().max()) > 0.01
    assert_close(model(text).logits, before)  # left as it was


def test_what_is_mimicked_are_the_models_own_weights():
    model, text = llama(), tokens(2, 12)
    found = [softmax_weights(layer) for layer in read(model, text)]
    model.set_attn_implementation("eager")
    for ours, theirs in zip(found, model(text, output_attentions=True).attentions, strict=True):
        assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-6)


def test_decoding_gives_what_the_whole_text_gives():
    model, text, system = llama(), tokens(1, 20), Hedgehog()
    made = system.distill(model, [text])
    with torch.no_grad(), system.apply(model, made):
        whole = model(text, use_cache=False).logits
        first = model(text[:, :15], use_cache=True)
        cache, parts = first.past_key_values, [first.logits]
        for t in range(15, 20):
            step = model(text[:, t : t + 1], past_key_values=cache, use_cache=True)
            parts.append(step.logits)
    assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padding_is_nothing():
    model, text, system = llama(), tokens(2, 10), Hedgehog()
    with torch.enable_grad():
        made = system.distill(model, [text])
    keep = torch.ones(2, 10, dtype=torch.long)
    keep[0, :4] = 0
    with system.apply(model, made):
        found = model(text, attention_mask=keep, position_ids=(keep.cumsum(-1) - 1).clamp(min=0)).logits
        assert_close(found[:1, 4:], model(text[:1, 4:]).logits, rtol=1e-4, atol=1e-4)
        assert_close(found[1:], model(text[1:]).logits, rtol=1e-4, atol=1e-4)


def test_distillation_brings_the_maps_nearer_and_leaves_the_model():
    model, system = llama(), Hedgehog()
    frozen = {name: p.clone() for name, p in model.state_dict().items()}
    texts = [tokens(4, 24, seed) for seed in range(25)]
    held = tokens(4, 24, 99)

    def divergence(made):
        total = 0.0
        for spec, layer in zip(made, read(model, held), strict=True):
            k = layer.k.repeat_interleave(2, 1)
            later = torch.ones(24, 24, dtype=torch.bool).triu(1)
            truth = (layer.q @ k.mT / math.sqrt(8)).masked_fill(later, -torch.inf).softmax(-1)
            ratio = truth.clamp(min=1e-30).log() - linear_weights(layer.q, layer.k, spec).clamp(min=1e-12).log()
            total += float((truth * ratio).sum(-1).mean().detach())
        return total

    short, long = system.distill(model, texts[:1], rate=0.0), system.distill(model, texts, rate=6e-2)
    assert 0 < divergence(long) < 0.95 * divergence(short)
    for name, p in model.state_dict().items():
        assert_close(p, frozen[name])


def test_tuning_teaches_a_converted_model():
    model, system = llama(), Hedgehog()
    text = tokens(2, 24, 3)
    made = system.distill(model, [text])
    start = made[0].feature.queries.weight.detach().clone()
    with system.apply(model, made):
        before = score(model, text)[0]
        tune(model, made, [text] * 30, rate=1e-2)
        assert score(model, text)[0] > max(0.5, before)
    assert float((made[0].feature.queries.weight.detach() - start).abs().max()) > 1e-3


def test_shapes_of_weights_that_are_known():
    layer = Read(torch.zeros(1, 1, 8, 4), torch.zeros(1, 1, 8, 4), torch.zeros(1, 1, 8, 4), 0.5)
    found = weight_shapes(torch.nn.ModuleList([Hedgehog().program(1, 4)]), [layer])
    assert found["entropy_softmax"] == pytest.approx(math.log(8))
    assert found["entropy_elu"] == pytest.approx(math.log(8), abs=1e-5)
