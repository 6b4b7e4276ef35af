"""FIT: its blocks against dense masks over ungrouped tokens, leaks of the decoder, the counts behind its exponent."""

import math

import pytest
import torch
import torch.nn.functional as F

import saccade
from saccade import masks
from saccade.study.measure import attention_work
from saccade.systems.latent.fit import FIT, group_size

T, N, M, W, Z = 3, 4, 2, 8, 12
SMALL = {"layers": "(1)1(2)1", "group": N, "latents": M, "width": W, "latent_width": Z, "heads": 2, "latent_heads": 4}


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.double().parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return model


def norm(x, part):
    return F.layer_norm(x, x.shape[-1:], part.weight, part.bias, 1e-6)


def attend(part, x, source, seen):
    """``[B, n, w]`` reads what a whole matrix of booleans ``[n, m]`` lets it see."""
    own = norm(x, part.norm)
    read = own if part.norm_source is None else norm(source, part.norm_source)
    heads = []
    for h in range(part.heads):
        size = part.q.out_features // part.heads
        q, k, v = (p(y)[..., h * size : (h + 1) * size] for p, y in ((part.q, own), (part.k, read), (part.v, read)))
        heads.append((q @ k.mT / math.sqrt(size)).masked_fill(~seen, -math.inf).softmax(-1) @ v)
    x = x + part.out(torch.cat(heads, -1))
    if part.perceptron is None:
        return x
    first, up, _, down = part.perceptron
    return x + down(F.gelu(up(norm(x, first))))


def dense(model, x, causal: bool, told=None):
    """The blocks over all tokens ``[B, T N, W]`` at once, groups by masks alone."""
    own_x, own_z = torch.arange(T * N) // N, torch.arange(T * M) // M
    local = own_x[:, None] == own_x
    among = torch.ones(T * M, T * M, dtype=torch.bool)
    if causal:
        local = local & torch.ones_like(local).tril()
        among = own_z[:, None] >= own_z
    z = model.latents.flatten(0, 1).expand(len(x), -1, -1)
    for block in model.blocks:
        for part in block.local:
            x = attend(part, x, None, local)
        z = attend(block.read, z, x, own_z[:, None] == own_x)
        if told is not None:
            z = attend(block.heed, z, told, torch.ones(T * M, told.shape[1], dtype=torch.bool))
        for part in block.among:
            z = attend(part, z, None, among)
        if block.write is not None:
            source, own = z, own_z
            if causal:  # group 0 reads latents of zeros
                source, own = torch.cat([torch.zeros_like(z[:, :M]), z], 1), torch.arange((T + 1) * M) // M
            x = attend(block.write, x, source, own_x[:, None] == own)
    return norm(x, model.norm), z


def test_encoder_equals_the_equations() -> None:
    for ordered in (False, True):
        model = shaken(FIT(**SMALL, ordered=ordered).encoder(5, T))
        x = torch.randn(2, T, N, 5, dtype=torch.float64)
        with torch.no_grad():
            inputs = norm(model.stem[0](x), model.stem[1]) + model.places
            tokens, latents = dense(model, inputs.flatten(1, 2), False) if not ordered else (None, None)
            seen = model(x)
        if not ordered:
            assert torch.allclose(seen[0].flatten(1, 2), tokens)
            assert torch.allclose(seen[1].flatten(1, 2), norm(latents, model.norm_latents))
        else:  # the last group does not reach the latents of those before
            y = x.clone()
            y[:, -1] += 1
            moved = (model(y)[1] - seen[1]).abs().amax((0, 2, 3))
            assert moved[:-1].max() == 0 and moved[-1] > 1e-3


def test_decoder_equals_the_equations_and_does_not_leak() -> None:
    model = shaken(FIT(**SMALL, form="decoder").decoder(11, T))
    tokens = torch.randint(11, (2, T, N))
    inputs = (model.embed(tokens) + model.places).detach()
    with torch.no_grad():
        expected = dense(model, inputs.flatten(1, 2), True)[0] @ model.embed.weight.T + model.bias
        assert torch.allclose(model(tokens).flatten(1, 2), expected)
    leaf = model.embed(tokens).detach().requires_grad_()
    model.embed.forward = lambda _: leaf  # type: ignore[method-assign]
    logits = model(tokens).flatten(1, 2)
    for i in range(T * N):
        (grad,) = torch.autograd.grad(logits[:, i].square().sum(), leaf, retain_graph=True)
        seen = (grad.abs().amax((0, 3)) > 0).flatten()
        assert seen.tolist() == [j <= i for j in range(T * N)]


