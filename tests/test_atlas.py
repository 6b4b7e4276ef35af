"""The head atlas: heads planted by hand are found, and every score is that of the dense matrices."""

import math
import re
from itertools import islice

import pytest
import torch
import transformers as tf
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

import saccade
from saccade import SpecError, cli, masks, zoo
from saccade.hosts.acts import Frame, inside, run
from saccade.study import atlas
from saccade.study.atlas import OFFSETS, REACH, THRESHOLDS, Offsets, report
from saccade.study.hosted_laws import small_model, some_tokens
from saccade.study.measure import peak_bytes
from saccade.study.probes import embedded
from saccade.worlds.recall import needle
from saccade.worlds.text import Answer, Example, text

torch.set_num_threads(1)
WORDS, ROOM = 64, 160  # tokens of the planted model, and places


class Planted(nn.Module):
    """Attention whose matrices are written by hand: ``heads`` maps of the residual to queries, keys and values."""

    def __init__(self, heads, sharp=60.0):
        super().__init__()
        self.saccade_heads = len(heads)
        self.q, self.k, self.v = (torch.stack(x) for x in zip(*heads, strict=True))
        self.frame = Frame(inside(masks.Causal(), scale=sharp), name="causal")

    def forward(self, x):
        q, k, v = (x[:, None] @ w for w in (self.q, self.k, self.v))
        return x + run(self, q, k, v, self.frame).sum(1)


class PlantedModel(nn.Module):
    """Residual: one-hot token, place, and token before, which the first layer copies there for the second."""

    def __init__(self):
        super().__init__()
        word, place, before = torch.eye(2 * WORDS + ROOM).split([WORDS, ROOM, WORDS])  # rows that pick a part
        none, zero = torch.zeros(2 * WORDS + ROOM, ROOM), torch.zeros(2 * WORDS + ROOM, 2 * WORDS + ROOM)
        to_before = word.T @ before

        def back(d):
            return place.T @ torch.eye(ROOM).roll(-d, 1)

        def at(j):  # every query alike, and only key j answers
            return torch.ones(2 * WORDS + ROOM, ROOM) * (torch.arange(ROOM) == j) / 2

        here = place.T
        wide = nn.functional.pad
        self.layers = nn.ModuleList(
            [
                Planted([(back(1), here, to_before), (back(3), here, zero), (at(0), here, zero),
                         (at(12), here, zero), (none, here, zero)]),
                Planted([(wide(word.T, (0, ROOM - WORDS)), wide(before.T, (0, ROOM - WORDS)), zero),
                         (back(0), here, zero)]),
            ]
        )  # fmt: skip
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, ids):
        n = ids.shape[1]
        x = nn.functional.pad(nn.functional.one_hot(ids, WORDS).float(), (0, ROOM + WORDS))
        x[..., WORDS : WORDS + ROOM] = nn.functional.one_hot(torch.arange(n), ROOM)
        for layer in self.layers:
            x = layer(x)
        return x


def twice(seed=0, n=60):
    """Sixty tokens, no two alike, and the same again; what is said the second time stands in the first."""
    words = torch.randperm(WORDS, generator=torch.Generator().manual_seed(seed))[:n]
    return Example(torch.cat([words, words]), (Answer(n + 20, n + 24, 20, 24),))


def test_planted_heads_are_found():
    found = report(PlantedModel(), [twice(seed) for seed in range(5)])
    words = [h.words for h in found.heads]
    assert words == ["offset -1", "offset -3", "sink", "later sink", "broad", "induction", "offset 0 (itself)"]
    assert all(h.sure == 1 for h in found.heads)
    assert found[0, 3].key == 12 and found["layers.0", 3].label == "later sink"
    assert found[1, 0].scores["retrieval"] == 1 and found[1, 0].scores["induction"] > 0.9
    assert found[0, 4].scores["broad"] == pytest.approx(1, abs=1e-5)
    assert found.named("sink") == [found[0, 2]] and (found.inputs, found.tokens) == (5, 600)
    with pytest.raises(SpecError, match=r"no single head at \(0, 9\)"):
        found[0, 9]


