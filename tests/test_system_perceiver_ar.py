"""Perceiver AR: the whole architecture against its equations written out densely, positions, and leaks."""

import math

import pytest
import torch
import torch.nn.functional as F

import saccade
from saccade.systems.latent._perceiver import Network, rotate, sinusoids
from saccade.systems.latent.perceiver_ar import PerceiverAR

WIDTH, HEADS, LATENTS, N = 16, 2, 5, 12


def network(positions: str = "rotary") -> Network:
    torch.manual_seed(0)
    model = PerceiverAR(LATENTS, 2, WIDTH, HEADS, positions, wavelength=64).model(11).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


def tokens() -> torch.Tensor:
    return torch.randint(11, (2, N), generator=torch.Generator().manual_seed(1))


def layer(part, z, source, places_z, places_source, absolute: bool):
    """One layer, every position written out: neighbouring channels are complex numbers, turned by their position."""
    own = F.layer_norm(z, (WIDTH,), part.norm.weight, part.norm.bias)
    read = own if source is None else F.layer_norm(source, (WIDTH,), *part.norm_source.parameters())
    size, turned = WIDTH // HEADS, WIDTH // HEADS // 2
    speed = torch.tensor([64.0 ** (-j / (turned // 2 - 1)) for j in range(turned // 2)], dtype=torch.float64)
    out = torch.zeros_like(z)
    for b in range(len(z)):
        for h in range(HEADS):
            cut = slice(h * size, (h + 1) * size)
            q, k, v = (p(x)[b, :, cut] for p, x in ((part.q, own), (part.k, read), (part.v, read)))
            for i, row in enumerate(places_z):
                scores = []
                for j, column in enumerate(places_source):
                    if column > row:
                        scores.append(torch.tensor(-math.inf, dtype=torch.float64))
                        continue
                    score = q[i, turned:] @ k[j, turned:]
                    if absolute:
                        score = score + q[i, :turned] @ k[j, :turned]
                    else:  # the same turn for all that is as far apart
                        a = torch.view_as_complex(q[i, :turned].reshape(-1, 2).contiguous())
                        c = torch.view_as_complex(k[j, :turned].reshape(-1, 2).contiguous())
                        turn = torch.polar(torch.ones_like(speed), (row - column) * speed)
                        score = score + (a.conj() * c * turn).real.sum()
                    scores.append(score / math.sqrt(size))
                out[b, i, cut] = torch.stack(scores).softmax(0) @ v
    z = z + part.out(out)
    norm, up, _, down = part.perceptron
    return z + down(F.relu(up(norm(z))) ** 2)


@pytest.mark.parametrize("positions", ["rotary", "absolute"])
def test_equals_the_equations(positions: str) -> None:
    model, x = network(positions), tokens()
    with torch.no_grad():
        inputs = model.embed(x)
        if positions == "absolute":
            for i in range(N):
                for j in range(WIDTH // 2):
                    angle = (N - 1 - i) * 10_000 ** (-j / (WIDTH // 2 - 1))
                    inputs[:, i, j] += math.sin(angle)
                    inputs[:, i, WIDTH // 2 + j] += math.cos(angle)
        last = list(range(N - LATENTS, N))
        z = layer(model.cross, model.latent(inputs[:, last]), inputs, last, range(N), positions == "absolute")
        for part in model.stack:
            z = layer(part, z, None, last, last, positions == "absolute")
        expected = model.head(model.norm(z))
        assert (model(x) - expected).abs().max() < (1e-9 if positions == "rotary" else 1e-5)  # float32 sinusoids


def test_no_leak_and_the_whole_context_is_read() -> None:
    model, x = network(), tokens()
    inputs = model.embed(x).detach().requires_grad_()
    model.embed.forward = lambda _: inputs  # type: ignore[method-assign]
    for i, place in enumerate(range(N - LATENTS, N)):
        (grad,) = torch.autograd.grad(model(x)[:, i].square().sum(), inputs)
        seen = grad.abs().amax((0, 2)) > 0
        assert seen.tolist() == [j <= place for j in range(N)]


def test_few_tokens_and_the_start() -> None:
    """Fewer tokens than latents; and a new model says nothing: its loss is that of equal odds."""
    model = network()
    assert model(tokens()[:, :3]).shape == (2, 3, 11)
    fresh = PerceiverAR(LATENTS, 1, WIDTH, HEADS).model(11)
    assert torch.allclose(fresh.loss(tokens()), torch.full((2, LATENTS), math.log(11)))
    assert abs(float(fresh.cross.perceptron[1].weight.detach().std()) * math.sqrt(WIDTH) - 1) < 0.1


def test_rotary_depends_on_distance_alone() -> None:
    """The last positions of a longer sequence turn as those of a shorter one, and the rest of the channels do not."""
    x = torch.randn(1, 2, 9, 8)
    assert torch.equal(rotate(x, 64)[:, :, 4:], rotate(x[:, :, 4:], 64))
    assert torch.equal(rotate(x, 64)[..., 4:], x[..., 4:])
    assert torch.allclose(sinusoids(9, 8)[-1], torch.tensor([0.0] * 4 + [1.0] * 4))


def test_refusals() -> None:
    for settings in ({"positions": "alibi"}, {"latents": 0}, {"heads": 3}):
        with pytest.raises(saccade.SpecError):
            PerceiverAR(**{"layers": 1, "width": 16, "heads": 2} | settings).model(11)
