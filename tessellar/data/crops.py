"""Crops of an image, square or of a size (height, width): the ADM/DiT centre crop, LlamaGen's random and ten crops, and
torchvision's.

The first three shrink first: halve with a box filter while the shorter side is at least twice the
target, then one bicubic resize so that the shorter side equals it (guided-diffusion, arXiv
2105.05233). The random crop resizes the shorter side to a random length in [size, 1.25 size] and
crops anywhere; the ten crops are four corners and centre of the ADM crop to int(ratio * size), then
the same five of its mirror image (LlamaGen, arXiv 2406.06525).

TiTok (arXiv 2406.07550) and VAR (arXiv 2404.02905) resize once, to a fixed shorter side, and crop
at random or at the centre, as torchvision's Resize, RandomCrop and CenterCrop do: `Resize`,
`random_square`, `center_square`.

What papers say of squares holds for rectangles by one rule: the image is resized as far as the
rectangle lies within it, which for a square is the shorter side.
"""

from dataclasses import dataclass
from math import ceil
from typing import Literal

from PIL import Image, ImageOps

from tessellar.errors import UserError
from tessellar.protocol.arguments import in_ranges

Filter = Literal["bilinear", "bicubic", "lanczos"]
FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

MAX_ENLARGEMENT = 1.25
Size = int | tuple[int, int]
"""Side of a square, or (height, width)."""
CROPS_PER_RATIO = 10


def sides(size: Size) -> tuple[int, int]:
    """(height, width) of a size."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def resize_shorter(image: Image.Image, size: Size) -> Image.Image:
    """The image as small as `size` still lies within it, in the same proportions up to rounding: for
    a square its shorter side is that of the square.
    """
    height, width = sides(size)
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    return image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
    )


@in_ranges
@dataclass(frozen=True)
class Resize:
    """One resize to a shorter side of round(ratio * size), whatever the image's size; the longer
    one rounds down.

    Raises UserError for a ratio below 1 (a crop would not fit) and for an unknown filter.
    """

    ratio: float = 1.0
    filter: Filter = "bicubic"

    def __post_init__(self) -> None:
        if self.ratio < 1 or self.filter not in FILTERS:
            raise UserError(
                f"resize has ratio {self.ratio} and filter {self.filter!r}; "
                f"the ratio is at least 1, the filter one of {', '.join(FILTERS)}"
            )

    def __call__(self, image: Image.Image, size: int) -> Image.Image:
        shorter = round(self.ratio * size)
        width, height = image.size
        longer = shorter * max(width, height) // min(width, height)
        target = (shorter, longer) if width <= height else (longer, shorter)
        return image if image.size == target else image.resize(target, FILTERS[self.filter])


def _cut(image: Image.Image, left: int, top: int, size: Size) -> Image.Image:
    height, width = sides(size)
    return image.crop((left, top, left + width, top + height))


def center_crop(image: Image.Image, size: Size) -> Image.Image:
    """ADM centre crop to `size`."""
    image = resize_shorter(image, size)
    height, width = sides(size)
    return _cut(image, (image.width - width) // 2, (image.height - height) // 2, size)


def center_square(image: Image.Image, size: int) -> Image.Image:
    """The central [size, size] of an image that is large enough, as torchvision's CenterCrop places
    it.
    """
    left = round((image.width - size) / 2)
    top = round((image.height - size) / 2)
    return _cut(image, left, top, size)


def random_square(image: Image.Image, size: Size, across: float, down: float) -> Image.Image:
    """`size` of an image that is large enough, anywhere; the draws in [0, 1) choose left and top."""
    height, width = sides(size)
    left = int(across * (image.width - width + 1))
    top = int(down * (image.height - height + 1))
    return _cut(image, left, top, size)


def random_crop(image: Image.Image, size: Size, draws: tuple[float, float, float]) -> Image.Image:
    """LlamaGen's training crop to `size`; `draws` in [0, 1) choose the scale, the left and the top."""
    height, width = sides(size)
    shorter = min(height, width)
    longest = ceil(MAX_ENLARGEMENT * shorter)
    grown = shorter + int(draws[0] * (longest - shorter + 1))
    # Rounded up: what is cut from it has to lie within.
    image = resize_shorter(image, (-(-height * grown // shorter), -(-width * grown // shorter)))
    return random_square(image, size, draws[1], draws[2])


def ten_crop(image: Image.Image, size: Size, view: int, ratio: float = 1.1) -> Image.Image:
    """View 0-4: top left, top right, bottom left, bottom right, centre; 5-9: the same of the mirror
    image.
    """
    if not 0 <= view < CROPS_PER_RATIO:
        raise ValueError(f"view is {view}; it must be in [0, {CROPS_PER_RATIO})")
    height, width = sides(size)
    image = center_crop(image, (int(ratio * height), int(ratio * width)))
    image = ImageOps.mirror(image) if view >= 5 else image
    right = image.width - width
    bottom = image.height - height
    middle = (round(right / 2), round(bottom / 2))
    left, top = [(0, 0), (right, 0), (0, bottom), (right, bottom), middle][view % 5]
    return _cut(image, left, top, size)
