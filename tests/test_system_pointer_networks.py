"""Pointer networks: pointers against the equation, decoding against teacher forcing, and how answers are judged."""

import pytest
import torch

from saccade.systems.score._points import area, covered, detour, exact, mixed, posed
from saccade.systems.score.pointer_networks import PointerNetworks, Pointing
from saccade.worlds.geometry import hull, tour, triangulation

torch.set_num_threads(1)


def network(table=None, hidden=16):
    torch.manual_seed(0)
    net = PointerNetworks().model(hidden, table).double()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(12)  # far from uniform
    return net


def drawn(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_pointers_are_the_papers_equation():
    pointing = network().pointing
    e, d = drawn(3, 7, 16) - 0.5, drawn(3, 5, 16) - 0.5
    form = pointing.spec.form
    u = torch.empty(3, 5, 7, dtype=torch.float64)
    for i in range(5):
        for j in range(7):
            u[:, i, j] = torch.tanh(e[:, j] @ form.key.mT + d[:, i] @ form.query.mT) @ form.energy
    torch.testing.assert_close(pointing.logits(d, e), u)
    assert u.softmax(-1).std() > 0.05
    torch.testing.assert_close(pointing(d, e), u.softmax(-1) @ e)  # and as a layer they blend


def test_a_layer_has_two_matrices_and_a_vector():
    layer = Pointing(16)
    assert sum(p.numel() for p in layer.parameters()) == 2 * 16 * 16 + 16


def test_the_network_is_two_recurrences_and_pointers():
    """Step by step with torch's LSTM cells."""
    net, points = network(), drawn(2, 6, 2)
    told = torch.tensor([[3, 1, 6], [2, 5, 0]])
    cells = []
    for lstm in (net.encoder, net.decoder):
        cell = torch.nn.LSTMCell(16, 16).double()
        cell.load_state_dict({name.removesuffix("_l0"): p for name, p in lstm.state_dict().items()})
        cells.append(cell)
    read = points @ net.embed.weight.mT
    h = c = torch.zeros(2, 16, dtype=torch.float64)
    keys = [net.end.expand(2, -1)]
    for i in range(6):
        h, c = cells[0](read[:, i], (h, c))
        keys.append(h)
    keys, expected = torch.stack(keys, 1), []
    for last in torch.cat([torch.zeros(2, 1, dtype=torch.long), told], 1).mT:
        given = torch.stack([net.end if at == 0 else read[row, at - 1] for row, at in enumerate(last.tolist())])
        h, c = cells[1](given, (h, c))
        expected.append(net.pointing.logits(h[:, None], keys)[:, 0])
    torch.testing.assert_close(net(points, told), torch.stack(expected, 1))


def test_it_points_at_as_many_places_as_there_are():
    net = network()
    for n in (3, 11):
        assert net(drawn(2, n, 2), torch.ones(2, 4, dtype=torch.long)).shape == (2, 5, n + 1)
    assert network(table=9)(drawn(2, 11, 2), torch.ones(2, 4, dtype=torch.long)).shape == (2, 5, 9)


@pytest.mark.parametrize("table", [None, 7])
def test_decoding_says_what_teacher_forcing_likes_best(table):
    net, points = network(table), drawn(40, 6, 2)
    if net.table is not None:
        net.table.bias.data[0] += 1  # else it never ends
    found = net.solve(points, 8)
    logits = net(points, found[:, :-1])
    before_end = torch.cat([torch.ones(40, 1, dtype=torch.bool), (found[:, :-1] != 0).cumprod(1).bool()], 1)
    assert torch.equal(logits.argmax(-1)[before_end], found[before_end])
    assert not found[~before_end].any()
    assert 40 < before_end.sum() < 320  # some end early and some do not


def test_a_tour_visits_all_points_once():
    found = network().solve(drawn(9, 6, 2), 6, tour=True)
    assert torch.equal(found.sort(1).values, torch.arange(1, 7).expand(9, -1))


def test_problems_end_their_answers_and_skip_what_is_after():
    points, told, labels = posed(hull(6, 0), 30)
    assert points.shape == (30, 6, 2) and labels.shape[1] == told.shape[1] + 1
    for row, end in zip(told, labels, strict=True):
        size = int((row > 0).sum())
        assert torch.equal(end[:size], row[:size]) and end[size] == 0 and (end[size + 1 :] == -100).all()
    sizes = [given[0].shape[1] for given, _ in zip(mixed(hull, (5, 7), 2, 0), range(4), strict=False)]
    assert sizes == [5, 7, 5, 7]


def test_true_answers_are_judged_perfect_and_others_are_not():
    points, told, _ = posed(hull(7, 1), 20)
    late = torch.nn.functional.pad(told, (0, 1))
    assert exact(late, told) == 1 and area(points, told, told) == 1
    turned = torch.where(late == 0, late, torch.roll(late, 1, 1))
    assert exact(turned, told) < 0.2
    triangle = torch.cat([told[:, :3], torch.zeros_like(told)], 1)
    square = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]])
    assert area(square, torch.tensor([[1, 2, 3, 0]]), torch.tensor([[1, 2, 3, 4]])) == 0.5
    assert area(points, triangle, told) < 0.9

    points, told, _ = posed(triangulation(5, 1), 20)
    assert covered(told, told) == 1
    assert covered(told.unflatten(1, (-1, 3)).flip(1, 2).flatten(1), told) == 1  # in any order
    assert covered(torch.cat([told[:, :3], torch.zeros_like(told)[:, 3:]], 1), told) < 0.5

    points, told, _ = posed(tour(5, 1), 20)
    assert detour(points, told, told) == 1
    torch.testing.assert_close(detour(points, told.flip(1).roll(2, 1), told), torch.tensor(1.0))
    assert detour(points, told[:, [0, 2, 1, 3, 4]], told) > 1.05


def test_it_learns_the_tour_of_three_points():
    """Whatever they are, it is 1, 2, 3, and then the end."""
    from saccade.study.trainer import Recipe, Task, compete, labelled

    held = posed(tour(3, "held"), 20)
    task = Task(lambda seed: mixed(tour, (3,), 16, seed), labelled, lambda: [held])
    trained = compete({"net": lambda: PointerNetworks().model(24)}, task, Recipe(120, 1e-2, (0,))).models["net"][0]
    assert exact(trained.solve(held[0], 4), held[1]) == 1
    assert PointerNetworks().model().encoder.hidden_size == 256
