"""Single heads of a model: their weights edited, and their outputs read and replaced.

Outputs can be had right before the projection that adds them up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from ...core.edits import Edit
from ...core.errors import SpecError, Unsupported
from ...hosts.acts import Site, pick
from ...hosts.handles import edit, host_of

Heads = Sequence[tuple[int, int]]
"""Some heads of a model, as (layer, head) pairs."""


def pairs(scores: Tensor) -> list[tuple[int, int]]:
    """Every (layer, head) of scores ``[layers, heads]``."""
    return [(layer, head) for layer in range(len(scores)) for head in range(scores.shape[1])]


def edited(model: nn.Module, change: Edit, chosen: Heads) -> AbstractContextManager[Any]:
    """Edit the weights of the chosen heads. Raises SpecError if the model has no such layer or head."""
    with ExitStack() as stack:
        for layer in sorted({layer for layer, _ in chosen}):
            mine = [head for at, head in chosen if at == layer]
            stack.enter_context(edit(model, change, layers=layer, heads=mine))
        return stack.pop_all()


def projections(model: nn.Module, layers: Any = None) -> list[tuple[Site, nn.Linear]]:
    """Each self-attention of a model (``layers`` as for :func:`saccade.install`) and its output projection.

    Raises:
        SpecError: the model has no such layer.
        Unsupported: its attention has no ``o_proj``.
    """
    found = []
    for site in pick(host_of(model).sites(), type(model).__name__, layers, "self"):
        projection = getattr(site.module, "o_proj", None)
        if not isinstance(projection, nn.Linear):
            raise Unsupported(f"{site.path} ({type(site.module).__name__}) has no o_proj, where its heads are added up")
        found.append((site, projection))
    return found


def refuse_others(model: nn.Module, pairs: Heads) -> None:
    """Refuse heads that are not there."""
    there = {site.layer: site.heads for site, _ in projections(model)}
    wrong = [pair for pair in pairs if not 0 <= pair[1] < there.get(pair[0], 0)]
    if wrong:
        raise SpecError(f"heads must be (layer, head) pairs of {there} (layer: heads); got {wrong}")


@contextmanager
def heads(model: nn.Module, do: Callable[[int, Tensor], Tensor | None], layers: Any = None) -> Iterator[None]:
    """Call ``do(layer, z)`` with every layer's head outputs ``z [B, N, H, D]``; what it returns takes their place."""

    def hook(site: Site) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor] | None]:
        def before(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
            new = do(site.layer, args[0].unflatten(-1, (site.heads, -1)))
            return None if new is None else (new.flatten(-2),)

        return before

    with ExitStack() as stack:
        for site, projection in projections(model, layers):
            stack.callback(projection.register_forward_pre_hook(hook(site)).remove)
        yield
