"""Recall worlds: byte sequences in which something said early must be said again late.

Every task is `task(length, seed, **options) -> endless iterator of Example`, with exactly `length` tokens
(BOS counts as one). The same call gives the same stream. Each Answer carries its evidence: the earlier place
where the very same bytes stand.

    needle   "\\nThe pass key of qx is 7305.\\n" in prose, asked at the end
    recall   "AB37;" pairs among filler, then "?AB37" for every key in another order (MQAR)
    lookup   the same pairs, one of them asked: at which depth is up to the caller ("lost in the middle")
    copy     "\\nCopy: w8fKq.\\n" in prose, to be said again at the end

More of them, on which the zoo's model was not trained:

    passkey      the pass key among sentences said over and over (Landmark attention, arXiv:2305.16300)
    tracking     "VAR ab = 3712", "VAR cd = ab", ...: the value at the end of a chain (after RULER, arXiv:2404.06654,
                 which asks for all names of a value)
    aggregation  words, one of them several times: which? (after RULER's common words)
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator

from .text import BOS, Answer, Example, encode, heldout, window

__all__ = [
    "BOS", "TASKS", "WORLDS", "Answer", "Example", "aggregation", "copy", "lookup", "needle", "passkey", "recall",
    "tracking",
]  # fmt: skip

LETTERS = string.ascii_lowercase
KEYS = [a + b for a in string.ascii_uppercase for b in string.ascii_uppercase]
PASSKEY = (
    b"There is an important info hidden inside a lot of irrelevant text. Find it and memorize it."
    b" I will quiz you about the important information there.\n"
)
GARBAGE = b"The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
PAIR = len("AB37;")
"""Bytes of a pair, and of a query "?AB37"."""


def needle(
    length: int,
    seed: int | str,
    *,
    haystack: bytes | None = None,
    depth: float | None = None,
    needles: int = 1,
    digits: int = 4,
) -> Iterator[Example]:
    """Pass keys hidden in prose, all of them asked at the end in a random order; tokens [length].

    depth: 0 hides the needle at the beginning, 1 right before the question, None anywhere.
    """
    _check_count("needle", "needles", needles, len(LETTERS) ** 2)
    _check_count("needle", "digits", digits)
    _check_depth("needle", depth, needles)
    rng = random.Random(f"needle/{seed}")
    haystack = heldout() if haystack is None else haystack
    said = [len(_pass_key("qx", "0" * digits)) for _ in range(needles)]
    filler = _room("needle", length, sum(said) + len(".\n") * needles + sum(said) + len(".") * (needles - 1))
    while True:
        names = rng.sample(KEYS, needles)
        facts = [_pass_key(name.lower(), "".join(rng.choices(string.digits, k=digits))) for name in names]
        page, at = _scatter([fact + b".\n" for fact in facts], window(haystack, filler, rng), depth, rng)
        answers: list[Answer] = []
        for i in rng.sample(range(needles), needles):
            page += b"." if answers else b""
            page += facts[i]
            answers.append(_answer(page, digits, at[i] + len(facts[i]) - digits))
        yield Example(encode(page), tuple(answers))


def recall(length: int, seed: int | str, *, pairs: int | None = None, queries: int | None = None) -> Iterator[Example]:
    """Multi-query associative recall (MQAR); tokens [length].

    pairs: how many distinct keys (by default one per 16 tokens, at most 64); queries: how many questions (by
    default one for each key; none is asked twice before all were). The filler is lower case, keys are upper
    case: they cannot collide.
    """
    pairs = max(1, min(64, (length - 1) // 16)) if pairs is None else pairs
    queries = pairs if queries is None else queries
    _check_count("recall", "pairs", pairs, len(KEYS))
    _check_count("recall", "queries", queries)
    rng = random.Random(f"recall/{seed}")
    filler = _room("recall", length, PAIR * (pairs + queries))
    while True:
        rounds = [i for _ in range(0, queries, pairs) for i in rng.sample(range(pairs), pairs)]
        yield _pairs(rng, filler, pairs, rounds[:queries])


def lookup(length: int, seed: int | str, *, pairs: int | None = None, depth: float | None = None) -> Iterator[Example]:
    """Key-value lookup: one query about one of many pairs; tokens [length].

    pairs: by default one per 8 tokens, at most 128. depth: 0 asks for the first pair, 1 for the last, None
    for any.
    """
    pairs = max(1, min(128, (length - 1 - PAIR) // 8)) if pairs is None else pairs
    _check_count("lookup", "pairs", pairs, len(KEYS))
    _check_depth("lookup", depth, 1)
    rng = random.Random(f"lookup/{seed}")
    filler = _room("lookup", length, PAIR * (pairs + 1))
    while True:
        asked = rng.randrange(pairs) if depth is None else round(depth * (pairs - 1))
        yield _pairs(rng, filler, pairs, [asked])


def copy(
    length: int,
    seed: int | str,
    *,
    haystack: bytes | None = None,
    depth: float | None = None,
    size: int | None = None,
    times: int = 1,
) -> Iterator[Example]:
    """A random string of letters and digits in prose, to be said again at the end; tokens [length].

    size: bytes to copy (by default a quarter of the length, at most 64); times: how often it is said again.
    """
    size = max(1, min(64, length // 4)) if size is None else size
    _check_count("copy", "size", size)
    _check_count("copy", "times", times)
    _check_depth("copy", depth, 1)
    rng = random.Random(f"copy/{seed}")
    haystack = heldout() if haystack is None else haystack
    filler = _room("copy", length, (1 + times) * (len("\nCopy: ") + size) + len(".\n") + times - 1)
    while True:
        said = b"\nCopy: " + "".join(rng.choices(string.ascii_letters + string.digits, k=size)).encode()
        page, at = _scatter([said + b".\n"], window(haystack, filler, rng), depth, rng)
        answers: list[Answer] = []
        for _ in range(times):
            page += b"." if answers else b""
            page += said
            answers.append(_answer(page, size, at[0] + len(said) - size))
        yield Example(encode(page), tuple(answers))


def passkey(length: int, seed: int | str, *, depth: float | None = None, digits: int = 5) -> Iterator[Example]:
    """One pass key between the same few sentences, over and over; tokens [length]. depth: as for :func:`needle`."""
    _check_count("passkey", "digits", digits)
    _check_depth("passkey", depth, 1)
    rng = random.Random(f"passkey/{seed}")
    while True:
        key = "".join(rng.choices(string.digits, k=digits))
        said = f"The pass key is {key}. Remember it. {key} is the pass key.\n".encode()
        asked = f"What is the pass key? The pass key is {key}".encode()
        filler = _room("passkey", length, len(PASSKEY) + len(said) + len(asked))
        same = (GARBAGE * (filler // len(GARBAGE) + 1))[:filler]
        page, at = _scatter([said], same, depth, rng)
        page = bytearray(PASSKEY) + page + asked
        yield Example(encode(page), (_answer(page, digits, len(PASSKEY) + at[0] + len("The pass key is ")),))


def tracking(
    length: int,
    seed: int | str,
    *,
    hops: int = 2,
    chains: int = 1,
    digits: int = 4,
    haystack: bytes | None = None,
) -> Iterator[Example]:
    """Variables in prose, each named after one before; tokens [length].

    hops: how many names lie between the one asked and the value; chains: values with so many names each, mixed, one
    of which is asked.
    """
    _check_count("tracking", "hops", hops, 20)
    _check_count("tracking", "chains", chains, 20)
    _check_count("tracking", "digits", digits)
    rng = random.Random(f"tracking/{seed}")
    haystack = heldout() if haystack is None else haystack
    while True:
        names = iter(rng.sample(KEYS, chains * (hops + 1)))
        values = ["".join(rng.choices(string.digits, k=digits)) for _ in range(chains)]
        lines = []
        for value in values:
            chain = [next(names).lower() for _ in range(hops + 1)]
            lines.append([f"\nVAR {a} = {b}.\n".encode() for a, b in zip(chain, [value, *chain], strict=False)])
        asked = rng.randrange(chains)
        last = lines[asked][-1].split()[1].decode()
        end = f"\nVAR {last} = {values[asked]}".encode()
        order = [chain for chain in range(chains) for _ in range(hops + 1)]
        rng.shuffle(order)  # chains are mixed, and each keeps its order
        left = [iter(chain) for chain in lines]
        mixed = [next(left[chain]) for chain in order]
        filler = _room("tracking", length, sum(map(len, mixed)) + len(end))
        page, at = _scatter(mixed, window(haystack, filler, rng), None, rng)
        start = at[order.index(asked)] + len("\nVAR ab = ")
        page += end
        yield Example(encode(page), (_answer(page, digits, start),))


def aggregation(length: int, seed: int | str, *, times: int | None = None) -> Iterator[Example]:
    """Words of three letters, one of them said ``times`` (by default a tenth of all), all others once; [length]."""
    word = len(" abc")
    rng = random.Random(f"aggregation/{seed}")
    while True:
        count = _room("aggregation", length, len("\nMost often: abc") + 2 * word) // word + 2
        often = max(2, count // 10) if times is None else times
        _check_count("aggregation", "times", often, count)
        others = rng.sample(range(26**3), count - often + 1)
        words = ["".join(LETTERS[n // 26**i % 26] for i in range(3)) for n in others]
        said = [words[0]] * (often - 1) + words
        rng.shuffle(said)
        page = bytearray("".join(f" {w}" for w in said).encode())
        page += b" " * (length - 1 - len(page) - len("\nMost often: abc"))
        place = page.rindex(f" {words[0]}".encode()) + 1
        page += f"\nMost often: {words[0]}".encode()
        yield Example(encode(page), (_answer(page, 3, place),))


TASKS: dict[str, Callable[..., Iterator[Example]]] = {
    "needle": needle,
    "recall": recall,
    "lookup": lookup,
    "copy": copy,
}
"""What the zoo's model is trained on."""

