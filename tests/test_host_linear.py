"""Linear programs inside unmodified models, against dense float64 weights put in the place of the model's softmax."""

import copy

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, DynamicCache, StaticCache

import families
from families import answer, inputs, make
from saccade import Attention, LinearAttention, SpecError, Unsupported, edit, edits, install, masks, stats, watch
from saccade.cache import H2O, Cache
from saccade.core.linear import features
from saccade.core.linear.reference import step_by_step
from saccade.hosts.flow import keep
from saccade.hosts.linear import known_in
from saccade.hosts.replaced import replaced
from saccade.hosts.transformers import output_errors

HEADS, WIDTH = 4, 8


def unit(x):
    return nn.functional.normalize(x, dim=-1)


def weights(seed, width=6):
    return torch.randn(HEADS, WIDTH, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / 2


class OfHead(features.Feature):
    """exp of a projection that each query head has for itself."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x, heads):
        return (x @ self.weight.to(x.dtype)[heads]).exp()


def learned(causal=True, **options):
    maps = features.Pair(OfHead(weights(1)), OfHead(weights(2)))
    return LinearAttention(maps, normalize=True, causal=causal, **options)


def maps_of(program, x, which):
    """The same features, for ``x [B, H, N, D]``."""
    if isinstance(program.feature, features.Elu1):
        return torch.where(x > 0, x + 1, x.exp())
    if isinstance(program.feature, features.Identity):
        return x
    return (x @ getattr(program.feature, which).weight).exp()


def dense(program, q, k, v, mask=None, offset=None, edited=lambda w: w):
    """Output and weights, in float64, by the definition."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    w = maps_of(program, q, "queries") @ maps_of(program, k, "keys").mT * program.scale
    n, m = w.shape[-2:]
    far = torch.arange(n)[:, None] + (m - n if offset is None else offset) - torch.arange(m)
    if program.decay is not None:
        w = w * (program.decay.log.double().reshape(-1, 1, 1) * far.clamp(min=0)).exp()
    visible = far >= 0 if program.causal else torch.ones_like(far, dtype=torch.bool)
    w = w * (visible if mask is None else visible & mask)
    if program.normalize:
        w = w / (w.sum(-1, keepdim=True) + program.eps)
    w = edited(w)
    return w @ v, w


def judge(model, given, program_of, **options):
    """The model's answer with dense weights wherever ``program_of`` names a program, its own attention elsewhere."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attend(module, q, k, v, mask, **more):
        program = program_of(module)
        if program is None:
            return sdpa_attention_forward(module, q, k, v, mask, **more)
        out, _ = dense(program, q, k, v, mask, **options)
        return out.to(q.dtype).transpose(1, 2).contiguous(), None

    with replaced(model, attend):
        return answer(model, given, use_cache=False)


def close(a, b, tolerance=1e-9):
    assert (a - b).abs().max() < tolerance * b.abs().max(), (a - b).abs().max()


@pytest.fixture
def llama():
    return make("llama").double()


def padded(side, count=7):
    given = inputs("llama")
    given["attention_mask"][0, slice(0, count) if side == "left" else slice(-count, None)] = 0
    given["position_ids"] = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)  # as generate counts them
    return given


CAUSAL = {
    "learned, of each head": learned,
    "elu + 1, not divided": lambda: LinearAttention(features.Elu1(), scale=0.1),
    "retention": lambda: LinearAttention(scale=0.3, decay=-torch.arange(1.0, HEADS + 1) / 9),
}


@pytest.mark.parametrize("program", CAUSAL.values(), ids=CAUSAL)
@pytest.mark.parametrize("side", [None, "left", "right"])
@torch.no_grad()
def test_a_causal_model_with_grouped_heads_equals_the_dense_weights(llama, program, side):
    program, given = program(), inputs("llama") if side is None else padded(side)
    wanted, own = judge(llama, given, lambda module: program), answer(llama, given, use_cache=False)
    there = given["attention_mask"].bool()
    with install(llama, program):
        found = answer(llama, given, use_cache=False)
        alone = llama(given["input_ids"][:1, there[0]], use_cache=False).logits[0]
    close(found[there], wanted[there])
    close(found[0, there[0]], alone)  # what is padded is nothing
    assert (own - wanted)[there].abs().max() > 0.01 * wanted.abs().max()


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "bert"])
@torch.no_grad()
def test_float32_of_other_families(family):
    model, given = make(family), inputs(family)
    given["attention_mask"][0, -5:] = 0
    program, there = learned(causal=family != "bert"), given["attention_mask"].bool()
    with install(model, program):
        found = answer(model, given, use_cache=False)
    close(found[there].double(), judge(model.double(), given, lambda module: program)[there], 1e-4)


@torch.no_grad()
def test_the_delta_rule_equals_the_recurrence_token_by_token(llama):
    program, given, seen = LinearAttention(features.Learned(unit), delta=True), padded("left"), []
    with install(llama, program) as handle:
        hook = handle.sites[0].module.o_proj.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
        answer(llama, given, use_cache=False)
        hook.remove()
    layer = llama.model.layers[0]
    x = layer.input_layernorm(llama.model.embed_tokens(given["input_ids"]))
    q, k, v = (
        p(x).unflatten(-1, (-1, WIDTH)).transpose(1, 2)
        for p in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
    )
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    turned = apply_rotary_pos_emb(q, k, *llama.model.rotary_emb(x, given["position_ids"]))
    q, k, v = (y[:1, :, 7:] for y in (*turned, v))
    wanted = step_by_step(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), program)[0]
    close(seen[0][0, 7:], wanted[0].transpose(0, 1).flatten(1))


@pytest.mark.parametrize("kind, pattern, causal", [
    ("cross", None, False), ("self", "*decoder*", True), ("self", "*encoder.*", False),
], ids=["cross", "decoder", "encoder"])  # fmt: skip
@torch.no_grad()
def test_an_encoder_decoder_runs_it_where_it_is_as_causal(kind, pattern, causal):
    model, given, program = make("bart").double(), inputs("bart"), learned(causal)
    given["attention_mask"][0, :5] = 0
    with install(model, program, layers=pattern, kind=kind) as handle:
        found = answer(model, given)
        assert len(handle.sites) == 2
        if kind == "cross":  # what the encoder said is summed once, then read at every step
            step = model(**given | {"decoder_input_ids": given["decoder_input_ids"][:, :5]})
            cache = step.past_key_values
            cross = cache.cross_attention_cache.layers[0]
            cross.keys.data.fill_(torch.nan)
            more = model(**given | {"decoder_input_ids": given["decoder_input_ids"][:, 5:]}, past_key_values=cache,
                         encoder_outputs=[step.encoder_last_hidden_state])  # fmt: skip
            close(torch.cat([step.logits, more.logits], 1), found)
    modules = {s.module for s in handle.sites}
    close(found, judge(model, given, lambda module: program if module in modules else None))


@torch.no_grad()
def test_cross_attention_of_t5_whose_other_layers_keep_their_bias():
    model, given, program = make("t5").double(), inputs("t5"), learned(False)
    with install(model, program, kind="cross") as handle:
        found = answer(model, given)
    modules = {s.module for s in handle.sites}
    close(found, judge(model, given, lambda module: program if module in modules else None))


def decoded(model, pieces, cache=None, attention_mask=None, position_ids=None):
    cache = DynamicCache(config=model.config) if cache is None else cache
    found = []
    for piece in pieces:
        start = cache.get_seq_length()
        stop, more = start + piece.shape[1], {}
        if attention_mask is not None:
            more["attention_mask"] = attention_mask[:, :stop]
        if position_ids is not None:
            more["position_ids"] = position_ids[:, start:stop]
        found.append(model(piece, past_key_values=cache, **more).logits)
    return torch.cat(found, 1), cache


CUT = [(13, 5, 1, 1, 1, 1, 1, 1), (24,), (1,) * 24]


@pytest.mark.parametrize("cut", CUT, ids=str)
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("program", CAUSAL.values(), ids=CAUSAL)
@torch.no_grad()
def test_chunks_and_steps_equal_the_whole(llama, program, side, cut):
    given = inputs("llama") if side is None else padded(side)
    there = given["attention_mask"].bool()
    with install(llama, program()):
        wanted = answer(llama, given, use_cache=False)
        found, _ = decoded(llama, given.pop("input_ids").split(cut, 1), **given)
    close(found[there], wanted[there])


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@torch.no_grad()
def test_a_step_reads_the_state_and_not_the_keys(llama, kind):
    ids = families.tokens()
    room = {"max_cache_len": 40} if kind is StaticCache else {}
    with install(llama, learned()), install(llama, LinearAttention(features.Elu1(), normalize=True), heads=[0, 3]):
        wanted = llama(ids, use_cache=False).logits
        _, cache = decoded(llama, [ids[:, :20]], kind(config=llama.config, **room))
        assert known_in(cache, 1).tokens == 20
        for layer in cache.layers:
            layer.keys.data.fill_(torch.nan)  # behind autograd's back: no write that anybody could notice
        found, _ = decoded(llama, ids[:, 20:].split(1, 1), cache)
        close(found, wanted[:, 20:])


def crop(cache):
    cache.crop(-4)
    return slice(0, 16), ...


def select(cache):
    cache.batch_select_indices(torch.tensor([1, 1]))
    return slice(0, 20), [1, 1]


def reorder(cache):
    cache.reorder_cache(torch.tensor([1, 0]))
    return slice(0, 20), [1, 0]


@pytest.mark.parametrize("change", [crop, select, reorder])
@torch.no_grad()
def test_a_cache_that_was_changed_is_read_again(llama, change):
    ids = families.tokens()
    with install(llama, learned()):
        _, cache = decoded(llama, [ids[:, :20]])
        past, order = change(cache)
        more = ids[:, 20:].flip(1)
        found, _ = decoded(llama, more.split(1, 1), cache)
        wanted = llama(torch.cat([ids[order, past], more], 1), use_cache=False).logits
    close(found, wanted[:, -4:])


def test_gradients_reach_the_maps_through_keys_that_a_cache_held(llama):
    ids, program, grads = families.tokens(), learned(), []
    with install(llama, program):
        with torch.no_grad():
            _, cache = decoded(llama, [ids[:, :20]])
        for held in (cache, copy.deepcopy(cache)):  # of a copy nothing is known
            out = llama(ids[:, 20:], past_key_values=held).logits
            grads.append(torch.autograd.grad(out.square().mean(), list(program.parameters())))
    for mine, read in zip(*grads, strict=True):
        close(mine, read)


def write(cache):
    for layer in cache.layers:
        layer.values.mul_(1.5)


def exchange(cache):
    for layer in cache.layers:
        layer.values = layer.values * 1.5


@pytest.mark.parametrize("change", [write, exchange, None])
@torch.no_grad()
def test_what_is_written_into_a_cache_counts_as_does_another_padding(llama, change):
    ids = families.tokens()
    keep = (torch.arange(21) > 0).expand(2, -1).long()
    step = {"input_ids": ids[:, 20:21], "position_ids": torch.full((2, 1), 20)}
    with install(llama, learned()):
        _, cache = decoded(llama, [ids[:, :20]], attention_mask=keep)
        twin = copy.deepcopy(cache)
        before = llama(**step, past_key_values=copy.deepcopy(cache), attention_mask=keep).logits
        if change is None:
            keep = keep.clone()
            keep[:, :3] = 0
        else:
            change(cache), change(twin)
        found = llama(**step, past_key_values=cache, attention_mask=keep).logits
        close(found, llama(**step, past_key_values=twin, attention_mask=keep).logits)  # of a copy nothing is known
    assert (found - before).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@torch.no_grad()
def test_generate_equals_forwards_of_the_whole_text(llama, options):
    given, new = padded("left"), 6
    del given["position_ids"]  # it makes its own
    with install(llama, learned()):
        found = llama.generate(
            **given, max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None, **options
        )
        slow = llama.generate(**given, max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None,
                              use_cache=False, num_beams=options.get("num_beams", 1))  # fmt: skip
    assert torch.equal(found, slow)
    assert not torch.equal(found, llama.generate(**given, max_new_tokens=new, do_sample=False, eos_token_id=None))


def test_gradients_reach_maps_and_model_as_they_do_through_dense_weights(llama):
    given, program = padded("left"), learned()
    there = given["attention_mask"].bool()
    wanted = [*program.parameters(), *llama.parameters()]
    grads = []
    for hosted in (True, False):
        if hosted:
            with install(llama, program):
                out = answer(llama, given, use_cache=False)
        else:
            out = judge(llama, given, lambda module: program)
        grads.append(torch.autograd.grad(out[there].square().mean(), wanted, allow_unused=True))
    assert grads[0][0].abs().max() > 0 and grads[0][1].abs().max() > 0
    for mine, true in zip(*grads, strict=True):
        assert (mine is None) == (true is None)
        if true is not None and true.abs().max() > 1e-12:
            close(mine, true, 1e-8)


@torch.no_grad()
def test_each_layer_has_its_program_and_some_heads_alone(llama):
    given, asked = inputs("llama"), []
    own = [learned(), LinearAttention(features.Elu1(), normalize=True)]

    def factory(layer, heads):
        asked.append((layer, heads))
        return own[layer]

    with install(llama, factory):
        close(answer(llama, given, use_cache=False), judge(llama, given, lambda module: own[module.layer_idx]))
    assert asked == [(0, HEADS), (1, HEADS)]
    outs = []
    for program, heads in ((own[0], None), (Attention(), None), (own[0], [1, 2])):
        with install(llama, program, heads=heads, layers=0) as handle:
            take = handle.sites[0].module.o_proj.register_forward_pre_hook(lambda m, x: outs.append(x[0]))
            answer(llama, given, use_cache=False)
            take.remove()
    whole, plain, some = (x.unflatten(-1, (HEADS, WIDTH)) for x in outs)
    assert torch.equal(some[..., 1:3, :], whole[..., 1:3, :]) and torch.equal(some[..., ::3, :], plain[..., ::3, :])


@pytest.mark.parametrize("program", CAUSAL.values(), ids=CAUSAL)
@torch.no_grad()
def test_watching_shows_the_weights_and_changes_nothing(llama, program):
    program, given, calls = program(), padded("left"), []
    there = given["attention_mask"].bool()
    with install(llama, program):
        wanted = answer(llama, given, use_cache=False)
        with watch(llama, stats.KeyMass(), stats.Rows(range(families.LENGTH))) as seen, keep(llama) as kept:
            close(answer(llama, given, use_cache=False)[there], wanted[there], 1e-7)
            rolled = kept.rollout([-1]) if program.normalize else None
    calls = [layer.call for layer in kept._layers]
    shown = []
    for layer, call in enumerate(calls):
        _, w = dense(program, call.q, call.k, call.v, there[:, None, None])
        shown.append(w)
        close(seen[layer]["rows"].double(), w, 1e-6)
        close(seen[layer]["key_mass"].double(), w.sum(-2), 1e-6)
    if rolled is not None:
        whole = torch.eye(families.LENGTH).double()
        for w in shown:
            step = w.mean(1) + torch.eye(families.LENGTH)
            whole = step / step.sum(-1, keepdim=True) @ whole
        close(rolled[:, 0].double(), whole[:, -1], 1e-6)


@torch.no_grad()
def test_halves_are_watched_in_float32():
    model, ids = make("llama").bfloat16(), families.tokens()
    with install(model, learned()):
        wanted = model(ids, use_cache=False).logits
        with watch(model, stats.Rows([3])) as seen:
            found = model(ids, use_cache=False).logits
    assert found.dtype == torch.bfloat16 and seen[0]["rows"].dtype == torch.float32
    close(found.float(), wanted.float(), 0.02)
    assert (seen[0]["rows"].sum(-1) - 1).abs().max() < 1e-5


def test_edits_change_the_weights_and_gradients_still_reach_the_maps(llama):
    given, program = inputs("llama"), learned()

    def without_first(w):
        w = w.clone()
        w[..., 0] = 0
        return w

    with install(llama, program), edit(llama, edits.Zero(keys=0)):
        found = answer(llama, given, use_cache=False)
    wanted = judge(llama, given, lambda module: program, edited=without_first)
    close(found, wanted, 1e-7)
    grads = [torch.autograd.grad(x.square().mean(), list(program.parameters())) for x in (found, wanted)]
    for mine, true in zip(*grads, strict=True):
        close(mine, true, 1e-6)


@torch.no_grad()
def test_beside_the_dense_model_on_the_same_inputs(llama):
    given = inputs("llama")
    with output_errors(llama, learned()) as errors:
        answer(llama, given, use_cache=False)
    assert sorted(errors) == [0, 1] and min(errors.values()) > 0.01


@torch.no_grad()
def test_a_cache_that_holds_fewer_tokens_scores_them_by_the_programs_weights(llama):
    ids = families.tokens()
    with install(llama, learned()):
        wanted = llama(ids, use_cache=False).logits
        with Cache(llama, H2O(recent=4), budget=64) as cache:
            close(decoded(llama, ids.split((20, 1, 1, 1, 1), 1), cache)[0], wanted, 1e-7)
        with Cache(llama, H2O(recent=4), budget=8) as cache:
            assert (decoded(llama, ids.split((20, 1, 1, 1, 1), 1), cache)[0] - wanted).abs().max() > 1e-3
            assert cache.kept()[0] == [8, 8]
        padding = torch.ones_like(ids)
        padding[0, :3] = 0
        with Cache(llama) as cache, pytest.raises(Unsupported, match="DynamicCache"):
            decoded(llama, [ids], cache, attention_mask=padding)


@torch.no_grad()
def test_torchs_own_attention_with_padding():
    torch.manual_seed(0)
    attention, program = (
        nn.MultiheadAttention(HEADS * WIDTH, HEADS, batch_first=True, bias=False).double().eval(),
        learned(False),
    )
    x, y = torch.randn(2, 5, HEADS * WIDTH).double(), torch.randn(2, 9, HEADS * WIDTH).double()
    hidden = torch.arange(9) >= torch.tensor([9, 6])[:, None]
    y[1, 6:] = torch.nan  # nobody reads it
    with install(attention, program):
        found = attention(x, y, y, key_padding_mask=hidden)[0]
    weight = attention.in_proj_weight.unflatten(0, (3, HEADS, WIDTH))
    y = y.nan_to_num()
    q, k, v = (torch.einsum("bne,hde->bhnd", z, w) for z, w in zip((x, y, y), weight, strict=True))
    out, _ = dense(program, q, k, v, ~hidden[:, None, None])
    close(found, attention.out_proj(out.transpose(1, 2).flatten(2)))


REFUSED = {
    "causal model": ("llama", {}, lambda: learned(False), SpecError, "causal=True"),
    "encoder": ("bert", {}, learned, SpecError, "causal=False"),
    "window": ("mistral", {}, learned, Unsupported, r"mask is Window.*layers="),
    "soft cap": ("gemma2", {"layers": 1}, learned, Unsupported, "SoftCap"),
    "sinks": ("gpt_oss", {"layers": 1}, learned, Unsupported, "sink logits"),
    "position bias": ("t5", {"layers": "decoder.*", "kind": "self"}, learned, Unsupported, "Bias"),
}


@pytest.mark.parametrize("family, where, program, error, told", REFUSED.values(), ids=REFUSED)
@torch.no_grad()
def test_what_a_state_cannot_do_is_refused_with_the_reason(family, where, program, error, told):
    from transformers import MistralConfig, MistralForCausalLM

    sliding = family == "mistral"
    model = MistralForCausalLM(MistralConfig(**families.TEXT, sliding_window=6)) if sliding else make(family)
    given = inputs("llama" if sliding else family)
    for looked in (False, True):
        watching = watch(model, stats.Entropy(), **where) if looked else None
        with install(model, program(), **where), pytest.raises(error, match=told):
            answer(model, given)
        if watching is not None:
            watching.remove()
    assert "saccade" not in AttentionInterface()


def test_dropout_a_mask_of_four_dimensions_and_watching_the_delta_rule_are_refused(llama):
    bert, given = make("bert").train(), inputs("bert")
    with install(bert, learned(False)):
        with pytest.raises(Unsupported, match=r"dropout.*model\.eval"):
            answer(bert, given)
        answer(bert.eval(), given)
    mask = torch.ones(2, 1, families.LENGTH, families.LENGTH, dtype=torch.bool).tril()
    with install(llama, learned()), pytest.raises(Unsupported, match="Given"):
        llama(families.tokens(), attention_mask=mask)
    delta = LinearAttention(features.Learned(unit), delta=True)
    with install(llama, delta), watch(llama, stats.Entropy()), pytest.raises(Unsupported, match="linear_weights"):
        llama(families.tokens())
    with pytest.raises(SpecError, match=r"saccade\.LinearAttention"):
        install(llama, 3)
    with pytest.raises(SpecError, match=r"saccade\.LinearAttention"):
        install(llama, lambda layer, heads: masks.Causal())


@torch.no_grad()
def test_nothing_is_left_behind(llama):
    given = inputs("llama")
    wanted = answer(llama, given, use_cache=False)
    before = [{k: copy.copy(v) for k, v in vars(m).items()} for m in llama.modules()]
    with install(llama, learned()), install(llama, LinearAttention(features.Elu1()), layers=1):
        answer(llama, given)
    assert [list(vars(m)) for m in llama.modules()] == [list(b) for b in before]
    assert not any(m._forward_pre_hooks for m in llama.modules())
    assert torch.equal(answer(llama, given, use_cache=False), wanted)


@pytest.mark.parametrize("fused", [True, False])
def test_timm(fused):
    vit = pytest.importorskip("timm").models.VisionTransformer
    torch.manual_seed(0)
    model = (
        vit(img_size=16, patch_size=4, embed_dim=HEADS * WIDTH, depth=2, num_heads=HEADS, num_classes=5).double().eval()
    )
    program, x = learned(False), torch.randn(2, 3, 16, 16).double()
    for block in model.blocks:
        block.attn.fused_attn = fused
    seen = []
    hook = model.blocks[0].attn.register_forward_pre_hook(lambda m, given: seen.append(given[0]))
    with install(model, program):
        found = []
        take = model.blocks[0].attn.proj.register_forward_pre_hook(lambda m, given: found.append(given[0]))
        model(x).square().sum().backward()
        take.remove()
    hook.remove()
    q, k, v = model.blocks[0].attn.qkv(seen[0]).unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4)
    close(found[0], dense(program, q, k, v)[0].transpose(1, 2).flatten(2))
    assert program.feature.keys.weight.grad.abs().max() > 0
