"""Normalizers: from a row of scores to a row of weights.

Every normalizer sees whole rows (all keys a query may see), with ``-inf`` where the mask hides a key, and must give
such a place the weight 0; a row of nothing but ``-inf`` gives zeros.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .errors import SpecError
from .tile import At, Part, per_head

HIDDEN = float("-inf")


class Normalizer(Part):
    """Base of all normalizers: :meth:`forward` is the definition, the rest is speed."""

    unit_rows = False  # weights of a row that sees something sum to one

    def forward(self, scores: Tensor, at: At) -> Tensor:
        """Weights of a tile, out of place and differentiable."""
        raise NotImplementedError

    def inplace(self, scores: Tensor, at: At) -> Tensor:
        """The same where no gradient is wanted; may overwrite ``scores``."""
        return self.forward(scores, at)

    def backward_inplace(self, weights: Tensor, grad: Tensor, at: At) -> Tensor | None:
        """Gradient of the scores from weights and their gradient (may overwrite ``grad``).

        ``None`` if there is no closed form that needs the weights alone; then autograd does it.
        """
        return None


class Softmax(Normalizer):
    """``exp(s) / (sum exp(s) + exp(sink))``.

    Args:
        sink: logit of a key that takes mass and has no value: a number, or one per head ``[H]`` (GPT-OSS).
        off_by_one: a sink of 0: ``exp(s) / (1 + sum exp(s))``.
    """

    sink: Tensor | float | None

    def __init__(self, sink: Tensor | float | None = None, off_by_one: bool = False):
        super().__init__()
        if off_by_one and sink is not None:
            raise SpecError("Softmax: off_by_one is a sink of 0; give one or the other")
        self.hold("sink", 0.0 if off_by_one else sink)

    @property
    def unit_rows(self) -> bool:  # type: ignore[override]
        return self.sink is None

    def forward(self, scores: Tensor, at: At) -> Tensor:
        top = scores.amax(-1, keepdim=True).detach()
        sink = per_head(self.sink, at, "Softmax's sink") if self.sink is not None else None
        if sink is not None:
            sink = torch.as_tensor(sink, dtype=scores.dtype, device=scores.device)
            top = torch.maximum(top, sink.detach())
        raised = torch.exp(scores - top.masked_fill(top == HIDDEN, 0))
        total = raised.sum(-1, keepdim=True)
        if sink is not None:
            total = total + torch.exp(sink - top)
        return raised / total.masked_fill(total == 0, 1)

    def inplace(self, scores: Tensor, at: At) -> Tensor:
        return self.from_scores(scores, at, None, out=scores)[0]

    def from_scores(self, scores: Tensor, at: At, top: Tensor | None, out: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weights in ``out``, and the log-sum-exp if the row maximum ``top`` is given or ``out`` spares the scores."""
        if self.sink is not None and top is None:
            top = scores.amax(-1)
        weights = torch.softmax(scores, -1, out=out)
        if top is None and out is scores:
            return weights, None
        lse = _logsumexp(scores, weights, top)
        if self.sink is not None:
            weights.mul_(torch.sigmoid(lse[..., None] - per_head(self.sink, at, "Softmax's sink")))
        return weights, lse

    def backward_inplace(self, weights: Tensor, grad: Tensor, at: At) -> Tensor | None:
        return grad.sub_(row_dot(weights, grad)).mul_(weights)


def _logsumexp(scores: Tensor, weights: Tensor, top: Tensor | None) -> Tensor:
    """``[g, r, n]`` from a softmax, without a second exponential: a weight is ``exp(s - lse)``.

    Any key tells. The first one costs nothing to find, but its weight may have vanished; the greatest has not.
    """
    if top is None:
        first = weights[..., 0]
        if weights.device.type == "cpu" and bool((first >= torch.finfo(first.dtype).tiny).all()):
            return scores[..., 0] - first.log()
        top = scores.amax(-1)
    return torch.where(top == HIDDEN, top, top - weights.amax(-1).log())


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """``sum(a * b, -1, keepdim=True)`` without a temporary of their size."""
    return torch.einsum("grnm,grnm->grn", a, b)[..., None]


class Sigmoid(Normalizer):
    """``sigmoid(s + bias)``, without a row normalizer (arXiv:2409.04431).

    Args:
        bias: a number, one per head ``[H]``, or ``None`` for the paper's ``-log M``, M the number of keys.
    """

    bias: Tensor | float | None

    def __init__(self, bias: Tensor | float | None = None):
        super().__init__()
        self.hold("bias", bias)

    def _bias(self, at: At) -> Tensor | float:
        return -math.log(at.m) if self.bias is None else per_head(self.bias, at, "Sigmoid's bias")

    def forward(self, scores: Tensor, at: At) -> Tensor:
        return torch.sigmoid(scores + self._bias(at))

    def inplace(self, scores: Tensor, at: At) -> Tensor:
        return scores.add_(self._bias(at)).sigmoid_()

    def backward_inplace(self, weights: Tensor, grad: Tensor, at: At) -> Tensor | None:
        return grad.mul_(weights).mul_(1 - weights)


