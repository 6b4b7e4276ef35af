"""Attention with random frozen scores: only what is made of the heads' readings is learned, by linear regression.

    weight[h, j] = relu( [q, 1]' W[h] [k[j], 1] ) / length
    W[h] = bias diag(1, ..., 1, 0) + std N(0, 1) noise,        frozen
    f(q, k) = sum over heads h of <w[h], sum over j of weight[h, j] [k[j], 1]>,    w: ridge regression

With many heads f can be any smooth function that does not care for the order of the keys. Where the target weighs keys
by q . k, noise about the identity (``bias`` above 0) needs fewer samples than noise about zero.

Paper: What can a Single Attention Layer Learn? A Study Through the Random Features Lens, arXiv:2307.11353
Code: none

Differs: the paper was not at hand but for its abstract, and the setting is from memory of it: relu over N keys in the
place of a softmax, keys on the unit sphere, entries of variance 1/4, and targets that average <beta, k>^p, or that
times (q . k)^p, over the keys. The bias of the claim is sqrt(d). W is drawn from ``seed`` when the width is known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import masks, normalizers, scores
from ...core.attend import attention
from ...core.spec import Attention
from ..base import ClaimNumbers, Promises, System
from ._ridge import least_risk

WIDTH, KEYS, HEADS = 16, 16, 128  # of the claim
SAMPLES, TESTED = (64, 256, 1024), 1000


class RandomBilinear(scores.Form):
    """``[q, 1]' W[h] [k, 1]`` with W of each head drawn for the width that comes."""

    def __init__(self, bias: float, std: float, seed: int):
        super().__init__()
        self.bias, self.std, self.seed = bias, std, seed

    def matrices(self, heads: int, width: int) -> Tensor:
        """W ``[heads, width + 1, width + 1]``, float32."""
        source = torch.Generator().manual_seed(self.seed)
        mean = self.bias * torch.diag(F.pad(torch.ones(width), (0, 1)))
        return mean + self.std * torch.randn(heads, width + 1, width + 1, generator=source)

    def prepare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q, k = (F.pad(x, (0, 1), value=1.0) for x in (q, k))
        kind = torch.promote_types(q.dtype, torch.float32)
        projected = q.to(kind) @ self.matrices(q.shape[1], q.shape[-1] - 1).to(q.device, kind)
        near = projected.to(q.dtype)
        if kind == q.dtype:
            return near, k
        rest = (projected - near.to(kind)).to(q.dtype)  # half precision: in two pieces, or the relu's kink is blurred
        return torch.cat([near, rest], -1), torch.cat([k, k], -1)

    def scale(self, width: int) -> float:
        return 1.0


class RandomFeatureAttentionTheory(System):
    """Settings: ``bias`` and ``std`` of W; ``length``, the number of keys of the average; ``causal``; ``seed``."""

    slug = "random-feature-attention-theory"
    title = "Attention with frozen random scores"
    paper = "https://arxiv.org/abs/2307.11353"
    promises = Promises(causal=False)

    def __init__(self, bias: float = 0.0, std: float = 0.5, length: int = 16, causal: bool = False, seed: int = 0):
        self.bias, self.std, self.length, self.causal, self.seed = bias, std, length, causal, seed

    def promised(self) -> Promises:
        """Causal as set."""
        return replace(self.promises, causal=self.causal)

    def build(self, heads: int) -> Attention:
        """The random bilinear score under a relu; nothing in it learns."""
        form = RandomBilinear(self.bias, self.std, self.seed)
        mask = masks.Causal() if self.causal else masks.Full()
        return Attention(form, mask, normalizers.ReLU(divisor=self.length))

    def claim(self) -> ClaimNumbers:
        """Test risk over samples and heads, for two targets and three kinds of random features."""
        kinds: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "attention": lambda q, k: features(q, k, RandomFeatureAttentionTheory()),
            "biased": lambda q, k: features(q, k, RandomFeatureAttentionTheory(bias=WIDTH**0.5)),
            "perceptron": perceptron,
        }
        risk: dict[tuple[str, str, int], float] = {}
        few = f"attention_{HEADS // 16}_heads"
        for target in ("average", "weighted"):
            q, k, y = sample(max(SAMPLES) + TESTED, target)
            for kind, make in kinds.items():
                x = make(q, k)
                for n in SAMPLES:
                    risk[target, kind, n] = least_risk(x[:n], y[:n], x[-TESTED:], y[-TESTED:])
                if kind == "attention":
                    fewer = x.unflatten(1, (HEADS, -1))[:, : HEADS // 16].flatten(1)
                    least = least_risk(fewer[: SAMPLES[-1]], y[: SAMPLES[-1]], fewer[-TESTED:], y[-TESTED:])
                    risk[target, few, SAMPLES[-1]] = least
        most = SAMPLES[-1]
        falls = {target: [risk[target, "attention", n] for n in SAMPLES] for target in ("average", "weighted")}
        return ClaimNumbers.decide(
            {f"{target}_{kind}_n{n}": round(value, 4) for (target, kind, n), value in risk.items()},
            f"Test risk over variance with {most} samples: mean of a power of the keys, random attention"
            f" {risk['average', 'attention', most]:.3f}, a random perceptron {risk['average', 'perceptron', most]:.3f};"
            f" keys weighed by their likeness to the query, noise about zero {risk['weighted', 'attention', most]:.3f},"
            f" about the identity {risk['weighted', 'biased', most]:.3f}.",
            risk_falls_with_samples=all(a > b > c for a, b, c in falls.values()),
            risk_falls_with_heads=all(risk[t, few, most] > risk[t, "attention", most] for t in falls),
            beats_the_perceptron=risk["average", "attention", most] < risk["average", "perceptron", most],
            bias_wins_where_keys_are_weighed=risk["weighted", "biased", most] < risk["weighted", "attention", most],
        )


def sample(count: int, target: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``[count, WIDTH]`` and keys ``[count, KEYS, WIDTH]`` on the unit sphere, and the target, of variance 1.

    ``"average"``: mean over the keys of <beta, k>²; ``"weighted"``: of (q . k)² <beta, k>.
    """
    source = torch.Generator().manual_seed(seed)
    x = F.normalize(torch.randn(count, KEYS + 1, WIDTH, generator=source), dim=-1)
    q, k = x[:, 0], x[:, 1:]
    along = k @ F.normalize(torch.randn(WIDTH, generator=source), dim=0)
    y = (along**2).mean(1) if target == "average" else ((k @ q[:, :, None])[..., 0] ** 2 * along).mean(1)
    return q, k, (y - y.mean()) / y.std()


def features(q: Tensor, k: Tensor, how: RandomFeatureAttentionTheory) -> Tensor:
    """What HEADS heads read ``[count, HEADS * (WIDTH + 1)]``."""
    v = F.pad(k, (0, 1), value=1.0)[:, None]
    queries = q[:, None, None].expand(-1, HEADS, -1, -1)
    return attention(queries, k[:, None], v, how.build(HEADS)).flatten(1)


def perceptron(q: Tensor, k: Tensor) -> Tensor:
    """As many random features relu(w . [q, all keys, 1])."""
    x = F.pad(torch.cat([q, k.flatten(1)], 1), (0, 1), value=1.0)
    w = torch.randn(x.shape[1], HEADS * (WIDTH + 1), generator=torch.Generator().manual_seed(1))
    return (x @ w / KEYS**0.5).relu()
