"""Lookback Lens: a language model that looks at its own words more than at the context is probably making things up.

    context[t] = mean of w[t, k] over the context's keys,   own[t] = the same over all later keys
    ratio[t]   = context[t] / (context[t] + own[t])                            one per layer and head
    faithful   = sigmoid(weight . (mean of ratio[t] over a span or a chunk of tokens) + bias)

``t`` is the query from which a new token comes; ``cue`` tokens at the prompt's end ("Answer:") count as the model's
own. Guided decoding samples some chunks of ``window`` tokens, keeps the most faithful one, and goes on from it.

Paper: Lookback Lens: Detecting and Mitigating Contextual Hallucinations in Large Language Models Using Only Attention
    Maps, arXiv:2407.07071
Code: https://github.com/voidism/Lookback-Lens (step01_extract_attns.py, step03_lookback_lens.py and
    classifier_guided_decoding in its transformers-4.32.0/src/transformers/generation/utils.py)

Differs: the masses of two regions stand in for attention maps; candidates are sampled as one batch; a last chunk may
be shorter, where the official code drops it. Prompts of a batch must be equally long and without padding (the official
code takes one). The linear map from one model's ratios to another's is left out: there is one embedded model.
"""

from __future__ import annotations

from itertools import islice
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import SpecError
from ...core.stats import RegionMass
from ...hosts.handles import Watching, watch
from ...study.probes import Detector, auroc, embedded, two_fold
from ...worlds import recall
from ...worlds.text import decode
from ..base import ClaimNumbers, MethodSystem
from .decore import counterfactuals

NEAR = 0.02  # by how much hidden states may be the better detector where the paper says "as effective as"
TRANSFER = 0.82  # AUROC on a task not trained on: the lower of the official README's two (spans)
KEYS = {"needle": len("qx is "), "lookup": len("AB")}  # what stands before an answer in the context, as in the prompt


