"""What every verb checks of its tensors before anything runs."""

from __future__ import annotations

from torch import Tensor

from .errors import SpecError


def described(q: Tensor, k: Tensor, v: Tensor | None) -> str:
    """The shapes of queries, keys and values (if there are any), for messages.

    Raises:
        SpecError: not ``[batch, heads, length, width]``, or dtypes, devices or lengths that differ.
    """
    given = {"q": q, "k": k} | ({} if v is None else {"v": v})
    for name, x in given.items():
        if not isinstance(x, Tensor) or x.ndim != 4:
            what = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise SpecError(f"{name} must be [batch, heads, length, width]; got {what}")
    if len({x.dtype for x in given.values()}) > 1 or not q.is_floating_point():
        kinds = ", ".join(f"{name} {x.dtype}" for name, x in given.items())
        raise SpecError(f"q, k and v must share one floating dtype: {kinds}. Cast them with .to(q.dtype).")
    if len({x.device for x in given.values()}) > 1:
        raise SpecError(f"q, k and v must be on one device: {', '.join(str(x.device) for x in given.values())}")
    shown = ", ".join(f"{name} {tuple(x.shape)}" for name, x in given.items())
    if v is not None and k.shape[2] != v.shape[2]:
        raise SpecError(f"k and v must have the same length: {shown}")
    return shown
