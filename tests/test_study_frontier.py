"""The sparse frontier: units against what they mean, phases step by step, statistics against counting."""

import itertools
import json
import math
import pickle
from dataclasses import asdict

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from saccade import SpecError, weights
from saccade.core.masks import Causal
from saccade.core.spec import Attention
from saccade.hosts.handles import install
from saccade.study import cells, frontier, study_laws
from saccade.study.frontier import BLOCK, LAST, Frontier, Lines, Pages, Size
from saccade.systems.bench.sparse_frontier import SparseFrontier

SMALL = {"models": ("lm",), "tasks": ("needle",), "lengths": (128,), "sparsities": (0.5, 0.9), "count": 3}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def heads():
    torch.manual_seed(1)
    return torch.randn(2, 4, 200, 8), torch.randn(2, 2, 200, 8)


def visible(q, k, select):
    """Which keys each query gives weight, ``[B, H, N, M]``."""
    return weights(q, k, Attention(mask=Causal(), select=select)) > 0


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("rows", [1, 16])
def test_lines_are_whole_and_as_many_as_the_share_allows(heads, share, rows):
    q, k = heads
    seen = visible(q, k, Lines(share, rows))
    places = seen.sum((-2, -1)) / (200 * 201 / 2)
    assert (places <= share * (1.1 if share > 0.05 or rows == 1 else 3)).all()
    if rows > 1:
        return
    assert (places > 0.7 * share).all()
    # Each kept place lies on a whole column or a whole diagonal.
    for head in seen.flatten(0, 1):
        columns = [j for j in range(200) if head[j:, j].all()]
        diagonals = [d for d in range(200) if head.diagonal(-d).all()]
        drawn = torch.zeros_like(head)
        for j in columns:
            drawn[j:, j] = True
        for d in diagonals:
            drawn.diagonal(-d).fill_(True)
        assert torch.equal(drawn, head)
        assert 0 in columns
        assert 0 in diagonals


def test_lines_rank_by_the_weights_of_the_last_queries(heads):
    q, k = heads
    dense = weights(q, k, Attention(mask=Causal()))[:, :, -LAST:]
    by_key, by_far = frontier.ranked(q, k)
    torch.testing.assert_close(by_key[..., 1:], dense.sum(-2)[..., 1:])
    expected = torch.zeros(2, 4, 200)
    for i, j in itertools.product(range(LAST), range(200)):
        if (distance := 200 - LAST + i - j) >= 0:
            expected[..., distance] += dense[..., i, j]
    torch.testing.assert_close(by_far[..., 1:], expected[..., 1:])