class LookbackLens(MethodSystem):
    """Settings: ``window``, tokens of a chunk; ``candidates``; ``temperature`` and ``top_p`` of their draw; ``cue``."""

    slug = "lookback-lens"
    title = "Lookback Lens"
    paper = "https://arxiv.org/abs/2407.07071"
    code = "https://github.com/voidism/Lookback-Lens"

    def __init__(
        self, window: int = 8, candidates: int = 8, temperature: float = 0.9, top_p: float = 0.95, cue: int = 1
    ):
        self.window, self.candidates, self.cue = window, candidates, cue
        self.temperature, self.top_p = temperature, top_p
        if min(window, candidates, cue) < 1:
            raise SpecError(f"{self}: expected window, candidates and cue of at least 1")

    def apply(self, model: nn.Module) -> Watching:
        """Watch a model, which answers as it would: a prompt in one call, then its tokens; see :meth:`ratios`."""

        def own(ids: Tensor) -> Tensor:
            return torch.arange(-ids.shape[1], 0, device=ids.device).expand_as(ids) >= -self.cue

        names = {"context": lambda ids: ~own(ids), "own": own}
        return watch(model, RegionMass({name: name for name in names}), every=True, regions=names)

    def ratios(self, watching: Watching) -> Tensor:
        """Of every new token, ``[B, T, layers * heads]``. SpecError: nothing of the prompt is context."""
        layers = [[call["region_mass"] for call in watching.seen[site.path]] for site in watching.sites]
        size = layers[0][0]["own"].shape[-1] - self.cue
        if size < 1:
            raise SpecError(f"LookbackLens: of a prompt of {size + self.cue} tokens {self.cue} are the cue")
        context, own = (
            torch.stack([torch.cat([mass[name][..., -1:] for mass in masses], -1) for masses in layers], 1)
            for name in ("context", "own")
        )  # [B, layers, heads, T]
        context, own = context / size, own / torch.arange(self.cue, self.cue + own.shape[-1], device=own.device)
        return (context / (context + own)).flatten(1, 2).mT

    @torch.no_grad()
    def generate(self, model: Any, tokens: Tensor, detector: Detector, new: int) -> Tensor:
        """Decode a prompt ``[1, N]`` guided by a detector of ratios: ``[1, N + new]``, or less if the text ends."""
        from transformers import DynamicCache

        cache, ends = DynamicCache(config=model.config), model.generation_config.eos_token_id
        given: dict[str, Any] = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        with self.apply(model) as watching:
            while new > 0:
                several, size = tokens.expand(self.candidates, -1), min(self.window, new)
                given |= {"attention_mask": torch.ones_like(several), "past_key_values": cache}
                said = model.generate(several, max_new_tokens=size, **given)[:, tokens.shape[1] :]
                ended = torch.isin(said, torch.tensor([] if ends is None else ends, device=said.device)).long()
                real = ended.cumsum(1) - ended == 0  # a candidate's tokens up to its end
                ratios = self.ratios(watching)[:, -said.shape[1] :] * real[..., None]
                best = detector(ratios.sum(1) / real.sum(1, keepdim=True)).argmax()
                tokens = torch.cat([tokens, said[best, real[best]][None]], 1)
                new = 0 if bool(ended[best].any()) else new - size
                cache.batch_select_indices(best.expand(self.candidates))
        return tokens

    def claim(self) -> ClaimNumbers:
        """Detectors of answers that the page does not give, on two recall tasks; altered prose copied with guidance."""
        model = embedded()
        seen, found = [_answers(self, model, task) for task in KEYS], {}
        for kind in ("ratios", "hidden"):
            moved = [(Detector.fit(a[kind], a["faithful"])(b[kind]), b["faithful"]) for a, b in (seen, seen[::-1])]
            found[f"auroc_{kind}"] = fmean(two_fold(x[kind], x["faithful"]) for x in seen)
            found[f"transfer_{kind}"] = fmean(auroc(scores, faithful) for scores, faithful in moved)
        wrong = _wrong(self, model, Detector.fit(seen[0]["ratios"], seen[0]["faithful"]))
        found |= zip(("wrong_greedy", "wrong_sampled", "wrong_guided"), wrong.mean(1).tolist(), strict=True)
        told, fewer = {name: round(value, 3) for name, value in found.items()}, wrong[0] - wrong[2]
        return ClaimNumbers.decide(
            told,
            f"Answers that a page gives and answers made up are told apart with AUROC {told['auroc_ratios']} by ratios,"
            f" {told['auroc_hidden']} by last hidden states; on the task not trained on, {told['transfer_ratios']} and"
            f" {told['transfer_hidden']}. Share of wrong copies of prose with a letter changed: {told['wrong_greedy']}"
            f" greedy, {told['wrong_sampled']} sampled, {told['wrong_guided']} guided. Another model: unmeasured.",
            near_the_hidden_states=found["auroc_ratios"] >= found["auroc_hidden"] - NEAR,
            transfers_to_another_task=found["transfer_ratios"] >= TRANSFER,
            fewer_wrong_answers=float(fewer.mean()) > 2 * float(fewer.std()) / len(fewer) ** 0.5,
        )


def _answers(lens: LookbackLens, model: Any, task: str) -> dict[str, Tensor]:
    """Greedy answers, half of them to another page's question: features ``[S, F]``, and whether the page says so."""
    examples, key = list(islice(recall.TASKS[task](256, "lens"), 96)), KEYS[task]
    start, stop = examples[0].answers[0].start, examples[0].answers[0].stop
    prompts = torch.stack([e.tokens[:start] for e in examples])
    prompts[1::2, -key:] = prompts[::2, -key:].clone()
    with lens.apply(model) as watching:
        out = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=stop - start, do_sample=False,
            return_dict_in_generate=True, output_hidden_states=True,
        )  # fmt: skip
    hidden = torch.stack([step[-1][:, -1] for step in out.hidden_states], 1)
    faithful = [decode(said[start - key :]) in decode(said[: start - key]) for said in out.sequences]
    return {"ratios": lens.ratios(watching).mean(1), "hidden": hidden.mean(1), "faithful": torch.tensor(faithful)}


def _wrong(lens: LookbackLens, model: Any, detector: Detector) -> Tensor:
    """Whether prose with a letter changed is copied wrongly from there on ``[3, S]``: greedily, sampled, guided."""
    torch.manual_seed(0)
    single, wrong = LookbackLens(lens.window, 1, lens.temperature, lens.top_p, lens.cue), []
    for example, _ in islice(counterfactuals(128, "guided"), 100):
        prompt, start = example.tokens[None], example.answers[0].evidence_start
        said = [model.generate(prompt, max_new_tokens=lens.window, do_sample=False)]
        said += [way.generate(model, prompt, detector, lens.window) for way in (single, lens)]
        wrong.append([not torch.equal(x[0, 128:], prompt[0, start : start + lens.window]) for x in said])
    return torch.tensor(wrong).double().T
