"""Explanations of convolutional networks against autograd, closed forms and planted networks."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from saccade import catalog
from saccade.core.errors import SpecError, Unsupported
from saccade.study import laws
from saccade.systems.explain._convolutional import covering, enlarged, network, pictures, pointing
from saccade.systems.explain._lime import lime
from saccade.systems.explain._scans import autoencoder, classifier, located, scans
from saccade.systems.explain.acat import ACAT
from saccade.systems.explain.layer_masking import LayerMasking, filled
from saccade.systems.explain.normgrad import NormGrad, saliency, stretched
from saccade.systems.explain.salient_relevance import SalientRelevance

torch.set_num_threads(1)


def small(width=4):
    torch.manual_seed(0)
    return network(width).double().eval()


def some(count=3):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# ---- shared ----


def test_pointing_is_at_the_greatest_place_and_enlarging_keeps_it():
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[:, 4:6, 2:4] = True
    maps = torch.zeros(2, 4, 4)
    maps[0, 2, 1] = maps[1, 0, 3] = 1
    assert pointing(maps, masks).tolist() == [1, 0]
    assert enlarged(maps, (8, 8)).flatten(1).argmax(1).tolist() == [4 * 8 + 2, 7]


def test_pictures_show_the_shape_where_the_mask_says():
    seen = pictures("test", 20)
    inside = [float(p[:, m].mean() - p[:, ~m].mean()) for p, m in zip(seen.pixels, seen.masks, strict=True)]
    assert min(inside) > 0.3 and seen.pixels.min() >= -1


# ---- normgrad ----


@pytest.mark.parametrize("kind", ["scaling", "bias", "conv1x1", "conv3x3"])
def test_a_place_counts_as_much_as_its_own_weights_would_move(kind):
    """An identity layer with weights of its own at every place: autograd's gradient of these, place by place."""
    model, pixels, classes = small(), some(), torch.tensor([1, 4, 0])
    cut = 4
    x = model[:cut](pixels).detach()
    (b, c, h, w), eye = x.shape, torch.eye(4 * 2, dtype=torch.float64)
    if kind == "scaling":
        own = torch.ones(b, c, h, w, dtype=x.dtype, requires_grad=True)
        y = own * x
    elif kind == "bias":
        own = torch.zeros(b, c, h, w, dtype=x.dtype, requires_grad=True)
        y = x + own
    elif kind == "conv1x1":
        own = eye[..., None, None].expand(b, c, c, h, w).clone().requires_grad_()
        y = torch.einsum("bochw,bchw->bohw", own, x)
    else:
        centre = torch.zeros(c, c, 9, dtype=x.dtype)
        centre[..., 4] = eye
        own = centre[..., None, None].expand(b, c, c, 9, h, w).clone().requires_grad_()
        y = torch.einsum("boczhw,bczhw->bohw", own, F.unfold(x, 3, padding=1).view(b, c, 9, h, w))
    model[cut:](y).gather(1, classes[:, None]).sum().backward()
    found = NormGrad(kind, ["3"]).maps(model, pixels, classes)
    assert list(found) == ["3"] and torch.allclose(found["3"], own.grad.flatten(1, -3).norm(dim=1))


def test_shares_of_all_places_add_up_to_the_gradient_of_a_real_layer():
    torch.manual_seed(0)
    layer = nn.Conv2d(5, 5, 1, bias=False).double()
    x = torch.randn(1, 5, 4, 4, dtype=torch.float64)
    y = layer(x)
    y.retain_grad()
    y.square().sum().backward()
    assert torch.allclose(torch.einsum("bohw,bchw->oc", y.grad, x), layer.weight.grad[..., 0, 0])
    assert torch.allclose(
        saliency(x, y.grad, "conv1x1")[0, 2, 3], torch.outer(y.grad[0, :, 2, 3], x[0, :, 2, 3]).norm()
    )


def test_combined_is_the_product_of_stretched_maps():
    model, pixels, classes = small(), some(2), torch.tensor([0, 1])
    system = NormGrad(layers=["1", "4"])
    first, second = (stretched(enlarged(m, (16, 16))) for m in system.maps(model, pixels, classes).values())
    assert torch.allclose(system.combined(model, pixels, classes), first * second)
    assert first.amax((1, 2)).tolist() == pytest.approx([1, 1]) and not first.amin((1, 2)).any()
    assert not stretched(torch.ones(1, 3, 3)).any()


