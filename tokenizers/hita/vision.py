"""The vision model as Hita reads it: images blurred and resized its own way, class token and
patches in one sequence.

Hita (arXiv 2507.02358) shrinks images with kornia's anti-aliasing (a Gaussian whose width follows
the factor), bicubic with aligned corners, clamped. Register tokens are dropped.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from tessellar.layers.precision import at_least_float32
from tessellar.networks.vision import VisionModel


class HitaVision(VisionModel):
    """A VisionModel with Hita's preprocessing; `sequence` is what its encoder takes."""

    def prepare(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] to the network's size, in [0, 1]."""
        images = blurred(at_least_float32(images), images.shape[-2] / self.input_size[0])
        resized = F.interpolate(images, self.input_size, mode="bicubic", align_corners=True)
        return (resized.clamp(-1, 1) + 1) / 2

    def preprocess(self, images: Tensor) -> Tensor:
        return (self.prepare(images) - self.mean) / self.std

    @torch.no_grad()
    def sequence(self, images: Tensor) -> Tensor:
        """Class token (where the network has one), then patches [B, 1 + h w, D]."""
        found = self.features(images)
        return torch.cat([found.prefix[:, :1], found.patches], 1)


def blurred(images: Tensor, factor: float) -> Tensor:
    """Gaussian blur against aliasing when shrinking by `factor`, reflected at the border; nothing
    for factor <= 1.
    """
    if factor <= 1:
        return images
    sigma = max((factor - 1) / 2, 0.001)
    size = int(max(4 * sigma, 3)) // 2 * 2 + 1
    place = torch.arange(size, dtype=torch.float32, device=images.device) - size // 2
    weights = torch.exp(-(place**2) / (2 * sigma**2))
    weights = (weights / weights.sum()).expand(images.shape[1], 1, 1, -1)
    padded = F.pad(images, (size // 2,) * 4, mode="reflect")
    rows = F.conv2d(padded, weights, groups=images.shape[1])
    return F.conv2d(rows, weights.transpose(2, 3), groups=images.shape[1])
