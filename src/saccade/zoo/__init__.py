"""Small trained checkpoints in their hosts' own formats, each with the recipe that made it."""

from __future__ import annotations

from pathlib import Path

CHECKPOINTS = Path(__file__).parent / "checkpoints"


def path(name: str = "lm") -> Path:
    """The directory of a shipped checkpoint, for the host library's own from_pretrained."""
    there = sorted(card.parent.name for card in CHECKPOINTS.glob("*/card.json"))
    if name not in there:
        raise ValueError(
            f"zoo: no checkpoint {name!r}; there is: {', '.join(there) or 'none'}. "
            "Choose one of these, or train one with `saccade zoo train NAME`"
        )
    return CHECKPOINTS / name
