"""The study ``cab``: the official numbers, patterns on mechanisms that break them, tasks, and a whole run."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from saccade import Attention, masks
from saccade.core.errors import SpecError
from saccade.nn.attention import MultiHead
from saccade.nn.backbones import Place
from saccade.study import cab, cells, study_laws
from saccade.study.cab import Cell, composite, correlations, crossing, efficiency, refusal
from saccade.study.cab_tasks import PATTERNS, TASKS, Batch, Model, Training, measured, train
from saccade.systems.base import Promises, System
from saccade.systems.bench.cab import PATTERNS as NAMED
from saccade.systems.bench.cab import ComprehensiveAttentionBenchmark

TINY = Training(length=16, width=16, heads=2, layers=1, steps=2, batch=2, test=4)

# Tables of the official repository (tasks/PCC/README.md, scripts/compositional_index/example.txt): PoinTr's metrics.
CLOUDS = {
    "dense": {"CD-l1": 7.425, "CD-l2": 0.231, "F-score": 0.779},
    "abc": {"CD-l1": 7.344, "CD-l2": 0.227, "F-score": 0.784},
    "performer": {"CD-l1": 7.368, "CD-l2": 0.235, "F-score": 0.783},
    "cosformer": {"CD-l1": 8.673, "CD-l2": 0.298, "F-score": 0.704},
}
# scripts/efficiency_length/cost.xlsx: milliseconds and MB at these lengths.
LENGTHS = [256, 512, 1024, 2048, 4096, 8192]
VANILLA: dict[str, list[float]] = {
    "time": [0.472, 0.628, 0.721, 0.981, 3.67, 18.437],
    "memory": [81, 265, 952, 3604, 14020, 55300],
}
ABC: dict[str, list[float]] = {
    "time": [0.648, 0.59, 0.602, 0.91, 1.006, 1.509],
    "memory": [42, 80, 156, 308, 612, 1220],
}


def test_the_index_is_that_of_the_official_leaderboard():
    index = composite({name: [{"points": metrics}] for name, metrics in CLOUDS.items()})
    told = {name: round(found["index"], 3) for name, found in index.items()}
    assert told == {"dense": 0.449, "abc": 0.573, "performer": 0.473, "cosformer": -1.496}  # README, column PCC
    assert index["abc"]["error"] is None


def test_tasks_count_alike_however_many_metrics_they_have():
    def scores(cloud: float, error: float) -> list[dict[str, dict[str, float]]]:
        points = {"CD-l1": cloud, "CD-l2": cloud, "F-score": -cloud}
        return [{"points": points, "forecast": {"MSE": error, "MAE": error}}]

    index = composite({"a": scores(0.0, 1.0), "b": scores(1.0, 0.0)})
    assert index["a"]["tasks"]["points"] == pytest.approx(math.sqrt(0.5))
    assert index["a"]["index"] == index["b"]["index"] == pytest.approx(0, abs=1e-12)


def test_seeds_give_an_error_and_what_diverges_has_no_index():
    def run(value: float) -> dict[str, dict[str, float]]:
        return {"mirror": {"accuracy": value}}

    index = composite({"dense": [run(0.8), run(1.0)], "worse": [run(0.4), run(0.4)], "lost": [run(math.nan), run(0.9)]})
    assert index["lost"]["index"] is None
    deviation = math.sqrt(0.5) * 0.5  # of 0.9 and 0.4
    assert index["dense"]["index"] == pytest.approx(0.25 / deviation)
    assert index["dense"]["error"] == pytest.approx(0.1 / deviation)  # half of the difference of two seeds
    assert index["worse"]["error"] == 0
    alike = composite({"a": [run(0.5)], "b": [run(0.5)]})
    assert alike["a"]["index"] == 0


@pytest.mark.parametrize(("what", "skip", "official"), [("time", 1, 1877), ("memory", 0, 70)])
def test_the_efficiency_length_is_the_official_one(what: str, skip: int, official: int):
    found = crossing(LENGTHS, VANILLA[what], ABC[what], cab.LINEAR, skip)
    assert found["length"] is not None and round(found["length"]) == official
    assert crossing(LENGTHS, ABC[what], VANILLA[what], cab.QUADRATIC)["length"] is None  # and never the other way


def test_a_crossing_of_parabolas_and_none():
    n = [1, 2, 4, 8]
    squares = [x * x for x in n]
    assert crossing(n, squares, [0.5 * x * x + 8 for x in n], 2)["length"] == pytest.approx(4)
    assert crossing(n, squares[:3], [3.0 * x for x in n], 1) == pytest.approx({"length": 3, "r2": 1})
    assert crossing(n, squares, [-x - 1.0 for x in n], 1)["length"] == 0
    timed = {"lengths": n, "seconds": {"system": [3.0 * x for x in n], "eager": squares[:3], "dense": squares}}
    found = efficiency({**timed, "bytes": timed["seconds"]}, cab.LINEAR)
    assert found["seconds_eager"] == pytest.approx({"length": 3, "r2": 1, "first": 4})


class Own(System):
    slug, promises = "own", Promises(causal=False)

    def __init__(self, spec: nn.Module, promises: Promises = promises):
        self.spec, self.given = spec, promises

    def promised(self) -> Promises:
        return self.given

    def build(self, heads: int) -> Attention:
        return self.spec  # type: ignore[return-value]


class Mixing(Own):
    def layer(self, place: Place) -> nn.Module:
        return MultiHead(self.spec, place.width, place.heads)


class MeanOfQueries(nn.Module):
    """Every query asks what all queries together ask: no pattern that is causal."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ((q + q.mean(2, keepdim=True)) @ k.mT).softmax(-1) @ v


