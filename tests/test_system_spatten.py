"""SpAtten against its definition written out head by head; its counts in closed form; what is kept is nested."""

import itertools
import math

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import eager_mask

from saccade.hosts.handles import listen
from saccade.study.hosted_laws import small_model, some_tokens
from saccade.systems.cache.spatten import SpAtten, quantize, top

torch.set_num_threads(1)
PROMPT, LENGTH = 20, 26
SHARP = SpAtten(
    tokens=((0.5, 0.6),), recent=0.25, heads=((0.5, 0.75),), values=0.4, bits=(4, 3, 5), threshold=0.25
)  # fmt: skip
KEEP_ALL = {"tokens": (), "heads": (), "values": 1.0}


def sharp():
    """A small model that looks at few keys."""
    model = small_model()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.mul_(5)
    return model


@torch.no_grad()
def run(model, tokens, prompt=PROMPT):
    """Logits of the last prompt token and of every single step."""
    out = model(tokens[:, :prompt], use_cache=True)
    found, cache = [out.logits[:, -1]], out.past_key_values
    for step in tokens[:, prompt:].split(1, 1):
        found.append(model(step, past_key_values=cache).logits[:, 0])
    return torch.stack(found, 1)


def rounded(x, bits, dropped=0):
    """A head's vectors ``[M, D]`` as integers of so many bits, with the lowest ones cut off, times the step."""
    step = x.abs().max() / (2 ** (bits - 1) - 1)
    return torch.tensor([[(round(float(n / step)) >> dropped) << dropped for n in row] for row in x]) * step


class ByHand:
    """The paper's algorithm one sample and one head at a time, for two layers and ``SHARP``."""

    def __init__(self):
        self.bits = {"fetched": 0, "again": 0, "pruned": 0}
        self.state = {}

    def attend(self, module, query, key, value, attention_mask, scaling, **_):
        (batch, heads, new, _), (groups, total) = query.shape, key.shape[1:3]
        out = torch.zeros(*query.shape[:3], value.shape[-1])
        for b in range(batch):
            if module.layer_idx == 0:
                mass, pride = self.state.get(b, (torch.zeros(0), torch.zeros(heads)))
                if total == new:
                    mass, pride = torch.zeros(0), torch.zeros(heads)
                self.state[b] = torch.cat([mass, torch.zeros(new)]), pride
                self.alive = {**getattr(self, "alive", {}), b: (set(range(total)), set(range(heads)))}
            mass, pride = self.state[b]
            tokens, alive = self.alive[b]
            low_bits, wanted, rows = {}, {g: set() for g in range(groups)}, {}
            for h in alive:
                g = h // (heads // groups)
                hidden = torch.full((new, total), -torch.inf)
                for i in range(new):
                    for j in tokens & set(range(total - new + i + 1)):
                        hidden[i, j] = 0
                coarse = (query[b, h] @ rounded(key[b, g], 7, 3).T * scaling + hidden).softmax(-1)
                low_bits[g] = low_bits.get(g, False) or float(coarse.max()) < SHARP.threshold
                rows[h] = hidden
            for h in alive:
                g = h // (heads // groups)
                keys = rounded(key[b, g], 7, 0 if new > 1 or low_bits[g] else 3)
                weight = (query[b, h] @ keys.T * scaling + rows[h]).softmax(-1)
                mass += weight.sum(0)
                if new == 1:
                    best = weight[0].argsort(descending=True)[: math.ceil(SHARP.values * len(tokens))]
                    weight = torch.zeros_like(weight).index_fill(1, best, 1) * weight
                    wanted[g] |= set(weight[0].nonzero()[:, 0].tolist())
                out[b, h] = weight @ rounded(value[b, g], 5)
                pride[h] += out[b, h].abs().sum()
            if new > 1:
                continue
            for g in low_bits:
                self.bits["again"] += low_bits[g]
                self.bits["fetched"] += 8 * (len(tokens) * (4 + 3 * low_bits[g]) + len(wanted[g]) * 5)
            self.bits["pruned"] += (total - len(tokens)) + (heads - len(alive))
            count = math.ceil(0.6 * total)  # both layers: of the next
            last = set(range(total - math.ceil(0.25 * count), total))
            others = sorted(tokens - last, key=lambda j: -float(mass[j]))
            first_heads = sorted(alive, key=lambda h: -float(pride[h]))[: math.ceil(0.75 * heads)]
            self.alive[b] = last | set(others[: count - len(last)]), set(first_heads)
        return out.transpose(1, 2).contiguous(), None


