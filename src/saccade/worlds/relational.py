"""Relational games: which objects of a 3 x 3 grid are the same decides, and never what they look like.

    same           two objects anywhere: are they the same?
    between        three in a line, diagonals too: is the middle one between two that are the same?
    occurs         one in the top row, three in the bottom row: is it among them?
    xoccurs        the same, and do the other two of the bottom row differ from each other?
    match_pattern  three in the top row, three in the bottom row: one pattern of AAA, AAB, ABA, ABB, ABC in both?

Objects are the same if shape, place in the cell and colour are. Train on "pentos" (five squares of a cell's nine that
hang together), test on "hexos" (six) and "stripes" (a stripe of one colour in a square of another). Half of the answers
are yes; in a no the object B that takes A's place differs from A in shape, in colour or in both, equally often.

Paper: An Explicitly Relational Neural Network Architecture, arXiv:1905.10307; its files mini_between_*.npz
(https://github.com/google-deepmind/deepmind-research, PrediNet) give objects, lines and near misses. Names of tasks
and sets: https://github.com/Awni00/abstract_transformer (experiments/relational_games).

Differs: drawn anew; the rules of the tasks but between are not from files. In these a fifth or more of between's no's
show three different objects that are not in line; here none does.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from typing import Literal

import torch
from torch import Tensor

from .batches import batch

__all__ = ["EMPTY", "SETS", "TASKS", "Game", "batch", "games", "images", "patches", "pictures", "shapes", "vectors"]

EMPTY = -1
LEVELS = (64, 144, 192)  # of 255, of red, green and blue; all but the darkest and the brightest grey
COLOURS = [colour for colour in product(LEVELS, repeat=3) if colour not in ((64,) * 3, (192,) * 3)]
PATTERNS = ("AAA", "AAB", "ABA", "ABB", "ABC")
LINES = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6))
Task = Literal["same", "between", "occurs", "xoccurs", "match_pattern"]
ObjectSet = Literal["pentos", "hexos", "stripes"]
TASKS: tuple[Task, ...] = ("same", "between", "occurs", "xoccurs", "match_pattern")
SETS: tuple[ObjectSet, ...] = ("pentos", "hexos", "stripes")


@dataclass(frozen=True, eq=False)
class Game:
    """objects: int64 [9], the grid row by row: shape * 25 + colour, or EMPTY. answer: int64 [], 1 is yes.

    compared: bool [9, 9], symmetric: the pairs of cells whose sameness decides.
    """

    objects: Tensor
    answer: Tensor
    compared: Tensor


def games(task: Task, seed: int | str, *, objects: ObjectSet = "pentos") -> Iterator[Game]:
    """Endless games of one task with one set of objects."""
    if task not in TASKS or objects not in SETS:
        raise ValueError(f"games: expected a task of {TASKS} and objects of {SETS}, got {task!r}, {objects!r}")
    rng = random.Random(f"relational/{task}/{objects}/{seed}")
    while True:
        answer = rng.random() < 0.5
        cells, letters, pairs = _layout(task, answer, rng)
        looks = _looks(objects, rng)
        grid, compared = torch.full((9,), EMPTY), torch.zeros(9, 9, dtype=torch.bool)
        grid[cells] = torch.tensor([looks[letter] for letter in letters])
        for i, j in pairs:
            compared[cells[i], cells[j]] = compared[cells[j], cells[i]] = True
        yield Game(grid, torch.tensor(int(answer)), compared)


def _layout(task: Task, answer: bool, rng: random.Random) -> tuple[list[int], str, list[tuple[int, int]]]:
    """Cells, one letter for each (the same letter is the same object), and the pairs of them that decide."""
    if task == "same":
        return rng.sample(range(9), 2), "AA" if answer else "AB", [(0, 1)]
    if task == "between":
        return list(rng.choice(LINES)), "ACA" if answer else "ACB", [(0, 2)]
    if task == "match_pattern":
        top, other = rng.sample(PATTERNS, 2)
        bottom = top if answer else other
        within = [*combinations((0, 1, 2), 2), *combinations((3, 4, 5), 2)]
        return [0, 1, 2, 6, 7, 8], top + bottom.translate(str.maketrans("ABC", "DEF")), within
    cells, asked = [rng.randrange(3), 6, 7, 8], [(0, 1), (0, 2), (0, 3)]
    bottom = "ABC" if answer else "BCD"
    if task == "xoccurs":
        asked += combinations((1, 2, 3), 2)
        if not answer:  # the top object is missing, or the others are the same
            bottom = rng.choice(("ABB", "BCD"))
    return cells, "A" + "".join(rng.sample(bottom, 3)), asked


def _looks(objects: ObjectSet, rng: random.Random) -> dict[str, int]:
    """Six different objects by letter, B a near miss of A, and E of D."""
    many, colours = len(shapes(objects)), len(COLOURS)
    found: list[int] = []
    while len(set(found)) < 6:
        found = []
        for _ in range(2):
            shape, colour = rng.randrange(many), rng.randrange(colours)
            other_shape, other_colour = ((x + rng.randrange(1, n)) % n for x, n in ((shape, many), (colour, colours)))
            near = rng.choice(((other_shape, colour), (shape, other_colour), (other_shape, other_colour)))
            found += [shape * colours + colour, near[0] * colours + near[1], rng.randrange(many * colours)]
    return dict(zip("ABCDEF", found, strict=True))


def patches(game: Game, objects: ObjectSet = "pentos") -> Tensor:
    """What stands in each cell: float32 [..., 9, 3, 12, 12] in 0 .. 1, black where nothing is."""
    return torch.cat([_drawn(objects), torch.zeros(1, 3, 12, 12)])[game.objects]  # EMPTY is the last


def images(game: Game, objects: ObjectSet = "pentos") -> Tensor:
    """The whole grid: float32 [..., 3, 36, 36]."""
    cells = patches(game, objects).unflatten(-4, (3, 3))  # row, column, colour, y, x
    return cells.movedim((-5, -4), (-4, -2)).flatten(-4, -3).flatten(-2, -1)


def pictures(task: Task, seed: int | str, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of whole grids of pentos [size, 3, 36, 36] and their answers [size]."""
    stream = games(task, seed)
    while True:
        given = batch(stream, size)
        yield images(given), given.answer


