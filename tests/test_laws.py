"""Every law fails on a mechanism that breaks it, and passes on one that does not. And: claims, ledger."""

import dataclasses
import json
import math
import re

import pytest
import torch

from saccade import Attention, SpecError, masks, normalizers, scores
from saccade.core.normalizers import HIDDEN
from saccade.study import claims, laws
from saccade.systems.base import ClaimNumbers, Promises, System, Unmeasured

torch.set_num_threads(1)


class Plain(System):
    slug = "plain"
    promises = Promises(unit_rows=True, training_free=True, needs_training=False)

    def build(self, heads):
        return Attention(mask=masks.Causal())


def system(promises=Plain.promises, **parts):
    """A system from parts, each a function without arguments."""

    class Made(System):
        slug = "made"

        def build(self, heads):
            made = {name: part() for name, part in parts.items()}
            return Attention(**{"mask": masks.Causal(), **made})

    Made.promises = promises
    return Made


def hold(monkeypatch, cls, law, settings=None):
    """One system to one law."""
    monkeypatch.setattr(laws, "LAWS", {law: laws.LAWS[law]})
    (result,) = laws.check(cls, settings)
    assert result.law == law
    return result


def test_a_plain_system_passes_everything():
    results = {r.law: r for r in laws.check(Plain)}
    assert list(results) == list(laws.LAWS) and len(results) == 11
    assert {r.status for r in results.values()} == {"passed"}, results
    assert all(r.detail and r.seconds >= 0 for r in results.values())


def test_a_normalizer_of_ones_own_passes_everything():
    assert {r.status for r in laws.check(system(normalizer=Own))} == {"passed"}


def test_what_does_not_apply_is_skipped_with_its_reason():
    promises = Promises(causal=False, decodes=True, padding=False, unit_rows=False, nonnegative=False)
    found = {r.law: r for r in laws.check(system(promises, mask=masks.Full)) if r.status != "passed"}
    assert {(r.law, r.status, r.detail) for r in found.values()} == {
        ("nothing flows from the future", "skipped", "not promised to be causal"),
        ("decoding equals prefill", "skipped", "not causal, so there is no decoding"),
        ("a padded batch equals each alone", "skipped", "not promised to ignore padding"),
        ("rows sum as promised", "skipped", "no sum promised"),
        ("weights are nonnegative", "skipped", "negative weights are part of the mechanism"),
    }


# ---- broken on purpose ----


class Own(normalizers.Normalizer):
    """Softmax, written as a user would: the definition alone."""

    def forward(self, scores, at):
        return normalizers.Softmax().forward(scores, at)


class Inexact(Own):
    def inplace(self, scores, at):
        return self.forward(scores, at) * (1 + 1e-6)


class WrongBackward(Own):
    def backward_inplace(self, weights, grad, at):
        return grad.mul_(weights)


class LyingBlocks(masks.Causal):
    def blocks(self, span):
        return torch.where(span.distance_hi < 0, 0, 2).to(torch.int8)


class ScaledKeys(scores.Dot):
    """Divides by the mean size of all keys: the future and the padding included."""

    def prepare(self, q, k):
        return q, k / k.abs().mean(2, keepdim=True)


class CountsKeys(scores.Score):
    def forward(self, score, at):
        return score * math.log(at.m)


class LastKeyAlone(scores.Dot):
    """Looks at the last place of a long cache, whatever lies there."""

    def prepare(self, q, k):
        return q, k + (k[:, :, -1:] if k.shape[2] == 130 else 0)


class KnowsTheUnseen(masks.Causal):
    def unseen(self, at):
        return at.k >= at.n + at.offset


class Uninitialised(Own):
    def forward(self, scores, at):
        return super().forward(scores, at) + 0 * torch.empty_like(scores)


class Rounded(Own):
    def forward(self, scores, at):
        return super().forward(scores.bfloat16().float() if scores.dtype == torch.float32 else scores, at)


