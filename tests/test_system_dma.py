"""Dynamic mask attention against transformers' DogeAttention, its definition row by row, and its blocks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import DogeConfig
from transformers.models.doge.modeling_doge import DogeAttention

from saccade import masks
from saccade.catalog import find
from saccade.core.errors import SpecError
from saccade.nn.backbones import Place
from saccade.nn.positions import RoPE
from saccade.systems.sparse._greatest_so_far import strongest
from saccade.systems.sparse.dma import DMA

torch.set_num_threads(1)
WIDTH, HEADS, KV, N = 32, 4, 2, 41


def layer(window, kv=KV, positions=None, width=WIDTH):
    torch.manual_seed(0)
    made = DMA(window).layer(Place(width, HEADS, 0, 1, positions, kv)).double()
    with torch.no_grad():
        made.A.weight.copy_(torch.linspace(-1.5, 1.5, kv)[:, None])
        made.dt.weight.mul_(3)
    return made


def stream(n=N, batch=2, seed=1):
    return torch.randn(batch, n, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def doge(mine, window):
    """The official layer with the same weights. Its norms of q and k belong to the model and are taken out."""
    config = DogeConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=KV, keep_window_size=window,
        attn_implementation="sdpa",  # its eager softmax is float32
    )  # fmt: skip
    official = DogeAttention(config, 0).double()
    official.q_norm = official.k_norm = nn.Identity()
    pairs = [(f"{name}_proj", name) for name in ("q", "k", "v", "dt")] + [("o_proj", "out")]
    official.load_state_dict({"A": mine.A.weight[:, 0]} | {f"{a}.weight": getattr(mine, b).weight for a, b in pairs})
    return official


def hidden(n):
    """What transformers adds to the scores of a causal model."""
    return torch.full((n, n), torch.finfo(torch.float64).min, dtype=torch.float64).triu(1)[None, None]


@pytest.mark.parametrize("window", [1, 7, 64])
def test_it_is_the_official_layer(window):
    mine, x = layer(window, positions=RoPE()), stream().requires_grad_()
    official = doge(mine, window)
    frequencies = 10_000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    angle = (torch.arange(N, dtype=torch.float64)[:, None] * frequencies).repeat(1, 2)[None]
    theirs, _ = official(x, (angle.cos(), angle.sin()), hidden(N))
    ours = mine(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, b in ((x, x), (mine.A.weight, official.A), (mine.dt.weight, official.dt_proj.weight)):
        left, right = (
            torch.autograd.grad(y.square().sum(), p, retain_graph=True)[0] for y, p in ((ours, a), (theirs, b))
        )
        assert left.any() or window == 1  # one key has all the weight, whatever its bias
        torch.testing.assert_close(left, right.view_as(left), rtol=1e-9, atol=1e-12)


def test_a_window_as_long_as_the_text_and_no_gain_is_plain_attention():
    mine, x = layer(N), stream()
    with torch.no_grad():
        mine.A.weight.zero_()  # then every bias is one
        q, k, v = mine.placed(x)
        plain = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(mine(x), mine.merge(plain, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("start", [0, 5, 39])
def test_a_row_sees_the_greatest_and_of_equal_ones_the_newest(start):
    values = torch.randint(0, 6, (2, KV, N), generator=torch.Generator().manual_seed(3)).double()  # many are equal
    mask = masks.Causal() & strongest(values, 6, start)
    seen = masks.block_map(mask, N - start, N, rows=1, columns=1, batch=2, heads=HEADS).codes
    for b in range(2):
        for h in range(HEADS):
            for i in range(start, N):
                order = sorted(range(i + 1), key=lambda j: (values[b, h // 2, j].item(), j))
                assert seen[b, h, i - start].nonzero()[:, 0].tolist() == sorted(order[-6:])


@pytest.mark.parametrize("rows, columns", [(8, 8), (16, 4), (3, 7)])
def test_blocks_are_never_wrong_and_skip(rows, columns):
    n = 96
    bias = torch.randn(1, 2, n, generator=torch.Generator().manual_seed(4))
    bias[:, :, 16:80] -= 10  # a stretch that drops out at once
    mask = strongest(bias, 12)
    one, many = (masks.block_map(mask, n, rows=r, columns=c, heads=HEADS).codes for r, c in ((1, 1), (rows, columns)))
    grown = many.repeat_interleave(rows, 2).repeat_interleave(columns, 3)[:, :, :n, :n]
    assert not one[grown == masks.EMPTY].any() and one[grown == masks.FULL].all()
    assert (many == masks.EMPTY).float().mean() > 0.2 and (many == masks.FULL).any()


@pytest.mark.parametrize("window", [1, 5])
def test_decoding_equals_prefill(window):
    mine, x = layer(window, positions=RoPE()), stream()
    with torch.no_grad():
        cache = mine.cache()
        parts = [mine(part, cache=cache) for part in x.split((9, 1, 1, 20, 10), 1)]
        torch.testing.assert_close(torch.cat(parts, 1), mine(x), rtol=1e-12, atol=1e-12)
    assert cache.length == N and cache.bias.shape == (2, KV, N)
    assert cache.nbytes == 8 * 2 * KV * N * (2 * WIDTH // HEADS + 1)


def test_padding_takes_nobodys_place():
    mine, x = layer(5), stream()
    keep = torch.ones(2, N, dtype=torch.bool)
    keep[0, :13] = False  # on the left, where every later row looks back on it
    keep[1, 30:] = False
    with torch.no_grad():
        both = mine(x, keep=keep)
        torch.testing.assert_close(both[0, 13:], mine(x[:1, 13:])[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(both[1, :30], mine(x[1:, :30])[0], rtol=1e-12, atol=1e-12)


def test_it_learns_two_more_tensors_and_refuses_an_empty_window():
    names = {name: tuple(p.shape) for name, p in layer(5).named_parameters()}
    assert names["A.weight"] == (KV, 1) and names["dt.weight"] == (KV, KV * WIDTH // HEADS) and len(names) == 6
    with pytest.raises(SpecError, match="window=0"):
        DMA(0).layer(Place(WIDTH, HEADS, 0, 1, None, None))
    assert find("dma") is DMA
