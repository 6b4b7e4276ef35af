"""Regions by name stand for the right tokens of each sample: padded, cached, and in a model with images."""

import pytest
import torch
import transformers as tf

import families
from families import LENGTH, VOCABULARY, inputs, make
from saccade import Attention, SpecError, attention, edit, edits, stats, watch


def close(a, b):
    assert (a - b).abs().max() < 1e-4 * b.abs().max(), (a - b).abs().max()


MEANINGS = {
    "span": slice(2, 6),
    "places": [2, 3, 4, 5],
    "prompt": (torch.arange(LENGTH) >= 2) & (torch.arange(LENGTH) < 6),
    "function": lambda ids: ids == 17,
}


@pytest.mark.parametrize("name", MEANINGS)
@torch.no_grad()
def test_a_name_is_the_tokens_it_stands_for(name):
    model, ids = make("llama"), families.tokens()
    ids[:, 2:6] = 17
    with edit(model, edits.Zero(keys=slice(2, 6)), edits.Renormalize()):
        wanted = model(ids, use_cache=False).logits
    with edit(model, edits.Zero(keys="mine"), edits.Renormalize(), regions={"mine": MEANINGS[name]}):
        close(model(ids, use_cache=False).logits, wanted)
        cache = tf.DynamicCache()
        steps = [ids[:, :4], ids[:, 4:9], *ids[:, 9:].split(1, 1)]
        close(torch.cat([model(s, past_key_values=cache).logits for s in steps], 1), wanted)
    assert not model._forward_pre_hooks
    with pytest.raises(AssertionError):
        close(model(ids, use_cache=False).logits, wanted)


@torch.no_grad()
def test_places_count_from_each_texts_first_token():
    model, ids = make("llama"), families.tokens()
    padding = torch.ones_like(ids)
    padding[0, :5] = 0
    ids[0, :5] = 0
    with watch(model, stats.RegionMass({"start": "start"}), regions={"start": slice(0, 3)}) as seen:
        model(ids, attention_mask=padding, use_cache=False)
        padded = seen[1]["region_mass"]["start"][0, :, 5:]
        model(ids[:1, 5:], use_cache=False)
        close(seen[1]["region_mass"]["start"][0], padded)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
@torch.no_grad()
def test_the_image_is_known(family):
    model, given = make(family), inputs(family)
    image = given["input_ids"] == VOCABULARY - 1
    with watch(model, stats.RegionMass({"image": "image"}), stats.KeyMass(), kind="text") as seen:
        model(**given)
    for site in seen.sites:
        told = seen[site.path]
        by_key = (told["key_mass"] * image[:, None]).sum(-1)
        close(told["region_mass"]["image"].sum(-1), by_key)
        assert (by_key > 0.1).any()


def test_a_name_without_a_meaning_is_told():
    model = make("llama")
    with pytest.raises(SpecError, match="region 'image' has no meaning"):
        edit(model, edits.Zero(keys="image"))
    with (
        pytest.raises(SpecError, match="must give bool"),
        edit(model, edits.Zero(keys="x"), regions={"x": lambda ids: ids[:, :1] > 3}),
    ):
        model(families.tokens())
    with (
        pytest.raises(SpecError, match="slice from the front"),
        edit(model, edits.Zero(keys="x"), regions={"x": slice(-3, None)}),
    ):
        model(families.tokens())
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(SpecError, match="meaning in a model alone"):
        attention(q, q, q, Attention(edits=[edits.Zero(keys="image")]))
    assert not model._forward_pre_hooks
