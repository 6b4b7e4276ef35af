"""Saliency map verbalization: candidates by brute force, a map whose text is known, and what readers recover."""

from itertools import combinations

import torch

from saccade.study.hosted_laws import small_model, some_tokens
from saccade.study.laws import check
from saccade.systems.explain._sentences import Said, guess, prompt, read, read_prompt
from saccade.systems.explain.saliency_verbalization import SaliencyVerbalization, coverage

torch.set_num_threads(1)
TEXT = ["i", "love", "this", "film", "and", "it", "is", "long"]
MAP = [0.3, 0.9, 0.2, -0.1, 0.0, 0.1, 0.0, -0.4]


def test_check():
    assert not [result for result in check(SaliencyVerbalization) if result.status == "failed"]


def test_candidates_by_brute_force():
    system, saliency = SaliencyVerbalization(), torch.randn(12, generator=torch.Generator().manual_seed(3)).tolist()
    bar = sum(sorted(saliency)[-4:]) / 4  # 0.4 * 12 is 4
    for search, shapes in (
        (system.convolution, [c for n in (2, 3) for c in combinations(range(5), n)]),
        (system.spans, [(1, 2, 3), (0, 1, 2, 3, 4)]),
    ):
        wanted = set()
        for start in range(8):
            for shape in shapes:
                values = [saliency[start + i] for i in shape]
                if all(value >= 0 for value in values) and sum(values) / len(values) > bar:
                    wanted.add(tuple(start + i for i in shape))
        assert set(search(saliency)) == wanted
        assert wanted or search == system.spans


def test_a_known_map():
    system = SaliencyVerbalization()
    assert coverage([0, 1, 2], MAP) == 1.4 / 1.5 and coverage([7], MAP) == 0
    text = system.verbalize(TEXT, MAP)
    assert text == "The phrase » i love this « is most important for the prediction (93 %)."
    assert system.verbalize(TEXT, [-1.0] * 8) == "" and system.verbalize([], []) == ""


def test_what_is_said_can_be_read():
    generator = torch.Generator().manual_seed(1)
    for length in (1, 4, 9, 30):
        words = [f"w{i}" for i in range(length)]
        saliency = (torch.randn(length, generator=generator) + 0.5).tolist()
        said = read(SaliencyVerbalization().verbalize(words, saliency))
        assert said or max(saliency) <= 0
        percents = [one.percent for one in said]
        assert percents == sorted(percents, reverse=True)
        for one in said:
            at = [int(word[1:]) for word in one.words]
            assert at == list(range(at[0], at[-1] + 1))
            share = sum(saliency[i] for i in at) / sum(a for a in saliency if a > 0)
            assert abs(one.percent - 100 * max(share, 0)) <= 0.5 + 1e-9


def test_a_prompt_holds_the_map():
    text = prompt(TEXT, MAP, "sentiment", "positive")
    assert read_prompt(text) == list(zip(TEXT, MAP, strict=True))
    assert text.count("'positive'") == 2 and "sentiment" in text


def test_a_reader_of_opinions():
    assert guess([Said(["adj2"], 40), Said(["det0", "adj3"], 30)]) == 1
    assert guess([Said(["adj2", "noun0", "adv0"], 40), Said(["adj4"], 30)]) == 0
    assert guess([]) == 0


def test_a_llama_explains_itself():
    model, tokens = small_model(), some_tokens(1, 12)
    words = [f"t{i}" for i in range(12)]
    with SaliencyVerbalization().apply(model) as explain:
        said = read(explain(tokens, words))
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    model(inputs_embeds=embedded).logits[0, -1].max().backward()
    saliency = (embedded.grad * embedded).sum(-1).abs()[0].tolist()
    assert {f"t{i}" for i in range(12)} >= {word for one in said for word in one.words}
    at = [int(word[1:]) for word in said[0].words]
    assert abs(said[0].percent - 100 * coverage(at, saliency)) <= 0.5
