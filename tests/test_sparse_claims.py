"""What the claims of sparse systems measure, on selections whose answers are known."""

import pytest
import torch

from saccade import Attention, attention, masks
from saccade.core.selectors import Select, Selection
from saccade.nn import GPT
from saccade.study import passkeys
from saccade.study.sparse_claims import Recall

torch.set_num_threads(1)


class Given(Select):
    """The last 8 queries visit these blocks of 4 keys, all others the first of them alone."""

    def __init__(self, blocks):
        super().__init__(8, 4)
        self.given = blocks

    def choose(self, q, k, codes):
        blocks = torch.tensor(self.given).repeat(*q.shape[:2], codes.shape[-2], 1)
        blocks[:, :, :-1, 1:] = -1
        return Selection(blocks, self.rows, self.columns)


def test_recall_counts_the_greatest_scores_that_are_visited():
    """Scores of 64 keys fall with the distance from key 20: the 8 greatest are 17 to 24."""
    n = 64
    q, k = torch.ones(1, 2, n, 1), -(torch.arange(n) - 20.25).abs().view(1, 1, n, 1)
    search = Recall(Given([4, 5, 14, 15]), count=8, window=8)  # keys 16 to 23, and the newest 8
    out = attention(q, k, torch.randn(1, 1, n, 1), Attention(mask=masks.Causal(), select=search))
    assert out.shape == (1, 2, n, 1)
    # As many: 16 newest keys; and, of those before the newest 8, every seventh: 20 (age 43 = 8 + 35) alone.
    assert search.means() == pytest.approx({"chosen": 7 / 8, "local": 0, "strided": 1 / 8})


def test_recall_leaves_the_choice_as_it_is():
    q, k = torch.randn(2, 1, 2, 64, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    plain = Attention(mask=masks.Causal(), select=Given([0, 5]))
    noted = Attention(mask=masks.Causal(), select=Recall(Given([0, 5]), 4, 4))
    assert torch.equal(attention(q, k, k, plain), attention(q, k, k, noted))


def test_pages_grow_stage_by_stage_and_the_answer_is_learned():
    stages = []

    def pages(stage):
        """The answer is the first of two tokens."""
        stages.append(stage)
        answers = torch.randint(4, (16,), generator=torch.Generator().manual_seed(len(stages)))
        return torch.stack([answers, torch.full_like(answers, 4)], -1), answers

    torch.manual_seed(0)
    model = GPT(5, 16, 1, 2, positions=None, attention=lambda layer, heads: Attention(mask=masks.Causal()))
    passkeys.train(model, pages, 40)
    assert stages == sorted(stages) and stages.count(0) == stages.count(3) == 10
    tokens, answers = pages(0)
    assert (model(tokens)[:, -1].argmax(-1) == answers).all()
