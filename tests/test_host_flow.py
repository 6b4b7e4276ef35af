"""Rollout, relevance and flow against the dense matrices that the models themselves return, in float64."""

import itertools

import networkx as nx
import pytest
import torch
import transformers as tf

import saccade
from saccade import Attention, SpecError, edits, masks, normalizers
from saccade.hosts.flow import keep
from saccade.study.hosted_laws import small_model, some_tokens
from saccade.study.measure import peak_bytes

torch.set_num_threads(1)
ROWS = [-1, 7]


def bert():
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        hidden_dropout_prob=0, attention_probs_dropout_prob=0,
    )  # fmt: skip
    model = tf.BertForSequenceClassification(config).eval()
    for p in model.parameters():
        p.data.mul_(8 if p.ndim > 1 else 1)
    return model


# How close the model's own weights are: transformers' eager Llama takes its softmax in float32, its BERT does not.
MODELS = {"causal, grouped heads": (small_model, 1e-7), "both sides": (bert, 1e-12)}


def dense(model, tokens):
    """Every layer's weights, from transformers' own eager attention, and the output."""
    model.set_attn_implementation("eager")
    out = model(tokens, output_attentions=True)
    return out.attentions, out.logits


def rolled_out(weights):
    product = torch.eye(weights[0].shape[-1], dtype=torch.float64)
    for w in weights:
        mixed = w.mean(1) + torch.eye(w.shape[-1], dtype=torch.float64)
        product = mixed / mixed.sum(-1, keepdim=True) @ product
    return product


def score(logits):
    """Of a classifier its second class, of a language model the best token at the end."""
    return logits[:, 1].sum() if logits.ndim == 2 else logits[:, -1].amax(-1).sum()


@pytest.mark.parametrize("name", MODELS)
def test_rollout_is_the_dense_product(name):
    make, close = MODELS[name]
    model, tokens = make().double(), some_tokens(2, 40)
    with keep(model) as run, torch.no_grad():
        model(tokens)
    weights, _ = dense(model, tokens)
    found = run.rollout(ROWS)
    assert (found - rolled_out(weights)[:, ROWS]).abs().max() < close
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("name", MODELS)
def test_relevance_is_that_of_the_dense_gradients(name):
    make, close = MODELS[name]
    model, tokens = make().double(), some_tokens(2, 40)
    with keep(model) as run:
        found = run.relevance(score(model(tokens).logits), ROWS)
    weights, logits = dense(model, tokens)
    gradients = torch.autograd.grad(score(logits), weights)
    product = torch.eye(40, dtype=torch.float64)
    for w, g in zip(weights, gradients, strict=True):
        product = product + (w * g).clamp(min=0).mean(1).detach() @ product
    error, wanted = (found - product[:, ROWS]).abs(), (product - torch.eye(40))[:, ROWS]
    assert wanted.max() > 0 and error.max() < 100 * close * wanted.max()


@pytest.mark.parametrize("heads", [None, [1, 3]])
def test_rows_are_divided_by_what_they_sum_to(heads):
    """A program whose rows do not sum to one, on all heads or two of them, with a row that sees nothing."""
    model, tokens = small_model().double(), some_tokens(1, 40)
    program = Attention(
        mask=masks.Window(6) & (lambda b, h, q, k: q != 9), normalizer=normalizers.Sigmoid(),
        edits=[edits.Scale(3.0, keys=slice(0, 3))],
    )  # fmt: skip
    watch = saccade.watch(model, saccade.stats.Rows(range(40)))
    with saccade.install(model, program, heads=heads), watch as seen, keep(model) as run, torch.no_grad():
        model(tokens)
    weights = [seen[layer]["rows"] for layer in range(2)]
    assert (weights[0].sum(-1).mean(1) - 1).abs().max() > 0.1
    wanted = rolled_out(weights)[:, [-1, 9, 7]]
    assert (run.rollout([-1, 9, 7]) - wanted).abs().max() < 1e-12


