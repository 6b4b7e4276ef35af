"""Encoder-only prediction: each prefix as if nothing else were there, and the task by its definition."""

import torch

from saccade.nn import GPT, Encoder
from saccade.study.laws import check
from saccade.systems.theory.entp import LENGTH, SEEDS, EachPrefix, Entp, triplet_count, triplets


def test_obeys_the_laws():
    assert not [r for r in check(Entp) if r.status == "failed"]


def model(first=0):
    torch.manual_seed(0)
    return EachPrefix(Encoder(11, 16, 2, 2, attention=Entp()), first).eval()


def test_every_prefix_is_read_by_itself():
    entp, tokens = model(), torch.randint(0, 11, (2, 9), generator=torch.Generator().manual_seed(1))
    logits = entp(tokens)
    for end in range(9):
        alone = entp.encoder(tokens[:, : end + 1])[:, -1] @ entp.encoder.embed.table.weight.T
        torch.testing.assert_close(logits[:, end], alone, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(model(4)(tokens), logits[:, 4:])


def test_early_tokens_take_later_ones_in():
    """What a causal model says can be told from its states so far; here the states of a prefix change with its end."""
    entp, tokens = model(), torch.randint(0, 11, (1, 6), generator=torch.Generator().manual_seed(2))
    assert not torch.allclose(entp.encoder(tokens)[:, :3], entp.encoder(tokens[:, :3]), atol=1e-4)
    torch.manual_seed(0)
    decoder = GPT(11, 16, 2, 2)
    torch.testing.assert_close(decoder.states(tokens)[:, :3], decoder.states(tokens[:, :3]), atol=1e-5, rtol=1e-5)


def test_triplets_are_counted_by_their_definition():
    inputs, labels = next(triplets(0, batch=5))
    assert inputs.shape == (5, LENGTH) and labels.shape == (5, LENGTH - SEEDS + 1)
    whole = torch.cat([inputs, labels[:, -1:]], 1)
    for row in whole.tolist():
        for n in range(SEEDS, LENGTH + 1):
            x = row[:n]
            assert row[n] == sum((a + b + x[-1]) % n == 0 for a in x for b in x) % n
    assert (
        triplet_count(torch.tensor([[1, 2, 3]])).item()
        == sum((a + b) % 3 == 0 for a in (1, 2, 3) for b in (1, 2, 3)) % 3
    )
