"""Each part against a definition of its own: a closed form, a formula written out, another package."""

from __future__ import annotations

import math

import entmax
import pytest
import torch
from torch.testing import assert_close

import saccade
from dense import qkv
from saccade import Attention, SpecError, edits, masks, normalizers, scores, stats

N, M, H = 11, 17, 4
HIDDEN = float("-inf")


def logits(seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, H, N, M, generator=draw, dtype=torch.float64) * 2


def at() -> saccade.At:
    return saccade.At.everywhere(2, H, N, M, M - N, False, torch.device("cpu"))


def raw() -> tuple[list[torch.Tensor], torch.Tensor]:
    inputs = [x.detach() for x in qkv((2, H, 2, N, M))]
    return inputs, inputs[0] @ inputs[1].repeat_interleave(2, 1).mT


@pytest.mark.parametrize("way", ["forward", "inplace"])
def test_normalizers(way):
    s, where = logits(), at()

    def run(normalizer: normalizers.Normalizer) -> torch.Tensor:
        return getattr(normalizer, way)(s.clone(), where)

    sink = torch.randn(H, dtype=torch.float64)
    padded = torch.cat([s, sink[:, None, None].expand(2, H, N, 1)], -1).softmax(-1)[..., :-1]
    assert_close(run(normalizers.Softmax()), s.softmax(-1))
    assert_close(run(normalizers.Softmax(sink=sink)), padded)
    assert_close(run(normalizers.Softmax(off_by_one=True)), s.exp() / (1 + s.exp().sum(-1, keepdim=True)))
    assert_close(run(normalizers.Sigmoid()), 1 / (1 + M * (-s).exp()))
    assert_close(run(normalizers.Sigmoid(0.3)), torch.sigmoid(s + 0.3))
    assert_close(run(normalizers.ReLU()), s.clamp(min=0))
    assert_close(run(normalizers.ReLU(row_norm=True)), s.clamp(min=0) / s.clamp(min=0).sum(-1, keepdim=True))
    assert_close(run(normalizers.Identity()), s)
    assert_close(run(normalizers.Signed()), s.sign() * s.abs().softmax(-1))
    assert_close(run(normalizers.Sparsemax()), entmax.sparsemax(s, -1))
    assert_close(run(normalizers.Entmax(1.5)), entmax.entmax15(s, -1))
    for alpha in (1.1, 1.3, 1.7, 2.0, 2.5, 4.0):
        assert_close(
            run(normalizers.Entmax(alpha)), entmax.entmax_bisect(s, alpha, -1, n_iter=60), rtol=1e-6, atol=1e-8
        )
    best, index = s.sort(-1, descending=True)
    want = torch.zeros_like(s).scatter(-1, index[..., :3], best[..., :3].softmax(-1))
    assert_close(run(normalizers.TopKSoftmax(3)), want)


def test_entmax_gradients_equal_the_packages():
    s = logits().requires_grad_()
    alpha = torch.tensor([1.2, 1.4, 1.6, 1.9], dtype=torch.float64, requires_grad=True)
    g = logits(1)
    ours = normalizers.Entmax(alpha)(s, at())
    theirs = entmax.entmax_bisect(s, alpha[:, None, None].expand(2, H, N, 1), -1, n_iter=60)
    got, want = (torch.autograd.grad(w, [s, alpha], g) for w in (ours, theirs))
    assert_close(got[0], want[0], rtol=1e-5, atol=1e-7)
    assert_close(got[1], want[1], rtol=1e-4, atol=1e-6)
    for kind, theirs in ((1.5, entmax.entmax15), (2.0, entmax.sparsemax)):
        got, want = (torch.autograd.grad(w, s, g)[0] for w in (normalizers.Entmax(kind)(s, at()), theirs(s, -1)))
        assert_close(got, want)


