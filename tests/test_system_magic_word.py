"""Magic words: greedy search against loops, the bound against its formula and against control in the worst places."""

import math

import pytest
import torch

from saccade.core.errors import SpecError
from saccade.hosts.handles import listen
from saccade.study.hosted_laws import small_model, some_tokens
from saccade.study.laws import check
from saccade.systems.theory._control import attention_of, bound, orthogonal, outputs, tightness
from saccade.systems.theory.magic_word import MagicWord

torch.set_num_threads(1)


@torch.no_grad()
def by_hand(model, x, y, longest, among):
    prompt = []
    for _ in range(longest + 1):
        if int(model(torch.tensor([[x[0], *prompt, *x[1:]]])).logits[0, -1].argmax()) == y:
            return prompt
        losses = []
        for v in range(among):
            logits = model(torch.tensor([[x[0], v, *prompt, *x[1:]]])).logits[0, -1]
            losses.append(-float(logits.log_softmax(-1)[y]))
        prompt = [losses.index(min(losses)), *prompt]
    return None


def test_the_search_is_that_of_loops():
    model, x = small_model(), some_tokens(1, 5)[0]
    with torch.no_grad():
        ranked = model(x[None]).logits[0, -1].argsort(descending=True).tolist()
    found = []
    with MagicWord(2, 24).apply(model) as search:
        for y in ranked[:5]:
            found.append(search(x, y))
            assert found[-1] == by_hand(model, x.tolist(), y, 2, 24)
    assert found[0] == [] and {None, 0, 2} <= {None if u is None else len(u) for u in found}


@torch.no_grad()
def head(seed=0):
    source = torch.Generator().manual_seed(seed)
    return torch.randn(5, 12, generator=source), *(0.4 * torch.randn(3, 12, 6, generator=source)).unbind(0)


@torch.no_grad()
def test_the_bound_is_the_formula_and_no_control_exceeds_it():
    x, wq, wk, wv = head()
    sq, sk, sv = (float(torch.linalg.svdvals(w)[0]) for w in (wq, wk, wv))
    size, k = 1.5, 3
    t = k * math.exp(sq * sk * size * max(float(row.norm()) for row in x) / math.sqrt(6))
    for i, found in enumerate(bound(x, k, size, wq, wk, wv).tolist()):
        g = sum(math.exp(float((x[i] @ wq) @ (x[j] @ wk)) / math.sqrt(6)) for j in range(5))
        assert abs(found - size * sv * t / (g + t)) < 1e-5
    for seed in range(50):
        u = torch.randn(k, 12, generator=torch.Generator().manual_seed(seed))
        u = size * u / u.norm(dim=-1, keepdim=True)
        assert (orthogonal(x, u, wq, wk, wv) <= bound(x, k, size, wq, wk, wv)).all()


@torch.no_grad()
def test_where_the_bound_is_met():
    """One token whose query and the control are along the greatest directions, whose value is orthogonal to its own."""
    x, u = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    eye, swap = torch.eye(2), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    score = 1 / math.sqrt(2)
    wanted = math.exp(score) / (math.exp(0) + math.exp(score))  # x looks at u with score 1, at itself with 0
    assert abs(float(orthogonal(x, u, eye, swap, eye)) - wanted) < 1e-6
    assert abs(float(bound(x, 1, 1.0, eye, swap, eye)) - wanted) < 1e-6


def test_gradients_find_more_than_chance_and_stay_below():
    x, wq, wk, wv = head(1)
    size = float(x.norm(dim=-1).max())
    drawn = []
    for seed in range(20):
        u = torch.randn(2, 12, generator=torch.Generator().manual_seed(seed))
        u = size * u / u.norm(dim=-1, keepdim=True)
        drawn.append((orthogonal(x, u, wq, wk, wv) / bound(x, 2, size, wq, wk, wv)).sum())
    found = tightness(x, wq, wk, wv, control=2)
    assert found.sum() > max(drawn) and found.max() <= 1


@torch.no_grad()
def test_heads_are_the_model_s():
    """Values of one token alone are what a head puts out there."""
    model, tokens, calls = small_model(), some_tokens(1, 6), []
    with listen(model, calls.append):
        model(tokens)
    for i, (x, _, _, wv) in enumerate(attention_of(model, tokens[0])):
        layer, at = divmod(i, 4)
        torch.testing.assert_close(x @ wv, calls[layer].v[0, at // 2], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            outputs(x[:1], x[:0], *[wv] * 3)[0], calls[layer].out[0, at, 0], rtol=1e-4, atol=1e-4
        )


def test_what_it_refuses():
    with pytest.raises(SpecError, match="longest"):
        MagicWord(longest=-1)


def test_its_laws():
    assert not [r for r in check(MagicWord) if r.status == "failed"]
