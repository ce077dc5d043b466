"""One image file to RGB pixels: EXIF rotation, palette, CMYK, 16-bit and alpha (flattened on white)
are resolved here.

Only the formats listed here are opened, by content: Pillow knows others that start a program (EPS)
or that nobody trains on. Every failure is an UnreadableImage that names the file, whatever the
decoder raises, also for truncated files, decompression bombs and shapes that no crop could take.

Rules where a file does not tell its range, or holds more than one image:
- 16-bit grey is [0, 65535]; a file whose values all fit into 12 bits is read so too, and said once;
- floats are taken as [0, 1] where all of them lie there, and refused otherwise;
- 32-bit and signed integers are refused;
- of an animation the first frame is taken, of a TIFF with several pages the first page.
"""

import io
import logging
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tessellar.errors import UserError, check_is_file

log = logging.getLogger(__name__)

EXTENSIONS = (".jpeg", ".jpg", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF")  # Pillow's names
# Of the sides: a crop resizes the shorter one, and the longer one with it.
MAX_RATIO = 64
TWELVE_BITS = 4095
# EXIF's tag, and its values for images that lie on a side.
ORIENTATION = 274
QUARTER_TURNS = (5, 6, 7, 8)
# TIFF's tag PhotometricInterpretation, and its value for inverted grey.
WHITE_IS_ZERO = (262, 0)


class UnreadableImage(UserError):
    """One image is damaged; a data set may skip it (`damage.py`)."""


def read_image(path: str | Path) -> Image.Image:
    """The image in mode RGB, upright; raises UnreadableImage naming the file if it cannot be
    decoded completely.
    """
    try:
        check_is_file(path)
    except UserError as error:
        raise UnreadableImage(f"cannot read the image {error}") from error
    return _decode(path, str(path))


def decode_image(content: bytes, name: str) -> Image.Image:
    """As `read_image`, from the bytes of a file; `name` says in errors whose they are."""
    return _decode(io.BytesIO(content), name)


def _decode(source: str | Path | io.BytesIO, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata that nobody reads
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            Image.init()
            # Those of FORMATS that this Pillow was built with.
            formats = [name for name in FORMATS if name in Image.OPEN]
            with Image.open(source, formats=formats) as image:
                check_shape(image)
                image.load()
                # In place: a copy of an upright image, as most are, costs as much as its crop.
                ImageOps.exif_transpose(image, in_place=True)
                return to_rgb(image, name)
    except UnidentifiedImageError as error:
        raise UnreadableImage(
            f"cannot read the image {name}: not an image, or of a format that is not read "
            f"({', '.join(FORMATS)} are)"
        ) from error
    except Exception as error:  # Pillow's decoders raise every kind on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImage(f"cannot read the image {name}: {reason}") from error


def read_shape(source: str | Path | bytes, name: str) -> tuple[int, int]:
    """(height, width) of the upright image in a file, or its bytes, by its header; raises
    UnreadableImage. A PNG's orientation counts where it stands before the pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.init()
            formats = [name for name in FORMATS if name in Image.OPEN]
            file = io.BytesIO(source) if isinstance(source, bytes) else source
            with Image.open(file, formats=formats) as image:
                check_shape(image)
                width, height = image.size
                reads_all = image.format == "PNG" and "exif" not in image.info
                turned = not reads_all and image.getexif().get(ORIENTATION, 1) in QUARTER_TURNS
                return (width, height) if turned else (height, width)
    except Exception as error:  # as in _decode
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImage(f"cannot read the image {name}: {reason}") from error


def check_shape(image: Image.Image) -> None:
    """Raise ValueError for a shape that no crop could take, before its pixels are decoded."""
    shorter, longer = sorted(image.size)
    if shorter < 1 or longer > MAX_RATIO * shorter:
        raise ValueError(
            f"it is {image.width} x {image.height}; a side of more than {MAX_RATIO} times the "
            "other is not read"
        )


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """An upright image in RGB; the very same where it is that already."""
    if image.mode == "F":
        return _from_levels(unit_levels(image), image)
    if image.mode.startswith("I"):
        return _from_levels(levels_of_16_bits(image, name), image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def unit_levels(image: Image.Image) -> np.ndarray:
    """Grey levels in [0, 1] of floats; raises ValueError for floats of any other range."""
    levels = np.asarray(image).astype(np.float64)
    low = float(levels.min())
    high = float(levels.max())
    if not (low >= 0 and high <= 1):  # so written, NaN is refused as well
        raise ValueError(
            f"its values are floats from {low:g} to {high:g}, whose range is not told: save floats "
            "in [0, 1], or 8 or 16 bits"
        )
    return levels


def levels_of_16_bits(image: Image.Image, name: str) -> np.ndarray:
    """Grey levels in [0, 1]; Pillow's own conversion would clip at 255 instead of scaling."""
    # Some versions give 16-bit PNG this mode.
    if image.mode == "I" and getattr(image, "format", None) != "PNG":
        raise ValueError("its values are 32-bit or signed integers, whose range is not told")
    levels = np.asarray(image).astype(np.float64)
    if levels.max() <= TWELVE_BITS:
        tell_dark(name)
    return np.clip(levels / 65535, 0, 1)


class _Once:
    """Lines that a process prints once, whatever the file that is the first."""

    dark = False


def tell_dark(name: str) -> None:
    if not _Once.dark:
        _Once.dark = True
        log.warning(
            "%s has 16 bits, but no value above %d: if its sensor has 12 bits or fewer, such images "
            "are read too dark; scale them to 65535",
            name,
            TWELVE_BITS,
        )


def _from_levels(levels: np.ndarray, file: Image.Image) -> Image.Image:
    """Grey levels in [0, 1] as an RGB image."""
    tag, value = WHITE_IS_ZERO
    if getattr(file, "tag_v2", {}).get(tag) == value:
        levels = 1 - levels
    return Image.fromarray(np.rint(255 * levels).astype(np.uint8)).convert("RGB")
