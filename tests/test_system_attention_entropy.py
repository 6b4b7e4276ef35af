"""Parallel context encoding: whole models against dense eager ones, the selection against its definition."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import eager_mask

import saccade
from saccade import SpecError, stats
from saccade.core.tile import At
from saccade.study.laws import check
from saccade.systems.llm.attention_entropy import AttentionEntropy, Selection


def llama(implementation=None):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=39, pad_token_id=38,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for p in model.parameters():
        p.data.mul_(12 if p.ndim > 1 else 1)
    if implementation:
        model.set_attn_implementation(implementation)
    return model


def tokens(batch, length):
    return torch.randint(0, 38, (batch, length), generator=torch.Generator().manual_seed(1))


def laid_out(length, query, sinks, count):
    """Piece and position of every token, written out: -1 sinks, -2 query."""
    context = length - query - sinks
    size = -(-context // count)
    piece, position = [-1] * sinks, list(range(sinks))
    for p, start in enumerate(range(0, context, size)):
        own = min(size, context - start)
        piece += [p] * own
        position += [sinks + int(i * (size / own) + 1e-9) for i in range(own)]
    return torch.tensor(piece + [-2] * query), torch.tensor(position + [sinks + size + i for i in range(query)])


def select(weights, piece, keep, score):
    """The paper's selection on dense weights [B, H, N, M]; the query's rows are the last."""
    out = weights.clone()
    for row in range(weights.shape[2]):
        if piece[row] != -2:
            continue
        for b in range(weights.shape[0]):
            for h in range(weights.shape[1]):
                w = weights[b, h, row]
                sums = []
                for p in range(int(piece.max()) + 1):
                    inside = w[piece == p].sort(descending=True).values
                    sums.append(float(inside[:score].sum()))
                best = sorted(range(len(sums)), key=lambda p: -sums[p])[:keep]
                stays = torch.tensor([int(p) < 0 or int(p) in best for p in piece])
                out[b, h, row] = w * stays / (w * stays).sum()
    return out


@torch.no_grad()
def by_hand(sequence, query, sinks, count, keep=None, score=5, steps=0):
    """Logits and query entropies [layers] of a dense eager model, its last ``steps`` tokens generated."""
    length = sequence.shape[1] - steps
    piece, position = laid_out(length, query, sinks, count)
    piece = torch.cat([piece, torch.full((steps,), -2)])
    position = torch.cat([position, position[-1] + 1 + torch.arange(steps)])
    own = (piece[:, None] == piece) | (piece == -1) | (piece == -2)[:, None]
    visible = own & torch.ones_like(own).tril()
    entropies = []

    def dense(module, q, k, v, mask, scaling, **_):
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        weights = (q @ k.mT * scaling).masked_fill(~visible, -1e30).softmax(-1)
        if keep is not None:
            weights = select(weights, piece, keep, score)
        rows = weights[:, :, piece == -2]
        entropies.append(-(rows * rows.clamp(min=1e-30).log()).sum(-1).mean())
        return (weights @ v).transpose(1, 2), None

    AttentionInterface.register("dense_pieces", dense)
    AttentionMaskInterface.register("dense_pieces", eager_mask)
    try:
        model = llama("dense_pieces")
        ones = torch.ones_like(sequence)
        logits = model(sequence, position_ids=position.expand(len(sequence), -1), attention_mask=ones).logits
    finally:
        for registry in (AttentionInterface, AttentionMaskInterface):
            registry._global_mapping.pop("dense_pieces")
    return logits, torch.stack(entropies)


def close(found, wanted):
    return (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("keep", [2, 5])
def test_a_prompt_is_read_as_by_a_dense_model(sinks, keep):
    sequence = tokens(2, 41)
    with torch.no_grad(), AttentionEntropy(5, 7, sinks, keep, score=2).apply(model := llama()):
        with saccade.watch(model, stats.Entropy()) as seen:
            found = model(sequence).logits
        entropy = torch.stack([seen[i]["entropy"][..., -7:].mean() for i in range(2)])
    wanted, uncertain = by_hand(sequence, 7, sinks, 5, keep if keep < 5 else None, 2)
    other, _ = by_hand(sequence, 7, sinks, 5, None if keep < 5 else 2, 2)
    assert close(found, wanted) and close(entropy, uncertain)
    assert not close(found, other)


def test_generation_goes_on_where_the_query_ended():
    sequence, model = tokens(1, 40), llama()
    with torch.no_grad(), AttentionEntropy(4, 6, 2, 2).apply(model):
        said = model.generate(sequence, max_new_tokens=5, do_sample=False, eos_token_id=None, output_logits=True,
                              return_dict_in_generate=True)  # fmt: skip
    wanted, _ = by_hand(said.sequences[:, :-1], 6, 2, 4, 2, steps=4)
    assert close(torch.stack(said.logits, 1), wanted[:, -5:])


@pytest.mark.parametrize("length,query,sinks,count", [(41, 7, 3, 5), (40, 8, 0, 4), (19, 4, 2, 6), (12, 10, 1, 4)])
def test_layout(length, query, sinks, count):
    piece, position = AttentionEntropy(count, query, sinks).lay_out(length)
    wanted_piece, wanted_position = laid_out(length, query, sinks, count)
    assert piece.tolist() == wanted_piece.tolist() and position.tolist() == wanted_position.tolist()


@pytest.mark.parametrize("keep,score", [(1, 2), (2, 1), (3, 99)])
def test_selection_leaves_rows_before_the_query_and_keys_outside_the_pieces(keep, score):
    piece, _ = laid_out(16, 3, 1, 4)
    weights = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).tril()
    weights /= weights.sum(-1, keepdim=True)
    selection = Selection(keep, score)
    selection.piece = piece
    found = selection(weights, At.everywhere(2, 3, 16, 16, 0, False, "cpu"), None)
    assert torch.equal(found[:, :, :13], weights[:, :, :13])
    assert torch.allclose(found, select(weights, piece, keep, score))
    assert (found[:, :, 13:, 0] > 0).all() and (found[:, :, 13:, 1:13] == 0).any()


def test_a_second_prompt_is_laid_out_anew():
    model, one, other = llama(), tokens(1, 41), tokens(2, 30)
    with torch.no_grad(), AttentionEntropy(4, 6, 2, 2, score=2).apply(model):
        model(one)
        found = model(other).logits
    assert close(found, by_hand(other, 6, 2, 4, 2, 2)[0])


def test_what_it_refuses():
    model = llama()
    with pytest.raises(SpecError, match="no context"), AttentionEntropy(query=16).apply(model):
        model(tokens(1, 17))
    with pytest.raises(SpecError, match="without padding"), AttentionEntropy().apply(model):
        model(tokens(2, 30), attention_mask=torch.ones(2, 30).index_fill(1, torch.tensor([0]), 0))
    with pytest.raises(SpecError, match="growing cache"), AttentionEntropy().apply(model):
        model.generate(tokens(1, 30), max_new_tokens=2, cache_implementation="static")
    with pytest.raises(SpecError, match="at least 1"):
        AttentionEntropy(pieces=0)
    with pytest.raises(SpecError, match="sinks of 0"):
        AttentionEntropy(sinks=-1)
    assert model.config._attn_implementation == "sdpa"  # as it was


def test_its_laws():
    assert {r.status for r in check(AttentionEntropy)} == {"passed"}
