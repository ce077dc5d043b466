"""Logits: tokens that are independent given what came before. Speculative decoding and search need this kind."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tessellar.models.heads.distribution import Distribution
from tessellar.sampling.choice import Choice
from tessellar.sampling.noise import Noise


@dataclass(frozen=True)
class Logits(Distribution):
    """Categorical logits [B, T, V], float32; a vocabulary smaller than V is padded with -inf."""

    logits: Tensor

    def sample(self, sampler: Choice, noise: Noise) -> Tensor:
        return sampler.draw(self.logits, noise)

    def cross_entropy(self, tokens: Tensor, weight: Tensor | None = None) -> Tensor:
        """Mean cross-entropy in nats a token of `tokens` [B, T]; `weight` [B] weighs (or drops) whole samples."""
        loss = F.cross_entropy(self.logits.flatten(0, 1), tokens.flatten(), reduction="none").view(tokens.shape)
        if weight is None:
            return loss.mean()
        return (loss * weight[:, None]).sum() / (weight.sum() * tokens.shape[1]).clamp(min=torch.finfo(loss.dtype).eps)
