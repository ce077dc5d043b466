"""A perceptual distance of pictures that are shifted and scaled together: no place is looked at in
one way only.

From ResTok's training (arXiv 2601.03955).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.errors import UserError
from tessellar.protocol.arguments import in_ranges


@in_ranges
class Jittered(nn.Module):
    """`distance` (images, reconstruction) after both are padded by `pad` pixels of their edges, cut
    alike by up to as many on each side, and brought back to their size. Raises UserError for a
    negative `pad`.
    """

    def __init__(self, distance: nn.Module, pad: int = 15) -> None:
        super().__init__()
        if pad < 0:
            raise UserError(f"pad is {pad}; it counts pixels, at least 0")
        self.distance = distance
        self.pad = pad

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        size = images.shape[-2:]
        height, width = (side + 2 * self.pad for side in size)
        top, bottom, left, right = torch.randint(0, self.pad + 1, (4,), device="cpu").tolist()
        pair = F.pad(torch.cat([images, reconstruction]), (self.pad,) * 4, mode="replicate")
        cut = pair[..., top : height - bottom, left : width - right]
        first, second = F.interpolate(cut, size, mode="bicubic", align_corners=False).chunk(2)
        return self.distance(first, second)