WORLDS = TASKS | {"passkey": passkey, "tracking": tracking, "aggregation": aggregation}


def _pass_key(name: str, digits: str) -> bytes:
    return f"\nThe pass key of {name} is {digits}".encode()


def _pairs(rng: random.Random, filler: int, pairs: int, asked: list[int]) -> Example:
    keys = rng.sample(KEYS, pairs)
    values = [f"{rng.randrange(100):02d}" for _ in keys]
    facts = [f"{key}{value};".encode() for key, value in zip(keys, values, strict=True)]
    page, at = _scatter(facts, "".join(rng.choices(LETTERS, k=filler)).encode(), None, rng)
    answers: list[Answer] = []
    for i in asked:
        page += f"?{keys[i]}{values[i]}".encode()
        answers.append(_answer(page, 2, at[i] + len("AB")))
    return Example(encode(page), tuple(answers))


def _scatter(items: list[bytes], filler: bytes, depth: float | None, rng: random.Random) -> tuple[bytearray, list[int]]:
    """Items in their order, at random places or one depth of the filler: the page, and their starts."""
    if depth is None:
        cuts = sorted(rng.randint(0, len(filler)) for _ in items)
    else:
        cuts = [round(depth * len(filler))] * len(items)
    page, at = bytearray(filler[: cuts[0]]), []
    for item, cut, following in zip(items, cuts, [*cuts[1:], len(filler)], strict=True):
        at.append(len(page))
        page += item
        page += filler[cut:following]
    return page, at


def _answer(page: bytearray, size: int, evidence: int) -> Answer:
    """The last `size` bytes of the page, in tokens: BOS shifts every byte by one."""
    return Answer(len(page) - size + 1, len(page) + 1, evidence + 1, evidence + size + 1)


def _room(task: str, length: int, needed: int) -> int:
    """Bytes left for filler."""
    if length < needed + 1:
        raise ValueError(
            f"{task}: expected length >= {needed + 1} for what is to be recalled, got {length}: "
            "ask for a longer one, or for fewer or smaller things to recall"
        )
    return length - 1 - needed


def _check_count(task: str, name: str, count: int, most: int | None = None) -> None:
    if count < 1 or (most is not None and count > most):
        bound = "at least 1" if most is None else f"1 to {most}"
        raise ValueError(f"{task}: expected {name} to be {bound}, got {count}: choose {name}= in that range")


def _check_depth(task: str, depth: float | None, items: int) -> None:
    if depth is None:
        return
    if not 0 <= depth <= 1:
        raise ValueError(f"{task}: expected depth between 0 and 1, got {depth}: 0 is the beginning, 1 the end")
    if items > 1:
        raise ValueError(f"{task}: expected one needle with depth={depth}, got {items}: leave depth out")
