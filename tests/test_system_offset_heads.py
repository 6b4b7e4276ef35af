"""Offset local heads: planted ones are found, numbers are those of the official definition on dense matrices."""

import pytest
import torch
import transformers as tf
from torch import nn

import saccade
from saccade import Attention, catalog
from saccade.hosts.acts import Frame, run
from saccade.study import laws
from saccade.systems.explain._patches import Displacement
from saccade.systems.explain._textures import sines, textures
from saccade.systems.explain.offset_heads import OffsetHeads, offset_heads

torch.set_num_threads(1)


class Grid(nn.Module):
    """One head for each wanted (column, row) offset on a grid of 5 columns: a query's score is greatest there."""

    def __init__(self, offsets, columns=5, rows=4):
        super().__init__()
        self.saccade_heads, self.size = len(offsets), (columns, rows)
        self.offsets = torch.tensor(offsets).float()

    def heads(self, x):
        columns, rows = self.size
        y, z = torch.meshgrid(torch.arange(rows).float(), torch.arange(columns).float(), indexing="ij")
        place = torch.stack([z.flatten(), y.flatten()], -1)  # [N, 2]
        wanted = place + self.offsets[:, None]  # -|wanted - place|^2 as a product
        q = torch.cat([2 * wanted, -torch.ones(*wanted.shape[:2], 1)], -1)[None] * 20
        k = torch.cat([place, place.square().sum(-1, keepdim=True)], -1)[None, None].expand(1, len(wanted), -1, -1)
        return q.expand(len(x), -1, -1, -1), k.expand(len(x), -1, -1, -1)

    def forward(self, x):
        q, k = self.heads(x)
        return run(self, q, k, k, Frame())


def test_planted_heads_are_found():
    wanted = [(1, 0), (-1, 0), (0, 1), (-1, -1), (0, 0), (2, 0)]
    model = Grid(wanted)
    system = OffsetHeads(columns=5)
    with system.apply(model) as watching:
        model(torch.zeros(3, 1))
    heads = system.heads(watching)
    assert [(h.head, h.neighbour, h.share) for h in offset_heads(heads)] == [
        (i, wanted[i], pytest.approx(1)) for i in range(4)
    ]
    # In the middle a head's offset is the wanted one; at the edge it stays.
    assert heads[0].offset == pytest.approx((0.8, 0), abs=1e-3) and heads[4].distance == pytest.approx(0, abs=1e-3)


class WithClassToken(Grid):
    """The same heads, and before the patches a token that every query gives more weight than any patch."""

    def heads(self, x):
        q, k = super().heads(x)
        most = (q @ k.mT).amax(-1, keepdim=True)
        q, k = torch.cat([q, most + 1], -1), nn.functional.pad(k, (0, 1))
        first = torch.zeros_like(k[:, :, :1])
        first[..., -1] = 1
        return torch.cat([q[:, :, :1], q], 2), torch.cat([first, k], 2)


def test_tokens_that_are_no_patches_do_not_count():
    model, system = WithClassToken([(1, 0), (0, 1), (0, 0)]), OffsetHeads(columns=5, prefix=1)
    with system.apply(model) as watching:
        model(torch.zeros(2, 1))
    heads = system.heads(watching)
    assert [(h.head, h.neighbour, h.share) for h in offset_heads(heads)] == [
        (0, (1, 0), pytest.approx(1)), (1, (0, 1), pytest.approx(1)),
    ]  # fmt: skip
    assert heads[0].offset == pytest.approx((0.8, 0), abs=1e-3)


def test_numbers_are_those_of_the_official_definition():
    """Class token left out, rows divided by what is left, on all heads of a vision transformer of transformers."""
    torch.manual_seed(0)
    config = tf.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=20, patch_size=4,
        initializer_range=0.4,
    )  # fmt: skip
    model, pictures = tf.ViTModel(config).eval(), torch.randn(3, 3, 20, 20)
    system = OffsetHeads(prefix=1)
    with torch.no_grad(), system.apply(model) as watching:
        model(pictures)
    heads = system.heads(watching)
    model.set_attn_implementation("eager")
    maps = torch.stack(model(pictures, output_attentions=True).attentions).detach()[..., 1:, 1:]
    maps = maps / maps.sum(-1, keepdim=True)
    place = torch.stack([torch.arange(25) % 5, torch.arange(25) // 5], -1).float()
    away = place[None] - place[:, None]  # [query, key, 2]
    for h in heads:
        w = maps[h.layer, :, h.head]
        assert h.offset == pytest.approx((w[..., None] * away).sum(2).mean((0, 1)).tolist(), abs=1e-5)
        assert h.distance == pytest.approx(float((w * away.norm(dim=-1)).sum(-1).mean()) / 4, abs=1e-5)
    assert max(h.distance for h in heads) - min(h.distance for h in heads) > 0.02


def test_a_query_without_weight_on_patches_has_no_offset():
    q, k = torch.ones(1, 1, 5, 4), torch.ones(1, 1, 5, 4)
    only_first = Attention(mask=lambda b, h, q, k: k == 0)
    _, seen = saccade.attention(q, k, k, only_first, stats=[Displacement(2, prefix=1)])
    assert not seen["displacement"].any()


def test_the_claims_pictures_are_smooth_along_their_direction_and_places_differ():
    pictures, labels = textures(400)
    across, along = (pictures[labels == c].diff(dim=-1).square().mean() for c in (0, 3))
    assert across > 2 * along  # direction 0 changes along the columns, direction 3 of 6 along the rows
    assert torch.cdist(sines(8), sines(8)).fill_diagonal_(9).min() > 0.1


def test_no_law_fails():
    assert not [r for r in laws.check(catalog.find("offset-heads")) if r.status == "failed"]
