"""Heads of free rank: the usual layer as a case, the construction that is exact, the closed form of random heads."""

import math

import pytest
import torch
import torch.nn.functional as F

from saccade import SpecError
from saccade.nn.backbones import Place
from saccade.study.laws import check
from saccade.systems.theory.attention_rank import POINTS, WIDTH, AttentionRank, nearest, squared_error


def layer(rank, heads, width=WIDTH, hard=False):
    torch.manual_seed(0)
    return AttentionRank(rank, causal=False, hard=hard).layer(Place(width, heads, 0, 1, None, None)).double()


@pytest.mark.parametrize("settings", [{}, {"rank": 3, "causal": False}, {"rank": 1, "hard": True}])
def test_obeys_the_laws(settings):
    failed = [r for r in check(AttentionRank, settings) if r.status == "failed"]
    assert [r.law for r in failed] == (
        ["trains every part"] if settings.get("hard") else []
    )  # a choice has no gradient


def test_is_the_equation_and_narrow_values_are_a_case_of_it():
    heads, rank, width = 3, 2, 6
    ours, x = layer(rank, heads, width), torch.randn(2, 7, width, dtype=torch.float64)
    y = torch.randn(2, 5, width, dtype=torch.float64)
    q, k = (w.weight.view(heads, rank, width) for w in (ours.q, ours.k))
    vo = ours.out.weight.view(width, heads, width)
    score = torch.einsum("byd,hrd,hre,bxe->bhyx", y, q, k, x) / math.sqrt(rank)
    torch.testing.assert_close(ours(y, x), torch.einsum("bhyx,bxd,ehd->bye", score.softmax(-1), x, vo))
    assert sum(p.numel() for p in ours.parameters()) == 2 * heads * rank * width + heads * width**2


def test_one_head_of_full_rank_is_the_nearest_neighbour():
    x, y, target = (t.double() for t in next(nearest(0)))
    exact, soft = layer(WIDTH, 1, hard=True), layer(WIDTH, 1)
    for made in (exact, soft):
        for weight, scale in ((made.q.weight, 2000.0), (made.k.weight, 1.0), (made.out.weight, 1.0)):
            weight.data = scale * torch.eye(WIDTH, dtype=torch.float64)
    torch.testing.assert_close(exact(y, x), target)
    assert squared_error(soft, (x, y, target)) < 0.01
    assert x.shape[1] == POINTS


def test_two_random_heads_of_rank_one_agree_as_often_as_the_closed_form_says():
    """On orthogonal pairs of points, E <head i, head j> = 1/2 + 2/pi² asin(q_i . q_j) asin(k_i . k_j)."""
    source = torch.Generator().manual_seed(1)
    heads, width, many = 4, 3, 40000
    ours = layer(1, heads, width, hard=True).float()
    pairs = torch.linalg.qr(torch.randn(many, width, 2, generator=source))[0].mT
    pairs = pairs * torch.randint(0, 2, (many, 2, 1), generator=source).mul(2).sub(1)
    y = F.normalize(torch.randn(many, 1, width, generator=source), dim=-1)
    with torch.no_grad():
        q, k = (F.normalize(w.weight, dim=-1) for w in (ours.q, ours.k))
        read = ours.attend(*ours.project(y, pairs))[:, :, 0]  # [many, heads, width]
        found = torch.einsum("bhd,bgd->hg", read, read) / many
    expected = 0.5 + 2 / math.pi**2 * torch.arcsin((q @ q.T).clamp(-1, 1)) * torch.arcsin((k @ k.T).clamp(-1, 1))
    torch.testing.assert_close(found, expected, atol=4 * 0.5 / math.sqrt(many), rtol=0)


def test_refuses_no_rank():
    with pytest.raises(SpecError, match="rank"):
        AttentionRank(0)