def test_entmax_has_exact_zeros_and_unit_rows():
    w = normalizers.Entmax(1.5)(logits() * 3, at())
    assert (w == 0).double().mean() > 0.3
    assert_close(w.sum(-1), torch.ones(2, H, N, dtype=torch.float64))


def test_scores():
    (q, k, _), s = raw()
    width = q.shape[-1]
    distance = (torch.arange(N)[:, None] + M - N - torch.arange(M)).double()
    slopes = torch.tensor([2 ** (-8 * (i + 1) / H) for i in range(H)], dtype=torch.float64)
    table, temperature = torch.randn(H, 9, dtype=torch.float64), torch.rand(2, H, N, dtype=torch.float64) + 0.5
    matrix, weight = torch.randn(H, H, dtype=torch.float64), torch.randn(width, width, dtype=torch.float64)
    wq, wk, energy = (torch.randn(*size, dtype=torch.float64) for size in ((5, width), (5, width), (5,)))
    dot = s / math.sqrt(width)
    keys = k.repeat_interleave(2, 1)
    bahdanau = torch.tanh((q @ wq.T)[:, :, :, None] + (keys @ wk.T)[:, :, None]) @ energy
    cases = {
        scores.Dot(0.3): 0.3 * s,
        scores.SoftCap(2.0): 2 * torch.tanh(dot / 2),
        scores.ALiBi(): dot - slopes[:, None, None] * distance.abs(),
        scores.RelativeBias(H, 4, table=table): dot + table[:, (distance.clamp(-4, 4) + 4).long()],
        scores.Temperature(temperature): dot / temperature[..., None],
        scores.Bilinear(weight): (q @ weight) @ keys.mT,
        scores.Additive(wq, wk, energy): bahdanau,
        scores.MixHeads(matrix): torch.einsum("hg,bgnm->bhnm", matrix, dot),
        scores.Bias(dot): 2 * dot,
    }
    for part, want in cases.items():
        assert_close(saccade.weights(q, k, Attention(score=part, normalizer=normalizers.Identity())), want)


def test_alibi_slopes_of_the_paper():
    assert_close(scores.ALiBi.geometric(8), torch.tensor([2.0**-i for i in range(1, 9)]))
    six = scores.ALiBi.geometric(6)  # four of the sequence for 4 heads, then every other one of that for 8
    assert_close(six, torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]))


def test_t5_buckets_equal_transformers():
    from transformers.models.t5.modeling_t5 import T5Attention

    for bidirectional in (True, False):
        part = scores.RelativeBias(1, 128, buckets=32, bidirectional=bidirectional)
        distance = torch.arange(-300, 300)
        want = T5Attention._relative_position_bucket(-distance, bidirectional, num_buckets=32, max_distance=128)
        assert torch.equal(part._bucket(distance), want)


def test_edits():
    (q, k, _), s = raw()
    w = (s / math.sqrt(q.shape[-1])).masked_fill(torch.arange(M) == 2, HIDDEN).softmax(-1)
    seen = torch.arange(M) != 2
    first = torch.arange(M) < 4
    gate, matrix = torch.rand(H, dtype=torch.float64), torch.randn(H, H, dtype=torch.float64)
    given = torch.rand(N, M, dtype=torch.float64)
    eye = torch.arange(N)[:, None] + M - N == torch.arange(M)
    taken = (w * (torch.arange(M) < 1)).sum(-1, keepdim=True)
    held = (w * ((torch.arange(M) >= 1) & (torch.arange(M) < 6))).sum(-1, keepdim=True)
    moved = torch.where(torch.arange(M) < 1, w * 0.5, torch.where(torch.arange(M) < 6, w * (1 + 0.5 * taken / held), w))
    cases = {
        edits.Scale(0.5, keys=slice(0, 4)): torch.where(first, w * 0.5, w),
        edits.Scale(gate): w * gate[:, None, None],
        edits.Zero(keys=first, heads=[1]): torch.where(first & (torch.arange(H) == 1)[:, None, None], 0, w),
        edits.Zero(queries=-1): torch.where((torch.arange(N) == N - 1)[:, None], 0, w),
        edits.Replace(given, keys=first): torch.where(first & seen, given, w),
        edits.Redistribute([0], slice(1, 6), 0.5): moved,
        edits.Mix("uniform", 0.2): 0.8 * w + 0.2 * seen / (M - 1),
        edits.Mix("identity", 0.2): 0.8 * w + 0.2 * (eye & seen),
        edits.Mix(given, 0.2): 0.8 * w + 0.2 * given * seen,
        edits.MixHeads(matrix): torch.einsum("hg,bgnm->bhnm", matrix, w),
    }
    hide = masks.as_mask(seen.view(1, M))
    for part, want in cases.items():
        assert_close(saccade.weights(q, k, Attention(mask=hide, edits=[part])), want, msg=lambda m, p=part: f"{p}: {m}")
    both = saccade.weights(q, k, Attention(mask=hide, edits=[edits.Zero(keys=first), edits.Renormalize()]))
    assert_close(both, (w * ~first) / (w * ~first).sum(-1, keepdim=True))


