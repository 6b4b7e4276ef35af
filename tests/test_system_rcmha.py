"""RCMHA against the official scores, written out with their shift, and what it is when its new parts do nothing."""

import math

import pytest
import torch
from torch.nn import functional

from saccade import Attention, SpecError, masks
from saccade.nn import GPT, MultiHead
from saccade.nn.backbones import Place
from saccade.nn.init import initialise
from saccade.systems.score import _relative as relative
from saccade.systems.score.rcmha import RCMHA

torch.set_num_threads(1)
WIDTH, HEADS, D, N = 16, 2, 8, 13


def made(reach=4096):
    torch.manual_seed(0)
    layer = RCMHA(reach).layer(Place(WIDTH, HEADS, 0, 1, None, None))
    initialise(layer, "xavier", 3)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p), alpha=0.5)
    return layer.double(), torch.randn(2, N, WIDTH, dtype=torch.float64)


def shift_right(x):
    """labml's: row i of ``x [i, j, ...]`` moved i places to the right."""
    padded = torch.cat([x, x.new_zeros(x.shape[0], 1, *x.shape[2:])], 1)
    return padded.view(x.shape[1] + 1, x.shape[0], *x.shape[2:])[:-1].reshape(x.shape)


def official(layer, x):
    """RelativeMultiHeadAttention of rcmha/attention.py, tokens first; entries for the future are random: hidden."""
    x = x.transpose(0, 1)
    q, k, v = (
        functional.conv1d(
            part.unflatten(-1, (HEADS, D)).permute(1, 2, 3, 0).reshape(2 * HEADS, D, N),
            conv.weight, conv.bias, padding=2, groups=D,
        )[..., :-2].view(2, HEADS, D, N).permute(3, 0, 1, 2)
        for part, conv in zip((layer.q(x), layer.k(x), layer.v(x)), layer.convolutions, strict=True)
    )  # fmt: skip
    future = torch.randn(N - 1, HEADS, D + 1, dtype=x.dtype)
    past = torch.cat([layer.distance, layer.distance_bias[..., None]], -1)[:, : N + 1].flip(1).transpose(0, 1)
    table = torch.cat([past, future])  # from distance N to -(N - 1), as key_pos_embeddings[P - N : P + N]
    ac = torch.einsum("ibhd,jbhd->ijbh", q + layer.query_bias[:, 0], k)
    b = torch.einsum("ibhd,jhd->ijbh", q, table[..., :D])
    bd = shift_right(b + table[None, :, None, :, D])[:, -N:]
    scores = ((ac + bd) / math.sqrt(D)).masked_fill(torch.ones(N, N).triu(1).bool()[..., None, None], -math.inf)
    out = torch.einsum("ijbh,jbhd->ibhd", scores.softmax(1), v)
    return layer.out(out.reshape(N, 2, -1)).transpose(0, 1)


def test_rcmha_is_the_official_function():
    layer, x = made()
    out, expected = layer(x), official(layer, x)
    torch.testing.assert_close(out, expected)
    up = torch.randn_like(out)
    for name, p in layer.named_parameters():
        ours, theirs = (torch.autograd.grad((y * up).sum(), p, retain_graph=True)[0] for y in (out, expected))
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")


def test_far_distances_share_the_last_entry():
    near, x = made(5)
    far, _ = made(N)
    with torch.no_grad():
        far.load_state_dict({k: v for k, v in near.state_dict().items() if "distance" not in k}, strict=False)
        share = torch.arange(N).clamp(max=4)
        far.distance.copy_(near.distance[:, share])
        far.distance_bias.copy_(near.distance_bias[:, share])
    torch.testing.assert_close(near(x), far(x))


def test_without_what_is_new_it_is_multi_head_attention():
    layer, x = made()
    with torch.no_grad():
        for p in (layer.distance, layer.distance_bias, layer.query_bias):
            p.zero_()
        for conv in layer.convolutions:
            conv.weight.copy_(torch.tensor([0.0, 0.0, 1.0]).expand_as(conv.weight))
            conv.bias.zero_()
    plain = MultiHead(Attention(mask=masks.Causal()), WIDTH, HEADS, bias=True).double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    with torch.no_grad():
        plain.q.bias.zero_()
        plain.k.bias.zero_()
    torch.testing.assert_close(layer(x), plain(x))
    new = sum(p.numel() for p in layer.parameters()) - sum(p.numel() for p in plain.parameters())
    assert new == HEADS * 4096 * (D + 1) + HEADS * D + 3 * (3 * D + D) - 2 * WIDTH
    with pytest.raises(SpecError, match="no context"):
        layer(x, x)


def test_first_weights_are_torchs_for_the_convolutions_and_zero_for_distances():
    model = GPT(9, 64, 1, 2, attention=RCMHA(8), positions=None)
    layer = model.attentions[0]
    for conv in layer.convolutions:
        assert conv.weight.abs().max() <= 3**-0.5
        assert conv.weight.std() > 0.2  # uniform up to 0.58; GPT-2's deviation is 0.02
    assert not any(p.any() for p in (layer.distance, layer.distance_bias, layer.query_bias))


def test_the_bytes_of_a_step_are_counted():
    model = torch.nn.Linear(10, 4)  # 44 numbers; its product waits for the input, the square for its own
    x = torch.zeros(8, 10)
    assert relative.step_bytes(model, lambda m: m(x).square().sum()) == 4 * 4 * 44 + 4 * 80 + 4 * 32
