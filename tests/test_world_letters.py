"""Tasks of letters: what prompts show, and what must come next."""

import random

import torch

from saccade.worlds.letters import shown, tasks
from saccade.worlds.text import decode


def test_prompts_show_the_task():
    found = tasks()
    prompts, answers = shown(found["last"], 10, 4, "seed")
    for prompt, answer in zip(prompts, answers, strict=True):
        *examples, asked = decode(prompt).split("\n")
        assert len(examples) == 10 and all(x[:5][-1] == x[-1] and x[5:7] == ": " for x in examples)
        assert asked[5:] == ": " and ord(asked[4]) == answer
    prompts, answers = shown(found["same"], 0, 3, "a")
    assert torch.equal(prompts[:, 1], answers)


def test_outputs_are_those_of_the_inputs():
    rng, drawn = random.Random(0), {}
    for name, task in tasks().items():
        drawn[name] = {task(rng) for _ in range(50)}
    assert all(x.islower() and y == x.upper() for x, y in drawn["upper"])
    assert all(x.isupper() and y == x.lower() for x, y in drawn["lower"])
    assert all(len(x) == 5 and y == x[0] for x, y in drawn["first"])
    assert {x for x, y in drawn["vowel"] if y == "y"} == {x for x, _ in drawn["vowel"]} & set("aeiou")
