"""Which official systems can be imported, and how a file becomes one of our models.

A new system adds one line to SYSTEMS: a function that makes the tokenizer of a state dict, one that makes the generator
of a state dict and its tokenizer, and, where a file may hold either, one that tells them apart.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tessellar.checkpoints.description import HEADER_KEY
from tessellar.checkpoints.reading import load_tokenizer
from tessellar.checkpoints.weights import load_strict
from tessellar.errors import UserError
from tessellar.interop.importer import (
    ImportOptions,
    preferred,
    read_content,
    read_official,
    state_dicts,
    unwrap,
    without_prefix,
)
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.configured import build
from tessellar.protocol.tokenizer import Tokenizer
from tessellar.tensor_files import Weights, read_metadata


@dataclass(frozen=True)
class Official:
    """Importers of one system, as `module:function` below `tessellar`.

    `tokenizer`: (state, ImportOptions) -> Tokenizer; `generator`: (state, Tokenizer, ImportOptions) -> Generator;
    `is_generator`: (state) -> bool, needed where both are given. Beside each importer stands which entry of a training
    checkpoint it takes, TOKENIZER_ENTRIES or GENERATOR_ENTRIES: first the one that the paper evaluates.
    """

    tokenizer: str | None = None
    generator: str | None = None
    is_generator: str | None = None

    def holds_generator(self, state: Mapping[str, Tensor]) -> bool:
        """Whether `state` is the generator's rather than the tokenizer's."""
        if self.is_generator is None:
            return self.tokenizer is None
        return _function(self.is_generator)(state)

    @property
    def tokenizer_entries(self) -> tuple[str, ...]:
        return _entries(self.tokenizer, "TOKENIZER_ENTRIES")

    @property
    def generator_entries(self) -> tuple[str, ...]:
        return _entries(self.generator, "GENERATOR_ENTRIES")

    def read(self, file: str, key: str | None) -> tuple[Mapping[str, Tensor], bool]:
        """The state dict in a file, and whether it is the generator's."""
        content = read_content(file)
        if key is not None:
            state = Weights(unwrap(content, file, key), file)
            return state, self.holds_generator(state)
        found = state_dicts(content) or {"": content}
        name = preferred(found, (*self.generator_entries, *self.tokenizer_entries)) or next(iter(found))
        is_generator = self.holds_generator(without_prefix(dict(found[name])) if found[name] else {})
        order = self.generator_entries if is_generator else self.tokenizer_entries
        return Weights(unwrap(content, file, order=order), file), is_generator


def _entries(importer: str | None, name: str) -> tuple[str, ...]:
    """What stands beside an importer; files that are published flat, without entries, have nothing there."""
    if importer is None:
        return ()
    module = importlib.import_module(f"tessellar.{importer.split(':')[0]}")
    return getattr(module, name, ())


SYSTEMS: dict[str, Official] = {
    "titok": Official("tokenizers.titok.official:import_tokenizer"),
    "one_d_piece": Official("tokenizers.one_d_piece.official:import_tokenizer"),
    "maskgit_vqgan": Official("tokenizers.maskgit_vqgan.official:import_vqgan"),
    "llamagen": Official(
        "tokenizers.llamagen.official:import_tokenizer",
        "models.llamagen.official:import_generator",
        is_generator="models.llamagen.official:is_official",
    ),
    "hita": Official(
        "tokenizers.hita.official:import_tokenizer",
        "models.hita.official:import_generator",
        is_generator="tokenizers.hita.official:is_generator",
    ),
    "maskgit": Official(generator="models.maskgit.official:import_generator"),
    "rar": Official(generator="models.rar.official:import_generator"),
    "retok": Official(
        "tokenizers.retok.official:import_tokenizer",
        "models.retok.official:import_generator",
        is_generator="tokenizers.retok.official:is_generator",
    ),
    "mar": Official(
        "tokenizers.kl_vae.official:import_tokenizer",
        "models.mar.official:import_generator",
        is_generator="models.mar.official:is_generator",
    ),
    "restok": Official(
        "tokenizers.restok.official:import_tokenizer",
        "models.har.official:import_generator",
        is_generator="models.har.official:is_generator",
    ),
    "var": Official(
        "tokenizers.var.official:import_tokenizer",
        "models.var.official:import_generator",
        is_generator="tokenizers.var.official:is_generator",
    ),
    "token_shuffle": Official(generator="models.token_shuffle.official:import_generator"),
    "flextok": Official(
        "tokenizers.flextok.official:import_tokenizer",
        "models.flextok.official:import_generator",
        is_generator="models.flextok.official:is_generator",
    ),
    "xar": Official(
        "tokenizers.kl_vae.official:import_tokenizer",
        "models.xar.official:import_generator",
        is_generator="models.xar.official:is_official",
    ),
}


