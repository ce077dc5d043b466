"""From SEED's codes to the embedding of an image that a de-tokenizer draws from (arXiv 2310.01218), and
the teacher of such embeddings.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tessellar.layers.precision import at_least_float32
from tessellar.layers.tags import tag
from tessellar.layers.vit import ViTBlock
from tessellar.networks.vision import Teacher
from tessellar.tokenizers.seed.qformer import CausalQFormer


class QueryBlocks(nn.Module):
    """Positions and pre-norm blocks over vectors [B, n, D], all of which see each other."""

    def __init__(self, count: int, width: int, depth: int, num_heads: int, attention: str) -> None:
        super().__init__()
        self.positions = tag(nn.Parameter(torch.zeros(1, count, width)), "no_decay")
        self.blocks = nn.ModuleList(
            ViTBlock(width, num_heads, attention=attention, gelu="none", eps=1e-6)
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.positions.to(x.dtype)
        for block in self.blocks:
            x = block(x)
        return x


class NarrowedHead(nn.Module):
    """Each vector [B, n, D] through layers of `sizes` channels, then all of them to one embedding [B,
    E] (the published SEED-2).
    """

    def __init__(self, count: int, width: int, sizes: Sequence[int], dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for size in sizes:
            layers += [nn.Linear(width, size, bias=False), nn.ReLU()]
            width = size
        self.narrow = nn.Sequential(*layers[:-1])
        self.out = nn.Linear(count * width, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.narrow(x).flatten(1))


class ReverseHead(nn.Module):
    """One query that reads the vectors [B, n, D] gives the embedding [B, E] (the repository's training
    code).
    """

    def __init__(
        self, width: int, depth: int, num_heads: int, hidden: int, dim: int, attention: str
    ) -> None:
        super().__init__()
        self.query = tag(nn.Parameter(torch.zeros(1, 1, width)), "no_decay")
        self.qformer = CausalQFormer(
            width,
            depth,
            num_heads,
            hidden=hidden,
            memory_dim=width,
            dropout=0.0,
            attention=attention,
        )
        self.out = nn.Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        found = self.qformer(self.query.expand(len(x), -1, -1), x, causal=False)
        return self.out(found[:, 0])


@torch.no_grad()
def embedding_of(teacher: Teacher, images: Tensor) -> Tensor:
    """One embedding [B, E] of images [B, 3, H, W] in [-1, 1]: what the teacher's classifier would read,
    projected to CLIP's space of images and texts where the teacher has it (`semantic_teacher` with
    `shared_dim`).
    """
    pooled = at_least_float32(teacher.model.pooled(images))
    space = getattr(teacher.model, "shared_space", None)
    return pooled if space is None else pooled @ space
