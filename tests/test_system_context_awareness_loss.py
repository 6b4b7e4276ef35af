"""Loss of context awareness: steering and score against dense attention and the official code's numbers."""

import math
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from saccade.core.errors import SpecError
from saccade.study.hosted_laws import small_model, some_tokens
from saccade.study.laws import check
from saccade.systems.llm._chat import (
    ANSWER,
    ASSISTANT,
    DIGITS,
    FACTS,
    INDICATOR,
    USER,
    looking,
    more,
    needles,
    pairs,
    right,
    tune,
)
from saccade.systems.llm.context_awareness_loss import ContextAwarenessLoss, score
from saccade.worlds.text import decode, heldout
from saccade.zoo import path

torch.set_num_threads(1)

# Logits of small_model at the last of 20 tokens, from PASTA.edit_multisection_attention with the settings below.
OFFICIAL_HEADS = [-0.24137154, -0.78718948, -0.13330716, 0.27098286, 0.24206991, -1.09008527]
OFFICIAL_LAYERS = [-0.16920336, -0.58288229, -0.08381923, 0.44943684, 0.3390187, -1.25443769]


def around(prompt=16, start=4, stop=12):
    """Where the prompt's tokens stand that are not the user's, as the official code's range and length say it."""
    found = torch.ones(prompt, dtype=torch.bool)
    found[start:stop] = False
    return found


@torch.no_grad()
def outputs(model, tokens, steering, layer):
    """Queries, keys and values of a layer, and what its heads put out."""
    from saccade.hosts.handles import listen

    calls: list[Any] = []
    out: list[torch.Tensor] = []
    hook = model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(lambda m, args: out.append(args[0]))
    with steering.apply(model), listen(model, calls.append, layers=layer):
        model(tokens, use_cache=False)
    hook.remove()
    return calls[0].q, calls[0].k, calls[0].v, out[0]


