"""Where the outputs of single heads can be read and replaced: right before the projection that adds them up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from ...core.errors import Unsupported
from ...hosts.acts import Site, pick
from ...hosts.handles import host_of


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
