"""Shapes in clutter: what is said of a scene is true of its pixels."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from saccade.worlds.shapes import CLASSES, CRUMBS, NOISE, batch, shapes


def test_a_seed_decides_everything_and_batches_are_examples() -> None:
    one, same, other = (batch(shapes(seed), 4) for seed in (3, 3, "3b"))
    assert torch.equal(one.pixels, same.pixels) and torch.equal(one.masks, same.masks)
    assert not torch.equal(one.pixels, other.pixels)
    assert one.pixels.shape == (4, 3, 32, 32) and one.classes.shape == (4, 1) and one.masks.shape == (4, 1, 32, 32)
    assert one.pixels.min() >= 0 and one.pixels.max() <= 1


def test_every_shape_occurs_and_stands_out_by_its_mask() -> None:
    """Inside the mask lies one colour, and another than the ground's, which is the median outside."""
    seen = set()
    for scene in islice(shapes(0), 60):
        seen.add(int(scene.classes[0]))
        mask = scene.masks[0]
        assert 20 < int(mask.sum()) < 0.5 * mask.numel()
        inside, outside = scene.pixels[:, mask], scene.pixels[:, ~mask]
        assert float(inside.std(1).max()) < 1.5 * NOISE
        assert float((inside.median(1).values - outside.median(1).values).abs().max()) > 0.25
    assert seen == set(range(len(CLASSES)))


def test_areas_are_the_outlines_own() -> None:
    """Area over the squared radius: of a ring 2.36, of a square 2, of a bar 1, of a disc pi ."""
    area: dict[str, list[float]] = {name: [] for name in CLASSES}
    for scene in islice(shapes(1), 200):
        mask = scene.masks[0]
        y, x = mask.nonzero().float().unbind(1)
        reach = ((x - x.mean()).square() + (y - y.mean()).square()).max()
        area[CLASSES[scene.classes[0]]].append(float(mask.sum() / reach))
    mean = {name: sum(values) / len(values) for name, values in area.items()}
    assert mean["disc"] > mean["ring"] > mean["square"] > mean["bar"]
    assert mean["disc"] == pytest.approx(torch.pi, rel=0.1)


def test_several_objects_differ_and_do_not_touch() -> None:
    for scene in islice(shapes(2, objects=3), 30):
        assert len(set(scene.classes.tolist())) == 3
        assert int(scene.masks.sum(0).max()) == 1


def test_crumbs_are_there_and_smaller() -> None:
    """Crumbs cover something, and at most what so many of radius 2 cover."""
    least = []
    for scene in islice(shapes(4), 20):
        ground = scene.pixels[:, ~scene.masks[0]].median(1).values
        strange = ((scene.pixels - ground[:, None, None]).abs().amax(0) > 0.3) & ~scene.masks[0]
        least.append(int(strange.sum()))
        assert least[-1] <= CRUMBS * 16 + 10
    assert sum(least) / len(least) > CRUMBS * 2


@pytest.mark.parametrize("setting", [{"side": 8}, {"objects": 0}, {"objects": 5}])
def test_bad_settings_are_refused(setting: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="shapes: expected"):
        next(shapes(0, **setting))
