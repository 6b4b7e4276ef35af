"""Soft injection: mixing head by head against whole tensors, embeddings by hand, and a mix that finds a planted one."""

import pytest
import torch

from saccade.core.errors import SpecError
from saccade.study.hosted_laws import small_model, some_tokens
from saccade.study.laws import check
from saccade.systems.llm.soft_injection import SoftInjection, accuracy, embed, learn

torch.set_num_threads(1)


def outputs(model, tokens, system=None):
    """What goes into the projection of each layer, [layers, B, N, 4, 8], and the logits."""
    seen = []
    with torch.no_grad():
        if system is None:
            hooks = _watch(model, seen)
            logits = model(tokens).logits
        else:
            with system.apply(model):
                hooks = _watch(model, seen)  # after the system's own
                logits = model(tokens).logits
    for hook in hooks:
        hook.remove()
    return torch.stack(seen).unflatten(-1, (4, 8)), logits


def _watch(model, seen):
    return [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        for layer in model.model.layers
    ]


def test_the_last_token_s_heads_are_mixed_and_no_others():
    model, tokens = small_model(), some_tokens(2, 12)
    source = torch.Generator().manual_seed(0)
    embeddings, mix = torch.randn(2, 4, 8, generator=source), torch.rand(2, 4, generator=source)
    plain, _ = outputs(model, tokens)
    mixed, _ = outputs(model, tokens, SoftInjection(embeddings, mix))
    assert torch.equal(mixed[:, :, :-1], plain[:, :, :-1])
    for head in range(4):  # in layer 0, which nothing before it changes
        wanted = (1 - mix[0, head]) * plain[0, :, -1, head] + mix[0, head] * embeddings[0, head]
        torch.testing.assert_close(mixed[0, :, -1, head], wanted, rtol=1e-5, atol=1e-6)
    alone, _ = outputs(model, tokens, SoftInjection(embeddings, torch.tensor([[0.0] * 4, [0, 1, 0, 0.5]])))
    torch.testing.assert_close(alone[1, :, -1, 1], embeddings[1, 1].expand(2, -1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(alone[1, :, -1, 3], (plain[1, :, -1, 3] + embeddings[1, 3]) / 2, rtol=1e-5, atol=1e-5)
    assert torch.equal(alone[1, :, -1, 0], plain[1, :, -1, 0])


def test_embeddings_are_means_of_the_last_token():
    model, tokens = small_model(), some_tokens(5, 12)
    plain, _ = outputs(model, tokens)
    torch.testing.assert_close(embed(model, tokens), plain[:, :, -1].mean(1), rtol=1e-5, atol=1e-6)


def test_a_planted_mix_is_found():
    """The answers are what the model says with one head's embedding in place: the mix that is learned brings them."""
    model, tokens = small_model().requires_grad_(False), some_tokens(24, 6)
    plant = torch.zeros(2, 4)
    plant[1, 2] = 1
    embeddings = 20 * torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(2))
    _, logits = outputs(model, tokens, SoftInjection(embeddings, plant))
    answers = logits[:, -1].argmax(-1)
    before = accuracy(model, tokens, answers)
    found = learn(model, embeddings, (tokens, answers), steps=80)
    assert before < 0.5 and accuracy(model, tokens, answers, found) > 0.8
    assert found.mix.min() >= 0 and found.mix.max() <= 1 and found.mix[1].argmax() == 2


def test_what_it_refuses():
    with pytest.raises(SpecError, match=r"layers and heads \[2, 4\]"):
        SoftInjection(torch.zeros(3, 4, 8)).apply(small_model())
    with pytest.raises(SpecError, match="mix"):
        SoftInjection(mix=torch.zeros(4, 2)).apply(small_model())


def test_its_laws():
    assert not [r for r in check(SoftInjection) if r.status == "failed"]
