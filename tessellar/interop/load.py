"""`load`: a Tokenizer or an ImageGenerator from an export, one safetensors file, a training checkpoint or a hub id.

Strict and safe: every tensor must be there and fit, files are safetensors or opened with `weights_only=True`, and
classes are built only from this package. A checkpoint gives its averaged (EMA) weights unless `raw` is asked for.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tessellar.construct import build
from tessellar.errors import UserError
from tessellar.interop.card import Record, record_from
from tessellar.interop.checkpoint import HEADER_KEY, PARTS, check_config, checkpoint_tensors
from tessellar.interop.export import CONFIG, WEIGHTS
from tessellar.interop.hub import fetch, is_hub_id
from tessellar.interop.weights import listing, load_strict, read_pickle, read_safetensors, require_file
from tessellar.models.conditioners import Conditioner
from tessellar.models.generator import Generator
from tessellar.pipeline import ImageGenerator
from tessellar.tokenizers.base import Tokenizer

log = logging.getLogger(__name__)
TYPES: dict[str, type] = {"tokenizer": Tokenizer, "generator": Generator, "conditioner": Conditioner}


@dataclass(frozen=True)
class Source:
    """A model as read from a file: its description and its tensors under `tokenizer.`, `generator.`, ..."""

    where: str
    description: dict[str, Any]
    tensors: dict[str, Tensor]
    weights: str  # raw, ema, official; empty where the file does not say

    @property
    def kind(self) -> str:
        return self.description["kind"]

    @property
    def record(self) -> Record:
        return record_from(self.description.get("record"))

    def state(self, part: str) -> dict[str, Tensor]:
        """State dict of one part."""
        prefix = f"{part}."
        return {k.removeprefix(prefix): t for k, t in self.tensors.items() if k.startswith(prefix)}

    def build(self, part: str) -> Any:
        """One part, rebuilt from its config and filled with its tensors; raises UserError where they do not fit."""
        expected = TYPES.get(part, nn.Module)
        try:
            with _NoInitialisation():
                module = build(self.description[part], expected, f"{self.where}: the {part}")
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.where}: the {part} cannot be built from its config ({error})") from error
        if not isinstance(module, expected):
            raise UserError(f"{self.where}: {type(module).__name__} is not a {part}")
        load_strict(module, self.state(part), f"{self.where} ({part})")
        return module.eval()


def load(path: str | Path, *, raw: bool = False) -> Tokenizer | ImageGenerator:
    """The model at `path`: an export's folder or safetensors file, a `.ckpt`, or a hub id `owner/name[@revision]`.

    Checkpoints give the averaged weights where there are any, or with `raw` those of the last step. On the CPU, in
    eval mode. Raises UserError, in one line, for whatever cannot be loaded.
    """
    return assemble(read_source(path, raw=raw))


def load_tokenizer(path: str | Path, *, raw: bool = False) -> Tokenizer:
    """As `load`, but only a tokenizer will do."""
    model = load(path, raw=raw)
    if not isinstance(model, Tokenizer):
        raise UserError(f"{path} is a generator; a tokenizer is needed here")
    return model


def load_generator(path: str | Path, *, raw: bool = False) -> ImageGenerator:
    """As `load`, but only a generator will do."""
    model = load(path, raw=raw)
    if not isinstance(model, ImageGenerator):
        raise UserError(f"{path} is a tokenizer; a generator is needed here")
    return model


def assemble(source: Source) -> Tokenizer | ImageGenerator:
    """The model of a source."""
    known = {part for part in PARTS if part in source.description}
    stray = [name for name in source.tensors if name.split(".")[0] not in known]
    if stray:
        raise UserError(f"{source.where} holds tensors of no part: {listing('unknown', stray)}")
    if source.kind == "tokenizer":
        return source.build("tokenizer")
    return ImageGenerator(*(source.build(part) for part in ("tokenizer", "generator", "conditioner"))).eval()


def init_tokenizer(path: str | Path, tokenizer: Tokenizer, discriminator: nn.Module | None = None) -> None:
    """Start fine-tuning: weights at `path` into a tokenizer and, where the file has one, its discriminator.

    A discriminator that the file lacks stays as it was made, which is logged in one line. Raises UserError where sizes
    differ.
    """
    source = read_source(path)
    load_strict(tokenizer, source.state("tokenizer"), f"{source.where} (tokenizer)")
    if discriminator is None:
        return
    if "discriminator" in source.description:
        load_strict(discriminator, source.state("discriminator"), f"{source.where} (discriminator)")
    else:
        log.info("%s has no discriminator: training starts with a fresh one", source.where)


def init_generator(path: str | Path, generator: Generator) -> None:
    """Start fine-tuning: weights at `path` into a generator; raises UserError where sizes differ."""
    source = read_source(path)
    if source.kind != "generator":
        raise UserError(f"{path} is a tokenizer; a generator is needed here")
    load_strict(generator, source.state("generator"), f"{source.where} (generator)")


def read_source(path: str | Path, *, raw: bool = False) -> Source:
    """What is at `path`, read but not built."""
    local = Path(path).expanduser()
    if not local.exists():
        if not is_hub_id(str(path)):
            raise UserError(f"{path} does not exist")
        local = fetch(str(path))
    if local.is_dir():
        source = _read_folder(local)
    elif local.suffix == ".safetensors":
        source = _read_single(local)
    elif local.suffix == ".ckpt":
        return _read_checkpoint(local, raw)
    else:
        raise UserError(
            f"{path} is none of: export folder, .safetensors, .ckpt. An official file is read by `convert.py import`"
        )
    if raw and source.weights == "ema":
        raise UserError(f"{path} holds averaged weights only; the raw ones are in the run's checkpoint")
    return source


def _read_folder(folder: Path) -> Source:
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        inside = [p.parent for p in folder.glob(f"*/{WEIGHTS}")] or sorted(folder.glob("**/*.ckpt"))
        hint = f"; did you mean {inside[-1]}?" if inside else ""
        raise UserError(f"{folder} is not an export: it needs {CONFIG} and {WEIGHTS}{hint}")
    try:
        config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{folder / CONFIG} is not YAML ({' '.join(str(error).split())[:120]})") from error
    tensors, _ = read_safetensors(folder / WEIGHTS)
    return _source(folder, check_config(config, str(folder / CONFIG)), tensors)


def _read_single(path: Path) -> Source:
    tensors, metadata = read_safetensors(path)
    if HEADER_KEY not in metadata:
        raise UserError(f"{path} was not exported by tessellar; an official file is read by `convert.py import`")
    return _source(path, _description(metadata[HEADER_KEY], path), tensors)


def _source(path: Path, description: dict[str, Any], tensors: dict[str, Tensor]) -> Source:
    return Source(str(path), description, tensors, record_from(description.get("record")).weights)


def _read_checkpoint(path: Path, raw: bool) -> Source:
    require_file(path)
    content = read_pickle(path)
    if not isinstance(content, dict) or HEADER_KEY not in content:
        raise UserError(f"{path} is not a checkpoint of this project's training: it does not describe its model")
    description = _description(content[HEADER_KEY], path)
    tensors, weights = checkpoint_tensors(content, description, raw, str(path))
    steps = content.get("global_step")
    record = {"weights": weights, "steps": steps} if isinstance(steps, int) else {"weights": weights}
    return Source(str(path), {**description, "record": record}, tensors, weights)


def _description(text: Any, path: Path) -> dict[str, Any]:
    try:
        return check_config(json.loads(text), str(path))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: its description is not JSON ({error})") from error


class _NoInitialisation(TorchFunctionMode):
    """Leaves parameters as allocated: `load_strict` fills each of them, and drawing billions of values is slow."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == torch.nn.init.__name__:
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))
