"""Pixels in and out: the only place where floats in [-1, 1] become 8-bit values and back.

Papers differ here (rounding, truncation), and a Fréchet distance notices; so there is one rule,
LlamaGen's: uint8(clamp(127.5 x + 128, 0, 255)), which rounds to the nearest level (arXiv
2406.06525, evaluation script).
"""

import logging
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from tessellar.errors import UserError

log = logging.getLogger(__name__)
NOT_PIXELS = 8.0  # floats beyond it are no images in [-1, 1], not even unclamped ones
SLACK = 1.05
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
Pictures = Tensor | np.ndarray | Image.Image | Sequence[Image.Image]


def to_uint8(images: Tensor) -> Tensor:
    """Images [..., H, W] in [-1, 1] (values outside are clamped) to uint8 of the same shape; uint8
    stays as it is.
    """
    if images.dtype == torch.uint8:
        return images
    # 128 = 127.5 + 0.5: the cast truncates, so a half is added to round.
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """uint8 images of any shape to float32 in [-1, 1]; `to_uint8` inverts it exactly."""
    return images.float() / 127.5 - 1


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images [B, 3, H, W], floats in [-1, 1] or uint8, as PIL images."""
    rows = rearrange(to_uint8(images).cpu(), "b c h w -> b h w c").contiguous().numpy()
    return [Image.fromarray(row) for row in rows]


def from_pictures(pictures: Pictures, check_range: bool = True) -> Tensor:
    """Whatever holds pictures as floats [B, 3, H, W] in [-1, 1].

    Taken are: PIL images (one, or several of one size), uint8 tensors [B, 3, H, W], uint8 arrays
    [B, H, W, 3] as image libraries give them, and floats in [-1, 1], which are left as they are.
    Raises UserError for other types, and for floats that cannot be in [-1, 1]; a range that looks
    like another one is warned of. Without `check_range` floats are not looked at, which on a GPU
    would wait for it.
    """
    if isinstance(pictures, Image.Image):
        pictures = [pictures]
    if isinstance(pictures, np.ndarray):
        return _from_array(pictures)
    if isinstance(pictures, Tensor):
        if pictures.dtype == torch.uint8:
            return from_uint8(pictures)
        if not pictures.is_floating_point():
            raise UserError(
                f"images are {pictures.dtype}; needed are uint8 in 0..255, or floats in [-1, 1]"
            )
        if check_range and pictures.numel():
            _check_range(pictures)
        return pictures
    if not pictures or not all(isinstance(picture, Image.Image) for picture in pictures):
        raise UserError(
            "images must be PIL images, uint8, or floats in [-1, 1]; "
            f"given is {type(pictures).__name__} of {len(pictures)}"
        )
    sizes = {picture.size for picture in pictures}
    if len(sizes) > 1:
        raise UserError(f"PIL images of one batch must have one size, not {sorted(sizes)}")
    return _from_array(np.stack([np.asarray(on_white(picture)) for picture in pictures]))


def on_white(picture: Image.Image) -> Image.Image:
    """RGB and upright, what is transparent put on white, as the data sets read files.

    Raises UserError for a mode whose range is not known, such as floats.
    """
    if picture.mode not in MODES:
        raise UserError(f"a PIL image has mode {picture.mode}: convert it to RGB or L first")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        above = picture.convert("RGBA")
        below = Image.new("RGBA", above.size, "white")
        picture = Image.alpha_composite(below, above)
    return picture.convert("RGB")


def _from_array(array: np.ndarray) -> Tensor:
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
        raise UserError(
            f"an array of images must be uint8 [B, H, W, 3], not {array.dtype} {array.shape}; give "
            "floats as a tensor [B, 3, H, W] in [-1, 1]"
        )
    return from_uint8(rearrange(torch.from_numpy(array), "b h w c -> b c h w").contiguous())


def _check_range(images: Tensor) -> None:
    """Raise UserError for floats that are no images in [-1, 1]; warn of those that may not be."""
    bounds = images.detach().aminmax()
    low = float(bounds.min)
    high = float(bounds.max)
    if not (-NOT_PIXELS <= low and high <= NOT_PIXELS):
        raise UserError(
            f"images lie in [{low:g}, {high:g}]; floats must be in [-1, 1] (x / 127.5 - 1 of 0..255), "
            "or give uint8"
        )
    if low < -SLACK or high > SLACK:
        _warn("images reach beyond [-1, 1], which is where floats must lie: not normalised twice?")
    elif low >= 0 and high > 0:
        _warn("images lie in [0, 1]; floats in [-1, 1] are read: 2 x - 1 of [0, 1]")


@cache  # said once: a loop over batches would say it for each
def _warn(line: str) -> None:
    log.warning(line)
