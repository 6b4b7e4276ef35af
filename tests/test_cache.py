"""Caches that hold fewer tokens: equal to the same model with the dropped tokens masked out, and honest about bytes."""

import pytest
import torch
import transformers as tf

import families
from families import DECODERS, make
from saccade import Attention, SpecError, edit, edits, install, masks, watch
from saccade import stats as st
from saccade.cache import H2O, Cache, KeyNorm, Policy, Recent
from saccade.cache.packed import Packed
from saccade.study.hosted_laws import MaskedModel, walk
from saccade.systems.cache.snapkv import SnapKV

POLICIES = {
    "recent": lambda: Recent(2), "norm": KeyNorm, "h2o": lambda: H2O(3), "snapkv": lambda: SnapKV(4, 3).policy(),
}  # fmt: skip


def close(a, b):
    assert (a - b).abs().max() < 1e-4 * b.abs().max(), (a - b).abs().max()


def steps(ids):
    return [ids[:, :14], ids[:, 14:18], *ids[:, 18:].split(1, 1)]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
@pytest.mark.parametrize("shared", [False, True])
@torch.no_grad()
def test_a_policy_equals_the_model_with_the_dropped_tokens_masked_out(family, policy, shared):
    model, ids = make(family), families.tokens()
    chosen = POLICIES[policy]()
    chosen.shared = shared
    cache = Cache(model, chosen, budget=6)
    found, plan = walk(model, cache, steps(ids))
    assert max(map(max, cache.kept())) < families.LENGTH
    if not shared and chosen.while_decoding:
        assert all(n == 6 for layer in cache.kept() for n in layer)
    close(found, MaskedModel(model, plan).logits(steps(ids)))


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_batches_hold_no_padding(side):
    model, ids = make("llama"), families.tokens()
    padding = torch.ones_like(ids)
    padding[0, slice(0, 5) if side == "left" else slice(9, 14)] = 0
    cache = Cache(model, H2O(2), budget=8)
    found, plan = walk(model, cache, steps(ids), padding)
    wanted = MaskedModel(model, plan).logits(steps(ids), padding)
    close(found[padding.bool()], wanted[padding.bool()])
    for layer in cache.held:
        for s in layer.segments:
            assert not set(s.positions[0].flatten().tolist()) & set((padding[0] == 0).nonzero().flatten().tolist())


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_without_a_policy_nothing_changes(family):
    model, ids = make(family), families.tokens()
    wanted = model(ids, use_cache=False).logits
    found, _ = walk(model, Cache(model), steps(ids))
    close(found, wanted)


@torch.no_grad()
def test_sliding_windows_count_logical_positions():
    model, ids = make("gemma2"), families.tokens()
    cache = Cache(model, Recent(0), budget=8)  # the sliding layer sees 6: nothing that it would see is dropped
    whole = Cache(model, Recent(0), budget=lambda layer: 8 if layer == 0 else 99)
    wanted = model(ids, use_cache=False).logits
    close(walk(model, whole, steps(ids))[0], wanted)
    with pytest.raises(AssertionError):
        close(walk(model, cache, steps(ids))[0], wanted)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True}], ids=str)
def test_generate_with_a_cache_that_drops_nothing_gives_the_same_tokens(options):
    model, ids = make("llama"), families.tokens()
    torch.manual_seed(0)
    wanted = model.generate(ids, max_new_tokens=6, **options)
    torch.manual_seed(0)
    with Cache(model, KeyNorm(), budget=99) as cache:
        assert torch.equal(model.generate(ids, max_new_tokens=6, past_key_values=cache, **options), wanted)


def test_bytes_are_those_of_the_tensors_and_budgets_bound_them():
    model, ids = make("llama"), families.tokens()
    sizes = {}
    for budget in (None, 0.25, 6, "12KiB", [3, 9], lambda layer: 3 + 6 * layer):
        with torch.no_grad(), Cache(model, budget and KeyNorm(), budget=budget) as cache:
            model(ids, past_key_values=cache)
        held = [s for layer in cache.held for s in layer.segments]
        own = sum(x.nbytes for s in held for x in (s.keys, s.values, s.positions, s.scores))
        assert cache.nbytes == own
        sizes[str(budget)[:9]] = cache.nbytes
        kept = cache.kept()
        if budget in (0.25, 6):
            assert kept == [[6, 6], [6, 6]]
        elif isinstance(budget, str):
            assert 0.7 * 12 * 2**10 < cache.nbytes <= 12 * 2**10
        elif budget is not None:
            assert kept == [[3, 3], [9, 9]]
    assert sizes["None"] == 4 * sizes["6"] == 4 * sizes["0.25"]


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_numbers_are_at_most_half_a_step_away(bits):
    x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    packed = Packed.pack(x, bits)
    step = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / (2**bits - 1)
    assert ((packed.unpack() - x).abs() <= 0.5001 * step).all()
    assert packed.nbytes == x.numel() * bits // 8 + 2 * 4 * x[..., 0].numel()
    assert tuple(packed.shape) == tuple(x.shape)
    assert torch.equal(Packed.pack(x[:, :, :2], bits).then(Packed.pack(x[:, :, 2:], bits)).unpack(), packed.unpack())


