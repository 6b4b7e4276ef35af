"""The laws can fail: break each part on purpose, in the way it is made fast, and the comparison must notice."""

from __future__ import annotations

import pytest
import torch

from dense import agree
from saccade import Attention, masks, selectors, stats
from saccade.core import edits as edits_module
from saccade.core import layout, normalizers, program, scores, strips
from saccade.core.masks import EMPTY, FULL, PARTIAL
from test_engine import EDITS, MASKS, NORMALIZERS, SCORES, STATS
from test_masks import check_never_wrong

SHAPE = (2, 4, 2, 70, 70)


def must_fail(spec: Attention, watched=()) -> None:
    with pytest.raises(AssertionError):
        agree(spec, SHAPE, watched)


@pytest.mark.parametrize("name", sorted(set(MASKS) - {"function", "nothing"}))
def test_a_mask_that_calls_a_block_empty_or_full_wrongly(name):
    mask = masks.as_mask(MASKS[name](2, 4, 70, 70))
    right = mask.blocks
    check_never_wrong(mask, 2, 4, 70, 70, 16, 16)
    codes = right(masks.Span.grid(70, 70, 16, 16, batch=2, heads=4))
    swaps = [(FULL, EMPTY)] if (codes == FULL).any() else []
    swaps += [(PARTIAL, FULL), (PARTIAL, EMPTY)] if (codes == PARTIAL).any() else []
    for old, new in swaps:
        mask.blocks = lambda span, o=old, w=new: torch.where(right(span) == o, w, right(span)).to(torch.int8)
        with pytest.raises(AssertionError):
            check_never_wrong(mask, 2, 4, 70, 70, 16, 16)


@pytest.mark.parametrize("name", sorted(set(NORMALIZERS)))
def test_a_normalizer_whose_fast_twin_is_off(name, monkeypatch):
    normalizer = NORMALIZERS[name](4)
    spec = Attention(mask=masks.Causal(), normalizer=normalizer)
    agree(spec, SHAPE, tolerance=1e-7)
    if isinstance(normalizer, normalizers.Softmax):
        right = normalizer.from_scores
        normalizer.from_scores = lambda *a, **k: (right(*a, **k)[0].mul_(1.001), right(*a, **k)[1])
    else:
        right = normalizer.inplace
        normalizer.inplace = lambda s, at: right(s, at) * 1.001
    must_fail(spec)


@pytest.mark.parametrize("name", sorted(NORMALIZERS))
def test_a_normalizer_whose_closed_gradient_is_off(name, monkeypatch):
    normalizer = NORMALIZERS[name](4)
    spec = Attention(mask=masks.Causal(), normalizer=normalizer)
    if not program.Program(spec).closed_backward:
        pytest.skip("autograd gives its gradient")
    right = type(normalizer).backward_inplace
    monkeypatch.setattr(type(normalizer), "backward_inplace", lambda s, w, g, at: right(s, w, g, at) * 1.001)
    must_fail(spec)


@pytest.mark.parametrize("name", sorted(set(SCORES) - {"dot", "scale", "bilinear", "additive"}))
def test_a_score_whose_fast_twin_is_off(name, monkeypatch):
    spec = Attention(score=SCORES[name](2, 4, 70, 70), mask=masks.Causal())
    last = spec.modifiers[-1]
    right = last.inplace
    last.inplace = lambda s, at: right(s, at) * 1.01
    must_fail(spec)


@pytest.mark.parametrize("name", ["scale", "bilinear"])
def test_a_form_whose_scale_is_off(name, monkeypatch):
    spec = Attention(score=SCORES[name](2, 4, 70, 70), mask=masks.Causal())
    from saccade.core import band

    right = band._product
    monkeypatch.setattr(band, "_product", lambda a, b, out, scale=1.0: right(a, b, out, scale * 1.01))
    must_fail(spec)


@pytest.mark.parametrize("name", sorted(set(EDITS) - {"none"}))
def test_an_edit_whose_fast_twin_is_off(name):
    spec = Attention(mask=masks.Causal(), edits=EDITS[name](2, 4, 70, 70))
    first = spec.changes[0]
    right = first.inplace
    first.inplace = lambda w, at, visible: right(w, at, visible) * 1.01
    # An edit may be followed by a renormalization, which a factor would pass: watch between the two.
    must_fail(Attention(mask=masks.Causal(), edits=[first]))


def test_dropout_that_draws_differently_in_the_band(monkeypatch):
    drop = edits_module.Dropout(0.4)
    right = drop.dropped
    drop.inplace = lambda w, at, visible: w.masked_fill_(right(at).roll(1, -1), 0).mul_(1 / 0.6)
    must_fail(Attention(edits=[drop]))


@pytest.mark.parametrize("name", sorted(STATS))
def test_a_stat_that_is_put_in_the_wrong_place(name, monkeypatch):
    stat = STATS[name](70, 70)
    spec = Attention(mask=MASKS["window and sinks"](2, 4, 70, 70))
    agree(spec, SHAPE, [stat])
    put = {"rows": "put_rows", "keys": "add_columns", "blocks": "put_blocks", "chosen": "put_chosen"}[stat.axis]
    right = getattr(strips.Strip, put)
    wrong = lambda self, whole, piece, *more: right(self, whole, piece.roll(1, 2), *more)  # noqa: E731
    if stat.axis == "rows":  # the output is written by the same means: spoil the stat alone
        seen = stat.see
        stat.see = lambda tile: tuple(x.roll(1, 2) for x in seen(tile)) if not torch.is_grad_enabled() else seen(tile)
    else:
        monkeypatch.setattr(strips.Strip, put, wrong)
    must_fail(spec, [stat])


def test_a_selection_that_drops_a_block(monkeypatch):
    spec = Attention(mask=masks.Causal(), select=selectors.TopKBlocks(3, 8))
    agree(spec, SHAPE, [stats.KeyMass()])
    right = layout._Cut.selected
    monkeypatch.setattr(
        layout._Cut,
        "selected",
        lambda self, s: right(self, selectors.Selection(s.blocks.clone().index_fill_(-1, torch.tensor([1]), -1), 8, 8)),
    )
    must_fail(spec)


def test_an_executor_that_reads_what_it_never_wrote(monkeypatch):
    """The poison works: a strip that leaves part of its tile untouched gives NaN, not a lucky zero."""
    from saccade.core import band

    right = band._product

    def lazy(a, b, out, scale=1.0):
        half = out.shape[-1] // 2
        right(a, b[..., :half], out[..., :half], scale)
        return out

    monkeypatch.setattr(band, "_product", lazy)
    must_fail(Attention())


def test_a_score_that_forgets_its_gradient():
    class Deaf(scores.Score):
        shift = True  # claims a derivative of one

        def forward(self, score, at):
            return score * 0.5

    must_fail(Attention(score=Deaf()))
