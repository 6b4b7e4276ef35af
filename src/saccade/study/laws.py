"""Laws: what every system must obey, given what it promises.

``check(MySystem)`` builds the system and holds it to each law in turn. A law passes, fails with what it saw, or is
skipped with the reason; a law never passes because there was nothing to look at. Inputs are seeded and, unless a law
is about precision, float64: what differs then differs for a reason.
"""

from __future__ import annotations

import copy
import inspect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from ..core import masks
from ..core.attend import attention, explain, weights
from ..core.errors import Unsupported
from ..core.spec import Attention
from ..core.tile import At
from ..systems.base import CacheSystem, LayerSystem, MethodSystem, Promises, StudySystem, System

Status = Literal["passed", "failed", "skipped"]

HEADS, WIDTH = 4, 8
TIGHT = 1e-9  # of float64, relative to the largest value
GROWTH = 0.15  # by how much the measured exponent may exceed the promised one
DTYPES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}  # error relative to the norm


@dataclass(frozen=True)
class LawResult:
    """What came of holding one system to one law."""

    law: str
    status: Status
    detail: str
    seconds: float


class Broken(Exception):  # noqa: N818  (a finding, not an error)
    """The law does not hold; the message says what was seen."""


class Skipped(Exception):  # noqa: N818
    """The law does not apply; the message says why."""


LAWS: dict[str, Callable[[Case], str]] = {}


def law(function: Callable[[Case], str]) -> Callable[[Case], str]:
    """Enter a law under its function's name; it returns what it measured, or raises Broken or Skipped."""
    LAWS[function.__name__.replace("_", " ")] = function
    return function


def check(system_cls: type[System], settings: dict[str, Any] | None = None) -> list[LawResult]:
    """Hold a system to every law, in a fixed order; the global random state is left as it was.

    Args:
        system_cls: the system.
        settings: arguments of its constructor; its defaults where not given.

    Returns:
        One result per law. If the system cannot even be built, a single failed one called "builds".
    """
    results = []
    with torch.random.fork_rng():
        start = time.perf_counter()
        laws: dict[str, Callable[[Any], str]] = LAWS
        case: Any
        try:
            if issubclass(system_cls, (CacheSystem, MethodSystem, LayerSystem, StudySystem)):
                from . import hosted_laws, layer_laws, study_laws

                kinds: dict[type[System], dict[str, Callable[[Any], str]]] = {
                    CacheSystem: hosted_laws.CACHE_LAWS,
                    MethodSystem: hosted_laws.METHOD_LAWS,
                    LayerSystem: layer_laws.LAYER_LAWS,
                    StudySystem: study_laws.STUDY_LAWS,
                }
                laws = next(own for kind, own in kinds.items() if issubclass(system_cls, kind))
                case = system_cls(**(settings or {}))
            else:
                case = Case(system_cls, settings or {})
                assert case.spec is not None
        except Exception as error:  # whatever a user's constructor does is a finding
            detail = f"{type(error).__name__}: {error}"
            return [LawResult("builds", "failed", detail, time.perf_counter() - start)]
        for name, function in laws.items():
            start = time.perf_counter()
            status: Status = "passed"
            try:
                detail = function(case)
            except Skipped as reason:
                status, detail = "skipped", str(reason)
            except Broken as seen:
                status, detail = "failed", str(seen)
            except Exception as error:  # a mechanism that crashes has broken the law
                status, detail = "failed", f"{type(error).__name__}: {error}"
            results.append(LawResult(name, status, detail, round(time.perf_counter() - start, 3)))
    return results


class Case:
    """One system under the laws: its program, its promises, and inputs to run it on."""

    def __init__(self, system_cls: type[System], settings: dict[str, Any]):
        self.system_cls, self.given = system_cls, settings
        self.system = system_cls(**settings)
        self.promises: Promises = self.system.promised()

    @cached_property
    def spec(self) -> Attention:
        """The program in float64, its learned parts a little away from where they start (zeros hide mistakes)."""
        spec = self.build()
        noise = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in spec.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=noise, dtype=parameter.dtype), alpha=0.1)
        return spec

    def build(self) -> Attention:
        """A fresh program in float64, always the same."""
        torch.manual_seed(0)
        spec = self.system.build(HEADS)
        if not isinstance(spec, Attention):
            raise Broken(f"build returned {type(spec).__name__}, not a saccade.Attention")
        return spec.double()

    def cast(self, dtype: torch.dtype) -> Attention:
        """A copy of the program in another dtype."""
        return copy.deepcopy(self.spec).to(dtype)

    def padded(self, keep: Tensor) -> Attention:
        """A copy that sees only the keys of ``keep`` ``[B, M]``."""
        spec = copy.deepcopy(self.spec)
        spec.mask = spec.mask & masks.Padding(keep)
        return spec


