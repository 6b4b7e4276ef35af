"""Layers and backbones against transformers' own with the same weights, closed forms, and each other."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn as torch_nn
from transformers import LlamaConfig, LlamaModel
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as apply_part
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from saccade import Attention, LinearAttention, SpecError, Unsupported, catalog, masks, normalizers, scores, weights
from saccade.nn import GPT, Encoder, EncoderDecoder, KVCache, MultiHead, Stack, ViT, gates, positions
from saccade.nn.init import STD
from saccade.systems.base import Promises, System
from saccade.systems.score.cog import Cog

torch.set_num_threads(1)
CAUSAL = Attention(mask=masks.Causal())


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def sharp(model, factor=8.0):
    """Larger weights, so that attention is far from uniform and a mistake in it shows."""
    with torch.no_grad():
        for attention in model.attentions:
            for linear in (attention.q, attention.k, attention.v, attention.out):
                linear.weight.mul_(factor)
    return model


# ---- positions ----


@pytest.mark.parametrize("start", [0, 5])
def test_rope_is_transformers(start):
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=64, rope_theta=500.0)
    q, k = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16)
    cos, sin = LlamaRotaryEmbedding(config)(q, torch.arange(start, start + 9)[None])
    ours = positions.RoPE(config.rope_parameters["rope_theta"])(q, k, start)
    for one, other in zip(ours, apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_share_of_the_dimensions_turns_as_in_gpt_neox():
    q, k = torch.randn(2, 1, 4, 9, 16).unbind(0)
    angle = torch.arange(9.0)[:, None] * 10_000 ** (-torch.arange(2) / 2)
    cos, sin = (torch.cat([f(angle)] * 2, -1)[None] for f in (torch.cos, torch.sin))
    turned, _ = apply_part(q[..., :4], k[..., :4], cos, sin)
    found, _ = positions.RoPE(share=0.25)(q, k)
    torch.testing.assert_close(found, torch.cat([turned, q[..., 4:]], -1))


def collinear(official):
    q, t = torch.randn(2, 1, 2, 12, 8, dtype=torch.float64).unbind(0)
    a, b = positions.Collinear(official=official)(q, t)
    return q, F.relu((t[..., :4] + t[..., 4:]) / 2), a @ b.mT


def test_collinear_is_the_papers_sum_over_pairs():
    q, factor, found = collinear(official=False)
    speed = 10_000 ** (-torch.arange(4, dtype=torch.float64) / 4)
    away = torch.arange(12)[:, None] - torch.arange(12)
    square = q[..., :4] ** 2 + q[..., 4:] ** 2
    expected = torch.einsum("bhmi,bhni,mni->bhmn", square, factor, torch.cos(away[..., None] * speed))
    torch.testing.assert_close(found, expected)


def test_collinear_as_the_authors_compute_it_is_another_score():
    """Their contraction of q, the turned q and the turned factor, written out; at distance 0 it is not the paper's."""
    q, factor, found = collinear(official=True)
    angle = torch.arange(12.0, dtype=torch.float64)[:, None] * 10_000 ** (-torch.arange(4, dtype=torch.float64) / 4)
    cos, sin = (torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin))

    def turn(x):
        return x * cos + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin

    expected = torch.einsum("bpnd,bpsd,bpnd->bpns", q, turn(torch.cat([factor] * 2, -1)), turn(q))
    torch.testing.assert_close(found, expected)
    paper = torch.einsum("bhni,bhni->bhn", q[..., :4] ** 2 + q[..., 4:] ** 2, factor)
    assert (found.diagonal(dim1=-2, dim2=-1) - paper).abs().max() > 0.1


def test_learned_positions_end():
    learned = positions.Learned(8, 4)
    x = torch.zeros(1, 3, 4)
    assert torch.equal(learned(x, 5)[0], learned.table.weight[5:])
    with pytest.raises(SpecError, match="for 8 tokens, and these reach to 9"):
        learned(x, 6)


# ---- multi-head attention ----


