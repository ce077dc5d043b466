"""A frozen classifier whose opinion of an image is a reward: a timm network from a file that says
what it is, as `evaluate.py extractor --purpose teacher` writes it. Never one that measures.
"""

from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from tessellar.checkpoints.building import build_filled
from tessellar.errors import UserError
from tessellar.layers.precision import ExactTables, at_least_float32
from tessellar.networks.timm_networks import create_network
from tessellar.networks.vision import read_weights


class Classifier(ExactTables):
    """Scores of classes, of images in [-1, 1]; other sizes are resized (bilinear, antialiased).

    Raises UserError for a file that is missing, is an evaluation network or does not say what it
    holds.
    """

    def __init__(self, weights: str) -> None:
        super().__init__()
        file = read_weights(weights)
        facts = file.facts
        if facts is None or facts.num_classes < 1:
            raise UserError(
                f"{weights} does not say that it holds a classifier; `evaluate.py extractor --purpose teacher` "
                "trains one"
            )
        self.file = Path(weights).expanduser()
        self.facts = facts
        # A run with a reward draws the same numbers as one without.
        with torch.random.fork_rng(devices=[]):
            self.network = build_filled(
                lambda: create_network(facts.arch, facts.options, num_classes=facts.num_classes),
                file.state,
                weights,
                weights,
            )
        for name, values in (("mean", facts.mean), ("std", facts.std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, 3, H, W]."""
        images = at_least_float32(images).clamp(-1, 1)
        if tuple(images.shape[-2:]) != tuple(self.facts.image_size):
            images = F.interpolate(
                images, tuple(self.facts.image_size), mode="bilinear", antialias=True
            )
        normalised = ((images + 1) / 2 - self.mean) / self.std
        return at_least_float32(self.network(normalised.to(images.dtype)))
