"""Parallel context encoding: pieces of a context that do not see each other, and what calms the query's attention.

    s sinks | piece 0 | ... | piece P-1 | query        piece = ceil((N - s - query) / P) tokens, the last may have less

    a piece's token sees   the sinks and its own piece (causally); every piece has the positions s, s + 1, ...
    the query sees         all that stands before it; its positions go on after the longest piece
    selection              score[p] = sum of the `score` greatest weights in piece p, for each head and query token;
                           outside the `keep` pieces of the greatest score weights become 0, the rest is renormalized

A model that never saw such pieces attends too evenly (its query's entropy is high); shared sinks and selection lower
it. ``sinks=0`` and ``keep=pieces`` leave each out: plain parallel encoding.

Paper: Attention Entropy is a Key Factor: An Analysis of Parallel Context Encoding with Full-attention-based
    Pre-trained Language Models, arXiv:2412.16545
Code: https://github.com/zzsfornlp/parallel_context_encoding_analysis (mspx/tasks/memana/selatt.py: score_topk 5,
    README: sel_topk 2; mspx/core/cache.py: ListParInput with positions "ME"; mspx/core/engine.py: t_smask)

Differs: context and query in one pass, where the code takes two, to the same effect. Selection is for each head and
token, as the code does in language modelling, not summed over them. Sinks are the prompt's own first tokens: the code
puts a sentence or a blank line there. Texts of a batch must be equally long and without padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ...core.edits import Edit
from ...core.errors import SpecError
from ...core.spec import Attention
from ...core.tile import At
from ...hosts.handles import edit, install
from ...study.probes import embedded, reading
from ...worlds.text import encode, text
from ..base import ClaimNumbers, MethodSystem

SINK, QUERY = -1, -2  # in the place of a piece's number
PIECES, SCORED = 32, 128  # of a prompt of 1024 bytes, and the bytes at its end whose loss is taken
SHARED = encode(b"\n\n")  # after BOS a blank line, the code's shortest prompt for sinks


class AttentionEntropy(MethodSystem):
    """Settings: ``pieces``; ``query`` and ``sinks``, a prompt's last and first tokens; ``keep``, ``score``: above."""

    slug = "attention-entropy"
    title = "Parallel context encoding with sinks and selection"
    paper = "https://arxiv.org/abs/2412.16545"
    code = "https://github.com/zzsfornlp/parallel_context_encoding_analysis"

    def __init__(self, pieces: int = 8, query: int = 16, sinks: int = 1, keep: int = 2, score: int = 5):
        self.pieces, self.query, self.sinks, self.keep, self.score = pieces, query, sinks, keep, score
        if min(pieces, query, keep, score) < 1 or sinks < 0:
            raise SpecError(f"{self}: expected pieces, query, keep and score of at least 1, and sinks of 0")

    @contextmanager
    def apply(self, model: nn.Module) -> Iterator[None]:
        """Read prompts (calls without a past) this way. SpecError: no context, masked padding, a static cache."""
        now = Selection(self.keep, self.score)

        def arrange(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            tokens, cache = args[0] if args else given["input_ids"], given.get("past_key_values")
            (batch, new), padding = tokens.shape, given.get("attention_mask")
            if padding is not None and not (isinstance(padding, Tensor) and bool(padding.all())):
                raise SpecError("AttentionEntropy: expected texts of one length, without padding, and a growing cache")
            if cache is None or cache.get_seq_length() == 0:
                now.piece, now.position = (x.to(tokens.device) for x in self.lay_out(new))
            else:
                now.piece = pad(now.piece, (0, new), value=QUERY)
                now.position = torch.arange(new, device=tokens.device) + now.position[-1] + 1
            # Without a mask the model would take positions that begin anew for texts packed into one.
            seen = now.piece.new_ones(batch, len(now.piece))
            return args, given | {"position_ids": now.position.expand(batch, -1), "attention_mask": seen}

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (now.piece[k] == SINK) | (now.piece[q] == QUERY) | (now.piece[q] == now.piece[k])

        with ExitStack() as stack:
            stack.callback(model.register_forward_pre_hook(arrange, with_kwargs=True).remove)
            stack.enter_context(install(model, Attention(mask=visible)))
            if self.keep < self.pieces:
                stack.enter_context(edit(model, now))
            yield

    def lay_out(self, length: int) -> tuple[Tensor, Tensor]:
        """Piece (or SINK, or QUERY) and position of every token of a prompt, ``[length]``.

        A last piece that has less is spread over the length of the others, rounded down. SpecError: no context.
        """
        context = length - self.sinks - self.query
        if context < 1:
            raise SpecError(f"AttentionEntropy: {length} tokens, {self.sinks} sinks, {self.query} query: no context")
        size = -(-context // self.pieces)
        place = torch.arange(context)
        piece = place // size
        sinks, spread = torch.arange(self.sinks), place % size * size // piece.bincount()[piece]
        query = torch.arange(self.query) + self.sinks + size
        piece = torch.cat([torch.full_like(sinks, SINK), piece, torch.full_like(query, QUERY)])
        return piece, torch.cat([sinks, self.sinks + spread, query])

    def claim(self) -> ClaimNumbers:
        """The query's entropy and its loss on held-out prose: dense, in pieces, and with each remedy."""
        model, shared, remedies = embedded(), len(SHARED), ("sinks", "selection", "both")
        prompts = torch.stack([torch.cat([SHARED, e.tokens[1:]]) for e in islice(text(1022, "entropy"), 8)])
        settings = ((0, PIECES), (shared, PIECES), (0, self.keep), (shared, self.keep))  # sinks, and pieces kept
        found = {"dense": reading(model, prompts, SCORED)}
        for way, (sinks, keep) in zip(("pieces", *remedies), settings, strict=True):
            with AttentionEntropy(PIECES, SCORED + 1, sinks, keep, self.score).apply(model):
                found[way] = reading(model, prompts, SCORED)
        entropy, loss = ({way: pair[i] for way, pair in found.items()} for i in range(2))
        told = ", ".join(f"{way} {e:.2f} / {x:.3f}" for way, (e, x) in found.items())
        return ClaimNumbers.decide(
            {way: {"entropy": round(e, 3), "loss": round(x, 4)} for way, (e, x) in found.items()},
            f"Entropy of the query in nats / its loss in nats per byte, {PIECES} pieces: {told}.",
            pieces_raise_entropy=entropy["pieces"] > entropy["dense"],
            pieces_raise_the_loss=loss["pieces"] > loss["dense"],
            each_remedy_lowers_entropy=all(entropy[way] < entropy["pieces"] for way in remedies),
            each_remedy_narrows_the_loss_gap=all(loss[way] < loss["pieces"] for way in remedies),
            entropy_back_to_normal=abs(entropy["both"] - entropy["dense"]) < entropy["pieces"] - entropy["dense"],
        )


class Selection(Edit):
    """The query's weights in the ``keep`` pieces that score highest, and outside of all pieces, renormalized."""

    piece: Tensor  # of every token so far ``[M]``
    position: Tensor  # of a call's tokens ``[N]``

    def __init__(self, keep: int, score: int):
        super().__init__()
        self.keep, self.score = keep, score

    def forward(self, weights: Tensor, at: At, visible: Tensor | None) -> Tensor:
        """Rows before the query stay as they are."""
        piece, asks = self.piece[at.k], self.piece[at.row] == QUERY
        if not bool(asks.any()):
            return weights
        each = [weights.masked_fill(piece != p, 0) for p in range(int(piece.max()) + 1)]
        scores = torch.stack([w.topk(min(self.score, w.shape[-1])).values.sum(-1) for w in each], -1)
        best = scores.topk(min(self.keep, len(each))).indices
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)
        kept = weights * (chosen.gather(-1, piece.clamp(min=0).expand(weights.shape)) | (piece < 0))
        kept = kept / kept.sum(-1, keepdim=True).clamp(min=1e-5)
        return torch.where(asks, kept, weights)
