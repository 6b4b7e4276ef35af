"""`lm`: a byte-level LlamaForCausalLM that reads English and recalls; trained on two CPU cores in under two hours.

`lm-small` and `lm-tiny` are the same with fewer and narrower layers, for what depends on the size of a model.

    train(out)       corpus from Debian's documentation packages, then the training itself; resumes
    evaluate(dir)    bits per byte on held-out prose against xz -9, and recall by task and length
    record(dir)      evaluate, and write what it measured into the card

Workers are processes of one thread each, with gradients averaged between them: on a shared machine, threads
of one process wait for each other at every operator, which made a step ten times slower beside another job.
"""

from __future__ import annotations

import json
import lzma
import math
import os
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..worlds import recall
from ..worlds.text import BOS, Example, heldout, text
from . import corpus as debian

EOS, PAD = 257, 258
KINDS = ("text", *recall.TASKS)


@dataclass(frozen=True)
class Recipe:
    """Sizes and settings.

    stages: (share of the steps, tokens, sequences in a step), in their order.
    mix: shares of the rows of each of KINDS. hard: share of the recall examples that are hard (see `draw`).
    """

    hidden: int = 192
    layers: int = 6
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 48
    mlp: int = 512
    # Angles slow enough to match over 2048 tokens are more than half of them with this base.
    rope_theta: float = 1e7
    positions: int = 4096
    stages: tuple[tuple[float, int, int], ...] = (
        (0.12, 128, 32),
        (0.30, 256, 16),
        (0.24, 512, 8),
        (0.15, 1024, 6),
        (0.19, 2048, 4),
    )
    lr: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.1
    # Haystacks make prose more than half of all tokens.
    mix: tuple[float, ...] = (0.32, 0.16, 0.28, 0.10, 0.14)
    hard: float = 0.5

    def size(self, step: int, steps: int) -> tuple[int, int]:
        """Tokens in a sequence and sequences in this step: mostly its stage's, at times an earlier one's."""
        rng = random.Random(f"stage/{step}")
        stage, done = 0, self.stages[0][0]
        while stage + 1 < len(self.stages) and step >= done * steps:
            stage += 1
            done += self.stages[stage][0]
        if rng.random() < 0.25:
            stage = rng.randint(0, stage)
        return self.stages[stage][1:]

    def lr_at(self, step: int, steps: int) -> float:
        """Up from zero, then down to zero, linearly."""
        return self.lr * min((step + 1) / self.warmup, 1 - step / steps)


# By name: sizes, and the steps of the whole schedule.
SIZES: dict[str, tuple[Recipe, int]] = {
    "lm": (Recipe(), 4000),
    "lm-small": (Recipe(hidden=144, layers=4, head_dim=36, mlp=384), 2500),
    "lm-tiny": (Recipe(hidden=96, layers=3, head_dim=24, mlp=256), 3000),
}


# ------------------------------------------------------------------------------------------------ data


@dataclass
class Batch:
    """tokens: int64 [B, N]. kind: int64 [B, N], the index in KINDS of what each token trains, or -1."""

    tokens: Tensor
    kind: Tensor
    examples: list[tuple[str, Example]]


