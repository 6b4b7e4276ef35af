"""Circuit reuse: path patching against whole runs by hand, repair against dense weights, prompts against their text."""

import pytest
import torch

from saccade.core.errors import SpecError
from saccade.core.stats import Rows
from saccade.hosts.handles import watch
from saccade.study.hosted_laws import small_model, some_tokens
from saccade.study.laws import check
from saccade.systems.explain._patching import path_patching
from saccade.systems.explain._prompts import KNOWN, NEW, Prompts, ask
from saccade.systems.explain.circuit_reuse import CircuitReuse, accuracy, looks
from saccade.worlds.text import decode

torch.set_num_threads(1)


def prompts():
    tokens = some_tokens(3, 14)
    other = tokens.clone()
    other[:, 8:12] = some_tokens(3, 60)[:, 50:54]
    return Prompts(tokens, other, torch.tensor([5, 6, 7]), torch.tensor([50, 60, 70]), [2, 5, 9], some_tokens(3, 4))


@torch.no_grad()
def whole(model, tokens, z=None, q=None):
    """Logits, z and q at the last token; z, q: {(layer, head): what they are made there}."""
    seen = {}

    def hook(kind, layer, given):
        def change(x):
            x = x.unflatten(-1, (4, 8)).clone()
            for (at, head), value in (given or {}).items():
                if at == layer:
                    x[:, -1, head] = value
            for head in range(4):
                seen[kind, layer, head] = x[:, -1, head].clone()
            return x.flatten(-2)

        return change

    hooks = []
    for i, layer in enumerate(model.model.layers):
        at, by = hook("z", i, z), hook("q", i, q)
        hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(lambda m, args, at=at: (at(args[0]),)))
        hooks.append(layer.self_attn.q_proj.register_forward_hook(lambda m, args, out, by=by: by(out)))
    logits = model(tokens, use_cache=False).logits[:, -1]
    for one in hooks:
        one.remove()
    return logits, seen


@pytest.mark.parametrize("receivers", [(), ((1, 2),), ((1, 0), (1, 3))])
def test_effects_are_those_of_whole_runs(receivers):
    model, p = small_model(), prompts()

    def metric(logits):
        return sum(float(x[r] - x[w]) for x, r, w in zip(logits, p.right, p.wrong, strict=True)) / 3

    (clean, seen), (corrupt, theirs) = whole(model, p.tokens), whole(model, p.other)
    found = path_patching(model, p, receivers)
    for layer in range(2):
        for head in range(4):
            if (layer, head) in receivers:
                assert found[layer, head] == 0
                continue
            z = {(i, h): (theirs if (i, h) == (layer, head) else seen)["z", i, h] for i in range(2) for h in range(4)}
            logits, patched = whole(model, p.tokens, z)
            if receivers:
                logits, _ = whole(model, p.tokens, q={(i, h): patched["q", i, h] for i, h in receivers})
            wanted = (metric(logits) - metric(clean)) / (metric(corrupt) - metric(clean))
            assert abs(float(found[layer, head]) - wanted) < 1e-4
    assert found[0].abs().max() > 0.01
    if receivers:
        assert found[1].abs().max() < 1e-4  # no head of layer 1 moves a query of layer 1


@torch.no_grad()
def test_repaired_heads_look_there_and_others_do_not_change():
    model, p = small_model(), prompts()
    heads = [(1, 0), (1, 3)]
    plain, rows = {}, {}
    for seen, system in ((plain, CircuitReuse(())), (rows, CircuitReuse(heads, p.places))):
        with watch(model, Rows([-2, -1])) as watching, system.apply(model):
            model(p.tokens)
            seen.update({layer: watching[layer]["rows"] for layer in (0, 1)})
    assert torch.equal(rows[0], plain[0]) and torch.equal(rows[1][:, [1, 2]], plain[1][:, [1, 2]])
    assert torch.equal(rows[1][:, :, 0], plain[1][:, :, 0])  # the query before the last
    for b, place in enumerate(p.places):
        assert rows[1][b, [0, 3], 1].argmax(-1).tolist() == [place] * 2
    assert torch.equal(rows[1][:, [0, 3], 1].sum(-1), torch.ones(3, 2))
    wanted = torch.stack([plain[0][b, :, 1, place] for b, place in enumerate(p.places)]).mean(0)
    torch.testing.assert_close(looks(model, p)[0], wanted)


def test_the_prompts_ask_what_they_say():
    for form in (KNOWN, NEW):
        p = ask(form, 8)
        rows = zip(p.tokens, p.other, p.right, p.wrong, p.places, p.answers, strict=True)
        for tokens, other, right, wrong, place, answer in rows:
            page, question = decode(tokens).rsplit("\n", 1)
            assert tokens[place] == right and page.count(question) == 1
            assert torch.equal(tokens[place : place + 4], answer)
            assert page[page.index(question) + len(question)] == chr(right)
            page, question = decode(other).rsplit("\n", 1)
            assert page[page.index(question) + len(question)] == chr(wrong) != chr(right)


def test_accuracy_counts_the_right_next_tokens():
    model, p = small_model(), prompts()
    with torch.no_grad():
        said = model(p.tokens).logits[:, -1].argmax(-1)
    p.right.copy_(said)
    assert accuracy(model, p) == 1
    p.right[0] = (said[0] + 1) % 96
    assert abs(accuracy(model, p) - 2 / 3) < 1e-6


def test_what_it_refuses():
    with pytest.raises(SpecError, match="no layer"):
        CircuitReuse([(5, 0)]).apply(small_model())


def test_its_laws():
    assert not [r for r in check(CircuitReuse) if r.status == "failed"]
