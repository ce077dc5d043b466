"""What every tokenizer is: images to tokens and back, and a training forward with named auxiliary
losses; and what every quantizer in one is: vectors to tokens and back.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tessellar.layers.precision import ExactTables
from tessellar.protocol.configured import Configured
from tessellar.protocol.layout import Kind, Layout


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

    @property
    def source(self) -> "Tokenizer":
        """The tokenizer whose tokens, or their posterior, a cache holds: this one, or the one whose
        tokens this one quantises after training.
        """
        return self

    def from_source(self, tokens: Tensor) -> Tensor:
        """Tokens of those of `source`, wherever training or validation takes them from a cache: a
        posterior is drawn anew at each visit, then quantised here.
        """
        return tokens

    def to_source(self, tokens: Tensor) -> Tensor:
        """Tokens of `source` that these stand for; the inverse of `from_source`, up to what it
        rounds.
        """
        return tokens

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


class QuantizerOutput(NamedTuple):
    """Quantized vectors [B, N, C] (straight-through), tokens [B, N] or [B, N, F], weighted losses."""

    quantized: Tensor
    tokens: Tensor
    losses: dict[str, Tensor]


class Quantizer(Configured, nn.Module, ABC):
    """Channel-last vectors [..., C] to discrete tokens. Works in float32, whatever the precision
    around it.
    """

    kind: Kind
    dim: int

    @property
    def in_dim(self) -> int:
        """Channels of what is quantized; `dim` unless the encoder says more than a vector."""
        return self.dim

    @abstractmethod
    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantize z [B, N, C] for training; gradients pass straight through to z."""

    @abstractmethod
    def encode(self, z: Tensor) -> Tensor:
        """Tokens of z [..., C]."""

    def draw(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Tokens of z as a generator is trained on them: a draw where encoding is random, else
        `encode`.
        """
        return self.encode(z)

    @abstractmethod
    def decode(self, tokens: Tensor) -> Tensor:
        """Vectors [..., C] of tokens; what `forward` returned as `quantized`, up to rounding."""


class GridTokenizer(Tokenizer):
    """A quantizer between an encoder and a decoder, with one vector a cell of the layout in raster
    order.
    """

    quantizer: Quantizer

    @abstractmethod
    def latents(self, images: Tensor) -> Tensor:
        """What is quantized of images [B, 3, H, W]: vectors [B, N, C]."""

    @abstractmethod
    def render(self, vectors: Tensor) -> Tensor:
        """Images [B, 3, H, W], at least float32, of quantized vectors [B, N, C]."""

    def encode(self, images: Tensor) -> Tensor:
        return self.quantizer.encode(self.latents(images))

    def draw(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.quantizer.draw(self.latents(images), generator)

    def decode(self, tokens: Tensor) -> Tensor:
        self.layout.check(tokens)
        return self.render(self.quantizer.decode(tokens))

    def forward(self, images: Tensor) -> TokenizerOutput:
        quantized = self.quantizer(self.latents(images))
        return TokenizerOutput(self.render(quantized.quantized), quantized.tokens, quantized.losses)
