"""Pixel losses: L1, L2 and the L1 of image gradients, which keeps edges that the other two blur."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tessellar.layers.precision import at_least_float32
from tessellar.protocol.arguments import in_ranges


@in_ranges
@dataclass(frozen=True)
class Reconstruction:
    """Weights of the pixel losses; each is a mean over all elements of images [B, 3, H, W] in [-1,
    1].
    """

    l1: float = 0.0
    l2: float = 1.0
    gradient: float = 0.0

    def __call__(self, images: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        """Named losses, not weighted; those of weight 0 are left out."""
        images = at_least_float32(images)
        reconstruction = at_least_float32(reconstruction)
        error = reconstruction - images
        terms = {}
        if self.l1:
            terms["l1"] = error.abs().mean()
        if self.l2:
            terms["l2"] = F.mse_loss(reconstruction, images)
        if self.gradient:
            # The difference of gradients is the gradient of the difference.
            terms["gradient"] = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        return terms

    def weighted(self, terms: dict[str, Tensor]) -> Tensor:
        """Weighted sum of the terms; 0 where there is none."""
        weights = {"l1": self.l1, "l2": self.l2, "gradient": self.gradient}
        return sum((weights[name] * value for name, value in terms.items()), torch.zeros(()))
