"""PINE: segments of a prompt see one another in both directions, and each query puts the ones that matter nearest.

    importance[i, d] = mean over the tokens j of segment d of softmax over all segments of (q[i] . k[j] / sqrt(D)),
                       without RoPE; a token of a segment leaves its own segment out and uses the sum over its segment
    order[i]         = segments by falling importance, a token's own one first
    shift[i, d]      = tokens of the segments before d in order[i]
    score[i, j]      = RoPE(q[i], p[i]) . RoPE(k[j], p[j] - shift[i, segment of j]) / sqrt(D)

p gives all segments the same last position, right before what follows them. Nothing depends on the order in which the
segments stand, so the output does not either. RoPE is relative: instead of the keys of d, the query is turned by
shift[i, d], once per segment, and a key meets the query turned for its segment (:mod:`._segments`).

Paper: Eliminating Position Bias of Language Models: A Mechanistic Approach, arXiv:2407.01100
Code: https://github.com/wzq016/PINE (pine/models/llama/modeling_llama.py, tokenization_llama.py)

Differs: segments are given as token positions (official: a tokenizer that takes a nested list). Importances are
compared as logarithms, which sorts them alike and leaves no ties where softmax underflows to zero. The cache holds
keys turned by p (official: not turned). A batch of any size shares the segments; the official code takes one text.
"""

from __future__ import annotations

import random
import string
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import SpecError, Unsupported
from ...core.spec import Attention
from ...hosts.handles import Handle, host_of, install
from ...worlds.recall import KEYS
from ...worlds.text import encode
from ..base import ClaimNumbers, MethodSystem
from ._segments import Nearest, positions_of, segments

SEGMENTS, PROMPTS, ORDERS = 6, 16, 5
EXACT = 1e-4  # of the largest logit: what orders of float32 sums may change


class Pine(MethodSystem):
    """Settings: ``bounds``, the token positions at which the segments begin, and the one behind the last.

    They are the prompt's; the default is an example: three segments of eight tokens after the first token.
    """

    slug = "pine"
    title = "PINE (position-invariant inference)"
    paper = "https://arxiv.org/abs/2407.01100"
    code = "https://github.com/wzq016/PINE"

    def __init__(self, bounds: Sequence[int] = (1, 9, 17, 25)):
        self.bounds = bounds

    @contextmanager
    def apply(self, model: Any) -> Iterator[Handle]:
        """Read prompts this way until the context is left. The first call must hold all segments, and no padding.

        Raises:
            SpecError: the bounds do not rise.
            Unsupported: the model does not turn halves of queries and keys by one fixed RoPE, in every layer alike.
        """
        if len(self.bounds) < 2 or self.bounds[0] < 0 or any(b <= a for a, b in pairwise(self.bounds)):
            raise SpecError(f"Pine: expected bounds that rise, such as (5, 20, 32); got {self.bounds}")
        rotary = _rotary(model)
        scales: dict[int, Any] = {site.layer: site.module.scaling for site in host_of(model).sites()}

        def arrange(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            cache = given.get("past_key_values")
            if cache is not None and cache.get_seq_length():
                return args, given
            x = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
            padding = given.get("attention_mask")
            if x.shape[1] < self.bounds[-1] or (padding is not None and not bool(padding.all())):
                raise SpecError(f"Pine: expected a first call of {self.bounds[-1]} tokens or more, without padding")
            segment = segments(self.bounds, x.shape[1]).to(x.device)
            seen = segment.new_ones(2 * segment.shape).tril().bool()
            seen |= (segment[:, None] > 0) & (segment > 0) & (segment[:, None] != segment)
            positions = positions_of(self.bounds, x.shape[1]).to(x.device).expand(len(x), -1)
            return args, given | {"attention_mask": seen.expand(len(x), 1, -1, -1), "position_ids": positions}

        hook = model.base_model.register_forward_pre_hook(arrange, with_kwargs=True)
        nearest = {layer: Attention(score=[Nearest(self.bounds, rotary, scale)]) for layer, scale in scales.items()}
        try:
            with install(model, lambda layer, _: nearest[layer]) as handle:
                yield handle
        finally:
            hook.remove()

    def claim(self) -> ClaimNumbers:
        """Key-value pairs, each in a segment of its own, asked for with the segments in several orders."""
        from ...study import probes

        model = probes.embedded()
        rng, apart, right = random.Random("pine"), {"plain": 0.0, "pine": 0.0}, {"plain": 0.0, "pine": 0.0}
        for _ in range(PROMPTS):
            parts, question, wanted = _asked(rng)
            found: dict[str, list[Tensor]] = {name: [] for name in apart}
            for _ in range(ORDERS):
                bounds = list(accumulate(map(len, parts), initial=1))
                tokens = encode(b"".join(parts) + question + wanted[:-1])[None]
                with torch.no_grad():
                    found["plain"].append(model(tokens, logits_to_keep=len(wanted)).logits[0])
                    with Pine(bounds).apply(model):
                        found["pine"].append(model(tokens, logits_to_keep=len(wanted)).logits[0])
                rng.shuffle(parts)
            for name, logits in found.items():
                given = torch.stack(logits)
                apart[name] = max(apart[name], float((given - given[0]).abs().max() / given.abs().max()))
                said = given.argmax(-1) == torch.tensor(list(wanted))
                right[name] += float(said.all(-1).float().mean()) / PROMPTS
        return ClaimNumbers.decide(
            {"segments": SEGMENTS, "prompts": PROMPTS, "orders": ORDERS}
            | {f"apart_{name}": float(f"{x:.3g}") for name, x in apart.items()}
            | {f"accuracy_{name}": round(x, 4) for name, x in right.items()},
            f"Reordering {SEGMENTS} segments changes logits by at most {apart['pine']:.1e} of the largest (plain model:"
            f" {apart['plain']:.1e}); {right['pine']:.0%} of the answers are right ({right['plain']:.0%}).",
            output_invariant=apart["pine"] < EXACT,
            order_matters_without=apart["plain"] > EXACT,
        )


def _rotary(model: Any) -> Any:
    """The model's own rotary embedding."""
    found = [m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]
    home = sys.modules[type(host_of(model).sites()[0].module).__module__]
    half = getattr(home, "rotate_half", lambda x: x)(torch.arange(4))
    plain = len(found) == 1 and getattr(found[0], "rope_type", "default") in ("default", "linear", "llama3")
    if not plain or half.tolist() != [-2, -3, 0, 1] or getattr(model.config, "sliding_window", None):
        raise Unsupported(f"{type(model).__name__} has no RoPE, another kind of it, or layers that differ")
    return found[0]


def _asked(rng: random.Random) -> tuple[list[bytes], bytes, bytes]:
    """Texts with one pair each, a question about one of the pairs, and its answer."""
    keys = rng.sample(KEYS, SEGMENTS)
    pairs = [(key.encode(), f"{rng.randrange(100):02d}".encode()) for key in keys]

    def filler() -> bytes:
        return bytes(rng.choices(string.ascii_lowercase.encode(), k=rng.randint(8, 24)))

    key, value = rng.choice(pairs)
    return [filler() + k + v + b";" + filler() for k, v in pairs], b"?" + key, value