Inputs = Sequence[Tensor]  # queries, keys and values


def draw(
    n: int,
    m: int | None = None,
    *,
    batch: int = 1,
    heads: int = HEADS,
    kv: int = HEADS,
    width: int = WIDTH,
    seed: int = 0,
) -> Inputs:
    """Queries, keys and values from a normal distribution, float64."""
    m = n if m is None else m
    source = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, n, width), (batch, kv, m, width), (batch, kv, m, width + 1))
    q, k, v = (torch.randn(s, generator=source, dtype=torch.float64) for s in shapes)
    return q, k, v


def run(spec: Attention, inputs: Inputs, **options: Any) -> Tensor:
    """The output of a program."""
    q, k, v = inputs
    return attention(q, k, v, spec, **options)


def gap(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value of ``b`` (at least 1); infinite where either is not finite."""
    if a.shape != b.shape or not (a.isfinite().all() and b.isfinite().all()):
        return math.inf
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1))


def gradients(spec: Attention, inputs: Inputs, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """Output, and the gradients of a random linear function of it to q, k, v and every learned part."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = run(spec, leaves, **options)
    up = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(out.dtype)
    wanted = [*leaves, *spec.learned()]
    found = torch.autograd.grad((out * up).sum(), wanted, allow_unused=True)
    return out.detach(), [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True)]


def executors(spec: Attention, inputs: Inputs, **options: Any) -> list[str]:
    """The executors that run this program: always the dense one, and the tiled one if it can."""
    try:
        explain(spec, inputs[0], inputs[1], backend="band", **options)
    except Unsupported:
        return ["reference"]
    return ["reference", "band"]


@law
def settings_are_kept(case: Case) -> str:
    """The constructor stores every setting under its name, untouched, and build changes none."""
    case.system.build(HEADS)
    signature = inspect.signature(case.system_cls).bind(**case.given)
    signature.apply_defaults()
    for name, value in signature.arguments.items():
        if not hasattr(case.system, name):
            raise Broken(f"the setting {name} is not stored as self.{name}")
        if getattr(case.system, name) is not value:
            raise Broken(f"self.{name} is {getattr(case.system, name)!r}, the setting was {value!r}")
    return f"{len(signature.arguments)} settings"


@law
def fast_equals_reference(case: Case) -> str:
    """Tiled output and gradients are the dense ones', for several shapes."""
    worst = 0.0
    shapes: dict[str, Inputs] = {
        "batch 2, grouped heads, N=M=33": draw(33, batch=2, kv=2),
        "one key head, N=M=70": draw(70, kv=1),
        "N=17, M=45": draw(17, 45),
        "N=M=600 (several tiles)": draw(600, kv=2),
    }
    if case.promises.cross and not case.promises.causal:
        shapes["N=45, M=17"] = draw(45, 17)
    for shape, inputs in shapes.items():
        if "band" not in executors(case.spec, inputs):
            raise Skipped("no fast executor runs this program; it is dense")
        fast, slow = (gradients(case.spec, inputs, backend=name) for name in ("band", "reference"))
        names = ["output", "gradient of q", "of k", "of v", *["of a learned part"] * len(fast[1])]
        for name, a, b in zip(names, [fast[0], *fast[1]], [slow[0], *slow[1]], strict=False):
            seen = gap(a, b)
            if not seen <= TIGHT:
                raise Broken(f"{name} differs by {seen:.1e} ({shape})")
            worst = max(worst, seen)
    return f"{len(shapes)} shapes, largest difference {worst:.1e}"


@law
def nothing_flows_from_the_future(case: Case) -> str:
    """Other queries, keys and values after a position change nothing up to it; nor does its gradient reach them."""
    if not case.promises.causal:
        raise Skipped("not promised to be causal")
    inputs, others = draw(70, kv=2), draw(70, kv=2, seed=5)
    names = executors(case.spec, inputs)
    for cut in (1, 37, 64):
        changed = [torch.cat([x[:, :, :cut], y[:, :, cut:]], 2) for x, y in zip(inputs, others, strict=True)]
        for name in names:
            before, after = (run(case.spec, x, backend=name)[:, :, :cut] for x in (inputs, changed))
            if not gap(before, after) <= TIGHT:
                raise Broken(f"the output before position {cut} moves by {gap(before, after):.1e} ({name})")
            leaves = [x.clone().requires_grad_() for x in inputs]
            past = run(case.spec, leaves, backend=name)[:, :, :cut].square().sum()
            for which, grad in zip("qkv", torch.autograd.grad(past, leaves, allow_unused=True), strict=True):
                leak = 0.0 if grad is None else float(grad[:, :, cut:].abs().max())
                if not leak <= TIGHT:
                    raise Broken(
                        f"the output before position {cut} has a gradient of {leak:.1e} to later {which} ({name})"
                    )
    return f"3 positions, {' and '.join(names)}"