def test_a_head_that_does_now_this_now_that_is_not_sure():
    """The planted induction head on inputs of which some repeat nothing far away: sure only as often as they allow."""
    steady = report(PlantedModel(), [twice(s) for s in range(4)])[1, 0]
    fickle = torch.arange(WORDS)[None]
    mixed = report(PlantedModel(), [*(twice(s) for s in range(2)), *[fickle] * 3])[1, 0]
    assert steady.sure == 1 and mixed.sure < 1
    assert report(PlantedModel(), twice())[1, 0].sure is None


def eager(model, ids):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = torch.stack(model(ids, output_attentions=True).attentions)[:, 0].double()
    model.set_attn_implementation("sdpa")
    return weights  # [layers, heads, N, N]


def test_scores_are_those_of_the_dense_matrices():
    """Every number again, by loops over the definition, from the weights that transformers itself returns."""
    model, example = embedded(), next(needle(120, "atlas"))
    found, n = report(model, example), 120
    weights, ids = eager(model, example.tokens[None]), example.tokens.tolist()
    late = range(2 * REACH, n)
    for layer, head in ((0, 1), (1, 0), (3, 2), (5, 4)):
        w, h = weights[layer, head], found[layer, head]
        profile = [sum(float(w[i, i + d]) for i in late if i + d < n) / len(late) for d in OFFSETS]
        far = [float(w[j + REACH + 1 :, j].mean()) for j in range(n) if n - j - REACH - 1 >= n / 4]
        repeats = []
        for i in late:
            keys = [j for j in range(2, i - REACH) if ids[j - 2 : j] == ids[i - 1 : i + 1]]
            repeats += [float(w[i, keys].sum())] if keys else []
        answer = example.answers[0]
        hits = [int(w[answer.start - 1 + i].argmax()) == answer.evidence_start + i for i in range(4)]
        plogp = -(w * w.clamp(min=1e-30).log()).sum(-1)
        wanted = {
            "offset": max(profile), "local": sum(profile) - max(profile), "sink": far[0], "later sink": max(far[1:]),
            "induction": sum(repeats) / len(repeats), "retrieval": sum(hits) / 4,
            "broad": sum(float(plogp[i]) / math.log(i + 1) for i in late) / len(late),
        }  # fmt: skip
        assert h.scores == pytest.approx(wanted, abs=1e-5)
        assert h.offset == OFFSETS[profile.index(max(profile))] and h.key == 1 + far[1:].index(max(far[1:]))
        distance = sum(float((w[i] * (i - torch.arange(n)).abs()).sum()) for i in late) / len(late)
        assert h.distance == pytest.approx(distance, abs=1e-3)


def test_a_layer_that_looks_both_ways():
    """The last token as a later sink of an encoder, and nothing that the inputs cannot show."""
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    model, ids = tf.BertModel(config).eval(), some_tokens(3, 50)
    found = report(model, {"input_ids": ids})
    assert found.inputs == 3
    model.set_attn_implementation("eager")
    w = model(ids, output_attentions=True).attentions[0].detach().double()
    index = torch.arange(50)
    far = (index[:, None] - index).abs() > REACH
    wanted = ((w * far).sum(2) / far.sum(0)).mean(0)
    for head in (0, 1):
        assert found[0, head].scores["sink"] == pytest.approx(float(wanted[head, 0]), abs=1e-5)
        assert found[0, head].label == "broad" and found[0, head].scores["retrieval"] is None


def models():
    torch.manual_seed(0)
    ids = some_tokens(2, 40)
    small = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "vocab_size": 96}
    bart = tf.BartModel(tf.BartConfig(**small, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32))
    yield bart, {"input_ids": ids, "decoder_input_ids": ids[:, :25]}, 3, 8
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    yield tf.ViTModel(tf.ViTConfig(**sizes, image_size=32, patch_size=8)), torch.rand(2, 3, 32, 32), 2, 8
    layer = nn.TransformerEncoderLayer(32, 4, 32, batch_first=True)
    yield nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.rand(2, 30, 32), 2, 8


