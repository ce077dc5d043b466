"""Framing: how a whole image becomes one of a run's size in training: crop, mirror image, and the views of
it that exist.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageOps

from tessellar.data.crops import (
    CROPS_PER_RATIO,
    Resize,
    Size,
    center_crop,
    center_square,
    random_crop,
    random_square,
    sides,
    ten_crop,
)
from tessellar.errors import UserError
from tessellar.protocol.arguments import in_ranges

Crop = Literal["adm", "random", "ten", "center", "none"]
CROPS = ("adm", "random", "ten", "center", "none")
RESIZED_CROPS = ("random", "center")  # those that a fixed resize may precede
DRAWS = 4  # random numbers a visit


@in_ranges
@dataclass(frozen=True)
class Framing:
    """To `size` x `size` pixels, or to (height, width); a fixed `resize` is of squares.

    `crop` is "adm" (centre), "random", "ten" (one of ten crops for each of `ten_ratios`, drawn at
    each visit, mirror images included), "center" or "none" (images have the right size). `flip`
    mirrors with probability 0.5.

    `resize` is torchvision's resize to a fixed shorter side, before crops "random" (any position:
    TiTok, VAR) or "center"; without it "random" is LlamaGen's, whose scale is random too.

    `centring`: between these two epochs random crops give way to ADM's centre crop, more and more
    often (BitDance).
    """

    size: Size
    crop: Crop = "adm"
    flip: bool = False
    ten_ratios: tuple[float, ...] = (1.1,)
    resize: Resize | None = None
    centring: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.centring is not None:
            first, last = self.centring
            if self.crop != "random" or self.resize is not None or not 0 <= first < last:
                raise UserError(
                    f"centring is {[first, last]}: two epochs, one before the other, of crop 'random' "
                    "without a resize"
                )
        if not isinstance(self.size, int):
            object.__setattr__(self, "size", square_as_one(self.size))
        if self.crop not in CROPS or min(sides(self.size)) < 1:
            raise ValueError(
                f"crop is {self.crop!r} and size {self.size}; crop must be one of {CROPS}, size positive"
            )
        if self.crop == "ten" and (self.flip or not self.ten_ratios or min(self.ten_ratios) < 1):
            raise ValueError(
                f"ten-crop needs ratios of at least 1, not {self.ten_ratios}, and holds mirror images: flip off"
            )
        if self.resize is not None and self.crop not in RESIZED_CROPS:
            raise UserError(
                f"resize goes with crop 'random' or 'center'; crop {self.crop!r} resizes by its own rule"
            )
        if self.resize is not None and not isinstance(self.size, int):
            raise UserError(
                f"resize is to a square; images of {self.size} take crop 'adm' or 'random'"
            )
        if self.resize is None and self.crop == "center":
            raise UserError(
                "crop 'center' needs a resize, such as {ratio: 1.0, filter: bicubic}; 'adm' needs none"
            )

    def still(self) -> "Framing":
        """The one view that serves for validation and as a reference."""
        return Framing(self.size, "none" if self.crop == "none" else "adm")

    @property
    def num_views(self) -> int:
        """How many views there are of one image; raises UserError for random crops, which have no
        end.
        """
        if self.crop == "random":
            raise UserError(
                "random crops cannot be enumerated; take crop 'adm' or 'ten' for a cache"
            )
        return CROPS_PER_RATIO * len(self.ten_ratios) if self.crop == "ten" else 1 + self.flip

    def view(self, image: Image.Image, k: int, where: str) -> Image.Image:
        """View `k` in [0, num_views) of a whole image; `where` names it should its size be wrong."""
        if not 0 <= k < self.num_views:
            raise ValueError(f"view is {k}; there are {self.num_views}")
        if self.crop == "ten":
            return ten_crop(
                image, self.size, k % CROPS_PER_RATIO, self.ten_ratios[k // CROPS_PER_RATIO]
            )
        if self.crop == "adm":
            image = center_crop(image, self.size)
        elif self.resize is not None:
            side = sides(self.size)[0]
            image = center_square(self.resize(image, side), side)
        elif image.size != sides(self.size)[::-1]:
            height, width = sides(self.size)
            raise UserError(
                f"{where} is {image.width}x{image.height}; crop 'none' needs {width}x{height}"
            )
        return ImageOps.mirror(image) if k else image

    def random_share(self, epoch: int) -> float:
        """The share of an epoch's visits that random crops have; the others are centre crops."""
        if self.centring is None:
            return 1.0
        first, last = self.centring
        return min(1.0, max(0.0, (last - epoch) / (last - first)))

    def draw(
        self, image: Image.Image, draws: Sequence[float], where: str, epoch: int = 0
    ) -> Image.Image:
        """The view that DRAWS numbers in [0, 1) choose."""
        if self.crop != "random":
            return self.view(image, int(draws[0] * self.num_views), where)
        # Its first bit says whether the image is mirrored; the others are as good as a fresh number.
        if 2 * draws[0] % 1 >= self.random_share(epoch):
            image = center_crop(image, self.size)
        elif self.resize is None:
            image = random_crop(image, self.size, (draws[1], draws[2], draws[3]))
        else:
            side = sides(self.size)[0]
            image = random_square(self.resize(image, side), side, draws[2], draws[3])
        return ImageOps.mirror(image) if self.flip and draws[0] >= 0.5 else image

    def describe(self) -> list[object]:
        """What distinguishes the views, for fingerprints."""
        facts: list[object] = [
            self.crop,
            self.flip,
            list(self.ten_ratios) if self.crop == "ten" else None,
        ]
        if self.resize is not None:
            facts.append([self.resize.ratio, self.resize.filter])
        if self.centring is not None:
            facts.append(list(self.centring))
        return facts


def square_as_one(size: tuple[int, int]) -> Size:
    """(height, width), but a square's side, so that both ways to write a square are the same."""
    height, width = size
    return height if height == width else (height, width)
