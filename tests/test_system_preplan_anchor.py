"""Preplan and anchor: metrics by loops over the model's weights, and credit by hand."""

import pytest
import torch

from saccade.core.errors import SpecError
from saccade.core.stats import Rows
from saccade.hosts.handles import watch
from saccade.study.hosted_laws import small_model, some_tokens
from saccade.study.laws import check
from saccade.systems.llm.preplan_anchor import PreplanAnchor

torch.set_num_threads(1)


@torch.no_grad()
def test_the_metrics_are_those_of_loops_over_the_weights():
    model, tokens, n = small_model(), some_tokens(2, 30), 30
    system = PreplanAnchor(window=4, near=3, far=9, share=0.25)
    with watch(model, Rows(range(n))) as dense, system.apply(model) as watching:
        model(tokens)
    waad, fai = system.rhythm(watching)
    w = torch.cat([dense[layer]["rows"] for layer in (0, 1)], 1)  # [2, 8 heads, n, n]
    span = [sum(float(w[b, h, t, k]) * (t - k) for b in range(2) for t in range(n) for k in range(t)) for h in range(8)]
    order = sorted(range(8), key=span.__getitem__)
    local, far = order[:2], order[-2:]
    for b in range(2):
        for t in range(n):
            wanted = sum(float(w[b, h, t, k]) * min(t - k, 4) for h in local for k in range(t + 1)) / 2
            assert abs(float(waad[b, t]) - wanted) < 1e-4
            later = range(t + 3, min(n - 1, t + 9) + 1)
            wanted = sum(float(w[b, h, i, t]) for h in far for i in later) / 2 / max(1, len(later))
            assert abs(float(fai[b, t]) - wanted) < 1e-5
    assert waad.std() > 0.05 and fai.max() > 0.05


def test_credit():
    system = PreplanAnchor(top=0.34, amplify=2.0)  # 2 of 6
    waad = torch.tensor([[0.0, 5.0, 5.0, 0.0, 0.5, 0.0]])  # changes most at 0 and 2
    fai = torch.tensor([[0.0, 0.0, 0.9, 0.0, 0.0, 0.8]])  # anchors 2 and 5
    assert system.credit(waad, fai, "uniform").tolist() == [[1] * 6]
    assert system.credit(waad, fai, "preplan").tolist() == [[2, 1, 2, 1, 1, 1]]
    assert system.credit(waad, fai, "anchor").tolist() == [[1, 1, 2, 1, 1, 2]]
    # 5 is no preplan token: half of what it gets goes to the preplan token before it, 2, which is an anchor too
    assert system.credit(waad, fai, "coupled").tolist() == [[2, 1, 2.5, 1, 1, 1.5]]
    alone = torch.tensor([[0.9, 0.8, 0.0, 0.0, 0.0, 0.0]])  # 0 is both, 1 hands its half to 0
    assert system.credit(waad, alone, "coupled").tolist() == [[2.5, 1.5, 2, 1, 1, 1]]
    before = torch.tensor([[0.0, 0.0, 0.0, 9.0, 0.0, 9.0]])  # changes most at 2 and 3
    assert system.credit(before, alone, "coupled").tolist()[0][:2] == [2, 2]  # no preplan token before them


def test_preplan_tokens_and_anchors_of_a_text():
    """The last token changes to nothing: that it differs from the first counts for nothing."""
    preplan, anchor = PreplanAnchor(top=0.2).chosen(
        torch.tensor([[0.0, 0.0, 3.0, 3.0, 9.0]]), torch.tensor([[0.0, 0.0, 2.0, 0.0, 1.0]])
    )
    assert preplan.tolist() == [[0, 0, 0, 1, 0]] and anchor.tolist() == [[0, 0, 1, 0, 0]]


def test_what_it_refuses():
    with pytest.raises(SpecError, match="near"):
        PreplanAnchor(near=9, far=3)
    with pytest.raises(SpecError, match="coupled"):
        PreplanAnchor().credit(torch.zeros(1, 4), torch.zeros(1, 4), "both")


def test_its_laws():
    assert not [r for r in check(PreplanAnchor) if r.status == "failed"]