def test_flow_is_the_least_cut():
    """The maximum flow is the smallest capacity of any set of edges that parts the query from the token."""
    model, tokens = small_model().double(), some_tokens(1, 4)
    with keep(model) as run, torch.no_grad():
        model(tokens)
    weights, _ = dense(model, tokens)
    mixed = [(w.detach().mean(1)[0] + torch.eye(4)) / 2 for w in weights]
    for row in (3, 2):
        wanted = []
        for token in range(4):
            cuts = []
            for bits in itertools.product((True, False), repeat=4 + 3):
                top = torch.arange(4) == row
                middle = torch.tensor(bits[:4])
                low = torch.tensor([*bits[4 : 4 + token], False, *bits[4 + token :]])  # on the query's side of the cut
                cuts.append(float(mixed[1][top][:, ~middle].sum() + mixed[0][middle][:, ~low].sum()))
            wanted.append(min(cuts))
        wanted = torch.tensor(wanted)
        torch.testing.assert_close(run.flow([row])[0, 0], (wanted / wanted.sum()).double(), rtol=1e-6, atol=1e-7)


def test_few_edges_lower_the_flow_and_enough_are_all():
    """Two edges a head make another flow than all do; all but one of the row almost the same."""
    model, tokens = small_model().double(), some_tokens(1, 24)
    with keep(model) as run, torch.no_grad():
        model(tokens)
    exact = run.flow([-1])
    assert torch.equal(exact, run.flow([-1], edges=24))
    few = run.flow([-1], edges=2)
    assert few.sum() == pytest.approx(1) and not torch.allclose(few, exact, atol=1e-3)
    near = run.flow([-1], edges=23)  # one key of the last rows alone is left out
    assert (near - exact).abs().max() < 0.02


def test_flow_takes_the_greatest_edges_of_each_head():
    """Against networkx, on a graph of the two greatest weights of each head's rows."""
    n, model = 7, small_model().double()
    tokens = some_tokens(1, n)
    with keep(model) as run, torch.no_grad():
        model(tokens)
    graph, (weights, _) = nx.DiGraph(), dense(model, tokens)
    for above, w in enumerate(weights, 1):
        best = w.detach()[0].topk(2, -1)
        kept = torch.zeros_like(w[0]).scatter(-1, best.indices, best.values).mean(0) + torch.eye(n)
        for i, j in kept.nonzero().tolist():
            graph.add_edge((above, i), (above - 1, j), capacity=float(kept[i, j]) / 2)
    top = len(weights), n - 1
    wanted = [nx.maximum_flow_value(graph, top, (0, j)) if graph.has_node((0, j)) else 0.0 for j in range(n)]
    wanted = torch.tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(run.flow([-1], edges=2)[0, 0], wanted / wanted.sum(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("what", ["rollout", "relevance"])
def test_memory_grows_with_the_length_alone(what):
    model = small_model()

    def run(n):
        tokens = some_tokens(1, n)
        with keep(model) as kept, torch.set_grad_enabled(what == "relevance"):
            logits = model(tokens, logits_to_keep=1, use_cache=False).logits
        return kept.rollout([-1]) if what == "rollout" else kept.relevance(logits.max(), [-1])

    run(64)
    assert peak_bytes(lambda: run(2048), torch.device("cpu")) < 2048 * 2048 * 4 * 2  # two heads' weights; there are 8


def test_only_the_last_forward_counts_and_no_trace_is_left():
    model, tokens = small_model(), some_tokens(1, 20)
    with keep(model) as run, torch.no_grad():
        model(some_tokens(1, 31))
        model(tokens)
        assert run.rollout([-1]).shape == (1, 1, 20)
    assert not model._forward_pre_hooks and "_saccade_acts" not in model.model.layers[0].self_attn.__dict__


def test_what_cannot_be_had_is_refused():
    model, tokens = small_model(), some_tokens(1, 20)
    with keep(model) as run:
        with pytest.raises(SpecError, match="nothing was kept"):
            run.rollout([-1])
        with torch.no_grad():
            logits = model(tokens).logits
        with pytest.raises(SpecError, match="no gradient"):
            run.relevance(logits.max(), [-1])
        with pytest.raises(SpecError, match="expected some of 20 queries"):
            run.rollout([20])
        with torch.no_grad():
            cache = model(tokens[:, :12]).past_key_values
            model(tokens[:, 12:], past_key_values=cache)
        with pytest.raises(SpecError, match=r"attend over \[8, 20\]"):
            run.rollout([-1])
