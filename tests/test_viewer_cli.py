"""`saccade view`: the link it prints opens, Ctrl-C ends it, and wrong input gets one line."""

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
import torch
import transformers as tf
from PIL import Image
from typer.testing import CliRunner

from saccade import cli
from saccade.viewer import load


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The window is narrow, and yet the light falls in. " * 4)
    return path


def run(*arguments):
    return CliRunner().invoke(cli.app, ["view", *map(str, arguments)])


def test_view_serves_until_it_is_interrupted(text):
    command = [sys.executable, "-m", "saccade", "view", "lm", "--text", text, "--layers", "0,5", "--no-open"]
    command += ["--edit", "Zero(keys=0)", "--edit", "Renormalize()"]
    view = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    try:
        link = next(line for line in iter(view.stdout.readline, b"") if line.startswith(b"http")).decode().strip()
        assert link.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(link + "data/session", timeout=30) as answer:
            told = json.load(answer)
        assert told["sides"] == ["before", "after"] and [x["number"] for x in told["layers"]] == [0, 5]
        assert "".join(told["sequences"]["text"]["tokens"]).endswith("narrow, and yet the light falls in. ")
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(link.rsplit("/", 2)[0] + "/", timeout=30)
    finally:
        view.send_signal(signal.SIGINT)
        _, said = view.communicate(timeout=60)
    assert view.returncode == cli.INTERRUPTED, said
    assert b"Traceback" not in said


@pytest.mark.parametrize(
    "more, words",
    [
        ((), "--text FILE or --image FILE"),
        (("--text", "nowhere.txt"), "cannot read nowhere.txt"),
        (("--system", "nothing-such"), "nothing-such"),
        (("--system", "snapkv"), "acts on what is decoded later"),
        (("--edit", "Erase()"), "such as Zero(keys=0)"),
        (("--layers", "9"), "no layer [9]"),
    ],
)
def test_wrong_input_gets_one_line(text, more, words):
    told = (
        run("lm", "--no-open", *more) if "--text" in more or not more else run("lm", "--no-open", "--text", text, *more)
    )
    assert told.exit_code == 2 and words in told.stderr and told.stderr.count("\n") == 1


def test_a_text_beyond_the_model_s_room(text):
    text.write_text("a" * 5000)
    told = run("lm", "--no-open", "--text", text)
    assert told.exit_code == 2 and "--tokens 4096" in told.stderr
    _, inputs, sequences = load.read("lm", text, None, None, 100)
    assert inputs["input_ids"].shape == (1, 100) and len(sequences["text"].tokens) == 100


def test_a_system_before_and_after(text):
    session = load.session("lm", text=text, layers=[1], system="sigmoid", say=lambda words: None)
    parts = [json.loads(session.score(side, 0, 0, 50, 3))["parts"] for side in (0, 1)]
    assert parts == [["Dot", "Causal", "Softmax"], ["Dot", "Causal", "Sigmoid"]]


def test_an_image_becomes_patches_as_the_model_sees_them(tmp_path):
    torch.manual_seed(0)
    config = tf.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8
    )
    tf.ViTModel(config).save_pretrained(tmp_path / "vit")
    tf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    Image.new("RGB", (50, 40), (200, 30, 60)).save(tmp_path / "red.png")
    session = load.session(str(tmp_path / "vit"), image=tmp_path / "red.png", say=lambda words: None)
    image = session.sides["before"].sequences["image"]
    assert image.grid == (4, 4) and image.prefix == 1
    (tmp_path / "seen.png").write_bytes(image.image)
    assert Image.open(tmp_path / "seen.png").getpixel((9, 9)) == (200, 30, 60)
