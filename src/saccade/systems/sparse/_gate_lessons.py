"""How SeerAttention's gates learn from a model's own attention, which stays as it is."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.stats import BlockMax
from ...hosts.acts import Call
from ...hosts.handles import listen, watch
from .seerattention import UNSEEN, Gate


def distil(
    model: Any, tokens: Tensor, steps: int = 500, batch: int = 2, lr: float = 1e-3, warmup: int = 20, seed: int = 0,
    **settings: Any,
) -> list[Gate]:  # fmt: skip
    """Gates for every layer of a Llama-like model, learned from its attention on texts ``[T, N]``.

    Args:
        model: a causal model of transformers with plain RoPE, which stays as it is.
        tokens: the texts.
        steps, batch, lr, warmup: of Adam with a cosine schedule; the first quarter of each text's rows is left out.
        seed: of the first matrices and the order of the texts.
        settings: of :class:`Gate`.
    """
    config = model.config
    source = torch.Generator().manual_seed(seed)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        theta = config.rope_parameters["rope_theta"]
        gates = [
            Gate(config.num_attention_heads, width, theta=theta, **settings) for _ in range(config.num_hidden_layers)
        ]
    seen: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in gates]
    pooled: dict[int, tuple[Tensor, Tensor]] = {}

    def hear(call: Call) -> None:
        pooled[call.site.layer] = gates[call.site.layer].pooled(call.q, call.k)

    with torch.no_grad(), listen(model, hear), watch(model, BlockMax(gates[0].columns)) as watching:
        for one in tokens.split(1):
            model(one, use_cache=False, logits_to_keep=1)
            for layer, found in enumerate(seen):
                teacher = watching[layer]["block_max"]
                found.append((*pooled[layer], teacher / teacher.sum(-1, keepdim=True)))
    data = [tuple(torch.cat(parts) for parts in zip(*found, strict=True)) for found in seen]
    optimizer = torch.optim.AdamW([p for gate in gates for p in gate.parameters()], lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    rows = data[0][2].shape[2]
    visible = torch.ones(rows, rows).tril().bool()
    with torch.enable_grad():
        for _ in range(steps):
            of = torch.randint(len(tokens), (batch,), generator=source)
            loss = torch.zeros(())
            for gate, (q, k, teacher) in zip(gates, data, strict=True):
                learner = gate.logits(q[of], k[of]).masked_fill(~visible, UNSEEN)[:, :, rows // 4 :].log_softmax(-1)
                loss = loss + F.kl_div(learner, teacher[of][:, :, rows // 4 :], reduction="sum") / learner.numel()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return gates
