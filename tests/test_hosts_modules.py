"""Programs inside torch's own attention, timm's and one's own: nothing but the program changes, nothing is left."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import saccade
from saccade import Attention, SpecError, Unsupported, edits, masks, stats
from saccade.hosts.acts import Frame, inside, run
from saccade.hosts.handles import listen

pytestmark = pytest.mark.filterwarnings("ignore:.*(nested|mismatched)")  # torch's, of its own ways
WIDTH, HEADS, B, N, M = 32, 4, 3, 10, 14
FUTURE = torch.ones(N, N, dtype=torch.bool).triu(1)
PADDED = torch.arange(M) >= torch.tensor([14, 9, 12])[:, None]


def data(*shape, seed=5):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


ADDED = data(B * HEADS, N, M)
HIDDEN = (data(N, M) > 0.3) & (torch.arange(M) != 1)


def seeded(module):
    """Attention far from flat, so that a wrong mask shows."""
    for i, p in enumerate(module.parameters()):
        p.data = data(*p.shape, seed=i) * (0.5 if p.ndim > 1 else 0.2)
    return module.eval()


def multihead(**options):
    return seeded(nn.MultiheadAttention(WIDTH, HEADS, **options))


def encoder(**options):
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, batch_first=True, **options)
    return seeded(nn.TransformerEncoder(layer, 2, enable_nested_tensor=not options))


def close(found, wanted):
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max().clamp(min=1), (found - wanted).abs().max()


def state(model):
    """All that a module holds: attributes, hooks and flags."""
    return {path: {k: copy.copy(v) for k, v in vars(m).items()} for path, m in model.named_modules()}


def inputs(attention, own=False, shared=False, unbatched=False):
    x, k, v = data(B, N, WIDTH), data(B, M, attention.kdim, seed=6), data(B, M, attention.vdim, seed=7)
    given = [x, x, x] if own else [x, k, k] if shared else [x, k, v]
    laid = {id(g): g[0] if unbatched else g if attention.batch_first else g.transpose(0, 1) for g in given}
    return [laid[id(g)] for g in given]


CALLS = {
    "cross": ({}, {}, {}),
    "keys are values": ({}, {"shared": True}, {}),
    "batch first": ({"batch_first": True}, {}, {}),
    "no bias": ({"bias": False, "batch_first": True}, {}, {}),
    "widths": ({"kdim": 24, "vdim": 20}, {}, {}),
    "hidden": ({}, {}, {"attn_mask": HIDDEN}),
    "hidden by head": ({}, {}, {"attn_mask": ADDED > 1}),
    "added": ({"batch_first": True}, {}, {"attn_mask": ADDED[0]}),
    "added by head": ({}, {}, {"attn_mask": ADDED.masked_fill(HIDDEN, -torch.inf)}),
    "padded": ({}, {}, {"key_padding_mask": PADDED}),
    "padded left": ({"batch_first": True}, {}, {"key_padding_mask": PADDED.flip(1)}),
    "padded and hidden": ({}, {}, {"key_padding_mask": PADDED, "attn_mask": ADDED > 1}),
    "padded by numbers": ({}, {}, {"key_padding_mask": ADDED[:B, 0], "attn_mask": ADDED}),
    "unbatched": ({}, {"unbatched": True}, {}),
    "unbatched, padded": ({}, {"unbatched": True}, {"key_padding_mask": PADDED[1], "attn_mask": ADDED[:HEADS] > 1}),
    "self": ({}, {"own": True}, {}),
    "self, batch first": ({"batch_first": True}, {"own": True}, {"attn_mask": ADDED[0, :, :N]}),
    "causal": ({}, {"own": True}, {"attn_mask": FUTURE}),
    "hint": ({}, {"own": True}, {"attn_mask": FUTURE, "is_causal": True, "need_weights": False}),
    "hint, padded": ({}, {"own": True}, {"attn_mask": FUTURE, "is_causal": True, "key_padding_mask": PADDED[:, :N]}),
    "the hint counts": ({}, {"own": True}, {"attn_mask": FUTURE.T, "is_causal": True, "need_weights": False}),
    "the mask counts": ({}, {"own": True}, {"attn_mask": FUTURE.T, "is_causal": True}),
}


@pytest.mark.parametrize("options, given, call", CALLS.values(), ids=CALLS)
def test_the_identity_program_changes_neither_output_nor_gradient(options, given, call):
    attention = multihead(**options)
    given = inputs(attention, **given)
    wanted, weights = attention(*given, **call)
    with saccade.install(attention, Attention()):
        found, none = attention(*given, **call)
    assert none is None and (weights is None) == ("need_weights" in call)
    close(found, wanted)
    grads = [torch.autograd.grad(out.square().sum(), list(attention.parameters())) for out in (found, wanted)]
    for mine, torchs in zip(*grads, strict=True):
        close(mine, torchs)


def test_gradients_reach_inputs_and_a_learned_bias():
    attention = multihead(batch_first=True)
    bias = ADDED[0].clone().requires_grad_()
    given = [*(x.requires_grad_() for x in inputs(attention)), bias]
    wanted = torch.autograd.grad(attention(*given[:3], attn_mask=bias)[0].square().sum(), given)
    with saccade.install(attention, Attention()):
        found = torch.autograd.grad(attention(*given[:3], attn_mask=bias)[0].square().sum(), given)
    for mine, torchs in zip(found, wanted, strict=True):
        close(mine, torchs)


def test_programs_are_torchs_masks_counted_from_the_first_token():
    attention, x = multihead(batch_first=True), data(B, N, WIDTH)
    far = (torch.arange(N)[:, None] - torch.arange(N)).abs() >= 3
    wanted = attention(x, x, x, attn_mask=far | FUTURE)[0]
    names = []
    heard = listen(attention, lambda call: names.append(call.frame.name))
    with heard, saccade.install(attention, Attention(mask=masks.Window(3))):
        close(attention(x, x, x, attn_mask=FUTURE)[0], wanted)
    assert names == [("causal", None)]  # known by its looks, so that it costs no memory
    left = (torch.arange(N) < 4).expand(B, N)
    with saccade.install(attention, Attention(mask=masks.Blocks(3))):
        close(attention(x, x, x, key_padding_mask=left)[0][:, 4:], attention(x[:, 4:], x[:, 4:], x[:, 4:])[0])
    with saccade.install(attention, Attention(mask=masks.Causal())):  # fewer queries are the last ones
        close(attention(x[:, -3:], x, x)[0], attention(x, x, x)[0][:, -3:])


def test_edits_and_stats_are_those_of_the_dense_computation():
    attention, x = multihead(batch_first=True), data(B, N, WIDTH)
    q, k, v = (x @ attention.in_proj_weight.T + attention.in_proj_bias).view(B, N, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS), -1)
    weights[:, [1, 3], :, 2] = 0
    wanted = attention.out_proj((weights @ v).transpose(1, 2).flatten(2))
    watch = saccade.watch(attention, stats.KeyMass(edited=False), stats.KeyMass("left"))
    with watch, saccade.edit(attention, edits.Zero(keys=2), heads=[1, 3]):
        close(attention(x, x, x)[0], wanted)
    close(watch[0]["key_mass"].sum(-1), torch.full((B, HEADS), float(N)))
    close(watch[0]["left"], weights.sum(2))


def test_dropout_is_drawn_from_torchs_generator():
    attention, x, found = multihead(dropout=0.5).train(), data(N, B, WIDTH), []
    with saccade.watch(attention, stats.KeyMass()) as watch:
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            found.append(attention(x, x, x)[0])
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2])
    assert 0.01 < (watch[0]["key_mass"].sum(-1) / N - 1).abs().mean() < 0.5  # some fell, the rest was scaled up


@pytest.mark.parametrize("options", [{}, {"norm_first": True}], ids=str)
@torch.no_grad()
def test_an_encoder_in_eval_goes_through_saccade(options):
    model, x = encoder(**options), data(B, N, WIDTH)
    for mask in (PADDED[:, :N], torch.zeros(B, N, dtype=torch.bool), None):
        keep = slice(None) if mask is None else ~mask
        wanted = model(x, src_key_padding_mask=mask)[keep]
        with saccade.install(model, Attention(), layers=0):
            close(model(x, src_key_padding_mask=mask)[keep], wanted)
        with saccade.edit(model, edits.Zero(keys=0), layers=1) as handle:
            assert [s.path for s in handle.sites] == ["layers.1.self_attn"]
            assert ((model(x, src_key_padding_mask=mask)[keep] - wanted).abs().amax(-1) > 1e-3).all()
    if not options:
        with saccade.install(model.layers, Attention()), pytest.raises(Unsupported, match="TransformerEncoder"):
            model(x, src_key_padding_mask=PADDED[:, :N])


def test_a_transformer_has_crosses():
    model = seeded(nn.Transformer(WIDTH, HEADS, 1, 2, 48, batch_first=True))
    source, target = data(B, M, WIDTH), data(B, N, WIDTH, seed=6)
    call = {"tgt_mask": nn.Transformer.generate_square_subsequent_mask(N), "memory_key_padding_mask": PADDED}
    wanted = model(source, target, **call)
    with saccade.watch(model, stats.KeyMass(), kind="cross") as watch, saccade.install(model, Attention()):
        close(model(source, target, **call), wanted)
    assert sorted(watch) == ["decoder.layers.0.multihead_attn", "decoder.layers.1.multihead_attn"]
    mass = watch[1]["key_mass"]
    assert mass.shape == (B, HEADS, M) and (mass.masked_select(PADDED[:, None]) == 0).all()
    close(mass.sum(-1), torch.full((B, HEADS), float(N)))


def test_handles_nest_and_leave_nothing():
    model, x = encoder(), data(B, N, WIDTH)
    before, wanted = state(model), model(x)
    first = saccade.install(model, Attention(mask=masks.Causal()))
    causal = model(x)
    second = saccade.edit(model.layers[1], edits.Zero(keys=0))
    third = saccade.watch(model, stats.KeyMass())
    assert not torch.allclose(model(x), causal, atol=1e-3) and not torch.allclose(wanted, causal, atol=1e-3)
    twin = copy.deepcopy(model)
    close(twin(x), model(x))
    second.remove()
    close(model(x), causal)
    assert not torch.allclose(twin(x), causal, atol=1e-3)  # a copy has what was done to it, and keeps it
    first.remove()
    close(model(x), wanted)
    assert state(model) != before
    third.remove()
    assert state(model) == before
    model.layers[1].self_attn.forward = None  # another tool's
    before = state(model)
    with pytest.raises(Unsupported, match="forward of its own"):
        saccade.install(model, Attention())
    assert state(model) == before


class Own(nn.Module):
    def __init__(self, frame):
        super().__init__()
        self.saccade_heads, self.frame = HEADS, frame
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return run(self, q, k, v, self.frame).transpose(1, 2).flatten(2)


OWN = {
    "plain": (Frame(), torch.zeros(N, N)),
    "causal": (Frame(inside(masks.Causal()), name="causal"), torch.zeros(N, N).masked_fill(FUTURE, -torch.inf)),
    "biased": (Frame(inside(scale=0.5, biases=[ADDED[:HEADS, :, :N]])), ADDED[:HEADS, :, :N]),
}


@pytest.mark.parametrize("frame, bias", OWN.values(), ids=OWN)
def test_an_own_module(frame, bias):
    model, x = seeded(nn.ModuleDict({"a": Own(frame), "b": Own(frame)})), data(B, N, WIDTH)
    q, k, v = model["b"].qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    scale = 0.5 if bias.ndim == 3 else None
    far = (torch.arange(N)[:, None] - torch.arange(N)).abs() >= 3
    for hidden, program in ((far, Attention(mask=masks.Window(3))), (far & False, Attention())):
        with saccade.install(model, program, layers=1) as handle:
            found = model["b"](x)
        allowed = bias.masked_fill(hidden, -torch.inf).expand(B, HEADS, N, N)
        wanted = nn.functional.scaled_dot_product_attention(q, k, v, allowed, scale=scale)
        close(found, wanted.transpose(1, 2).flatten(2))
    close(model["b"](x), found)  # the last program was the identity
    close(pickle.loads(pickle.dumps(model))["b"](x), found)
    assert [(s.path, s.layer, s.heads, s.kinds) for s in handle.sites] == [("b", 1, HEADS, {"self", "text"})]


def test_what_is_not_there_is_refused_with_what_there_is():
    with pytest.raises(SpecError, match=r"kind='vision'.*self text layers \[0\].*cross text layers \[1\] \(multihead"):
        saccade.install(nn.TransformerDecoderLayer(WIDTH, HEADS, 48), Attention(), kind="vision")
    with pytest.raises(Unsupported, match=r"Linear has no attention.*MultiheadAttention.*saccade_heads"):
        saccade.install(nn.Linear(2, 2), Attention())
    part = type("PreTrainedModel", (nn.Module,), {})()  # as transformers calls its models' base
    with pytest.raises(Unsupported, match=r"holds a model of transformers.*ModuleDict\.body"):
        saccade.install(nn.ModuleDict({"body": part}), Attention())
    for broken in ({"saccade_heads": "4"}, {"saccade_heads": 4, "saccade_kind": "both"}):
        own = nn.Identity()
        vars(own).update(broken)
        with pytest.raises(SpecError, match=f"{list(broken)[-1]} must be"):
            saccade.install(own, Attention())
    x = data(N, B, WIDTH)
    for name in ("add_bias_kv", "add_zero_attn"):
        odd = nn.MultiheadAttention(WIDTH, HEADS, **{name: True})
        with pytest.raises(Unsupported, match=name):
            saccade.install(odd, Attention())
        model = nn.ModuleList([odd, multihead()])
        with saccade.install(model, Attention(), layers=1):
            assert odd(x, x, x)[1] is not None  # torch's own: nothing is done here
        with saccade.install(model, Attention()), pytest.raises(Unsupported, match=f"0 has a key.*{name}"):
            odd(x, x, x)
    attention = multihead()
    with saccade.install(attention, Attention()):
        for wrong in ({"attn_mask": HIDDEN}, {"key_padding_mask": PADDED}, {"is_causal": True}):
            with pytest.raises(SpecError, match=r"must be \[|give attn_mask"):
                attention(x, x, x, **wrong)


@pytest.mark.parametrize("fused", [True, False])
def test_timm(fused):
    vit = pytest.importorskip("timm").models.VisionTransformer
    model = seeded(vit(32, 8, num_classes=5, embed_dim=WIDTH, num_heads=HEADS, depth=2, qk_norm=True))
    for block in model.blocks:
        block.attn.fused_attn = fused
    before, x = state(model), data(2, 3, 32, 32)
    wanted = model(x)
    with saccade.install(model, Attention()), saccade.watch(model, stats.KeyMass(), kind="vision") as watch:
        close(model(x), wanted)
        with saccade.edit(model, edits.Zero(keys=0), layers=-1):
            assert not torch.allclose(model(x), wanted, atol=1e-3)
    close(watch[0]["key_mass"].sum(-1), torch.full((2, HEADS), 17.0))
    assert state(model) == before
