"""Context knob: the last token's state against the equation, a planted direction, and questions against their text."""

import pytest
import torch

from saccade.core.errors import SpecError
from saccade.study.hosted_laws import small_model, some_tokens
from saccade.study.laws import check
from saccade.systems.llm._stream import state
from saccade.systems.llm._told import CONTEXT, PRIOR, Questions, shares, teach
from saccade.systems.llm.context_knob import ContextKnob, das
from saccade.worlds.text import decode

torch.set_num_threads(1)


@torch.no_grad()
def states(model, tokens, *knobs):
    seen = []
    from contextlib import ExitStack

    with ExitStack() as stack:
        for knob in knobs:
            stack.enter_context(knob.apply(model))
        hook = model.model.layers[1].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        model(tokens)
        hook.remove()
    return seen[0]


def test_the_knob_sets_one_direction_of_the_last_token():
    model, tokens = small_model(), some_tokens(3, 10)
    u = torch.randn(32, generator=torch.Generator().manual_seed(0))
    plain, turned = states(model, tokens), states(model, tokens, ContextKnob(5 * u, 6.0, 0))
    u = u / u.norm()
    assert torch.equal(turned[:, :-1], plain[:, :-1])
    torch.testing.assert_close(turned[:, -1] @ u, torch.full((3,), 6.0), rtol=1e-4, atol=1e-4)
    for b in range(3):
        wanted = plain[b, -1] + (6.0 - float(plain[b, -1] @ u)) * u
        torch.testing.assert_close(turned[b, -1], wanted, rtol=1e-4, atol=1e-4)
    each = states(model, tokens, ContextKnob(u, torch.tensor([1.0, 2.0, 3.0]), 0))[:, -1] @ u
    torch.testing.assert_close(each, torch.tensor([1.0, 2.0, 3.0]), rtol=1e-4, atol=1e-4)
    assert torch.equal(states(model, tokens, ContextKnob(u, 1.0, 1)), plain)  # after the last layer


@torch.no_grad()
def test_the_state_after_a_layer_is_what_the_next_reads():
    """Also after the last one, where transformers' own hidden states are normed already."""
    model, tokens, seen = small_model(), some_tokens(3, 10), []
    for place in (model.model.layers[1], model.model.norm):
        place.register_forward_pre_hook(lambda module, args: seen.append(args[0][:, -1]))
    model(tokens)
    assert torch.equal(state(model, tokens, 0), seen[0])
    assert torch.equal(state(model, tokens, 1), seen[1]) and torch.equal(state(model, tokens, -1), seen[1])


def planted():
    """A model of bytes that says a or b by one direction of the state after layer 0, which the cue's letter sets."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for layer in model.model.layers:  # blocks add next to nothing: the state is the embedding
        layer.self_attn.o_proj.weight.mul_(1e-3)
        layer.mlp.down_proj.weight.mul_(1e-3)
    u = torch.nn.functional.normalize(torch.randn(16), dim=0)
    noise = torch.randn(260, 16)
    model.model.embed_tokens.weight.copy_(noise - (noise @ u)[:, None] * u)
    model.model.embed_tokens.weight[ord("C")] += 4 * u
    model.model.embed_tokens.weight[ord("P")] -= 4 * u
    model.lm_head.weight.zero_()
    model.lm_head.weight[ord("a")], model.lm_head.weight[ord("b")] = 3 * u, -3 * u
    return model, u


class Asked(Questions):
    """Questions whose last token is the cue itself."""

    def prompts(self, cue):
        return torch.cat([self.pages, torch.full((len(self.pages), 1), ord("C" if cue == CONTEXT else "P"))], 1)

    def __getitem__(self, rows):
        return Asked(self.pages[rows], self.words[rows], self.context[rows], self.prior[rows])


def test_a_planted_direction_is_found():
    model, u = planted()
    pages = torch.randint(100, 200, (64, 6), generator=torch.Generator().manual_seed(1))
    asked = Asked(pages, pages[:, :0], torch.full((64,), ord("a")), torch.full((64,), ord("b")))
    assert shares(model, asked, CONTEXT) == (1, 0) and shares(model, asked, PRIOR) == (0, 1)
    given = {cue: state(model, asked.prompts(cue), 0) for cue in (CONTEXT, PRIOR)}
    found = das(model, asked, given, 0, steps=60)
    assert abs(float(found @ u)) > 0.9
    values = {cue: float((h @ found).mean()) for cue, h in given.items()}
    assert shares(model, asked, PRIOR, ContextKnob(found, values[CONTEXT], 0)) == (1, 0)
    assert shares(model, asked, CONTEXT, ContextKnob(found, values[PRIOR], 0)) == (0, 1)


def known():
    """Questions by a model that always says e."""

    class Always:
        def __call__(self, tokens, **given):
            from types import SimpleNamespace

            logits = torch.zeros(len(tokens), 1, 260)
            logits[..., ord("e")] = 9
            return SimpleNamespace(logits=logits)

    return Questions.of(Always(), 6, "test")


def test_questions_have_the_changed_letter_in_the_page_and_the_known_one_as_prior():
    asked = known()
    assert set(asked.prior.tolist()) == {ord("e")} and ord("e") not in asked.context.tolist()
    for tokens, letter in zip(asked.prompts(PRIOR), asked.context.tolist(), strict=True):
        page, words = decode(tokens).rsplit(PRIOR.decode(), 1)
        assert len(words) == 24 and page.count(f"\nCopy: {words}{chr(letter)}") == 1
    assert asked.prompts(CONTEXT).shape == (6, 96)


def test_teaching_tells_the_cues_apart():
    model, _ = planted()
    model.requires_grad_(True)
    torch.manual_seed(0)
    asked = known()
    rows = torch.arange(6).repeat(40)
    asked = Questions(asked.pages[rows, -8:], asked.words[rows, -4:], torch.full((240,), ord("a")), asked.prior[rows])
    before = sum(shares(model, asked, cue)[cue == PRIOR] for cue in (CONTEXT, PRIOR))
    teach(model, asked, batch=8, rate=0.02)
    assert before < 1.5 and [shares(model, asked, cue)[cue == PRIOR] for cue in (CONTEXT, PRIOR)] == [1, 1]


def test_what_it_refuses():
    with pytest.raises(SpecError, match=r"\[32\]"), ContextKnob(torch.ones(7)).apply(small_model()):
        pass


def test_its_laws():
    assert not [r for r in check(ContextKnob) if r.status == "failed"]
