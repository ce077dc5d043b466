"""Distance of Gram matrices of VGG-16's features (style loss, arXiv 1508.06576), as BAR's tokenizer is
trained with it (arXiv 2602.09024): of all its 31 layers.

torchvision's activations overwrite what they read, so that the official list of layers holds each
activation twice and no convolution's own output. Here an activation counts twice.
"""

from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.absent import stays_random
from tessellar.checkpoints.weights import load_strict
from tessellar.errors import UserError
from tessellar.layers.precision import ExactTables, at_least_float32
from tessellar.tensor_files import read_state
from tessellar.tokenizers.losses.logit_distance import MEAN, SIZE, STD
from tessellar.tokenizers.losses.perceptual import VGGFeatures


class GramDistance(ExactTables):
    """Mean squared difference of Gram matrices, summed over layers, [B], of images [B, 3, H, W] in
    [-1, 1], which are resized to `size` pixels a side.

    `vgg` is a path to torchvision's VGG-16 weights (.pth or .safetensors). Raises UserError where
    the file is missing.
    """

    def __init__(self, vgg: str, size: int = SIZE) -> None:
        super().__init__()
        self.size = size
        self.backbone = VGGFeatures()
        if not stays_random(vgg):
            if not Path(vgg).is_file():
                raise UserError(
                    f"the Gram loss needs torchvision's VGG-16 weights; there is no file {vgg}"
                )
            state = {k: v for k, v in read_state(Path(vgg)).items() if k.startswith("features.")}
            load_strict(self.backbone, state, vgg)
        self.last_pooling = nn.MaxPool2d(2)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode."""
        return super().train(False)

    def grams(self, images: Tensor) -> list[tuple[int, Tensor]]:
        """How often each activation or pooling counts, and its Gram matrix [B, C, C] over C H W."""
        # Without antialiasing, as officially.
        images = F.interpolate(at_least_float32(images), (self.size, self.size), mode="bilinear")
        x = (((images + 1) / 2 - self.mean) / self.std).to(images.dtype)
        found = []
        for layer in (*self.backbone.features, self.last_pooling):
            x = layer(x)
            if not isinstance(layer, nn.Conv2d):
                flat = at_least_float32(x).flatten(2)
                gram = flat @ flat.transpose(1, 2) / flat[0].numel()
                found.append((2 if isinstance(layer, nn.ReLU) else 1, gram))
        return found

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.grams(images)
        differences = []
        for (times, ours), (_, theirs) in zip(self.grams(reconstruction), wanted, strict=True):
            differences.append(times * (ours - theirs).square().mean((1, 2)))
        return torch.stack(differences).sum(0)
