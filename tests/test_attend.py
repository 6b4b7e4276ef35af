"""The three verbs at the border: backends agree, refusals give reasons, errors say how to mend."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

import saccade
from dense import qkv
from saccade import Attention, SpecError, Unsupported, edits, masks, normalizers, scores, selectors, stats


def float_qkv(*shape: int, **options):
    return [x.detach() for x in qkv(shape, dtype=torch.float32, **options)]


def test_import_is_quick_and_needs_torch_alone():
    code = (
        "import sys, time, torch; before = set(sys.modules); start = time.perf_counter(); import saccade;"
        "print(time.perf_counter() - start, *{m.split('.')[0] for m in set(sys.modules) - before})"
    )
    seconds, *modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()
    foreign = {m for m in modules if not m.startswith("torch") and m not in sys.stdlib_module_names} - {"saccade"}
    assert float(seconds) < 2
    assert not foreign & {"transformers", "typer", "rich", "matplotlib", "safetensors", "jinja2"}, foreign


@pytest.mark.parametrize(("n", "m"), [(20, 20), (1, 20), (7, 20)])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("mask", [None, masks.Causal()])
def test_backends_agree_on_plain_attention(n, m, kv_heads, mask):
    inputs = float_qkv(2, 4, kv_heads, n, m)
    spec = Attention(score=scores.Dot(0.3), mask=mask)
    want = saccade.attention(*inputs, spec, backend="reference")
    assert_close(saccade.attention(*inputs, spec, backend="band"), want)
    assert_close(saccade.attention(*inputs, spec), want)
    if not (mask and n == 7):
        assert_close(saccade.attention(*inputs, spec, backend="sdpa"), want)


def test_flex_runs_the_same_functions():
    inputs = float_qkv(1, 2, 2, 130, 130, width=16)
    spec = Attention(score=lambda s, b, h, q, k: s - 0.05 * (q - k), mask=lambda b, h, q, k: q >= k)
    want = saccade.attention(*inputs, spec, backend="reference")
    assert_close(saccade.attention(*inputs, spec, backend="flex"), want, rtol=1e-4, atol=1e-5)
    assert_close(saccade.attention(*inputs, spec, backend="band", compile=True), want, rtol=1e-4, atol=1e-5)


def test_weights_are_the_meaning():
    q, k, v = float_qkv(2, 4, 2, 9, 12)
    spec = Attention(mask=masks.Causal(), normalizer=normalizers.Sigmoid(), edits=[edits.Scale(0.5, keys=[0])])
    w = saccade.weights(q, k, spec)
    assert w.shape == (2, 4, 9, 12)
    assert_close(w @ v.repeat_interleave(2, 1), saccade.attention(q, k, v, spec, backend="band"))


def test_explain_says_who_runs_and_why_not_the_others():
    q, k, _ = float_qkv(1, 2, 2, 1024, 1024)
    plain = saccade.explain(Attention(mask=masks.Causal()), q, k)
    assert plain.backend == "sdpa" and "band" not in plain.refused
    said = saccade.explain(Attention(mask=masks.Causal() & masks.Window(64), edits=[edits.Renormalize()]), q, k)
    assert said.backend == "band" and 0.06 < said.visited < 0.25
    assert "edit" in said.refused["sdpa"] and "% of the score matrix" in str(said)
    watched = saccade.explain(Attention(), q, k, stats=[stats.Entropy()])
    assert "entropy" in watched.refused["sdpa"]
    mixed = Attention(score=scores.MixHeads(torch.eye(2)), select=selectors.TopKBlocks(2))
    assert saccade.explain(mixed, q, k).backend == "reference"


def test_a_named_backend_refuses_with_the_reason():
    inputs = float_qkv(1, 2, 2, 8, 8)
    with pytest.raises(Unsupported, match="cannot edit"):
        saccade.attention(*inputs, Attention(edits=[edits.Renormalize()]), backend="sdpa")
    with pytest.raises(Unsupported, match="no backward on the CPU"):
        saccade.attention(*[x.requires_grad_() for x in inputs], backend="flex")
    with pytest.raises(Unsupported, match="do not divide"):
        spec = Attention(select=selectors.TopKBlocks(1, 8))
        saccade.attention(*inputs, spec, stats=[stats.BlockMax(3)], backend="band")
    with pytest.raises(SpecError, match="one of auto"):
        saccade.attention(*inputs, backend="fastest")


BAD = {
    "three dimensions": (lambda q, k, v: (q[0], k, v), r"q must be \[batch, heads, length, width\]"),
    "dtypes": (lambda q, k, v: (q, k.double(), v), "share one floating dtype"),
    "integers": (lambda q, k, v: (q.long(), k.long(), v.long()), "floating"),
    "widths": (lambda q, k, v: (q[..., :4], k, v), "same width"),
    "lengths": (lambda q, k, v: (q, k, v[:, :, 1:]), "same length"),
    "heads": (lambda q, k, v: (q[:, :3], k, v), "multiple of key heads"),
    "batches": (lambda q, k, v: (q[:3], k, v), "batch sizes"),
    "empty": (lambda q, k, v: (q[:, :, :0], k, v), "empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    spoil, says = BAD[case]
    with pytest.raises(SpecError, match=says):
        saccade.attention(*spoil(*float_qkv(4, 4, 2, 6, 6)))


def test_bad_specs():
    inputs = float_qkv(1, 2, 2, 8, 8)
    with pytest.raises(SpecError, match=r"saccade\.Attention"):
        saccade.attention(*inputs, lambda q, k: q)
    with pytest.raises(SpecError, match=r"saccade\.stats"):
        saccade.attention(*inputs, stats=["entropy"])
    with pytest.raises(SpecError, match=r"name="):
        saccade.attention(*inputs, stats=[stats.Entropy(), stats.Entropy()])
    with pytest.raises(SpecError, match="outside the 8 queries"):
        saccade.attention(*inputs, stats=[stats.Rows([8])])


def test_a_program_is_a_module():
    spec = Attention(score=scores.RelativeBias(2, 4), normalizer=normalizers.LearnedEntmax(2), mask=masks.Causal())
    assert sum(p.numel() for p in spec.parameters()) == 2 * 9 + 2
    again = Attention(score=scores.RelativeBias(2, 4), normalizer=normalizers.LearnedEntmax(2), mask=masks.Causal())
    torch.nn.init.normal_(spec.scores[0].table)
    again.load_state_dict(spec.state_dict())
    inputs = float_qkv(1, 2, 2, 9, 9)
    assert torch.equal(spec(*inputs), again(*inputs))


def test_training_moves_what_is_learned():
    q, k, v = float_qkv(1, 2, 2, 30, 30)
    spec = Attention(score=scores.RelativeBias(2, 4), mask=masks.Causal(), normalizer=normalizers.LearnedEntmax(2))
    before = [p.detach().clone() for p in spec.parameters()]
    step = torch.optim.SGD(spec.parameters(), 1.0)
    out, seen = spec(q, k, v, stats=[stats.Entropy()])
    (out.square().mean() + seen["entropy"].mean()).backward()
    step.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, spec.parameters(), strict=True))


def test_a_score_that_ignores_its_input_still_has_a_backward():
    q, k, v = (torch.randn(1, 2, 70, 8, requires_grad=True) for _ in range(3))
    level = Attention(score=lambda score, b, h, q, k: torch.zeros_like(score), mask=masks.Causal())
    g = torch.randn(1, 2, 70, 8)
    dq, dk, dv = torch.autograd.grad(saccade.attention(q, k, v, level, backend="band"), (q, k, v), g)
    assert not dq.any() and not dk.any()
    mean = torch.ones(70, 70).tril() / torch.arange(1, 71)[:, None]
    torch.testing.assert_close(dv, mean.T @ g)
