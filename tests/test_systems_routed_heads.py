"""Systems that choose among heads, against their equations written out head by head and token by token."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from saccade import SpecError
from saccade.nn import GPT, EncoderDecoder, MultiHead, gates
from saccade.nn.backbones import Place
from saccade.nn.init import initialise
from saccade.study.trainer import labelled, next_token
from saccade.systems.score._routed_heads import held, importance
from saccade.systems.score._translation import vocabulary
from saccade.systems.score.headmask import HeadMask, Silencer, masked
from saccade.systems.score.mae_heads import MAEHeads, alternating
from saccade.systems.score.moa_heads import MoAHeads, penalized
from saccade.systems.score.moh import BALANCE, MoH, balanced

torch.set_num_threads(1)
WIDTH, HEADS, D, N = 32, 4, 8, 19


def made(system, heads=HEADS):
    """The layer in float64 with weights so large that attention and gates are far from uniform, and a stream."""
    torch.manual_seed(0)
    layer = Place(WIDTH, heads, 0, 1, None, None).filled(system.layer)
    initialise(layer, "xavier", 3)
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(2)
    return layer.double(), torch.randn(2, N, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def projected(layer, x, causal=True):
    """What each head adds to the output before any gate, written out: ``[heads, B, N, WIDTH]``."""
    heads = layer.heads
    q, k, v = (a.weight.unflatten(0, (-1, D)) for a in (layer.q, layer.k, layer.v))
    o = layer.out.weight.unflatten(1, (heads, D))
    found = []
    for h in range(heads):
        kv = h % len(k)
        s = (x @ q[h].T) @ (x @ k[kv].T).mT / math.sqrt(D)
        if causal:
            s = s.masked_fill(torch.ones(N, N).triu(1).bool(), -math.inf)
        found.append(s.softmax(-1) @ (x @ v[kv].T) @ o[:, h].T)
    return torch.stack(found)


def plain_copy(layer):
    """Multi-head attention with the layer's projections."""
    plain = MultiHead(layer.spec, WIDTH, layer.heads, kv_heads=layer.key_heads, head_width=D).double()
    plain.load_state_dict({name: x for name, x in layer.state_dict().items() if name in plain.state_dict()})
    return plain


def language_model(system, heads=HEADS):
    torch.manual_seed(0)
    return GPT(50, WIDTH, 2, heads, attention=system).double(), torch.randint(50, (3, N))


# ---- MoH ----


@pytest.mark.parametrize("causal", [True, False])
def test_moh_weighs_heads_as_the_paper_says(causal):
    layer, x = made(MoH(active=0.75, shared=0.25, causal=causal), heads=HEADS)
    by_head, router = projected(layer, x, causal), layer.gate
    expected = torch.zeros_like(x)
    for b in range(2):
        for n in range(N):
            p = F.softmax(router.route.weight @ x[b, n], 0)
            stage = 2 * F.softmax(router.stages.weight @ x[b, n], 0)
            kept = sorted(range(3), key=lambda h: -p[h].item())[:2]
            expected[b, n] = stage[0] * by_head[0, b, n]  # the one that is shared
            for h in kept:
                expected[b, n] += stage[1] * 2 * p[h] / sum(p[i] for i in kept) * by_head[1 + h, b, n]
    torch.testing.assert_close(layer(x), expected)


def test_moh_whose_gates_say_nothing_and_keep_all_is_multi_head_attention():
    layer, x = made(MoH(active=1.0, shared=0.5))
    with torch.no_grad():
        for p in layer.gate.parameters():
            p.zero_()
    torch.testing.assert_close(layer(x), plain_copy(layer)(x))


def test_moh_adds_the_mean_of_its_layers_losses_and_only_in_training():
    model, tokens = language_model(MoH())
    plain, whole = next_token(model, tokens), balanced(next_token)(model, tokens)
    by_layer = [m.balance for m in model.modules() if isinstance(m, gates.HeadRouter)]
    assert len(by_layer) == 2
    torch.testing.assert_close(whole - plain, BALANCE * (by_layer[0] + by_layer[1]) / 2)
    model.eval()
    assert balanced(next_token)(model, tokens) == next_token(model, tokens)


def test_moh_counts_its_routers_and_refuses_more_shared_heads_than_active_ones():
    layer, _ = made(MoH(active=0.75, shared=0.5), heads=4)
    extra = sum(p.numel() for p in layer.parameters()) - 4 * WIDTH * WIDTH
    assert extra == WIDTH * (2 + 2 + 2)  # routed, shared, stages
    with pytest.raises(SpecError, match="keep=0 must lie in 1"):
        made(MoH(active=0.5, shared=0.5))


# ---- HeadMask ----


def translator(kind):
    torch.manual_seed(0)
    full = HeadMask(kind, causal=False)
    return EncoderDecoder(vocabulary(), 16, 2, 4, attention=full, decoder=HeadMask(kind), cross=full)


