"""ReLA against the official function written out in numpy, and what zeros mean."""

import numpy as np
import pytest
import torch

from saccade.nn import EncoderDecoder
from saccade.nn.backbones import Place
from saccade.nn.init import initialise
from saccade.systems.score import _translation as translation
from saccade.systems.score import rela
from saccade.systems.score.rela import ReLA

torch.set_num_threads(1)
WIDTH, HEADS, N = 32, 4, 19


def made(causal):
    layer = Place(WIDTH, HEADS, 0, 1, None, None).filled(ReLA(causal).layer)
    initialise(layer, "xavier", 3)
    with torch.no_grad():
        layer.norm.scale.copy_(torch.linspace(0.5, 1.5, WIDTH))
        layer.norm.gate.mul_(5)
    return layer.double(), torch.randn(2, N, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def official(layer, x, causal):
    """dot_attention of modules/rela.py, step by step: masked logits become zeros, then ReLU, norm over all heads."""
    p = {name: value.detach().numpy() for name, value in layer.named_parameters()}
    x = x.numpy()
    q, k, v = (x @ p[f"{name}.weight"].T for name in "qkv")
    q, k, v = (a.reshape(2, N, HEADS, -1).transpose(0, 2, 1, 3) for a in (q, k, v))
    logits = q * (WIDTH // HEADS) ** -0.5 @ k.transpose(0, 1, 3, 2)
    if causal:
        logits = logits * np.tril(np.ones((N, N)))
    o = (np.maximum(logits, 0) @ v).transpose(0, 2, 1, 3).reshape(2, N, WIDTH)
    normed = p["norm.scale"] * o / np.sqrt((o**2).mean(-1, keepdims=True) + 1e-8)
    return normed / (1 + np.exp(-p["norm.gate"] * o)) @ p["out.weight"].T


@pytest.mark.parametrize("causal", [True, False])
def test_rela_is_the_official_function(causal):
    layer, x = made(causal)
    np.testing.assert_allclose(layer(x).detach().numpy(), official(layer, x, causal), rtol=1e-10, atol=1e-12)


def test_a_query_that_likes_nothing_reads_nothing():
    layer, x = made(causal=True)
    with torch.no_grad():
        layer.k.weight.copy_(-layer.q.weight)  # the first token sees itself alone, at minus its own square
        out = layer(x)
    assert torch.equal(out[:, 0], torch.zeros(2, WIDTH, dtype=torch.float64))
    assert out[:, 1:].abs().max() > 0


def test_the_gate_starts_as_the_official_one():
    gate = torch.cat([rela.GatedNorm(500, seed).gate.detach() for seed in range(8)])
    bound = (3 / 500) ** 0.5
    assert gate.abs().max() <= bound
    assert abs(float(gate.std()) - bound / 3**0.5) < 0.02 * bound  # a uniform distribution's deviation
    assert torch.equal(rela.GatedNorm(9, 3).gate, rela.GatedNorm(9, 3).gate)


def test_what_the_claim_counts_in_cross_attention():
    """A cross-attention whose scores are all negative is empty; one of softmax has no zero; a perfect one no error."""
    torch.manual_seed(0)
    pairs = next(translation.pairs(0))
    vocabulary = translation.vocabulary()
    plain = EncoderDecoder(vocabulary, 32, 1, 2)
    zeros, empty, wrong = rela._look(plain, pairs)
    assert (zeros, empty) == (0, 0)
    assert 0.5 < wrong <= 1  # it has learned nothing
    ours = EncoderDecoder(vocabulary, 32, 1, 2, cross=ReLA(causal=False))
    zeros, empty, _ = rela._look(ours, pairs)
    assert 0.3 < zeros < 0.7  # scores of either sign, equally often
    with torch.no_grad():
        ours.decoder.blocks[0].cross.k.weight.zero_()
    assert rela._look(ours, pairs)[:2] == (1, 1)
