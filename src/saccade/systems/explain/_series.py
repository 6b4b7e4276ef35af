"""Time series of which it is known what matters: rare features of noise with memory, and two hidden states.

Both, and the areas by which masks are held against what matters, as in https://github.com/josephenguehard/time_interpret
(tint/datasets/arma.py, hmm.py; tint/metrics/white_box).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SERIES, TIMES, FEATURES, RARE = 20, 50, 50, 5


def areas(found: Tensor, true: Tensor) -> tuple[float, float]:
    """Areas under precision and under recall over the threshold, of masks stretched from 0 to 1, series by series."""
    flat = found.flatten(1).double()
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    values, order = ((flat - low) / (high - low + 1e-5)).flatten().sort(descending=True)
    hits = true.flatten()[order].double().cumsum(0)
    last = torch.cat([values[1:] != values[:-1], torch.ones(1, dtype=torch.bool)])  # of each threshold
    precision, recall = (hits / torch.arange(1, len(hits) + 1))[last], (hits / hits[-1])[last]
    return float(-torch.trapezoid(precision, values[last])), float(-torch.trapezoid(recall, values[last]))


def arma(count: int, times: int, features: int) -> Tensor:
    """Rare data ``[count, times, features]``: 2 x[t] + 0.5 x[t-1] + 0.2 x[t-2] + 0.1 x[t-3] = 2 noise[t]."""
    noise = torch.randn(count, times, features, generator=torch.Generator().manual_seed(0))
    x = torch.zeros(count, times + 3, features)
    for t in range(times):
        x[:, t + 3] = noise[:, t] - 0.25 * x[:, t + 2] - 0.1 * x[:, t + 1] - 0.05 * x[:, t]
    return x[:, 3:]


def rare_places() -> Tensor:
    """What the rare data's model reads ``[SERIES, TIMES, FEATURES]``: a few features in the middle half of the time."""
    places = torch.zeros(SERIES, TIMES, FEATURES)
    few = torch.randperm(FEATURES, generator=torch.Generator().manual_seed(42))[:RARE]
    places[:, TIMES // 4 : 3 * TIMES // 4, few] = 1
    return places


def states(name: str, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The state data: series ``[count, TIMES, 3]``, labels and hidden states ``[count, TIMES]``.

    Labels are drawn from sigmoid(2 x) of feature 1 in state 0 and of feature 2 in state 1.
    """
    source = torch.Generator().manual_seed({"train": 0, "held": 1}[name])
    means, covariance = torch.tensor([[0.1, 1.6, 0.5], [-0.1, -0.4, -1.5]]), torch.eye(3).repeat(2, 1, 1) * 0.8
    for state in (0, 1):
        covariance[state, state + 1, 0] = covariance[state, 0, state + 1] = 0.01
    roots = torch.linalg.cholesky(covariance + 1e-3 * torch.eye(3))
    now, since, hidden = torch.randint(2, (count,), generator=source), torch.zeros(count), []
    for _ in range(TIMES):
        one = torch.where(now == 1, 0.95 - since / 500, 0.05)
        then = (torch.rand(count, generator=source) < one).long()
        since = torch.where(then == now, since + 1, 0)
        now = then
        hidden.append(now)
    which = torch.stack(hidden, 1)
    x = means[which] + (roots[which] @ torch.randn(count, TIMES, 3, 1, generator=source))[..., 0]
    read = x.gather(-1, which[..., None] + 1)[..., 0]
    return x, (torch.rand(count, TIMES, generator=source) < (2 * read).sigmoid()).long(), which


class StateClassifier(nn.Module):
    """Labels' logits ``[B, N, 2]`` of every time from the series until then."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.rnn, self.out = nn.GRU(3, width, batch_first=True), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Of series ``[B, N, 3]``."""
        return self.out(self.rnn(x)[0].relu())


def state_classifier() -> nn.Module:
    """One that was trained on the state data."""
    x, labels, _ = states("train", 400)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        model = StateClassifier()
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(300):
            some = torch.randint(len(x), (50,))
            optimizer.zero_grad()
            F.cross_entropy(model(x[some]).flatten(0, 1), labels[some].flatten()).backward()
            optimizer.step()
    return model.eval().requires_grad_(False)
