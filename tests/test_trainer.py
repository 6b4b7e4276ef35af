"""Trainings are fair, go on where they stopped, and judge by what was never trained on."""

import math
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from saccade import Attention, SpecError, masks, normalizers, scores
from saccade.nn import GPT, Encoder, EncoderDecoder, MultiHead, ViT
from saccade.study import progress, trainer
from saccade.study.trainer import Recipe, Setup, Task

torch.set_num_threads(1)
TINY = Setup(layers=2, heads=2, width=16, context=16, batch=2, steps=6, seeds=(0, 1), text=b"abcdefgh" * 200)


def plain(setup, layer):
    return Attention(mask=masks.Causal())


def learned(setup, layer):
    return Attention(mask=masks.Causal(), normalizer=normalizers.Entmax(torch.nn.Parameter(1 + torch.rand(2))))


class Dropping(MultiHead):
    """Draws while it trains, so that going on needs torch's generator too."""

    def merge(self, out, x):
        return F.dropout(super().merge(out, x), 0.3, self.training)


def dropping(setup, layer):
    return Dropping(plain(setup, layer), setup.width, setup.heads)


# ---- fairness ----


def test_contestants_that_are_equal_get_equal_scores_and_learn():
    state = torch.get_rng_state()
    result = trainer.compare({"one": plain, "two": plain}, TINY)
    assert torch.equal(state, torch.get_rng_state())
    assert result.scores["one"] == result.scores["two"] and result.scores["one"][0] != result.scores["one"][1]
    assert result.excess("one", "two") == (0.0, 0.0)
    assert result.mean("one") < math.log(257)
    assert set(result.numbers()) == {"loss_one", "loss_two"}
    assert (
        result.parameters("one")
        == result.parameters("two")
        == sum(p.numel() for p in result.models["one"][0].parameters())
    )


def test_every_other_weight_starts_equal_whatever_the_mechanism_draws():
    one, two = trainer.tiny(TINY, plain, 4), trainer.tiny(TINY, learned, 4)
    assert all(torch.equal(p, two.get_parameter(name)) for name, p in one.named_parameters())
    assert len(list(two.parameters())) == len(list(one.parameters())) + 2


def test_the_model_cannot_see_the_next_byte_and_training_stops_short_of_validation():
    model = trainer.tiny(TINY, plain, 0)
    tokens = torch.randint(0, 256, (1, 12))
    changed = tokens.clone()
    changed[:, 7:] = 1
    torch.testing.assert_close(model(tokens)[:, :7], model(changed)[:, :7])
    setup = Setup()
    assert len(setup.validation) > 20_000 and setup.validation not in setup.training


def test_paired_statistics_are_those_of_the_differences():
    result = trainer.Comparison({"a": [1.0, 2.0, 4.0], "b": [0.5, 1.0, 3.5]}, {}, {}, "error")
    gaps = torch.tensor([0.5, 1.0, 0.5])
    assert result.excess("a", "b") == pytest.approx((float(gaps.mean()), float(gaps.std() / 3**0.5)))
    assert result.numbers()["error_a"] == [1.0, 2.0, 4.0]
    assert trainer.Comparison({"a": [1.0], "b": [2.0]}, {}, {}).excess("a", "b") == (-1.0, math.inf)


def test_a_difference_counts_from_two_standard_errors_on():
    for mean, above, below in ((0.21, True, False), (0.19, False, False), (-0.19, False, False), (-0.21, False, True)):
        excess = trainer.Excess(mean, 0.1)
        assert (excess.above, excess.below) == (above, below)
    alone = trainer.Excess(-1.0, math.inf)
    assert not alone.above and not alone.below


def test_the_rate_warms_up_and_falls_to_a_tenth():
    recipe = Recipe(steps=100, lr=1.0)
    assert [recipe.rate(i) for i in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0], abs=0.02)
    assert recipe.rate(50) == pytest.approx(0.55) and recipe.rate(100) == pytest.approx(0.1)