def test_an_edit_never_shows_a_hidden_key():
    (q, k, _), _ = raw()
    for edit in (
        lambda w, b, h, q, k: w + 1,
        edits.Replace(1.0),
        edits.Mix("uniform", 0.5),
        edits.Mix("identity", 0.5),
    ):
        w = saccade.weights(q, k, Attention(mask=masks.Causal(), edits=edit))
        hidden = torch.arange(M) > torch.arange(N)[:, None] + M - N
        assert (w.masked_select(hidden) == 0).all()


def test_stats():
    (q, k, v), s = raw()
    s = s / math.sqrt(q.shape[-1])
    seen_keys = torch.arange(M) <= torch.arange(N)[:, None] + M - N
    s = s.masked_fill(~seen_keys, HIDDEN)
    w = s.softmax(-1)
    edited = torch.where(torch.arange(M) < 3, w * 0.5, w)
    distance = (torch.arange(N)[:, None] + M - N - torch.arange(M)).abs()
    watched = [
        stats.LogSumExp(), stats.Max(), stats.Entropy(), stats.Entropy("before", edited=False), stats.KeyMass(),
        stats.RegionMass({"first": slice(0, 3), "last": [-1]}), stats.BlockMax((4, 5)), stats.BlockMean((4, 5)),
        stats.TopK(3), stats.MeanDistance(), stats.Rows([2, -1]),
    ]  # fmt: skip
    for backend in ("reference", "band"):
        spec = Attention(mask=masks.Causal(), edits=[edits.Scale(0.5, keys=slice(0, 3))])
        _, seen = saccade.attention(q, k, v, spec, stats=watched, backend=backend)
        assert_close(seen["log_sum_exp"], s.logsumexp(-1))
        assert_close(seen["max"], s.amax(-1))
        assert_close(seen["entropy"], torch.special.entr(edited).sum(-1))
        assert_close(seen["before"], torch.special.entr(w).sum(-1))
        assert_close(seen["key_mass"], edited.sum(-2))
        assert_close(seen["region_mass"]["first"], edited[..., :3].sum(-1))
        assert_close(seen["region_mass"]["last"], edited[..., -1])
        blocks = torch.nn.functional.pad(edited, (0, -M % 5, 0, -N % 4)).unflatten(-1, (-1, 5)).unflatten(2, (-1, 4))
        assert_close(seen["block_max"], blocks.amax((3, 5)))
        sizes = torch.tensor([4.0, 4, 3])[:, None] * torch.tensor([5.0, 5, 5, 2])
        assert_close(seen["block_mean"], blocks.sum((3, 5)) / sizes)
        assert_close(seen["top_k"].weights, edited.topk(3, -1).values)
        assert_close(edited.gather(-1, seen["top_k"].keys), seen["top_k"].weights)
        assert_close(seen["mean_distance"], (edited * distance).sum(-1) / edited.sum(-1))
        assert_close(seen["rows"], edited[:, :, [2, -1]])


