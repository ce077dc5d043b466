"""How an official file becomes one of our models: its paper's importers are found by their folders."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tessellar.checkpoints.mirror import file_of, local_file
from tessellar.checkpoints.reading import load_tokenizer
from tessellar.checkpoints.weights import load_strict
from tessellar.checkpoints.zoo import ITSELF, Published, published
from tessellar.errors import UserError
from tessellar.interop.files import is_official_file, read_content, unwrap
from tessellar.interop.importer import GeneratorImporter, ImportOptions, TokenizerImporter
from tessellar.pipeline import ImageGenerator, pick_device
from tessellar.protocol.configured import build
from tessellar.protocol.packages import rooms
from tessellar.protocol.tokenizer import Tokenizer

log = logging.getLogger(__name__)

IMAGENET_CLASSES = 1000


@dataclass
class Paper:
    """What `convert.py import NAME` reads: files of tokenizers, files of generators."""

    name: str
    package: str
    tokenizers: list[TokenizerImporter] = field(default_factory=list)
    generators: list[GeneratorImporter] = field(default_factory=list)

    def of_file(
        self, content: Any, where: str, key: str | None
    ) -> TokenizerImporter | GeneratorImporter:
        """The importer whose marks a file shows; raises UserError where none does."""
        importers = [*self.generators, *self.tokenizers]
        for importer in importers:
            if importer.is_in(content, where, key):
                return importer
        entries: list[str] = []
        wanted = []
        for importer in importers:
            entries += importer.entries
            wanted.append(f"not the weights of {importer.what} (they have {importer.marks[0]})")
        # Raises where there are no weights, or too many.
        unwrap(content, where, key, entries, evaluated=False)
        raise UserError(f"{where} holds nothing of {self.name}: {', '.join(wanted)}")


def papers() -> dict[str, Paper]:
    """Every paper with an importer, by its name."""
    found: dict[str, Paper] = {}
    for room in rooms("official"):
        # One importer or several; none where the folder is no paper's (quantizers).
        official = getattr(room.module(), "OFFICIAL", ())
        for importer in official if isinstance(official, tuple) else (official,):
            name = importer.paper or room.paper
            paper = found.setdefault(name, Paper(name, room.package))
            if room.package != paper.package:
                raise UserError(
                    f"{paper.package} and {room.package} both have a paper {name!r}: rename that folder"
                )
            if isinstance(importer, TokenizerImporter):
                paper.tokenizers.append(importer)
            elif isinstance(importer, GeneratorImporter):
                paper.generators.append(importer)
    for paper in found.values():
        for generator in paper.generators:
            if generator.tokenizer and generator.tokenizer not in found:
                raise UserError(
                    f"{generator.what} reads the tokenizer of {generator.tokenizer!r}, which is no paper"
                )
            if generator.tokenizer:
                paper.tokenizers += found[generator.tokenizer].tokenizers
    return dict(sorted(found.items()))


def import_model(
    name: str,
    file: str,
    tokenizer: str | Tokenizer | None = None,
    key: str | None = None,
    options: ImportOptions | None = None,
) -> Tokenizer | ImageGenerator:
    """The tokenizer, or the generator with its tokenizer, of an official file of a paper.

    `file` and `tokenizer` are paths, or files of the hub (`hub:OWNER/REPO/FILE`). Raises UserError where
    the paper is unknown, the file does not fit or cannot be had, or a generator is given without its
    tokenizer.
    """
    known = papers()
    if name not in known:
        raise UserError(
            f"there is no importer for {name!r}; there are {', '.join(known)}; others' packages are named by --package"
        )
    paper = known[name]
    file = local_file(file)
    if isinstance(tokenizer, str):
        tokenizer = local_file(tokenizer)
    content = read_content(file)
    importer = paper.of_file(content, file, key)
    state = importer.read(content, file, key)
    options = replace(options or ImportOptions(), file=file)
    try:
        if isinstance(importer, TokenizerImporter):
            return importer.build(state, options)
        return _generator(paper, importer, state, tokenizer, options)
    except UserError:
        raise
    except (IndexError, TypeError, ValueError, RuntimeError) as error:
        # Sizes that no model can have.
        reason = " ".join(str(error).split())
        raise UserError(
            f"the tensors of {file} have other shapes than those of a {name} checkpoint ({reason})"
        ) from error


def import_published(name: str) -> Tokenizer | ImageGenerator:
    """The model of a published checkpoint by its name in the zoo, a generator with its tokenizer and,
    of ImageNet's classes, their names.

    Raises UserError where there is none of that name, or a file of it cannot be had.
    """
    checkpoint = published(name)
    file = file_of(checkpoint)
    tokenizer = _published_tokenizer(checkpoint, str(file))
    options = ImportOptions(**checkpoint.options)
    model = import_model(checkpoint.system, str(file), tokenizer, options=options)
    check_size(model, checkpoint)
    if isinstance(model, ImageGenerator):
        name_classes(model)
    return model


def load_published(
    name: str, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Tokenizer | ImageGenerator:
    """`import_published` on a device, in a precision."""
    return import_published(name).to(device=pick_device(device), dtype=dtype)


def load_published_generator(
    name: str, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> ImageGenerator:
    """As `load_published`, but only a generator will do; told before a file is read."""
    if published(name).kind != "generator":
        raise UserError(f"{name} is a tokenizer; a generator is needed here")
    model = load_published(name, device=device, dtype=dtype)
    assert isinstance(model, ImageGenerator), name
    return model


def load_published_tokenizer(
    name: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    image_size: tuple[int, int] | None = None,
) -> Tokenizer:
    """As `load_published`, but only a tokenizer will do; of a convolutional one for images of
    `image_size` (height, width).
    """
    if published(name).kind != "tokenizer":
        raise UserError(f"{name} is a generator; a tokenizer is needed here")
    model = load_published(name, device=device, dtype=dtype)
    assert isinstance(model, Tokenizer), name
    if image_size is not None:
        like = next(model.parameters())
        model = resized(model, list(image_size)).to(device=like.device, dtype=like.dtype)
    return model


def _published_tokenizer(checkpoint: Published, file: str) -> str | Tokenizer | None:
    """What a published generator reads: its own file, or another of the zoo at its image size."""
    if checkpoint.kind == "tokenizer":
        return None
    if checkpoint.tokenizer == ITSELF:
        return file
    own = published(checkpoint.tokenizer)
    options = ImportOptions(**{**own.options, **checkpoint.options})
    made = import_model(own.system, str(file_of(own)), options=options)
    assert isinstance(made, Tokenizer), own.name
    return made


def check_size(model: Tokenizer | ImageGenerator, checkpoint: Published) -> None:
    """One line where a file holds another number of parameters than its entry states."""
    part = model.generator if isinstance(model, ImageGenerator) else model
    count = sum(parameter.numel() for parameter in part.parameters())
    if checkpoint.parameters not in (None, count):
        log.warning(
            "%s has %s parameters, as published it has %s",
            checkpoint.name,
            f"{count:,}",
            f"{checkpoint.parameters:,}",
        )


def name_classes(model: ImageGenerator) -> None:
    """ImageNet's names for a published generator of as many classes: all such are of it."""
    if model.num_classes == IMAGENET_CLASSES:
        model.class_names = imagenet_names()


