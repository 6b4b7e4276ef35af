"""Masked mixers: against torch's convolution with its weights below the diagonal, and what a claim counts."""

import pytest
import torch

from saccade import SpecError
from saccade.nn import GPT, Encoder
from saccade.systems.score._last_states import found, pairs, tokens_lost
from saccade.systems.score.masked_mixer import MaskedMixer, Mixer

torch.set_num_threads(1)
WIDTH, LENGTH = 12, 20


def made(heads=1, causal=True):
    torch.manual_seed(0)
    x = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Mixer(WIDTH, LENGTH, heads, causal).double(), x


@pytest.mark.parametrize("causal", [True, False])
def test_it_is_torchs_convolution_over_tokens(causal):
    mixer, x = made(causal=causal)
    conv = torch.nn.Conv1d(LENGTH, LENGTH, 1).double()
    with torch.no_grad():
        conv.weight.copy_((mixer.weight[0].tril() if causal else mixer.weight[0])[..., None])
        conv.bias.copy_(mixer.bias[0])
    torch.testing.assert_close(mixer(x), conv(x))
    torch.testing.assert_close(mixer(x[:, :7])[:, :7], conv(x)[:, :7] if causal else
                               x[:, :7].mT.matmul(mixer.weight[0, :7, :7].mT).mT + mixer.bias[0, :7, None])  # fmt: skip


def test_heads_mix_their_own_projections():
    mixer, x = made(heads=3)
    parts = []
    for h in range(3):
        own = slice(4 * h, 4 * h + 4)
        projected = x @ mixer.into.weight[own].mT + mixer.into.bias[own]
        parts.append(mixer.weight[h].tril() @ projected + mixer.bias[h][:, None])
    torch.testing.assert_close(mixer(x), mixer.out(torch.cat(parts, -1)))
    with pytest.raises(SpecError, match="5 heads"):
        Mixer(WIDTH, LENGTH, 5, True)


def test_it_starts_as_a_convolution_does_in_any_model():
    model = GPT(11, 16, 1, 2, attention=MaskedMixer(400))
    mixer = model.stack.blocks[0].attention
    torch.manual_seed(0)
    conv = torch.nn.Conv1d(400, 400, 1)
    for ours, theirs in ((mixer.weight, conv.weight), (mixer.bias, conv.bias)):
        torch.testing.assert_close(ours.std(), theirs.std(), rtol=0.2, atol=0)
        assert ours.abs().max() <= 400**-0.5
    assert sum(p.numel() for p in mixer.parameters()) == sum(p.numel() for p in conv.parameters())


@pytest.mark.parametrize("heads", [1, 2])
def test_it_decodes_and_stops_at_its_last_place(heads):
    model = GPT(11, 16, 2, 2, attention=MaskedMixer(12, heads))
    tokens = torch.randint(11, (2, 12), generator=torch.Generator().manual_seed(0))
    caches = model.caches()
    steps = torch.cat([model(part, caches) for part in tokens.split((5, 1, 6), 1)], 1)
    torch.testing.assert_close(steps, model(tokens))
    assert caches[0].nbytes == 2 * 12 * 16 * 4  # what is mixed, and no keys
    with pytest.raises(SpecError, match="length=13"):
        model(tokens[:, :1], caches)


def test_padding_is_not_mixed_in():
    model = Encoder(11, 16, 1, 2, attention=MaskedMixer(12, causal=False))
    tokens = torch.randint(11, (1, 12), generator=torch.Generator().manual_seed(0))
    keep = torch.arange(12)[None] < 7
    torch.testing.assert_close(model(tokens, keep)[:, :7], model(tokens[:, :7]))


def test_an_input_is_read_back_where_nothing_is_lost_and_not_where_all_is():
    """Blocks that add nothing give their input; a model that forgets every token but the last gives one."""
    tokens = torch.randint(40, (1, 10), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = GPT(40, 64, 1, 2, attention=MaskedMixer(10))
    with torch.no_grad():
        for p in model.stack.parameters():
            p.zero_()
    assert tokens_lost(model, tokens) == 0
    block = model.stack.blocks[0]
    block.forward = lambda x, **_: torch.zeros_like(x) * x  # nothing of the input is left
    assert tokens_lost(model, tokens) > 0.5


def test_questions_are_words_of_their_pages_and_the_closest_page_isfound():
    source = b"one two three four five six seven eight nine ten eleven twelve " * 4
    questions, pages = next(pairs(source, 40, 6, 0))
    assert questions.shape == pages.shape == (6, 40) and (questions[:, 0] == 256).all()
    for question, page in zip(questions.tolist(), pages.tolist(), strict=True):
        words = bytes(question[1:]).split()
        assert set(words) <= set(bytes(page[1:]).split()) and len(words) < len(bytes(page[1:]).split())

    class Known(torch.nn.Module):
        def states(self, x):
            return torch.eye(6)[x[:, -1] % 6][:, None]

    tokens = torch.arange(6)[:, None]
    assert found(Known(), (tokens, tokens)) == 1
    assert found(Known(), (tokens, tokens.roll(1, 0))) == 0
