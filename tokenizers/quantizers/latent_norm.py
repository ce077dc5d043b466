"""Latents of an encoder without a law, such as MingTok's (arXiv 2510.06590): tokens are latents less
their mean, by their standard deviation, two numbers for all channels.
"""

from typing import ClassVar

import torch
from torch import Tensor

from tessellar.layers.precision import at_least_float32
from tessellar.protocol.arguments import POSITIVE
from tessellar.protocol.layout import Continuous
from tessellar.protocol.ranges import check_number
from tessellar.protocol.tokenizer import Quantizer, QuantizerOutput
from tessellar.tokenizers.quantizers.gaussian import followed, scale_of


class LatentNorm(Quantizer):
    """Latents [..., dim] to tokens (z - center) * scale.

    Both are measured while training and stored with the weights; `mean` and `deviation` fix them.
    Raises UserError where one is given without the other, or is no number.
    """

    ranges: ClassVar = {"deviation": POSITIVE}

    def __init__(self, dim: int, mean: float | None = None, deviation: float | None = None) -> None:
        super().__init__()
        self.kind = Continuous(dim)
        self.dim = dim
        self.measures = mean is None and deviation is None
        mean = 0.0 if mean is None else mean
        deviation = 1.0 if deviation is None else deviation
        check_number("mean of LatentNorm", mean)
        check_number("deviation of LatentNorm", deviation, above=0)
        self.register_buffer("center", torch.tensor(float(mean)))
        self.register_buffer("scale", torch.tensor(1 / deviation))
        self.register_buffer("moments", torch.zeros(2))
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.center: Tensor
        self.scale: Tensor
        self.moments: Tensor  # running mean and mean square
        self.passes: Tensor

    def forward(self, z: Tensor) -> QuantizerOutput:
        if self.training:
            self.measure(z.detach())
        return QuantizerOutput(z, self.encode(z), {})

    def encode(self, z: Tensor) -> Tensor:
        return (at_least_float32(z) - self.center) * self.scale

    def decode(self, tokens: Tensor) -> Tensor:
        return tokens / self.scale + self.center

    @torch.no_grad()
    def measure(self, latents: Tensor) -> None:
        """Follow mean and standard deviation of latents, unless they are fixed."""
        if not self.measures:
            return
        values = latents.to(self.moments.dtype)
        now = torch.stack([values.mean(), values.square().mean()])
        moments = followed(self.moments, self.passes, now)
        self.passes += torch.isfinite(now).all()
        self.moments.copy_(moments)
        measured = self.passes > 0
        self.center.copy_(torch.where(measured, moments[0], self.center))
        self.scale.copy_(torch.where(measured, scale_of(moments), self.scale))

    def forget(self) -> None:
        """Tokens are latents."""
        self.center.fill_(0.0)
        self.scale.fill_(1.0)

    def normalise(self, moments: Tensor) -> None:
        """Tokens of mean 0 and variance 1, of the mean and the mean square [2, dim] of latents."""
        of_all = moments.mean(1)
        self.center.copy_(of_all[0])
        self.scale.copy_(scale_of(of_all))
