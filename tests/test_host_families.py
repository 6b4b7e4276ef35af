"""Every family that goes through transformers' attention interface passes the same tests; others are refused."""

import pytest
import torch
import transformers as tf

import families
from families import DECODERS, GENERATE, MODELS, answer, inputs, make
from saccade import Attention, SpecError, Unsupported, edit, edits, install, masks, stats, watch


def close(a, b):
    assert (a - b).abs().max() < 1e-4 * b.abs().max(), (a - b).abs().max()


@pytest.fixture(params=MODELS)
def family(request):
    return request.param


@torch.no_grad()
def test_the_identity_program_changes_nothing(family):
    model, given = make(family), inputs(family)
    wanted = answer(model, given)
    with install(model, Attention()) as handle:
        close(answer(model, given), wanted)
    assert len(handle.sites) >= 2
    assert torch.equal(answer(model, given), wanted)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing_for_the_tokens(family, side):
    given = inputs(family)
    if "attention_mask" not in given or "pixel_values" in given:
        pytest.skip("no padded text")
    model = make(family)
    given["attention_mask"][0, slice(0, 5) if side == "left" else slice(-5, None)] = 0
    wanted = answer(model, given)
    keep = given["attention_mask"].bool() if wanted.shape[1] == families.LENGTH else ...
    with install(model, Attention()):
        close(answer(model, given)[keep], wanted[keep])


@pytest.mark.parametrize("family", GENERATE)
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}], ids=["greedy", "beams", "sampling"])
def test_generate_gives_the_same_tokens(family, options):
    model, given = make(family), inputs(family)
    given.pop("decoder_input_ids", None)
    wanted, found = [], []
    for into in (wanted, found):
        torch.manual_seed(3)
        handle = install(model, Attention()) if into is found else None
        into += model.generate(**given, max_new_tokens=5, **options).tolist()
        if handle is not None:
            handle.remove()
    assert found == wanted


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_chunks_on_a_filled_cache_and_single_steps_equal_the_whole(family):
    model, ids = make(family), families.tokens()
    wanted = model(ids, use_cache=False).logits
    with install(model, Attention()):
        cache = tf.DynamicCache(config=model.config)
        pieces = [ids[:, :13], ids[:, 13:18], *ids[:, 18:].split(1, 1)]
        found = [model(piece, past_key_values=cache, use_cache=True).logits for piece in pieces]
    close(torch.cat(found, 1), wanted)


@torch.no_grad()
def test_every_head_of_every_site_is_watched_and_edited(family):
    model, given = make(family), inputs(family)
    dense = answer(model, given)
    with watch(model, stats.KeyMass(), stats.Entropy()) as seen:
        close(answer(model, given), dense)
    assert set(seen) == {s.path for s in seen.sites}
    for site in seen.sites:
        mass, entropy = seen[site.path]["key_mass"], seen[site.path]["entropy"]
        assert mass.shape[1] == entropy.shape[1] == site.heads
        sinks = family == "gpt_oss"  # they take mass and have no key
        total = entropy.shape[2]
        assert (mass.sum(-1) <= total + 1e-3).all()
        assert sinks or torch.allclose(mass.sum(-1), torch.full_like(mass.sum(-1), total), rtol=1e-4)
    for kind in {k for s in seen.sites for k in s.kinds}:
        with edit(model, edits.Zero(keys=0), kind=kind) as handle:
            assert all(kind in s.kinds for s in handle.sites)
            assert (answer(model, given) - dense).abs().max() > 1e-4 * dense.abs().max()


@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
def test_gradient_checkpointing_gives_the_same_gradients(family):
    model, given = make(family), inputs(family)
    grads = []
    for hosted in (False, True):
        model.train()
        model.config.dropout_rate = 0.0
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0
        if hosted:
            model.gradient_checkpointing_enable()
        handle = install(model, Attention()) if hosted else None
        model.zero_grad()
        answer(model, given, use_cache=False).square().mean().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        if handle is not None:
            handle.remove()
    assert grads[0].keys() == grads[1].keys()
    for name, wanted in grads[0].items():
        close(grads[1][name] + 1e-12, wanted + 1e-12)