def test_a_whole_gpt_is_transformers_llama_with_the_same_weights():
    """All but the perceptron, which in Llama is gated: ours is put in its place."""
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, rms_norm_eps=torch.finfo(torch.float32).eps,
    )  # fmt: skip
    theirs, ours = LlamaModel(config).eval(), sharp(GPT(50, 32, 2, 4, kv_heads=2))
    with torch.no_grad():
        theirs.embed_tokens.weight.copy_(ours.embed.table.weight)
        theirs.norm.weight.copy_(ours.stack.last.weight)
        for layer, block in zip(theirs.layers, ours.stack.blocks, strict=True):
            for name in "qkv":
                getattr(layer.self_attn, f"{name}_proj").weight.copy_(getattr(block.attention, name).weight)
            layer.self_attn.o_proj.weight.copy_(block.attention.out.weight)
            layer.input_layernorm.weight.copy_(block.before.weight)
            layer.post_attention_layernorm.weight.copy_(block.between.weight)
            layer.mlp = torch_nn.Sequential(block.up, torch_nn.GELU(), block.down)
        tokens = torch.randint(0, 50, (2, 23))
        torch.testing.assert_close(ours.states(tokens), theirs(tokens).last_hidden_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, (1, 4), (4, 2)])
def test_grouped_heads_are_repeated_heads(kv_heads):
    few = MultiHead(CAUSAL, 32, 4, kv_heads=kv_heads, positions=positions.RoPE())
    all_ = MultiHead(CAUSAL, 32, 4, positions=positions.RoPE())
    repeated = few.state_dict()
    for name, heads in (("k", few.key_heads), ("v", few.value_heads)):
        rows = getattr(few, name).weight.detach().unflatten(0, (heads, 8))
        repeated[f"{name}.weight"] = rows.repeat_interleave(4 // heads, 0).flatten(0, 1)
    all_.load_state_dict(repeated)
    x = torch.randn(2, 17, 32)
    torch.testing.assert_close(few(x), all_(x))
    cache = KVCache()
    torch.testing.assert_close(torch.cat([few(x[:, :9], cache=cache), few(x[:, 9:], cache=cache)], 1), few(x))
    assert cache.nbytes == 4 * 2 * 17 * 8 * (few.key_heads + few.value_heads)  # what is held is not repeated


DECODED = {
    "softmax": {},
    "one key head": {"kv_heads": 1},
    "more values than keys": {"kv_heads": (1, 4)},
    "window": {"attention": Attention(mask=masks.Causal() & (masks.Window(8) | masks.Sinks(2)))},
    "alibi": {"attention": Attention(scores.ALiBi(), masks.Causal()), "positions": None},
    "function": {"attention": Attention(lambda s, b, h, q, k: s - 0.1 * (q - k), masks.Causal()), "positions": None},
    "cog": {"attention": "cog"},
    "learned": {"positions": positions.Learned(40, 32)},
    "partial": {"positions": positions.RoPE(share=0.5)},
    "collinear": {"positions": positions.Collinear()},
    "linear": {"attention": LinearAttention(F.silu, decay=-0.1)},
    "normalized linear": {"attention": LinearAttention(F.softplus, normalize=True), "kv_heads": 2},
}


@pytest.mark.parametrize("name", DECODED)
def test_decoding_and_prefill_in_chunks_are_the_whole(name):
    model = sharp(GPT(40, 32, 2, 4, **DECODED[name]))
    tokens = torch.randint(0, 40, (2, 30))
    with torch.no_grad():
        whole, caches = model(tokens), model.caches()
        parts = [model(part, caches) for part in tokens.split([11, 7, *[1] * 12], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
        assert (model(tokens.roll(1, 1)) - whole).abs().max() > 1e-2  # the test can see order
    assert [c.length for c in caches] == [30, 30]


class Gated(MultiHead):
    """Decays and writing strengths of its own for every token, as gated delta rules have."""

    def __init__(self):
        super().__init__(LinearAttention(lambda x: F.normalize(x, dim=-1), delta=True), 32, 4)
        self.rates = torch_nn.Linear(32, 8)

    def options(self, context):
        decay, beta = self.rates(context).mT.chunk(2, 1)
        return {"log_decay": F.logsigmoid(decay + 3), "beta": torch.sigmoid(beta)}


def test_a_gated_delta_rule_plugs_in_and_decodes_with_a_state():
    model = sharp(GPT(40, 32, 2, 4, attention=lambda layer, heads: Gated(), positions=None))
    tokens, caches = torch.randint(0, 40, (2, 30)), model.caches()
    with torch.no_grad():
        whole = model(tokens)
        parts = [model(part, caches) for part in tokens.split([11, 7, *[1] * 12], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    assert {c.nbytes for c in caches} == {4 * 2 * 4 * 8 * 8}  # batch, heads, features, values: whatever the length
    attention = model.attentions[0]
    x = torch.randn(2, 9, 32)
    q, k, v = attention.placed(x)
    seen = attention.attend(q, k, v, **attention.options(x))
    assert (seen - attention.attend(q, k, v)).abs().max() > 1e-2
    torch.testing.assert_close(attention.merge(seen, x), attention(x))


def test_linear_attention_does_not_see_padding():
    model = sharp(Encoder(40, 32, 2, 4, attention=LinearAttention(F.softplus, normalize=True, causal=False)))
    tokens, keep = torch.randint(0, 40, (2, 20)), torch.arange(20) < torch.tensor([[20], [13]])
    torch.testing.assert_close(model(tokens, keep)[1, :13], model(tokens[1:, :13])[0], rtol=1e-4, atol=1e-5)


def test_generating_is_taking_the_likeliest_again_and_again():
    model = sharp(GPT(40, 32, 2, 4), 20)
    tokens = start = torch.randint(0, 40, (2, 5))
    for _ in range(6):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(start, 6), tokens[:, 5:])


def test_one_overridden_step_makes_another_attention():
    class Doubled(MultiHead):
        def project(self, x, context):
            q, k, v = super().project(x, context)
            return q, k, 2 * v

    plain, twice = MultiHead(CAUSAL, 16, 2), Doubled(CAUSAL, 16, 2)
    twice.load_state_dict(plain.state_dict())
    x = torch.randn(1, 7, 16)
    torch.testing.assert_close(twice(x), 2 * plain(x))


def test_what_does_not_fit_is_told():
    with pytest.raises(SpecError, match="no multiple of 4 heads"):
        MultiHead(CAUSAL, 30, 4)
    with pytest.raises(SpecError, match="3 key heads"):
        MultiHead(CAUSAL, 32, 4, kv_heads=3)
    with pytest.raises(SpecError, match="not both"):
        MultiHead(CAUSAL, 32, 4)(torch.zeros(1, 2, 32), torch.zeros(1, 3, 32), cache=KVCache())
    with pytest.raises(Unsupported, match="Sequential takes no KVCache"):
        MultiHead(torch_nn.Sequential(), 32, 4)(torch.zeros(1, 2, 32), cache=KVCache())
    with pytest.raises(SpecError, match="Did you mean 'cog'"):
        GPT(9, attention="cogg")
    with pytest.raises(SpecError, match="promise to be causal"):
        GPT(9, attention=Cog(causal=False))
    with pytest.raises(SpecError, match="no attention that a layer could have"):
        GPT(9, attention="snapkv")
    with pytest.raises(SpecError, match='"rope"'):
        GPT(9, positions="rotary")
    with pytest.raises(SpecError, match="there are gpt2, bert"):
        GPT(9, init="kaiming")
    with pytest.raises(SpecError, match="got int"):
        GPT(9, attention=3)
    with pytest.raises(SpecError, match="patches of 5"):
        ViT(3, 12, 5)
    with pytest.raises(SpecError, match="no even number"):
        positions.RoPE()(torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 2, 3))


# ---- every system of the catalogue ----

PROGRAMS = [slug for slug, system in catalog.systems().items() if system.build is not System.build]


@pytest.mark.parametrize("slug", PROGRAMS)
def test_every_program_of_the_catalogue_plugs_in_by_name_and_trains(slug):
    causal = catalog.find(slug)().promised().causal
    model = (GPT if causal else Encoder)(50, 32, 2, 4, attention=slug)
    tokens = torch.randint(0, 50, (2, 40))
    model(tokens).square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(g.isfinite().all() for g in found.values())
    assert any(g.abs().max() > 0 for name, g in found.items() if ".attention.v." in name)
    if causal:
        later = tokens.clone()
        later[:, 25:] = 1
        torch.testing.assert_close(model(tokens)[:, :25], model(later)[:, :25], rtol=1e-4, atol=1e-5)


def test_a_setting_causal_follows_the_backbone():
    assert isinstance(Encoder(9, attention="cog").attentions[0].spec.mask, masks.Full)
    assert isinstance(GPT(9, attention="cog").attentions[0].spec.mask, masks.Causal)


def test_a_system_may_bring_a_layer_of_its_own():
    class Routed(System):
        promises = Promises()

        def layer(self, place):
            router = gates.HeadRouter(place.width, place.heads, keep=1, shared=1)
            return MultiHead(CAUSAL, place.width, place.heads, positions=place.positions, gate=router)

    model = GPT(9, 32, 3, 4, attention=Routed())
    assert [type(a.gate) for a in model.attentions] == [gates.HeadRouter] * 3
    assert isinstance(model.attentions[0].positions, positions.RoPE)
    model(torch.randint(0, 9, (2, 12)))
    assert gates.balance(model) > 0
    model.eval()(torch.randint(0, 9, (2, 12)))
    assert gates.balance(model) == 0


def test_each_layer_has_its_own_copy_of_a_program():
    model = GPT(9, 32, 2, 4, attention=Attention(scores.RelativeBias(4, 8), masks.Causal()))
    first, second = (a.spec.scores[0].table for a in model.attentions)
    assert first is not second


# ---- first weights ----


def spread(weight):
    return float(weight.detach().std())


def test_first_weights_are_gpt2s_and_the_same_whatever_a_mechanism_draws():
    def greedy(layer, heads):
        return Attention(mask=masks.Causal(), normalizer=normalizers.Entmax(torch_nn.Parameter(1 + torch.rand(heads))))

    torch.manual_seed(3)
    one = GPT(257, 128, 4, 4)
    torch.manual_seed(3)
    two = GPT(257, 128, 4, 4, attention=greedy)
    assert all(torch.equal(p, two.get_parameter(name)) for name, p in one.named_parameters())
    assert not torch.equal(one.embed.table.weight, GPT(257, 128, 4, 4).embed.table.weight)
    for block in one.stack.blocks:
        assert spread(block.attention.q.weight) == pytest.approx(STD, rel=0.05)
        assert spread(block.attention.out.weight) == pytest.approx(STD / 8**0.5, rel=0.05)
        assert spread(block.down.weight) == pytest.approx(STD / 8**0.5, rel=0.05)
    assert not torch.equal(one.stack.blocks[0].up.weight, one.stack.blocks[1].up.weight)
    assert one.stack.blocks[0].up.bias.abs().max() == 0


def test_other_first_weights_and_those_that_keep_theirs():
    class Ones(MultiHead):
        keeps_start = True

        def __init__(self):
            super().__init__(CAUSAL, 32, 4)
            torch_nn.init.ones_(self.q.weight)

    kept = GPT(9, 32, 1, 4, attention=lambda layer, heads: Ones()).attentions[0]
    assert bool((kept.q.weight == 1).all())
    assert spread(ViT(3, 8, 4).stack.blocks[0].up.weight) == pytest.approx(STD, rel=0.1)
    table = EncoderDecoder(300, 64).embed.table.weight
    assert spread(table) == pytest.approx(64**-0.5, rel=0.1)
    up = EncoderDecoder(300, 64).decoder.blocks[0].up.weight
    assert float(up.detach().abs().max()) == pytest.approx((6 / (64 + 256)) ** 0.5, rel=0.01)


# ---- backbones ----


def test_an_encoder_does_not_see_padding():
    for model in (sharp(Encoder(40, 32, 2, 4)), sharp(Encoder(40, 32, 2, 4, classes=5))):
        tokens, keep = torch.randint(0, 40, (2, 20)), torch.arange(20) < torch.tensor([[20], [13]])
        whole, alone = model(tokens, keep)[1], model(tokens[1:, :13])[0]
        torch.testing.assert_close(whole[:13] if model.head is None else whole, alone, rtol=1e-4, atol=1e-5)
        assert (model(tokens)[1] - whole).abs().max() > 1e-3


def test_an_encoder_and_decoder_translate_causally_and_without_padding():
    model = sharp(EncoderDecoder(40, 32, 2, 4), 2)
    source, target = torch.randint(0, 40, (2, 15)), torch.randint(0, 40, (2, 12))
    keep = torch.arange(15) < torch.tensor([[15], [9]])
    with torch.no_grad():
        logits = model(source, target, keep)
        torch.testing.assert_close(logits[1:], model(source[1:, :9], target[1:]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits[:, :7], model(source, target[:, :7], keep), rtol=1e-4, atol=1e-5)
        assert (model(source.flip(1), target)[0] - logits[0]).abs().max() > 1e-2
        said = model.generate(source, 1, 6, keep)
        forced = model(source, torch.cat([torch.ones(2, 1, dtype=torch.long), said[:, :-1]], 1), keep)
    assert torch.equal(said, forced.argmax(-1))


def test_a_vit_reads_patches_row_by_row():
    model = ViT(5, (8, 12), 4, channels=1, width=32, layers=1, heads=4)
    image = torch.randn(2, 1, 8, 12)
    assert model.grid == (2, 3) and model(image).shape == (2, 5)
    patches = F.unfold(image, 4, stride=4).mT @ model.patches.weight.flatten(1).T + model.patches.bias
    torch.testing.assert_close(model.states(image), model.stack(patches + model.positions.table.weight))
    torch.testing.assert_close(model(image), model.head(model.states(image).mean(1)))


def test_a_look_inside_gives_what_each_layer_compares():
    model = sharp(GPT(40, 32, 2, 4))
    tokens = torch.randint(0, 40, (1, 12))
    looks = list(model.inside(tokens))
    assert len(looks) == 2
    x = model.embed(tokens)
    for (spec, q, k), block in zip(looks, model.stack.blocks, strict=True):
        v = block.attention.placed(block.before(x))[2]
        torch.testing.assert_close(
            weights(q, k, spec) @ v, block.attention.attend(*block.attention.placed(block.before(x)))
        )
        x = block(x)


def test_a_stack_takes_vectors():
    stack = Stack(16, 2, 2, CAUSAL)
    x = torch.randn(2, 9, 16)
    torch.testing.assert_close(stack(x)[:, :4], stack(x[:, :4]))


# ---- gates ----


def test_head_router_is_moh_token_by_token():
    router, x, out = gates.HeadRouter(16, 6, keep=2, shared=2), torch.randn(2, 5, 16), torch.randn(2, 6, 5, 4)
    found, gate = router(out, x), router.gates(x)
    uses, likes = torch.zeros(4), torch.zeros(4)
    for b in range(2):
        for n in range(5):
            p = F.softmax(router.route.weight @ x[b, n], 0)
            best = sorted(range(4), key=lambda i: -p[i])[:2]
            stage = 2 * F.softmax(router.stages.weight @ x[b, n], 0)
            shared = stage[0] * 2 * F.softmax(router.share.weight @ x[b, n], 0)
            routed = [
                stage[1] * 2 * p[i] / (p[best[0]] + p[best[1]]) if i in best else torch.zeros(()) for i in range(4)
            ]
            torch.testing.assert_close(gate[b, n], torch.stack([*shared, *routed]))
            torch.testing.assert_close(found[b, :, n], out[b, :, n] * gate[b, n, :, None])
            likes += p / 10
            uses[best] += 0.1
    torch.testing.assert_close(router.balance, 4 * (likes * uses).sum())
    assert int((gate > 0).sum(-1).unique()) == 4  # two shared, two routed
    with pytest.raises(SpecError, match="must lie in 1"):
        gates.HeadRouter(16, 6, keep=5, shared=2)


def test_output_gate_is_elementwise_on_the_joined_heads():
    gate = gates.OutputGate(torch_nn.Linear(16, 8), torch_nn.LayerNorm(8), F.silu)
    x, out = torch.randn(2, 5, 16), torch.randn(2, 2, 5, 4)
    joined = torch.cat([out[:, 0], out[:, 1]], -1)
    expected = F.layer_norm(joined, (8,)) * F.silu(gate.gate(x))
    found = gate(out, x)
    torch.testing.assert_close(torch.cat([found[:, 0], found[:, 1]], -1), expected)


def test_layers_need_torch_alone():
    code = "import sys, saccade.nn as nn; nn.GPT(9); print([m for m in ('transformers', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_examples_of_the_page_run_as_printed():
    page = (Path(__file__).parent.parent / "docs" / "layers.md").read_text()
    exec(compile("\n".join(re.findall(r"```python\n(.*?)```", page, re.S)), "docs/layers.md", "exec"), {})
