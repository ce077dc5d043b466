"""Noise: one random stream an image, so that an image depends on its own seed and not on its batch."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Noise:
    """Draws of shape [B, *shape], row b from its own generator seeded `seeds[b]`; made on the CPU,
    given on `device`.

    Every draw takes the same number of values from each stream, so image b is the same alone and in
    any batch, on one process and on several, on CPU and on GPU.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.streams = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        self.device = torch.device(device)

    def __len__(self) -> int:
        return len(self.streams)

    def _draw(self, function, *shape: int) -> Tensor:
        return torch.stack([function(*shape, generator=g) for g in self.streams]).to(self.device)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform draws in [0, 1), [B, *shape]."""
        return self._draw(torch.rand, *shape)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal draws [B, *shape]."""
        return self._draw(torch.randn, *shape)

    def exponential(self, *shape: int) -> Tensor:
        """Exp(1) draws, strictly positive, [B, *shape]: -log(1 - u), clamped after the sign."""
        return (-torch.log1p(-self.uniform(*shape))).clamp(min=torch.finfo(torch.float32).tiny)

    def select(self, index: Tensor) -> "Noise":
        """Streams of images `index` [b], continuing where they are; an image named twice gets two
        equal streams.
        """
        chosen = Noise([], self.device)
        chosen.streams = [self.streams[i].clone_state() for i in index.tolist()]
        return chosen

    def part(self, index: Tensor) -> "Noise":
        """The streams of images `index` [b], each named once: what is drawn of them here moves them
        on there.
        """
        chosen = Noise([], self.device)
        chosen.streams = [self.streams[i] for i in index.tolist()]
        return chosen
