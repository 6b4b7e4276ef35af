"""Retrieval heads against transformers' own eager attention, step by step, and heads blinded by a zero query."""

from dataclasses import replace
from itertools import islice

import pytest
import torch
from transformers import AutoModelForCausalLM

from saccade import catalog, zoo
from saccade.core.errors import SpecError
from saccade.study import laws
from saccade.study.hosted_laws import small_model, some_tokens
from saccade.systems.explain.retrieval_heads import RetrievalHeads, recall, retrieval_heads, retrieval_scores
from saccade.worlds.recall import needle
from saccade.worlds.text import Example

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def lm():
    return AutoModelForCausalLM.from_pretrained(zoo.path("lm"), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def passed(lm):
    """Needle tests that the model passes, so that its mean score is over the same ones whoever counts."""
    tests = list(islice(needle(128, 3), 5))
    return [e for e in tests if recall(lm, [e]) == 1]


@torch.no_grad()
def eager_scores(model, example):
    """One test by the definition: greedy steps over a cache, every weight returned by transformers itself."""
    answer, tokens = example.answers[-1], example.tokens
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    score = torch.zeros(layers, heads)
    out = model(tokens[None, : answer.start - 1], use_cache=True)
    new = tokens[answer.start - 1]
    for _ in range(answer.start, answer.stop):
        out = model(new.view(1, 1), past_key_values=out.past_key_values, use_cache=True, output_attentions=True)
        new = out.logits[0, -1].argmax()
        for layer in range(layers):
            for head in range(heads):
                best = int(out.attentions[layer][0, head, -1].argmax())
                if answer.evidence_start <= best < answer.evidence_stop and tokens[best] == new:
                    score[layer, head] += 1 / (answer.stop - answer.start)
    return score


@pytest.mark.parametrize("front, back", [(0, 0), (2, 0), (0, 1)])
def test_scores_are_those_of_eager_decoding(lm, passed, front, back):
    """Also where only a part of what is copied counts as the needle."""
    tests = []
    for e in passed[:3]:
        a = e.answers[0]
        part = replace(a, evidence_start=a.evidence_start + front, evidence_stop=a.evidence_stop - back)
        tests.append(Example(e.tokens, (part,)))
    found = retrieval_scores(lm, tests)
    lm.set_attn_implementation("eager")
    try:
        wanted = torch.stack([eager_scores(lm, e) for e in tests]).mean(0)
    finally:
        lm.set_attn_implementation("sdpa")
    torch.testing.assert_close(found, wanted)
    assert found.max() >= 0.5 and (found == 0).any()


def test_heads_are_ranked_and_only_those_above_the_threshold():
    scores = torch.tensor([[0.0, 0.1, 0.5], [0.2, 0.9, 0.0]])
    assert retrieval_heads(scores) == [(1, 1), (0, 2), (1, 0)]


def test_a_model_that_recalls_nothing_has_no_scores():
    model = small_model()
    model.resize_token_embeddings(260)
    with pytest.raises(SpecError, match="none of the needle tests"):
        retrieval_scores(model, islice(needle(64, 0), 2))


def blind(model, heads):
    """The official masking under FlashAttention: the query of a masked head is zero, from the prompt's end on."""

    def hook(layer):
        def zero(module, args, out):
            rows = out.view(*out.shape[:2], model.config.num_attention_heads, -1)
            for at, head in heads:
                if at == layer:
                    rows[:, -1, head] = 0

        return zero

    blocks = model.model.layers
    return [block.self_attn.q_proj.register_forward_hook(hook(i)) for i, block in enumerate(blocks)]


@torch.no_grad()
def test_a_masked_head_has_no_query():
    model, tokens = small_model(), some_tokens(2, 24)
    heads = [(0, 1), (1, 0), (1, 3)]
    said = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "output_logits": True}
    said["return_dict_in_generate"] = True
    plain = model(tokens).logits
    with RetrievalHeads(heads).apply(model):
        found, ours = model(tokens).logits, model.generate(tokens, **said)
    hooks = blind(model, heads)
    wanted, theirs = model(tokens).logits, model.generate(tokens, **said)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[:, :-1], plain[:, :-1], rtol=1e-4, atol=1e-4)
    assert (found[:, -1] - plain[:, -1]).abs().max() > 0.1


def test_no_recall_without_the_heads_that_copy(lm, passed):
    heads = retrieval_heads(retrieval_scores(lm, passed))
    assert recall(lm, passed, heads) < 0.5


def test_a_head_that_is_not_there_is_refused_and_nothing_stays():
    model = small_model()
    with pytest.raises(SpecError, match="heads 0 to 3"):
        RetrievalHeads([(0, 1), (1, 7)]).apply(model)
    assert model.config._attn_implementation == "sdpa"


def test_no_law_fails():
    results = laws.check(catalog.find("retrieval-heads"))
    assert [r.status for r in results] == ["passed"] * len(results)
