"""Agent attention: a few agents, pooled from the queries, read all keys; then every query reads the agents.

    a    = average of q over the cells of a square grid, [agents, D]
    read = softmax(a K' / sqrt(D) + bias1) V                                          [agents, D]
    o    = softmax(q a' / sqrt(D) + bias2) read  +  convolution(v) + shortcut * v     3 x 3 by channel

Two softmax attentions, each with few rows or few columns: together linear attention whose features are
``softmax(q a' + bias2)`` and ``softmax(a K' + bias1)'``. A bias is the sum of a picture of 7 x 7 stretched over the
grid and of a row's and a column's own number, by head and agent.

In a model that was trained with softmax attention, as it is: without biases and convolution, ``sharpness`` 0.3, which
scales the second scores by ``D ** (-0.5 sharpness)``, and ``shortcut`` 0.075.

Paper: Agent Attention: On the Integration of Softmax and Linear Attention, arXiv:2312.08874
Code: https://github.com/LeapLabTHU/Agent-Attention (agent_transformer/models/agent_swin.py: AgentAttention;
    agentsd/patch.py: make_agent_attn)

Differs: numbers by row and column need a ``grid`` of a known size and are there only if it is given. AgentSD's agents
are tokens merged at random, and it merges queries and keys as well, in steps of a diffusion; here agents are pooled,
and nothing else is merged. First weights of the projections are the backbone's.
"""

from __future__ import annotations

import copy
import math
import statistics
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import SpecError
from ...nn.backbones import Place
from ..base import ClaimNumbers, LayerSystem, Promises
from ._grid import GridLayer
from ._grid_bias import GridBias

AGENTS = 16  # of the claim
LONG = 4096  # tokens of the timing: 64 x 64, as in the first layers of Stable Diffusion
KEPT = 0.95  # of a trained model's accuracy, with agents put in and no training


class Agent(LayerSystem):
    """Settings: ``agents``, a square; ``grid``, rows and columns of the patches, as square as their number allows if
    not given; ``trained``: biases and convolution, or neither, for a model trained without; ``sharpness``;
    ``shortcut``."""

    slug = "agent"
    title = "Agent attention"
    paper = "https://arxiv.org/abs/2312.08874"
    code = "https://github.com/LeapLabTHU/Agent-Attention"
    promises = Promises(causal=False, cross=False, exponent=1.0, decodes=False, padding=False, unit_rows=True, hosts=())

    def __init__(
        self, agents: int = 49, grid: tuple[int, int] | None = None, trained: bool = True, sharpness: float = 1.0,
        shortcut: float = 0.0,
    ):  # fmt: skip
        self.agents, self.grid, self.trained, self.sharpness, self.shortcut = agents, grid, trained, sharpness, shortcut

    def layer(self, place: Place) -> nn.Module:
        """The layer; positions of the backbone are not used. Raises: SpecError if the agents are no square."""
        return AgentLayer(place, self)

    def inserted(self, model: nn.Module) -> nn.Module:
        """A copy of a vision transformer whose layers have these agents and its own weights."""
        changed = copy.deepcopy(model)
        blocks = changed.stack.blocks  # type: ignore[union-attr]
        for index, block in enumerate(blocks):  # type: ignore[arg-type]
            old = block.attention
            layer = self.layer(Place(old.q.in_features, old.heads, index, len(blocks), None, None))  # type: ignore[arg-type]
            found = layer.load_state_dict(old.state_dict(), strict=False)
            nothing = [name for name in found.missing_keys if not name.endswith("bias")]
            if nothing:
                raise SpecError(f"Agent: the model has no weights for {nothing}: give trained=False")
            for name in found.missing_keys:  # the backbone's projections have no biases
                nn.init.zeros_(layer.get_parameter(name))
            block.attention = layer
        return changed

    def claim(self) -> ClaimNumbers:
        """Accuracy trained, and put into trained softmax layers; time of a layer on a long grid."""
        from ...study.claims import interleaved
        from ...study.trainer import accuracy
        from ._pictures import TOKENS, learn, pictures, plain

        side = math.isqrt(TOKENS)
        result = learn({"softmax": None, "plain": plain(), "agent": Agent(AGENTS, (side, side))})
        put = Agent(AGENTS, trained=False, sharpness=0.3, shortcut=0.075)
        held = list(islice(pictures(10_000), 16))
        x = torch.randn(1, LONG, 64, generator=torch.Generator().manual_seed(0))
        place = Place(64, 2, 0, 1, None, None)
        layers = {"agent": put.layer(place), "softmax": _Softmax(place)}
        with torch.no_grad():
            inserted = [
                statistics.fmean(float(accuracy(put.inserted(model), batch)) for batch in held)
                for model in result.models["softmax"]
            ]
            faster = interleaved({name: partial(m, x) for name, m in layers.items()}, 5).ratio("softmax", "agent")
        kept = statistics.fmean(inserted) / result.mean("softmax")
        return ClaimNumbers.decide(
            result.numbers()
            | {"accuracy_inserted": [round(x, 4) for x in inserted], "kept": round(kept, 4)}
            | {f"speed_over_softmax_at_{LONG}": round(faster, 3)},
            f"Of unseen pictures {result.mean('agent'):.1%} are classed right (softmax attention"
            f" {result.mean('softmax'):.1%}, plain linear attention {result.mean('plain'):.1%}). Put into the trained"
            f" softmax models without training, {AGENTS} agents for {TOKENS} tokens keep {kept:.1%} of their accuracy."
            f" On {LONG} tokens the layer is {faster:.2f} times as fast as softmax attention.",
            accuracy_of_softmax=result.mean("agent") >= result.mean("softmax"),
            works_without_training=kept >= KEPT,
            faster=faster > 1,
        )


class AgentLayer(GridLayer):
    """The layer of this place."""

    def __init__(self, place: Place, system: Agent):
        super().__init__(nn.Identity(), place, None if system.grid is None else system.grid[0])
        side = math.isqrt(system.agents)
        if side * side != system.agents or side < 1:
            raise SpecError(f"Agent: agents must be a square number, 1, 4, 9, ...; got {system.agents}")
        heads, width = place.heads, place.width
        self.side, self.shortcut = side, system.shortcut
        self.factors = self.head_width**-0.5, self.head_width ** (-0.5 * system.sharpness)
        self.gather = GridBias(heads, system.agents, system.grid) if system.trained else None
        self.give = GridBias(heads, system.agents, system.grid) if system.trained else None
        self.convolution = nn.Conv2d(width, width, 3, padding=1, groups=width) if system.trained else None

    def read(self, q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
        picture = self.picture(q)
        grid = picture.shape[-2], picture.shape[-1]
        agents = self.heads_of(F.adaptive_avg_pool2d(picture, self.side))
        first, second = agents @ k.mT * self.factors[0], q @ agents.mT * self.factors[1]
        if self.gather is not None and self.give is not None:
            first, second = first + self.gather(grid), second + self.give(grid).mT
        out = second.softmax(-1) @ (first.softmax(-1) @ v) + self.shortcut * v
        return out if self.convolution is None else out + self.heads_of(self.convolution(self.picture(v)))


class _Softmax(GridLayer):
    def __init__(self, place: Place):
        super().__init__(nn.Identity(), place, None)

    def read(self, q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)
