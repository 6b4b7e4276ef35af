"""HyperAttention: against the weights it stands for, written out densely, and inside a model."""

import math

import pytest
import torch

from saccade import SpecError
from saccade.study.hosted_laws import small_model, some_tokens
from saccade.systems.sparse.hyperattention import Hyper, HyperAttention

torch.set_num_threads(1)


def inputs(n, heads=2, width=6):
    source = torch.Generator().manual_seed(0)
    return torch.randn(3, 1, heads, n, width, generator=source, dtype=torch.float64).unbind(0)


def mechanism(planes=4, **sizes):
    source = torch.Generator().manual_seed(7)
    return Hyper(torch.randn(6, planes, generator=source), source=source, **sizes)


def counted(q, k, hyper, drawn):
    """How often each key counts for each query ``[N, M]`` of one head, in loops, from the paper's words."""

    def bucket(x):
        number = sum(2**i for i in range(hyper.planes.shape[1]) if x @ hyper.planes[:, i].double() > 0)
        reflected = [0]  # the code's table, built by reflection
        for i in range(hyper.planes.shape[1]):
            reflected += [2**i + r for r in reversed(reflected)]
        return reflected[number]

    n = len(q)
    order, key_order = (sorted(range(n), key=lambda i, x=x: bucket(x[i])) for x in (q, k))
    times = torch.zeros(n, n, dtype=torch.float64)
    for place, i in enumerate(order):
        own = place // hyper.block
        for j in key_order[own * hyper.block : (own + 1) * hyper.block]:
            times[i, j] = 1
        for d in drawn:
            if d // hyper.block != own:
                times[i, key_order[d]] += n / len(drawn)
    return times


@pytest.mark.parametrize("n", [32, 29])
def test_equals_the_weights_it_stands_for(n):
    q, k, v = inputs(n)
    hyper = mechanism(block=8, samples=5, shortest=1)
    state = hyper.source.get_state()
    out, lse = hyper(q, k, v)
    drawn = torch.randint(n, (1, 2, 5), generator=hyper.source.set_state(state))[0].tolist()
    for h in range(2):
        score = q[0, h] @ k[0, h].T / math.sqrt(6)
        raised = counted(q[0, h], k[0, h], hyper, drawn[h]) * score.exp()
        torch.testing.assert_close(out[0, h], raised @ v[0, h] / raised.sum(-1, keepdim=True))
        torch.testing.assert_close(lse[0, h], raised.sum(-1).log())


@pytest.mark.parametrize("n", [64, 37])
def test_causal_is_exact_where_every_key_is_in_the_block(n):
    q, k, v = inputs(n)
    out, lse = mechanism(block=n, samples=9, shortest=8)(q, k, v, causal=True)
    score = (q @ k.mT / math.sqrt(6)).masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(out, score.softmax(-1) @ v)
    torch.testing.assert_close(lse, score.logsumexp(-1))


def test_no_later_value_is_read():
    q, k, v = inputs(64)
    changed = v.clone()
    changed[:, :, 40:] += 1
    one, other = (mechanism(block=4, samples=4, shortest=8)(q, k, x, causal=True)[0] for x in (v, changed))
    assert torch.equal(one[:, :, :40], other[:, :, :40])
    assert not torch.equal(one[:, :, 40:], other[:, :, 40:])


def test_samples_are_unbiased():
    """The sums of exponentials are right on average, whatever was drawn."""
    q, k, v = inputs(64, heads=1)
    hyper = mechanism(block=16, samples=16, shortest=1)
    total = torch.stack([hyper(q, k, v)[1].exp() for _ in range(150)]).mean(0)
    wanted = (q @ k.mT / math.sqrt(6)).exp().sum(-1)
    assert abs((total / wanted).mean() - 1) < 0.03  # without the factor or with double counting: 0.2 and more
    torch.testing.assert_close(total, wanted, rtol=0.15, atol=0)


def test_like_vectors_share_a_block():
    _, k, v = inputs(128)
    found = mechanism(planes=5, block=16, samples=0, shortest=1)(50 * k.roll(3, 2), k, v)[0]
    right = torch.isclose(found, v.roll(3, 2), atol=0.2).all(-1)
    best = (k @ k.mT).argmax(-1) == torch.arange(128)  # a longer key may win by itself
    assert right[best.roll(3, 2)].float().mean() > 0.9


def test_gradients_flow():
    q, k, v = (x.requires_grad_() for x in inputs(24))

    def run(q, k, v):
        return mechanism(block=4, samples=6, shortest=8)(q, k, v, causal=True)

    assert torch.autograd.gradcheck(run, (q, k, v), fast_mode=True)


def test_in_a_model():
    model, tokens = small_model(), some_tokens()
    with torch.no_grad():
        plain = model(tokens, use_cache=False).logits
        with HyperAttention(block=4, samples=4, shortest=16).apply(model):
            changed = model(tokens, use_cache=False).logits
            again = model.generate(tokens, max_new_tokens=2, do_sample=False, eos_token_id=None)
        with HyperAttention(block=64, samples=4, shortest=16).apply(model):
            whole = model(tokens, use_cache=False).logits
        after = model(tokens, use_cache=False).logits
    assert again.shape[1] == tokens.shape[1] + 2
    assert torch.equal(plain, after)
    assert (changed - plain).abs().max() > 0.1
    torch.testing.assert_close(whole, plain, rtol=1e-3, atol=1e-3)


def test_refuses_empty_blocks():
    with pytest.raises(SpecError, match="block"):
        HyperAttention(block=0).make(8)
