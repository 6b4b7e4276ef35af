"""The study on a real, tiny model: cells that survive, numbers that mean what they say, a report that stands alone."""

import json
import re

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from saccade import SpecError, masks
from saccade.cache import Cache
from saccade.study import measure, plots, programs, report, runner, tasks
from saccade.study.runner import Settings, Study, summarise

SETTINGS = Settings(
    systems=("window", "uniform"), tasks=("text", "recall"), lengths=(64, 128), count=2, repeats=2, steps=2
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=512,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def computed(job):
    """Run it; how many cells were not there."""
    seen = []
    job.run(lambda cell, computed: seen.append(computed))
    assert len(seen) == len(job.cells)
    return sum(seen)


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):
    job = Study(SETTINGS, tmp_path_factory.mktemp("study"), model)
    assert computed(job) == len(job.cells) == 3 * 3 * 2
    return job, job.run()


def test_every_cell_is_measured_once_and_none_again(done, model):
    job, cells = done
    again = Study(SETTINGS, job.out, model)
    assert again.run() == cells
    assert computed(again) == 0


def test_what_determines_a_cell_is_computed_anew(done, model, monkeypatch):
    job, _ = done
    other = Study(Settings(**{**vars(SETTINGS), "seed": 1, "lengths": (64,)}), job.out, model)
    known = {json.dumps(job.key(c)) for c in job.cells}
    assert not known & {json.dumps(other.key(c)) for c in other.cells}
    same = Study(SETTINGS, job.out, model)
    monkeypatch.setitem(programs.BASELINES, "window", ("narrower", lambda: programs.Attention(mask=masks.Window(9))))
    missing = [c for c in same.cells if json.dumps(same.key(c)) not in known]
    assert {c.entry.name for c in missing} == set()  # entries are taken when the study is made
    changed = Study(SETTINGS, job.out, model)
    assert {c.entry.name for c in changed.cells if json.dumps(changed.key(c)) not in known} == {"window"}
    twin = LlamaForCausalLM(model.config)
    twin.load_state_dict(model.state_dict())
    assert runner.models.fingerprint(twin) == runner.models.fingerprint(model)
    twin.model.layers[0].mlp.up_proj.weight.data[3, 3] += 1
    assert runner.models.fingerprint(twin) != runner.models.fingerprint(model)


def test_an_interrupt_keeps_finished_cells(model, tmp_path):
    job = Study(SETTINGS, tmp_path, model)

    seen = []

    def stop_after_three(cell, computed):
        seen.append(cell)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.run(stop_after_three)
    files = list((tmp_path / "cells").iterdir())
    assert len(files) == 3
    files[0].write_text("{broken")
    again = Study(SETTINGS, tmp_path, model)
    assert computed(again) == len(again.cells) - 2


def test_dense_is_exact_and_uniform_is_not(done):
    _, cells = done
    by = {(c["system"], c["task"], c["length"]): c["result"] for c in cells}
    for length in SETTINGS.lengths:
        assert by["dense", "speed", length]["output_error"] < 1e-5
        assert by["uniform", "speed", length]["output_error"] > 1e-3
        assert by["window", "text", length] == by["dense", "text", length]  # 256 keys hold all of it
        assert by["uniform", "text", length] != by["dense", "text", length]
        # keys and values of two layers, one head of sixteen, four bytes each
        assert by["dense", "speed", length]["cache_bytes"] == 2 * 2 * 16 * 4 * length
        assert by["dense", "speed", length]["prefill_s"]["n"] == SETTINGS.repeats