@law
def decoding_equals_prefill(case: Case) -> str:
    """One query at a time, and in chunks, over a growing cache gives what the whole sequence gives at once."""
    if not case.promises.decodes:
        raise Skipped("not promised to decode")
    if not case.promises.causal:
        raise Skipped("not causal, so there is no decoding")
    q, k, v = draw(70, kv=2)
    whole = attention(q, k, v, case.spec, offset=0)
    for size in (1, 27):
        pieces = []
        for start in range(0, 70, size):
            stop = min(70, start + size)
            pieces.append(attention(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], case.spec, offset=start))
        seen = gap(torch.cat(pieces, 2), whole)
        if not seen <= TIGHT:
            raise Broken(f"decoding {size} at a time differs from prefill by {seen:.1e}")
    return "70 tokens, 1 and 27 at a time"


LENGTHS = (45, 31, 8)  # of the sequences padded into one batch


def _keep() -> Tensor:
    return torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]


@law
def a_padded_batch_equals_each_alone(case: Case) -> str:
    """Sequences of different lengths, padded on the right, give what each gives alone."""
    if not case.promises.padding:
        raise Skipped("not promised to ignore padding")
    q, k, v = draw(max(LENGTHS), batch=len(LENGTHS), kv=2)
    spec = case.padded(_keep())
    for name in executors(spec, (q, k, v)):
        together = attention(q, k, v, spec, backend=name)
        for i, length in enumerate(LENGTHS):
            alone = run(case.spec, [x[i : i + 1, :, :length] for x in (q, k, v)], backend=name)
            seen = gap(together[i : i + 1, :, :length], alone)
            if not seen <= TIGHT:
                raise Broken(f"a sequence of {length} padded to {max(LENGTHS)} differs by {seen:.1e} ({name})")
    return f"lengths {', '.join(map(str, LENGTHS))}"


@law
def rows_sum_as_promised(case: Case) -> str:
    """The weights of every row that sees a key, or their absolute values, sum to one."""
    if not (case.promises.unit_rows or case.promises.unit_size):
        raise Skipped("no sum promised")
    q, k, v = draw(70, kv=2)
    w = weights(q, k, case.spec).detach()
    total = (w if case.promises.unit_rows else w.abs()).sum(-1)
    at = At.everywhere(1, HEADS, 70, 70, 0, False, q.device)
    sees = case.spec.mask.visible(at).expand(w.shape).any(-1)
    seen = gap(total[sees], torch.ones_like(total[sees]))
    if not seen <= TIGHT:
        raise Broken(f"rows{'' if case.promises.unit_rows else ' of absolute weights'} are off one by {seen:.1e}")
    if case.promises.unit_rows:
        for name in executors(case.spec, (q, k, v)):
            mean = attention(q, k, torch.ones_like(v), case.spec, backend=name)[sees]
            off = gap(mean, torch.ones_like(mean))
            if not off <= TIGHT:
                raise Broken(f"the mean of values that are all one is off by {off:.1e} ({name})")
    return f"{int(sees.sum())} rows, off by {seen:.1e}"


@law
def weights_are_nonnegative(case: Case) -> str:
    """No weight is below zero."""
    if not case.promises.nonnegative:
        raise Skipped("negative weights are part of the mechanism")
    q, k, _ = draw(70, kv=2)
    least = float(weights(3 * q, k, case.spec).detach().min())
    if not least >= 0:
        raise Broken(f"there is a weight of {least:.2g}")
    return f"least {least:.1g}"


