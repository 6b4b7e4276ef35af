"""SeerAttention: its gate and its choice against the definition in loops, and what distillation learns."""

import cmath
import math

import pytest
import torch
import torch.nn.functional as F

from saccade import SpecError, attention
from saccade.core.masks import Causal, Span
from saccade.hosts.handles import listen
from saccade.study.hosted_laws import small_model
from saccade.systems.sparse._gate_lessons import distil
from saccade.systems.sparse.seerattention import Gate, SeerAttention

torch.set_num_threads(1)
THETA = 100.0


def turned(x, position):
    """One vector by RoPE, in complex numbers."""
    half = len(x) // 2
    out = torch.empty_like(x)
    for i in range(half):
        z = complex(float(x[i]), float(x[half + i])) * cmath.exp(1j * position * THETA ** (-i / half))
        out[i], out[half + i] = z.real, z.imag
    return out


@torch.no_grad()
def gate_of(q, k, weight, size):
    """Scores of the blocks of one head from queries and keys ``[N, D]`` without RoPE, in loops."""
    starts = range(0, len(q), size)
    tall = [turned(q[i : i + size].mean(0), i) for i in starts]
    wide = []
    for j in starts:
        keys = k[j : j + size]
        wide.append(turned(torch.cat([keys.amax(0), keys.amin(0), keys.mean(0)]) @ weight, j))
    return torch.stack([torch.stack([a @ b for b in wide]) for a in tall]) / math.sqrt(q.shape[1])


@pytest.fixture(scope="module")
def drawn():
    """Queries and keys without RoPE ``[1, H, N, D]``, the same with it, and the gate: 22 tokens, two key heads."""
    source = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, h, 22, 6, generator=source, dtype=torch.float64) for h in (4, 2))
    with_rope = [
        torch.stack([torch.stack([turned(t, p) for p, t in enumerate(h)]) for h in x[0]])[None] for x in (q, k)
    ]
    torch.manual_seed(0)
    gate = Gate(4, 6, block=4, theta=THETA).double()
    with torch.no_grad():
        gate.weight.normal_()
    return q, k, with_rope, gate


def test_gate_equals_its_definition(drawn):
    q, k, with_rope, gate = drawn
    logits = gate.logits(*gate.pooled(*with_rope))
    for h in range(4):
        torch.testing.assert_close(
            logits[0, h], gate_of(q[0, h], k[0, h // 2], gate.weight[h], 4), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("threshold", [None, 0.2])
def test_choice_equals_its_definition(drawn, threshold):
    q, k, with_rope, gate = drawn
    gate.ratio, gate.threshold, gate.last = 0.6, threshold, 1
    codes = Causal().blocks(Span.grid(22, 22, 4, 4))[None, None]
    got = gate.choose(*with_rope, codes).dense(22, 22)
    keep = int((1 - math.sqrt(0.4)) * 6)
    for h in range(4):
        score = gate_of(q[0, h], k[0, h // 2], gate.weight[h], 4)
        for i in range(6):
            seen = score[i, : i + 1]
            if i == 5:
                wanted = set(range(6))
            elif threshold is not None:
                wanted = {j for j in range(i + 1) if seen.softmax(0)[j] > threshold}
            else:
                wanted = set(sorted(range(i + 1), key=lambda j, s=seen: -s[j])[:keep])
            assert {j for j in range(6) if got[0, h, 4 * i, 4 * j]} == wanted


def test_values_that_are_not_chosen_do_not_count():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 64, 8).unbind(0)
    spec = SeerAttention(width=8, block=8, ratio=0.3, last=0).build(2)
    codes = Causal().blocks(Span.grid(64, 64, 8, 8))[None, None]
    chosen = spec.select.choose(q, k, codes).dense(64, 64) & torch.ones(64, 64).tril().bool()
    score = (q @ k.mT / math.sqrt(8)).masked_fill(~chosen, -torch.inf)
    torch.testing.assert_close(attention(q, k, v, spec), score.softmax(-1) @ v)
    assert chosen.sum() < 0.5 * 2 * 64 * 65 / 2


def test_distilled_gates_come_near_the_teacher():
    model = small_model()
    tokens = torch.randint(3, 90, (4, 96), generator=torch.Generator().manual_seed(1))
    before = [p.clone() for p in model.parameters()]
    errors = []
    for steps in (1, 60):
        gates = distil(model, tokens, steps=steps, lr=2e-2, block=8)
        errors.append(_divergence(model, tokens, gates))
    assert errors[1] < 0.75 * errors[0]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@torch.no_grad()
def _divergence(model, tokens, gates):
    """Mean KL divergence from the block maxima of eager attention, which knows nothing of saccade."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(tokens, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    total, seen = 0.0, {}
    with torch.no_grad(), listen(model, lambda call: seen.update({call.site.layer: (call.q, call.k)})):
        model(tokens)
    for layer, w in enumerate(weights):
        teacher = w.unflatten(-1, (12, 8)).amax(-1).unflatten(-2, (12, 8)).amax(-2)
        teacher = teacher / teacher.sum(-1, keepdim=True)
        logits = gates[layer].logits(*gates[layer].pooled(*seen[layer]))
        learner = logits.masked_fill(torch.ones(12, 12).triu(1).bool(), -1e9).log_softmax(-1)
        total += float(F.kl_div(learner, teacher, reduction="sum")) / teacher.shape[:3].numel()
    return total


def test_refuses_no_ratio():
    with pytest.raises(SpecError, match="ratio"):
        Gate(2, ratio=0.0)
