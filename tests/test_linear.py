"""Kernelised attention: three forms against an independent step-by-step definition in float64, forward and gradient."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import saccade
from dense import loss, poisoned
from saccade import LinearAttention, LinearState, SpecError
from saccade.core.linear import features
from saccade.core.linear.decay import ChannelDecay, ScalarDecay
from saccade.core.linear.reference import step_by_step

FORMS = ("chunked", "parallel", "recurrent")
DECAYS = ("none", "constant", "scalar", "channel")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(batch=2, heads=2, kv_heads=2, n=70, m=None, width=4, values=3):
    m = n if m is None else m
    q, k, v = draw(batch, heads, n, width), draw(batch, kv_heads, m, width, seed=1), draw(batch, kv_heads, m, values)
    return q, F.normalize(k, dim=-1), v


def decays(kind: str, batch: int, heads: int, n: int, width: int, strength: float = 1.0) -> torch.Tensor | None:
    shape = {"none": (0,), "constant": (heads,), "scalar": (batch, heads, n), "channel": (batch, heads, n, width)}[kind]
    return None if kind == "none" else -strength * draw(*shape, seed=2).exp()


def agree(spec, q, k, v, forms=FORMS, tolerance=1e-10, **options):
    """Output, last state and every gradient of each form equal those of the definition."""
    names = [name for name, x in options.items() if isinstance(x, torch.Tensor) and x.is_floating_point()]
    leaves = [x.clone().requires_grad_() for x in (q, k, v, *(options[name] for name in names))]
    given = options | dict(zip(names, leaves[3:], strict=True))
    state = options.get("state")
    if state is not None:
        parts = [x.clone().requires_grad_() for x in (state.S, state.z) if x is not None]
        leaves += parts
        given["state"] = LinearState(*parts)
    wanted = [*leaves, *(p for p in spec.parameters() if p.requires_grad)]

    def results(out, last):
        tensors = [x for x in (out, last.S, last.z) if x is not None]
        return tensors, torch.autograd.grad(loss(tensors, 3), wanted)

    exact, exact_grads = results(*step_by_step(*leaves[:3], spec, **given))
    for form in forms:
        with poisoned():
            found, grads = results(*saccade.linear_attention(*leaves[:3], spec, form=form, return_state=True, **given))
        for want, got in zip([*exact, *exact_grads], [*found, *grads], strict=True):
            assert_close(got, want, rtol=tolerance, atol=tolerance, msg=lambda m, form=form: f"{form}: {m}")


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("way", ["plain", "normalized", "gated", "delta"])
def test_forms_agree_with_the_definition(kind, way):
    q, k, v = inputs()
    spec = LinearAttention(
        features.Elu1() if way == "normalized" else None, normalize=way == "normalized", delta=way == "delta", scale=0.5
    )
    beta = None if way == "plain" else draw(2, 2, 70, seed=4).sigmoid()
    state = LinearState(draw(2, 2, 4, 3, seed=5), draw(2, 2, 4, seed=6).exp() if way == "normalized" else None)
    agree(spec, q, k, v, log_decay=decays(kind, 2, 2, 70, 4), beta=beta, state=state)


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("delta", [False, True])
def test_a_state_begins_anew_with_each_document(kind, delta):
    q, k, v = inputs(n=131, batch=2)
    ids = torch.stack([torch.arange(131) // 40, (torch.arange(131) >= 64).long() + (torch.arange(131) >= 65)])
    options = dict(log_decay=decays(kind, 2, 2, 131, 4, 0.1), beta=draw(2, 2, 131).sigmoid())
    agree(LinearAttention(delta=delta), q, k, v, documents=ids, **options)
    bounds = torch.tensor([0, 40, 41, 131])
    packed = saccade.linear_attention(q[:1], k[:1], v[:1], LinearAttention(), documents=bounds)
    alone = [
        saccade.linear_attention(q[:1, :, a:b], k[:1, :, a:b], v[:1, :, a:b], LinearAttention())
        for a, b in itertools.pairwise(bounds.tolist())
    ]
    assert_close(packed, torch.cat(alone, 2))


@pytest.mark.parametrize("kind", ["scalar", "channel"])
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("strength", [1e-6, 1e-2, 5.0, 300.0])
def test_strong_and_weak_decay_in_float32(kind, delta, strength):
    """Beside each other too: a token that forgets all but everything, between tokens that forget all but nothing."""
    n = 200
    q, k, v = (x.float() for x in inputs(batch=1, n=n))
    log_decay = decays(kind, 1, 2, n, 4, strength)
    log_decay[:, :, ::17] *= 1e-5
    log_decay[:, :, 90:120] = -1e-3
    log_decay[:, :, 100] = -80.0
    log_decay = log_decay.float()
    beta = draw(1, 2, n).sigmoid().float()
    spec = LinearAttention(delta=delta)
    want, last = step_by_step(q, k, v, spec, log_decay=log_decay, beta=beta)
    for form in FORMS:
        out, state = saccade.linear_attention(
            q, k, v, spec, log_decay=log_decay, beta=beta, form=form, return_state=True
        )
        assert_close(out.double(), want, rtol=1e-5, atol=1e-5, msg=lambda m, form=form: f"{form}: {m}")
        assert_close(state.S.double(), last.S, rtol=1e-5, atol=1e-5)
        leaves = [x.clone().requires_grad_() for x in (q, k, v, log_decay)]
        out = saccade.linear_attention(*leaves[:3], spec, log_decay=leaves[3], beta=beta, form=form)
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("kind", ["constant", "scalar", "channel"])
def test_minus_infinity_forgets_everything(kind):
    q, k, v = inputs(batch=1, n=100)
    log_decay = decays(kind, 1, 2, 100, 4)
    if kind == "constant":
        log_decay[1] = -math.inf
    else:
        log_decay[:, :, [0, 30, 64]] = -math.inf
    agree(LinearAttention(), q, k, v, log_decay=log_decay)


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_accumulates_in_float32(dtype, delta):
    q, k, v = (x.to(dtype) for x in inputs(n=300))
    spec = LinearAttention(features.Identity() if delta else features.Elu1(), delta=delta, normalize=not delta)
    beta = draw(2, 2, 300).sigmoid().to(dtype)
    want, _ = step_by_step(q, k, v, spec, beta=beta)
    for form in FORMS:
        out, state = saccade.linear_attention(q, k, v, spec, beta=beta, form=form, return_state=True)
        assert out.dtype == dtype and state.S.dtype == torch.float32
        error = (out.double() - want).abs() / want.abs().clamp(min=1e-2)
        assert error.max() <= torch.finfo(dtype).eps  # half of it would be the rounding of the result alone


def test_a_long_sequence_drifts_no_more_than_its_sums():
    """A hundred thousand tokens, weak and strong decay: the float64 recurrence is the judge."""
    n, log_decay = 100_000, torch.tensor([-1e-5, -1e-2])
    q, k, v = (draw(1, 2, n, w, seed=s, dtype=torch.float32) for s, w in enumerate((4, 4, 2)))
    k, v = k.abs(), v.abs()  # everything adds up
    spec = LinearAttention(decay=log_decay)
    out, last = saccade.linear_attention(q, k, v, spec, return_state=True)
    place = torch.arange(n - 1, -1, -1, dtype=torch.float64)
    kept = (log_decay.double()[:, None] * place).exp()[None, ..., None]
    exact = (k.double() * kept).mT @ v.double()
    assert_close(last.S.double(), exact, rtol=2e-5, atol=0)
    assert_close(out[:, :, -1:].double(), q[:, :, -1:].double() @ exact, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("delta", [False, True])
def test_a_sequence_in_pieces_is_the_sequence(delta):
    q, k, v = inputs(n=150)
    options = {"log_decay": decays("scalar", 2, 2, 150, 4), "beta": draw(2, 2, 150).sigmoid()}
    spec = LinearAttention(features.ReLU(), delta=delta, normalize=not delta)
    whole, last = saccade.linear_attention(q, k, v, spec, return_state=True, **options)
    state, outs = None, []
    for start, stop in itertools.pairwise([0, 64, 65, 66, 140, 150]):
        cut = {name: x[:, :, start:stop] for name, x in options.items()}
        out, state = saccade.linear_attention(
            *(x[:, :, start:stop] for x in (q, k, v)), spec, state=state, return_state=True, **cut
        )
        outs.append(out)
    assert_close(torch.cat(outs, 2), whole)
    assert_close(state.S, last.S)


@pytest.mark.parametrize("m", [9, 14])
def test_without_order_every_query_reads_all_keys(m):
    q, k, v = inputs(n=9, m=m)
    spec = LinearAttention(features.Elu1(), normalize=True, causal=False)
    beta = draw(2, 2, m).sigmoid()
    agree(spec, q, k, v, beta=beta)
    rows, keys = torch.arange(9).expand(2, 9) // 4, torch.arange(m).expand(2, m) // 5
    want, _ = step_by_step(q, k, v, spec, beta=beta, documents=(rows, keys))
    for form in FORMS:
        out = saccade.linear_attention(q, k, v, spec, beta=beta, documents=(rows, keys), form=form)
        assert_close(out, want)
    weights = saccade.linear_weights(q, k, spec, beta=beta, documents=(rows, keys))
    assert_close(weights @ v, want)
    _, state = saccade.linear_attention(q, k, v, spec, return_state=True)
    none = saccade.linear_attention(q, k[:, :, :0], v[:, :, :0], spec, state=state)
    assert_close(none, saccade.linear_attention(q, k, v, spec))


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("delta", [False, True])
def test_weights_are_the_meaning(kind, delta):
    q, k, v = inputs(n=33)
    spec = LinearAttention(None if delta else features.Exp(), delta=delta, normalize=not delta)
    options = {"log_decay": decays(kind, 2, 2, 33, 4), "beta": draw(2, 2, 33).sigmoid()}
    want, _ = step_by_step(q, k, v, spec, **options)
    weights = saccade.linear_weights(q, k, spec, **options)
    assert weights.shape == (2, 2, 33, 33) and not weights.triu(1).any()
    assert_close(weights @ v, want)
    if not delta:
        assert_close(weights.sum(-1), torch.ones(2, 2, 33, dtype=torch.float64), rtol=1e-4, atol=1e-4)


def test_heads_may_be_grouped_on_either_side():
    q, k, v = inputs(heads=4, kv_heads=2, n=20)
    agree(LinearAttention(decay=decays("constant", 2, 4, 20, 4)), q, k, v)
    q, k, v = q[:, :1], k[:, :1], v  # one query and key head, two of values
    agree(LinearAttention(), q, k, v)
    one = saccade.linear_attention(q[:1], k[:1], v)
    assert_close(one[1], saccade.linear_attention(q[:1], k[:1], v[1:])[0])


def test_the_delta_rule_stores_and_replaces():
    """With orthonormal keys: what was written under a key last is what comes back."""
    keys = torch.eye(4)[[0, 1, 2, 0]][None, None]
    v = draw(1, 1, 4, 3, dtype=torch.float32)
    out = saccade.linear_attention(keys, keys, v, LinearAttention(delta=True))
    assert_close(out, v)
    assert_close(saccade.linear_attention(keys, keys, v)[0, 0, 3], v[0, 0, 0] + v[0, 0, 3])


def test_no_gate_recovers_the_delta_rule_and_equal_channels_the_scalar():
    q, k, v = inputs(n=100)
    beta, spec = draw(2, 2, 100).sigmoid(), LinearAttention(delta=True)
    plain = saccade.linear_attention(q, k, v, spec, beta=beta)
    assert_close(saccade.linear_attention(q, k, v, spec, beta=beta, log_decay=torch.zeros(2, 2, 100)), plain)
    log = decays("scalar", 2, 2, 100, 4)
    same = saccade.linear_attention(q, k, v, spec, beta=beta, log_decay=log[..., None].expand(-1, -1, -1, 4))
    assert_close(same, saccade.linear_attention(q, k, v, spec, beta=beta, log_decay=log))


def test_transformers_computes_the_same():
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    q, k, v = (x.float() for x in inputs(n=100))
    log, beta = decays("scalar", 2, 2, 100, 4).float(), draw(2, 2, 100).sigmoid().float()
    theirs, last = torch_chunk_gated_delta_rule(
        *(x.transpose(1, 2) for x in (q, k, v, log, beta)), output_final_state=True
    )
    spec = LinearAttention(delta=True, scale=4**-0.5)
    out, state = saccade.linear_attention(q, k, v, spec, log_decay=log, beta=beta, return_state=True)
    assert_close(out, theirs.transpose(1, 2), rtol=1e-5, atol=1e-5)
    assert_close(state.S, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 5, 8, 13])
def test_both_algebras_of_decay(size):
    """Each factor against sums over every pair of tokens."""
    log = decays("channel", 1, 2, size, 3, 0.5)
    a, b = draw(1, 2, size, 3), draw(1, 2, size, 3, seed=9)
    between = torch.stack(
        [torch.stack([log[:, :, s + 1 : t + 1].sum(2) for s in range(size)], 2) for t in range(size)], 2
    )
    dense = (a[:, :, :, None] * b[:, :, None] * between.exp()).sum(-1).tril()
    channel = ChannelDecay(log)
    assert_close(channel.scores(a, b), dense)
    assert_close(channel.scores(a, b, -1), dense.tril(-1))
    assert_close(channel.since_start(a), a * log.cumsum(2).exp())
    assert_close(channel.until_end(b), b * (log.sum(2, keepdim=True) - log.cumsum(2)).exp())
    scalar = ScalarDecay(log[..., 0], torch.float64)
    assert_close(scalar.scores(a, b), (a @ b.mT) * between[..., 0].exp().tril())
    states = draw(1, 3, 3, 2)
    first = states[:, 1] + scalar.carry(states[:, 0], 0)
    assert_close(scalar.across(states), torch.stack([states[:, 0], first, states[:, 2] + scalar.carry(first, 1)], 1))


# Feature maps: each against the function that its paper writes down.


def dots(feature, q, k):
    heads = torch.arange(q.shape[0])
    return feature.query(q, heads) @ feature.key(k, heads).mT


def test_taylor_is_the_polynomial():
    q, k = draw(2, 7, 6), draw(2, 9, 6, seed=1)
    s = q @ k.mT / math.sqrt(6)
    assert_close(dots(features.Taylor2(), q, k), 1 + s + s**2 / 2)


def test_random_features_estimate_the_softmax_kernel():
    q, k = draw(1, 5, 8) / 2, draw(1, 6, 8, seed=1) / 2  # the variance grows as exp(|q + k|^2)
    want = (q @ k.mT / math.sqrt(8)).softmax(-1)

    def error(count: int) -> float:
        kernels = [dots(features.RandomFeatures(8, count, seed=s).double(), q, k) for s in range(8)]
        return float(torch.stack([(x / x.sum(-1, keepdim=True) - want).abs().mean() for x in kernels]).mean())

    assert error(4096) < 0.01
    assert error(4096) < error(64) / 4  # the error of a mean of M draws falls as M ** -0.5: to an eighth


def test_hedgehogs_two_functions():
    x, weight = draw(2, 5, 4), draw(2, 4, 3, seed=1)
    heads = torch.tensor([1, 0])
    y = torch.stack([x[0] @ weight[1], x[1] @ weight[0]])
    lolcats = features.SoftmaxHedgehog(weight)(x, heads)
    assert_close(lolcats, torch.cat([y.softmax(-1), (-y).softmax(-1)], -1))
    joint = features.SoftmaxHedgehog(weight[0], joint=True)(x, heads)
    e = torch.cat([(2 * x @ weight[0]).exp(), (-2 * x @ weight[0]).exp()], -1)
    assert_close(joint, e / e.sum(-1, keepdim=True))
    assert_close(joint.sum(-1), torch.ones(2, 5, dtype=torch.float64))
    assert_close(lolcats.sum(-1), torch.full((2, 5), 2.0, dtype=torch.float64))


def test_focused_keeps_the_length_and_sharpens_the_direction():
    x = draw(2, 5, 4)
    got = features.Focused(3)(x, torch.arange(2))
    positive = x.relu() + 1e-6
    want = positive**3 * (positive.norm(dim=-1) / (positive**3).norm(dim=-1))[..., None]
    assert_close(got, want)
    assert features.Focused(8)(torch.full((1, 1, 4), 1e6), torch.zeros(1)).isfinite().all()


@pytest.mark.parametrize(
    "feature",
    [
        features.SoftmaxHedgehog(torch.nn.Parameter(draw(2, 4, 3))),
        features.Pair(features.Learned(torch.nn.Linear(4, 5).double()), torch.nn.Linear(4, 5).double()),
        features.Focused(2, torch.nn.Parameter(draw(4).exp())),
        lambda x: torch.cat([x.exp(), (-x).exp()], -1),
    ],
    ids=["hedgehog per head", "two layers", "focused", "function"],
)
def test_learned_features_get_their_gradients(feature):
    agree(LinearAttention(feature, normalize=True, eps=0.1), *inputs(n=66))


def test_a_learned_decay_gets_its_gradient():
    spec = LinearAttention(decay=torch.nn.Parameter(torch.tensor([-0.1, -1.0], dtype=torch.float64)))
    agree(spec, *inputs(n=66))


def test_memory_of_training_is_linear():
    """What is kept for the backward pass: the inputs, and one state per stretch."""
    kept = []
    for n in (4096, 8192):
        q, k, v = (draw(1, 8, n, 8, dtype=torch.float32).requires_grad_() for _ in range(3))
        out = saccade.linear_attention(q, k, v, LinearAttention(features.Elu1(), normalize=True))
        kept.append(sum(t.numel() for t in out.grad_fn.next_functions[0][0].saved_tensors if t is not None))
    assert kept[1] <= 2.1 * kept[0]
    assert kept[0] < 4 * 8 * 4096 * 8


def test_a_feature_that_sees_nothing_gives_zeros():
    q, k, v = inputs(n=5)
    spec = LinearAttention(features.ReLU(), normalize=True)
    assert not saccade.linear_attention(-q.abs(), k, v, spec).any()


BAD = {
    "heads": (lambda q, k, v: dict(q=q[:, [0, 1, 0]], k=k, v=v), "divide the greatest"),
    "three dimensions": (lambda q, k, v: dict(q=q[0], k=k, v=v), r"q must be \[batch"),
    "dtypes": (lambda q, k, v: dict(q=q, k=k.float(), v=v), "share one floating dtype"),
    "lengths": (lambda q, k, v: dict(q=q[:, :, :3], k=k, v=v), "queries and keys of the same tokens"),
    "growth": (lambda q, k, v: dict(q=q, k=k, v=v, log_decay=torch.full((2, 2, 6), 0.1)), "greatest is 0.1"),
    "decay shape": (lambda q, k, v: dict(q=q, k=k, v=v, log_decay=-torch.ones(2, 2, 5)), r"log_decay must be \[H\]"),
    "channels": (lambda q, k, v: dict(q=q, k=k, v=v, log_decay=-torch.ones(2, 2, 6, 3)), "one value per feature"),
    "beta": (lambda q, k, v: dict(q=q, k=k, v=v, beta=torch.ones(2, 6)), "beta must be"),
    "state": (lambda q, k, v: dict(q=q, k=k, v=v, state=LinearState(torch.zeros(2, 2, 3, 3))), r"state must be S \(2"),
    "documents": (lambda q, k, v: dict(q=q, k=k, v=v, documents=torch.tensor([0, 3])), "bounds from 0 to 6"),
    "ids or bounds": (lambda q, k, v: dict(q=q, k=k, v=v, documents=torch.tensor([0, 1, 2, 3, 4, 6])), r"as \[1, 6\]"),
    "form": (lambda q, k, v: dict(q=q, k=k, v=v, form="fast"), "one of auto, parallel"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    spoil, says = BAD[case]
    with pytest.raises(SpecError, match=says):
        saccade.linear_attention(**spoil(*inputs(n=6)))


def test_bad_specs():
    for settings, says in (
        ({"causal": False, "delta": True}, "needs an order"),
        ({"causal": False, "decay": -1.0}, "needs an order"),
        ({"delta": True, "normalize": True}, "no sum of weights"),
        ({"decay": 0.5}, "log-decays <= 0"),
        ({"feature": 3}, "function of vectors"),
    ):
        with pytest.raises(SpecError, match=says):
            LinearAttention(**settings)
    q, k, v = inputs(n=6)
    with pytest.raises(SpecError, match="a constant decay"):
        saccade.linear_attention(q, k, v, LinearAttention(decay=-1.0), log_decay=torch.zeros(2, 2, 6))
    with pytest.raises(SpecError, match="needs an order"):
        saccade.linear_attention(q, k, v, LinearAttention(causal=False), log_decay=torch.zeros(2, 2, 6))
    with pytest.raises(SpecError, match="state of its own"):
        ids = torch.zeros(1, 6).long()
        saccade.linear_attention(q, k, v, LinearAttention(causal=False), documents=ids, return_state=True)