class Work(TorchDispatchMode):
    """Counts operations: those of matrix products, and one for every element any other operator writes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = getattr(func, "overloadpacket", None)
        if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:  # unknown to torch's own registry
            self.count += sdpa_flop_count(*(x.shape for x in args[:3]))
        elif packet in flop_registry:
            self.count += flop_registry[packet](*args, **kwargs, out_val=out)
        elif not func.is_view:
            self.count += sum(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))
        return out


@law
def operations_grow_as_promised(case: Case) -> str:
    """Counted operations, tiled and forward, grow no faster than the promised power of the length."""
    sizes = (512, 1024) if case.promises.exponent >= 2 else (2048, 4096)
    spec, counts = case.cast(torch.float32), []
    for n in sizes:
        inputs = tuple(x.float() for x in draw(n))
        name = executors(spec, inputs)[-1]
        with torch.no_grad(), Work() as work:
            run(spec, inputs, backend=name)
        counts.append(work.count)
    slope = math.log(counts[1] / counts[0]) / math.log(sizes[1] / sizes[0])
    if not slope <= case.promises.exponent + GROWTH:
        raise Broken(
            f"operations grow as N^{slope:.2f} from N={sizes[0]} to {sizes[1]}; promised {case.promises.exponent}"
        )
    return f"N^{slope:.2f} from N={sizes[0]} to {sizes[1]}, promised {case.promises.exponent}"


@law
def unread_memory_never_shows(case: Case) -> str:
    """NaN in keys and values that nobody may see, and in fresh memory, reaches neither output nor gradient."""
    q, k, v = draw(max(LENGTHS), batch=len(LENGTHS), kv=2)
    keep = _keep()[:, None, :, None]
    poisoned = (q, k.masked_fill(~keep, math.nan), v.masked_fill(~keep, math.nan))
    spec = case.padded(_keep())
    for name in executors(spec, (q, k, v)):
        for a, b in zip(_flat(spec, poisoned, name), _flat(spec, (q, k, v), name), strict=True):
            if not gap(a, b) <= TIGHT:
                raise Broken(f"NaN in padding shows in the output or a gradient ({name})")
    told = ["padding", _after_the_last_query(case)]
    with _fresh_memory_is_nan():
        for name in executors(case.spec, (q, k, v)):
            if not all(x.isfinite().all() for x in _flat(case.spec, (q, k, v), name)):
                raise Broken(f"memory that was never written shows ({name})")
    return ", ".join([*told, "fresh memory"])


def _flat(spec: Attention, inputs: Inputs, backend: str) -> list[Tensor]:
    out, grads = gradients(spec, inputs, backend=backend)
    return [out, *grads]


def _after_the_last_query(case: Case) -> str:
    """A cache longer than what is filled: what lies after the last query's position must not show."""
    n, m, offset = 40, 130, 30
    at = At.everywhere(1, HEADS, n, m, offset, True, torch.device("cpu"))
    try:
        unseen = case.spec.mask.unseen(at)
    except ValueError as error:
        return f"no cache longer than the sequence ({error})"
    if not case.promises.causal or unseen is None or not bool(unseen.expand(1, 1, 1, m)[..., n + offset :].all()):
        return "no cache longer than the sequence (the mask does not say which keys nobody sees)"
    q, k, v = draw(n, m, kv=2)
    k[:, :, n + offset :] = v[:, :, n + offset :] = math.nan
    for name in executors(case.spec, (q, k, v), offset=offset):
        if not bool(attention(q, k, v, case.spec, offset=offset, backend=name).isfinite().all()):
            raise Broken(f"NaN in the unfilled part of a cache shows ({name})")
    return "the unfilled part of a cache"


@contextmanager
def _fresh_memory_is_nan() -> Iterator[None]:
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


@law
def a_seed_decides_everything(case: Case) -> str:
    """Built and run twice from the same seed: the same bits, forward and backward."""
    inputs = draw(70, kv=2)
    runs: list[Sequence[Tensor]] = []
    for _ in range(2):
        spec = case.build()
        runs.append([*(p.detach() for p in spec.parameters()), *_flat(spec, inputs, "auto")])
    if not all(torch.equal(a, b) for a, b in zip(*runs, strict=True)):
        raise Broken("two runs from the same seed differ")
    return "bit-equal"


@law
def every_dtype_works(case: Case) -> str:
    """float32, float16 and bfloat16 give the float64 result of the same inputs within what they can hold."""
    shown = []
    for dtype, allowed in DTYPES.items():
        inputs = tuple(x.to(dtype) for x in draw(70, kv=2))
        spec = case.cast(torch.float32)  # a program's own tensors stay in float32, as in mixed precision
        out, grads = gradients(spec, inputs)
        exact, exact_grads = gradients(case.spec, tuple(x.double() for x in inputs), backend="reference")
        if out.dtype != dtype:
            raise Broken(f"the output of {dtype} inputs is {out.dtype}")
        errors = []
        for a, b in zip([out, *grads], [exact, *exact_grads], strict=True):
            error = float((a.double() - b).norm() / b.norm().clamp(min=1e-3))
            errors.append(error if math.isfinite(error) else math.inf)
        if not max(errors) <= allowed:
            raise Broken(f"{dtype} is off by {max(errors):.1e} of the norm, allowed {allowed:.0e}")
        shown.append(f"{str(dtype).removeprefix('torch.')} {max(errors):.0e}")
    return ", ".join(shown)