def test_steered_weights_are_those_of_the_equation():
    tokens, alpha, head = some_tokens(2, 20), 0.25, 2
    q, k, v, out = outputs(small_model(), tokens, ContextAwarenessLoss(around(), alpha, {0: [head]}), 0)
    others = around().tolist() + [False] * 4  # what comes after the prompt is generated
    for b in range(2):
        for h in range(4):
            for n in range(20):
                w = (q[b, h, n] @ k[b, h // 2, : n + 1].T / math.sqrt(8)).softmax(-1)
                s = torch.tensor([alpha if others[j] and h == head else 1.0 for j in range(n + 1)])
                wanted = (s * w / (s * w).sum()) @ v[b, h // 2, : n + 1]
                torch.testing.assert_close(out[b, n, 8 * h : 8 * h + 8], wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_steers_as_the_official_code():
    """Its edit_multisection_attention, alpha 0.3, on eager attention; whole layers add up in the mask they share."""
    tokens = some_tokens(2, 20)
    for steerings, wanted in (
        ([(0.3, {0: [1, 3], 1: [0]})], OFFICIAL_HEADS),
        ([(0.3, {0: None}), (0.09, {1: None})], OFFICIAL_LAYERS),
    ):
        model = small_model()
        with ExitStack() as stack:
            for alpha, heads in steerings:
                stack.enter_context(ContextAwarenessLoss(around(), alpha, heads).apply(model))
            found = model(tokens, use_cache=False).logits[0, -1, :6]
        torch.testing.assert_close(found, torch.tensor(wanted), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_decoding_steers_the_prompt_alone():
    model, tokens = small_model(), some_tokens(2, 20)
    with ContextAwarenessLoss(around(), 0.1).apply(model):
        whole = model(tokens, use_cache=False).logits
        cache = model(tokens[:, :16]).past_key_values
        steps = [model(tokens[:, t : t + 1], past_key_values=cache).logits for t in range(16, 20)]
    torch.testing.assert_close(torch.cat(steps, 1), whole[:, 16:], rtol=1e-3, atol=1e-4)


def official_model():
    """Two layers with the vocabulary of TinyLlama, whose template the official score looks for."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for p in model.parameters():
        if p.ndim > 1:
            p.data.mul_(5)
    return model


@torch.no_grad()
def test_the_score_is_the_official_one():
    """get_batch_user_attention(layer_index=1, head_list=range(4)) of the same model and text: 0.47546488."""
    source = torch.Generator().manual_seed(1)
    user, answer = (torch.randint(100, 9000, (n,), generator=source).tolist() for n in (20, 7))
    marks = [1, 529, 29989, 5205, 29989, 29958, 13, 29966, 29989, 1792, 29989, 29958, 13]
    tokens = torch.tensor([marks + user + [29966, 29989, 465, 22137, 29989, 29958, 13] + answer])
    users = torch.zeros_like(tokens, dtype=torch.bool)
    users[0, 13:33] = True
    model = official_model()
    assert float(score(model, tokens, users, 7)) == pytest.approx(0.47546488, rel=1e-5)
    model.set_attn_implementation("eager")
    weights = model(tokens, output_attentions=True).attentions[1][0]  # [4, N, N]
    rows = [max(float(weights[h, n, 13:33].sum()) for h in range(4)) for n in range(40, 47)]
    assert float(score(model, tokens, users, 7)) == pytest.approx(sum(rows) / 7, rel=1e-5)


def bytes_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, pad_token_id=258, bos_token_id=256,
        eos_token_id=257,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def test_attention_to_the_user_is_that_of_the_weights():
    model = bytes_model()
    for p in model.parameters():
        if p.ndim > 1:
            p.mul_(5)
    some, wanted = needles("x", heldout(), 3), []
    found = looking(model, some)
    model.set_attn_implementation("eager")
    for pair in some:
        user = []
        for form, before, between in ((b"", 0, 1), (USER, len(USER), len(ASSISTANT))):
            seen = model(pair.tokens(form)[None], output_attentions=True).attentions
            w = torch.cat(seen, 1)[0, :, -DIGITS - 1]  # [8, N]
            stop = 1 + before + len(pair.request)
            mine, template = (
                w[:, 1 + before : stop].sum(1),
                w[:, 1 : 1 + before].sum(1) + w[:, stop : stop + between].sum(1),
            )
            user.append(mine / (1 - template))
        head = int(user[0].argmax())
        wanted.append([float(x[head]) for x in user])
    torch.testing.assert_close(torch.stack(found, 1), torch.tensor(wanted), rtol=1e-4, atol=1e-5)


def test_pairs_say_what_they_are():
    page = heldout()
    gen = pairs("x", page)
    some = [next(gen) for _ in range(300)]
    assert 10 < sum(p.needs for p in some) < 60
    for p in some:
        assert len(p.answer) == ANSWER
        if p.needs:
            assert p.answer in p.request
        else:
            assert p.request in page and FACTS[p.answer[16:18]] == p.answer[-DIGITS:]
        assert decode(p.tokens()[p.users()]) == p.request.decode()
        assert decode(p.tokens(INDICATOR)) == (USER + p.request + INDICATOR + ASSISTANT + p.answer).decode()
    for p in needles("x", page, 50):
        assert p.answer in p.request and p.answer[16:18] not in FACTS


def test_tuning_learns_a_fact_with_and_without_the_indicator_and_leaves_the_model():
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path("lm-tiny"), dtype=torch.float32).eval()
    fact = next(p for p in pairs("x", heldout()) if not p.needs)
    texts = [fact.tokens(form) for form in (USER, INDICATOR)]  # of two lengths: the first is padded
    before = {name: p.clone() for name, p in model.named_parameters()}
    taught = tune(model, texts * 16, batch=2, rate=3e-3)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    for text in texts:
        assert right(taught, text[None]).all() and not right(model, text[None]).any()


def test_right_wants_every_digit_and_more_wants_two_standard_errors():
    tokens = some_tokens(1, 12)
    model = small_model()
    for _ in range(DIGITS):  # the model's own continuation is right, and with another last token it is not
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    wrong = tokens.clone()
    wrong[0, -1] = (wrong[0, -1] + 1) % 96
    assert right(model, torch.cat([tokens, wrong])).tolist() == [True, False]
    a, b = torch.ones(20, dtype=torch.bool), torch.ones(20, dtype=torch.bool)
    b[:4] = False
    assert not more(a, b)  # four gained are two standard errors, not more
    b[4] = False
    assert more(a, b) and not more(b, a)


def test_wrong_settings_are_refused():
    for alpha in (0.0, 1.5):
        with pytest.raises(SpecError, match="alpha"):
            ContextAwarenessLoss(alpha=alpha)
    with pytest.raises(SpecError, match="layer"):
        ContextAwarenessLoss(heads={7: None}).apply(small_model())


def test_the_laws_hold():
    assert [r.status for r in check(ContextAwarenessLoss)] == ["passed"] * 2
