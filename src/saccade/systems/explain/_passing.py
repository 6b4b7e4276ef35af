"""What goes through a model's modules while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn


@contextmanager
def passing(model: nn.Module, wanted: Callable[[str, nn.Module], bool]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """A dict that fills, while a model runs, with the input and the output of the modules that are wanted, by path."""
    kept: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            kept[path] = args[0], output

        return hook

    with ExitStack() as stack:
        for path, module in model.named_modules():
            if wanted(path, module):
                stack.callback(module.register_forward_hook(keep(path)).remove)
        yield kept