def imagenet_names() -> tuple[str, ...]:
    """Names of ImageNet's 1,000 classes in the usual order, each once: the first of its synonyms,
    or all of them where another class has the same first.
    """
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    synonyms = list(map(info.index_to_description, range(IMAGENET_CLASSES)))
    first = [each.split(",")[0] for each in synonyms]
    for label, name in enumerate(synonyms):
        if first.count(name.split(",")[0]) == 1:
            synonyms[label] = name.split(",")[0]
    names = []
    for label, name in enumerate(synonyms):
        names.append(name if synonyms.count(name) == 1 else f"{name} ({label})")
    return tuple(names)


def _generator(
    paper: Paper,
    importer: GeneratorImporter,
    state: Mapping[str, Any],
    tokenizer: str | Tokenizer | None,
    options: ImportOptions,
) -> ImageGenerator:
    if tokenizer is None:
        file = options.file
        raise UserError(
            f"{file} is a generator: give its tokenizer (an export or the official file) as --tokenizer"
        )
    own = tokenizer
    if isinstance(tokenizer, str):
        own = _tokenizer(paper, tokenizer, options)
    assert isinstance(own, Tokenizer)
    generator = importer.build(state, own.layout, options)
    return ImageGenerator(own, generator, generator.make_conditioner())


def _tokenizer(paper: Paper, path: str, options: ImportOptions) -> Tokenizer:
    """From an export, or an official file; at `image_size` where one is given."""
    if is_official_file(path):
        if not paper.tokenizers:
            raise UserError(
                f"{paper.name} has no tokenizer of its own: give an export as --tokenizer"
            )
        content = read_content(path)
        importer = Paper(paper.name, paper.package, paper.tokenizers).of_file(content, path, None)
        assert isinstance(importer, TokenizerImporter)
        return importer.build(importer.read(content, path), replace(options, file=path))
    tokenizer = load_tokenizer(path)
    size = options.image_size
    if size is None or tokenizer.image_size == (size, size):
        return tokenizer
    return resized(tokenizer, size)


def resized(tokenizer: Tokenizer, image_size: int | list[int]) -> Tokenizer:
    """The same weights for images of another size (a side, or height and width), for tokenizers that are
    convolutional.
    """
    config = tokenizer.config
    if "image_size" not in config["init_args"]:
        raise UserError(f"{type(tokenizer).__name__} has no image_size to change")
    other = build({**config, "init_args": {**config["init_args"], "image_size": image_size}})
    load_strict(other, tokenizer.state_dict(), f"the tokenizer, at image size {image_size},")
    return other.eval()