@pytest.mark.parametrize("which", range(3))
def test_every_hosted_model_has_an_atlas(which, tmp_path):
    """Encoder, decoder and cross-attention; pictures; modules of torch: without what their inputs cannot show."""
    model, inputs, layers, heads = list(models())[which]
    found = report(model.eval(), [inputs, inputs])
    assert len(found.heads) == heads and len({h.path for h in found.heads}) == layers and found.inputs == 4
    for h in found.heads:
        assert h.scores["induction"] is None and h.scores["retrieval"] is None and h.sure == 1
        assert h.scores["broad"] > 0.5 and 0 <= h.scores["offset"] < 0.5
    assert found.save(tmp_path / "heads.html").stat().st_size > 10_000


def test_memory_grows_with_the_length_alone():
    model, tokens = small_model(), some_tokens(1, 1400)
    report(model, some_tokens(1, 64))
    assert peak_bytes(lambda: report(model, tokens), torch.device("cpu")) < 1400 * 1400 * 4 * 3  # of 8 heads


def test_offsets_are_the_same_however_the_keys_lie():
    q, k = torch.randn(2, 1, 2, 300, 8).unbind(0)
    program = saccade.Attention(mask=masks.Causal() & (masks.Window(20) | masks.Sinks(2)))  # gathered keys
    _, seen = saccade.attention(q, k, k, program, stats=[Offsets()])
    w = saccade.weights(q, k, program)
    wanted = torch.stack([nn.functional.pad(w.diagonal(d, -2, -1), (max(-d, 0), max(d, 0))) for d in OFFSETS], -1)
    torch.testing.assert_close(seen["offsets"], wanted)


def test_the_page_and_the_table_hold_every_head(tmp_path):
    found = report(embedded(), list(islice(text(128, "atlas"), 3)))
    page = found.save(tmp_path / "heads.html").read_text()
    assert page.count("<svg") == 2 and "offset -1" in page and len(re.findall(r"<tr>", page)) == 37
    assert [p.name for p in tmp_path.iterdir()] == ["heads.html"]
    console = Console(width=200)
    with console.capture() as shown:
        console.print(found.table())
    assert "5.5" in shown.get()


def test_what_it_refuses():
    with pytest.raises(SpecError, match="padded"):
        report(small_model(), {"input_ids": some_tokens(1, 20), "attention_mask": torch.tensor([[0] + [1] * 19])})
    with pytest.raises(SpecError, match="got str"):
        report(small_model(), ["words"])
    with pytest.raises(SpecError, match="at least one input"):
        report(small_model(), [])
    with pytest.raises(SpecError, match="labels are offset"):
        report(small_model(), some_tokens(1, 20)).named("sinks")


def test_thresholds_decide_and_margins_tell_by_how_much():
    scores = torch.full((2, len(THRESHOLDS)), 0.05)
    scores[0, 0], scores[0, 6] = 0.9, 0.85
    label, margin = atlas._named(scores)
    assert label.tolist() == [0, len(THRESHOLDS)]
    assert margin.tolist() == pytest.approx([0.8 - 0.5, 0.05 / 0.9])


def test_the_command_line(tmp_path):
    words = tmp_path / "words.txt"
    words.write_bytes(b"The window is narrow, and yet the light falls in. " * 12)
    out = CliRunner().invoke(cli.app, ["report", "lm", "--text", str(words), "--out", str(tmp_path / "heads.html")])
    assert out.exit_code == 0, out.output
    assert "Pictures" in out.output and "saccade" in (tmp_path / "heads.html").read_text()
    gone = CliRunner().invoke(cli.app, ["report", "lm", "--out", str(tmp_path / "heads.html")])
    assert gone.exit_code == 2 and "--text" in gone.output


def test_it_is_there_without_an_import():
    assert saccade.report(small_model(), some_tokens(1, 40)).inputs == 1
    assert zoo.path("lm").is_dir()