def draw(kind: str, length: int, seed: str, corpus: bytes, rng: random.Random, hard: bool) -> Example:
    """One training example.

    Easy ones (few pairs asked often, short strings said often) are what lets induction heads begin. Hard ones
    have many pairs asked once, and long strings said once.
    """
    options: dict[str, Any]
    if kind == "text":
        return next(text(length, seed, source=corpus))
    if kind == "needle":
        options = {"haystack": corpus, "needles": rng.randint(1, max(1, min(6, length // 64)))}
    elif kind == "recall":
        most = min(160, (length - 1) // 10)
        pairs = rng.randint(most // 4, most) if hard else _log_uniform(rng, 2, most)
        options = {"pairs": pairs}
        if not hard:
            options["queries"] = rng.randint(pairs, (length - 1) // 5 - pairs)
    elif kind == "lookup":
        most = min(160, (length - 1) // 5 - 1)
        options = {"pairs": rng.randint(most // 4, most) if hard else _log_uniform(rng, 2, most)}
    elif hard:
        options = {"haystack": corpus, "size": rng.randint(16, min(128, (length - 17) // 2))}
    else:
        size = _log_uniform(rng, 4, min(256, (length - 17) // 2))
        times = rng.randint(1, (length - 1 - 9 - size) // (size + 8))
        options = {"haystack": corpus, "size": size, "times": times}
    return next(recall.TASKS[kind](length, seed, **options))


def _log_uniform(rng: random.Random, low: int, high: int) -> int:
    return round(math.exp(rng.uniform(math.log(low), math.log(high))))


def batch(length: int, rows: int, seed: str, corpus: bytes, mix: tuple[float, ...], hard: float = 0.5) -> Batch:
    """Rows of random kinds. What a recall page says is random, so only its answers train."""
    rng = random.Random(seed)
    kinds = rng.choices(KINDS, mix, k=rows)
    examples = [
        (kind, draw(kind, length, f"{seed}/{row}", corpus, rng, rng.random() < hard)) for row, kind in enumerate(kinds)
    ]
    tokens = torch.stack([example.tokens for _, example in examples])
    kind_of = torch.full_like(tokens, -1)
    for row, (kind, example) in enumerate(examples):
        if kind not in ("recall", "lookup"):
            kind_of[row] = KINDS.index("text")
        for answer in example.answers:
            kind_of[row, answer.start : answer.stop] = KINDS.index(kind)
    return Batch(tokens, kind_of, examples)


def losses(logits: Tensor, made: Batch) -> dict[str, Tensor]:
    """Mean cross-entropy (nats per byte) by kind."""
    each = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), made.tokens[:, 1:], reduction="none")
    kind = made.kind[:, 1:]
    return {name: each[kind == i].mean() for i, name in enumerate(KINDS) if (kind == i).any()}


def exact(logits: Tensor, example: Example) -> list[bool]:
    """For each answer, whether every byte of it is the argmax; logits [N, V] of this example."""
    hit = logits[:-1].argmax(-1) == example.tokens[1:]
    return [bool(hit[a.start - 1 : a.stop - 1].all()) for a in example.answers]


# -------------------------------------------------------------------------------------------- training


def build_model(recipe: Recipe) -> Any:
    """A fresh LlamaForCausalLM of this size, its first layers set to look for what stood before."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=260,
            hidden_size=recipe.hidden,
            intermediate_size=recipe.mlp,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.kv_heads,
            head_dim=recipe.head_dim,
            max_position_embeddings=recipe.positions,
            rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
            tie_word_embeddings=True,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
    )
    _start_recalling(model, recipe)
    return model


@torch.no_grad()
def _start_recalling(model: Any, recipe: Recipe) -> None:
    """Induction heads at the start, faint ones: from random weights they took longer than all the rest.

    Layer 0: head i looks i + 1 tokens back. Every embedding gets one common direction (through the tied output
    it adds the same to all logits, and so says nothing); queries and keys that read only this direction score
    by distance alone, since RoPE turns them by it.

    Layers 1 and 2: the heads of a key head look at what followed the same three tokens: the first key head
    matches the last three, the second the three before them, which bind an answer to a name said earlier.
    """
    size, group = recipe.head_dim, recipe.heads // recipe.kv_heads
    angle = recipe.rope_theta ** (-torch.arange(0, size, 2) / size)
    embedding = model.model.embed_tokens.weight
    common = F.normalize(torch.randn(recipe.hidden), dim=0)
    embedding.add_(common * embedding.norm(dim=1).mean())
    # What RMSNorm returns has norm sqrt(hidden), of which the common direction is a part of 1 / sqrt(2).
    read = common / math.sqrt(recipe.hidden / 2)

    first = model.model.layers[0].self_attn
    # Fast angles tell neighbours apart; 6 of each makes the next-best distance about exp(-3) as likely.
    amount = 6.0 * (angle > 0.05)
    distance = torch.outer(torch.cat([amount, 0 * amount]), read)
    first.k_proj.weight.copy_(distance.repeat(recipe.kv_heads, 1))
    value = first.v_proj.weight
    value.sub_(torch.outer(value @ common, common))
    # said[i] reads, from layer 1 on, which token stood i back.
    said = [value[:size]]
    for head in range(recipe.heads):
        turn = (head + 1) * angle
        query = torch.cat([amount * turn.cos(), -amount * turn.sin()])
        first.q_proj.weight[head * size :][:size] = torch.outer(query, read)
        said.append(first.o_proj.weight[:, head * size :][:, :size].T)

    # Slow angles match at any distance.
    slow = (angle < 0.0015).repeat(2)[:, None]

    for layer in model.model.layers[1:3]:
        attention = layer.self_attn
        for key_head in range(recipe.kv_heads):
            asked = offered = torch.zeros(size, recipe.hidden)
            for i in range(key_head * group, (key_head + 1) * group):
                # Each of the three by dimensions of its own, as far as there are enough.
                turned = nn.init.orthogonal_(torch.empty(size, size))
                asked = asked + turned @ F.normalize(said[i], dim=1)
                offered = offered + turned @ F.normalize(said[i + 1], dim=1)
            attention.k_proj.weight[key_head * size :][:size] = slow * offered
            attention.q_proj.weight[key_head * group * size :][: group * size] = (slow * asked).repeat(group, 1)


def train(
    out: str | Path,
    *,
    name: str = "lm",
    steps: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    resume: bool = True,
    corpus: str | Path | None = None,
    recipe: Recipe | None = None,
    measure: bool = True,
    save_every: float = 120.0,
    log_every: int = 50,
    on_step: Callable[[int], None] | None = None,
) -> Path:
    """Trains the checkpoint `name` of SIZES into the directory `out` and returns it.

    steps, recipe: instead of the name's own. threads: worker processes of one thread each (all cores by default).
    corpus: a text file, instead of the Debian packages. An interrupted run keeps `<out>.resume.safetensors` (saved
    every `save_every` seconds and on Ctrl-C) and goes on from there; so does a finished one when asked for more
    steps. on_step is called after every step with its number.
    """
    out, own = Path(out), SIZES[name]
    recipe, steps = recipe or own[0], steps or own[1]
    fewest = min(rows for _, _, rows in recipe.stages)
    threads = threads or min(os.cpu_count() or 1, fewest)
    if corpus is None:
        corpus = debian.default()
        if not corpus.exists():
            debian.build(corpus)
    corpus = Path(corpus)
    if not corpus.is_file():
        raise ValueError(f"zoo: expected corpus to be a text file, got {corpus}: give the path of one")
    if threads > fewest:
        raise ValueError(
            f"zoo: expected at most {fewest} threads (the fewest sequences in a step), got {threads}: "
            "choose fewer threads"
        )
    job = _Job(name, out, steps, seed, threads, resume, corpus, recipe, save_every, log_every)
    with tempfile.TemporaryDirectory() as meeting:
        context = torch.multiprocessing.get_context("spawn")
        others = [
            context.Process(target=_work, args=(rank, job, f"file://{meeting}/ranks"), daemon=True)
            for rank in range(1, threads)
        ]
        before = torch.get_num_threads()
        try:
            for other in others:
                other.start()
            _work(0, job, f"file://{meeting}/ranks", on_step)
        finally:
            torch.set_num_threads(before)
            for other in others:
                other.terminate()
                other.join()
    if measure:
        record(out)
    return out


@dataclass(frozen=True)
class _Job:
    name: str
    out: Path
    steps: int
    seed: int
    threads: int
    resume: bool
    corpus: Path
    recipe: Recipe
    save_every: float
    log_every: int

    @property
    def resume_file(self) -> Path:
        return self.out.with_name(self.out.name + ".resume.safetensors")


def _work(rank: int, job: _Job, meeting: str, on_step: Callable[[int], None] | None = None) -> None:
    """One worker: every step it makes its share of the rows, and all workers apply the same mean gradient."""
    torch.set_num_threads(1)
    if job.threads > 1:
        # A day: a worker may be stopped for a while, to leave the machine to somebody's measurement.
        dist.init_process_group(
            "gloo", init_method=meeting, rank=rank, world_size=job.threads, timeout=timedelta(days=1)
        )
    try:
        _steps(rank, job, on_step)
    finally:
        if job.threads > 1:
            dist.destroy_process_group()


def _steps(rank: int, job: _Job, on_step: Callable[[int], None] | None) -> None:
    recipe = job.recipe
    corpus = job.corpus.read_bytes()
    torch.manual_seed(job.seed)
    model = build_model(recipe).train()
    params = dict(model.named_parameters())
    matrices = [p for name, p in params.items() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in params.items() if p.ndim != 2 or "embed" in name]
    # Muon reached in 71 steps of length 256 the text loss that AdamW had not reached after 103.
    optimizers = (
        torch.optim.Muon(matrices, weight_decay=recipe.weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, weight_decay=0.0, betas=(0.9, 0.95), fused=True),
    )
    done, seconds, totals = 0, 0.0, [job.steps]
    if job.resume and job.resume_file.exists():
        done, seconds, before = _load(job, params, optimizers)
        totals = [*(total for total in before if total != job.steps), job.steps]

    progress = _Progress(job, done) if rank == 0 else None
    started = saved = time.monotonic()
    try:
        for step in range(done, job.steps):
            length, rows = recipe.size(step, job.steps)
            made = batch(length, rows // job.threads, f"{job.seed}/{step}/{rank}", corpus, recipe.mix, recipe.hard)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = recipe.lr_at(step, job.steps)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(input_ids=made.tokens, use_cache=False).logits
            by_kind = losses(logits, made)
            torch.stack(list(by_kind.values())).sum().backward()
            _average(list(params.values()), job.threads)
            nn.utils.clip_grad_norm_(params.values(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            done = step + 1
            if progress is None:
                continue
            progress.step(done, length, by_kind, logits.detach(), made)
            now = time.monotonic()
            if now - saved > job.save_every:
                _save(job, params, optimizers, done, seconds + now - started, totals)
                saved = now
            if on_step is not None:
                on_step(done)
    finally:
        # Ctrl-C lands here too: at most the step in progress is lost.
        if progress is not None:
            progress.close()
            seconds += time.monotonic() - started
            _save(job, params, optimizers, done, seconds, totals)
    if rank == 0:
        _export(job, model, seconds, totals)


def _average(params: list[nn.Parameter], workers: int) -> None:
    if workers == 1:
        return
    grads = [p.grad for p in params if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads]).div_(workers)
    dist.all_reduce(flat)
    for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(mean.view_as(grad))


def _save(
    job: _Job,
    params: dict[str, nn.Parameter],
    optimizers: Any,
    done: int,
    seconds: float,
    totals: list[int],
) -> None:
    """Weights, optimizer moments and the place in the schedule: one file, replaced in one move."""
    tensors = {}
    for name, p in params.items():
        tensors[name] = p.detach().contiguous()
        for optimizer in optimizers:
            for key, value in optimizer.state.get(p, {}).items():
                tensors[f"{name}/{key}"] = value
    state = {
        "done": done,
        "seconds": seconds,
        "totals": totals,
        "seed": job.seed,
        "recipe": asdict(job.recipe),
    }
    job.resume_file.parent.mkdir(parents=True, exist_ok=True)
    partial_file = job.resume_file.with_suffix(".partial")
    save_file(tensors, partial_file, metadata={"state": json.dumps(state)})
    partial_file.replace(job.resume_file)


def _load(job: _Job, params: dict[str, nn.Parameter], optimizers: Any) -> tuple[int, float, list[int]]:
    with safe_open(job.resume_file, "pt") as file:
        state = json.loads(file.metadata()["state"])
        wanted = json.loads(json.dumps({"seed": job.seed, "recipe": asdict(job.recipe)}))
        differs = {k: (state[k], wanted[k]) for k in wanted if state[k] != wanted[k]}
        if differs:
            raise ValueError(
                f"zoo: {job.resume_file} is of another run: (there, asked) = {differs}. "
                "Ask for the same, or start over with resume=False"
            )
        names = set(file.keys())
        with torch.no_grad():
            for name, p in params.items():
                p.copy_(file.get_tensor(name))
        for optimizer in optimizers:
            for name, p in params.items():
                moments = [n for n in names if n.startswith(f"{name}/")]
                if any(p is q for group in optimizer.param_groups for q in group["params"]) and moments:
                    optimizer.state[p] = {n.rsplit("/", 1)[1]: file.get_tensor(n) for n in moments}
    return state["done"], state["seconds"], state["totals"]


class _Progress:
    """A bar for a person, and a line every `log_every` steps for a log: bits per byte, and answers right."""

    def __init__(self, job: _Job, done: int) -> None:
        from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

        self.bar = Progress(
            *Progress.get_default_columns()[:2],
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.task = self.bar.add_task(job.name, total=job.steps, completed=done)
        self.every, self.steps = job.log_every, job.steps
        self.bits: dict[str, list[float]] = {}
        self.right: dict[str, list[bool]] = {}
        self.bar.start()

    def step(self, done: int, length: int, by_kind: dict[str, Tensor], logits: Tensor, made: Batch) -> None:
        self.bar.update(self.task, completed=done)
        for name, loss in by_kind.items():
            self.bits.setdefault(name, []).append(loss.item() / math.log(2))
        for row, (kind, example) in enumerate(made.examples):
            self.right.setdefault(kind, []).extend(exact(logits[row], example))
        if done % self.every == 0 or done == self.steps:
            told = [f"step {done}/{self.steps} length {length}"]
            for name in (name for name in KINDS if name in self.bits):
                right = self.right.get(name)
                score = f" {100 * sum(right) / len(right):.1f}%" if right else ""
                told.append(f"{name} {sum(self.bits[name]) / len(self.bits[name]):.3f} bits{score}")
            self.bar.console.print(f"{time.strftime('%H:%M:%S')} {' | '.join(told)}", soft_wrap=True)
            self.bar.console.file.flush()
            self.bits, self.right = {}, {}

    def close(self) -> None:
        self.bar.stop()


def _export(job: _Job, model: Any, seconds: float, totals: list[int]) -> None:
    """The host's own format in bfloat16, the tokenizer, and the card."""
    model.to(torch.bfloat16).eval().save_pretrained(job.out)
    tokenizer().save_pretrained(job.out)
    manifest = job.corpus.with_suffix(".json")
    card = {
        "name": job.name,
        "made_by": f"saccade zoo train {job.name}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "recipe": asdict(job.recipe),
        "steps": job.steps,
        # The schedule depends on the total; more than one of them when a finished run was taken further.
        "totals_scheduled": totals,
        "seed": job.seed,
        "workers": job.threads,
        "seconds_trained": round(seconds),
        "torch": torch.__version__,
        "corpus": {
            "bytes": job.corpus.stat().st_size,
            "packages": json.loads(manifest.read_text()) if manifest.exists() else {},
        },
        "heldout": debian.HELDOUT_PACKAGE,
    }
    (job.out / "card.json").write_text(json.dumps(card, indent=1) + "\n")


def tokenizer() -> Any:
    """Bytes as a transformers tokenizer: token i is byte i; <bos> is put in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    # The byte-level alphabet's own order: printable bytes stand for themselves, the others move past 255.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in printable]
    vocab = {chr(byte if byte in printable else 256 + moved.index(byte)): byte for byte in range(256)}
    bytes_only = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_only.decoder = decoders.ByteLevel()
    bytes_only.add_special_tokens(["<bos>", "<eos>", "<pad>"])
    bytes_only.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_only,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        model_max_length=Recipe.positions,
    )


# ------------------------------------------------------------------------------------------ evaluation


@torch.no_grad()
def bits_per_byte(model: nn.Module, source: bytes, context: int = 2048, rows: int = 4) -> float:
    """Each byte predicted from at least half a context before it (windows of `context`, half overlapping)."""
    half, body = context // 2, context - 1
    starts = list(range(0, max(1, len(source) - body + half), half))
    nats, scored = 0.0, 0
    for i in range(0, len(starts), rows):
        windows = [source[start : start + body] for start in starts[i : i + rows]]
        tokens = torch.tensor([[BOS, *w, *[PAD] * (body - len(w))] for w in windows])
        logits = model(input_ids=tokens, use_cache=False).logits.float()
        each = F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
        for row, w in enumerate(windows):
            new = min(scored, len(source)) - starts[i + row]
            nats += each[row, new : len(w)].sum().item()
            scored = starts[i + row] + len(w)
    return nats / math.log(2) / len(source)


@torch.no_grad()
def accuracy(model: nn.Module, task: str, length: int, *, examples: int = 64, seed: int = 1, rows: int = 8) -> float:
    """Share of answers with every byte right (argmax, the true bytes before it given), on held-out prose."""
    stream = islice(recall.TASKS[task](length, seed), examples)
    right: list[bool] = []
    while some := list(islice(stream, rows)):
        logits = model(input_ids=torch.stack([e.tokens for e in some]), use_cache=False).logits
        for row, example in enumerate(some):
            right += exact(logits[row], example)
    return sum(right) / len(right)


def evaluate(
    directory: str | Path, *, examples: int = 64, lengths: tuple[int, ...] = (256, 512, 1024, 2048)
) -> dict[str, Any]:
    """What the checkpoint can do: bits per byte beside those of xz, and accuracy[task][length]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    source = heldout()
    return {
        "bits_per_byte": round(bits_per_byte(model, source), 4),
        "xz_bits_per_byte": round(8 * len(lzma.compress(source, preset=9)) / len(source), 4),
        "heldout_bytes": len(source),
        "examples": examples,
        "accuracy": {
            task: {str(n): round(accuracy(model, task, n, examples=examples), 4) for n in lengths}
            for task in recall.TASKS
        },
    }


def record(directory: str | Path, **options: Any) -> dict[str, Any]:
    """Evaluates, and writes the figures into the directory's card.json."""
    file = Path(directory) / "card.json"
    card = json.loads(file.read_text())
    card["skill"] = evaluate(directory, **options)
    file.write_text(json.dumps(card, indent=1) + "\n")
    return card["skill"]
