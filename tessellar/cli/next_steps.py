"""What to do after a command has ended: the commands, to be pasted."""

import inspect
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tessellar.cli.spelling import spelled
from tessellar.data.datamodule import ImageDataModule
from tessellar.data.sets.image_folder import ImageFolderData
from tessellar.errors import UserError
from tessellar.pipeline import ImageGenerator
from tessellar.plain_data import read_yaml
from tessellar.protocol.tokenizer import Tokenizer
from tessellar.text.conditioners import TextConditioner

CACHED = "tessellar.data.CachedTokensData"
#: Options of a data set that do not change what a cache of its tokens holds.
OF_TRAINING = ("batch_size", "num_workers", "balance", "seed")
#: Options that say where a data set lies.
PLACES = ("root", "val_root", "shards", "val_shards", "path")


def after_cache(tokenizer: str, model: Tokenizer, data: ImageDataModule, out: str) -> str:
    """How a generator is trained on a cache of tokens."""
    cache = shlex.quote(out)
    given = f"--model.tokenizer {shlex.quote(tokenizer)}"
    if not model.layout.is_categorical:
        return (
            f"next: {spelled('train')} --config CONFIG {given} --data {CACHED} --data.root {cache}"
        )
    images = "--data.images null"
    if isinstance(data, ImageFolderData):  # what measuring reads
        images = (
            f"--data.images.root {shlex.quote(data.root)} --data.images.size {data.image_size[0]}"
        )
    return (
        f"next: {spelled('train')} --config own_images/generator {given} "
        f"--model.generator.num_classes {data.num_classes} --data.root {cache} {images}"
    )


@dataclass(frozen=True)
class Called:
    """How a run was called: the last of its configs, its data set's class and that one's options."""

    config: str
    data: type[ImageDataModule]
    options: Mapping[str, Any]


def next_steps(module: Any, run: Path, called: Called) -> list[str]:
    """Lines on what a finished run is good for: drawing, measuring, training a generator on it."""
    export = shlex.quote(str(run / "export"))
    model = getattr(module, "model", None)
    if not isinstance(model, ImageGenerator):
        told = _generator_of(export, run.name, called)
        return [f"next: measure it: {spelled('evaluate')} model {export}", f"      {told}"]
    if not model.generator.draws_alone:
        drafting = f"--algorithm FlashDrafts --algorithm.model {export}"
        return [f"next: let it draft: {spelled('sample')} GENERATOR {drafting}"]
    asked = " --prompts PROMPTS.txt" if isinstance(model.conditioner, TextConditioner) else ""
    out = shlex.quote(f"outputs/{run.name}")
    return [
        f"next: draw samples: {spelled('sample')} {export}{asked} --out {out}",
        f"      measure it: {spelled('evaluate')} model {export} --count 10000",
    ]


def _generator_of(export: str, name: str, called: Called) -> str:
    """How a generator is trained on a run's tokenizer: by the config beside the tokenizer's."""
    config = Path(called.config).with_name("generator.yaml")
    try:
        theirs = read_yaml(config)["data"]
        cached = theirs["class_path"] == CACHED
        known = theirs.get("init_args") or {}
    except (UserError, OSError, TypeError, KeyError, AttributeError):
        return (
            f"train a generator on it: {spelled('train')} --config CONFIG "
            f"--model.tokenizer {export} (tessellar list configs)"
        )
    if cached:
        out = shlex.quote(f"caches/{name}")
        chosen = f"--data tessellar.data.{called.data.__name__}{_spelled_options(called)}"
        return f"cache its tokens: {spelled('convert')} cache {export} {chosen} --out {out}"
    placed = ""
    for key in PLACES:
        value = called.options.get(key)
        if value is not None and value != known.get(key):
            placed += f" --data.{key} {shlex.quote(str(value))}"
    return (
        f"train a generator on it: {spelled('train')} --config {shlex.quote(str(config))} "
        f"--model.tokenizer {export}{placed}"
    )


def _spelled_options(called: Called) -> str:
    """Options of a data set that are not as it has them by itself."""
    told = ""
    for key, parameter in inspect.signature(called.data).parameters.items():
        value = called.options.get(key)
        default = parameter.default
        if isinstance(default, tuple):  # a config holds lists
            default = list(default)
        if key in OF_TRAINING or value is None or value == default:
            continue
        told += f" --data.{key} {shlex.quote(str(value))}"
    return told
