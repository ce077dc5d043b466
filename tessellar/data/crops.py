"""Square crops of an image: the ADM/DiT centre crop, LlamaGen's random and ten crops, and
torchvision's.

The first three shrink first: halve with a box filter while the shorter side is at least twice the
target, then one bicubic resize so that the shorter side equals it (guided-diffusion, arXiv
2105.05233). The random crop resizes the shorter side to a random length in [size, 1.25 size] and
crops anywhere; the ten crops are four corners and centre of the ADM crop to int(ratio * size), then
the same five of its mirror image (LlamaGen, arXiv 2406.06525).

TiTok (arXiv 2406.07550) and VAR (arXiv 2404.02905) resize once, to a fixed shorter side, and crop
at random or at the centre, as torchvision's Resize, RandomCrop and CenterCrop do: `Resize`,
`random_square`, `center_square`.
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
CROPS_PER_RATIO = 10


def resize_shorter(image: Image.Image, shorter: int) -> Image.Image:
    """The image with its shorter side equal to `shorter`, in the same proportions up to rounding."""
    while min(image.size) >= 2 * shorter:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = shorter / min(image.size)
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


def _square(image: Image.Image, left: int, top: int, size: int) -> Image.Image:
    return image.crop((left, top, left + size, top + size))


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM centre crop to [size, size]."""
    image = resize_shorter(image, size)
    return _square(image, (image.width - size) // 2, (image.height - size) // 2, size)


def center_square(image: Image.Image, size: int) -> Image.Image:
    """The central [size, size] of an image that is large enough, as torchvision's CenterCrop places
    it.
    """
    left = round((image.width - size) / 2)
    top = round((image.height - size) / 2)
    return _square(image, left, top, size)


def random_square(image: Image.Image, size: int, across: float, down: float) -> Image.Image:
    """[size, size] of an image that is large enough, anywhere; the draws in [0, 1) choose left and
    top.
    """
    left = int(across * (image.width - size + 1))
    top = int(down * (image.height - size + 1))
    return _square(image, left, top, size)


def random_crop(image: Image.Image, size: int, draws: tuple[float, float, float]) -> Image.Image:
    """LlamaGen's training crop to [size, size]; `draws` in [0, 1) choose the scale, the left and
    the top.
    """
    longest = ceil(MAX_ENLARGEMENT * size)
    image = resize_shorter(image, size + int(draws[0] * (longest - size + 1)))
    return random_square(image, size, draws[1], draws[2])


def ten_crop(image: Image.Image, size: int, view: int, ratio: float = 1.1) -> Image.Image:
    """View 0-4: top left, top right, bottom left, bottom right, centre; 5-9: the same of the mirror
    image.
    """
    if not 0 <= view < CROPS_PER_RATIO:
        raise ValueError(f"view is {view}; it must be in [0, {CROPS_PER_RATIO})")
    image = center_crop(image, int(ratio * size))
    image = ImageOps.mirror(image) if view >= 5 else image
    far = image.width - size
    middle = round(far / 2)
    left, top = [(0, 0), (far, 0), (0, far), (far, far), (middle, middle)][view % 5]
    return _square(image, left, top, size)
