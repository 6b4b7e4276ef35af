"""Opinions: labels follow from the words that are said to be the evidence."""

from itertools import islice

from saccade.worlds.grammar import words
from saccade.worlds.opinions import SIZES, batch, opinions
from streams import assert_streams


def test_a_seed_names_one_stream() -> None:
    assert_streams(opinions)


def test_labels_follow_from_the_adjectives() -> None:
    """Also where "not" turns them: in sentences of one scene, whose only verb it belongs to."""
    names = list(words(SIZES))
    labels, turned = [], 0
    for one in islice(opinions(0), 200):
        said = [names[token] for token in one.tokens.tolist()]
        assert one.evidence.tolist() == [word.startswith("adj") or word == "adv0" for word in said]
        if "adv0" in said and sum(word.startswith("v") for word in said) > 1:
            continue
        signs = sum(1 if int(word[3:]) % 2 == 0 else -1 for word in said if word.startswith("adj"))
        assert ((-signs if "adv0" in said else signs) > 0) == bool(one.label)
        labels.append(int(one.label))
        turned += "adv0" in said
    assert turned > 5 and 0 < sum(labels) < len(labels)


def test_padding_of_a_batch_is_no_evidence() -> None:
    some = batch(opinions(1), 16)
    assert some.label.shape == (16,) and not some.evidence[some.tokens == 0].any()
