"""TiTok's perceptual loss (arXiv 2406.07550): distance of a ConvNeXt-S classifier's logits, alone
or beside LPIPS.

torchvision's network and its ImageNet weights (convnext_small, IMAGENET1K_V1) from a path. Always
in eval mode.
"""

from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.absent import stays_random
from tessellar.checkpoints.weights import load_strict
from tessellar.errors import UserError
from tessellar.layers.precision import ExactTables, at_least_float32
from tessellar.protocol.arguments import in_ranges
from tessellar.protocol.ranges import check_name
from tessellar.tensor_files import read_state

SIZE = 224
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def existing(weights: str) -> Path:
    """The path of a file; raises UserError where there is none."""
    path = Path(weights)
    if not path.is_file():
        raise UserError(
            f"the perceptual loss needs torchvision's ConvNeXt-S weights; there is no file {path}"
        )
    return path


class LogitDistance(ExactTables):
    """Mean squared difference of logits, [B], of images [B, 3, H, W] in [-1, 1].

    `weights` is a path to torchvision's ConvNeXt-S (.pth or .safetensors). Images are resized to 224
    pixels by antialiased `interpolation` (BAR's is bicubic). Raises UserError where the file is
    missing.
    """

    def __init__(
        self, weights: str, interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    ) -> None:
        super().__init__()
        check_name("interpolation", interpolation, ("bilinear", "bicubic"))
        self.interpolation = interpolation
        self.network = classifier()
        if not stays_random(weights):
            load_strict(self.network, read_state(existing(weights)), weights)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode."""
        return super().train(False)

    def logits(self, images: Tensor) -> Tensor:
        """Scores of the classes, [B, 1000]."""
        images = F.interpolate(
            at_least_float32(images), (SIZE, SIZE), mode=self.interpolation, antialias=True
        )
        normalised = ((images + 1) / 2 - self.mean) / self.std
        return at_least_float32(self.network(normalised.to(images.dtype)))

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.logits(images)
        return (self.logits(reconstruction) - target).square().mean(1)


@in_ranges
class WeightedDistances(nn.Module):
    """Sum of perceptual distances times their weights, [B]; raises UserError where the numbers of
    both differ.
    """

    def __init__(self, distances: list[nn.Module], weights: list[float]) -> None:
        super().__init__()
        if len(distances) != len(weights) or not distances:
            raise UserError(
                f"there are {len(distances)} distances and {len(weights)} weights; give one weight each"
            )
        self.distances = nn.ModuleList(distances)
        self.weights = list(weights)

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        found = [
            w * d(images, reconstruction).flatten()
            for w, d in zip(self.weights, self.distances, strict=True)
        ]
        return torch.stack(found).sum(0)


def classifier() -> nn.Module:
    """The untrained network; importing torchvision takes seconds."""
    from torchvision.models import convnext_small

    return convnext_small()
