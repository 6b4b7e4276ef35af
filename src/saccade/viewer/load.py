"""From what the command line names (a model, texts, an image, a change) to a session."""

from __future__ import annotations

import ast
import inspect
import io
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import catalog, edits
from ..core.errors import SpecError
from ..hosts.handles import edit, install
from ..systems.base import CacheSystem, MethodSystem
from .capture import Capture, Sequence
from .session import Session


def session(
    where: str, *, text: Path | None = None, target: Path | None = None, image: Path | None = None,
    most: int | None = None, layers: Any = None, system: str | None = None, changes: list[str] | tuple[str, ...] = (),
    say: Callable[[str], None] = print,
) -> Session:  # fmt: skip
    """Load a model, run it as it is and, if a system or edits are named, once more with them.

    Args:
        where: directory or Hub id of a transformers model, or a checkpoint of the zoo.
        text, target: files; the target is what an encoder-decoder is to read on its other side.
        image: file.
        most: tokens of each text at most.
        system: slug of the catalogue, with its own settings.
        changes: edits such as ``"Zero(keys=0)"``.
        say: told what takes long.
    """
    model, inputs, sequences = read(where, text, target, image, most)
    changed = [part(change) for change in changes]
    say("running the model")
    runs = {"before": Capture.of(model, inputs, sequences, layers=layers, name=where)}
    if system is not None or changed:
        say("running the model changed")
        with ExitStack() as stack:
            if system is not None:
                stack.enter_context(_installed(model, system))
            if changed:
                stack.enter_context(edit(model, *changed))
            runs["after"] = Capture.of(model, inputs, sequences, layers=layers, name=where)
    return Session(runs)


def read(
    where: str, text: Path | None, target: Path | None, image: Path | None, most: int | None
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A model, the inputs of its forward, and the sequences that they make."""
    import transformers

    from .. import zoo

    place = str(zoo.path(where)) if (zoo.CHECKPOINTS / where / "card.json").is_file() else where
    try:
        config = transformers.AutoConfig.from_pretrained(place)
        kind = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
        model = kind.from_pretrained(place, dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        raise SpecError(f"the model {where} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    inputs: dict[str, Any] = {}
    sequences: dict[str, Any] = {}
    pair = bool(config.is_encoder_decoder)
    for path, field, name in (
        (text, "input_ids", "source" if pair else "text"),
        (target, "decoder_input_ids", "target"),
    ):
        if path is not None:
            inputs[field], sequences[name] = _tokens(place, path, most, config)
    if pair and target is None:
        raise SpecError(f"{where} is an encoder-decoder: give what its decoder reads with --target FILE")
    if image is not None:
        inputs["pixel_values"], sequences["image"] = _patches(place, image, config)
    if not inputs:
        raise SpecError("give what the model is to read: --text FILE or --image FILE")
    takes = inspect.signature(model.forward).parameters
    return model, inputs | {k: v for k, v in {"use_cache": False, "logits_to_keep": 1}.items() if k in takes}, sequences


def _contents(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SpecError(f"cannot read {path}: {error.strerror}") from error


def _tokens(place: str, path: Path, most: int | None, config: Any) -> tuple[Tensor, Sequence]:
    import transformers

    words = _contents(path).decode("utf-8", errors="replace")
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    ids = tokenizer(words, verbose=False)["input_ids"][:most]
    room = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not ids:
        raise SpecError(f"{path} holds no text")
    if room is not None and len(ids) > room:
        raise SpecError(f"{path} has {len(ids)} tokens, the model has room for {room}: cut it with --tokens {room}")
    names = {i: str(tokenizer.decode([i])) for i in set(ids)}
    return torch.tensor([ids]), Sequence([names[i] for i in ids])


def _patches(place: str, path: Path, config: Any) -> tuple[Tensor, Callable[[int], Sequence]]:
    import transformers
    from PIL import Image

    processor = transformers.AutoImageProcessor.from_pretrained(place)
    picture = Image.open(io.BytesIO(_contents(path))).convert("RGB")
    pixels = processor(picture, return_tensors="pt")["pixel_values"]
    seen = pixels[0]
    if getattr(processor, "do_normalize", False):
        mean, std = (torch.tensor(x)[:, None, None] for x in (processor.image_mean, processor.image_std))
        seen = seen * std + mean
    side = getattr(config, "vision_config", config).patch_size
    return pixels, patches(seen, (pixels.shape[-2] // side, pixels.shape[-1] // side))


def patches(pixels: Tensor, grid: tuple[int, int]) -> Callable[[int], Sequence]:
    """The places of an image ``[3, height, width]`` in 0..1 that is cut into a grid; tokens before it have no patch."""
    from PIL import Image

    array = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    png = io.BytesIO()
    Image.fromarray(array).save(png, "PNG")

    def of(length: int) -> Sequence:
        prefix = length - grid[0] * grid[1]
        if prefix < 0:
            raise SpecError(f"the model attends over {length} places, the image has {grid[0]} x {grid[1]} patches")
        names = [f"token {i}" for i in range(prefix)]
        names += [f"patch {row},{column}" for row in range(grid[0]) for column in range(grid[1])]
        return Sequence(names, png.getvalue(), grid, prefix)

    return of


def part(text: str) -> Any:
    """An edit from its constructor as text: ``"Scale(0.5, keys=slice(0, 4))"``; literals and slices alone.

    Raises:
        SpecError: it is something else, or there is no such edit.
    """
    there = sorted(
        n for n, x in vars(edits).items() if isinstance(x, type) and issubclass(x, edits.Edit) and n != "Edit"
    )
    told = SpecError(f"an edit is written as its constructor, such as Zero(keys=0); got {text!r}. There are {there}")

    def value(node: ast.expr) -> Any:
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "slice"
            and not node.keywords
        ):
            return slice(*map(value, node.args))
        return ast.literal_eval(node)

    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id not in there:
            raise told
        return getattr(edits, call.func.id)(
            *map(value, call.args), **{str(k.arg): value(k.value) for k in call.keywords}
        )
    except (SyntaxError, ValueError, TypeError) as error:
        raise told from error


def _installed(model: Any, slug: str) -> AbstractContextManager[Any]:
    kind = catalog.load(slug) if ":" in slug else catalog.find(slug)
    if issubclass(kind, CacheSystem):
        raise SpecError(f"{kind.slug} acts on what is decoded later, not on one reading of a text: nothing to show")
    system = kind()
    return (
        system.apply(model)
        if isinstance(system, MethodSystem)
        else install(model, lambda layer, heads: system.build(heads))
    )
