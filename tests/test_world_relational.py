"""Relational games: an onlooker who sees only pixels, and knows only the rules, gives the same answers."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from saccade.worlds.batches import batch
from saccade.worlds.relational import EMPTY, SETS, TASKS, Game, games, images, patches, pictures, shapes, vectors
from streams import assert_streams


def seen(game: Game, objects: str) -> list[tuple | None]:
    """The nine cells cut out of the picture, as hashable pixels; None where all is black."""
    picture = images(game, objects)
    assert picture.shape == (3, 36, 36) and picture.min() >= 0 and picture.max() <= 1
    cells = [picture[:, y : y + 12, x : x + 12] for y in (0, 12, 24) for x in (0, 12, 24)]
    return [tuple(cell.flatten().tolist()) if cell.any() else None for cell in cells]


def pattern(row: list) -> str:
    names: dict = {}
    return "".join(names.setdefault(thing, "ABC"[len(names)]) for thing in row)


def answer(task: str, cells: list) -> bool:
    there = [cell for cell in cells if cell is not None]
    top, bottom = [c for c in cells[:3] if c is not None], cells[6:]
    if task == "same":
        assert len(there) == 2
        return there[0] == there[1]
    if task == "between":
        assert len(there) == 3
        return there[0] == there[2] != there[1]
    if task == "match_pattern":
        assert len(there) == 6 and len(top) == 3
        return pattern(top) == pattern(bottom)
    assert len(there) == 4 and len(top) == 1
    others = [cell for cell in bottom if cell != top[0]]
    return len(others) == 2 and (task == "occurs" or others[0] != others[1])


@pytest.mark.parametrize("task", TASKS)
def test_the_pixels_alone_give_the_answer(task: str) -> None:
    for objects in SETS:
        played = list(islice(games(task, 1, objects=objects), 60))
        assert [bool(game.answer) for game in played] == [answer(task, seen(game, objects)) for game in played]
    answers = batch(games(task, 0), 1000).answer
    assert 440 < int(answers.sum()) < 560


@pytest.mark.parametrize("task", TASKS)
def test_what_is_compared_decides(task: str) -> None:
    """Games with the same samenesses where they are compared, cells counted by order, have one answer."""
    known: dict = {}
    for game in islice(games(task, 2), 800):
        places = (game.objects != EMPTY).nonzero()[:, 0]
        objects, compared = game.objects[places], game.compared[places][:, places]
        assert compared.any() and torch.equal(game.compared, game.compared.T) and not compared.diagonal().any()
        assert int(compared.sum()) == int(game.compared.sum())
        same = (objects[:, None] == objects) & compared
        assert known.setdefault(tuple(same.flatten().tolist()), int(game.answer)) == game.answer
    assert set(known.values()) == {0, 1}


def test_three_in_any_line_stand_in_between() -> None:
    lines = {tuple((g.objects != EMPTY).nonzero()[:, 0].tolist()) for g in islice(games("between", 0), 300)}
    assert lines == {(0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6)}


def test_the_sets_have_all_their_objects_and_share_none() -> None:
    drawn = {}
    for name in SETS:
        ids = torch.arange(len(shapes(name)) * 25)
        cells = patches(Game(ids, torch.tensor(0), torch.tensor(0)), name)
        drawn[name] = {tuple(cell.flatten().tolist()) for cell in cells}
        assert len(drawn[name]) == len(ids) == len({tuple(v.tolist()) for v in vectors(Game(ids, ids, ids), 4, name)})
        assert not cells[..., 0].any() and not cells[..., 10:].any() and not cells[..., 10:, :].any()
        squares = cells.amax(1).gt(0).sum((1, 2)).div(9).unique().tolist()
        assert squares == [{"pentos": 5, "hexos": 6, "stripes": 9}[name]]
    # 48 hexominoes are in the published files; the pentominoes' files are larger than what could be had.
    assert (len(shapes("pentos")), len(shapes("hexos"))) == (49, 48)
    assert not (drawn["pentos"] & drawn["hexos"] or drawn["pentos"] & drawn["stripes"])


def test_a_no_is_a_near_miss_in_shape_colour_or_both() -> None:
    missed = torch.zeros(2, 2)
    for game in islice(games("same", 0), 3000):
        a, b = game.objects[game.objects != EMPTY].tolist()
        missed[int(a // 25 == b // 25), int(a % 25 == b % 25)] += 1
    shares = missed / missed.sum()
    expected = torch.tensor([[1 / 6, 1 / 6], [1 / 6, 1 / 2]])
    assert bool(((shares - expected).abs() < 0.035).all())


def test_batches_are_drawn_as_their_games() -> None:
    many = batch(games("same", 0), 5)
    assert many.objects.shape == (5, 9) and many.answer.shape == (5,) and many.compared.shape == (5, 9, 9)
    assert images(many).shape == (5, 3, 36, 36) and vectors(many, 7).shape == (5, 9, 7)
    for picture, vector, game in zip(images(many), vectors(many, 7), games("same", 0), strict=False):
        assert torch.equal(picture, images(game)) and torch.equal(vector, vectors(game, 7))
        assert bool((vector != 0).any(1).eq(game.objects != EMPTY).all())


def test_one_seed_names_one_stream_and_settings_are_checked() -> None:
    for task in TASKS:
        assert_streams(lambda seed, task=task: games(task, seed))
    with pytest.raises(ValueError, match=r"expected a task of .*'between', .*got 'differs'"):
        next(games("differs", 0))


def test_pictures_are_the_games_in_order():
    (given, first), (_, second) = islice(pictures("between", 3, 4), 2)
    same = batch(islice(games("between", 3), 8), 8)
    assert torch.equal(given, images(same)[:4]) and torch.equal(torch.cat([first, second]), same.answer)
