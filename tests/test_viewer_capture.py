"""What a capture gives back of a run: exact rows, pooled maps, scores; never a matrix of N²."""

import re
from pathlib import Path

import pytest
import torch
import transformers as tf

import saccade
from saccade import Attention, SpecError, edits, masks, normalizers, scores, selectors, zoo
from saccade.hosts.acts import Site
from saccade.study.measure import peak_bytes
from saccade.viewer import Capture, Layer, Sequence
from saccade.viewer.load import part, patches


@pytest.fixture(scope="module")
def lm():
    return tf.AutoModelForCausalLM.from_pretrained(zoo.path("lm"), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 256, (1, 302), generator=torch.Generator().manual_seed(0))


def dense(layer, head):
    return saccade.weights(layer.q, layer.k, layer.program(head), offset=layer.offset)[0, head]


def pooled_by_hand(w, block):
    mass = torch.stack([x.sum(1) for x in w.split(block, 1)], 1)
    mass = torch.stack([x.mean(0) for x in mass.split(block, 0)])
    most = torch.stack([torch.stack([y.max() for y in x.split(block, 1)]) for x in w.split(block, 0)])
    return mass, most


PROGRAMS = {
    "its own": None,
    "alibi, by head": Attention(score=scores.ALiBi()),
    "window and sinks": Attention(mask=masks.Window(50) | masks.Sinks(3)),
    "sigmoid, edited": Attention(normalizer=normalizers.Sigmoid(), edits=[edits.Scale(0.5, keys=slice(0, 9), heads=1)]),
    "signed": Attention(normalizer=normalizers.Signed()),
    "mixed heads": Attention(edits=[edits.MixHeads(torch.rand(6, 6, generator=torch.Generator().manual_seed(1)))]),
    "chosen blocks": Attention(select=selectors.TopKBlocks(3, 32)),
    "plain function": Attention(score=lambda s, b, h, q, k: s - 0.01 * h * (q - k)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_rows_maps_and_levels_are_those_of_the_dense_definition(lm, ids, name, monkeypatch):
    monkeypatch.setattr("saccade.viewer.capture.CELLS", 20_000)  # several tiles
    monkeypatch.setattr("saccade.viewer.capture.SIDE", 151)
    program = PROGRAMS[name]
    if program is None:
        run = Capture.of(lm, {"input_ids": ids}, layers=[2])
    else:
        with saccade.install(lm, program):
            run = Capture.of(lm, {"input_ids": ids}, layers=[2])
    (layer,) = run.layers
    assert (layer.n, layer.m, layer.block) == (302, 302, 2)
    whole = layer.overview()
    for head in (1, 4):
        want = dense(layer, head)
        rows = torch.tensor([0, 5, 133, 301])
        torch.testing.assert_close(layer.rows(head, rows), want[rows], atol=2e-6, rtol=1e-4)
        mass, most = pooled_by_hand(want, 2)
        torch.testing.assert_close(whole.mass[head], mass, atol=2e-6, rtol=1e-4)
        torch.testing.assert_close(whole.most[head], most.clamp(min=0), atol=2e-6, rtol=1e-4)
        strip = layer.pooled([0, head], 128, 302, 16)
        mass, most = pooled_by_hand(want[128:], 16)
        torch.testing.assert_close(strip.mass[1], mass, atol=2e-6, rtol=1e-4)
        torch.testing.assert_close(strip.most[1], most.clamp(min=0), atol=2e-6, rtol=1e-4)
        sample = layer.pooled([head], 0, 302, 16, step=8)
        mass, most = pooled_by_hand(want[[i for i in range(302) if i % 8 == 0]].repeat_interleave(8, 0)[:302], 16)
        torch.testing.assert_close(sample.most[0], most.clamp(min=0), atol=2e-6, rtol=1e-4)
        torch.testing.assert_close(sample.mass[0, :-1], mass[:-1], atol=2e-6, rtol=1e-4)


def eager(model, **inputs):
    """The weights as the model itself gives them, by kind."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(**inputs, output_attentions=True)


def agree(layer, want):
    for head in (0, layer.heads - 1):
        found = layer.rows(head, torch.arange(layer.n))
        torch.testing.assert_close(found, want[0, head], atol=1e-5, rtol=1e-4)


def test_rows_are_what_the_model_itself_calls_its_attentions(lm, ids):
    run = Capture.of(lm, {"input_ids": ids[:, :200]})
    want = eager(lm, input_ids=ids[:, :200]).attentions
    assert len(run.layers) == 6
    for layer, w in zip(run.layers, want, strict=True):
        agree(layer, w)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_decoder_and_cross_attention(kind):
    torch.manual_seed(0)
    if kind == "t5":
        config = tf.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
        model = tf.T5ForConditionalGeneration(config).eval()
    else:
        config = tf.BartConfig(
            vocab_size=50, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
        )  # fmt: skip
        model = tf.BartForConditionalGeneration(config).eval()
    inputs = {"input_ids": torch.randint(3, 50, (1, 23)), "decoder_input_ids": torch.randint(3, 50, (1, 9))}
    run = Capture.of(model, inputs, {"source": Sequence([f"s{i}" for i in range(23)])})
    told = eager(model, **inputs)
    by = {("source", "source"): told.encoder_attentions, ("target", "target"): told.decoder_attentions,
          ("target", "source"): told.cross_attentions}  # fmt: skip
    assert len(run.layers) == 6
    for pair, want in by.items():
        mine = [layer for layer in run.layers if (layer.queries, layer.keys) == pair]
        for layer, w in zip(mine, want, strict=True):
            agree(layer, w)
            whole = layer.overview()
            torch.testing.assert_close(whole.mass, w[0], atol=1e-5, rtol=1e-4)
    assert run.sequences["source"].tokens[3] == "s3" and run.sequences["target"].tokens == [str(i) for i in range(9)]


def test_patches_of_an_image():
    torch.manual_seed(0)
    config = tf.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8
    )
    model, pixels = tf.ViTModel(config).eval(), torch.rand(1, 3, 32, 32)
    run = Capture.of(model, {"pixel_values": pixels}, {"image": patches(pixels[0], (4, 4))})
    want = eager(model, pixel_values=pixels).attentions
    for layer, w in zip(run.layers, want, strict=True):
        assert (layer.queries, layer.keys) == ("image", "image")
        agree(layer, w)
    image = run.sequences["image"]
    assert (image.grid, image.prefix, image.tokens[1], image.image[1:4]) == ((4, 4), 1, "patch 0,0", b"PNG")


def test_scores_are_those_before_the_softmax(lm, ids):
    with saccade.install(lm, Attention(score=scores.SoftCap(5.0))):
        (layer,) = Capture.of(lm, {"input_ids": ids[:, :90]}, layers=[1]).layers
    score = layer.scores(2, 50)
    q, k = layer.q[0, 2, 50], layer.k[0, 0]
    torch.testing.assert_close(score[:51], 5 * torch.tanh(k[:51] @ q * 48**-0.5 / 5))
    torch.testing.assert_close(score[:51].softmax(0), layer.rows(2, torch.tensor([50]))[0, :51])
    assert not score[51:].any()


def test_heads_with_programs_of_their_own(lm, ids, monkeypatch):
    monkeypatch.setattr("saccade.viewer.capture.SIDE", 151)
    with saccade.install(lm, Attention(mask=masks.Window(4)), heads=[1, 3]):
        (layer,) = Capture.of(lm, {"input_ids": ids}, layers=[0]).layers
    far = layer.rows(1, torch.tensor([300]))[0, :290], layer.rows(2, torch.tensor([300]))[0, :290]
    assert float(far[0].abs().max()) == 0 and float(far[1].abs().max()) > 0
    whole = layer.overview()
    for head in (1, 2):
        torch.testing.assert_close(whole.most[head], pooled_by_hand(dense(layer, head), 2)[1], atol=2e-6, rtol=1e-4)


def test_what_cannot_be_shown_is_refused(lm, ids):
    with pytest.raises(SpecError, match="one sample; the batch is 2"):
        Capture.of(lm, {"input_ids": ids[:, :20].expand(2, -1)})
    with pytest.raises(SpecError, match="20 places of 'text', which has 3"):
        Capture.of(lm, {"input_ids": ids[:, :20]}, {"text": Sequence(["a", "b", "c"])})
    assert "_saccade_acts" not in lm.model.layers[0].self_attn.__dict__


def test_a_hundred_thousand_tokens_need_no_matrix():
    """All weights would take 40 GB; a map, a row and a score take what some rows do."""
    n, source = 100_000, torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, n, 4, generator=source) for _ in range(2))
    site = Site("layer", 0, frozenset({"self", "text"}), 1, torch.nn.Identity())
    layer = Layer(site, q, k, 0, [(None, Attention(mask=masks.Causal()))], "text", "text")
    row = n - 5

    def look():
        coarse = layer.pooled([0], 0, n, layer.block, step=layer.block)  # from one query of each block
        exact = layer.rows(0, torch.tensor([row]))[0]
        assert coarse.mass.shape[1:] == (-(-n // layer.block),) * 2
        wanted = torch.softmax(q[0, 0, row].double() @ k[0, 0, : row + 1].double().T / 2, -1)
        torch.testing.assert_close(exact[: row + 1].double(), wanted, rtol=1e-4, atol=1e-9)
        assert bool((exact[row + 1 :] == 0).all())
        first = layer.rows(0, torch.tensor([n // 2 // layer.block * layer.block]))[0]  # a query that the map has seen
        mass = torch.nn.functional.pad(first, (0, -n % layer.block)).unflatten(0, (-1, layer.block)).sum(1)
        torch.testing.assert_close(coarse.mass[0, n // 2 // layer.block], mass, rtol=1e-4, atol=1e-7)

    assert peak_bytes(look, torch.device("cpu")) < 4 * n * n / 50


@pytest.mark.parametrize("text", ["Zero", "Nothing(keys=0)", "Zero(keys=open('x'))", "Zero(keys=)", "__import__('os')"])
def test_edits_in_words_are_literals_alone(text):
    with pytest.raises(SpecError, match="such as Zero"):
        part(text)


def test_edits_in_words():
    edit = part("Scale(0.5, keys=slice(0, 4), heads=[1, -1])")
    assert (edit.factor, edit.region.keys, edit.region.heads) == (0.5, slice(0, 4), [1, -1])


def test_the_examples_in_the_docs_run_as_printed():
    text = (Path(__file__).parent.parent / "docs" / "explain.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == 3
    exec(compile("\n".join(blocks), "docs/explain.md", "exec"), {})
