"""Texts with a key in every block: what is where, and that nothing but the star tells which key is asked for."""

import torch

from saccade.worlds.starred import ASK, FILLER, KEYS, MARK, STAR, VOCABULARY, starred

BLOCKS, LENGTH = 6, 9
TOKENS, ASKED = starred(400, torch.Generator().manual_seed(0), BLOCKS, LENGTH)


def blocks():
    """``[400, BLOCKS, LENGTH]``, the marks left out."""
    whole = torch.nn.functional.pad(TOKENS, (0, 1), value=MARK).unflatten(1, (BLOCKS, LENGTH + 1))
    assert (whole[..., -1] == MARK).all()
    return whole[..., :-1]


def test_every_block_holds_one_key_and_one_of_them_the_star():
    assert TOKENS.shape == (400, BLOCKS * (LENGTH + 1) - 1) and TOKENS.dtype == ASKED.dtype == torch.int64
    assert TOKENS.min() == 0 and TOKENS.max() == MARK == VOCABULARY - 1
    is_key = (blocks() >= FILLER) & (blocks() < FILLER + KEYS)
    assert (is_key.sum(-1) == 1).all()
    assert ((blocks() == STAR).sum((1, 2)) == 1).all()
    assert (TOKENS[:, -1] == ASK).all() and ((TOKENS == ASK).sum(-1) == 1).all()


def test_the_answer_is_the_key_of_the_stars_block():
    for text, asked in zip(blocks(), ASKED, strict=True):
        (row,) = [block for block in text.tolist() if STAR in block]
        assert [token for token in row if FILLER <= token < FILLER + KEYS] == [int(asked)]


def test_keys_and_places_of_stars_are_all_alike():
    assert torch.bincount(ASKED - FILLER, minlength=KEYS).min() > 25  # 50 expected
    assert (blocks() == STAR).any(-1).sum(0).min() > 40  # 67 expected
    other = starred(400, torch.Generator().manual_seed(1), BLOCKS, LENGTH)
    assert not torch.equal(other[0], TOKENS)
    assert torch.equal(starred(400, torch.Generator().manual_seed(0), BLOCKS, LENGTH)[0], TOKENS)
