"""Regions by name: "image", "question", ... stand for tokens of each sample, found when the model is called.

A region of an edit or a stat may name its keys: ``edits.Scale(0.5, keys="image")``. What the name means is given to the
handle (``regions={"question": ...}``), or known: "image" are the tokens that the model's config calls so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..core.errors import SpecError
from ..core.tile import Part, Region

AnyPart = TypeVar("AnyPart", bound=Part)
Meaning = slice | int | list[int] | Tensor | Callable[[Tensor], Tensor]


class Names:
    """What the names of a handle's regions mean in the text that a model is reading.

    Args:
        model: of transformers; its calls are listened to while there are names.
        wanted: names in use.
        given: name to meaning. A slice, an int or a list: places counted from each text's first token. A bool tensor
            ``[B, N]`` or ``[N]``: of the prompt. A function of the token ids ``[B, N]`` of a call: bool ``[B, N]``.
    """

    def __init__(self, model: nn.Module, wanted: Iterable[str], given: Mapping[str, Meaning]):
        self.meanings: dict[str, Meaning] = dict(given)
        config: Any = getattr(model, "config", None)
        for attribute in ("image_token_id", "image_token_index"):
            token = getattr(config, attribute, None)
            if token is not None:
                self.meanings.setdefault("image", partial(torch.eq, other=token))
        unknown = sorted(set(wanted) - set(self.meanings))
        if unknown:
            raise SpecError(
                f"region {unknown[0]!r} has no meaning here: give regions={{{unknown[0]!r}: ...}}; known are"
                f" {sorted(self.meanings) or 'none'}"
            )
        self.inside: dict[str, Tensor] = {}  # [B, tokens so far]
        self._hook = model.register_forward_pre_hook(self._read, with_kwargs=True)

    def close(self) -> None:
        """Stop listening."""
        self._hook.remove()

    def _read(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise SpecError(f"{type(model).__name__} was called without input_ids, so named regions cannot be found")
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        padding = kwargs.get("attention_mask")
        first = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
        if padding is not None and padding.ndim == 2:
            first = padding.to(torch.int64).argmax(-1)
        for name, meaning in self.meanings.items():
            new = self._of(name, meaning, ids, past, first)
            before = self.inside.get(name)
            whole = new if past == 0 or before is None else torch.cat([before[:, :past], new], 1)
            self.inside[name] = torch.nn.functional.pad(whole, (past + ids.shape[1] - whole.shape[1], 0))

    @staticmethod
    def _of(name: str, meaning: Meaning, ids: Tensor, past: int, first: Tensor) -> Tensor:
        batch, new = ids.shape
        if callable(meaning) and not isinstance(meaning, Tensor):
            found = torch.as_tensor(meaning(ids))
            if found.shape != ids.shape or found.dtype != torch.bool:
                raise SpecError(f"region {name!r}: its function must give bool {tuple(ids.shape)}; got {found.shape}")
            return found
        place = torch.arange(past, past + new, device=ids.device)
        if isinstance(meaning, Tensor) and meaning.dtype == torch.bool:
            table = meaning.to(ids.device).expand(batch, -1)
            table = torch.nn.functional.pad(table, (0, max(0, past + new - table.shape[1])))
            return table[:, past : past + new]
        own = place - first[:, None]  # counted from each text's first token
        if isinstance(meaning, slice):
            low, high = meaning.start or 0, 2**62 if meaning.stop is None else meaning.stop
            if low < 0 or high < 0 or meaning.step not in (None, 1):
                raise SpecError(f"region {name!r}: expected a slice from the front, without a step; got {meaning}")
            return (own >= low) & (own < high)
        return torch.isin(own, torch.as_tensor(meaning, device=ids.device).reshape(-1))

    def bind(self, part: AnyPart, keys: int) -> AnyPart:
        """A part whose named regions are those of the ``keys`` tokens that are there now."""

        def found(region: Region) -> Region:
            if not isinstance(region.keys, str):
                return region
            table = self.inside[region.keys]
            return Region(table[:, table.shape[1] - keys :], region.queries, region.heads)

        bound = copy.copy(part)
        for attribute, value in vars(part).items():
            if isinstance(value, Region):
                bound.__dict__[attribute] = found(value)
            elif isinstance(value, dict) and value and all(isinstance(r, Region) for r in value.values()):
                bound.__dict__[attribute] = {name: found(r) for name, r in value.items()}
        return bound


def names(parts: Iterable[Any]) -> set[str]:
    """The names that the regions of some parts use."""
    used = set()
    for part in parts:
        for value in vars(part).values():
            some = value.values() if isinstance(value, dict) else [value]
            used |= {r.keys for r in some if isinstance(r, Region) and isinstance(r.keys, str)}
    return used
