"""Cells over a real Ray of two workers: the same results as in turn, files written here, nothing computed twice."""

import os
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from saccade import SpecError
from saccade.study import cells, cluster
from saccade.study.runner import Settings, Study


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    torch.manual_seed(0)
    where = tmp_path_factory.mktemp("models") / "tiny"
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, max_position_embeddings=256,
        )
    ).save_pretrained(where)  # fmt: skip
    return str(where)


def study(model, out):
    return Study(Settings(model=model, systems=("window",), tasks=("text",), lengths=(64,), count=1, repeats=1), out)


def test_two_workers_measure_what_one_process_measures(tiny, tmp_path):
    here, there = study(tiny, tmp_path / "here"), study(tiny, tmp_path / "there")
    told = []
    found = there.run(lambda cell, computed: told.append((there.name(cell), computed)), spread=cluster.over("local"))
    alone = here.run()
    assert sorted(told) == sorted((there.name(cell), True) for cell in there.cells)
    for mine, theirs in zip(alone, found, strict=True):
        assert mine["key"] == theirs["key"]
        if mine["task"] == "text":
            assert theirs["result"]["bits_per_byte"] == pytest.approx(mine["result"]["bits_per_byte"], rel=1e-4)
        else:
            assert theirs["result"]["prefill_s"]["n"] == 1
    again = []
    assert there.run(lambda cell, computed: again.append(computed), spread=refuse) == found
    assert not any(again)


def refuse(job, missing):
    raise AssertionError(f"{len(missing)} cells are asked for again")


def test_work_is_really_elsewhere_and_in_parallel(tmp_path):
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers do not see the tests' folder
    job = Whose()
    found = cells.run(job, tmp_path, spread=cluster.over("local"))
    assert [cell["result"]["square"] for cell in found] == [0, 1, 4, 9]
    workers = {cell["result"]["process"] for cell in found}
    assert os.getpid() not in workers and len(workers) == min(2, os.cpu_count() or 1)


class Whose:
    """Says who measured, after a while in which the other worker must take the next cell."""

    cells = (0, 1, 2, 3)

    def name(self, cell):
        return str(cell)

    def key(self, cell):
        return {"cell": cell}

    def measure(self, cell):
        import time

        time.sleep(0.5)
        return {"square": cell * cell, "process": os.getpid()}


def test_nobody_at_the_address():
    with pytest.raises(SpecError, match="ray start --head"):
        list(cluster.over("127.0.0.1:1")(Whose(), [0]))


def test_a_model_that_was_handed_over_stays_here(tiny, tmp_path):
    import pickle

    model = LlamaForCausalLM.from_pretrained(tiny)
    with pytest.raises(SpecError, match="give the model's name"):
        pickle.dumps(Study(Settings(tasks=("text",), lengths=(64,)), tmp_path, model))
