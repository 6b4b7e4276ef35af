"""Documents: most nouns are those of the topic that they are said to be about."""

from itertools import islice

from saccade.worlds.documents import LOOSE, NOUNS, SENTENCES, SIZES, TOPICS, batch, documents
from saccade.worlds.grammar import grammar, words
from streams import assert_streams


def test_a_seed_names_one_stream() -> None:
    assert_streams(documents)


def test_documents_are_about_their_topic() -> None:
    """A loose noun is of the topic by chance, one time in as many as there are topics."""
    names = list(words(SIZES))
    for topics in (range(4), range(4, 6)):
        some = batch(documents(0, topics), 200)
        assert set(some.topic.tolist()) == set(topics)
        own = [
            int(names[token].removeprefix("noun").removesuffix(".pl")) // NOUNS == topic
            for row, topic in zip(some.tokens.tolist(), some.topic.tolist(), strict=True)
            for token in row
            if names[token].startswith("noun")
        ]
        assert abs(sum(own) / len(own) - (1 - LOOSE + LOOSE / TOPICS)) < 0.03


def test_only_nouns_differ_from_the_grammars_sentences_and_keep_their_form() -> None:
    names, source = list(words(SIZES)), grammar("documents/1", SIZES)
    for one in islice(documents(1), 30):
        plain = [names[token] for sentence in islice(source, SENTENCES) for token in sentence.tokens.tolist()]
        for word, before in zip((names[token] for token in one.tokens.tolist()), plain, strict=True):
            both_nouns = word.startswith("noun") and before.startswith("noun")
            assert word == before or (both_nouns and word.endswith(".pl") == before.endswith(".pl"))
