"""The vision transformer of the zoo: its recipe trains, what ships is the real class and names shapes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers")

import transformers

from saccade import zoo
from saccade.worlds.shapes import CLASSES, batch, shapes
from saccade.zoo import vit

TINY = vit.Recipe(side=16, patch=4, hidden=16, layers=1, heads=2, mlp=16, rows=4, warmup=2)


def test_training_writes_what_loads_and_a_seed_decides_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vit, "evaluate", lambda out: {"accuracy": 0.25})
    told: list[int] = []
    first, same, other = (
        load_file(
            vit.train(tmp_path / name, steps=3, seed=seed, recipe=TINY, on_step=told.append) / "model.safetensors"
        )
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert told == [1, 2, 3] * 3
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    card = json.loads((tmp_path / "a" / "card.json").read_text())
    assert card["steps"] == 3 and card["skill"] == {"accuracy": 0.25} and card["recipe"] == asdict(TINY)
    assert card["parameters"] == sum(p.numel() for p in first.values())


def test_the_loss_falls() -> None:
    """A few steps on one batch: the recipe's model and pixels learn it."""
    torch.manual_seed(0)
    model, scene = vit.build_model(TINY), batch(shapes(0, side=16), 6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = model(vit.normalized(scene.pixels), labels=scene.classes[:, 0]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4


def test_what_ships_names_shapes_through_the_hosts_own_classes() -> None:
    where = zoo.path("vit")
    card = json.loads((where / "card.json").read_text())
    assert sum(file.stat().st_size for file in where.iterdir()) < 2e6
    assert card["recipe"] == asdict(vit.Recipe()) and card["steps"] == vit.STEPS
    model = transformers.AutoModelForImageClassification.from_pretrained(where).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(where)
    assert model.config.id2label == dict(enumerate(CLASSES))
    scene = batch(shapes("unseen"), 100)
    images = [(255 * pixels).round().byte().movedim(0, -1).numpy() for pixels in scene.pixels]
    read = processor(images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(read, vit.normalized(scene.pixels), rtol=0, atol=0.01)
    with torch.no_grad():
        right = model(read).logits.argmax(-1) == scene.classes[:, 0]
    assert float(right.float().mean()) > card["skill"]["accuracy"] - 0.08
    assert card["skill"]["accuracy"] > 0.9 and card["skill"]["examples"] >= 1000
