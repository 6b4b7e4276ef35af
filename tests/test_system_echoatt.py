"""EchoAtt against a Llama written out with the attention matrix really copied, and its similarity against eager."""

import copy
import itertools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from saccade.core.errors import SpecError
from saccade.study.hosted_laws import some_tokens
from saccade.systems.cache import echoatt
from saccade.systems.cache.echoatt import EchoAtt, distill, shared_blocks, similarity

torch.set_num_threads(1)
BLOCKS = [[1, 2, 3]]
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def llama():
    """Random, with attention that matters."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    for name, p in model.named_parameters():
        if p.ndim > 1:
            p.data.mul_(15 if "self_attn" in name else 4)
    return model


@torch.no_grad()
def copied(model, tokens):
    """Logits of the model written out, the first matrix of the block copied to the others."""
    x, (batch, n) = model.model.embed_tokens(tokens), tokens.shape
    rope = model.model.rotary_emb(x, torch.arange(n)[None])
    kept = None
    for i, layer in enumerate(model.model.layers):
        h, own = layer.input_layernorm(x), layer.self_attn
        if i not in (2, 3):
            q, k = (p(h).view(batch, n, -1, 8).transpose(1, 2) for p in (own.q_proj, own.k_proj))
            q, k = apply_rotary_pos_emb(q, k, *rope)
            score = q @ k.repeat_interleave(2, 1).mT / 8**0.5
            kept = score.masked_fill(~torch.ones(n, n).tril().bool(), -torch.inf).softmax(-1)
        v = own.v_proj(h).view(batch, n, -1, 8).transpose(1, 2).repeat_interleave(2, 1)
        x = x + own.o_proj((kept @ v).transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(model.model.norm(x))


def test_the_layers_that_follow_use_the_leads_matrix():
    model, tokens = llama(), some_tokens(2, 24)
    wanted = copied(model, tokens)
    with torch.no_grad(), EchoAtt(BLOCKS).apply(model):
        found = model(tokens, use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@torch.no_grad()
def test_step_by_step_it_says_the_same():
    model, tokens = llama(), some_tokens(2, 24)
    with EchoAtt(BLOCKS).apply(model):
        whole = model(tokens, use_cache=False).logits
        out = model(tokens[:, :10], use_cache=True)
        steps = [model(t, past_key_values=out.past_key_values).logits for t in tokens[:, 10:].split(1, 1)]
    found = torch.cat([out.logits, *steps], 1)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))


def test_projections_that_are_shared_are_gone_and_come_back():
    model = llama()
    before, parts = model.num_parameters(), list(model.named_modules())
    with EchoAtt(BLOCKS).apply(model):
        assert before - model.num_parameters() == 2 * (32 * 32 + 32 * 16)  # two layers' q and k
        assert not any(name.startswith("model.layers.2.self_attn.q_proj.w") for name, _ in model.named_parameters())
    assert [(n, id(m)) for n, m in model.named_modules()] == [(n, id(m)) for n, m in parts]
    assert not any(m._forward_hooks for m in model.modules())


@torch.no_grad()
def test_similarity_is_the_cosine_of_eager_matrices():
    model, tokens = llama(), some_tokens(3, 20)
    found = similarity(model, tokens)
    model.set_attn_implementation("eager")
    matrices = model(tokens, output_attentions=True).attentions
    wanted = torch.zeros(5, 5)
    for i, j, b, h in itertools.product(range(5), range(5), range(3), range(4)):
        one, other = matrices[i][b, h], matrices[j][b, h]
        wanted[i, j] += (one * other).sum() / one.norm() / other.norm() / 12
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_blocks_are_of_the_most_similar_inner_neighbours():
    alike = torch.zeros(8, 8)
    for layer, value in enumerate((0.99, 0.2, 0.8, 0.7, 0.1, 0.6, 0.98), 1):
        alike[layer, layer - 1] = alike[layer - 1, layer] = value
    assert shared_blocks(alike, 1) == [[2, 3]]
    assert shared_blocks(alike, 2) == [[2, 3, 4]]
    assert shared_blocks(alike, 3) == [[2, 3, 4], [5, 6]]
    for count in (0, 6):
        with pytest.raises(SpecError, match="1 to 5"):
            shared_blocks(alike, count)


@pytest.mark.parametrize("blocks", [[[2, 1]], [[3, 5]], [[1, 1]]])
def test_blocks_that_are_none_are_refused_and_nothing_is_left(blocks):
    model = llama()
    with pytest.raises(SpecError, match="in order"), EchoAtt([[0, 1], *blocks]).apply(model):
        pass
    assert isinstance(model.model.layers[1].self_attn.q_proj, torch.nn.Linear)


def test_norms_of_queries_and_keys_are_refused():
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES))
    with pytest.raises(SpecError, match="in order"), EchoAtt([[1, 2]]).apply(model):
        pass


@pytest.mark.parametrize("steps", [(1, 0), (0, 1)])
def test_a_step_of_each_stage_follows_the_gradient_of_its_loss(monkeypatch, steps):
    """One step of plain descent at rate 1: what the parameters lose is the gradient of the formula."""
    monkeypatch.setattr(echoatt, "STEPS", steps)
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, lr: torch.optim.SGD(parameters, 1.0))
    teacher, tokens = llama(), some_tokens(2, 16)
    student, labels = copy.deepcopy(teacher), tokens.clone()
    labels[:, ::2] = -100
    with EchoAtt(BLOCKS).apply(student):
        theirs, ours = (m(tokens, output_hidden_states=True) for m in (teacher, student))
        p, q = (out.logits.softmax(-1) for out in (theirs, ours))
        after_block = (theirs.hidden_states[4].detach() - ours.hidden_states[4]).square().mean()
        apart = (p.detach() * (p.detach() / q).log()).sum(-1).mean()
        hard = -q.gather(-1, p.argmax(-1, True)).log().mean()
        text = -q[:, :-1].gather(-1, tokens[:, 1:, None])[:, ::2].log().mean()  # what an odd place says
        loss = after_block + apart + hard if steps[0] else text
        before = {name: x.detach().clone() for name, x in student.named_parameters()}
        gradient = dict(zip(before, torch.autograd.grad(loss, list(student.parameters())), strict=True))
        distill(student, teacher, BLOCKS, iter([(tokens, labels)] * 2))
        for name, x in student.named_parameters():
            size = float(gradient[name].abs().max())
            torch.testing.assert_close(before[name] - x, gradient[name], rtol=1e-2, atol=2e-3 * size + 1e-6)
    assert all(x.grad is None for x in teacher.parameters())
