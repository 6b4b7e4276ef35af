"""The study ``zoology``: its mixers against their definitions, training, curves, and a whole run."""

import json
import math

import pytest
import torch
from torch import Tensor

from saccade.core.errors import SpecError
from saccade.study import study_laws, zoology
from saccade.study.zoology import Cell, Model, Point, Training, Zoology, gap_closed, solved, train
from saccade.systems.bench.zoology import ZoologyRecall, judged

WIDTH, LENGTH = 8, 24
TINY = Training(vocab=64, examples=8, epochs=2, batch=4, test=4, tokens_per_pair=8)


def stream(seed: int = 0) -> Tensor:
    return torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed))


def convolved(x: Tensor, taps: Tensor) -> Tensor:
    """Sums over what came before; ``taps [width, reach]``, the token's own first."""
    reach = range(taps.shape[1])
    return torch.stack(
        [torch.stack([taps[:, d] * x[:, t - d] for d in reach if d <= t]).sum(0) for t in range(LENGTH)], 1
    )


def test_short_convolutions_sum_the_last_tokens():
    layer, x = zoology.ShortConvolution(WIDTH), stream()
    assert layer.bias is not None
    torch.testing.assert_close(layer(x), convolved(x, layer.weight[:, 0].flip(-1)) + layer.bias, atol=1e-5, rtol=1e-4)


def test_long_convolutions_sum_all_tokens_so_far_and_add_the_token():
    layer, x = zoology.LongConvolution(WIDTH, LENGTH), stream()
    torch.testing.assert_close(layer(x), convolved(x, layer.filter(layer.distance).T) + x, atol=1e-5, rtol=1e-4)


def test_the_filter_reads_the_official_positions():
    t = torch.arange(LENGTH)
    wanted = torch.exp(-1j * 1e-4 * (2 * math.pi * t / LENGTH))
    found = zoology.LongConvolution(WIDTH, LENGTH).distance
    torch.testing.assert_close(found, torch.stack([t / (LENGTH - 1), wanted.real, wanted.imag], -1))


def test_based_is_the_taylor_expansion_of_softmax():
    layer, x = zoology.Based(WIDTH), stream()
    scores = layer.q(x) @ layer.k(x).mT / math.sqrt(zoology.FEATURES)
    weights = (1 + scores + scores**2 / 2).tril()
    wanted = layer.out(weights / weights.sum(-1, keepdim=True) @ layer.v(x))
    torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-4)


def test_weights_drop_out_only_in_training():
    layer, x = zoology.Softmax(WIDTH, 0.5), stream()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), layer(x))
    scores = (layer.q(x) @ layer.k(x).mT / math.sqrt(WIDTH)).masked_fill(torch.ones(LENGTH, LENGTH).triu(1) > 0, -1e9)
    torch.testing.assert_close(layer(x), layer.out(scores.softmax(-1) @ layer.v(x)), atol=1e-6, rtol=1e-4)


def test_only_chosen_tokens_attend():
    x, tokens = stream(), torch.tensor([5, 0, 7, 0, 5, 7, 9, 9] * 3)[None].expand(2, -1)
    layer = zoology.Selected(WIDTH, zoology.Repeated())
    attends = (layer(x, tokens) != x).any(-1)[0, :8]
    assert attends.tolist() == [False, False, False, False, True, True, False, True]  # 0 is the filler
    choice = zoology.LearnedChoice(WIDTH)
    learned, likes = zoology.Selected(WIDTH, choice).eval(), choice.select(x)[..., 0]
    attends = (learned(x, tokens) != x).any(-1)
    assert attends.sum(1).tolist() == [5, 5]  # the square root of 24, rounded up
    assert likes[attends].view(2, 5).amin(1).ge(likes.masked_fill(attends, -9).amax(1)).all()


def test_learned_selection_pays_above_its_budget():
    choice, x = zoology.LearnedChoice(WIDTH), stream()
    torch.nn.init.zeros_(choice.select.weight)
    choice(x, None)
    assert isinstance(choice.penalty, Tensor)
    assert choice.penalty.item() == pytest.approx(zoology.PENALTY * (0.5 - LENGTH**-0.5))


