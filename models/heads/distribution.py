"""Distribution: what a generator predicts for a span of tokens. It owns the process of drawing, a sampler the draw."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from tessellar.sampling.noise import Noise


class Distribution(ABC):
    """Prediction of T tokens of each image, guidance included."""

    @abstractmethod
    def sample(self, sampler: Any, noise: Noise) -> Tensor:
        """Tokens [B, T], [B, T, F] or [B, T, C]; `sampler` is the kind that the head needs (`Choice` for logits)."""
