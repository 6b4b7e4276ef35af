"""Attention head masking: the mask against dense eager weights, scores and FPR95 against closed forms."""

from itertools import islice

import pytest
import torch

from saccade.core.errors import SpecError
from saccade.study.hosted_laws import small_model, some_tokens
from saccade.study.laws import check
from saccade.systems.explain._outliers import fpr95, mahalanobis, nearest
from saccade.systems.explain.ahm import (
    AHM,
    KNOWN,
    NOUNS,
    SIZES,
    bert,
    choose,
    distances,
    documents,
    features,
)
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


def test_documents_are_about_their_topic():
    names = list(words(SIZES))
    for known in (True, False):
        tokens, labels = next(documents(0, known))
        assert bool((labels < KNOWN).all()) == known
        nouns = [
            (int(names[token].removeprefix("noun").removesuffix(".pl")) // NOUNS, label)
            for row, label in zip(tokens.tolist(), labels.tolist(), strict=True)
            for token in row
            if names[token].startswith("noun")
        ]
        share = sum(topic == label for topic, label in nouns) / len(nouns)
        assert 0.75 < share < 0.95


def test_the_best_of_all_masks_is_chosen():
    torch.manual_seed(0)
    model = bert().eval()
    data = list(islice(documents(1), 2))
    heads = choose(model, data[:1], data[1:], most=1)
    assert len(heads) == 1 and heads == choose(model, data[:1], data[1:], most=1)
    plain, masked = (distances(model, data[:1], mask)["mahalanobis"](data[1:]) for mask in ((), heads))
    assert not torch.allclose(plain, masked)
    again = mahalanobis(*features(model, data[:1], heads)[::2])(features(model, data[1:], heads)[0])
    assert torch.equal(again, masked)
