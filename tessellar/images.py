"""Pixels in and out: the only place where floats in [-1, 1] become 8-bit values and back.

Papers differ here (rounding, truncation), and a Fréchet distance notices; so there is one rule,
LlamaGen's: uint8(clamp(127.5 x + 128, 0, 255)), which rounds to the nearest level (arXiv
2406.06525, evaluation script).
"""

import torch
from torch import Tensor


def to_uint8(images: Tensor) -> Tensor:
    """Images [..., H, W] in [-1, 1] (values outside are clamped) to uint8 of the same shape."""
    # 128 = 127.5 + 0.5: the cast truncates, so a half is added to round.
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """uint8 images of any shape to float32 in [-1, 1]; `to_uint8` inverts it exactly."""
    return images.float() / 127.5 - 1
