"""One picture, or a mask beside it, as a model reads them: cut to the centre and brought to its size."""

from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from tessellar.data.image_file import read_image
from tessellar.errors import UserError
from tessellar.images import from_uint8


def read_pixels(path: str | Path, size: tuple[int, int]) -> Tensor:
    """The picture of a file as floats [3, H, W] in [-1, 1]; `size` is (height, width).

    Raises UserError for a file that is no picture.
    """
    return fitted_pixels(read_image(path), size)


def fitted_pixels(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """The centre of an RGB image as floats [3, H, W] in [-1, 1]; `size` is (height, width)."""
    return from_uint8(_array(_fitted(image, size)))


def read_mask(path: str | Path, picture: str | Path, size: tuple[int, int]) -> Tensor:
    """The mask of a file, bool [H, W], True where it is light; cut as the picture beside it is.

    Raises UserError for a file that is no picture, of another size than the picture, or of one tone.
    """
    mask = read_image(path)
    shown = read_image(picture)
    if mask.size != shown.size:
        raise UserError(
            f"the mask {path} is {mask.width} x {mask.height}, the picture {picture} {shown.width} x "
            f"{shown.height}: a mask has the size of its picture, light where it is drawn anew"
        )
    light = _array(_fitted(mask, size)).float().mean(0) > 127.5
    if not bool(light.any()):
        raise UserError(f"the mask {path} is dark everywhere: there is nothing to draw anew")
    return light


def _fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The centre of an image at a size (height, width)."""
    height, width = size
    return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)


def _array(image: Image.Image) -> Tensor:
    return rearrange(torch.from_numpy(np.array(image)), "h w c -> c h w")
