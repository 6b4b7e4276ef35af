"""EchoAtt: inner layers whose attention matrices are alike share one, and a distilled student makes up for it.

In a block of layers the first one leads; the others copy its matrix A, apply it to their own values, and have no q_proj
and no k_proj any more, neither their work nor their parameters:

    A      = softmax(q[lead] k[lead]^T / sqrt(D))           out[layer] = A v[layer],  layer in the block
    loss   = MSE(hidden after a block) + KL(teacher || student) + CE(what the teacher says most);  then CE(the text)

Paper: EchoAtt: Attend, Copy, then Adjust for More Efficient Large Language Models, arXiv:2409.14595
Code: none

Differs: a copy of A would take N x N memory; here a layer that follows is given its lead's q and k as projected, and
makes the same A again: memory stays linear, and what A itself costs is not saved. A cache holds the lead's keys for
every layer of the block, and these must all see the same keys. The losses weigh the same.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.attend import weights
from ...core.errors import SpecError
from ...core.spec import Attention
from ...hosts.handles import listen
from ..base import ClaimNumbers, MethodSystem

SHARED = 9 / 22  # of the layers follow: without their q and k TinyLlama has the paper's 4% fewer parameters
ALIKE, FEWER, LOST = 0.9, 0.04, 0.05  # "highly similar"; the paper's 4%; accuracy (or bits a byte) lost, and still near
STEPS, RATE = (160, 40), 5e-4


class EchoAtt(MethodSystem):
    """Settings: ``blocks`` of layers that share a matrix, each its lead first, such as :func:`shared_blocks` finds."""

    slug = "echoatt"
    title = "EchoAtt"
    paper = "https://arxiv.org/abs/2409.14595"

    def __init__(self, blocks: Sequence[Sequence[int]] = ((0, 1),)):
        self.blocks = blocks

    @contextmanager
    def apply(self, model: nn.Module) -> Iterator[None]:
        """Share within the blocks. SpecError: no such layers, or with more to q and k than q_proj and k_proj."""
        plain = [m for m in model.modules() if "k_proj" in m._modules and "norm" not in " ".join(m._modules)]
        layers: dict[Any, Any] = {getattr(m, "layer_idx", None): m for m in plain}
        with ExitStack() as stack:
            for block, name in itertools.product(self.blocks, ("q_proj", "k_proj")):
                if list(block) != sorted(set(block)) or not set(block) <= layers.keys():
                    raise SpecError(f"EchoAtt: a block is some of the layers {[*layers]}, in order; got {block}")
                lead, echo = getattr(layers[block[0]], name), Echo()
                stack.callback(lead.register_forward_hook(echo.hear).remove)
                for layer in block[1:]:
                    stack.callback(setattr, layers[layer], name, getattr(layers[layer], name))
                    setattr(layers[layer], name, echo)
            yield

    def claim(self) -> ClaimNumbers:
        """The embedded model as teacher of one that shares its most similar layers: before and after distillation."""
        from transformers import AutoModelForCausalLM

        from ...study.claims import interleaved
        from ...worlds import recall, text
        from ...zoo import lm, path

        teacher = AutoModelForCausalLM.from_pretrained(path("lm"), dtype=torch.float32).eval()
        student, learned, prose = copy.deepcopy(teacher), text.heldout()[:-12000], text.heldout()[-12000:]
        made = (lm.batch(256, 4, f"echo/{i}", learned, lm.Recipe().mix) for i in itertools.count())
        pages = ((page.tokens, page.tokens.masked_fill(page.kind < 0, -100)) for page in made)
        alike = similarity(teacher, tokens := next(pages)[0])
        blocks = shared_blocks(alike, round(SHARED * len(alike)))
        found = round(float(torch.cat([alike[block[0], block[1:]] for block in blocks]).mean()), 4)

        def quality(model: Any) -> list[float]:  # right answers, by task, and minus bits per byte of prose
            right = [lm.accuracy(model, task, 256, examples=32) for task in recall.TASKS]
            return [round(x, 4) for x in (*right, -lm.bits_per_byte(model, prose, context=256))]

        theirs = quality(teacher)
        with EchoAtt(blocks).apply(student):
            copied = quality(student)
            distill(student, teacher, blocks, pages)
            ours, fewer = quality(student), round(1 - student.num_parameters() / teacher.num_parameters(), 4)
            with torch.no_grad():
                times = interleaved({"teacher": lambda: teacher(tokens), "student": lambda: student(tokens)})
        faster = round(times.ratio("teacher", "student"), 3)
        told = [f"{sum(x[:-1]) / 4:.0%} of answers, {-x[-1]:.3f} bits a byte" for x in (theirs, copied, ours)]
        return ClaimNumbers.decide(
            {"blocks": blocks, "similarity": found, "fewer_parameters": fewer, "faster": faster}
            | {"teacher": theirs, "copied": copied, "distilled": ours},
            f"Layers {blocks} are {found:.2f} alike; {fewer:.1%} fewer parameters, {faster:.2f} times as fast;"
            f" the teacher has {told[0]}; copied: {told[1]}; distilled: {told[2]}.",
            similarity_found=found >= ALIKE, fewer_parameters=fewer >= FEWER, faster=faster > 1,
            near_teacher=all(a >= b - LOST for a, b in zip(ours, theirs, strict=True)),
        )  # fmt: skip


class Echo(nn.Module):
    """In place of a projection: what its lead's said last."""

    def hear(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.said = output

    def forward(self, x: Tensor) -> Tensor:
        return self.said


@torch.no_grad()
def similarity(model: Any, tokens: Tensor) -> Tensor:
    """Cosine of two layers' attention matrices, mean over heads and texts ``[B, N]``: ``[L, L]``; holds them all."""
    calls: list[Any] = []
    with listen(model, calls.append):
        model(tokens, use_cache=False)
    matrices = [weights(c.q, c.k, c.frame.combine(Attention()), offset=c.frame.offset).flatten(2) for c in calls]
    flat = F.normalize(torch.stack(matrices), dim=-1)
    return torch.einsum("ibhx,jbhx->ijbh", flat, flat).mean((2, 3))


def shared_blocks(similarity: Tensor, count: int) -> list[list[int]]:
    """Blocks in which the ``count`` inner layers most like the one before follow it. SpecError: there are fewer."""
    if not 0 < count <= len(similarity) - 3:
        raise SpecError(f"EchoAtt: of {len(similarity)} layers 1 to {len(similarity) - 3} can follow; got {count}")
    follow = similarity.diagonal(-1)[1:-1].topk(count).indices + 2
    leads = [layer for layer in range(len(similarity)) if layer not in follow]
    blocks = [[*range(*pair)] for pair in itertools.pairwise([*leads, len(similarity)])]
    return [block for block in blocks if len(block) > 1]


def distill(student: Any, teacher: Any, blocks: Sequence[Sequence[int]], pages: Iterator[tuple[Tensor, ...]]) -> None:
    """Train a student, in place, on tokens and labels ``[B, N]`` (-100: not to be foretold), first by its teacher."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE)
    for step, (tokens, labels) in enumerate(itertools.islice(pages, sum(STEPS))):
        ours = student(tokens, use_cache=False, output_hidden_states=True)
        loss = F.cross_entropy(ours.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        if step < STEPS[0]:
            with torch.no_grad():
                theirs = teacher(tokens, use_cache=False, output_hidden_states=True)
            said, wanted = (out.logits.flatten(0, 1).log_softmax(-1) for out in (ours, theirs))
            loss = F.kl_div(said, wanted, log_target=True, reduction="batchmean") + F.nll_loss(said, wanted.argmax(-1))
            loss += sum(F.mse_loss(ours.hidden_states[b[-1] + 1], theirs.hidden_states[b[-1] + 1]) for b in blocks)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