def vectors(game: Game, dim: int, objects: ObjectSet = "pentos") -> Tensor:
    """A fixed vector from N(0, I) for each object: float32 [..., 9, dim], zeros where nothing stands."""
    generator = torch.Generator().manual_seed(SETS.index(objects))
    table = torch.randn(len(shapes(objects)) * len(COLOURS) + 1, dim, generator=generator)
    table[EMPTY] = 0
    return table[game.objects]


@cache
def shapes(objects: ObjectSet) -> Tensor:
    """Which of its 3 x 3 squares of three pixels a shape fills; of stripes the middle column: bool [shapes, 3, 3]."""
    if objects == "stripes":  # as many shapes as colours of the stripe
        return torch.tensor([False, True, False]).expand(len(COLOURS), 3, 3)
    filled = [set(squares) for squares in combinations(product(range(3), repeat=2), 5 if objects == "pentos" else 6)]
    return torch.tensor([[[(y, x) in f for x in range(3)] for y in range(3)] for f in filled if _hangs_together(f)])


def _hangs_together(squares: set[tuple[int, ...]]) -> bool:
    reached = {min(squares)}
    for _ in squares:
        reached |= {s for s in squares for r in reached if abs(s[0] - r[0]) + abs(s[1] - r[1]) == 1}
    return reached == squares


@cache
def _drawn(objects: ObjectSet) -> Tensor:
    """All objects of a set in their cells, each 9 x 9 pixels from (1, 1) on: [shapes * colours, 3, 12, 12]."""
    filled = shapes(objects).repeat_interleave(3, 1).repeat_interleave(3, 2)[:, None, None]  # shape, 1, 1, y, x
    colours = torch.tensor(COLOURS)[..., None, None] / 255
    behind = colours if objects == "stripes" else torch.zeros(1)
    front = colours[:, None] if objects == "stripes" else colours
    return torch.nn.functional.pad(torch.where(filled, front, behind), (1, 2, 1, 2)).flatten(0, 1)