def watched(model, batch, loss):
    """The factors of every head in each call of the model that the loss makes: ``[calls, heads of the model]``."""
    calls = []
    silencers = [m for m in model.modules() if isinstance(m, Silencer)]
    for s in silencers:
        s.register_forward_hook(lambda s, _, out: calls.append((s, torch.ones(4) if s.factors is None else s.factors)))
    found = loss(model, batch)
    rows = [[factors for which, factors in calls if which is s] for s in silencers]
    return torch.stack([torch.cat(row) for row in zip(*rows, strict=True)]), found


def test_headmask_silences_an_eighth_of_the_whole_models_heads():
    model, batch = translator("random"), held(1)[0]
    first, _ = watched(model, batch, masked(labelled))
    assert first.shape == (1, 24) and int((first == 0).sum()) == 3 and int((first == 1).sum()) == 21
    drawn = torch.cat([watched(translator("random"), batch, masked(labelled))[0], first])
    assert torch.equal(drawn[0], drawn[1])  # the same seed
    torch.manual_seed(5)
    assert not torch.equal(watched(model, batch, masked(labelled))[0][0], first[0])
    assert all(m.factors is None for m in model.modules() if isinstance(m, Silencer))


def test_headmask_silences_those_that_matter_most():
    model, batch = translator("important"), held(1)[0]
    calls, loss = watched(model, batch, masked(labelled))
    assert calls.shape == (2, 24) and bool((calls[0] == 1).all())  # first whole, then masked
    worth = importance(model, batch, labelled)
    assert set((calls[1] == 0).nonzero()[:, 0].tolist()) == set(worth.topk(3).indices.tolist())
    layers = [m for m in model.modules() if isinstance(m, MultiHead)]
    with torch.no_grad():
        for head in worth.topk(3).indices.tolist():  # a silent head is one whose output projection is zero
            layers[head // 4].out.weight[:, head % 4 * 4 :][:, :4] = 0
    torch.testing.assert_close(labelled(model, batch), loss)


def test_headmask_silences_its_own_layers_only():
    torch.manual_seed(0)
    cross = HeadMask("important", 0.5, causal=False)
    model, batch = EncoderDecoder(vocabulary(), 16, 2, 4, cross=cross), held(1)[0]
    calls, _ = watched(model, batch, masked(labelled))
    worth = importance(model, batch, labelled, [block.cross for block in model.decoder.blocks])
    assert set((calls[1] == 0).nonzero()[:, 0].tolist()) == set(worth.topk(4).indices.tolist())


def test_importance_is_the_gradient_of_a_factor_example_by_example():
    model, batch = translator("random"), tuple(x[:3] for x in held(1)[0])
    layers = [m for m in model.modules() if isinstance(m, MultiHead)]
    factors = [torch.ones(3, 4, requires_grad=True) for _ in layers]
    for layer, factor in zip(layers, factors, strict=True):
        layer.gate.register_forward_hook(lambda _, __, out, factor=factor: out * factor[..., None, None])
    slopes = torch.autograd.grad(labelled(model, batch), factors)
    torch.testing.assert_close(importance(model, batch, labelled), torch.cat([s.abs().mean(0) for s in slopes]))


def test_headmask_in_use_is_multi_head_attention():
    layer, x = made(HeadMask())
    torch.testing.assert_close(layer(x), plain_copy(layer)(x))
    model, batch = translator("random").eval(), held(1)[0]
    assert masked(labelled)(model, batch) == labelled(model, batch)
    with pytest.raises(SpecError, match='"random" or "important"'):
        HeadMask("all")


# ---- MoA ----


def dense_moa(layer, x):
    """Every expert computed, weighed by the paper's w, written out; and what it adds to the loss."""
    logits = x @ layer.router.route.weight.T
    p, asked = logits.softmax(-1), layer.router.asked
    order = p.argsort(-1, descending=True)[..., :asked]
    w, share = torch.zeros_like(p), torch.zeros(layer.heads, dtype=p.dtype)
    for b in range(len(x)):
        for n in range(N):
            chosen = order[b, n].tolist()
            total = sum(p[b, n, e] for e in chosen).item()  # a number: no gradient goes through it
            for e in chosen:
                w[b, n, e] = p[b, n, e] / total
                share[e] += 1 / (len(x) * N * asked)
    penalty = 0.01 * layer.heads * (p.mean((0, 1)) * share).sum() + 0.001 * (logits.exp().sum(-1).log() ** 2).mean()
    return torch.einsum("ebnc,bne->bnc", projected(layer, x), w), penalty


def test_moa_is_its_experts_and_its_losses_with_their_gradients():
    layer, x = made(MoAHeads(experts=7))
    assert layer.k.out_features == layer.v.out_features == D and layer.router.asked == 4
    expected, penalty = dense_moa(layer, x)
    out = layer(x)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(layer.router.penalty, penalty)
    weights = list(layer.parameters())
    wanted = torch.autograd.grad(expected.sin().sum() + penalty, weights)
    found = torch.autograd.grad(out.sin().sum() + layer.router.penalty, weights)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_moa_that_asks_all_is_multi_query_attention_weighed():
    layer, x = made(MoAHeads(experts=4))
    with torch.no_grad():
        layer.router.route.weight.zero_()
        layer.out.weight.mul_(4)
    torch.testing.assert_close(layer(x), plain_copy(layer)(x) / 4)


def test_moa_costs_no_more_with_more_experts_but_their_router():
    counts = []
    for experts in (4, 64):
        layer, x = made(MoAHeads(experts))
        with torch.no_grad(), FlopCounterMode(display=False) as work:
            layer(x)
        counts.append(work.get_total_flops() - 2 * 2 * x[..., 0].numel() * WIDTH * experts)  # the router runs twice
    assert counts[0] == counts[1]
    with pytest.raises(SpecError, match="4 of 3 experts"):
        made(MoAHeads(3))


def test_moas_losses_are_added_over_layers_and_only_in_training():
    model, tokens = language_model(MoAHeads(6))
    plain, whole = next_token(model, tokens), penalized(next_token)(model, tokens)
    torch.testing.assert_close(whole - plain, sum(a.router.penalty for a in model.attentions))
    model.eval()
    assert penalized(next_token)(model, tokens) == next_token(model, tokens)


# ---- MAE ----


def experts_of(layer, x, causal):
    """Equation by equation: experts ``[heads, B, N, WIDTH]`` of h - 1 heads each."""
    by_head = projected(layer, x, causal)
    others = [[j for j in range(HEADS) if j != i] for i in range(HEADS)]
    return torch.stack([HEADS / (HEADS - 1) * by_head[rest].sum(0) for rest in others])


@pytest.mark.parametrize("causal", [True, False])
def test_mae_is_a_mixture_of_experts_of_all_heads_but_one(causal):
    layer, x = made(MAEHeads(causal))
    layer.eval()
    first, norm, _, last = layer.experts
    with torch.no_grad():  # a norm that has seen something
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    means = torch.stack([x[:, : n + 1 if causal else N].mean(1) for n in range(N)], 1)
    inner = (means @ first.weight.T - norm.running_mean) / (norm.running_var + 1e-5).sqrt()
    g = (torch.tanh(inner * norm.weight + norm.bias) @ last.weight.T + last.bias).softmax(-1)
    assert g.std(-1).mean().item() > 0.05
    torch.testing.assert_close(layer(x), torch.einsum("ibnc,bni->bnc", experts_of(layer, x, causal), g))


def test_mae_of_a_uniform_gate_is_multi_head_attention():
    layer, x = made(MAEHeads())
    with torch.no_grad():
        layer.experts[3].weight.zero_()
        layer.experts[3].bias.zero_()
    torch.testing.assert_close(layer(x), plain_copy(layer)(x))


def test_mae_attends_to_a_context_where_nothing_goes_on_with_the_stream():
    layer, x = made(MAEHeads(causal=False))
    layer.eval()
    torch.testing.assert_close(layer(x[:, :5], x), layer(x)[:, :5])
    for refused, cache in ((made(MAEHeads())[0], None), (layer, layer.cache())):
        with pytest.raises(SpecError, match="causal=False and no cache"):
            refused(x[:, :5], x, cache=cache)


def test_mae_draws_one_expert_for_each_input_as_often_as_the_gate_says():
    layer, x = made(MAEHeads(causal=False))
    layer.eval().drawn = True
    x = x[:1].expand(2000, -1, -1)
    g = layer.experts(x[:1].mean(1))[0].softmax(-1)
    factors = layer.factors(layer.seen(x, None, None))[:, 0]
    silent = (factors == 0).double()
    assert bool((silent.sum(-1) == 1).all()) and set(factors.unique().tolist()) == {0.0, 4 / 3}
    torch.testing.assert_close(silent.mean(0), g, atol=0.05, rtol=0)
    expected = experts_of(layer, x[:1], False)[:, 0]
    out = layer(x[:3])
    assert all(min((row - e).abs().max().item() for e in expected) < 1e-9 for row in out)


def test_mae_learns_in_two_kinds_of_steps():
    model, tokens = language_model(MAEHeads())
    inside = {p for layer in model.attentions for p in layer.experts.parameters()}
    kinds = []
    for seed in range(40):
        torch.manual_seed(seed)
        model.zero_grad()
        alternating(next_token)(model, tokens).backward()
        learning = {p for p in model.parameters() if p.grad is not None}
        assert learning in (inside, set(model.parameters()) - inside)
        kinds.append(learning == inside)
    assert 1 <= sum(kinds) <= 15  # one in six is 6.7
    assert all(p.requires_grad for p in model.parameters())
    model.eval()
    assert alternating(next_token)(model, tokens) == next_token(model, tokens)
    with pytest.raises(SpecError, match="at least 2"):
        made(MAEHeads(), heads=1)


# ---- all of them, in a model ----


@pytest.mark.parametrize("system", [MoH(), HeadMask(), MoAHeads(7), MAEHeads()])
def test_models_of_them_decode_what_they_prefill(system):
    """With rotary positions, which the laws leave out."""
    model, tokens = language_model(system)
    caches = model.eval().caches()
    steps = torch.cat([model(part, caches) for part in tokens.split([7, 1, 1, 10], 1)], 1)
    torch.testing.assert_close(steps, model(tokens))
