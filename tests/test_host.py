"""Programs inside unmodified transformers models: nothing but the program changes, and nothing is left behind."""

import copy

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from saccade import Attention, SpecError, Unsupported, install, masks, normalizers, scores
from saccade.hosts.handles import listen
from saccade.hosts.transformers import output_errors

SIZES = {
    "vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "bos_token_id": 256,
    "eos_token_id": 257, "pad_token_id": 258,
}  # fmt: skip
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=12, max_window_layers=1)
    ),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, sliding_window=12, attn_logit_softcapping=2.0)),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(
            **SIZES, sliding_window=12, num_local_experts=2, num_experts_per_tok=1,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        )
    ),
}  # fmt: skip
LENGTH = 40


def make(family, native="eager"):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    for p in model.parameters():
        if p.ndim > 1:
            p.data.mul_(6)  # as initialised, attention is so flat that a wrong mask would hardly show
        elif p.shape == (4,):  # sink logits
            p.data.normal_()
    model.set_attn_implementation(native)
    return model


@pytest.fixture(params=FAMILIES)
def model(request):
    return make(request.param)


@pytest.fixture
def tokens():
    return torch.randint(0, 256, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def close(a, b):
    assert (a - b).abs().max() < 1e-4 * b.abs().max(), (a - b).abs().max()


@torch.no_grad()
def test_the_identity_program_changes_nothing(model, tokens):
    wanted = model(tokens, use_cache=False).logits
    with install(model, Attention()):
        close(model(tokens, use_cache=False).logits, wanted)


@torch.no_grad()
def test_chunks_on_a_filled_cache_and_single_steps_equal_the_whole(model, tokens):
    wanted = model(tokens, use_cache=False).logits
    with install(model, Attention()):
        cache = DynamicCache(config=model.config)
        pieces = [tokens[:, :21], tokens[:, 21:29], *tokens[:, 29:].split(1, 1)]
        found = [model(piece, past_key_values=cache, use_cache=True).logits for piece in pieces]
    close(torch.cat(found, 1), wanted)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing_for_the_tokens(model, tokens, side):
    keep = torch.ones_like(tokens)
    keep[0, slice(0, 9) if side == "left" else slice(-9, None)] = 0
    wanted = model(tokens, attention_mask=keep, use_cache=False).logits
    with install(model, Attention()):
        found = model(tokens, attention_mask=keep, use_cache=False).logits
    close(found[keep.bool()], wanted[keep.bool()])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_generate_gives_the_same_tokens(model, tokens, options):
    keep = torch.ones_like(tokens)
    keep[0, :9] = 0
    options = {"attention_mask": keep, "max_new_tokens": 6, "do_sample": False, **options}
    wanted = model.generate(tokens, **options)
    with install(model, Attention()):
        assert torch.equal(model.generate(tokens, **options), wanted)


@torch.no_grad()
def test_a_user_mask_of_four_dimensions_stands_in_for_the_models(tokens):
    model = make("llama")
    seen = torch.rand(2, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(2)) < 0.5
    seen = seen.tril() | torch.eye(LENGTH, dtype=torch.bool)
    additive = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    wanted = model(tokens, attention_mask=additive, use_cache=False).logits
    with install(model, Attention()):
        close(model(tokens, attention_mask=additive, use_cache=False).logits, wanted)
        close(model(tokens, attention_mask=seen, use_cache=False).logits, wanted)


def explicit(model, tokens, seen):
    """The model's own answer with an additive mask made from a bool one."""
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min).expand(len(tokens), 1, -1, -1)
    return model(tokens, attention_mask=mask, use_cache=False).logits


@torch.no_grad()
def test_a_window_with_sinks_equals_the_explicit_mask(tokens):
    model = make("llama")
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    seen = (distance >= 0) & ((distance < 8) | (torch.arange(LENGTH) < 2))
    wanted = explicit(model, tokens, seen)
    program = Attention(mask=masks.Window(8) | masks.Sinks(2))
    dense = model(tokens, use_cache=False).logits
    with install(model, program):
        close(model(tokens, use_cache=False).logits, wanted)
        cache = DynamicCache(config=model.config)
        steps = [model(t, past_key_values=cache).logits for t in (tokens[:, :30], *tokens[:, 30:].split(1, 1))]
        close(torch.cat(steps, 1), wanted)
    with pytest.raises(AssertionError):  # the program matters at all
        close(dense, wanted)


@pytest.mark.parametrize("program", [masks.Sinks(3) | masks.Window(5), masks.Blocks(7) | masks.Sinks(2)], ids=repr)
@torch.no_grad()
def test_masks_count_from_the_first_token_of_a_left_padded_text(program, tokens):
    model = make("llama")
    keep = torch.ones_like(tokens)
    keep[0, :9] = 0
    with install(model, Attention(mask=program)):
        both = model(tokens, attention_mask=keep, use_cache=False).logits
        alone = model(tokens[:1, 9:], use_cache=False).logits
        whole = model(tokens[1:], use_cache=False).logits
    close(both[:1, 9:], alone)
    close(both[1:], whole)