class Unseeded(scores.Score):
    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.rand(1, generator=_fresh()))

    def forward(self, score, at):
        return score * self.gain.to(score.dtype)


def _fresh():
    generator = torch.Generator()
    generator.seed()
    return generator


class Changed(Plain):
    def __init__(self, size=3):
        self.size = float(size)


class Forgotten(Plain):
    def __init__(self, size=3):
        pass


class Eaten(Plain):
    def __init__(self, size=3):
        self.size = size

    def build(self, heads):
        self.size += 1
        return super().build(heads)


class Crash(Own):
    def forward(self, scores, at):
        raise ZeroDivisionError("in the mechanism")


signed = dataclasses.replace(Plain.promises, unit_rows=False)
BROKEN = {
    "stores another value": (Changed, "settings are kept", "self.size is 3.0, the setting was 3"),
    "stores nothing": (Forgotten, "settings are kept", "size is not stored"),
    "build changes a setting": (Eaten, "settings are kept", "self.size is"),
    "tiled differs by 1e-6": (system(normalizer=Inexact), "fast equals reference", "output differs"),
    "wrong backward": (system(normalizer=WrongBackward), "fast equals reference", "gradient of q differs"),
    "wrong block map": (system(mask=LyingBlocks), "fast equals reference", r"N=M=600"),
    "crashes": (system(normalizer=Crash), "fast equals reference", "ZeroDivisionError: in the mechanism"),
    "sees ahead": (system(mask=lambda: masks.Window(4)), "nothing flows from the future", "moves by"),
    "size of all keys": (system(score=ScaledKeys), "nothing flows from the future", "moves by"),
    "decodes otherwise": (system(score=CountsKeys), "decoding equals prefill", "1 at a time differs"),
    "bias from the batch": (system(score=CountsKeys), "a padded batch equals each alone", "sequence of 31"),
    "no unit rows": (system(normalizer=normalizers.Sigmoid), "rows sum as promised", "rows are off one"),
    "no unit size": (
        system(Promises(unit_size=True), normalizer=normalizers.Sigmoid),
        "rows sum as promised",
        "absolute weights are off one",
    ),
    "negative": (system(signed, normalizer=normalizers.Signed), "weights are nonnegative", "a weight of -"),
    "dense, said to be linear": (
        system(dataclasses.replace(Plain.promises, exponent=1.0)),
        "operations grow as promised",
        r"N\^(1\.9|2\.0)\d .* promised 1\.0",
    ),
    "reads padding": (system(score=ScaledKeys), "unread memory never shows", "NaN in padding"),
    "reads an unfilled cache": (
        system(score=LastKeyAlone, mask=KnowsTheUnseen),
        "unread memory never shows",
        "unfilled part of a cache",
    ),
    "reads fresh memory": (
        system(normalizer=Uninitialised),
        "unread memory never shows",
        "never written|NaN in (padding|the unfilled)",
    ),
    "unseeded": (system(score=Unseeded), "a seed decides everything", "differ"),
    "rounds float32": (system(normalizer=Rounded), "every dtype works", "float32 is off"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_law_fails_on_what_breaks_it(monkeypatch, name):
    cls, law, said = BROKEN[name]
    result = hold(monkeypatch, cls, law)
    assert result.status == "failed", result
    assert re.search(said, result.detail), result.detail


def test_every_law_is_broken_by_something():
    assert {law for _, law, _ in BROKEN.values()} == set(laws.LAWS)


def test_a_gradient_from_the_future_alone_is_found(monkeypatch):
    class Straight(torch.autograd.Function):
        """Adds nothing, and says that it added the keys in the opposite order."""

        @staticmethod
        def forward(ctx, k):
            return torch.zeros_like(k)

        @staticmethod
        def backward(ctx, grad):
            return grad.flip(2)

    class Leak(scores.Dot):
        def prepare(self, q, k):
            return q, k + Straight.apply(k)

    result = hold(monkeypatch, system(score=Leak), "nothing flows from the future")
    assert result.status == "failed" and "has a gradient of" in result.detail


def test_a_window_is_linear_and_a_true_mask_lets_the_unfilled_cache_be_tested(monkeypatch):
    linear = dataclasses.replace(Plain.promises, exponent=1.0)
    window = system(linear, mask=lambda: masks.Causal() & masks.Window(64))
    assert hold(monkeypatch, window, "operations grow as promised").status == "passed"
    monkeypatch.undo()
    told = hold(monkeypatch, system(mask=KnowsTheUnseen), "unread memory never shows")
    assert told.status == "passed" and told.detail == "padding, the unfilled part of a cache, fresh memory"


def test_elementwise_work_counts_too(monkeypatch):
    """A linear product beside an N x N mask is not linear."""

    def window(b, h, q, k):
        return (q >= k) & (q - k < 8)

    result = hold(
        monkeypatch,
        system(dataclasses.replace(Plain.promises, exponent=1.0), mask=lambda: window),
        "operations grow as promised",
    )
    assert result.status == "failed"


@pytest.mark.parametrize(
    "build, said",
    [
        (lambda self, heads: 1 / 0, "ZeroDivisionError"),
        (lambda self, heads: 3, "build returned int, not a saccade.Attention"),
    ],
)
def test_what_cannot_be_built_fails_once(build, said):
    cls = type("Broken", (Plain,), {"build": build})
    (result,) = laws.check(cls)
    assert (result.law, result.status) == ("builds", "failed") and said in result.detail


def test_settings_reach_the_system_and_wrong_ones_are_a_finding(monkeypatch):
    result = hold(monkeypatch, type("Kept", (Plain,), {"__init__": lambda self, size=3: setattr(self, "size", size)}),
                  "settings are kept", {"size": 5})  # fmt: skip
    assert result.status == "passed" and result.detail == "1 settings"
    monkeypatch.undo()
    (wrong,) = laws.check(Plain, {"no_such": 1})
    assert wrong.law == "builds" and wrong.status == "failed"


def test_checking_leaves_torch_as_it_was(monkeypatch):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    flags = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    hold(monkeypatch, system(normalizer=Uninitialised), "unread memory never shows")
    assert torch.equal(torch.get_rng_state(), before)
    assert flags == (torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory)


def test_a_gap_with_nan_is_infinite_and_small_values_are_not_blown_up():
    one = torch.ones(2)
    assert laws.gap(one * math.nan, one) == math.inf == laws.gap(one, one * HIDDEN)
    assert laws.gap(torch.ones(3), one) == math.inf
    assert laws.gap(torch.tensor([1e-12]), torch.tensor([2e-12])) == pytest.approx(1e-12)
    assert laws.gap(torch.tensor([11.0, 0.0]), torch.tensor([10.0, 0.0])) == pytest.approx(0.1)


# ---- claims and the ledger ----


class Claiming(Plain):
    slug = "claiming"
    found = ClaimNumbers({"ratio": 1.5}, "holds", "It is 1.5 times as fast.")

    def claim(self):
        assert torch.get_num_threads() == 1
        return self.found


def test_a_claim_is_measured_written_and_read_back(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        result = claims.run(Claiming, tmp_path)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert (result.slug, result.verdict, result.numbers) == ("claiming", "holds", {"ratio": 1.5})
    assert result.command == "saccade claim claiming" and "cores" in result.machine
    assert result.versions["torch"] == torch.__version__
    assert claims.ledger(tmp_path) == {"claiming": result}
    assert [p.name for p in tmp_path.iterdir()] == ["claiming.json"]


def test_a_failed_claim_stays_in_the_ledger_and_says_what_failed(tmp_path):
    numbers = ClaimNumbers.decide({"loss": 2.0}, "Loss 2.", lower_loss=False, exact_zeros=True, less_time=False)
    assert numbers == ClaimNumbers({"loss": 2.0}, "does not hold", "Loss 2. Not met: lower loss, less time.")
    assert ClaimNumbers.decide({}, "Fine.", lower_loss=True).verdict == "holds"
    cls = type("Failing", (Claiming,), {"found": numbers})
    claims.run(Claiming, tmp_path)
    claims.run(cls, tmp_path)
    assert claims.ledger(tmp_path)["claiming"].verdict == "does not hold"


def test_the_ledger_is_refreshed_oldest_first_within_a_budget_and_past_errors(tmp_path):
    def fails(self):
        raise ZeroDivisionError("no data")

    kinds = {name: type(name, (Claiming,), {"slug": name}) for name in ("fresh", "old", "changed", "new", "slow")}
    kinds["broken"] = type("broken", (Claiming,), {"slug": "broken", "claim": fails})
    for name in ("fresh", "old", "changed", "slow"):
        claims.run(kinds[name], tmp_path)
    for name, entry in (("old", {"measured": "2001-01-01"}), ("changed", {"source": "1"}), ("slow", {"seconds": 900})):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entry))
    found = list(claims.refresh(kinds.values(), minutes=10, out=tmp_path))
    assert [x[0] if isinstance(x, tuple) else x.slug for x in found] == ["new", "broken", "changed", "old", "fresh"]
    assert isinstance(found[1][1], ZeroDivisionError)
    assert list(claims.refresh(kinds.values(), minutes=0, out=tmp_path)) == []


def test_an_entry_that_is_none_is_measured_again(tmp_path):
    """As the message about it says; one of another system is in nobody's way."""
    for name in ("claiming", "other"):
        (tmp_path / f"{name}.json").write_text("{")
    [result] = claims.refresh([Claiming], out=tmp_path)
    assert result.verdict == "holds" and json.loads((tmp_path / "claiming.json").read_text())["slug"] == "claiming"
    with pytest.raises(SpecError, match=r"other\.json is not an entry"):
        claims.ledger(tmp_path)


def test_a_system_without_a_claim_is_not_measured(tmp_path):
    assert claims.run(Plain, tmp_path).statement == "Not measured: the system defines no claim."

    def claim(self):
        raise Unmeasured("there is no compiler")

    result = claims.run(type("Cannot", (Plain,), {"claim": claim}), tmp_path)
    assert (result.verdict, result.statement) == ("not measured", "Not measured: there is no compiler.")


def test_a_claim_that_crashes_or_is_interrupted_leaves_the_last_result(tmp_path):
    kept = claims.run(Claiming, tmp_path)
    for error in (KeyboardInterrupt, ZeroDivisionError):

        def claim(self, error=error):
            raise error

        with pytest.raises(error):
            claims.run(type("Stopped", (Claiming,), {"claim": claim}), tmp_path)
    assert claims.ledger(tmp_path) == {"claiming": kept}


def test_a_broken_entry_and_an_unwritable_ledger_are_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecError, match="cannot be written"):
        claims.run(Claiming, tmp_path / "file")
    for text in ("{", json.dumps({"slug": "x"}), "[]"):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(SpecError, match=r"x\.json is not an entry"):
            claims.ledger(tmp_path)


def test_the_shipped_ledger_has_an_entry_for_each_of_the_four():
    assert claims.ledger().keys() >= {"flexattention", "alpha-entmax", "sigmoid", "cog"}
    for slug, entry in claims.ledger().items():
        assert entry.verdict in ("holds", "does not hold", "not measured")
        assert entry.command == f"saccade claim {slug}" and entry.statement and entry.seconds > 0
        assert entry.verdict == "not measured" or entry.numbers


def test_work_is_timed_in_turns():
    order = []
    times = claims.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2)
    assert "".join(order) == "baabba"  # a round to warm up, then two
    assert len(times.seconds["a"]) == len(times.seconds["b"]) == 2
    times = claims.Times({"a": [1.0, 20.0, 3.0], "b": [2.0, 10.0, 1.0]})
    assert times.ratio("a", "b") == 2.0 and times.median("a") == 3.0
