"""PSNR, SSIM and LPIPS of reconstructions against their originals, summed over images and reduced
once.

Conventions, since papers differ: 8-bit pixels, data range 255; PSNR of each image, then the mean
(not the PSNR of the mean error); SSIM with the 11 x 11 Gaussian window of its authors, mean over
channels (LlamaGen's table passes a data range of 2 for [0, 1] pixels, which gives higher values);
LPIPS of pixels in [-1, 1] with the given network.
"""

from typing import NamedTuple

import torch
from einops import reduce
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.distributed import all_reduce_sum
from tessellar.errors import UserError
from tessellar.images import from_uint8

SSIM_WINDOW = 11
SSIM_DEVIATION = 1.5  # of the window, pixels
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2  # of Wang et al. 2004, eq. 13


def psnr(images: Tensor, originals: Tensor) -> Tensor:
    """Decibels of each pair of uint8 images [B, 3, H, W], float64 [B].

    Equal images count as if one value differed by one level: the mean over a set stays finite.
    """
    error = reduce((images.double() - originals.double()).square(), "b c h w -> b", "mean")
    return 10 * torch.log10(255**2 / error.clamp(min=1 / images[0].numel()))


def ssim(images: Tensor, originals: Tensor) -> Tensor:
    """Structural similarity of each pair of uint8 images [B, 3, H, W] (Wang et al. 2004, eq. 13), mean
    over pixels and channels, float64 [B]. Raises UserError where the window is larger than the images.
    """
    if min(images.shape[-2:]) < SSIM_WINDOW:
        raise UserError(
            f"SSIM needs images of at least {SSIM_WINDOW} pixels a side; these are {images.shape[-2:]}"
        )
    x = images.double()
    y = originals.double()
    mean_x = _windowed(x)
    mean_y = _windowed(y)
    # E[xx] - E[x]E[x] is rounded: where an image is flat it may fall below 0.
    variances = (_windowed(x * x) - mean_x.square()).clamp(min=0)
    variances += (_windowed(y * y) - mean_y.square()).clamp(min=0)
    covariance = _windowed(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x.square() + mean_y.square() + C1)
    rest = (2 * covariance + C2) / (variances + C2)
    return reduce(luminance * rest, "b c h w -> b", "mean")


def _windowed(values: Tensor) -> Tensor:
    """Means of `values` [B, C, H, W] under the Gaussian window around each pixel, edges reflected.

    The window is a product: rows, then columns, 22 sums in place of 121.
    """
    distance = torch.arange(SSIM_WINDOW, dtype=values.dtype) - SSIM_WINDOW // 2
    window = torch.exp(-(distance / SSIM_DEVIATION).square() / 2)
    weights = (window / window.sum()).tolist()
    height, width = values.shape[-2:]
    edge = SSIM_WINDOW // 2
    padded = F.pad(values, (edge, edge, edge, edge), mode="reflect")
    along_rows = weights[0] * padded[..., :width]
    for place in range(1, SSIM_WINDOW):
        along_rows.add_(padded[..., place : place + width], alpha=weights[place])
    whole = weights[0] * along_rows[..., :height, :]
    for place in range(1, SSIM_WINDOW):
        whole.add_(along_rows[..., place : place + height, :], alpha=weights[place])
    return whole


class PairedScores(NamedTuple):
    """Means over images; `lpips` is None without a network for it."""

    psnr: float
    ssim: float
    lpips: float | None


class PairedSums:
    """Sums of the scores seen so far. `lpips` maps two batches in [-1, 1] to distances that flatten
    to [B].
    """

    def __init__(self, lpips: nn.Module | None = None) -> None:
        self.lpips = lpips
        self.sums = torch.zeros(4, dtype=torch.float64)  # images, PSNR, SSIM, LPIPS

    def update(self, images: Tensor, originals: Tensor) -> None:
        """Add pairs of uint8 images [B, 3, H, W]."""
        if images.shape != originals.shape:
            raise UserError(
                f"reconstructions are {tuple(images.shape)}, originals {tuple(originals.shape)}"
            )
        count = torch.ones(len(images))
        distance = torch.zeros(len(images))
        if self.lpips is not None:
            with torch.inference_mode():
                distance = self.lpips(from_uint8(images), from_uint8(originals)).flatten()
        scores = (count, psnr(images, originals), ssim(images, originals), distance)
        for place, score in enumerate(scores):
            self.sums[place] += score.sum().cpu().double()

    def compute(self) -> PairedScores:
        """Means over all ranks."""
        count, *sums = all_reduce_sum(self.sums).tolist()
        means = [s / count for s in sums]
        return PairedScores(means[0], means[1], means[2] if self.lpips else None)
