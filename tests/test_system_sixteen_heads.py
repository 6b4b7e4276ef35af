"""Importance against a mask's own gradient, and heads that are gone against heads that are silent."""

import pytest
import torch
import torch.nn.functional as F

from saccade import SpecError, Unsupported, catalog
from saccade.study import laws
from saccade.study.hosted_laws import small_model, some_tokens
from saccade.systems.explain._heads import heads
from saccade.systems.explain._removed import removed
from saccade.systems.explain.sixteen_heads import SixteenHeads, importance, ranked, right, spared

torch.set_num_threads(1)


def test_importance_is_the_gradient_of_a_mask_of_every_token():
    model, tokens = small_model().double(), some_tokens(3, 20)
    mask = torch.ones(2, 3, 20, 4, dtype=torch.float64, requires_grad=True)
    with heads(model, lambda layer, z: z * mask[layer][..., None]):
        logits = model(tokens).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    wanted = mask.grad.abs().sum((1, 2))
    found = importance(model, [tokens])
    torch.testing.assert_close(found, wanted / wanted.norm(dim=1, keepdim=True))
    assert ranked(found)[0] == divmod(int(found.argmin()), 4)


@pytest.mark.parametrize("gone", [[(0, 0)], [(0, 1), (0, 3)], [(0, 0), (0, 1), (1, 2), (1, 1), (1, 3)]])
def test_a_model_without_heads_says_what_it_says_with_them_silent(gone):
    """Also where two key heads are left with unequally many query heads, and where one of them goes."""
    model, tokens = small_model().double(), some_tokens(2, 20)
    smaller = removed(model, gone)
    with torch.no_grad():
        before = model(tokens).logits
        with SixteenHeads(gone).apply(model):
            silent = model(tokens).logits
            said = model.generate(tokens, max_new_tokens=4, do_sample=False, eos_token_id=None)
        found = smaller(tokens).logits
        assert torch.equal(model(tokens).logits, before)
    torch.testing.assert_close(found, silent)
    assert (silent - before).abs().max() > 0.1
    assert torch.equal(smaller.generate(tokens, max_new_tokens=4, do_sample=False, eos_token_id=None), said)
    count = sum(p.numel() for p in model.model.layers.parameters()) - sum(
        p.numel() for p in smaller.model.layers.parameters()
    )
    assert count >= len(gone) * 2 * 8 * 32 - 2 * 4 * 8 * 32  # q and o of each; keys may be copied


def test_one_head_of_each_layer_stays():
    order = [(0, 1), (0, 0), (1, 1), (0, 2), (1, 0), (1, 2)]
    assert spared(order, 0.5) == [(0, 1), (0, 0), (1, 1)]
    assert spared(order, 1.0) == [(0, 1), (0, 0), (1, 1), (1, 0)]


def test_the_score_is_the_share_of_right_next_tokens():
    model, tokens = small_model(), some_tokens(5, 16)
    said = model(tokens).logits.argmax(-1)
    wanted = [sum(int(said[b, i]) == int(tokens[b, i + 1]) for i in range(15)) / 15 for b in range(5)]
    assert right(model, tokens).tolist() == pytest.approx(wanted)


def test_what_it_refuses():
    model = small_model()
    with pytest.raises(SpecError, match=r"got \[\(1, 9\)\]"):
        SixteenHeads([(0, 0), (1, 9)]).apply(model)
    with pytest.raises(SpecError, match="would be left"):
        removed(model, [(0, h) for h in range(4)])
    with pytest.raises(Unsupported):
        removed(torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2, batch_first=True), 1), [(0, 0)])
    with pytest.raises(SpecError, match="at least one batch"):
        importance(model, [])


def test_no_law_fails():
    assert not [r for r in laws.check(catalog.find("sixteen-heads")) if r.status == "failed"]
