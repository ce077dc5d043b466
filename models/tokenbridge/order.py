"""The order in which channels are predicted: those that hold most of the coarse picture first
(TokenBridge, arXiv 2503.16430).

The paper orders channels by an analysis of frequencies and publishes its outcome for KL-16, not the
procedure. For other tokenizers ours is: the share of a channel's power below a quarter of the
highest frequency, the mean over images, descending.
"""

from collections.abc import Iterable

import torch
from einops import rearrange
from torch import Tensor

from tessellar.errors import UserError
from tessellar.protocol.tokenizer import Tokenizer

KL16_ORDER = (8, 1, 10, 9, 6, 12, 4, 0, 3, 11, 7, 14, 2, 15, 13, 5)
"""The published order of MAR's KL-16."""


def low_frequency_shares(latents: Tensor, coarse: float = 0.25) -> Tensor:
    """[B, C] share of the power of each channel of latents [B, h, w, C] at radial frequencies up to
    `coarse` of the highest along an axis; the mean of a channel is no part of it.
    """
    height, width = latents.shape[1:3]
    power = torch.fft.fft2(latents.double(), dim=(1, 2)).abs().square()
    rows = torch.fft.fftfreq(height, device=latents.device)[:, None]
    columns = torch.fft.fftfreq(width, device=latents.device)[None]
    radius = (rows.square() + columns.square()).sqrt()
    power = power * (radius > 0)[..., None]
    low = (power * (radius <= coarse * 0.5)[..., None]).sum((1, 2))
    return low / power.sum((1, 2)).clamp(min=torch.finfo(torch.float64).tiny)


@torch.no_grad()
def low_frequency_order(tokenizer: Tokenizer, batches: Iterable[Tensor]) -> tuple[int, ...]:
    """Channels of a continuous tokenizer of a grid, by their shares over images [B, 3, H, W].

    Raises UserError for other tokenizers, and where there are no images.
    """
    layout = tokenizer.layout
    if layout.grid is None or not layout.is_continuous:
        raise UserError(f"an order of channels needs one grid of continuous latents, not {layout}")
    total: Tensor | float = 0.0
    count = 0
    for images in batches:
        latents = rearrange(tokenizer.encode(images), "b (h w) c -> b h w c", h=layout.grid[0])
        total = total + low_frequency_shares(latents).sum(0)
        count += len(images)
    if not isinstance(total, Tensor):
        raise UserError("there are no images to order the channels by")
    return tuple((total / count).argsort(descending=True, stable=True).tolist())
