"""MInference's three patterns against the definition written out with loops, its search, and its builds."""

import math

import pytest
import torch

from saccade import attention, masks
from saccade.core.attend import weights
from saccade.core.errors import SpecError
from saccade.core.masks import Span
from saccade.systems.sparse._pattern_search import SPACE, search
from saccade.systems.sparse.minference import MInference, Pattern, Patterns
from test_system_flexprefill import draw

torch.set_num_threads(1)


def by_hand(q, k, pattern):
    """Bool ``[N, N]`` of one head: what each query may see, causality included."""
    n, starts = len(q), range(0, len(q), 64)
    if pattern.kind == "block-sparse":
        mean_q, mean_k = (torch.stack([x[s : s + 64].mean(0) for s in starts]) for x in (q, k))
        keys = []
        for i in range(len(starts)):
            best = (mean_k[: i + 1] @ mean_q[i]).topk(min(pattern.a, i + 1)).indices
            keys.append({j for b in best.tolist() for j in range(64 * b, 64 * b + 64)})
    else:
        first, near = range(pattern.a), range(pattern.b)
        if pattern.kind == "vertical-slash":
            future = ~torch.ones(n, n).tril().bool()
            a = (q @ k.T / q.shape[1] ** 0.5).masked_fill(future, -math.inf).softmax(-1)[-64:]
            column, distance = a.sum(0), torch.stack([a.diagonal(n - 64 - d).sum() for d in range(n)])
            column[:30] = distance[:100] = math.inf
            first = column.topk(pattern.a).indices.tolist()
            near = distance.topk(pattern.b).indices.tolist()
        keys = [{s + i - d for d in near for i in range(64)} | set(first) for s in starts]
    seen = torch.zeros(n, n, dtype=torch.bool)
    for start, found in zip(starts, keys, strict=True):
        seen[start : start + 64, [j for j in found if 0 <= j < n]] = True
    return seen.tril()


GIVEN = [Pattern("vertical-slash", 45, 110), Pattern("block-sparse", 2), Pattern("a-shape", 20, 70)]


@pytest.mark.parametrize("pattern", GIVEN, ids=lambda p: p.kind)
@pytest.mark.parametrize("n", [512, 470])
def test_each_pattern_is_the_papers(pattern, n):
    q, k, _ = draw(n)
    w = weights(q, k, MInference([pattern]).build(2))
    for head in range(2):
        wanted = by_hand(q[0, head], k[0, 0], pattern)
        assert torch.equal(w[0, head] > 0, wanted)
        assert wanted.sum() < 0.9 * n * (n + 1) / 2
    dense = weights(q, k).masked_fill(w == 0, 0)
    torch.testing.assert_close(w, dense / dense.sum(-1, keepdim=True))


def test_heads_have_their_own_patterns_and_tiles_give_what_the_weights_say():
    q, k, v = draw(470)
    spec = MInference([GIVEN[0], GIVEN[1]]).build(2)
    w = weights(q, k, spec)
    for head in range(2):
        assert torch.equal(w[0, head] > 0, by_hand(q[0, head], k[0, 0], GIVEN[head]))
    torch.testing.assert_close(attention(q, k, v, spec, backend="band"), w @ v)
    with pytest.raises(SpecError, match="one for each of 3 heads"):
        MInference(GIVEN[:2]).build(3)


def test_decoding_is_dense():
    q, k, v = draw(300)
    found = attention(q[:, :, -1:], k, v, MInference([Pattern("block-sparse", 1)]).build(2))
    torch.testing.assert_close(found, torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True,
        is_causal=True)[:, :, -1:])  # fmt: skip


def test_the_search_finds_for_each_head_what_fits_it_at_equal_work():
    """The first head looks for its theme in whole blocks, anywhere; the second at a few keys from everywhere."""
    torch.manual_seed(0)
    n, theme = 768, torch.nn.functional.one_hot(torch.arange(12) % 6, 6).float().repeat_interleave(64, 0)
    far = torch.zeros(n, 2)
    far[torch.arange(130, n, 90), 0] = 6  # each is seen by all that come later
    k = torch.stack([torch.cat([theme, torch.zeros(n, 2)], -1), torch.cat([torch.zeros(n, 6), far], -1)])[None]
    q = torch.stack([torch.cat([8 * theme, torch.zeros(n, 2)], -1), torch.cat([torch.zeros(n, 6), far * 0 + 3], -1)])
    v = torch.randn(1, 2, n, 8)
    found = search(3 * q[None], k, v, share=0.4)
    assert [p.kind for p in found] == ["block-sparse", "vertical-slash"]
    codes = masks.Causal().blocks(Span.grid(n, n, 64, 1))[None, None]
    for head, pattern in enumerate(found):
        work = (Patterns([pattern]).choose(q[None, head : head + 1], k[:, head : head + 1], codes).blocks >= 0).sum()
        assert 0.25 < work / (codes > 0).sum() <= 0.4
    base = next(p for p in SPACE if p.kind == "block-sparse")
    assert found[0].a < base.a
