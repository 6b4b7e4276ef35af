"""Secondary sinks: planted ones at their levels, scores against eager attention, origins against a hand-made sum."""

import pytest
import torch
import transformers as tf

from saccade import Unsupported, catalog
from saccade.study import laws
from saccade.study.atlas import REACH
from saccade.study.hosted_laws import small_model, some_tokens
from saccade.systems.explain._planted_sinks import planted
from saccade.systems.explain.secondary_sinks import SecondarySinks, Sink

torch.set_num_threads(1)


def marked(n=200):
    tokens = torch.full((1, n), 9)
    tokens[0, 0], tokens[0, 20], tokens[0, 90] = 1, 2, 3
    return tokens


@torch.no_grad()
def test_planted_sinks_have_their_levels_and_come_from_their_mlps():
    system, model, tokens = SecondarySinks(), planted(), marked()
    attends = model.config._attn_implementation
    with system.apply(model) as watching:
        model(tokens)
    primary, secondary = system.sinks(watching)
    assert (primary.key, primary.first, primary.layers) == (0, 1, 5)
    assert [(s.key, s.first, s.layers) for s in secondary] == [(20, 2, 3), (90, 3, 2)]
    assert all(s.score < primary.score for s in secondary)
    assert min(system.origins(model, tokens, primary, secondary)) > 0.98
    assert model.config._attn_implementation == attends  # nothing watches any more
    # What the MLP of a layer that plants nothing adds to these tokens has no direction.
    assert system.origins(model, tokens, primary, [Sink(20, 4, 1, 0.0)]) == [pytest.approx(0, abs=1e-6)]


@torch.no_grad()
def test_the_primary_weakens_where_others_are():
    """With one, two and three equal sinks each draws a half and a third of what one alone drew."""
    system, model = SecondarySinks(), planted()
    with system.apply(model) as watching:
        model(marked())
    scores = system.scores(watching)
    assert scores[1, 0] > 0.95
    assert scores[2, 0] == pytest.approx(float(scores[2, 20]), abs=0.1)
    assert scores[3, [0, 20, 90]].max() < 0.6 and scores[5, 0] > 0.95


@torch.no_grad()
def test_scores_are_means_over_the_far_queries():
    system, model, tokens = SecondarySinks(), small_model(), some_tokens(1, 60)
    with system.apply(model) as watching:
        model(tokens)
    model.set_attn_implementation("eager")
    weights = torch.stack(model(tokens, output_attentions=True).attentions)[:, 0].mean(1)
    found = system.scores(watching)
    wanted = torch.stack([weights[:, j + REACH + 1 :, j].mean(1) for j in range(found.shape[1])], 1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert found.shape[1] == 60 - REACH - 15


@torch.no_grad()
def test_a_run_that_is_too_short_or_begins_with_the_primary_is_none():
    model, tokens = planted(), marked()
    system = SecondarySinks(least=3)
    with system.apply(model) as watching:
        model(tokens)
    assert [s.key for s in system.sinks(watching)[1]] == [20]
    with SecondarySinks().apply(model) as watching:
        model(torch.where(tokens == 3, 1, tokens))  # a second token of the first one's kind
    assert 90 not in [s.key for s in SecondarySinks().sinks(watching)[1]]


def test_a_model_without_mlps_beside_its_attention_is_refused():
    config = tf.BertConfig(
        vocab_size=96, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    with pytest.raises(Unsupported, match="no mlp"):
        SecondarySinks().origins(tf.BertModel(config), some_tokens(1, 20), Sink(0, 0, 1, 1.0), [])


def test_no_law_fails():
    assert not [r for r in laws.check(catalog.find("secondary-sinks")) if r.status == "failed"]
