"""Which official systems can be imported, and how a file becomes one of our models."""

from pathlib import Path

from torch import Tensor

from tessellar.construct import build
from tessellar.errors import UserError
from tessellar.interop import llamagen
from tessellar.interop.checkpoint import HEADER_KEY
from tessellar.interop.importer import read_official
from tessellar.interop.load import load_tokenizer
from tessellar.interop.weights import load_strict, read_safetensors
from tessellar.models.conditioners import ClassConditioner, FeatureConditioner
from tessellar.pipeline import ImageGenerator
from tessellar.tokenizers.base import Tokenizer

SYSTEMS = ("llamagen",)


def import_model(
    system: str,
    file: str,
    tokenizer: str | None = None,
    image_size: int | None = None,
    num_heads: int | None = None,
    key: str | None = None,
) -> Tokenizer | ImageGenerator:
    """The tokenizer, or the generator with its tokenizer, of an official file.

    Raises UserError where the system is unknown, the file does not fit, or a generator is given without its tokenizer.
    """
    if system not in SYSTEMS:
        raise UserError(f"there is no importer for {system!r}; there are {', '.join(SYSTEMS)}")
    state = read_official(file, key)
    if not llamagen.is_official(state):
        return _llamagen_tokenizer(state, image_size or 256)
    if tokenizer is None:
        raise UserError(f"{file} is a generator: give its tokenizer (an export or the official file) as --tokenizer")
    return _llamagen_generator(state, _tokenizer(tokenizer, image_size), num_heads)


def _llamagen_tokenizer(state: dict[str, Tensor], image_size: int) -> Tokenizer:
    from tessellar.interop import llamagen_vq

    return llamagen_vq.tokenizer_from_official(state, image_size)


def _llamagen_generator(state: dict[str, Tensor], tokenizer: Tokenizer, num_heads: int | None) -> ImageGenerator:
    generator = llamagen.from_official(state, tokenizer.layout, num_heads)
    classes = llamagen.sizes_of(state).num_classes
    conditioner = FeatureConditioner() if classes is None else ClassConditioner(classes)
    return ImageGenerator(tokenizer, generator, conditioner)


def _tokenizer(path: str, image_size: int | None) -> Tokenizer:
    """From an export, or an official file; at `image_size` where one is given."""
    if _is_official_file(Path(path)):
        return _llamagen_tokenizer(read_official(path), image_size or 256)
    tokenizer = load_tokenizer(path)
    if image_size is None or tokenizer.image_size == (image_size, image_size):
        return tokenizer
    return _resized(tokenizer, image_size)


def _is_official_file(path: Path) -> bool:
    """Whether `path` is a weight file that none of our commands wrote."""
    if path.suffix == ".safetensors" and path.is_file():
        return HEADER_KEY not in read_safetensors(path)[1]
    return path.suffix in (".pt", ".pth", ".bin")


def _resized(tokenizer: Tokenizer, image_size: int) -> Tokenizer:
    """The same weights for images of another size, for tokenizers that are convolutional."""
    config = tokenizer.config
    if "image_size" not in config["init_args"]:
        raise UserError(f"{type(tokenizer).__name__} has no image_size to change")
    other = build({**config, "init_args": {**config["init_args"], "image_size": image_size}})
    load_strict(other, tokenizer.state_dict(), f"the tokenizer, at image size {image_size},")
    return other.eval()