def test_kinds_tell_towers_and_cross_attention_apart():
    def kinds(family):
        handle = install(make(family), Attention())
        handle.remove()
        return {" ".join(sorted(s.kinds)): len([t for t in handle.sites if t.kinds == s.kinds]) for s in handle.sites}

    assert kinds("t5") == kinds("bart") == {"self text": 4, "cross text": 2}
    assert kinds("whisper") == {"audio self": 2, "self text": 2, "cross text": 2}
    assert kinds("clip") == kinds("llava") == kinds("qwen2_vl") == {"self text": 2, "self vision": 2}
    assert kinds("vit") == {"self vision": 2}
    assert kinds("gpt2") == {"self text": 2}


REFUSED = {
    "bloom": lambda: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=99, hidden_size=32, n_layer=1, n_head=2)),
    "falcon": lambda: tf.FalconForCausalLM(
        tf.FalconConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    ),
    "gptj": lambda: tf.GPTJForCausalLM(tf.GPTJConfig(vocab_size=99, n_embd=32, n_layer=1, n_head=2, rotary_dim=8)),
    "mpt": lambda: tf.MptForCausalLM(tf.MptConfig(vocab_size=99, d_model=32, n_layers=1, n_heads=2)),
    "deberta": lambda: tf.DebertaV2Model(
        tf.DebertaV2Config(
            vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        )
    ),
    "longformer": lambda: tf.LongformerModel(
        tf.LongformerConfig(
            vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            attention_window=4,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_models_outside_the_interface_are_refused_with_the_reason(name):
    model = REFUSED[name]()
    before = model.config._attn_implementation
    with pytest.raises(Unsupported, match="attention interface"):
        install(model, Attention())
    assert model.config._attn_implementation == before
    assert "saccade" not in tf.AttentionInterface() and "saccade" not in tf.AttentionMaskInterface()


def test_what_matches_nothing_lists_what_there_is():
    model = make("bart")
    for options in ({"layers": 7}, {"layers": "*.nowhere"}, {"kind": "vision"}, {"layers": []}):
        with pytest.raises(SpecError, match=r"cross text layers \[0, 1\] \(model.decoder.layers.0.encoder_attn"):
            install(model, Attention(), **options)
    with pytest.raises(SpecError, match="heads 0 to 3, not \\[4\\]"):
        install(model, Attention(), heads=[0, 4])
    assert "saccade" not in tf.AttentionInterface()


@torch.no_grad()
def test_layers_and_heads_are_chosen_and_the_rest_is_untouched():
    model, ids = make("llama"), families.tokens()
    calls = {}
    from saccade.hosts.handles import listen

    with listen(model, lambda call: calls.__setitem__(call.site.layer, call)):
        model(ids, use_cache=False)
        dense = dict(calls)
        with install(model, Attention(mask=masks.Window(1)), layers=-1, heads=[1, 3]):
            model(ids, use_cache=False)
    own = calls[1].v.repeat_interleave(2, 1)
    assert torch.equal(calls[0].out, dense[0].out)
    close(calls[1].out[:, [1, 3]], own[:, [1, 3]])
    close(calls[1].out[:, [0, 2]], dense[1].out[:, [0, 2]])


@torch.no_grad()
def test_handles_nest_compose_and_leave_in_any_order():
    model, ids = make("llama"), families.tokens()
    before = [sorted(vars(m)) for m in model.modules()]
    dense = model(ids, use_cache=False).logits
    outer = install(model, Attention(mask=masks.Window(4)))
    with_outer = model(ids, use_cache=False).logits
    inner = install(model, Attention(mask=masks.Window(1)), layers=1)
    gate = edit(model, edits.Scale(0.5), heads=0)
    seen = watch(model, stats.KeyMass(), heads=[0, 1], every=True)
    model(ids, use_cache=False)
    (told,) = seen[1]["key_mass"] if isinstance(seen[1], dict) else [c["key_mass"] for c in seen[1]]
    assert torch.allclose(told[:, 0], torch.full_like(told[:, 0], 0.5))  # a window of one, halved in head 0
    assert torch.allclose(told[:, 1], torch.ones_like(told[:, 1]))
    gate.remove()
    inner.remove()
    close(model(ids, use_cache=False).logits, with_outer)
    assert len(seen[0]) == 2
    outer.remove()
    close(model(ids, use_cache=False).logits, dense)
    seen.remove()
    assert [sorted(vars(m)) for m in model.modules()] == before
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(ids, use_cache=False).logits, dense)