def test_the_report_stands_alone_and_holds_everything(done, tmp_path):
    job, cells = done
    results = report.collect(job, cells, "saccade study --model <tiny>", 1.0)
    data, page = report.write(results, tmp_path)
    loaded = json.loads(data.read_text())
    assert {"settings", "environment", "cells", "summary", "command"} <= set(loaded)
    assert len(loaded["cells"]) == len(cells) and len(loaded["summary"]) == 3 * 2
    text = page.read_text()
    fetched = re.findall(r"""(?:src|href)\s*=\s*["']?(?!#)[^"'\s>]+|url\((?!#)|@import|<link|<iframe""", text)
    assert not fetched
    assert text.count("<svg") == 3 and text.count('role="img"') == 3 and "<desc" in text
    assert "<text" in text and "currentColor" in text and plots.INK not in text
    for name in ("dense", "window", "uniform"):
        assert len(re.findall(rf"<td>{name}</td>", text)) >= 3 * 2
    assert "&lt;tiny&gt;" in text and "<tiny>" not in text
    assert job.fingerprint in text and torch.__version__ in text


def test_a_program_that_refuses_is_reported_and_not_fatal(model, tmp_path, monkeypatch):
    broken = ("wrong", lambda: programs.Attention(mask=torch.ones(3, 3, dtype=torch.bool)))
    monkeypatch.setitem(programs.BASELINES, "blocks", broken)
    job = Study(Settings(**{**vars(SETTINGS), "systems": ("blocks",), "lengths": (64,)}), tmp_path, model)
    cells = job.run()
    results = report.collect(job, cells, "x", 1.0)
    assert sum("refused" in c["result"] for c in cells) == 3
    assert "does not broadcast" in report.html(results)


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"systems": ("windw",)}, "did you mean 'window'"),
        ({"tasks": ("texts",)}, "unknown task"),
        ({"lengths": (1024,)}, "context of 512"),
        ({"lengths": (8,)}, "at least 16"),
        ({"count": 0}, "count must be at least 1"),
        ({"tasks": ("copy",), "lengths": (16,)}, "length >="),
    ],
)
def test_settings_that_mean_nothing_are_refused_before_anything_is_written(model, tmp_path, changed, words):
    with pytest.raises(SpecError, match=words):
        Study(Settings(**{**vars(SETTINGS), **changed}), tmp_path / "out", model)
    assert not (tmp_path / "out").exists()


def test_a_length_beyond_memory_is_refused(model, monkeypatch):
    monkeypatch.setattr(runner.models, "_free_memory", lambda: 10**5)
    with pytest.raises(SpecError, match="GiB are free"):
        runner.models.fits(model, [512])


def test_peak_memory_counts_what_is_alive_at_once():
    def call():
        for _ in range(5):
            torch.empty(1000, 250).fill_(1)  # a megabyte each, one after the other

    assert 1_000_000 <= measure.peak_bytes(call, torch.device("cpu")) < 1_100_000


def test_cache_bytes_are_those_of_the_storages_each_once():
    cache = DynamicCache()
    whole = torch.zeros(1, 2, 100, 8)
    for layer in range(3):
        cache.update(whole[:, :, :10], torch.zeros(1, 2, 10, 8), layer)
    kept = sum(t.untyped_storage().nbytes() for la in cache.layers for t in (la.keys, la.values))
    assert measure.cache_bytes(cache) == kept
    assert measure.cache_bytes([whole, whole[:, :1], {"x": whole}]) == whole.nbytes


