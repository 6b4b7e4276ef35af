"""BertViz: attention at three scales, which the viewer (``saccade view``) shows of inputs of any length.

    model view   all layers and heads at a glance, one small picture each       the viewer's thumbnails and maps
    head view    lines from each token to those it looks at, by their weights   its Lines, and Row for all keys
    neuron view  one weight: query and key number by number, their products, the sum, the softmax     its Score

BertViz holds all weights of all heads, N^2 numbers each, as text in its page. The viewer holds queries and keys: a row
is computed again when it is looked at, and a map is reduced from the engine's tiles.

Paper: A Multiscale Visualization of Attention in the Transformer Model, arXiv:1906.05714
Code: https://github.com/jessevig/bertviz (bertviz/head_view.py, model_view.py, neuron_view.py)

Differs: lines of one head at a time, from and to 32 tokens around the chosen ones, not of several heads in colours and
of all tokens; the neuron view shows one pair, not all keys of a query. BertViz's neuron view has own copies of BERT,
GPT-2 and RoBERTa, the viewer's takes any model that the hosts take. docs/explain.md compares the rest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...hosts.handles import lead
from ..base import ClaimNumbers, MethodSystem
from ._random_models import TOKENS, encoder, encoder_decoder

if TYPE_CHECKING:
    from ...viewer import Session

EXACT = 1e-4  # no number of a view may differ by more
LONG = 8192  # tokens, too many for all weights
ROWS = (3, 500, 1000)


class BertViz(MethodSystem):
    """No settings. :meth:`views` of a model and an input; ``saccade view`` shows them."""

    slug = "bertviz"
    title = "BertViz's model, head and neuron views"
    paper = "https://arxiv.org/abs/1906.05714"
    code = "https://github.com/jessevig/bertviz"

    def apply(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Lead a model's attention through the engine, where it can be seen; it answers as it would."""
        return lead(model)

    def views(self, model: nn.Module, inputs: Mapping[str, Any]) -> Session:
        """What the viewer's page asks: ``glance`` (model view), ``row`` (head view) and ``score`` (neuron view)."""
        from ...viewer import Capture, Session

        return Session({"run": Capture.of(model, inputs)})

    def claim(self) -> ClaimNumbers:
        """All views of a decoder, an encoder and cross-attention against all weights; and of a long text."""
        from ...study import probes
        from ...worlds.text import text

        lm = probes.embedded()
        ids = next(text(LONG, "bertviz")).tokens[None]
        short = {"input_ids": ids[:, :TOKENS]}
        cases: dict[str, tuple[Any, dict[str, Tensor], str]] = {
            "decoder": (lm, short, "attentions"),
            "encoder": (encoder(), short, "attentions"),
            "cross": (encoder_decoder(), short | {"decoder_input_ids": ids[:, 1 : TOKENS + 1]}, "cross_attentions"),
        }
        apart = {name: max(self.apart(*case).values()) for name, case in cases.items()}
        session = self.views(lm, {"input_ids": ids, "use_cache": False, "logits_to_keep": 1})
        run = session.sides["run"]
        layer = run.layers[2]
        far = 0.0
        for row in (100, LONG - 1):
            line = unpacked(session.answer(f"row?side=0&layer=2&head=1&row={row}"))[1]
            far = max(far, float((line - whole_row(layer.q[0, 1], layer.k[0, 0], row)).abs().max()))
        header, glance = unpacked(session.answer("glance?side=0&layer=2&stat=mass"))
        weights = 4 * LONG**2 * sum(layer.heads for layer in run.layers)
        numbers = {f"apart_{name}": float(f"{value:.1e}") for name, value in (apart | {"long": far}).items()}
        numbers |= {"long_tokens": LONG, "glance_step": header["step"], "smaller": round(weights / run.bytes)}
        return ClaimNumbers.decide(
            numbers,
            f"All three views of a decoder, an encoder and cross-attention over {TOKENS} tokens differ from all weights"
            f" by at most {max(apart.values()):.0e}. Of {LONG} tokens what is held is {numbers['smaller']} times"
            f" smaller than the weights, and rows differ by {far:.0e}.",
            decoder=apart["decoder"] < EXACT,
            encoder=apart["encoder"] < EXACT,
            cross=apart["cross"] < EXACT,
            long_inputs=far < EXACT and bool((glance.sum(-1) - 1).abs().max() < EXACT) and weights > 10 * run.bytes,
        )

    @torch.no_grad()
    def apart(self, model: Any, inputs: Mapping[str, Any], kind: str) -> dict[str, float]:
        """By view the greatest difference from the weights that transformers' eager attention returns as ``kind``."""
        session = self.views(model, inputs)
        before = model.config._attn_implementation
        model.set_attn_implementation("eager")
        try:
            weights = model(**inputs, output_attentions=True)[kind]
        finally:
            model.set_attn_implementation(before)
        layers = session.sides["run"].layers
        mine = [i for i, layer in enumerate(layers) if ("cross" in layer.site.kinds) == (kind == "cross_attentions")]
        found = {"model": 0.0, "head": 0.0, "neuron": 0.0}
        for number, whole in zip(mine, weights, strict=True):
            session.settle(0, number)
            header, glance = unpacked(session.answer(f"glance?side=0&layer={number}&stat=mass"))
            found["model"] = max(found["model"], float((glance - pooled(whole[0], header["block"])).abs().max()))
            for head in range(layers[number].heads):
                at = f"side=0&layer={number}&head={head}"
                for row in ROWS:
                    line = unpacked(session.answer(f"row?{at}&row={row}"))[1]
                    found["head"] = max(found["head"], float((line - whole[0, head, row]).abs().max()))
                    told = json.loads(session.answer(f"score?{at}&row={row}&key={row // 2}"))
                    product = told["scale"] * sum(q * k for q, k in zip(told["q"], told["k"], strict=True))
                    off = abs(told["weight"] - float(whole[0, head, row, row // 2])), abs(told["score"] - product)
                    found["neuron"] = max(found["neuron"], *off)
        return found


def unpacked(answer: bytes) -> tuple[dict[str, Any], Tensor]:
    """Header and numbers of an answer."""
    size = int.from_bytes(answer[:4], "little")
    header = json.loads(answer[4 : 4 + size])
    return header, torch.frombuffer(bytearray(answer[4 + size :]), dtype=torch.float32).view(header["shape"])


def pooled(weights: Tensor, block: int) -> Tensor:
    """What a query of a block gives to a block of keys ``[heads, nq, nk]``, a mean, of weights ``[heads, N, M]``."""
    parts = [part.sum(-1) for part in weights.split(block, -1)]
    return torch.stack([part.mean(1) for part in torch.stack(parts, -1).split(block, 1)], 1)


def whole_row(q: Tensor, k: Tensor, row: int) -> Tensor:
    """A causal row of weights in float64, from queries and keys ``[N, D]``."""
    scores = (k[: row + 1].double() @ q[row].double()) * q.shape[-1] ** -0.5
    return nn.functional.pad(scores.softmax(0), (0, len(k) - row - 1)).float()