def test_patterns_are_promised_and_then_measured():
    promises = Promises(causal=True)
    causal = Own(Attention(mask=masks.Causal()), promises)
    full = Own(Attention(), Promises(causal=True))  # a promise that is not kept
    mixing = Mixing(MeanOfQueries())
    told = {
        name: [refusal(system, pattern, TINY) for pattern in PATTERNS]
        for name, system in {"dense": None, "causal": causal, "full": full, "mixing": mixing}.items()
    }
    assert told["dense"] == [None] * 4
    far = "no query reads the last quarter of the other sequence"
    assert told["causal"] == ["it never reads what lies later", None, far, far]
    assert told["full"] == [None, "what an earlier token gets changes with later ones", None, None]
    later = "what a query gets changes with later queries"
    assert told["mixing"] == [None, "it does not promise to be causal", None, later]
    alone = Own(Attention(), Promises(causal=False, cross=False))
    assert refusal(alone, "noncausal cross", TINY) == "it does not promise to attend to another sequence"
    with pytest.raises(SpecError, match="not finite"):
        refusal(Own(Attention(score=lambda s, b, h, q, k: s * math.nan)), "noncausal cross", TINY)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_learnable_reproducible_and_kept_apart(name: str):
    task = TASKS[name]
    rng = torch.Generator().manual_seed(0)
    batch = task.draw(3, 16, rng, held=False)
    out = Model(task, TINY, None)(batch)
    assert out.shape[:2] == batch.target.shape[:2] and out.shape[-1] == task.says
    again = task.draw(3, 16, torch.Generator().manual_seed(0), held=False)
    assert torch.equal(batch.source, again.source) and torch.equal(batch.target, again.target)
    one, two = (train(task, TINY, None, seed=1) for _ in range(2))
    assert one == two and set(task.metrics) < set(one) and one["read"] == 1.0
    assert train(task, TINY, None, seed=2) != one


def test_answers_are_what_the_tasks_say():
    rng = torch.Generator().manual_seed(3)
    mirror = TASKS["mirror"].draw(2, 16, rng, held=False)
    assert mirror.target[0, 0] == mirror.source[0, -1]
    echo = TASKS["echo"].draw(2, 16, rng, held=False)
    asked = echo.target[0] != -100
    assert asked.sum() == 8 and torch.equal(echo.target[0][asked], echo.source[0, :8])
    masked = TASKS["masked"].draw(8, 64, rng, held=False)
    assert torch.equal(masked.source == 256, masked.target != -100)
    summary = TASKS["summary"].draw(2, 16, rng, held=False)
    assert summary.before is not None and torch.equal(summary.before[:, 1:], summary.target[:, :-1])
    speech = TASKS["speech"].draw(2, 16, rng, held=False)
    same, frames = speech.source[0] == speech.source[0, 0], speech.target[0]
    assert bool((frames[same] == frames[0]).all()) and not bool((frames[~same] == frames[0]).any())


def test_metrics_of_points_are_chamfers():
    a, b = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]]), torch.tensor([[[0.0, 0.05], [1.0, 2.0]]])
    found = TASKS["points"].measure(a, b)
    precise, recalled = (0.05 + math.hypot(1, 0.05)) / 2, (0.05 + 2) / 2
    assert found["CD-l1"] == pytest.approx((precise + recalled) / 2)
    assert found["CD-l2"] == pytest.approx((0.0025 + 1.0025) / 2 + (0.0025 + 4) / 2)
    assert found["F-score"] == pytest.approx(0.5)


def test_only_the_attention_of_the_pattern_is_replaced():
    spec = Attention(mask=masks.Window(2))
    for task in TASKS.values():
        model = Model(task, TINY, spec)
        under = {id(layer) for layer in model.tested}
        for module in model.modules():
            if isinstance(module, MultiHead):
                assert isinstance(module.spec, Attention)
                assert isinstance(module.spec.mask, masks.Window) == (id(module) in under)
        read = measured(model, task, TINY)["read"]
        assert read is not None and read < 0.5


