"""What every tokenizer is: images to tokens and back, and a training forward with named auxiliary
losses.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from tessellar.layers.precision import ExactTables
from tessellar.protocol.configured import Configured
from tessellar.protocol.layout import Layout


class TokenizerOutput(NamedTuple):
    """What a training forward gives: reconstruction [B, 3, H, W], tokens, and auxiliary losses
    already weighted.

    `shorter` is a second reconstruction, from fewer tokens, where the tokenizer trains on both. A
    training pass whose losses read no image draws none: its reconstruction is empty, [B, 0, H, W].
    """

    reconstruction: Tensor
    tokens: Tensor
    losses: dict[str, Tensor]
    shorter: Tensor | None = None


class Tokenizer(Configured, ExactTables, ABC):
    """Images [B, 3, H, W] in [-1, 1] to tokens ([B, N], [B, N, F] or [B, N, C] as `layout` says)
    and back.
    """

    layout: Layout
    image_size: tuple[int, int]

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Tokens of the images."""

    def draw(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Tokens of the images as a generator is trained on them: a draw where encoding is random,
        else `encode`.
        """
        return self.encode(images)

    @abstractmethod
    def decode(self, tokens: Tensor) -> Tensor:
        """Images of the tokens, about [-1, 1], not clamped."""

    @abstractmethod
    def forward(self, images: Tensor) -> TokenizerOutput:
        """The training pass; its reconstruction equals `decode(encode(images))` in eval mode."""

    @property
    @abstractmethod
    def last_layer(self) -> Tensor:
        """Weight of the last layer, where the adaptive adversarial weight compares gradients (arXiv
        2012.09841).
        """

    def check_images(self, images: Tensor) -> None:
        """Raise ValueError unless images are [B, 3, H, W] of this tokenizer's size."""
        if images.shape[1:] != (3, *self.image_size):
            raise ValueError(
                f"images have shape {tuple(images.shape)}; this tokenizer needs [B, 3, *{self.image_size}]"
            )
