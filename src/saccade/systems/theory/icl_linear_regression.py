"""What softmax attention learns from linear regression in context: pairs of heads that take a debiased step of descent.

Given (x[1], y[1]), ..., (x[L], y[L]) and q, trained heads end as

    score[h] = omega[h] q . x            (scores: diagonal, one number per head, of both signs)
    out = sum over heads h of mu[h] softmax(score[h]) y       (values: y alone; the mu sum to zero)

Two heads, +-omega and +-mu, cancel what does not depend on q. To first order in omega that is gradient descent on
centred pairs, the debiased predictor  2 omega mu / L sum over l of y[l] (x[l] - mean of x) . q.

Paper: In-Context Linear Regression Demystified, arXiv:2503.12734
Code: https://github.com/XintianPan/ICL_linear (src/models.py: MultiHeadAttention; utils/data_utils.py: LinearReg;
    utils/funcs.py: DGDEst, calculate_optimal_mu; plots.ipynb: omega = 0.13, mu = 3.45, and the single head's)

Differs: the claim trains for 2000 steps at a higher, falling rate, not for 500000 at 0.001. The program's scores are
not divided by sqrt(D), as in the paper's formulas; the trained layer's are, as in the official code.
"""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor

from ...core import edits, masks, scores
from ...core.attend import attention
from ...core.errors import SpecError
from ...core.spec import Attention
from ..base import ClaimNumbers, Promises, System
from ._regressor import PAIRS, contexts, loss_of, trained

OMEGA, MU = 0.13, 3.45  # the pair's at that setting, of plots.ipynb
DIAGONAL, ZERO = 0.2, 0.1  # what is off the diagonal, and the sum of the mu, relative to what is there
DUMMY = 0.05  # heads whose omega mu is below this share of the greatest do nothing, and may look like anything
NEAR = 1.05  # the trained heads' loss over the debiased predictor's


class IclLinearRegression(System):
    """Settings: ``omega`` and ``mu`` of the heads that come in pairs of both signs; ``causal``."""

    slug = "icl-linear-regression"
    title = "In-context regression by pairs of heads"
    paper = "https://arxiv.org/abs/2503.12734"
    code = "https://github.com/XintianPan/ICL_linear"
    promises = Promises(nonnegative=False)

    def __init__(self, omega: float = OMEGA, mu: float = MU, causal: bool = True):
        if omega <= 0:
            raise SpecError(f"icl-linear-regression: omega is above 0, its head's pair has -omega; got {omega}")
        self.omega, self.mu, self.causal = omega, mu, causal

    def build(self, heads: int) -> Attention:
        """Softmax at +-omega, its weights times +-mu; the heads' sum is the prediction."""
        signs = torch.tensor([1.0, -1.0]).repeat((heads + 1) // 2)[:heads]
        temperature = scores.Temperature(signs[:, None] / self.omega)
        mask = masks.Causal() if self.causal else masks.Full()
        return Attention([scores.Dot(1.0), temperature], mask, edits=[edits.Scale(signs * self.mu)])

    def claim(self) -> ClaimNumbers:
        """Layers of one, two and four heads and of linear attention, trained; losses, and the weights of the four."""
        models = {name: trained(heads) for name, heads in (("one", 1), ("two", 2), ("four", 4))}
        models["linear"] = trained(2, softmax=False)
        held, longer = (list(islice(contexts(99, 4096, pairs), 4)) for pairs in (PAIRS, 4 * PAIRS))
        losses = {name: loss_of(model.predict, held) for name, model in models.items()}
        far = {name: loss_of(models[name].predict, longer) for name in ("four", "linear")}
        debiased = loss_of(debiased_step, held)
        omega, rest, mu, others = (x.detach() for x in models["four"].circuits())
        active = (omega * mu).abs() > DUMMY * (omega * mu).abs().max()
        off, balance = float((rest / omega.abs())[active].max()), float(mu.sum().abs() / mu.abs().sum())
        stray = float((others / mu.abs())[active].max())
        return ClaimNumbers.decide(
            {f"loss_{name}": round(loss, 4) for name, loss in losses.items()}
            | {f"loss_{name}_at_{4 * PAIRS}": round(loss, 4) for name, loss in far.items()}
            | {"loss_debiased": round(debiased, 4), "active": active.tolist()}
            | {"omega": [round(x, 3) for x in omega.tolist()], "mu": [round(x, 3) for x in mu.tolist()]}
            | {"off_diagonal": round(off, 3), "other_entries_of_values": round(stray, 3), "balance": round(balance, 3)},
            f"Four trained heads have omega {', '.join(f'{x:+.2f}' for x in omega)} and mu"
            f" {', '.join(f'{x:+.2f}' for x in mu)}; loss {losses['four']:.3f}, of two heads {losses['two']:.3f}, of"
            f" one {losses['one']:.3f}, of the debiased step {debiased:.3f}. With {4 * PAIRS} pairs instead of {PAIRS}:"
            f" softmax {far['four']:.3f}, linear attention {far['linear']:.3f} (from {losses['linear']:.3f}).",
            scores_are_diagonal=off <= DIAGONAL,
            heads_have_both_signs=bool((omega[active] > 0).any() and (omega[active] < 0).any()),
            values_are_y_alone=stray <= DIAGONAL,
            values_sum_to_zero=balance <= ZERO,
            near_the_debiased_step=losses["four"] <= NEAR * debiased,
            better_than_one_head=losses["four"] < losses["one"],
            longer_is_better_with_softmax=far["four"] < losses["four"],
            longer_is_worse_with_linear=far["linear"] > losses["linear"],
        )


def debiased_step(x: Tensor, y: Tensor, q: Tensor, omega: float = OMEGA, mu: float = MU) -> Tensor:
    """The debiased gradient-descent predictor ``[B]``."""
    centred = x - x.mean(1, keepdim=True)
    return 2 * omega * mu * (y * (centred @ q[..., None])[..., 0]).mean(1)


def paired(x: Tensor, y: Tensor, q: Tensor, omega: float = OMEGA, mu: float = MU) -> Tensor:
    """The pair of heads' prediction ``[B]``, by the program."""
    spec = IclLinearRegression(omega, mu, causal=False).build(2)
    return attention(q[:, None, None].expand(-1, 2, -1, -1), x[:, None], y[:, None, :, None], spec).sum((1, 2, 3))
