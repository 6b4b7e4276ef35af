"""Lookback Lens: ratios as attention maps give them, guided decoding as an uncached loop over the same draws."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TemperatureLogitsWarper, TopPLogitsWarper

from saccade import SpecError
from saccade.study.laws import check
from saccade.study.probes import Detector
from saccade.systems.llm.lookback_lens import LookbackLens

CUE = 3
ENDS = list(range(34, 40))


def llama(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=39, pad_token_id=38, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for p in model.parameters():
        p.data.mul_(15 if p.ndim > 1 else 1)
    return model


def tokens(batch, length, seed=1):
    return torch.randint(0, 38, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def by_hand(model, sequence, context, first):
    """Last logits, and ratios of every query from ``first`` on, from the model's attention maps: [B, n, layers * H]."""
    out = model(sequence, output_attentions=True, use_cache=False)
    rows = []
    for t in range(first, sequence.shape[1]):
        heads = []
        for layer in out.attentions:
            on_context = layer[:, :, t, :context].mean(-1)
            on_own = layer[:, :, t, context : t + 1].mean(-1)
            heads.append(on_context / (on_context + on_own))
        rows.append(torch.cat(heads, 1))
    return out.logits[:, -1], torch.stack(rows, 1)


def test_ratios_are_those_of_the_attention_maps_while_the_model_generates():
    model, prompt = llama(), tokens(2, 20)
    lens = LookbackLens(cue=CUE)
    with lens.apply(model) as watching:
        said = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)
    found, wanted = lens.ratios(watching), by_hand(model, said[:, :-1], 20 - CUE, 19)[1]
    assert wanted.std() > 0.1 and found.shape == wanted.shape == (2, 6, 8)
    assert (found - wanted).abs().max() < 1e-5


def guided_by_hand(system, model, prompt, detector, new, seed):
    """The same decoding without a cache: all candidates read whole, ratios from the attention maps."""
    torch.manual_seed(seed)
    said, warm, top = prompt, TemperatureLogitsWarper(system.temperature), TopPLogitsWarper(system.top_p)
    while said.shape[1] < prompt.shape[1] + new:
        chunk, ratios = said.repeat(system.candidates, 1), []
        for _ in range(min(system.window, prompt.shape[1] + new - said.shape[1])):
            logits, ratio = by_hand(model, chunk, prompt.shape[1] - system.cue, chunk.shape[1] - 1)
            ratios.append(ratio[:, 0])
            chunk = torch.cat([chunk, top(None, warm(None, logits)).softmax(-1).multinomial(1)], 1)
        scores = []
        for i in range(system.candidates):
            new_ones = chunk[i, said.shape[1] :].tolist()
            size = next((j + 1 for j, x in enumerate(new_ones) if x in ENDS), len(new_ones))
            scores.append((float(detector(torch.stack(ratios, 1)[i, :size].mean(0))), said.shape[1] + size))
        best = max(range(system.candidates), key=lambda i: scores[i][0])
        said = chunk[best : best + 1, : scores[best][1]]
        if said[0, -1] in ENDS:
            break
    return said


@pytest.mark.parametrize("seed", range(1, 7))
def test_guided_decoding_is_that_of_an_uncached_loop(seed):
    model, prompt = llama(), tokens(1, 14, seed)
    model.generation_config.eos_token_id = ENDS
    system = LookbackLens(window=4, candidates=5, temperature=1.5, top_p=0.9, cue=CUE)
    detector = Detector(torch.randn(8, generator=torch.Generator().manual_seed(seed)).double(), torch.tensor(0.0))
    wanted = guided_by_hand(system, model, prompt, detector, 10, seed)
    torch.manual_seed(seed)
    assert torch.equal(system.generate(model, prompt, detector, 10), wanted)
    torch.manual_seed(seed)
    assert not torch.equal(system.generate(model, prompt, Detector(-detector.weight, detector.bias), 10), wanted)


def test_guided_decoding_ends_with_the_text():
    model, prompt = llama(), tokens(1, 14)
    model.generation_config.eos_token_id = list(range(40))
    detector = Detector(torch.zeros(8), torch.tensor(0.0))
    assert LookbackLens(cue=CUE).generate(model, prompt, detector, 10).shape == (1, 15)


def test_what_it_refuses():
    with pytest.raises(SpecError, match="are the cue"):
        LookbackLens(cue=14).generate(llama(), tokens(1, 14), Detector(torch.zeros(8), torch.tensor(0.0)), 4)
    with pytest.raises(SpecError, match="candidates=0"):
        LookbackLens(candidates=0)


def test_its_laws():
    assert not [r for r in check(LookbackLens) if r.status == "failed"]
