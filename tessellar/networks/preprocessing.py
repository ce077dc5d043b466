"""Images as networks read them."""

import torch
from torch import Tensor
from torch.nn import functional as F


def standardised(
    images: Tensor, size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]
) -> Tensor:
    """Images in about [-1, 1] as a network of a size reads them: clamped, resized (bicubic,
    antialiased), `mean` and `std` of images in [0, 1] taken out.
    """
    unit = (images.float().clamp(-1, 1) + 1) / 2
    if unit.shape[-2:] != size:
        unit = F.interpolate(unit, size, mode="bicubic", antialias=True)
    shift = torch.tensor(mean, device=images.device).view(3, 1, 1)
    scale = torch.tensor(std, device=images.device).view(3, 1, 1)
    return (unit - shift) / scale
