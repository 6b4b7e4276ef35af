"""PINE: against its definition in plain loops over queries, heads and segments, and its invariance."""

import math
from itertools import pairwise

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from saccade import SpecError, Unsupported
from saccade.study.hosted_laws import small_model, some_tokens
from saccade.systems.llm.pine import Pine

torch.set_num_threads(1)
BOUNDS = (2, 6, 9, 14)


@pytest.fixture(scope="module")
def model():
    return small_model()


def turned(x, position):
    """One vector by RoPE, in complex numbers."""
    half = len(x) // 2
    angle = position * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    y = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([y.real, y.imag])


def attend(q, k, v, bounds):
    """Attention of one text, ``[H, N, D]`` without RoPE, from the paper's words."""
    heads, n, width = q.shape
    docs = [range(a, b) for a, b in pairwise(bounds)]
    inside = range(bounds[0], bounds[-1])
    out = torch.zeros_like(q)
    for h in range(heads):

        def importance(i, among, h=h):
            """Mean weight of each segment, without positions, when token i sees the tokens ``among``."""
            w = torch.stack([q[h, i] @ k[h, j] / math.sqrt(width) for j in among]).softmax(0)
            weight = dict(zip(among, w.tolist(), strict=True))
            return [sum(weight.get(j, 0.0) for j in doc) / len(doc) for doc in docs]

        for i in range(n):
            own = next((doc for doc in docs if i in doc), None)
            if own is None:
                score = importance(i, inside)
            else:  # all tokens of a segment agree
                others = [j for j in inside if j not in own]
                each = [importance(t, others) for t in own]
                score = [
                    sum(s) + (math.inf if doc is own else 0)
                    for doc, s in zip(docs, zip(*each, strict=True), strict=True)
                ]
            position, end = {}, bounds[-1]
            for d in sorted(range(len(docs)), key=lambda d: -score[d]):  # the most important ends right before the rest
                end -= len(docs[d])
                position |= {j: end + t for t, j in enumerate(docs[d])}
            position = {j: position.get(j, j) for j in range(n)}
            seen = [j for j in range(n) if position[j] <= position[i]] if i in inside else range(i + 1)
            mine = turned(q[h, i], position[i])
            w = torch.stack([mine @ turned(k[h, j], position[j]) / math.sqrt(width) for j in seen]).softmax(0)
            out[h, i] = w @ v[h, list(seen)]
    return out


@torch.no_grad()
def dense(model, tokens, bounds):
    x = model.model.embed_tokens(tokens)
    for layer in model.model.layers:
        att, h = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (p(h).double().unflatten(-1, (-1, 8)).transpose(1, 2) for p in (att.q_proj, att.k_proj, att.v_proj))
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        out = torch.stack([attend(*one, bounds) for one in zip(q, k, v, strict=True)])
        x = x + att.o_proj(out.transpose(1, 2).flatten(2).float())
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(model.model.norm(x))


@pytest.mark.parametrize("bounds", [BOUNDS, (1, 4, 9), (0, 3, 5, 6, 11)])
def test_a_prompt_is_the_definition(model, bounds):
    tokens = some_tokens(2, 17)
    wanted = dense(model, tokens, bounds)
    with torch.no_grad(), Pine(bounds).apply(model):
        found = model(tokens, use_cache=False).logits
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert (model(tokens).logits - wanted).abs().max() > 1e-2 * wanted.abs().max()


def test_one_segment_is_plain_text(model):
    tokens = some_tokens(2, 17)
    with torch.no_grad(), Pine((3, 8)).apply(model):
        found = model(tokens, use_cache=False).logits
    torch.testing.assert_close(found, model(tokens, use_cache=False).logits, rtol=1e-4, atol=1e-5)


def test_decoding_is_the_prompt_read_at_once(model):
    tokens = some_tokens(2, 30)
    cache = DynamicCache()
    with torch.no_grad(), Pine(BOUNDS).apply(model):
        whole = model(tokens, use_cache=False).logits
        found = torch.cat([model(piece, past_key_values=cache).logits for piece in tokens.split([20, 1, 1, 8], 1)], 1)
        text = model.generate(tokens, max_new_tokens=3, do_sample=False, eos_token_id=None)
        last = model(text[:, :-1], use_cache=False).logits[:, -1]
    assert (found - whole).abs().max() < 1e-5 * whole.abs().max()
    assert torch.equal(last.argmax(-1), text[:, -1])


def test_the_order_of_the_segments_does_not_matter(model):
    tokens = some_tokens(1, 40)[0]
    head, a, b, c, tail = tokens.split([3, 10, 6, 8, 13])
    ours, plain = [], []
    with torch.no_grad():
        for parts in ([a, b, c], [c, a, b], [b, a, c], [c, b, a]):
            text = torch.cat([head, *parts, tail])[None]
            bounds = torch.tensor([3] + [len(p) for p in parts]).cumsum(0).tolist()
            plain.append(model(text, use_cache=False).logits[0, -13:])
            with Pine(bounds).apply(model):
                ours.append(model(text, use_cache=False).logits[0, -13:])
    ours, plain = torch.stack(ours), torch.stack(plain)
    assert (ours - ours[0]).abs().max() < 1e-5 * ours.abs().max()
    assert (plain - plain[0]).abs().max() > 1e-2 * plain.abs().max()


def test_importances_that_softmax_would_round_to_zero_still_sort():
    model = small_model()
    for layer in model.model.layers:  # scores of thousands
        layer.self_attn.q_proj.weight.data.mul_(300)
    test_the_order_of_the_segments_does_not_matter(model)


def test_what_cannot_be_read_is_refused(model):
    tokens = some_tokens(2, 12)
    with Pine(BOUNDS).apply(model):
        with pytest.raises(SpecError, match="14 tokens"):
            model(tokens)
        with pytest.raises(SpecError, match="padding"):
            model(some_tokens(), attention_mask=torch.ones(2, 48).tril(20))
    for bounds in ((), (3,), (4, 4, 8), (-1, 4)):
        with pytest.raises(SpecError, match="rise"), Pine(bounds).apply(model):
            pass
    sizes = {
        "vocab_size": 20,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}
    others = [
        MistralForCausalLM(MistralConfig(**sizes, num_key_value_heads=1, sliding_window=8)),
        LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=yarn)),
    ]
    for other in others:
        with pytest.raises(Unsupported, match="RoPE"), Pine().apply(other):
            pass
