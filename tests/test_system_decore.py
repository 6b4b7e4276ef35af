"""DeCoRe against its two branches written out: two caches, heads blinded by a zero query, the formula in float64."""

import copy
import math
from itertools import islice

import pytest
import torch

from saccade import catalog
from saccade.core.errors import SpecError
from saccade.study import laws
from saccade.study.hosted_laws import small_model, some_tokens
from saccade.systems.llm.decore import DeCoRe, contrast, counterfactuals

torch.set_num_threads(1)
HEADS = [(0, 2), (1, 0), (1, 3)]
SAID = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


def by_hand(base, masked):
    """``(1 + alpha) log p - alpha log p'``, one distribution at a time."""
    p = [math.exp(x - base.max()) for x in base.tolist()]
    m = [math.exp(x - masked.max()) for x in masked.tolist()]
    p, m = [x / sum(p) for x in p], [x / sum(m) for x in m]
    alpha = -sum(x * math.log(x + 1e-12) for x in p)
    return torch.tensor([(1 + alpha) * math.log(x) - alpha * math.log(y) for x, y in zip(p, m, strict=True)])


def test_contrast_is_the_formula():
    base, masked = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = torch.stack([by_hand(b, m) for b, m in zip(base, masked, strict=True)])
    torch.testing.assert_close(contrast(base, masked), wanted.double(), rtol=1e-6, atol=1e-6)
    sure = torch.tensor([100.0, 0, 0])
    torch.testing.assert_close(contrast(sure, torch.zeros(3)), sure.log_softmax(-1))  # no doubt, no contrast


class Blinded:
    """The masked branch as the official code makes it under FlashAttention: some heads' queries are zero."""

    def __init__(self, model):
        self.model = model

    def __call__(self, *args, **kwargs):
        def zero(layer):
            def hook(module, args, out):
                rows = out.view(*out.shape[:2], self.model.config.num_attention_heads, -1)
                rows[:, -1, [head for at, head in HEADS if at == layer]] = 0

            return hook

        blocks = self.model.model.layers
        hooks = [block.self_attn.q_proj.register_forward_hook(zero(i)) for i, block in enumerate(blocks)]
        out = self.model(*args, **kwargs)
        for hook in hooks:
            hook.remove()
        return out


@torch.no_grad()
def two_branches(model, tokens, steps):
    """The official generation: one prefill, two copies of its cache, the last token of the prompt onwards in both."""
    read = model(tokens[:, :-1], use_cache=True).past_key_values
    ours, theirs = copy.deepcopy(read), copy.deepcopy(read)
    new, told = tokens[:, -1:], []
    for _ in range(steps):
        base = model(new, past_key_values=ours).logits[:, -1]
        masked = Blinded(model)(new, past_key_values=theirs).logits[:, -1]
        told.append(torch.stack([by_hand(b, m) for b, m in zip(base, masked, strict=True)]))
        new = told[-1].argmax(-1, keepdim=True)
    return torch.stack(told)


@torch.no_grad()
def test_generate_is_the_two_branches():
    model, tokens = small_model(), some_tokens(2, 20)
    with DeCoRe(HEADS).apply(model):
        found = model.generate(tokens, output_logits=True, return_dict_in_generate=True, **SAID)
    wanted = two_branches(model, tokens, 6)
    torch.testing.assert_close(torch.stack(found.logits), wanted, rtol=1e-3, atol=1e-3)
    assert torch.equal(found.sequences[:, 20:], wanted.argmax(-1).T)
    assert not torch.equal(found.sequences, model.generate(tokens, **SAID))


@torch.no_grad()
def test_a_forward_without_a_cache_is_contrasted_at_its_end():
    model, tokens = small_model(), some_tokens(2, 20)
    base = model(tokens).logits
    with DeCoRe(HEADS).apply(model):
        found = model(tokens, use_cache=False).logits
        cached = model(tokens).logits
    torch.testing.assert_close(found, cached)
    torch.testing.assert_close(found[:, :-1], base[:, :-1].log_softmax(-1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[:, -1], two_branches(model, tokens, 1)[0], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_padded_text_is_answered_as_alone():
    model, tokens = small_model(), some_tokens(1, 20)
    mask = torch.ones(1, 25, dtype=torch.long)
    mask[0, :5] = 0
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), tokens], 1)
    with DeCoRe(HEADS).apply(model):
        alone = model.generate(tokens, attention_mask=mask[:, 5:], **SAID)
        found = model.generate(padded, attention_mask=mask, **SAID)
    assert torch.equal(found[:, 25:], alone[:, 20:])


def test_a_head_that_is_not_there_is_refused():
    with pytest.raises(SpecError, match="no layer"), DeCoRe([(7, 0)]).apply(small_model()):
        pass


def test_counterfactuals_ask_for_a_letter_that_english_would_not_have():
    for example, original in islice(counterfactuals(128, 0), 20):
        answer, tokens = example.answers[0], example.tokens
        assert len(tokens) == answer.start == 128
        assert int(tokens[answer.evidence_start]) != original
        assert torch.equal(tokens[answer.evidence_start - 24 : answer.evidence_start], tokens[-24:])


def test_no_law_fails():
    results = laws.check(catalog.find("decore"))
    assert [r.status for r in results] == ["passed"] * len(results)