def test_denoiser() -> None:
    """Conditions reach every token; the latents of the step before do once their norm has learned a weight."""
    fresh = FIT(**SMALL).denoiser(5, 7, T)
    x, time, told = torch.randn(2, T, N, 5), torch.rand(2), torch.randn(2, 3, 7)
    out, z = fresh(x, time, told)
    assert out.shape == x.shape and torch.equal(fresh(x, time, told, torch.randn_like(z))[0], out)
    model = shaken(fresh)
    x, time, told = x.double(), time.double(), told.double()
    with torch.no_grad():
        angle = 1000 * time[:, None]  # a clock of 12 / 4 = 3 numbers: two sines, one cosine
        speed = 10_000 ** (-2 / 3)
        code = torch.cat([angle.sin(), (angle * speed).sin(), angle.cos()], 1)
        code = (code - code.mean(1, keepdim=True)) / code.std(1, correction=0, keepdim=True)
        model.previous, model.norm_previous = torch.nn.Identity(), torch.nn.Identity()  # nothing from before
        both = torch.cat([model.time(code)[:, None], model.conditions(told)], 1)
        inputs = norm(model.stem[0](x), model.stem[1]) + model.places
        tokens, latents = dense(model, inputs.flatten(1, 2), False, both)
        out, z = model(x, time, told)
    assert torch.allclose(out.flatten(1, 2), model.out(tokens)) and torch.allclose(z.flatten(1, 2), latents)


def test_build_is_a_local_layer() -> None:
    q, k, v = torch.randn(3, 1, 2, T * N, 4, dtype=torch.float64).unbind(0)
    for form, mask in (("encoder", None), ("decoder", masks.Causal())):
        out = saccade.attention(q, k, v, FIT(**SMALL, form=form).build(2))
        grouped = (y.unflatten(2, (T, N)).transpose(1, 2).flatten(0, 1) for y in (q, k, v))
        inside = saccade.attention(*grouped, saccade.Attention(mask=mask))
        assert torch.allclose(out, inside.unflatten(0, (1, T)).transpose(1, 2).flatten(2, 3))


def test_the_rule_and_its_counts() -> None:
    assert [group_size(length) for length in (64, 512, 4096, 97)] == [4, 8, 16, 1]
    model = FIT(**SMALL).encoder(5, T)
    local, read, among, write = T * N * N * W, T * M * N * W, (T * M) ** 2 * Z, T * N * M * W
    assert attention_work(model, torch.zeros(1, T, N, 5)) == 4 * (3 * local + 2 * read + 2 * among + write)


def test_first_weights_are_keras_own() -> None:
    """Uniform with Keras' fans of kernels ``[width, heads, size]`` and ``[heads, size, width]``."""
    block = FIT(width=64, latent_width=96, heads=4, latent_heads=8).encoder(5, T).blocks[0]
    for part, bound in (
        (block.local[0].q, math.sqrt(6 / (64 * 4 + 64 * 16))),
        (block.local[0].out, math.sqrt(6 / (64 + 4 * 64))),
        (block.read.k, math.sqrt(6 / (64 * 4 + 64 * 16))),  # 64 wide in 4 heads, the lesser of both
        (block.among[0].perceptron[1], math.sqrt(6 / (96 + 4 * 96))),
    ):
        assert 0.97 * bound < float(part.weight.detach().abs().max()) <= bound and not part.bias.any()


def test_refusals() -> None:
    for layers in ("2(4)", "(2)0(1)", "(1)1(1"):
        with pytest.raises(saccade.SpecError):
            FIT(layers).blocks()
    assert FIT("(2)").blocks() == [(2, 0)] and FIT("(2)4(1)").blocks() == [(2, 4), (1, 0)]
    with pytest.raises(saccade.SpecError):
        FIT(form="sampler").build(2)
    with pytest.raises(saccade.SpecError):
        FIT(**SMALL).encoder(5, T)(torch.zeros(1, T, N + 1, 5))
