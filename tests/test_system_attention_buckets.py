"""Attention Buckets: against separate models that were each built with one of the bases."""

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from saccade import SpecError, Unsupported
from saccade.study.curves import compare_curves, position_curve, reuse
from saccade.study.hosted_laws import small_model, some_tokens
from saccade.systems.llm.attention_buckets import AttentionBuckets, fuse
from saccade.worlds import recall

torch.set_num_threads(1)
FACTORS = (1.0, 1.75, 40.0)


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def separate(model):
    """One model per base, with the same weights."""
    models = []
    for factor in FACTORS:
        config = type(model.config).from_dict(model.config.to_dict())
        config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0 * factor}
        models.append(LlamaForCausalLM(config).eval())
        models[-1].load_state_dict(model.state_dict())
    return models


@torch.no_grad()
def dense(separate, tokens, mask=None):
    """The definition, with sums and exponentials written out."""
    logits = [m(tokens, attention_mask=mask, use_cache=False).logits for m in separate]
    confident = [x.amax(-1, keepdim=True).exp() for x in logits]
    return sum(c * x for c, x in zip(confident, logits, strict=True)) / sum(confident)


def test_logits_are_those_of_separate_models_fused(model, separate):
    tokens = some_tokens(2, 30)
    wanted = dense(separate, tokens)
    with torch.no_grad(), AttentionBuckets(FACTORS).apply(model):
        found = model(tokens, use_cache=False).logits
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert (wanted - model(tokens).logits).abs().max() > 1e-2 * wanted.abs().max()


def test_generate_with_a_cache_follows_the_fused_logits(model, separate):
    tokens = wanted = some_tokens(2, 20)
    for _ in range(6):
        wanted = torch.cat([wanted, dense(separate, wanted)[:, -1:].argmax(-1)], 1)
    with AttentionBuckets(FACTORS).apply(model):
        found = model.generate(tokens, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(found, wanted)


def test_left_padding_changes_nothing(model, separate):
    tokens = some_tokens(2, 20)
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0
    with torch.no_grad(), AttentionBuckets(FACTORS).apply(model):
        found = model(tokens, attention_mask=mask, use_cache=False).logits
    alone = dense(separate, tokens[1:, 7:])
    assert (found[1, 7:] - alone[0]).abs().max() < 1e-5 * alone.abs().max()


def test_one_stream_is_the_model_and_the_frequencies_come_back(model):
    tokens, rotary = some_tokens(), model.model.rotary_emb
    own, value = rotary.inv_freq, rotary.inv_freq.clone()
    plain = model(tokens, use_cache=False).logits
    with AttentionBuckets((1.0,)).apply(model):
        torch.testing.assert_close(model(tokens, use_cache=False).logits, plain)
    with AttentionBuckets((1.0, 2.0)).apply(model):
        with pytest.raises(SpecError, match="by name"):
            model.model(tokens)
        model(tokens, use_cache=False)
    assert rotary.inv_freq is own and torch.equal(own, value)
    assert torch.equal(model(tokens, use_cache=False).logits, plain)


def test_fusing_weighs_by_the_softmax_of_the_greatest_logit():
    logits = torch.tensor([[0.0, math.log(3.0)], [-1.0, 0.0]])  # confidences 3 to 1
    torch.testing.assert_close(fuse(logits), torch.tensor([-0.25, 0.75 * math.log(3.0)]))


def test_a_model_without_fixed_rope_is_refused():
    for factors in ((), (1.0, 0.0)):
        with pytest.raises(SpecError, match="factor"), AttentionBuckets(factors).apply(small_model()):
            pass
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    with pytest.raises(Unsupported, match="rotary"), AttentionBuckets().apply(gpt2):
        pass
    dynamic = small_model()
    dynamic.model.rotary_emb.rope_type = "dynamic"
    with pytest.raises(Unsupported, match="rotary"), AttentionBuckets().apply(dynamic):
        pass


# ---- position curves ----


def test_a_run_with_a_kept_beginning_is_the_plain_run(model):
    tokens = some_tokens(1, 40)[0]
    run, asked = reuse(model), [tokens[:30], torch.cat([tokens[:20], tokens[35:]]), tokens[:21], tokens]
    with torch.no_grad():
        for some in asked:
            torch.testing.assert_close(run(some, 3), model(some[None], use_cache=False).logits[0, -3:])


def test_a_curve_shows_the_depth_that_a_model_overlooks():
    examples = [next(recall.lookup(128, 0, depth=depth)) for depth in (0.0, 0.25, 0.5, 0.75, 1.0)]
    known = {tuple(e.tokens[: e.answers[0].stop - 1].tolist()): e for e in examples}

    def run(tokens, keep):
        """Sure of the answer, except where its evidence is the middle pair."""
        example = known[tuple(tokens.tolist())]
        logits = torch.zeros(keep, 260)
        if example is not examples[2]:
            logits[range(keep), example.tokens[-keep:]] = 100.0
        return logits

    loss, right = position_curve(run, 128, 1, seed=0)
    torch.testing.assert_close(loss[:, 0], torch.tensor([0, 0, math.log(260), 0, 0]), rtol=1e-5, atol=1e-5)
    assert right[:, 0].tolist() == [1, 1, 0, 1, 1]


def test_comparing_curves():
    before = torch.tensor([[0.1], [0.5], [0.9], [0.5], [0.1]]).expand(5, 9)
    numbers, flatter, lower = compare_curves(before, before / 2 + 0.4)
    assert (flatter, lower) == (1.0, 0.0)
    assert (numbers["spread_before"], numbers["spread_after"], numbers["mean_before"]) == (0.8, 0.4, 0.42)
    assert compare_curves(before, before)[1:] == (0.0, 0.0)
    noise = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    assert 0.02 < compare_curves(before + noise, before + noise.flip(1))[1] < 0.98