@pytest.fixture(scope="module")
def words():
    """A tokenizer that splits on words and punctuation and single digits: not bytes."""
    pieces = {}
    for task in ("text", "needle", "recall"):
        for sample in tasks.Bytes().samples(task, 400, 0, 40):
            page = bytes(t for t in sample.tokens.tolist() if t < 256).decode()
            for piece in re.findall(r"\w+|[^\w\s]+", page):
                pieces.setdefault(piece, len(pieces))
    pieces["[UNK]"] = len(pieces)
    tokenizer = Tokenizer(models.WordLevel(pieces, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def test_a_tokenizer_reads_the_same_tasks(words, model):
    read = tasks.vocabulary(model, words)
    for sample in read.samples("needle", 64, 0, 3):
        assert 32 < len(sample.tokens) <= 64
        (start, stop) = sample.answers[-1]
        (low, high) = sample.evidence[-1]
        assert high < start and torch.equal(sample.tokens[low:high], sample.tokens[start:stop])
        assert stop == len(sample.tokens) and re.fullmatch(r"\d{4}|\[UNK\]", words.decode(sample.tokens[start:stop]))
    prose = read.samples("text", 50, 0, 2)
    assert all(len(s.tokens) == 50 and 100 < s.size < 500 for s in prose)


def test_scoring_asks_for_every_token_of_an_answer(model):
    class Parrot:
        device = torch.device("cpu")

        def __init__(self, wrong):
            self.wrong = wrong

        def __call__(self, input_ids, use_cache):
            logits = torch.nn.functional.one_hot(input_ids.roll(-1, 1), 260).float() * 50
            logits[:, self.wrong - 1] = 0
            return type("Out", (), {"logits": logits})

    (sample,) = tasks.Bytes().samples("recall", 65, 0, 1)
    _, stop = sample.answers[1]
    assert tasks.score(Parrot(0), sample) == {"right": 4, "asked": 4}
    assert tasks.score(Parrot(stop - 1), sample) == {"right": 3, "asked": 4}
    assert tasks.score(Parrot(stop), sample) == {"right": 4, "asked": 4}
    (prose,) = tasks.Bytes().samples("text", 101, 0, 1)
    assert tasks.score(Parrot(0), prose)["bits"] < 1e-6
    assert tasks.score(Parrot(7), prose)["bits"] == pytest.approx(torch.tensor(260.0).log2().item(), abs=1e-3)


def test_the_plain_ones_are_at_least_eight_and_need_no_training(model):
    assert len(programs.BASELINES) >= 8 and set(programs.DEFAULT) <= set(programs.names())
    assert len({programs.find(n).settings(2) for n in programs.BASELINES}) == len(programs.BASELINES)
    assert [e.name for e in programs.resolve(["topk", "dense", "topk"])] == ["dense", "topk"]


def test_caches_are_measured_by_what_they_hold(model, tmp_path):
    wanted = Settings(**{**vars(SETTINGS), "systems": ("recent-cache", "snapkv"), "lengths": (128,)})
    job = Study(wanted, tmp_path, model)
    rows = {row["system"]: row for row in summarise(job.run())}
    assert set(rows) == {"dense", "recent-cache", "snapkv"}
    for name in ("recent-cache", "snapkv"):
        # Positions and scores are counted too: 12 bytes beside the 128 of a token's key and value.
        assert rows[name]["cache_ratio"] == pytest.approx(0.125 * (128 + 12) / 128, rel=0.01)
        assert rows[name]["output_error"] is None and rows[name]["decode_ratio"]["median"] > 0
        assert rows[name]["bits_per_byte"] != rows["dense"]["bits_per_byte"]


@torch.no_grad()
def test_scoring_with_a_cache_that_drops_nothing_gives_the_same(model):
    for task in ("text", "recall"):
        (sample,) = tasks.Bytes().samples(task, 101, 0, 1)
        with Cache(model) as cache:
            found = tasks.score(model, sample, cache)
        assert found == pytest.approx(tasks.score(model, sample), rel=1e-5)


@torch.no_grad()
def test_looking_is_what_eager_attention_shows(model):
    samples = tasks.Bytes().samples("recall", 101, 0, 6)
    model.config._attn_implementation, before = "eager", model.config._attn_implementation
    wanted = []
    for sample in samples:
        maps = torch.cat(model(sample.tokens[None], use_cache=False, output_attentions=True).attentions, 1)[0]
        shares = [
            maps[:, start - 1 : stop - 1, low:high].sum(-1).mean(-1).max()
            for (start, stop), (low, high) in zip(sample.answers, sample.evidence, strict=True)
        ]
        wanted.append([float(share) for share in shares])
    model.config._attn_implementation = before
    middle = sorted(share for shares in wanted for share in shares)[12]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "LOOKED", middle + 1e-6)
        found = [tasks.score(model, sample, watched=True)["looked"] for sample in samples]
    assert found == [sum(share > middle + 1e-6 for share in shares) for shares in wanted] and 0 < sum(found) < 24
    assert "looked" not in tasks.score(model, samples[0])