def test_pages_are_those_with_the_greatest_bound(heads):
    q, k = heads
    seen = visible(q[:, :, -5:], k, Pages(3, BLOCK))
    for b, group, i in itertools.product(range(2), range(2), range(5)):
        own = (195 + i) // BLOCK
        bounds = []
        for page in range(own):
            keys = k[b, group, page * BLOCK : (page + 1) * BLOCK]
            each = q[b, 2 * group : 2 * group + 2, 195 + i][:, None]
            bounds.append(float(torch.maximum(each * keys.amin(0), each * keys.amax(0)).sum()))
        best = {own, *sorted(range(own), key=lambda page: -bounds[page])[:3]}
        for head in (2 * group, 2 * group + 1):
            found = {int(j) // BLOCK for j in seen[b, head, i].nonzero()}
            assert found == best


def test_a_width_spends_the_share():
    for n, share in itertools.product((64, 1000), (0.1, 0.5, 0.9)):
        k = frontier.widest(n, share)
        spent = [sum(min(i, w) for i in range(1, n + 1)) / (n * (n + 1) / 2) for w in (k - 1, k, k + 1)]
        assert abs(spent[1] - share) == min(abs(s - share) for s in spent)


@pytest.mark.parametrize("unit", frontier.UNITS)
def test_decoding_sees_one_query_at_a_time(model, unit):
    tokens = torch.randint(0, 256, (2, 150), generator=torch.Generator().manual_seed(2))
    cut, level = 140, 0.8
    ((together, _),) = frontier.readings(model, tokens, cut, "decode", unit, [level])
    seen, cache = frontier.Seen(), DynamicCache()
    with torch.no_grad():
        with frontier.listen(model, lambda c: seen.update({c.site.layer: frontier.ranked(c.q, c.k)})):
            model(tokens[:, :cut], past_key_values=cache)
        steps = []
        with install(model, frontier.program("decode", unit, level, cut, seen)):
            for i in range(cut, 150):
                steps.append(model(tokens[:, i : i + 1], past_key_values=cache).logits)
    torch.testing.assert_close(together, torch.cat(steps, 1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("phase", frontier.PHASES)
@pytest.mark.parametrize("unit", frontier.UNITS)
def test_only_its_phase_is_sparse_and_as_sparse_as_told(model, phase, unit):
    tokens = torch.randint(0, 256, (1, 260), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        dense = model(tokens).logits[:, 250:]
    read = list(frontier.readings(model, tokens, 250, phase, unit, [0.001, 0.4, 0.6], counted=True))
    torch.testing.assert_close(read[0][0], dense, atol=0.02, rtol=0)
    for (logits, sparsity), level in zip(read[1:], (0.4, 0.6), strict=True):
        assert sparsity == pytest.approx(level, abs=0.05)
        assert (logits - dense).abs().max() > 1e-4


def test_statistics_against_counting():
    for n, p in ((6, 0.3), (9, 0.5)):
        for most in range(n + 1):
            counted = sum(
                math.prod(p if hit else 1 - p for hit in trial)
                for trial in itertools.product((0, 1), repeat=n)
                if sum(trial) <= most
            )
            assert frontier.binomial(n, p, most) == pytest.approx(counted)
    assert frontier.worse(5, 0) == 1 / 32
    assert frontier.worse(3, 3) > 0.5
    low, high = frontier.wilson(0.9, 100, 0.95)
    for bound in (low, high):  # Wilson's interval holds the p with |share - p| <= z * sqrt(p (1 - p) / n)
        assert abs(0.9 - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / 100))
    assert frontier.unsafe([0.0] * 59, 0.05) <= 0.05 < frontier.unsafe([0.0] * 58, 0.05)
    assert frontier.unsafe([0.5] * 100, 0.3) == 1
    # Hoeffding's bound is never below the exact probability, and meets it where nothing is lost.
    assert frontier.unsafe([0.0] * 99 + [0.999999], 0.05) > frontier.unsafe([0.0] * 99 + [1.0], 0.05)
    assert frontier.unsafe([0.0] * 99 + [1e-9], 0.05) == pytest.approx(0.95**100)


def test_what_is_called_safe_is_rarely_unsafe():
    """A reading that truly loses the tolerance is called safe at most as often as one minus the confidence."""
    drawn = torch.rand(2000, 100, generator=torch.Generator().manual_seed(4)) < 0.05
    partly = torch.rand(2000, 100, generator=torch.Generator().manual_seed(5)) * 0.1
    for losses in (drawn.double(), partly.double()):
        called = [frontier.unsafe(row.tolist(), 0.05) <= 0.05 for row in losses]
        assert sum(called) / len(called) <= 0.05 + 0.015
    assert any(frontier.unsafe(row.tolist(), 0.05) <= 0.05 for row in drawn.double())


def test_operations_count_the_model_attention_and_the_choosing():
    size = Size(parameters=0, matrices=1000, layers=2, heads=3, width=8)
    assert size.flops("decode", "dense", 0.0, 64) == 2 * 1000 + 2 * 3 * 4 * 8 * 64
    assert size.flops("prefill", "dense", 0.0, 64) == 64 * 2000 + 2 * 3 * 4 * 8 * 64 * 65 / 2
    half = size.flops("prefill", "token", 0.5, 64) - 64 * 2000  # all scores, and half of the values
    assert half == 2 * 3 * 2 * 8 * 64 * 65 / 2 * 1.5
    for phase, unit in itertools.product(frontier.PHASES, frontier.UNITS):
        assert size.flops(phase, unit, 0.9, 2048) < size.flops(phase, unit, 0.5, 2048)


def found(job, right):
    """Results as if measured: ``right(cell, sparsity)`` pages of 100 right, dense 100."""
    size = {"lm": Size(100, 100, 2, 2, 8), "lm-small": Size(50, 90, 2, 2, 8)}
    rows = []
    for cell in job.cells:
        reads = []
        for level in job.sparsities:
            hit = right(cell, level)
            reads.append({"wanted": level, "sparsity": level, "right": [1] * hit + [0] * (100 - hit)})
        base = {"size": asdict(size[cell.model]), "asked": [1] * 100, "dense": [1] * 100, "sparse": reads}
        rows.append({"result": base})
    return rows


def test_the_highest_safe_sparsity_stops_at_the_first_that_is_not():
    job = Frontier(("lm",), ("needle",), (512,), (0.5, 0.8, 0.9), ("decode",), ("token", "blocks"))
    lost = {"token": {0.5: 100, 0.8: 99, 0.9: 100}, "blocks": {0.5: 98, 0.8: 100, 0.9: 100}}
    summary = job.summary(found(job, lambda cell, level: lost[cell.unit][level]))
    assert {row["unit"]: row["sparsity"] for row in summary["safe"]} == {"token": 0.9, "blocks": 0.0}
    assert summary["mean_safe"] == {"decode": 0.45}
    assert json.loads(json.dumps(summary)) == summary


def test_a_larger_sparse_model_is_found_where_it_is_better_for_less():
    job = Frontier(("lm", "lm-small"), ("needle",), (2048,), (0.5, 0.9), ("prefill",), ("blocks",))
    hits = {"lm": {0.5: 100, 0.9: 97}, "lm-small": {0.5: 80, 0.9: 70}}
    (row,) = job.summary(found(job, lambda cell, level: hits[cell.model][level]))["worth"]
    assert row["small"]["model"] == "lm-small"
    assert (row["large"]["model"], row["large"]["wanted"], row["large"]["accuracy"]) == ("lm", 0.5, 1.0)


def test_a_model_that_is_missing_or_cannot_do_the_task_is_told(model, tmp_path):
    model.save_pretrained(tmp_path / "untrained")
    settings = {**SMALL, "models": (str(tmp_path / "untrained"), "nowhere"), "phases": ("decode",), "units": ("token",)}
    job = Frontier(**settings)
    results = cells.run(job, tmp_path / "cells")
    why = {row["model"]: row["why"] for row in job.summary(results)["not_measured"]}
    assert why["nowhere"].startswith("no checkpoint 'nowhere'")
    assert "0.0% right" in why[str(tmp_path / "untrained")]
    page = job.page(results, "saccade study sparse-frontier", 1.0)
    assert "no checkpoint" in page.html()
    assert "nothing can be called safe" in page.intro


def test_the_embedded_model_is_measured_resumed_and_drawn(tmp_path):
    job = pickle.loads(
        pickle.dumps(SparseFrontier(**{**SMALL, "sparsities": (0.9,), "count": 2}, units=("token",)).comparison())
    )
    first = cells.run(job, tmp_path)
    again = []
    assert cells.run(job, tmp_path, lambda cell, computed: again.append(computed)) == first
    assert not any(again)
    assert [known["result"]["dense"] for known in first] == [[1, 1]] * 2
    page = job.page(first, "saccade study sparse-frontier", 1.0).html()
    assert page.count("<svg") == 2
    assert "Highest safe sparsity at 128 tokens" in page


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"units": ("words",)}, "there are blocks"),
        ({"tasks": ("sums",)}, "there are needle"),
        ({"sparsities": (1.0,)}, "between 0 and 1"),
        ({"lengths": (64,)}, "lengths >= 128"),
        ({"models": ()}, "at least one"),
        ({"tolerance": 0.0}, "tolerance"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong, words):
    with pytest.raises(SpecError, match=words):
        SparseFrontier(**{**SMALL, **wrong}).comparison()


def test_cells_are_told_apart():
    assert study_laws.cells_are_told_apart(SparseFrontier()) == "120 cells"
