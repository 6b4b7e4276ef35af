"""Positional hidden states: the mechanism written out densely, and the search on curves whose course is known."""

import math

import pytest
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from saccade import SpecError, Unsupported
from saccade.study.hosted_laws import small_model, some_tokens
from saccade.systems.llm._positional_dims import positional_dims, positional_order
from saccade.systems.llm.positional_hidden import PositionalHidden

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    return small_model()


def turn(x, positions):
    """RoPE by complex numbers: pairs (i, i + D/2)."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], -1)


def attend(layer, q, k, v, first):
    """Causal softmax attention of queries at ``first`` on, from projections ``[B, N, H * D]``."""
    q, k, v = (x.double().unflatten(-1, (-1, 8)).transpose(1, 2) for x in (q, k, v))
    m, n = k.shape[2], q.shape[2]
    k, v = (x.repeat_interleave(2, 1) for x in (turn(k, torch.arange(m)), v))
    scores = turn(q, torch.arange(first, first + n)) @ k.mT / math.sqrt(8)
    hidden = torch.arange(m) > torch.arange(first, first + n)[:, None]
    out = scores.masked_fill(hidden, -math.inf).softmax(-1) @ v
    return layer.self_attn.o_proj(out.transpose(1, 2).flatten(2).float())


@torch.no_grad()
def dense(model, tokens, prompt, dims, factor, layers, last):
    """The definition: the prompt at once, then one token after the other, with what later tokens find of the past."""
    past = {}
    logits = []
    for start, stop in [(0, prompt), *((i, i + 1) for i in range(prompt, tokens.shape[1]))]:
        x = model.model.embed_tokens(tokens[:, start:stop])
        for i, layer in enumerate(model.model.layers):
            att, h = layer.self_attn, layer.input_layernorm(x)
            scaled = h.clone()
            if i in layers:
                scaled[..., dims] *= factor
            k, v = att.k_proj(scaled), att.v_proj(h)
            if start:
                k, v = torch.cat([past[i][0], k], 1), torch.cat([past[i][1], v], 1)
            past[i] = k, v
            out = attend(layer, att.q_proj(scaled), k, v, start)
            if not start:
                plain = attend(layer, att.q_proj(h), att.k_proj(h), v, 0)
                out = torch.cat([plain[:, :-last], out[:, -last:]], 1)
            x = x + out
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        logits.append(model.lm_head(model.model.norm(x)))
    return torch.cat(logits, 1)


@torch.no_grad()
def walk(model, tokens, cuts):
    cache = DynamicCache()
    return torch.cat([model(piece, past_key_values=cache).logits for piece in tokens.split(cuts, 1)], 1)


@pytest.mark.parametrize(
    "dims, factor, layers, last", [([5], 0.0, [1], 1), ([3, 30], -1.0, [0, 1], 1), ([7], 0.0, [0], 4)]
)
def test_prompt_and_decoding_are_the_definition(model, dims, factor, layers, last):
    tokens = some_tokens(2, 24)
    wanted = dense(model, tokens, 20, dims, factor, layers, last)
    with PositionalHidden(dims, factor, layers, last).apply(model):
        found = walk(model, tokens, [20, 1, 1, 1, 1])
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert (wanted - model(tokens).logits).abs().max() > 1e-3 * wanted.abs().max()


def test_a_chunk_after_the_prompt_is_its_single_steps(model):
    tokens = some_tokens(1, 26)
    with PositionalHidden([5], layers=[0, 1]).apply(model):
        torch.testing.assert_close(walk(model, tokens, [20, 6]), walk(model, tokens, [20] + [1] * 6))


def test_only_the_last_query_of_a_prompt_changes(model):
    tokens = some_tokens(1, 20)
    with torch.no_grad():
        plain = model(tokens, use_cache=False).logits
        with PositionalHidden([5], layers=[0, 1]).apply(model):
            found = model(tokens, use_cache=False).logits
    torch.testing.assert_close(found[:, :-1], plain[:, :-1])
    assert (found[:, -1] - plain[:, -1]).abs().max() > 1e-3


def test_the_search_ranks_known_curves():
    n, layers = 400, 8
    x = torch.linspace(0, 1, n, dtype=torch.float64)
    noise = torch.randn(layers, n, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    curves = torch.zeros(layers, n, 7, dtype=torch.float64)
    curves[:, :, 0] = torch.cos(6 * math.pi * x)  # waves
    curves[:, :, 1] = -x + 0.05 * noise[:, :, 1]  # falls, roughly
    curves[:, :, 2] = x**2  # rises, smoothly
    curves[:4, :, 3], curves[4:, :, 3] = x, 0.5 - (x - 0.6).abs()  # rises in two of the layers that count
    curves[:, :, 4] = x + 0.01 * noise[:, :, 4]
    curves[:, :, 5] = torch.where(x < 0.15, -5 * x, x)  # the beginning is not looked at
    curves[:, :, 6] = torch.where(x < 0.29, -20 * x, x)  # nor is this part for the direction
    found = positional_order(curves)
    assert [d for d in found if d != 6] == [5, 2, 4, 1] and 6 in found


def test_the_search_sees_the_mean_output_of_every_layer(model):
    tokens = torch.randint(96, (8, 256), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        states = small_model()(tokens, output_hidden_states=True).hidden_states[1:-1]
        last = []
        hook = model.model.norm.register_forward_pre_hook(lambda module, args: last.append(args[0]))
        model(tokens)
        hook.remove()
    mean = torch.stack([s.double().mean(0) for s in [*states, last[0]]])
    assert positional_dims(model, samples=8, seed=3) == positional_order(mean) != []


def test_what_means_nothing_is_refused(model):
    for bad in ({"dims": [32]}, {"dims": []}, {"dims": [1], "last": 0}, {"dims": [1], "layers": [2]}):
        with pytest.raises(SpecError), PositionalHidden(**bad).apply(model):
            pass
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    with pytest.raises(Unsupported, match="q_proj"), PositionalHidden([1]).apply(gpt2):
        pass