def test_a_step_is_adamws_with_clipped_gradients():
    """The whole training again by hand, with torch's own schedule."""
    model, again = trainer.tiny(TINY, plain, 0), trainer.tiny(TINY, plain, 0)
    trainer.fit(model, trainer.language(TINY), TINY, 0)
    decayed, others = [p for p in again.parameters() if p.ndim > 1], [p for p in again.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=TINY.lr, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(i + 1, 0.55 + 0.45 * math.cos(math.pi * i / 6))
    )
    stream = trainer.batches(TINY.training, TINY, 0)
    for _ in range(6):
        tokens = next(stream)
        optimizer.zero_grad()
        logits = again(tokens[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(again.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, other)


# ---- interrupted and resumed ----


class Interrupted(Exception):
    pass


def interrupted(setup, build, stop, file, monkeypatch):
    """Train until a step, saving at each, and fail there."""
    monkeypatch.setattr(trainer, "SAVE_EVERY", -1.0)
    model, seen = trainer.tiny(setup, build, 0), []

    def loss(model, tokens):
        if model.training and torch.is_grad_enabled():
            seen.append(tokens)
            if len(seen) > stop:
                raise Interrupted
        return trainer.next_token(model, tokens)

    task = trainer.language(setup)
    with pytest.raises(Interrupted):
        trainer.fit(model, Task(task.batches, loss, task.held), setup, 0, file=file)


@pytest.mark.parametrize("build", [plain, learned, dropping])
def test_an_interrupted_training_goes_on_as_if_nothing_had_been(build, tmp_path, monkeypatch):
    whole = trainer.tiny(TINY, build, 0)
    score = trainer.fit(whole, trainer.language(TINY), TINY, 0)
    file = tmp_path / "there" / "x.safetensors"
    interrupted(TINY, build, 4, file, monkeypatch)
    told = []
    model = trainer.tiny(TINY, build, 0)
    found = trainer.fit(model, trainer.language(TINY), TINY, 0, file=file, tell=lambda what, steps: told.append(steps))
    assert told == [4, 1, 1] and found == score
    assert all(torch.equal(p, whole.get_parameter(name)) for name, p in model.named_parameters())
    assert [p.name for p in file.parent.iterdir()] == ["x.safetensors"]  # no part is left behind
    again = trainer.tiny(TINY, build, 0)
    assert trainer.fit(again, trainer.language(TINY), TINY, 0, file=file, tell=lambda what, n: told.append(n)) == score
    assert told[3:] == [6]  # a finished one is not trained again


def test_another_training_is_refused_and_so_is_a_broken_file(tmp_path):
    trainer.compare({"one": plain}, TINY, folder=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one-0.safetensors", "one-1.safetensors"]
    assert "p/embed.table.weight" in load_file(tmp_path / "one-0.safetensors")
    for change in ({"lr": 1e-3}, {"steps": 7}, {"text": b"hgfedcba" * 200}):
        with pytest.raises(SpecError, match="of another training"):
            trainer.compare({"one": plain}, Setup(**(vars(TINY) | change)), folder=tmp_path)
    with pytest.raises(SpecError, match="of another training"):
        trainer.compare(
            {"one": lambda setup, layer: Attention(lambda s, b, h, q, k: 2 * s + k, masks.Causal())},
            TINY,
            folder=tmp_path,
        )
    zeros = Attention(scores.RelativeBias(2, 8), masks.Causal())  # no difference yet, but more to learn
    with pytest.raises(SpecError, match="of another training"):
        trainer.compare({"one": lambda setup, layer: zeros}, TINY, folder=tmp_path)
    (tmp_path / "one-0.safetensors").write_bytes(b"nothing")
    with pytest.raises(SpecError, match="delete it"):
        trainer.compare({"one": plain}, TINY, folder=tmp_path)


def test_means_that_a_mechanism_moves_are_kept(tmp_path, monkeypatch):
    from saccade.systems.sparse.routing_transformer import RoutingTransformer

    def build(setup, layer):
        return RoutingTransformer(4, 4, decay=0.9, online=True).build(setup.heads)

    whole = trainer.tiny(TINY, build, 0)
    score = trainer.fit(whole, trainer.language(TINY), TINY, 0, file=tmp_path / "whole")
    interrupted(TINY, build, 3, tmp_path / "x", monkeypatch)
    model = trainer.tiny(TINY, build, 0)
    assert trainer.fit(model, trainer.language(TINY), TINY, 0, file=tmp_path / "x") == score
    means = [dict(m.named_buffers())["stack.blocks.0.attention.spec.select.clusters.means"] for m in (model, whole)]
    assert torch.equal(*means)


def test_a_killed_process_leaves_a_training_that_goes_on(tmp_path):
    code = f"""
import os, signal, torch
from saccade import Attention, masks
from saccade.study import trainer
trainer.SAVE_EVERY = -1.0
setup = trainer.Setup(layers=1, heads=2, width=16, context=16, batch=2, steps=6, seeds=(0,), text=b"abcdefgh" * 200)
count = 0
def tell(what, steps):
    global count
    count += steps
    if count == 4:
        os.kill(os.getpid(), signal.SIGKILL)
model = trainer.tiny(setup, lambda s, layer: Attention(mask=masks.Causal()), 0)
from pathlib import Path
trainer.fit(model, trainer.language(setup), setup, 0, file=Path({str(tmp_path)!r}) / "x", tell=tell)
"""
    done = subprocess.run([sys.executable, "-c", code])
    assert done.returncode == -signal.SIGKILL
    setup = Setup(**(vars(TINY) | {"layers": 1, "seeds": (0,)}))
    told = []
    score = trainer.fit(
        trainer.tiny(setup, plain, 0), trainer.language(setup), setup, 0, file=tmp_path / "x",
        tell=lambda what, steps: told.append(steps),
    )  # fmt: skip
    assert told == [3, 1, 1, 1]  # killed after the fourth step, before it was written
    assert score == trainer.fit(trainer.tiny(setup, plain, 0), trainer.language(setup), setup, 0)


# ---- other tasks ----


def stream(make, seed):
    source = torch.Generator().manual_seed(seed)
    while True:
        yield make(source)


def learns(contestants, make, better_than, steps=80):
    """Scores by accuracy on batches of a seed that is not trained on."""
    task = Task(
        lambda seed: stream(make, seed),
        trainer.labelled,
        lambda: [next(stream(make, 999))],
        trainer.accuracy,
        "accuracy",
    )
    result = trainer.compete(contestants, task, Recipe(steps=steps, lr=1e-2, seeds=(0,)))
    for name in contestants:
        assert result.mean(name) > better_than, result.numbers()
    assert set(result.numbers()) == {f"accuracy_{name}" for name in contestants}


def test_a_model_trained_by_a_closure_takes_adams_steps():
    """Of a loss whose gradient is the same at every step, each step of Adam is as long as the rate of that step."""
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    model.weight.data.fill_(0.0)
    seen: list[float] = []

    def loss() -> torch.Tensor:
        seen.append(model.weight.item())
        return -7 * model.weight.sum()  # clipped to 1

    trainer.train(model, loss, 200, 0.5)
    steps = torch.tensor(seen).diff()
    assert steps[:40].tolist() == pytest.approx([0.5 * (i + 1) / 50 for i in range(40)], rel=1e-4)
    falls = [0.5 * (0.55 + 0.45 * math.cos(math.pi * i / 200)) for i in range(70, 199)]
    assert steps[70:].tolist() == pytest.approx(falls, rel=1e-4)


def test_classification_of_sequences():
    def make(source):
        tokens = torch.randint(0, 8, (32, 10), generator=source)
        return tokens, (tokens == 3).any(1).long()

    learns(
        {
            "plain": lambda: Encoder(8, 16, 1, 2, classes=2),
            "cog": lambda: Encoder(8, 16, 1, 2, classes=2, attention="cog"),
        },
        make,
        0.9,
    )


def test_classification_of_images():
    def make(source):
        where = torch.randint(0, 4, (32,), generator=source)
        images = 0.1 * torch.randn(32, 1, 8, 8, generator=source)
        for image, place in zip(images, where, strict=True):
            row, column = divmod(int(place), 2)
            image[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1
        return images, where

    learns({"vit": lambda: ViT(4, 8, 4, channels=1, width=16, layers=1, heads=2)}, make, 0.9)


def test_labels_where_something_is_asked_and_sequences_to_sequences():
    def copied(source):
        tokens = torch.randint(1, 8, (32, 6), generator=source)
        return tokens, torch.cat([torch.zeros(32, 1, dtype=torch.long), tokens[:, :-1]], 1), tokens

    learns({"translator": lambda: EncoderDecoder(8, 32, 1, 2)}, copied, 0.5, steps=100)  # by chance 1 / 7
    labels = torch.tensor([[-100, 2], [1, -100]])

    class Says(torch.nn.Module):
        def forward(self, tokens):
            return F.one_hot(torch.tensor([[0, 2], [0, 0]]), 3).float()

    batch = (torch.zeros(2, 2, dtype=torch.long), labels)
    assert trainer.accuracy(Says(), batch) == 0.5
    z = math.log(math.e + 2)
    assert float(trainer.labelled(Says(), batch)) == pytest.approx(((z - 1) + z) / 2)


def test_progress_is_silent_where_nobody_looks(capsys):
    with progress.bar(3) as tell:
        tell("one", 1)
    assert capsys.readouterr() == ("", "")


def test_a_gpt_is_what_is_trained():
    assert isinstance(trainer.tiny(TINY, plain), GPT)