class ReLU(Normalizer):
    """``relu(s)``, divided by its row sum if ``row_norm``, and by ``divisor`` (such as the length) if given."""

    def __init__(self, row_norm: bool = False, divisor: float | None = None):
        super().__init__()
        self.row_norm, self.divisor = row_norm, divisor

    def forward(self, scores: Tensor, at: At) -> Tensor:
        weights = torch.relu(scores)
        if self.row_norm:
            total = weights.sum(-1, keepdim=True)
            weights = weights / total.masked_fill(total == 0, 1)
        return weights if self.divisor is None else weights / self.divisor


class Identity(Normalizer):
    """The scores themselves."""

    def forward(self, scores: Tensor, at: At) -> Tensor:
        return scores.masked_fill(scores == HIDDEN, 0)


class Signed(Normalizer):
    """``sign(s) * softmax(|s|)``: weights may be negative (Cog attention, arXiv:2411.07176)."""

    def forward(self, scores: Tensor, at: At) -> Tensor:
        size = scores.abs().masked_fill(scores == HIDDEN, HIDDEN)
        return torch.sign(scores) * Softmax().forward(size, at)

    def inplace(self, scores: Tensor, at: At) -> Tensor:
        size = torch.where(scores == HIDDEN, scores, scores.abs())
        empty = scores.amax(-1, keepdim=True) == HIDDEN
        torch.softmax(size, -1, out=size)
        return size.copysign_(scores).mul_(scores != 0).masked_fill_(empty, 0)

    def backward_inplace(self, weights: Tensor, grad: Tensor, at: At) -> Tensor | None:
        mean = row_dot(weights, grad)
        return grad.mul_(weights.abs()).addcmul_(weights, mean, value=-1)


class TopKSoftmax(Normalizer):
    """Softmax over the ``k`` greatest scores of each row, zero elsewhere."""

    unit_rows = True

    def __init__(self, k: int):
        super().__init__()
        if k < 1:
            raise SpecError(f"TopKSoftmax needs k >= 1; got {k}")
        self.k = k

    def forward(self, scores: Tensor, at: At) -> Tensor:
        if self.k >= scores.shape[-1]:
            return Softmax().forward(scores, at)
        best, index = scores.topk(self.k, -1)
        weights = Softmax().forward(best, at)
        return torch.zeros_like(scores).scatter(-1, index, weights)

    def backward_inplace(self, weights: Tensor, grad: Tensor, at: At) -> Tensor | None:
        return grad.sub_(row_dot(weights, grad)).mul_(weights)


