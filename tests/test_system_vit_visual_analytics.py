"""Visual analytics of vision transformers: pruning, hops and patterns against what they must be."""

import math

import pytest
import torch
import transformers as tf

import saccade
from saccade import Attention, catalog
from saccade.core.edits import Zero
from saccade.core.errors import SpecError
from saccade.study import laws
from saccade.systems.explain._heads import edited
from saccade.systems.explain._patches import Hops, grid
from saccade.systems.explain._patterns import clusters, learned
from saccade.systems.explain.vit_visual_analytics import VitVisualAnalytics, changes, says

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = tf.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=20, patch_size=4,
        num_labels=5, initializer_range=0.3,
    )  # fmt: skip
    return tf.ViTForImageClassification(config).eval()


@pytest.fixture(scope="module")
def pictures():
    return torch.randn(6, 3, 20, 20, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_pruning_is_that_of_the_projections_columns(model, pictures):
    """A head gives nothing as if the output projection did not read it; the metrics are torch's formulas."""
    labels, head, attends = torch.tensor([0, 1, 2, 3, 4, 0]), (1, 2), model.config._attn_implementation
    found = VitVisualAnalytics().importance(model, pictures, labels)
    assert model.config._attn_implementation == attends  # no handle is left
    before, projection = says(model, pictures), model.vit.layers[head[0]].attention.o_proj.weight
    kept = projection.clone()
    projection[:, 8 * head[1] : 8 * head[1] + 8] = 0
    after = says(model, pictures)
    projection.copy_(kept)
    middle = ((before + after) / 2).log()
    kl = [torch.nn.functional.kl_div(middle, p, reduction="batchmean") for p in (before, after)]
    rows = torch.arange(6)
    assert found.shape == (2, 4, 3)
    assert found[head].tolist() == pytest.approx(
        [
            float((before[rows, labels] - after[rows, labels]).mean()), float(sum(kl) / 2),
            float((before.argmax(1) != after.argmax(1)).float().mean()),
        ], abs=1e-6,
    )  # fmt: skip
    with edited(model, Zero(), [head]):
        assert torch.allclose(says(model, pictures), after, atol=1e-6)
    assert torch.equal(says(model, pictures), before)


@torch.no_grad()
def test_in_the_last_layer_only_what_the_class_token_reads_matters(model, pictures):
    labels = torch.zeros(6, dtype=torch.long)
    whole, by_class, by_patches = (
        VitVisualAnalytics().importance(model, pictures, labels, part) for part in ("whole", "class", "patches")
    )
    assert torch.allclose(by_class[1], whole[1], atol=1e-6) and whole[1, :, 1].min() > 1e-4
    assert by_patches[1].abs().max() < 1e-6 and by_patches[0, :, 1].min() > 1e-6


def test_divergence_has_its_bounds():
    sure = torch.eye(2)[:1]
    assert changes(sure, sure.flip(1), torch.tensor([0])).tolist() == pytest.approx([1, math.log(2), 1])
    assert not changes(sure, sure, torch.tensor([0])).any()


@torch.no_grad()
def test_strengths_and_the_class_tokens_share_are_all_there_is(model, pictures):
    system = VitVisualAnalytics()
    with system.apply(model) as watching:
        model(pictures)
    maps, strengths = system.maps(watching), system.strengths(watching)
    assert maps.shape == (2, 6, 4, 25, 25) and strengths.shape == (2, 4, 5)
    y, x = torch.arange(25) // 5, torch.arange(25) % 5
    hops = torch.maximum((y - y[:, None]).abs(), (x - x[:, None]).abs())
    for k in range(5):
        assert torch.allclose(strengths[..., k], (maps * (hops == k)).sum(-1).mean((1, 3)), atol=1e-6)
    assert torch.allclose(strengths.sum(-1), maps.sum(-1).mean((1, 3)), atol=1e-6) and (strengths.sum(-1) < 1).all()


def test_hops_of_equal_weights_are_counts():
    q = torch.ones(1, 1, 8, 4)
    _, seen = saccade.attention(q, q, q, Attention(), stats=[Hops(4)])  # a grid of 2 rows and 4 columns
    assert torch.allclose(seen["hops"][0, 0, 0] * 8, torch.tensor([1.0, 3, 2, 2]))


def test_planted_patterns_are_told_apart():
    """Maps of the patch itself, of its row, and of one patch for all, each with noise, come to lie in groups."""
    place = torch.arange(16)
    plain = torch.stack([torch.eye(16), (place // 4 == place[:, None] // 4) / 4, (place == 5).float().expand(16, -1)])
    kinds = torch.arange(3).repeat(40)
    noise = torch.rand(120, 16, 16, generator=torch.Generator().manual_seed(0))
    maps = 0.8 * plain[kinds] + 0.2 * noise / noise.sum(-1, keepdim=True)
    found = learned(maps[:60], maps[60:], 3)
    assert found.explained > 0.9 and len(found.maps) == 3
    groups = {int(kind): set(found.which[kinds[60:] == kind].tolist()) for kind in range(3)}
    assert all(len(group) == 1 for group in groups.values()) and len(set.union(*groups.values())) == 3
    assert len(clusters(torch.zeros(5, 2), 3).unique()) == 1


def test_the_report_shows_all_three(model, pictures):
    found, page = VitVisualAnalytics(patterns=2).report(model, pictures, torch.zeros(6, dtype=torch.long))
    assert [part["title"] for part in page.parts] == ["Head importance", "Strength by hops", "Attention patterns"]
    assert page.html().count("<svg") >= 3 and found["importance"].shape == (2, 4, 3)


def test_what_cannot_be_done_is_refused(model, pictures):
    with pytest.raises(SpecError, match="at least 2 pictures"):
        VitVisualAnalytics().report(model, pictures[:1], torch.tensor([0]))
    with pytest.raises(SpecError, match="part is one of whole, class, patches"):
        VitVisualAnalytics().importance(model, pictures, torch.zeros(6, dtype=torch.long), "half")
    with pytest.raises(SpecError, match="no grid of 4 columns"):
        grid(25, 4)


def test_so_it_is_for_another_kind_with_two_tokens_before_its_patches(pictures):
    torch.manual_seed(0)
    config = tf.DeiTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=20, patch_size=5,
        num_labels=3,
    )  # fmt: skip
    model = tf.DeiTForImageClassification(config).eval()
    found, page = VitVisualAnalytics(patterns=2, prefix=2).report(model, pictures, torch.zeros(6, dtype=torch.long))
    assert found["strengths"].shape == (1, 2, 4) and found["patterns"].maps.shape[1:] == (16, 16)
    assert found["strengths"].sum(-1).tolist()[0] == pytest.approx([16 / 18] * 2, abs=0.01) and len(page.parts) == 3


def test_no_law_fails():
    assert not [r for r in laws.check(catalog.find("vit-visual-analytics")) if r.status == "failed"]
