"""Attention head masking: the mask against dense eager weights, scores and FPR95 against closed forms."""

from itertools import islice

import pytest
import torch

from saccade.core.errors import SpecError
from saccade.study.hosted_laws import small_model, some_tokens
from saccade.study.laws import check
from saccade.systems.explain._classifier import bert
from saccade.systems.explain._outliers import fpr95, half_replaced, mahalanobis, nearest
from saccade.systems.explain.ahm import AHM, batches, choose
from saccade.worlds.documents import SIZES
from saccade.worlds.grammar import words

torch.set_num_threads(1)


def test_check():
    results = check(AHM)
    assert [result.status for result in results] == ["passed"] * len(results)


@torch.no_grad()
def test_masked_heads_put_out_zeros():
    """As if their columns of the output projection were zero."""
    model, tokens, heads = small_model(), some_tokens(), [(0, 1), (1, 0), (1, 3)]
    with AHM(heads).apply(model):
        found = model(tokens, use_cache=False).logits
    for layer, head in heads:
        model.model.layers[layer].self_attn.o_proj.weight[:, head * 8 : head * 8 + 8] = 0
    assert torch.allclose(found, model(tokens, use_cache=False).logits, atol=1e-4 * float(found.abs().max()))
    with pytest.raises(SpecError):
        AHM([(7, 0)]).apply(model)


def test_fpr95():
    inside = torch.arange(100.0)
    assert fpr95(inside, inside) == 0.95
    assert fpr95(inside, torch.tensor([5.0, 4.9, -1.0, 200.0])) == 0.5
    assert fpr95(inside, inside - 1000) == 0


def test_mahalanobis_in_closed_form():
    torch.manual_seed(0)
    labels = torch.arange(4000) % 2
    states = torch.randn(4000, 2) * torch.tensor([3.0, 0.5]) + labels[:, None] * torch.tensor([10.0, 0.0])
    score = mahalanobis(states, labels)
    found = score(torch.tensor([[10.0, 0.0], [13.0, 0.0], [0.0, 1.0], [5.0, 0.0]]))
    assert torch.allclose(found, -torch.tensor([0.0, 1.0, 4.0, 25 / 9]).double(), atol=0.3)


def test_nearest_by_sorting():
    torch.manual_seed(0)
    known, x = torch.randn(30, 5).double(), torch.randn(4, 5).double()
    unit = [v / v.norm() for v in known]
    for row, score in zip(x, nearest(known, 3)(x), strict=True):
        assert -score.item() == pytest.approx(sorted(float((row / row.norm() - v).norm()) for v in unit)[2], abs=1e-6)


@torch.no_grad()
def test_half_of_the_words_are_replaced():
    texts = list(islice(batches(1), 8))
    vocabulary = torch.tensor([3, 5, 7])
    replaced = half_replaced(texts, vocabulary)
    shares = []
    for (tokens, labels), (others, same) in zip(texts, replaced, strict=True):
        changed = tokens != others
        assert torch.equal(labels, same) and torch.isin(others[changed], vocabulary).all()
        assert not others[tokens == 0].any()
        shares.append(changed[tokens != 0].float().mean())
    assert 0.45 < float(torch.stack(shares).mean()) < 0.55


@torch.no_grad()
def test_the_best_of_all_masks_is_chosen():
    """Every head's columns of the output projection set to zero, one after another."""
    torch.manual_seed(0)
    model = bert(len(words(SIZES)), 4, 2, initializer_range=0.3).eval().model
    data = list(islice(batches(1), 2))
    train, held = data[:1], data[1:]
    replaced = half_replaced(held, train[0][0].unique()[1:])
    told = {}
    for layer, head in [(layer, head) for layer in range(2) for head in range(4)]:
        weight = model.bert.encoder.layer[layer].attention.output.dense.weight
        kept = weight.clone()
        weight[:, head * 12 : head * 12 + 12] = 0
        states = [
            model(x, attention_mask=(x != 0).long(), output_hidden_states=True).hidden_states[-1][:, 0]
            for x in (train[0][0], held[0][0], replaced[0][0])
        ]
        weight.copy_(kept)
        score = mahalanobis(states[0], train[0][1])
        told[layer, head] = fpr95(score(states[1]), score(states[2]))
    assert len(set(told.values())) > 2
    assert choose(model, train, held, most=1) == [min(told, key=told.__getitem__)]