def import_model(
    system: str, file: str, tokenizer: str | None = None, key: str | None = None, options: ImportOptions | None = None
) -> Tokenizer | ImageGenerator:
    """The tokenizer, or the generator with its tokenizer, of an official file.

    Raises UserError where the system is unknown, the file does not fit, or a generator is given without its tokenizer.
    """
    if system not in SYSTEMS:
        raise UserError(f"there is no importer for {system!r}; there are {', '.join(sorted(SYSTEMS))}")
    official = SYSTEMS[system]
    state, is_generator = official.read(file, key)
    options = replace(options or ImportOptions(), file=file)
    try:
        return _import(official, state, is_generator, tokenizer, options)
    except (IndexError, TypeError, ValueError, RuntimeError) as error:  # sizes that no model can have
        reason = " ".join(str(error).split())
        raise UserError(
            f"the tensors of {file} have other shapes than those of a {system} checkpoint ({reason})"
        ) from error


def _import(
    official: Official, state: Mapping[str, Tensor], is_generator: bool, tokenizer: str | None, options: ImportOptions
) -> Tokenizer | ImageGenerator:
    if not is_generator:
        return _import_tokenizer(official, state, options)
    if tokenizer is None:
        file = options.file
        raise UserError(f"{file} is a generator: give its tokenizer (an export or the official file) as --tokenizer")
    assert official.generator is not None
    own = _tokenizer(official, tokenizer, options)
    generator = _function(official.generator)(state, own, options)
    return ImageGenerator(own, generator, generator.make_conditioner())


def _function(path: str) -> Callable[..., Any]:
    module, name = path.split(":")
    return getattr(importlib.import_module(f"tessellar.{module}"), name)


def _import_tokenizer(official: Official, state: Mapping[str, Tensor], options: ImportOptions) -> Tokenizer:
    if official.tokenizer is None:
        raise UserError("this system has no tokenizer of its own: give an export as --tokenizer")
    return _function(official.tokenizer)(state, options)


def _tokenizer(official: Official, path: str, options: ImportOptions) -> Tokenizer:
    """From an export, or an official file; at `image_size` where one is given."""
    if _is_official_file(Path(path)):
        state = read_official(path, order=official.tokenizer_entries)
        return _import_tokenizer(official, state, replace(options, file=path))
    tokenizer, size = load_tokenizer(path), options.image_size
    if size is None or tokenizer.image_size == (size, size):
        return tokenizer
    return _resized(tokenizer, size)


def _is_official_file(path: Path) -> bool:
    """Whether `path` is a weight file that none of our commands wrote."""
    if path.suffix == ".safetensors" and path.is_file():
        return HEADER_KEY not in read_metadata(path)
    return path.suffix in (".pt", ".pth", ".bin")


def _resized(tokenizer: Tokenizer, image_size: int) -> Tokenizer:
    """The same weights for images of another size, for tokenizers that are convolutional."""
    config = tokenizer.config
    if "image_size" not in config["init_args"]:
        raise UserError(f"{type(tokenizer).__name__} has no image_size to change")
    other = build({**config, "init_args": {**config["init_args"], "image_size": image_size}})
    load_strict(other, tokenizer.state_dict(), f"the tokenizer, at image size {image_size},")
    return other.eval()