def test_meta_is_a_step_of_descent_and_leaves_the_model():
    model, pixels, classes = small(), some(2), torch.tensor([3, 5])
    before = [p.clone() for p in model.parameters()]
    found = NormGrad(rate=0.1).meta(model, pixels, classes)
    for i in range(2):
        other = small()
        F.cross_entropy(other(pixels[i : i + 1]), classes[i : i + 1]).backward()
        for p in other.parameters():
            p.data -= 0.1 * p.grad
        wanted = NormGrad().maps(other, pixels[i : i + 1], classes[i : i + 1])
        assert all(torch.allclose(found[path][i], wanted[path][0]) for path in wanted)
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    plain = NormGrad().maps(model, pixels, classes)
    assert not torch.allclose(plain["8"], found["8"])


def test_what_cannot_be_mapped_is_refused():
    with pytest.raises(SpecError, match="kind is one of"):
        NormGrad("conv5x5")
    with pytest.raises(SpecError, match="ran no layer"):
        NormGrad().maps(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.zeros(1, 3, 2, 2), torch.tensor([0]))


# ---- salient-relevance ----


def test_relevance_is_conserved_and_is_the_gradient_times_the_input_below_the_linear_layer():
    model, pixels, classes = small(), some(), torch.tensor([1, 4, 0])
    layers = SalientRelevance().relevance(model, pixels, classes)
    scores = model(pixels).gather(1, classes[:, None])[:, 0].detach()
    assert len(layers) == 14 and layers[0].shape == pixels.shape
    assert all(torch.allclose(x.flatten(1).sum(1), scores, rtol=1e-5) for x in layers)
    given = pixels.clone().requires_grad_()
    features = model[:-1](given)
    positive = model[-1].weight.detach().clamp(min=0)[classes]
    share = positive * (scores / (features.detach() * positive).sum(1))[:, None]
    (features * share).sum().backward()
    assert torch.allclose(layers[0], pixels * given.grad, atol=1e-7)


def test_relevance_is_refused_where_there_is_no_rule_or_no_chain():
    with pytest.raises(Unsupported, match="has no rule"):
        SalientRelevance().relevance(nn.Sequential(nn.Flatten(), nn.Sigmoid()), some(1), torch.tensor([0]))


def test_what_stands_out_is_that_of_the_equation():
    """One scale of 8 x 8, patches of a pixel: every pair of patches in loops."""
    shown = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shown /= shown.max()
    found = SalientRelevance((1.0,), patch=1, alike=10).salience(shown)[0]
    others, where = [], []
    for side in (8, 4, 2):
        less = F.interpolate(shown, (side, side), mode="bilinear", antialias=True)[0]
        for y in range(side):
            for x in range(side):
                others.append(less[:, y, x])
                where.append(torch.tensor([(y + 0.5) / side, (x + 0.5) / side], dtype=torch.float64))
    most = max(float((a - b).norm()) for a in others[:64] for b in others)
    out = []
    for a, at in zip(others[:64], where[:64], strict=True):
        d = [float((a - b).norm() / most / (1 + 3 * (at - to).norm())) for b, to in zip(others, where, strict=True)]
        out.append(1 - math.exp(-sum(sorted(d)[:10]) / 10))
    foci = [at for at, value in zip(where[:64], out, strict=True) if value >= 0.8 * max(out)]
    away = [min(float((at - focus).norm()) for focus in foci) for at in where[:64]]
    wanted = [value * (1 - far / max(away)) for value, far in zip(out, away, strict=True)]
    assert found.flatten().tolist() == pytest.approx(wanted, abs=1e-6)