def test_single_steps_are_the_algorithm_written_out():
    model, tokens, judge = sharp(), some_tokens(2, LENGTH), ByHand()
    with SHARP.apply(model) as pruning:
        found = run(model, tokens)
    AttentionInterface.register("by_hand", judge.attend)
    AttentionMaskInterface.register("by_hand", eager_mask)
    try:
        model.set_attn_implementation("by_hand")
        wanted = run(model, tokens)
    finally:
        for registry in (AttentionInterface, AttentionMaskInterface):
            registry._global_mapping.pop("by_hand", None)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
    assert pruning.fetched == judge.bits["fetched"]
    assert 0 < judge.bits["again"] < 2 * 2 * 2 * (LENGTH - PROMPT) and judge.bits["pruned"]


@pytest.mark.parametrize(("threshold", "bits"), [(0.0, 8 + 8), (1.1, 8 + 4 + 8)])
def test_with_everything_kept_the_count_is_that_of_the_bits(threshold, bits):
    model = sharp()
    with SpAtten(**KEEP_ALL, threshold=threshold).apply(model) as pruning:
        run(model, some_tokens(2, LENGTH))
    assert pruning.fetched * 64 == pruning.dense * bits
    every = sum(range(PROMPT + 1, LENGTH + 1))
    assert pruning.dense == 2 * 2 * 2 * every * 2 * 8 * 32  # samples, layers, key heads, tokens, k and v, width, bits


def test_with_everything_kept_in_many_bits_it_is_the_model():
    model, tokens = sharp(), some_tokens(2, LENGTH)
    plain = run(model, tokens)
    with SpAtten(**KEEP_ALL, bits=(18, 4, 22)).apply(model):
        torch.testing.assert_close(run(model, tokens), plain, rtol=1e-3, atol=1e-3)
    assert torch.equal(run(model, tokens), plain)


def deep():
    """Six layers, each of which looks at a few keys of its own."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96, hidden_size=32, intermediate_size=32, num_hidden_layers=6, num_attention_heads=8,
            num_key_value_heads=4, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    ).eval()  # fmt: skip
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.mul_(1000)
    return model


def test_what_a_layer_has_pruned_no_later_layer_of_the_step_has():
    model, tokens, kept = deep(), some_tokens(2, LENGTH), []
    with SpAtten().apply(model) as pruning, listen(model, lambda c: kept.append((pruning.tokens, pruning.heads))):
        run(model, tokens, prompt=2)
    steps = [kept[i : i + 6] for i in range(6, len(kept), 6)]
    assert len(steps) == LENGTH - 2
    for total, step in enumerate(steps, 3):
        for which, shares in ((0, (0.8, 0.6, 0.3, 0.3, 0.3)), (1, (1, 1, 1, 0.8125, 0.8125))):
            alive = [layer[which] for layer in step]
            size = total if which == 0 else 8
            assert [int(a[0].sum()) for a in alive[:5]] == [math.ceil(share * size) for share in shares]
            assert all(bool((before | ~after).all()) for before, after in itertools.pairwise(alive))


def test_top_keeps_the_last_and_the_greatest_of_those_alive():
    mass = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3, 2]])
    alive = torch.tensor([[False, True, True, True, True, True, True, True]])
    assert top(mass, alive, ((0.5, 0.5),), 0.5, 0.5)[0].nonzero()[:, 0].tolist() == [1, 2, 6, 7]
    assert top(mass, alive, ((0.5, 0.5),), 0.5)[0].nonzero()[:, 0].tolist() == [1, 2, 3, 4]
    assert torch.equal(top(mass, alive, ((0.5, 0.5),), 0.4), alive)


def test_quantize_cuts_the_low_bits_off():
    x = torch.tensor([[[127.0, -1, 37, -128 + 1]]])
    assert torch.equal(quantize(x, 8), x)
    assert torch.equal(quantize(x, 8, 4), torch.tensor([[[112.0, -16, 32, -128]]]))
    noise = torch.randn(3, 5, 7)
    step = noise.abs().amax((1, 2), keepdim=True) / 127
    assert bool(((quantize(noise, 8) - noise).abs() <= step * 0.501).all())


def test_another_text_starts_from_nothing():
    model, one, two = sharp(), some_tokens(2, LENGTH), some_tokens(2, LENGTH + 9)[:, 9:]
    with SHARP.apply(model):
        alone = run(model, two)
    with SHARP.apply(model):
        run(model, one)
        assert torch.equal(run(model, two), alone)
