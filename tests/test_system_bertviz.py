"""BertViz's three views: what the claim compares is itself compared, and would notice a difference."""

import pytest
import torch

from saccade import catalog, edits
from saccade.hosts.handles import edit
from saccade.study import laws
from saccade.study.hosted_laws import small_model, some_tokens
from saccade.systems.explain import bertviz
from saccade.systems.explain._random_models import encoder_decoder
from saccade.systems.explain.bertviz import BertViz, pooled, unpacked, whole_row

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr(bertviz, "ROWS", (3, 40))


def test_pooled_is_the_mean_over_queries_of_the_sum_over_keys():
    w = torch.rand(2, 7, 5)
    found = pooled(w, 3)
    assert found.shape == (2, 3, 2)
    assert float(found[1, 0, 1]) == pytest.approx(float(w[1, :3, 3:].sum() / 3))
    assert float(found[0, 2, 0]) == pytest.approx(float(w[0, 6, :3].sum()))


def test_all_views_are_those_of_the_weights_and_a_changed_head_is_noticed():
    model, inputs = small_model(), {"input_ids": some_tokens(1, 70)}
    same = BertViz().apart(model, inputs, "attentions")
    assert max(same.values()) < 1e-5
    with edit(model, edits.Scale(0.5, keys=slice(0, 30)), heads=1):
        views = BertViz().views(model, inputs)
    monkey = BertViz()
    monkey.views = lambda model, inputs: views
    changed = monkey.apart(model, inputs, "attentions")
    assert min(changed[name] for name in ("model", "head", "neuron")) > 1e-3


def test_cross_attention_of_other_lengths():
    ids = some_tokens(1, 90)
    found = BertViz().apart(encoder_decoder(), {"input_ids": ids, "decoder_input_ids": ids[:, :50]}, "cross_attentions")
    assert max(found.values()) < 1e-5


def test_a_long_row_is_the_last_of_the_short_ones():
    q, k = torch.randn(2, 9, 4).unbind(0)
    row = whole_row(q, k, 5)
    wanted = (q[5] @ k[:6].T / 2).softmax(0)
    torch.testing.assert_close(row[:6], wanted)
    assert not row[6:].any()


def test_an_answer_is_a_header_and_numbers():
    session = BertViz().views(small_model(), {"input_ids": some_tokens(1, 20)})
    header, row = unpacked(session.answer("row?side=0&layer=1&head=2&row=7"))
    assert header["shape"] == [20] and float(row.sum()) == pytest.approx(1)


def test_no_law_fails():
    assert not [r for r in laws.check(catalog.find("bertviz")) if r.status == "failed"]
