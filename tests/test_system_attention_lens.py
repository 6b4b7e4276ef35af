"""Attention Lens: heads add up to the layer, losses by loops over the equation, and lenses that find a planted map."""

import pytest
import torch

from saccade.core.errors import SpecError
from saccade.study.hosted_laws import small_model, some_tokens
from saccade.study.laws import check
from saccade.systems.explain.attention_lens import AttentionLens, Lens, divergence, said
from saccade.worlds.text import Answer, Example

torch.set_num_threads(1)


def read(model, tokens, layers=None):
    outs = {}
    hooks = [
        layer.self_attn.register_forward_hook(lambda m, args, out, i=i: outs.__setitem__(i, out[0]))
        for i, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad(), AttentionLens(layers).apply(model) as seen:
        logits = model(tokens, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits, seen, outs


def test_what_the_heads_add_sums_to_the_layer_s_output():
    _, seen, outs = read(small_model(), some_tokens())
    assert list(seen) == [0, 1] and seen[0].shape == (2, 48, 4, 32)
    for layer in seen:
        assert seen[layer].std() > 0.02
        torch.testing.assert_close(seen[layer].sum(-2), outs[layer], rtol=1e-5, atol=1e-5)


def test_a_fresh_lens_is_the_unembedding_and_the_loss_is_the_equation_s():
    model = small_model()
    logits, seen, _ = read(model, some_tokens(1, 10), [1])
    lens, w = Lens(model.lm_head, 4), model.lm_head.weight
    total = 0.0
    for n in range(10):
        p = logits[0, n].double().softmax(-1)
        q = sum(w.detach().double() @ seen[1][0, n, h].double() for h in range(4)).softmax(-1)
        total += float((p * (p.log() - q.log())).sum())
    found = AttentionLens([1]).losses(model, {1: lens}, some_tokens(1, 10))
    assert abs(float(found[1].detach()) - total / 10) < 1e-4 * total and total > 1


def test_lenses_learn_a_planted_map_of_each_head():
    torch.manual_seed(0)
    x, plant = torch.randn(512, 3, 8), torch.randn(3, 8, 12)
    logits = torch.einsum("nhw,hwv->nv", x, plant)
    unembed = torch.nn.Linear(8, 12, bias=False)
    lens = Lens(unembed, 3)
    before = float(divergence(logits, lens(x).sum(-2)).detach())
    solver = torch.optim.Adam(lens.parameters(), 0.05)
    for _ in range(200):
        solver.zero_grad()
        divergence(logits, lens(x).sum(-2)).backward()
        solver.step()
    assert float(divergence(logits, lens(x).sum(-2)).detach()) < 0.02 < before
    own = plant - plant.mean(-1, keepdim=True)  # a softmax does not see what all tokens share
    ours = lens.weight.detach() - lens.weight.detach().mean(-1, keepdim=True)
    for h in range(3):
        assert float(torch.cosine_similarity(ours[h].flatten(), own[h].flatten(), 0)) > 0.98


def test_training_brings_every_layer_nearer_to_the_model():
    model, system = small_model(), AttentionLens()
    model.requires_grad_(False)
    state = {name: p.clone() for name, p in model.named_parameters()}
    texts = some_tokens(4, 24)
    before, after = (system.losses(model, system.train(model, [texts] * n, rate=0.01), texts) for n in (0, 60))
    assert list(after) == [0, 1] and all(after[layer] < 0.5 * before[layer] for layer in after)
    assert all(torch.equal(p, state[name]) for name, p in model.named_parameters())


def test_said_reads_the_query_that_the_answer_comes_from():
    model, system = small_model(), AttentionLens([0])
    examples = [Example(t, (Answer(5, 6, 0, 1), Answer(9, 10, 0, 1))) for t in some_tokens(3, 12)]
    lens = {0: Lens(model.lm_head, 4)}
    _, seen, _ = read(model, torch.stack([e.tokens for e in examples]), [0])
    wanted = [
        sum(int((model.lm_head.weight @ seen[0][b, 8, h]).argmax()) == int(e.tokens[9]) for b, e in enumerate(examples))
        for h in range(4)
    ]
    assert said(system, model, lens, examples)[0].tolist() == [x / 3 for x in wanted]
    copied = [Example(e.tokens.clone(), e.answers) for e in examples]
    for b, e in enumerate(copied):  # the token after the query is made what head 2's lens says there
        e.tokens[9] = int((model.lm_head.weight @ seen[0][b, 8, 2]).argmax())
    assert said(system, model, lens, copied)[0, 2] == 1


def test_what_it_refuses():
    with pytest.raises(SpecError, match="no layer"), AttentionLens([7]).apply(small_model()):
        pass


def test_its_laws():
    assert not [r for r in check(AttentionLens) if r.status == "failed"]