class Entmax(Normalizer):
    """Alpha-entmax (arXiv:1905.05702, 1909.00015): exact zeros; softmax at alpha 1, sparsemax at alpha 2.

    The weights are ``((alpha - 1) s - tau)_+ ^ (1 / (alpha - 1))`` with the threshold tau that makes the row sum to
    one. Newton's method finds tau from the left, where the row sum is convex for alpha up to 2; above 2, bisection.

    Args:
        alpha: above 1; a number, or learned: a parameter, scalar or one per head ``[H]`` (see :class:`LearnedEntmax`).
    """

    unit_rows = True

    alpha: Tensor | float

    def __init__(self, alpha: Tensor | float = 1.5):
        super().__init__()
        if not isinstance(alpha, Tensor) and alpha <= 1:
            raise SpecError(f"Entmax needs alpha > 1 (alpha = 1 is Softmax); got {alpha}")
        self.hold("alpha", alpha)

    def _alpha(self, at: At, like: Tensor) -> Tensor | float:
        alpha = per_head(self.alpha, at, "Entmax's alpha")
        return alpha.to(like.dtype) if isinstance(alpha, Tensor) else alpha

    def forward(self, scores: Tensor, at: At) -> Tensor:
        alpha = self._alpha(at, scores)
        top = scores.amax(-1, keepdim=True).detach()
        empty = top == HIDDEN
        hidden = scores == HIDDEN  # kept out of the product, where 0 times infinity would reach alpha's gradient
        z = (scores.masked_fill(hidden, 0) - top.masked_fill(empty, 0)) * (alpha - 1)
        z = z.masked_fill(hidden, HIDDEN)
        with torch.no_grad():
            tau = _threshold(z.detach(), _plain(alpha)).masked_fill(empty, 0)
        # One Newton step that autograd follows gives tau the gradient of the implicit function.
        slack = z - tau
        power = 1 / (alpha - 1)
        inside = slack > 0
        safe = torch.where(inside, slack, 1)
        raised = torch.where(inside, safe**power, 0)
        slope = torch.where(inside, safe ** (power - 1), 0).sum(-1, keepdim=True) * power
        step = (raised.sum(-1, keepdim=True) - 1) / torch.as_tensor(slope).detach().masked_fill(empty, 1)
        slack = slack - step.masked_fill(empty, 0)
        inside = slack > 0
        weights = torch.where(inside, torch.where(inside, slack, 1) ** power, 0)
        return weights.masked_fill(empty, 0)

    def inplace(self, scores: Tensor, at: At) -> Tensor:
        alpha = _plain(self._alpha(at, scores))
        top = scores.amax(-1, keepdim=True)
        z = scores.sub_(top.masked_fill(top == HIDDEN, 0)).mul_(alpha - 1)
        tau = _threshold(z, alpha)
        return _raise(z.sub_(tau).clamp_(min=0), 1 / (alpha - 1)).masked_fill_(top == HIDDEN, 0)

    def backward_inplace(self, weights: Tensor, grad: Tensor, at: At) -> Tensor | None:
        if isinstance(self.alpha, Tensor) and self.alpha.requires_grad:
            return None
        alpha = self._alpha(at, weights)
        if isinstance(alpha, float) and alpha == 2:
            gain = (weights > 0).to(weights.dtype)
        elif isinstance(alpha, float) and alpha == 1.5:
            gain = weights.sqrt()
        else:
            gain = torch.where(weights > 0, weights ** (2 - alpha), 0)
        total = gain.sum(-1, keepdim=True)
        mean = row_dot(gain, grad) / total.masked_fill(total == 0, 1)
        return grad.sub_(mean).mul_(gain)


def _plain(alpha: Tensor | float) -> Tensor | float:
    return alpha.detach() if isinstance(alpha, Tensor) else alpha


def _raise(x: Tensor, power: Tensor | float) -> Tensor:
    """``x ** power`` in place for ``x >= 0``; the powers of sparsemax and 1.5-entmax are spared the logarithm."""
    if isinstance(power, float) and power == 1:
        return x
    if isinstance(power, float) and power == 2:
        return x.square_()
    return x.pow_(power)


def _threshold(z: Tensor, alpha: Tensor | float, steps: int = 60) -> Tensor:
    """The tau at which ``sum (z - tau)_+ ^ (1/(alpha-1))`` is one, for rows ``z`` with maximum 0."""
    power = 1 / (alpha - 1)
    hard = (power < 1).any() if isinstance(power, Tensor) else power < 1
    tau = z.new_full((*z.shape[:-1], 1), -1.0)
    if hard:
        width = 1.0
        for _ in range(steps):
            width /= 2
            middle = tau + width
            total = _raise((z - middle).clamp_(min=0), power).sum(-1, keepdim=True)
            tau = torch.where(total >= 1, middle, tau)
        return tau
    slack = torch.empty_like(z)
    for _ in range(steps):
        torch.sub(z, tau, out=slack).clamp_(min=0)
        if isinstance(power, float) and power == 2:  # sum of squares and its slope need no temporaries
            total = row_dot(slack, slack)
            slope = 2 * slack.sum(-1, keepdim=True)
        elif isinstance(power, float) and power == 1:
            total = slack.sum(-1, keepdim=True)
            slope = (slack > 0).sum(-1, keepdim=True).to(z.dtype)
        else:
            raised = torch.where(slack > 0, slack ** (power - 1), 0)
            slope = power * raised.sum(-1, keepdim=True)
            total = row_dot(raised, slack)
        step = torch.where(slope > 0, (total - 1) / slope, 0)  # an empty row has no slope and needs no step
        tau = tau + step
        if bool((step.abs() <= 4 * torch.finfo(z.dtype).eps).all()):
            break
    return tau


class LearnedEntmax(Entmax):
    """Entmax with ``alpha = 1 + sigmoid(a)`` per head, learned, as in Adaptively Sparse Transformers."""

    def __init__(self, heads: int):
        super().__init__(alpha=nn.Parameter(torch.zeros(heads)))

    def _alpha(self, at: At, like: Tensor) -> Tensor | float:
        shape = per_head(self.alpha, at, "LearnedEntmax's shape")
        return 1 + torch.sigmoid(torch.as_tensor(shape)).to(like.dtype)


class Sparsemax(Entmax):
    """Euclidean projection of the row onto the simplex (arXiv:1602.02068): entmax at alpha 2."""

    def __init__(self) -> None:
        super().__init__(alpha=2.0)
