"""What stands before the tokens of a generator: a class, or a caption's features (as LlamaGen has
them, 2406.06525).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.protocol.condition import Condition
from tessellar.protocol.conditioner import Conditioner
from tessellar.protocol.conditioning import ClassConditioning, Conditioning
from tessellar.protocol.generator import Prefix
from tessellar.text.conditioners import FeatureConditioner


class ClassPrefix(ClassConditioning, nn.Module):
    """One position: an embedding of the label; the last row stands for no class."""

    length = 1

    def __init__(self, num_classes: int, width: int, dropout: float = 0.0) -> None:
        super().__init__(num_classes, dropout=dropout)
        self.embedding = nn.Embedding(num_classes + 1, width)

    def forward(self, condition: Condition) -> Prefix:
        assert condition.ids is not None
        return Prefix(self.embedding(condition.ids)[:, None])


class CaptionPrefix(Conditioning, nn.Module):
    """`length` positions: projected caption features, padded on the left; the null caption is a
    fixed random buffer.
    """

    def __init__(self, feature_dim: int, length: int, width: int, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.length = length
        self.fc1 = nn.Linear(feature_dim, width, bias=False)
        self.fc2 = nn.Linear(width, width, bias=False)
        self.register_buffer("uncond", torch.randn(length, feature_dim) / math.sqrt(feature_dim))
        self.uncond: Tensor

    def project(self, features: Tensor) -> Tensor:
        """Features [..., F] to embeddings [..., D]."""
        return self.fc2(F.gelu(self.fc1(features), approximate="tanh"))

    def forward(self, condition: Condition) -> Prefix:
        assert condition.features is not None and condition.valid is not None
        if condition.features.shape[1] != self.length:
            raise ValueError(
                f"captions have {condition.features.shape[1]} positions; this model reads {self.length}"
            )
        return Prefix(self.project(condition.features), condition.valid.bool().cpu())

    def conditioner(self) -> Conditioner:
        return FeatureConditioner()

    def null(self, condition: Condition) -> Condition:
        """The null caption, with the same padding as the caption that it replaces."""
        assert condition.features is not None
        return condition._replace(
            features=self.uncond.to(condition.features.dtype).expand_as(condition.features)
        )