@torch.no_grad()
def test_sinks_stay_the_texts_first_tokens_when_a_sliding_cache_drops_keys(tokens):
    model = make("qwen2")
    program = Attention(mask=masks.Window(4) | masks.Sinks(2))
    with install(model, program):
        wanted = model(tokens, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        found = [model(t, past_key_values=cache).logits for t in tokens.split(1, 1)]
    close(torch.cat(found, 1), wanted)


@torch.no_grad()
def test_each_layer_gets_its_own_program(tokens):
    model = make("llama")
    asked = []

    def factory(layer, heads):
        asked.append((layer, heads))
        return Attention(mask=masks.Window(1) if layer == 1 else None)

    calls = []
    with install(model, factory), listen(model, calls.append):
        model(tokens, use_cache=False)
    assert asked == [(0, 4), (1, 4), (2, 4)]
    assert [c.site.layer for c in calls] == [0, 1, 2]
    own = [c.v.repeat_interleave(2, 1) for c in calls]  # a window of one key gives its value
    assert [torch.allclose(c.out, v, atol=1e-5) for c, v in zip(calls, own, strict=True)] == [False, True, False]


@torch.no_grad()
def test_output_errors_compare_on_the_same_inputs(tokens):
    model = make("llama")
    dense = model(tokens, use_cache=False).logits
    with output_errors(model, Attention()) as nothing:
        model(tokens, use_cache=False)
    with output_errors(model, Attention(mask=masks.Window(1))) as much:
        close(model(tokens, use_cache=False).logits, dense)
    assert sorted(nothing) == [0, 1, 2] and max(nothing.values()) < 1e-5
    assert min(much.values()) > 0.1


@torch.no_grad()
def test_the_model_and_the_registries_are_restored(model, tokens):
    wanted = model(tokens, use_cache=False).logits
    before = copy.deepcopy(model.config.to_dict()), set(model.state_dict()), [sorted(vars(m)) for m in model.modules()]
    with pytest.raises(ZeroDivisionError), install(model, Attention(mask=masks.Window(2))):
        assert model.config._attn_implementation == "saccade"
        raise ZeroDivisionError
    after = model.config.to_dict(), set(model.state_dict()), [sorted(vars(m)) for m in model.modules()]
    assert before == after
    assert model.config._attn_implementation == "eager"
    assert "saccade" not in AttentionInterface() and "saccade" not in AttentionMaskInterface()
    assert torch.equal(model(tokens, use_cache=False).logits, wanted)


@torch.no_grad()
def test_two_models_run_two_programs_and_leave_one_by_one(tokens):
    one, two = make("llama"), make("gemma2")
    wanted = two(tokens, use_cache=False).logits
    first, second = install(one, Attention(mask=masks.Window(2))), install(two, Attention())
    first.remove()
    close(two(tokens, use_cache=False).logits, wanted)
    second.remove()
    second.remove()
    assert "saccade" not in AttentionInterface()


def test_what_cannot_run_programs_is_refused_with_the_reason(tokens):
    bloom = BloomForCausalLM(BloomConfig(vocab_size=99, hidden_size=32, n_layer=1, n_head=2))
    with pytest.raises(Unsupported, match="attention interface"):
        install(bloom, Attention())
    with pytest.raises(SpecError, match="torch module"):
        install("gpt2", Attention())
    llama = make("llama")
    with pytest.raises(SpecError, match="must be a saccade"):
        install(llama, lambda layer, heads: None)
    assert llama.config._attn_implementation == "eager"
    sigmoid = Attention(normalizer=normalizers.Sigmoid())
    with install(make("gpt_oss"), sigmoid) as handle, pytest.raises(Unsupported, match="sink"):
        handle.model(tokens)
    assert "saccade" not in AttentionInterface()


@torch.no_grad()
def test_scale_and_soft_cap_of_the_model_come_before_the_programs_scores(tokens):
    model = make("gemma2")
    bias = torch.randn(LENGTH, LENGTH)
    seen = []
    with install(model, Attention(score=scores.Bias(bias))), listen(model, seen.append):
        model(tokens, use_cache=False)
    call = seen[1]  # the first layer slides
    k = call.k.repeat_interleave(2, 1)
    score = torch.tanh(call.q @ k.mT * model.config.query_pre_attn_scalar**-0.5 / 2.0) * 2.0 + bias
    score = score.masked_fill(~torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(), float("-inf"))
    close(call.out, score.softmax(-1) @ call.v.repeat_interleave(2, 1))
