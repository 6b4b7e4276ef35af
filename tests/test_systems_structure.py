"""Systems that are told which words belong together: their equations written out, and what is told."""

import math

import numpy as np
import pytest
import torch

from saccade import SpecError
from saccade.nn import GPT
from saccade.nn.backbones import Place
from saccade.nn.init import initialise
from saccade.study.layer_laws import LAYER_LAWS
from saccade.systems.score import _structure as structure
from saccade.systems.score._translation import HELD, pairs, told
from saccade.systems.score.scene_aware import SceneAware, same_scene
from saccade.systems.score.syntax_guided import SyntaxGuided, dependencies, shared
from saccade.worlds.translation import translation

torch.set_num_threads(1)
WIDTH, HEADS, N = 16, 4, 11


def made(system, index=0, layers=1):
    layer = system.layer(Place(WIDTH, HEADS, index, layers, None, None))
    initialise(layer, "xavier", 3)
    layer = layer.double().eval()
    return layer, torch.randn(2, N, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def related(seed=0):
    """Words that belong together: in the second sentence there are three words less, and one belongs to nothing."""
    some = torch.rand(2, N, N, generator=torch.Generator().manual_seed(seed)) < 0.4
    some = some | some.mT | torch.eye(N).bool()
    keep = torch.arange(N) < torch.tensor([[N], [N - 3]])
    keep_related = keep.clone()
    keep_related[0, 4] = False
    return some & keep_related[:, None] & keep_related[..., None], keep


def softmax(layer, q, k, keep):
    s = q @ k.mT / math.sqrt(q.shape[-1])
    return s.masked_fill(~keep[:, None, None], -math.inf).softmax(-1)


# ---- syntax-guided ----


def test_a_word_sees_itself_its_head_and_its_dependents():
    """The official loop over dependencies, on a batch with padding; there ROOT is word 0, here there is none."""
    given = next(pairs(3))
    found = dependencies(given.heads)
    for row, (tokens, heads) in enumerate(zip(given.tokens, given.heads, strict=True)):
        count = int((tokens != 0).sum())
        official = np.eye(count + 1)
        for word, head in enumerate(heads[:count].tolist(), 1):
            official[head + 1, word] = official[word, head + 1] = 1
        expected = torch.zeros_like(found[row])
        expected[:count, :count] = torch.from_numpy(official[1:, 1:]).bool()
        assert torch.equal(found[row], expected)


def test_guided_attention_is_softmax_among_those_that_belong_together():
    layer, x = made(SyntaxGuided())
    together, keep = related()
    with structure.telling(layer, together):
        out = layer(x, keep=keep)
    q, k, v = layer.project(x, x)
    w = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~together[:, None], -math.inf).softmax(-1).nan_to_num(0)
    torch.testing.assert_close(out, layer.merge(w @ v, x))
    torch.testing.assert_close(layer(x, keep=keep), layer.merge(softmax(layer, q, k, keep) @ v, x))  # told nothing


def test_a_shared_layer_acts_several_times():
    model = structure.translator()
    first = model.encoder.blocks[0]
    shared(model.encoder, 3)
    assert set(model.encoder.blocks.parameters()) == set(first.parameters())
    source, _, keep = told(next(pairs(0)))[:3]
    x = model.embed(source)
    for _ in range(3):
        x = first(x, keep=keep)
    torch.testing.assert_close(model.encode(source, keep), model.encoder.last(x))


# ---- scene-aware ----


def test_scenes_are_shared_by_words_that_have_one_in_common():
    sentence = next(s for s in translation(1) if len(s.scenes) > 1)
    found = same_scene(sentence.scenes[None])[0]
    for i in range(len(sentence.tokens)):
        for j in range(len(sentence.tokens)):
            assert found[i, j] == any(bool(scene[i] and scene[j]) for scene in sentence.scenes)


@pytest.mark.parametrize("heads", [1, 3])
def test_sasa_keeps_the_weights_of_its_heads_within_scenes(heads):
    layer, x = made(SceneAware(heads=heads))
    together, keep = related()
    with structure.telling(layer, together):
        out = layer(x, keep=keep)
    q, k, v = layer.project(x, x)
    w = softmax(layer, q, k, keep)
    w = torch.cat([w[:, :heads] * together[:, None], w[:, heads:]], 1)
    torch.testing.assert_close(out, layer.merge(w @ v, x))


def test_sacra_has_the_official_keys():
    """decode_at_train's sum over a token's scenes, of which each head takes its coordinates, unprojected."""
    layer, x = made(SceneAware(cross=True, heads=2))
    memory = torch.randn(2, N, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    together, keep = related()
    with structure.telling(layer, together):
        out = layer(x[:, :5], memory, keep=keep)
    q, k, v = layer.project(x[:, :5], memory)
    for row, words in enumerate((N, N - 3)):
        pooled = together[row].double() @ memory[row] / words
        for head in range(2):
            k[row, head] = pooled[:, head * 4 : head * 4 + 4]
    torch.testing.assert_close(out, layer.merge(softmax(layer, q, k, keep) @ v, x[:, :5]))


def test_which_layers_are_told():
    kinds = {cross: [type(SceneAware(cross).layer(Place(WIDTH, HEADS, i, 4, None, None))).__name__ for i in range(4)]
             for cross in (False, True)}  # fmt: skip
    assert kinds[False] == ["Related", "Related", "Related", "SceneSelf"]
    assert kinds[True] == ["Related", "SceneCross", "SceneCross", "Related"]
    assert isinstance(made(SceneAware(layers=(0,)), 0, 3)[0], type(made(SceneAware(), 2, 3)[0]))
    for law in ("trains every part", "a batch equals each alone"):
        LAYER_LAWS[law](SceneAware(cross=True))


# ---- telling ----


def test_what_is_told_is_told_to_all_layers_and_forgotten():
    model = structure.translator(SyntaxGuided().layer, SceneAware(cross=True).layer)
    given = next(pairs(0))
    inputs = told(given)[:3]
    before = model(*inputs)
    with structure.telling(model, dependencies(given.heads)):
        during = model(*inputs)
    assert torch.equal(model(*inputs), before)
    assert (during - before).abs().max() > 1e-3
    with pytest.raises(SpecError, match="no layer"), structure.telling(GPT(9, 8, 1, 2), torch.ones(1, 2, 2).bool()):
        pass
    with pytest.raises(SpecError, match=r"bool \[B, N, N\]"), structure.telling(model, torch.ones(2, 3)):
        pass


def test_training_and_asking_use_other_pairs_of_words():
    task = structure.translating(lambda given: dependencies(given.heads), "train", "test")
    model = structure.translator(SyntaxGuided().layer)
    batch = next(task.batches(0))
    with structure.telling(model, dependencies(batch.heads)):
        told_loss = torch.nn.functional.cross_entropy(model(*told(batch)[:3]).flatten(0, 1), batch.labels.flatten())
    torch.testing.assert_close(task.loss(model, batch), told_loss)
    held = next(iter(task.held()))
    assert torch.equal(batch.tokens, next(pairs(0, "train")).tokens)
    assert torch.equal(held.tokens, next(pairs(HELD, "test")).tokens)
    with structure.telling(model, dependencies(held.heads)):
        right = (model(*told(held)[:3]).argmax(-1) == held.labels)[held.labels != -100]
    torch.testing.assert_close(task.measure(model, held), right.float().mean())
