"""The world of symbols that are said again in the same order."""

from itertools import islice

import torch

from saccade.worlds.batches import IGNORED
from saccade.worlds.rotation import rotation


def test_the_second_round_follows_from_the_first():
    for tokens, labels in islice(rotation(7, seed=0, batch=5), 3):
        assert tokens.shape == labels.shape == (5, 13)
        assert (labels[:, :7] == IGNORED).all()
        for said, asked in zip(tokens.tolist(), labels.tolist(), strict=True):
            first = said[:7]
            assert sorted(first) == list(range(7))
            for symbol, answer in zip(said[7:], asked[7:], strict=True):
                assert answer == first[(first.index(symbol) + 1) % 7]


def test_it_starts_anywhere_and_the_seed_decides():
    tokens, _ = next(rotation(7, seed=0, batch=200))
    starts = (tokens[:, :7] == tokens[:, 7:8]).int().argmax(1)
    assert set(starts.tolist()) == set(range(7))
    assert torch.equal(tokens, next(rotation(7, 0, 200))[0]) and not torch.equal(tokens, next(rotation(7, 1, 200))[0])