@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_a_packed_cache_equals_attention_over_rounded_keys_and_values(bits):
    """The judge rounds in its own words what is older than the call: as a hook on a stock cache's tensors."""
    model, ids = make("llama"), families.tokens()
    top = 2**bits - 1

    def rounded(x):
        low = x.min(-1, keepdim=True).values
        width = x.max(-1, keepdim=True).values - low
        return ((x - low) * top / width).round() * width / top + low

    wanted, stock = [], tf.DynamicCache()
    for piece in steps(ids):
        wanted.append(model(piece, past_key_values=stock).logits)
        for layer in stock.layers:
            for name in ("keys", "values"):
                whole = getattr(layer, name)
                old = whole[:, :, : -piece.shape[1]]
                setattr(layer, name, torch.cat([old, rounded(whole[:, :, -piece.shape[1] :])], 2))
    found, _ = walk(model, Cache(model, bits=bits), steps(ids))
    close(found, torch.cat(wanted, 1))
    with pytest.raises(AssertionError):
        close(found, model(ids, use_cache=False).logits)
    small, _ = walk(model, Cache(model, H2O(2), budget=6, bits=bits), steps(ids))
    assert small.isfinite().all()


@torch.no_grad()
def test_chunked_prefill_never_holds_more_than_the_budget_and_a_chunk():
    model, ids = make("llama"), families.tokens()
    most = []
    with Cache(model, H2O(2), budget=5) as cache, watch(model, st.KeyMass()) as seen:
        for piece in ids.split(4, 1):
            model(piece, past_key_values=cache)
            most.append(max(s["key_mass"].shape[-1] for s in seen.seen.values()))
            assert cache.get_seq_length() == sum(p.shape[1] for p in ids.split(4, 1)[: len(most)])
    assert max(most) == 9


@torch.no_grad()
def test_crop_select_and_repeat():
    model, ids = make("llama"), families.tokens()
    with Cache(model, KeyNorm(), budget=99) as cache:
        model(ids[:, :10], past_key_values=cache)
        model(ids[:, 15:18], past_key_values=cache)
        cache.crop(-3)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        found = model(ids.flip(0)[:, 10:], past_key_values=cache).logits
    close(found, model(ids.flip(0), use_cache=False).logits[:, 10:])
    cache.reset()
    assert cache.nbytes == 0 and cache.get_seq_length() == 0


@torch.no_grad()
def test_programs_and_edits_work_on_a_cache_and_masks_count_logical_positions():
    model, ids = make("llama"), families.tokens()
    with install(model, Attention(mask=masks.Window(5) | masks.Sinks(1))):
        wanted = model(ids, use_cache=False).logits
        with Cache(model, Recent(1), budget=6) as cache:  # holds all that the window and the sink see
            found = torch.cat([model(p, past_key_values=cache).logits for p in steps(ids)], 1)
    close(found[:, :14], wanted[:, :14])
    close(found[:, 18:], wanted[:, 18:])
    with Cache(model, Recent(1), budget=6) as cache, edit(model, edits.Zero(keys=0)):
        model(ids, past_key_values=cache)


def test_bad_input_is_told_and_the_model_left_as_it_was():
    model, ids = make("llama"), families.tokens()
    for budget in (0, -3, 0.0, 1.5, "8 apples", True, [4]):
        with pytest.raises(SpecError, match="budget"):
            Cache(model, KeyNorm(), budget=budget)
    with pytest.raises(SpecError, match="policy"):
        Cache(model, "snapkv", budget=4)
    with pytest.raises(SpecError, match="a budget a policy"):
        Cache(model, budget=4)
    with pytest.raises(SpecError, match="is not open"):
        model(ids, past_key_values=Cache(model, KeyNorm(), budget=4))

    class Nan(Policy):
        def score(self, look):
            return look.scores / 0

    with pytest.raises(SpecError, match="Nan gave NaN"), Cache(model, Nan(), budget=4) as cache:
        model(ids, past_key_values=cache)
    with pytest.raises(SpecError, match="another"), Cache(model, KeyNorm(), budget=4) as cache:
        model(ids, past_key_values=cache)
        model(ids[:1], past_key_values=cache)
    with pytest.raises(SpecError, match="less than one token"), Cache(model, KeyNorm(), budget="90B") as cache:
        model(ids, past_key_values=cache)
    assert model.config._attn_implementation == "sdpa"
    assert "saccade" not in tf.AttentionInterface()