def test_an_odd_area_stands_out_and_covers_it():
    relevance, mask = torch.zeros(1, 3, 24, 24), torch.zeros(1, 24, 24, dtype=torch.bool)
    mask[:, 6:13, 9:16] = True
    spots = torch.rand(24, 24, generator=torch.Generator().manual_seed(0)) > 0.6
    relevance[0, :, mask[0] & spots] = 1.0
    system = SalientRelevance()
    assert covering(system.salience(relevance), mask) > 1.2 * covering(relevance.sum(1), mask)
    assert not system.salience(torch.zeros(1, 3, 24, 24)).any()
    assert covering(mask.float(), mask).tolist() == [1] and covering(1 - mask.float(), mask).tolist() == [0]


# ---- layer-masking ----


def test_a_full_mask_changes_nothing_and_after_the_context_nothing_is_left():
    model, pixels = small(), some()
    system, wanted = LayerMasking(), model(pixels)
    assert torch.allclose(system.masked(model, pixels, torch.ones(3, 16, 16)), wanted)
    with system.apply(model):
        assert torch.equal(model(pixels), wanted)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())


def test_what_is_masked_cannot_be_seen():
    """Whatever lies there gives the same; without layer masking the hole's colour is seen."""
    model, pixels, mask = small(), some(), torch.ones(3, 16, 16)
    mask[:, 4:9, 6:12] = 0
    first = LayerMasking().masked(model, pixels, mask)
    other = torch.where(mask[:, None] == 1, pixels, 7)
    assert torch.equal(LayerMasking().masked(model, other, mask), first)
    assert not torch.allclose(model(other), model(torch.where(mask[:, None] == 1, pixels, 0)))


