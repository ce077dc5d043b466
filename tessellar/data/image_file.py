"""One image file to RGB pixels: EXIF rotation, palette, CMYK, 16-bit and alpha (flattened on white)
are resolved here.

Every failure is an UnreadableImage that names the file, also for truncated files and for
decompression bombs. Of an animation the first frame is taken.
"""

import io
import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tessellar.errors import UserError

EXTENSIONS = (".jpeg", ".jpg", ".png", ".webp")
_UNREADABLE = (
    UnidentifiedImageError,
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


class UnreadableImage(UserError):
    """One image is damaged; a data set may skip it (`damage.py`)."""


def read_image(path: str | Path) -> Image.Image:
    """The image in mode RGB, upright; raises UnreadableImage naming the file if it cannot be
    decoded completely.
    """
    return _decode(path, str(path))


def decode_image(content: bytes, name: str) -> Image.Image:
    """As `read_image`, from the bytes of a file; `name` says in errors whose they are."""
    return _decode(io.BytesIO(content), name)


def _decode(source: str | Path | io.BytesIO, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source) as image:
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
    except _UNREADABLE as error:
        reason = (
            "not an image"
            if isinstance(error, UnidentifiedImageError)
            else str(error) or type(error).__name__
        )
        raise UnreadableImage(f"cannot read the image {name}: {reason}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _from_16_bit(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Grey levels of [0, 65535] to [0, 255]; Pillow's own conversion would clip them at 255
    instead.
    """
    levels = np.asarray(image).astype(np.float64)
    return Image.fromarray(np.rint(np.clip(levels / 257, 0, 255)).astype(np.uint8))
