"""The resizers that published numbers used before their feature network; another resizer is another
metric.

`tf1-bilinear`: TensorFlow 1's bilinear without half-pixel centres (ADM, torch-fidelity, arXiv
1706.08500). `clean-bicubic`: Pillow's antialiased bicubic on each channel as float, not rounded
(clean-fid, arXiv 2104.11222). `torch-bicubic`: torch's antialiased bicubic of floats, not clamped
(FD-loss, arXiv 2604.28190; EDM2). `pil-bicubic`: Pillow's of the 8-bit picture, rounded (dgm-eval).
"""

from collections.abc import Callable

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

Resizer = Callable[[Tensor, tuple[int, int]], Tensor]


def tf1_bilinear(images: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 [B, 3, H, W] to float32 [B, 3, *size] in [0, 255]."""
    if images.shape[-2:] == size:
        return images.float()
    return interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=size, align_corners=False)


def clean_bicubic(images: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 [B, 3, H, W] to float32 [B, 3, *size] in [0, 255]."""
    channels = rearrange(images.cpu().numpy().astype(np.float32), "b c h w -> (b c) h w")
    shape = (size[1], size[0])
    resized = []
    for channel in channels:
        picture = Image.fromarray(channel).resize(shape, Image.Resampling.BICUBIC)
        resized.append(np.asarray(picture))
    stacked = rearrange(torch.from_numpy(np.stack(resized)), "(b c) h w -> b c h w", b=len(images))
    return stacked.clamp(0, 255).to(images.device)


def torch_bicubic(images: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 [B, 3, H, W] to float32 [B, 3, *size] around [0, 255]: bicubic overshoots at edges."""
    return F.interpolate(images.float(), size, mode="bicubic", antialias=True, align_corners=False)


def pil_bicubic(images: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 [B, 3, H, W] to float32 [B, 3, *size], whole numbers in [0, 255]."""
    resized = []
    for picture in rearrange(images.cpu(), "b c h w -> b h w c").numpy():
        shape = (size[1], size[0])
        small = Image.fromarray(picture).resize(shape, Image.Resampling.BICUBIC)
        resized.append(np.asarray(small))
    stacked = torch.from_numpy(np.stack(resized)).to(images.device)
    return rearrange(stacked, "b h w c -> b c h w").float()


RESIZERS: dict[str, Resizer] = {
    "tf1-bilinear": tf1_bilinear,
    "clean-bicubic": clean_bicubic,
    "torch-bicubic": torch_bicubic,
    "pil-bicubic": pil_bicubic,
}
