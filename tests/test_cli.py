"""The command line: exit codes, one line for what is wrong, and what each command prints."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from saccade import catalog, cli
from saccade.study import claims, laws


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    torch.manual_seed(0)
    where = tmp_path_factory.mktemp("models") / "tiny"
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, max_position_embeddings=256,
        )
    ).save_pretrained(where)  # fmt: skip
    return where


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def small(tiny, out, *more):
    return (
        "study", "--model", tiny, "--systems", "window", "--tasks", "text", "--lengths", "64", "--count", 1,
        "--repeats", 1, "--out", out, *more,
    )  # fmt: skip


def test_study_writes_everything_and_resumes(tiny, tmp_path):
    first = run(*small(tiny, tmp_path))
    assert first.exit_code == 0, first.output
    assert "4 of 4 cells computed" in first.output and "window" in first.output
    assert json.loads((tmp_path / "results.json").read_text())["summary"]
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert "0 of 4 cells computed" in run(*small(tiny, tmp_path)).output
    assert "4 of 4 cells computed" in run(*small(tiny, tmp_path, "--fresh")).output


@pytest.mark.parametrize(
    "more, words",
    [
        (("--systems", "windwo"), "did you mean 'window'"),
        (("--systems", "sigmoid"), "trained first"),
        (("--tasks", "poetry"), "unknown task 'poetry'"),
        (("--lengths", "512"), "context of 256"),
        (("--lengths", "64,many"), "'many'"),
        (("--count", "0"), "count must be at least 1"),
        (("--threads", "-3"), "--threads must lie"),
        (("--model", "/nowhere/at/all"), "no model directory"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(tiny, tmp_path, more, words):
    result = run(*small(tiny, tmp_path / "out", *more))
    assert result.exit_code == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and words in lines[0], result.stderr
    assert not (tmp_path / "out").exists()


def test_models_that_are_no_causal_language_models(tiny, tmp_path):
    bert = tmp_path / "bert"
    BertModel(BertConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        bert
    )
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text("{")
    for model, words in (("bert", "BertModel"), ("empty", "no config.json"), ("torn", "cannot be loaded")):
        result = run(*small(tmp_path / model, tmp_path / "out"))
        lines = result.stderr.strip().splitlines()
        assert result.exit_code == 2 and len(lines) == 1 and words in lines[0], result.stderr


def test_ctrl_c_keeps_cells_says_how_to_go_on_and_exits_130(tiny, tmp_path):
    command = [str(a) for a in small(tiny, tmp_path, "--count", 40, "--lengths", "64,128,256", "--threads", 1)]
    process = subprocess.Popen(
        [sys.executable, "-m", "saccade", *command], stdout=-1, stderr=-1, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("cells/*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "Go on: saccade study" in err.splitlines()[-1]
    kept = list(tmp_path.glob("cells/*.json"))
    assert len(kept) >= 2 and all(json.loads(f.read_text()) for f in kept)
    assert not (tmp_path / "report.html").exists()


def test_list_in_words_and_for_programs():
    every = json.loads(run("list", "--json").output)
    assert {"slug", "family", "title", "promises", "claim"} <= set(every[0])
    assert [row["slug"] for row in every] == list(catalog.systems())
    family = every[0]["family"]
    some = json.loads(run("list", "--family", family, "--json").output)
    assert some == [row for row in every if row["family"] == family]
    assert every[0]["slug"][:6] in run("list").output
    wrong = run("list", "--family", "nothing")
    assert wrong.exit_code == 2 and "there are" in wrong.stderr


def test_show_one_and_suggest_the_nearest():
    slug, system = next(iter(catalog.systems().items()))
    result = run("show", slug)
    assert result.exit_code == 0
    assert (
        system.title in result.output.replace("\n", " ")
        and system.paper in result.output
        and "promises" in result.output
    )
    wrong = run("show", slug[:-1])
    assert wrong.exit_code == 2 and slug in wrong.stderr and len(wrong.stderr.strip().splitlines()) == 1


def test_check_tells_each_law_and_fails_when_one_is_broken(monkeypatch):
    slug = next(iter(catalog.systems()))
    found = [
        laws.LawResult("rows sum", "passed", "to one", 0.1),
        laws.LawResult("decodes", "skipped", "it does not", 0.0),
    ]
    monkeypatch.setattr(laws, "check", lambda system: found)
    fine = run("check", slug)
    assert fine.exit_code == 0 and "rows sum" in fine.output and "it does not" in fine.output
    found.append(laws.LawResult("causal", "failed", "row 3 sees key 4", 0.0))
    broken = run("check", slug)
    assert broken.exit_code == 1 and "row 3 sees key 4" in broken.output and "1 laws" in broken.stderr
    assert run("check").exit_code == 2 and run("check", slug, "--all").exit_code == 2


def test_claim_prints_verdict_and_numbers(monkeypatch, tmp_path):
    slug = next(iter(catalog.systems()))
    asked = []

    def measured(system, out=None):
        asked.append(out)
        return claims.ClaimResult(system.slug, "does not hold", {"gain": 0.5}, "It gains half.", 1.0, "m", {}, "c")

    monkeypatch.setattr(claims, "run", measured)
    result = run("claim", slug, "--out", tmp_path)
    assert result.exit_code == 0 and "does not hold" in result.output and '"gain": 0.5' in result.output
    assert asked == [tmp_path]
    none = run("claim", slug, "--out", tmp_path, "--budget", "0")
    assert none.exit_code == 0 and "1 of 1 claims did not fit into 0 minutes" in none.output and len(asked) == 1


def test_a_claim_that_breaks_is_told(monkeypatch, tmp_path):
    def broken(system, out=None):
        raise ZeroDivisionError("in the claim")

    first, second = list(catalog.systems().values())[:2]
    monkeypatch.setattr(claims, "run", broken)
    monkeypatch.setattr(catalog, "systems", lambda: {s.slug: s for s in (first, second)})
    result = run("claim", "--all", "--out", tmp_path)
    assert result.exit_code == 1 and first.slug in result.stderr and second.slug in result.stderr
    assert "ZeroDivisionError in the claim" in " ".join(result.output.split())


def test_a_claim_is_old_when_the_system_or_a_part_of_it_changed(monkeypatch, tmp_path):
    own, part, deeper, other = (tmp_path / f"{name}.py" for name in ("own", "_part", "_deeper", "_other"))
    own.write_text("def claim():\n    from ._part import x\n")
    part.write_text("from ._deeper import x\n")
    deeper.write_text("from ._part import y\nx = 1\n")
    other.write_text("x = 1\n")
    monkeypatch.setattr("inspect.getfile", lambda system: str(own))
    before = claims._source(object)
    other.write_text("x = 2\n")
    assert claims._source(object) == before
    for path in (own, part, deeper):
        text = path.read_text()
        path.write_text(f"{text}# changed\n")
        assert claims._source(object) != before, path
        path.write_text(text)
    assert claims._source(object) == before


def test_zoo():
    assert run("zoo", "list").exit_code == 0
    wrong = run("zoo", "train", "giant")
    assert wrong.exit_code == 2 and "there are lm" in wrong.stderr
    assert run("zoo", "train", "lm", "--steps", "0").exit_code == 2


def test_without_the_workbench_packages_one_line_says_what_to_install(tmp_path):
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError(\"No module named 'typer'\", name='typer')")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from saccade.cli import main; main()",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert done.stderr.strip().splitlines() == [cli.MISSING.format("typer")]