def test_places_far_from_the_seen_part_are_left_out_of_the_mean():
    """Of a plain ground, any part says the same as all of it where the mask is no edge: a network of 1 x 1 layers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    ground = torch.tensor([0.2, -0.3, 0.8])[None, :, None, None].expand(1, 3, 8, 8)
    mask = torch.zeros(1, 8, 8)
    mask[0, 1, 5] = 1
    assert torch.allclose(LayerMasking().masked(model, ground, mask), model(ground), atol=1e-6)


def test_layers_and_masks_are_those_of_the_equations():
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 4, 3, stride=2, padding=1)
    x, mask = torch.randn(1, 2, 7, 7), (torch.rand(1, 1, 7, 7) > 0.5).float()
    with torch.no_grad():
        full, m = x * mask, mask.clone()
        for _ in range(3):
            for_x, for_m = full.clone(), m.clone()
            for i in range(7):
                for j in range(7):
                    near = (..., slice(max(i - 1, 0), i + 2), slice(max(j - 1, 0), j + 2))
                    count = for_m[near].sum()
                    if for_m[0, 0, i, j] == 0:
                        full[0, :, i, j] += for_x[near].sum((0, 2, 3)) / (count + 1e-5)
                    m[0, 0, i, j] = min(1, for_m[0, 0, i, j] + count)
        assert torch.allclose(filled(x, mask, 3), full, atol=1e-5)
        wanted = conv(full) * F.max_pool2d(mask, 3, 2, 1)
        assert torch.allclose(LayerMasking().masked(nn.Sequential(conv), x, mask[:, 0]), wanted, atol=1e-5)


def test_branches_of_other_sizes_are_refused():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1, stride=2), nn.Conv2d(3, 3, 1, stride=2)

        def forward(self, x):
            return self.a(x) + self.b(x)

    with pytest.raises(Unsupported, match="plain chains"):
        LayerMasking().masked(Branches(), some(1).float(), torch.ones(1, 16, 16))


def test_lime_finds_the_squares_that_a_planted_model_counts():
    def says(pixels, masks):
        seen = masks[:, 8:16, 4:8].float().mean((1, 2))
        return torch.stack([8 * seen, torch.zeros_like(seen)], 1)

    squares = lime(says, torch.zeros(3, 32, 32), 0)
    wanted = torch.zeros(32, 32, dtype=torch.bool)
    wanted[8:16, 4:8] = True
    assert covering(squares[None], wanted[None]).tolist() == [1]


def test_lime_is_a_weighted_ridge_with_an_intercept():
    """The kernel by the share of squares that are seen, the intercept as a column that is not penalized."""
    seen = {}

    def says(pixels, masks):
        seen["on"] = masks[:, ::4, ::4].flatten(1).double()
        logits = torch.stack([seen["on"] @ torch.linspace(-0.1, 0.2, 64).double(), torch.zeros(len(masks)).double()], 1)
        seen["said"] = logits.softmax(1)[:, 0]
        return logits.float()

    found = lime(says, torch.zeros(3, 32, 32), 0)[::4, ::4].flatten().double()
    weights = (-(1 - seen["on"].mean(1).sqrt()).square() / 0.25**2 / 2).exp()[:, None]
    x = nn.functional.pad(seen["on"], (0, 1), value=1)
    penalty = torch.ones(65).double()
    penalty[-1] = 0
    wanted = torch.linalg.solve(x.T @ (weights * x) + penalty.diag(), x.T @ (weights[:, 0] * seen["said"]))[:-1]
    assert torch.allclose(found, wanted, atol=1e-5) and found.abs().max() > 1e-3


# ---- acat ----


def test_one_step_without_an_autoencoder_is_along_the_gradient():
    """Of a linear classifier: the saliency is the size of its weights, and the class flips when the step is long."""
    weights = torch.zeros(2, 1, 8, 8)
    weights[1, 0, 2:4, 5:7] = torch.tensor([[1.0, 2], [3, 4]])
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2, bias=False))
    model[1].weight.data = weights.flatten(1)
    pixels = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    picture, saliency = ACAT(1, 6.0, 0.0).counterfactual(model, nn.Identity(), nn.Identity(), pixels)
    assert not pixels.requires_grad
    assert torch.allclose(saliency, (weights[1] / 4).expand(3, -1, -1), atol=1e-5)
    assert torch.allclose((picture - pixels).flatten(1).norm(dim=1), torch.tensor(6.0))
    assert (model(pixels).argmax(1) == 1).all() and (model(picture).argmax(1) == 0).all()


def test_staying_near_keeps_the_picture_nearer():
    model, (encoder, decoder) = classifier(0), autoencoder()
    pixels = scans(0, 8)[0]
    other = model(pixels).argmin(1)
    moved = {}
    for keep in (0.0, 1e3):
        picture, saliency = ACAT(4, 1.0, keep).counterfactual(model, encoder, decoder, pixels)
        moved[keep] = float((picture - decoder(encoder(pixels))).abs().mean().detach())
        assert saliency.amax((1, 2)).tolist() == pytest.approx([1] * 8)
        if not keep:
            towards = model(picture) - model(decoder(encoder(pixels)))
            assert (towards.gather(1, other[:, None]) > towards.gather(1, 1 - other[:, None])).all()
    assert moved[1e3] < moved[0.0] * 0.8


def test_masks_multiply_every_pooling_and_learn():
    model, pixels = classifier(0), scans(0, 4)[0]
    plain = model(pixels)
    with ACAT().apply(model) as branch:
        assert torch.equal(model(pixels), plain)  # has not looked yet
        branch.look(torch.rand(4, 32, 32))
        masks = list(branch.masks)
        assert [m.shape for m in masks] == [(4, 1, n, n) for n in (16, 8, 4)]
        x = pixels
        for i, layer in enumerate(model):
            x = layer.forward(x) * masks[i // 3] if i in (2, 5, 8) else layer.forward(x)
        found = model(pixels)
        assert torch.allclose(found, x) and not torch.allclose(found, plain)
        found.sum().backward()
        assert all(p.grad.abs().sum() > 0 for head in branch.heads for p in head.parameters())
    assert torch.equal(model(pixels), plain)


def test_lesions_lie_where_the_scans_say():
    pixels, sick, regions = scans(3, 400)
    lesions = pixels[sick == 1].relu()[:, 0] ** 4  # faint, so right in more than a sixth of them, not in all
    assert 150 < int(sick.sum()) < 250 and located(lesions, regions[sick == 1]) > 0.4
    planted = torch.zeros(2, 32, 32)
    planted[0, 20, 30] = planted[1, 3, 12] = 1
    assert located(planted, torch.tensor([5, 1])) == 1 and located(planted, torch.tensor([5, 0])) == 0.5


@pytest.mark.parametrize("slug", ["normgrad", "salient-relevance", "layer-masking", "acat"])
def test_no_law_fails(slug):
    assert not [r for r in laws.check(catalog.find(slug)) if r.status == "failed"]
