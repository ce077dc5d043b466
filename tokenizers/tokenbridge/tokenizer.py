"""TokenBridge's tokenizer (arXiv 2503.16430): any continuous tokenizer, each channel of whose
latents is quantised alone to a fixed grid, without training.

A token is a vector of indices. Caches hold the posterior of the continuous tokenizer, which is
drawn anew at each visit and then quantised, so one cache serves every grid. Different from the
official code: the quantisation belongs to the tokenizer, not to the generator.
"""

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.protocol.layout import Continuous, Factorized, Layout
from tessellar.protocol.tokenizer import Tokenizer, TokenizerOutput
from tessellar.tokenizers.kl_vae.tokenizer import KL16_SCALE, kl16
from tessellar.tokenizers.parts.inner import inner_tokenizer
from tessellar.tokenizers.tokenbridge.grid import ChannelGrid, Spacing


class PostQuantized(Tokenizer):
    """`tokenizer` (or the path of one), frozen, with continuous latents of unit variance.

    `levels` values of each channel in [`lowest`, `highest`] (`grid.py`). Raises UserError for a
    tokenizer that has ids.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | str,
        levels: int = 64,
        lowest: float = -5.0,
        highest: float = 5.0,
        spread: float = 3.0,
        spacing: Spacing = "gaussian",
    ) -> None:
        super().__init__()
        tokenizer = inner_tokenizer(self, tokenizer)
        kind = tokenizer.layout.segments[0].kind
        if not isinstance(kind, Continuous):
            raise UserError(
                f"channels are quantised of continuous latents; this tokenizer gives {tokenizer.layout}"
            )
        self.tokenizer = tokenizer
        self.image_size = tokenizer.image_size
        self.grid = ChannelGrid(levels, lowest, highest, spread=spread, spacing=spacing)
        indices = Factorized((levels,) * kind.dim)
        segments = (replace(segment, kind=indices) for segment in tokenizer.layout.segments)
        self.layout = Layout(tuple(segments), tokenizer.layout.min_prefix)
        self.requires_grad_(False)

    @property
    def last_layer(self) -> Tensor:
        return self.tokenizer.last_layer

    is_derived: ClassVar[bool] = True

    @property
    def source(self) -> Tokenizer:
        return self.tokenizer

    def from_source(self, tokens: Tensor) -> Tensor:
        """Indices [B, N, C] of latents [B, N, C]."""
        return self.grid.quantize(tokens)

    def to_source(self, tokens: Tensor) -> Tensor:
        """Latents [B, N, C] that indices [B, N, C] stand for."""
        return self.grid.dequantize(tokens)

    def encode(self, images: Tensor) -> Tensor:
        return self.from_source(self.tokenizer.encode(images))

    def draw(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.from_source(self.tokenizer.draw(images, generator))

    def decode(self, tokens: Tensor) -> Tensor:
        self.layout.check(tokens)
        return self.tokenizer.decode(self.to_source(tokens))

    def forward(self, images: Tensor) -> TokenizerOutput:
        """Nothing is trained: no losses."""
        tokens = self.encode(images)
        return TokenizerOutput(self.decode(tokens), tokens, {})


# Published: MAR's KL-16 as it is, 64 levels in +-5 (rFID 0.53 on ImageNet's validation set).
def tokenbridge_kl16(
    image_size: int | tuple[int, int] = 256, levels: int = 64, highest: float = 5.0
) -> PostQuantized:
    """66,456,019 parameters; 16 x 16 tokens of 16 channels at 256 pixels."""
    return PostQuantized(
        kl16(image_size, scale=KL16_SCALE), levels, lowest=-highest, highest=highest
    )
