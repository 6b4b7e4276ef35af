"""ExtrMask: which places of a time series a model needs, by learning a mask and what stands where it hides.

For a series x [N, D], a mask m of numbers clamped to 0 to 1, and a small recurrent network NN,

    p = NN(x) = Linear(normalize(GRU(x), both directions))
    keep:    loss = mse(f(m x + (1 - m) p), f(x)) + mean(mask |m| + shown |p|)
    delete:  loss = mse(f((1 - m) x + m p), f(0)) + mean(mask |1 - m| + shown |p|)

are minimized over m (0.5 at first, one for every series; the penalty is of m before the clamp) and NN (one for all).
A fixed perturbation puts zero or the series' mean over time for p.

Paper: Learning Perturbations to Explain Time Series Predictions, arXiv:2305.18840
Code: https://github.com/josephenguehard/time_interpret (tint/attr/models/extremal_mask.py, tint/attr/extremal_mask.py,
    experiments/hmm/main.py, experiments/arma/main.py)

Differs: all series are one batch, baselines are zero, and NN is learned on the rare data too, where the code's
experiment has none. Claim: fewer and shorter series (20 of 50 times), a smaller classifier, and zero and the mean as
fixed perturbations, not Dynamask's search over shares that are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import SpecError
from ..base import ClaimNumbers, MethodSystem
from ._series import FEATURES, SERIES, TIMES, areas, arma, rare_places, state_classifier, states

PERTURBATIONS = ("learned", "zero", "mean")


class Learned(nn.Module):
    """What stands where the mask hides: a recurrent network over the series, ``[B, N, D]`` to the same."""

    def __init__(self, width: int):
        super().__init__()
        self.rnn = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.out = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The perturbation."""
        return self.out(F.normalize(self.rnn(x)[0], dim=-1))


class ExtrMask(MethodSystem):
    """Settings: ``perturbation``, "learned", "zero" or "mean"; ``delete`` for the second loss; weights ``mask`` and
    ``shown``; ``steps`` of Adam at ``rate``.
    """

    slug = "extrmask"
    title = "Extremal masks with learned perturbations"
    paper = "https://arxiv.org/abs/2305.18840"
    code = "https://github.com/josephenguehard/time_interpret"

    def __init__(
        self, perturbation: str = "learned", delete: bool = False, mask: float = 1.0, shown: float = 1.0,
        steps: int = 500, rate: float = 0.01,
    ):  # fmt: skip
        if perturbation not in PERTURBATIONS:
            raise SpecError(f"perturbation is one of {', '.join(PERTURBATIONS)}; got {perturbation!r}")
        self.perturbation, self.delete, self.mask, self.shown = perturbation, delete, mask, shown
        self.steps, self.rate = steps, rate

    @contextmanager
    def apply(self, model: nn.Module) -> Iterator[dict[str, Tensor]]:
        """The model reads ``m x + (1 - m) p`` for its first input x, once the dict that is given has "m" and "p"."""
        given: dict[str, Tensor] = {}

        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            return (given["m"] * args[0] + (1 - given["m"]) * given["p"], *args[1:]) if given else None

        handle = model.register_forward_pre_hook(hook)
        try:
            yield given
        finally:
            handle.remove()

    def explain(
        self, f: Callable[[Tensor], Tensor], x: Tensor, tell: Callable[[str, int], None] | None = None
    ) -> Tensor:
        """The mask of series ``[B, N, D]`` for a model of them, of any output: the same shape, 0 to 1."""
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)
            mask = torch.full_like(x, 0.5, requires_grad=True)
            learned = Learned(x.shape[-1]).to(x) if self.perturbation == "learned" else None
            optimizer = torch.optim.Adam([mask, *(learned.parameters() if learned else ())], self.rate)
            fixed = x.mean(1, keepdim=True) if self.perturbation == "mean" else torch.zeros_like(x)
            wanted = f(torch.zeros_like(x) if self.delete else x).detach()
            for _ in range(self.steps):
                optimizer.zero_grad()
                loss = self.loss(f, x, wanted, mask, learned(x) if learned else None, fixed)
                loss.backward()
                optimizer.step()
                if tell:
                    tell(f"{self.perturbation}, loss {loss.item():.3f}", 1)
        return mask.detach().clamp(0, 1)

    def loss(
        self, f: Callable[[Tensor], Tensor], x: Tensor, wanted: Tensor, m: Tensor, learned: Tensor | None, fixed: Tensor
    ) -> Tensor:
        """What is minimized, of a mask before the clamp and the learned perturbation if there is one."""
        p = fixed if learned is None else learned
        kept = 1 - m.clamp(0, 1) if self.delete else m.clamp(0, 1)
        size = self.mask * (1 - m if self.delete else m).abs()
        if learned is not None:
            size = size + self.shown * learned.abs()
        return F.mse_loss(f(kept * x + (1 - kept) * p), wanted) + size.mean()

    def claim(self) -> ClaimNumbers:
        """Areas under precision and recall of the true places, of learned and fixed perturbations on both data."""
        from ...study.progress import bar

        rare, needed = arma(SERIES, TIMES, FEATURES), rare_places()
        state, _, hidden = states("held", SERIES)
        true = F.one_hot(hidden + 1, 3).bool()
        classifier = state_classifier()
        tasks: dict[str, tuple[Callable[[Tensor], Tensor], Tensor, Tensor]] = {
            "rare": (lambda x: (x.square() * needed).sum(-1), rare, needed.bool()),
            "state": (lambda x: classifier(x), state, true),
        }
        numbers: dict[str, float] = {}
        with bar(len(tasks) * len(PERTURBATIONS) * self.steps) as tell:
            for task, (f, x, places) in tasks.items():
                for kind in PERTURBATIONS:
                    found = ExtrMask(kind, self.delete, self.mask, self.shown, self.steps, self.rate).explain(
                        f, x, tell
                    )
                    numbers[f"aup_{task}_{kind}"], numbers[f"aur_{task}_{kind}"] = areas(found, places)
        best = {
            name: max(numbers[f"{name}_{kind}"] for kind in PERTURBATIONS[1:])
            for name in ("aup_rare", "aur_rare", "aup_state", "aur_state")
        }
        return ClaimNumbers.decide(
            {name: round(value, 3) for name, value in numbers.items()},
            "Areas under precision and recall with a learned perturbation (the better fixed one): "
            + ", ".join(f"{name} {numbers[f'{name}_learned']:.2f} ({value:.2f})" for name, value in best.items())
            + ".",
            **{f"{name}_above_fixed": numbers[f"{name}_learned"] > value for name, value in best.items()},
        )
