"""Multi-query attention: every query head has its own projection, and all of them read the same keys and values.

    q[h] = x Wq[h],   k = x Wk,   v = x Wv
    y = sum over heads of softmax(q[h] . k / sqrt(D)) v Wo[h]

A cache then holds one head instead of H, and a decoding step, whose time goes into loading it, is that much shorter.

Paper: Fast Transformer Decoding: One Write-Head is All You Need, arXiv:1911.02150
Code: https://github.com/tensorflow/mesh (mesh_tensorflow/transformer/attention.py: AttentionParams with
    memory_heads_dims=None)

Differs: the scale 1 / sqrt(D) belongs to the score; Mesh TensorFlow has it in the first weights of Wq instead
(deviation (width D) ** -0.5), which is the same function at another learning rate of Wq. The paper widens the
perceptrons until the model has as many parameters as before (4096 to 5440); that is the model around the layer, and the
claim does without it, to the loss of this system.
"""

from __future__ import annotations

from ...core import masks
from ...core.spec import Attention
from ...nn import MultiHead
from ...nn.backbones import Place
from ..base import ClaimNumbers, LayerSystem, Promises
from ._projections import contest, step_times

LOSS = 0.015  # nats: how much worse the paper's multi-query model is (WMT14, log perplexity 1.439 against 1.424)
FASTER = 2.0  # "much faster to decode": a step must take at most half the time


class MQA(LayerSystem):
    """Settings: ``causal``."""

    slug = "mqa"
    title = "Multi-query attention"
    paper = "https://arxiv.org/abs/1911.02150"
    code = "https://github.com/tensorflow/mesh"
    promises = Promises(unit_rows=True, hosts=())

    def __init__(self, causal: bool = True):
        self.causal = causal

    def layer(self, place: Place) -> MultiHead:
        """Multi-head attention with one head of keys and values."""
        spec = Attention(mask=masks.Causal() if self.causal else masks.Full())
        return MultiHead(spec, place.width, place.heads, kv_heads=1, positions=place.positions)

    def claim(self) -> ClaimNumbers:
        """A decoding step and its cache behind 2048 tokens, and small language models with one and with all heads."""
        from ...study.trainer import Setup

        width, heads = 512, 8
        place = Place(width, heads, 0, 1, None, None)
        plain = MultiHead(Attention(mask=masks.Causal()), width, heads)
        times, nbytes = step_times({"mqa": self.layer(place), "mha": plain}, width, 2048)
        faster, smaller = times.ratio("mha", "mqa"), nbytes["mha"] / nbytes["mqa"]
        result = contest({"mha": None, "mqa": self}, Setup(steps=120))
        excess = result.excess("mqa", "mha")
        return ClaimNumbers.decide(
            result.numbers()
            | {
                "cache_ratio": smaller, "step_speedup": round(faster, 2),
                "excess_loss": round(excess.mean, 4), "excess_error": round(excess.error, 4),
                "parameters_mha": result.parameters("mha"), "parameters_mqa": result.parameters("mqa"),
            },
            f"Of {heads} heads, the cache is {smaller:.0f} times smaller and a step behind 2048 tokens"
            f" {faster:.1f} times as fast; a small model's loss differs by {excess.mean:+.4f} nats per byte (standard"
            f" error {excess.error:.4f}) from {result.mean('mha'):.4f}.",
            cache_of_one_head=smaller == heads,
            much_faster=faster >= FASTER,
            minor_loss=excess.mean <= LOSS,
        )  # fmt: skip
