"""`vit`: a ViTForImageClassification that names the shape in a picture; trained on two CPU cores in minutes.

train(out)     on endless scenes of :mod:`saccade.worlds.shapes`
evaluate(dir)  accuracy on held-out scenes
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..worlds.shapes import CLASSES, batch, shapes

STEPS = 1500
MEAN, DEVIATION = 0.5, 0.5  # by which the image processor shifts and scales pixels


@dataclass(frozen=True)
class Recipe:
    """Sizes and settings; patches of ``patch`` pixels, and a class token."""

    side: int = 32
    patch: int = 4
    hidden: int = 64
    layers: int = 4
    heads: int = 4
    mlp: int = 128
    rows: int = 64
    lr: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.05


def build_model(recipe: Recipe) -> Any:
    """A fresh model of this size."""
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            image_size=recipe.side,
            patch_size=recipe.patch,
            hidden_size=recipe.hidden,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            intermediate_size=recipe.mlp,
            id2label=dict(enumerate(CLASSES)),
            label2id={name: i for i, name in enumerate(CLASSES)},
        )
    )


def normalized(pixels: Tensor) -> Tensor:
    """Pixels in 0 to 1 as the model reads them."""
    return (pixels - MEAN) / DEVIATION


def train(
    out: str | Path, *, steps: int | None = None, seed: int = 0, recipe: Recipe | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Path:  # fmt: skip
    """Trains into the directory `out` and returns it. on_step is called after every step with its number."""
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
    from transformers import ViTImageProcessor

    out, recipe = Path(out), recipe or Recipe()
    steps = steps or STEPS
    start = time.monotonic()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(recipe).train()
    params = dict(model.named_parameters())
    matrices = [p for name, p in params.items() if p.ndim == 2 and "layers" in name]
    rest = [p for name, p in params.items() if p.ndim != 2 or "layers" not in name]
    optimizers = (
        torch.optim.Muon(matrices, recipe.lr, recipe.weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, recipe.lr, weight_decay=0.0),
    )
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: min((step + 1) / recipe.warmup, 1 - step / steps))
        for o in optimizers
    ]
    scenes = shapes(f"train/{seed}", side=recipe.side)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        for step in bar.track(range(steps), description="vit"):
            scene = batch(scenes, recipe.rows)
            loss = model(normalized(scene.pixels), labels=scene.classes[:, 0]).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            if (step + 1) % 100 == 0:
                bar.console.print(f"step {step + 1}/{steps} loss {loss.item():.3f}")
            if on_step is not None:
                on_step(step + 1)
    model.eval().save_pretrained(out)
    ViTImageProcessor(
        size={"height": recipe.side, "width": recipe.side}, image_mean=[MEAN] * 3, image_std=[DEVIATION] * 3
    ).save_pretrained(out)
    card = {
        "name": "vit",
        "made_by": "saccade zoo train vit",
        "parameters": sum(p.numel() for p in model.parameters()),
        "recipe": asdict(recipe),
        "steps": steps,
        "seed": seed,
        "seconds_trained": round(time.monotonic() - start),
        "torch": torch.__version__,
        "skill": evaluate(out),
    }
    (out / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    return out


@torch.no_grad()
def evaluate(directory: str | Path, *, count: int = 1000) -> dict[str, Any]:
    """Share of held-out scenes whose shape is named, in all and by shape."""
    from transformers import ViTForImageClassification

    model = ViTForImageClassification.from_pretrained(directory).eval()
    scenes = shapes("held", side=model.config.image_size)
    right: dict[str, list[bool]] = {name: [] for name in CLASSES}
    for scene in islice(scenes, count):
        said = int(model(normalized(scene.pixels[None])).logits.argmax())
        right[CLASSES[scene.classes[0]]].append(said == int(scene.classes[0]))
    answers = [answer for found in right.values() for answer in found]
    return {
        "examples": count,
        "accuracy": round(sum(answers) / count, 4),
        "by_shape": {name: round(sum(found) / max(1, len(found)), 4) for name, found in right.items()},
    }
