"""One interface for every quantizer: vectors to tokens and back, with named losses that are already
weighted.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tessellar.protocol.configured import Configured
from tessellar.protocol.layout import Kind


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