def test_a_causal_cross_model_does_not_look_at_later_targets():
    task = TASKS["summary"]
    batch = task.draw(2, 16, torch.Generator().manual_seed(0), held=False)
    assert batch.before is not None
    model = Model(task, TINY, None)
    other = batch.before.clone()
    other[:, 5:] = 0
    a, b = model(batch), model(Batch(batch.source, batch.target, other))
    assert torch.allclose(a[:, :5], b[:, :5], atol=1e-6) and not torch.allclose(a[:, 5:], b[:, 5:], atol=1e-3)


def test_every_system_of_the_catalogue_has_its_place():
    job = ComprehensiveAttentionBenchmark().comparison()
    assert tuple(NAMED) == tuple(PATTERNS)
    placed = {name: {c.pattern for c in job.cells if c.system == name} for name in job.found}
    for name in job.found:
        assert placed[name] == (set() if name in job.left_out else set(PATTERNS)), name
    assert job.left_out["cab"] == "it is a study" and "cache" in job.left_out["snapkv"]


def test_budgets_are_of_the_trainings_and_checked():
    job = ComprehensiveAttentionBenchmark(systems=("moba",), budgets={"moba": {"block": 8}}).comparison()
    told = [job.key(Cell("moba", "causal self", seed))["settings"] for seed in (0, None)]
    assert "block=8" in told[0] and "block=512" in told[1]
    job = ComprehensiveAttentionBenchmark(systems=("moba",), budgets={"moba": {"blocks": 8}}).comparison()
    with pytest.raises(SpecError, match="moba has no setting 'blocks': there are block"):
        job.key(Cell("moba", "causal self", 0))


def test_keys_are_the_same_in_every_process():
    job = ComprehensiveAttentionBenchmark(systems=("flexattention",)).comparison()
    assert "mask_mod=<function causal>" in job.key(Cell("flexattention", "causal self", 0))["settings"]


def test_a_mistake_in_one_system_is_one_row():
    class Wrong(Own):
        def build(self, heads: int) -> Attention:
            return 1 / 0  # type: ignore[return-value]

    job = ComprehensiveAttentionBenchmark(systems=()).comparison()
    object.__setattr__(job, "made", lambda cell: Wrong(Attention()))
    told = job.measure(Cell("wrong", "noncausal self", 0))["refused"]
    assert told == "it fails: ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"patterns": ("self",)}, "unknown pattern 'self'"),
        ({"lengths": (256, 512)}, "3 rising lengths"),
        ({"lengths": (2048, 8192, 16384)}, "up to 4096"),
        ({"seeds": ()}, "a seed and a round"),
        ({"systems": ("sigmoyd",)}, "Did you mean 'sigmoid'"),
    ],
)
def test_wrong_settings_say_what_is_right(changed: dict, said: str):
    with pytest.raises(SpecError, match=said):
        assert ComprehensiveAttentionBenchmark(**changed).comparison().cells


def test_correlation_is_pearsons():
    x, y = {"a": 0.0, "b": 1.0, "c": 2.0, "d": None}, {"a": 3.0, "b": 2.0, "c": 1.0, "d": 4.0}
    rows = [{"pattern": p, "system": n, "index": i} for p, found in (("p", x), ("q", y)) for n, i in found.items()]
    (found,) = correlations(rows)
    assert found["r"] == pytest.approx(-1) and found["systems"] == 3


def test_a_small_run_gives_rows_a_page_and_resumes(tmp_path: Path):
    job = ComprehensiveAttentionBenchmark(
        **{**ComprehensiveAttentionBenchmark.small, "patterns": ("causal self", "noncausal cross"), "seeds": (0,)}
    ).comparison()
    first = cells.run(job, tmp_path)
    fresh: list[bool] = []
    again = cells.run(job, tmp_path, lambda cell, computed: fresh.append(computed))
    assert not any(fresh) and json.dumps(job.summary(again)) == json.dumps(job.summary(first))
    rows = {(row["system"], row["pattern"]): row for row in job.summary(first)["rows"]}
    assert rows["moba", "causal self"]["read"] < 1 and rows["moba", "causal self"]["index"] is not None
    assert "promise" in rows["moba", "noncausal cross"]["refused"]
    assert rows["sigmoid", "noncausal cross"]["speed"]["bytes_eager"]["length"] is not None
    page = job.page(first, "saccade study cab --small", 1.0)
    assert "it does not promise to attend to another sequence" in page.html()
    assert "sigmoid" in str(page.table().columns[0]._cells)


def test_the_cells_obey_the_laws_of_studies():
    assert study_laws.cells_are_told_apart(ComprehensiveAttentionBenchmark(systems=("sigmoid", "hip"))) == "44 cells"
