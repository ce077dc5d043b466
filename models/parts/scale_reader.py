"""Generators of next scales that read maps of their tokenizer: which place is of which scale (VAR,
TokenFlow).
"""

from typing import ClassVar

import torch
from torch import Tensor

from tessellar.models.parts.loop_reader import LoopReader


class ScaleReader(LoopReader):
    """A subclass sets `layout`, `entities` (scales) and `latent_dim`."""

    reads: ClassVar[str] = "the summed maps of a multi-scale tokenizer"
    latent_dim: int

    @property
    def input_dim(self) -> int:
        return self.latent_dim

    @property
    def first(self) -> int:
        """Tokens of the coarsest scale, whose input is the condition alone."""
        return self.entities.sizes[0]

    def scale_of(self, place: Tensor) -> Tensor:
        """Number of the scale of places of the layout; grows past the last one."""
        past = (place - self.layout.length).clamp(min=0)
        return torch.bucketize(place, self.entities.ends[1:], right=True) + past

    def ranks(self, index: Tensor) -> Tensor:
        return (index + self.first).clamp(max=self.layout.length - 1)
