"""Zoology: how wide must a model be to recall? Accuracy on multi-query associative recall over width and length.

    solved width    of a mixer and a length N: the least width at which a two-layer model answers 90 % of the questions
    gap closed      (accuracy - gated convolution's) / (attention's - gated convolution's), means over lengths and widths

The paper's findings: attention solves the task at a small width, whatever N; gated convolutions, which read by a filter
that does not depend on the input, need a width that grows with N; hybrids in which some tokens attend, chosen by the
input, close the gap. :mod:`saccade.study.zoology` holds the mixers and says what each computes.

Paper: Zoology: Measuring and Improving Recall in Efficient Language Models, arXiv:2312.04927
Code: https://github.com/HazyResearch/zoology (zoology/experiments/paper_configs/iclr24_zoology_figure2/configs.py;
    zoology/model.py, train.py; zoology/mixers/attention.py, base_conv.py, convolution.py, based.py, selective.py)

Differs: widths 16 to 128 and lengths 64 to 256, in the paper 64 to 512 each (a pair to 16 tokens up to 256, as there); a
vocabulary of 1024, there 8192: every size is a setting. Examples are new in every step, there 64 epochs of 100,000; the
cosine falls with every step, there with every epoch; accuracy is looked at 32 times, there after every epoch (both stop
above 99 %). What is reported is the last accuracy, of the best learning rate, chosen on the test examples as in the
paper. Learned selection is the official ``SigmoidLookups``, whose choice of the greatest at test time looks at the whole
text. The paper sets hybrids by hand into a language model; here, as the official config does for Based, they follow a
layer of BaseConv. The repository holds no programmatic selection: here a token attends if it occurred before. Hyena,
RWKV, H3 and Mamba are not compared. Official layers without a perceptron still add the norm of the stream to the
stream; so do these.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..base import ClaimNumbers, StudySystem

if TYPE_CHECKING:
    from ...study.zoology import Zoology

HYBRIDS = ("learned", "programmatic")
CLOSED = 0.9  # of the gap, by the better hybrid; the paper: 97.4 % of perplexity


class ZoologyRecall(StudySystem):
    """Settings: ``mixers``, ``lengths``, ``widths``, ``lrs``, ``seeds``; of each training ``vocab``, ``steps``,
    ``batch``, ``test`` (held-out examples) and ``tokens_per_pair``.

    The default run is 240 trainings; HOURS.
    """  # fmt: skip

    slug = "zoology"
    title = "Zoology: recall over width"
    paper = "https://arxiv.org/abs/2312.04927"
    code = "https://github.com/HazyResearch/zoology"
    small: ClassVar[dict[str, Any]] = {
        "mixers": ("attention", "base-conv", "programmatic"), "lengths": (16, 32), "widths": (8, 16), "lrs": (1e-2,),
        "vocab": 64, "steps": 10, "batch": 16, "test": 16, "tokens_per_pair": 8,
    }  # fmt: skip

    def __init__(
        self,
        mixers: tuple[str, ...] = ("attention", "base-conv", "based", "learned", "programmatic"),
        lengths: tuple[int, ...] = (64, 128, 256),
        widths: tuple[int, ...] = (16, 32, 64, 128),
        lrs: tuple[float, ...] = (1e-4, 4.6e-4, 2.15e-3, 1e-2),
        seeds: tuple[int, ...] = (0,),
        vocab: int = 1024,
        steps: int = 3000,
        batch: int = 64,
        test: int = 256,
        tokens_per_pair: int = 16,
    ):
        self.mixers, self.lengths, self.widths, self.lrs, self.seeds = mixers, lengths, widths, lrs, seeds
        self.vocab, self.steps, self.batch, self.test = vocab, steps, batch, test
        self.tokens_per_pair = tokens_per_pair

    def comparison(self) -> Zoology:
        """A cell for each mixer, length, width, learning rate and seed."""
        from ...study.zoology import Training, Zoology

        training = Training(self.vocab, self.steps, self.batch, self.test, self.tokens_per_pair)
        return Zoology(self.mixers, self.lengths, self.widths, self.lrs, self.seeds, training)