def test_top_k_of_rows_that_see_fewer():
    q, k, v = (x.detach() for x in qkv((1, 1, 1, 4, 4)))
    _, seen = saccade.attention(q, k, v, Attention(mask=masks.Causal()), stats=[stats.TopK(3)])
    assert seen["top_k"].keys[0, 0, 0].tolist() == [0, -1, -1] and seen["top_k"].weights[0, 0, 0, 1:].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: scores.SoftCap(0), "above 0"),
        (lambda: scores.Bilinear(torch.zeros(3)), r"\[Dq, Dk\]"),
        (lambda: scores.Additive(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(4)), "energy"),
        (lambda: scores.RelativeBias(2, 4, table=torch.zeros(2, 3)), r"\[2, 9\]"),
        (lambda: normalizers.Entmax(1.0), "alpha > 1"),
        (lambda: normalizers.TopKSoftmax(0), "k >= 1"),
        (lambda: normalizers.Softmax(sink=1.0, off_by_one=True), "one or the other"),
        (lambda: edits.Dropout(1.0), "0 <= p < 1"),
        (lambda: edits.Mix("even", 0.1), "uniform"),
        (lambda: stats.TopK(0), "k >= 1"),
        (lambda: stats.RegionMass({}), "at least one"),
        (lambda: Attention(score=[lambda s, b, h, q, k: s, scores.Dot()]), "must come first"),
        (lambda: Attention(normalizer=3), "saccade.normalizers"),
        (lambda: Attention(edits=[3]), "saccade.edits"),
        (lambda: run(score=scores.ALiBi(torch.zeros(3))), "one value per head"),
        (lambda: run(score=scores.Temperature(torch.ones(N + 1))), "N is 11"),
        (lambda: run(score=scores.MixHeads(torch.eye(3))), "3 heads, the call has 4"),
        (lambda: run(edits=[edits.Zero(keys=[M])]), "outside"),
        (lambda: run(edits=[edits.Zero(keys=torch.ones(3) > 0)]), "bool tensor"),
        (lambda: run(edits=[edits.Scale(torch.ones(2))]), r"\[4\]"),
        (lambda: run(edits=[edits.Redistribute(None, [1])]), "take from"),
    ],
)
def test_errors_say_what_was_expected(make, says):
    with pytest.raises(SpecError, match=says):
        make()


def run(**program):
    (q, k, v), _ = raw()
    return saccade.attention(q, k, v, Attention(**program), backend="band")


@pytest.mark.parametrize("kind", ["bias", "own part"])
@pytest.mark.parametrize("edited", [False, True])
def test_a_row_that_scores_hide_whole_is_zero(kind, edited):
    """An additive mask of -inf hides a row of keys as a mask does: zeros and zero gradients, never NaN."""
    n = 40
    hidden = torch.zeros(n, n, dtype=torch.float64)
    hidden[7] = hidden[12, 5:] = HIDDEN

    class Hides(scores.Score):
        def forward(self, score, at):
            return score + hidden[at.q, at.k]

    score = scores.Bias(hidden) if kind == "bias" else Hides()
    change = [edits.Scale(0.5, keys=slice(0, 3))] if edited else []
    q, k, v = (x.detach().requires_grad_() for x in qkv((1, 2, 2, n, n)))
    got, want = (
        saccade.attention(q, k, v, Attention(score=[score], edits=change), backend=backend)
        for backend in ("band", "reference")
    )
    assert bool((got[:, :, 7] == 0).all())
    assert_close(got, want, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (got, want)]
    for mine, theirs in zip(*gradients, strict=True):
        assert_close(mine, theirs, rtol=0, atol=1e-12)
    with torch.no_grad():
        out = saccade.attention(q, k, v, Attention(score=[score], edits=change), backend="band")
    assert_close(out, want, rtol=0, atol=1e-12)