@pytest.mark.parametrize("mixer", zoology.MIXERS)
def test_no_model_sees_the_future_while_it_trains(mixer: str):
    torch.manual_seed(0)
    model = Model(mixer, 64, WIDTH, LENGTH).train()
    model.dropout.p = 0.0
    for layer in model.layers:
        if isinstance(layer.mixer, zoology.Softmax):
            layer.mixer.dropping.p = 0.0
    tokens = torch.randint(64, (2, LENGTH))
    changed = tokens.clone()
    changed[:, 12:] = torch.randint(64, (2, LENGTH - 12))
    early = torch.arange(LENGTH).expand(2, -1) < 12
    torch.testing.assert_close(model(tokens, early), model(changed, early), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(model(tokens, ~early), model(changed, ~early), atol=1e-5)


def test_first_weights_are_the_official_ones():
    torch.manual_seed(0)
    model = Model("attention", 512, 64, 64)
    deviation = {name: float(p.std()) for name, p in model.named_parameters() if p.ndim > 1}
    assert deviation["embed.table.weight"] == pytest.approx(0.02, rel=0.05)
    assert deviation["layers.0.mixer.out.weight"] == pytest.approx(0.01, rel=0.05)  # 0.02 / sqrt(2 * layers)
    based = dict(Model("based", 512, 64, 64).named_parameters())
    assert float(based["layers.1.mixer.out.weight"].std()) == pytest.approx(0.02, rel=0.05)
    assert float(based["layers.0.mixer.convolution.weight"].std()) == pytest.approx(1 / 3, rel=0.15)  # torch's own


@pytest.mark.parametrize("mixer", zoology.MIXERS)
def test_a_training_is_its_seed(mixer: str):
    torch.manual_seed(1)
    first = train(mixer, 16, WIDTH, 0.01, 0, TINY)
    torch.manual_seed(2)
    assert train(mixer, 16, WIDTH, 0.01, 0, TINY) == first
    assert train(mixer, 16, WIDTH, 0.01, 1, TINY)["loss"] != first["loss"]


def curve(mixer: str, length: int, accuracies: list[float]) -> list[Point]:
    return [Point(mixer, length, 2**i, a, a, a, 0.01) for i, a in enumerate(accuracies)]


def test_solved_widths_and_the_gap():
    points = [
        *curve("attention", 64, [0.5, 0.95, 1.0]),
        *curve("base-conv", 64, [0.1, 0.2, 0.9]),
        *curve("based", 64, [0.3, 0.95, 0.4]),
        *curve("base-conv", 128, [0.1, 0.2, 0.8]),
    ]
    assert [solved(points, m, 64) for m in ("attention", "base-conv", "based")] == [2, 4, 2]
    assert solved(points, "base-conv", 128) is None
    gap = gap_closed([p for p in points if p.length == 64])
    assert gap == {"based": pytest.approx((1.65 - 1.2) / (2.45 - 1.2))}
    assert gap_closed(curve("attention", 64, [0.2])) == {}
    assert (
        gap_closed([*curve("attention", 64, [0.2]), *curve("base-conv", 64, [0.19]), *curve("based", 64, [0.1])]) == {}
    )


def test_the_best_learning_rate_of_each_seed_counts():
    job = Zoology(("base-conv",), (16,), (8,), (0.1, 0.01), (0, 1), TINY)
    scores = {(0.1, 0): 0.5, (0.01, 0): 0.7, (0.1, 1): 0.9, (0.01, 1): 0.2}
    found = [{"result": {"accuracy": scores[c.lr, c.seed], "answers": 50}} for c in job.cells]
    (point,) = job.points(found)
    assert (point.accuracy, point.lr) == (pytest.approx(0.8), 0.01)
    assert point.low == pytest.approx(0.7112, abs=1e-4)  # Wilson's, 80 of 100
    assert point.high == pytest.approx(0.8666, abs=1e-4)


def claimed(attention: float, hybrid: float, narrow: float, wide: float) -> list[Point]:
    """The claim's points: the greater length as given, the other solved wherever the convolution is wide."""
    found = {"attention": attention, "learned": 0.2, "programmatic": hybrid}
    long = [Point(m, 32, 32, a, a, a, 0.01) for m, a in found.items()]
    short = [Point(m, 16, 32, 1.0, 1.0, 1.0, 0.01) for m in found]
    convolution = [((16, 32), 0.5), ((16, 64), 0.95), ((32, 32), narrow), ((32, 64), wide)]
    return [*short, *long, *(Point("base-conv", *where, a, a, a, 0.01) for where, a in convolution)]


@pytest.mark.parametrize(
    ("points", "fails"),
    [
        (claimed(1.0, 0.99, 0.3, 0.6), ""),
        (claimed(0.8, 0.99, 0.3, 0.6), "attention solves"),
        (claimed(1.0, 0.8, 0.3, 0.6), "a hybrid closes"),
        (claimed(1.0, 0.99, 0.3, 0.95), "more width at the greater length"),
        (claimed(1.0, 0.99, 0.95, 0.95), "more width than attention"),
    ],
)
def test_the_claim_is_judged_by_the_papers_findings(points: list[Point], fails: str):
    found = judged(points)
    assert found.verdict == ("does not hold" if fails else "holds")
    assert fails in found.statement


def test_words_tell_which_widths_grow():
    job = Zoology(("base-conv",), (16,), (8,), (0.1,), (0,), TINY)
    told = job.in_words({"a": {"64": 16, "128": 16}, "b": {"64": 32, "128": None}, "c": {"64": None, "128": None}})
    assert "a needs the same width at every length (16, 16)." in told
    assert "b needs more width at greater length (32, -)." in told
    assert "c does not solve the task (-, -)." in told


def test_settings_determine_the_cells():
    job = ZoologyRecall(lengths=(64,), widths=(16, 32), lrs=(0.01,)).comparison()
    assert len(job.cells) == 5 * 2
    cell = job.cells[0]
    assert cell == Cell("attention", 64, 16, 0.01, 0)
    other = ZoologyRecall(lengths=(64,), widths=(16, 32), lrs=(0.01,), epochs=7).comparison()
    assert json.dumps(job.key(cell)) != json.dumps(other.key(cell))
    with pytest.raises(SpecError, match="take"):
        ZoologyRecall(mixers=("hyena",)).comparison()


@pytest.mark.parametrize("law", study_laws.STUDY_LAWS)
def test_laws(law: str):
    study_laws.STUDY_LAWS[law](ZoologyRecall())
