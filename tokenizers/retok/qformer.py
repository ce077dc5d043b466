"""ReToK's Q-Formers: a map of features to ordered tokens, and the first of them back to a map
(arXiv 2601.01535).

Queries start as averages over ever finer blocks of the map (GigaTok, arXiv 2504.08736), and the
redundant ones as copies of the last of them; there are no learned queries. The decoder's positions
all start as the first token.
"""

from dataclasses import dataclass
from math import log2
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.layers.qformer import QFormerLayer, QKVAttention
from tessellar.layers.starts import start_layers
from tessellar.protocol.arguments import in_ranges
from tessellar.tokenizers.losses.alignment import projection


@in_ranges
@dataclass(frozen=True)
class QFormerSize:
    """Width, number of layers and heads of a Q-Former."""

    width: int
    depth: int
    num_heads: int


def block_grid(group: int) -> tuple[int, int]:
    """Rows and columns of blocks that the queries of a group average: 1, 1, 2, 4, 8, ... blocks,
    wide before high.
    """
    level = max(group - 1, 0)
    return 2 ** (level // 2), 2 ** (level - level // 2)


def pooled_queries(memory: Tensor, side: int, count: int) -> Tensor:
    """Averages of memory [B, side^2, D] over blocks, coarse to fine: [B, count, D]; `count` is a
    power of two.
    """
    maps = rearrange(memory, "b (h w) d -> b d h w", h=side)
    groups = (F.adaptive_avg_pool2d(maps, block_grid(i)) for i in range(int(log2(count)) + 1))
    return torch.cat([rearrange(group, "b d h w -> b (h w) d") for group in groups], dim=1)


def table(length: int, width: int) -> nn.Parameter:
    """Learned positions [length, width]."""
    return nn.Parameter(torch.randn(length, width) * width**-0.5)


class TokenEncoder(nn.Module):
    """Map [B, z, side, side] to latents of all tokens, redundant ones last [B, N + M, z]."""

    def __init__(
        self, side: int, tokens: int, redundant: int, z: int, size: QFormerSize, attention: str
    ) -> None:
        super().__init__()
        self.side = side
        self.tokens = tokens
        self.redundant = redundant
        self.norm_in = nn.LayerNorm(z)
        self.embed = nn.Linear(z, size.width)
        self.project = nn.Linear(size.width, size.width)
        self.memory_positions = table(side**2, size.width)
        self.positions = table(tokens, size.width)
        self.redundant_positions = table(redundant, size.width)
        self.layers = _layers(size, attention)
        self.norm_out = nn.LayerNorm(size.width)
        self.out = nn.Linear(size.width, z)

    def queries(self, memory: Tensor) -> Tensor:
        """Pooled queries, then copies of the last M of them: [B, N + M, D]."""
        real = pooled_queries(memory, self.side, self.tokens)
        return self.project(torch.cat([real, real[:, self.tokens - self.redundant :]], dim=1))

    def forward(self, spatial: Tensor) -> Tensor:
        memory = self.embed(self.norm_in(rearrange(spatial, "b z h w -> b (h w) z")))
        x = self.queries(memory)
        positions = torch.cat([self.positions, self.redundant_positions])
        for layer in self.layers:
            x = layer(x, memory, positions, self.memory_positions)
        return self.out(self.norm_out(x))


class Spread(NamedTuple):
    """A map [B, z, side, side] and, where it is read, what the teacher is compared with [B, side^2,
    D].
    """

    spatial: Tensor
    semantic: Tensor | None


class TokenDecoder(nn.Module):
    """The first k latents [B, k, z] to a map; every position starts as the first of them."""

    def __init__(
        self,
        side: int,
        tokens: int,
        redundant: int,
        z: int,
        size: QFormerSize,
        semantic_dim: int | None,
        semantic_layer: int,
        attention: str,
    ) -> None:
        super().__init__()
        self.side = side
        self.semantic_layer = semantic_layer
        self.norm_in = nn.LayerNorm(z)
        self.embed = nn.Linear(z, size.width)
        self.positions = table(side**2, size.width)
        self.memory_positions = table(tokens, size.width)
        self.redundant_positions = table(redundant, size.width)
        self.layers = _layers(size, attention)
        self.norm_out = nn.LayerNorm(size.width)
        self.conv_out = nn.Conv2d(size.width, z, 3, padding=1)
        self.semantic = projection(size.width, semantic_dim) if semantic_dim else None

    def forward(self, latents: Tensor, visible: Tensor | None = None) -> Spread:
        """`visible` [B, k] hides latents of some images (False); the first is always seen."""
        memory = self.embed(self.norm_in(latents))
        x = memory[:, :1].expand(-1, self.side**2, -1)
        memory_positions = torch.cat([self.memory_positions, self.redundant_positions])[
            : latents.shape[1]
        ]
        semantic = None
        for number, layer in enumerate(self.layers, start=1):
            x = layer(x, memory, self.positions, memory_positions, visible)
            if number == self.semantic_layer and self.semantic is not None and self.training:
                semantic = self.semantic(x)
        x = rearrange(self.norm_out(x), "b (h w) d -> b d h w", h=self.side).contiguous()
        return Spread(self.conv_out(x), semantic)


def _layers(size: QFormerSize, attention: str) -> nn.ModuleList:
    return nn.ModuleList(
        QFormerLayer(size.width, size.num_heads, attention=attention) for _ in range(size.depth)
    )


def init_weights(module: nn.Module, small: bool) -> None:
    """Initialisation, before the quantizer and its projections are there, which keep torch's.

    | weight                         | distribution                                                        |
    |--------------------------------|---------------------------------------------------------------------|
    | Linear, Conv2d                 | truncated N(0, 0.02), in a `small` model torch's default; bias 0    |
    | queries, keys, values          | Xavier uniform over the fused matrix (nn.MultiheadAttention's), bias 0 |
    | norms                          | 1, bias 0                                                           |
    | position tables                | N(0, 1 / width)                                                     |
    """
    start_layers(module, (nn.Linear, nn.Conv2d), small)
    for part in module.modules():
        if isinstance(part, QKVAttention):
            nn.init.xavier_uniform_(part.qkv.weight)


# Q-Formers of the official code: width, layers, heads.
SIZES = {
    "tiny": QFormerSize(256, 4, 4),
    "small": QFormerSize(512, 6, 8),
    "base": QFormerSize(768, 12, 12),
    "large": QFormerSize(1024, 24, 16),
    "xl": QFormerSize(1280, 36, 20),
    "xxl": QFormerSize(1536, 48, 24),
}
