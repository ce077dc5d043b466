"""What UniWeTok's training adds to a binary tokenizer's (arXiv 2602.14178): distillation before and
after quantization, and a generative prior.

The paper names both without numbers, teacher or architecture: all of them are options here, and the
defaults are this project's.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.errors import UserError
from tessellar.layers.kv_cache import NoCache, Slots
from tessellar.layers.llama import LlamaBlock, Pass, Positions, frequencies, swiglu_hidden
from tessellar.layers.precision import at_least_float32
from tessellar.networks.vision import Teacher
from tessellar.protocol.configured import Configured
from tessellar.tokenizers.losses.alignment import cosine_distance, projection, regrid


class Distillation(Configured, nn.Module):
    """Cosine distance to a frozen teacher's patches of `dim` channels, of the bounded features (before)
    and of the bits (after), each through a projection of its own; nothing without the teacher, which
    no export holds. Raises UserError for a teacher of other channels.
    """

    def __init__(
        self,
        teacher: Teacher | None = None,
        dim: int = 768,
        bits: int = 128,
        before: float = 1.0,
        after: float = 1.0,
    ) -> None:
        super().__init__()
        if teacher is not None and teacher.dim != dim:
            raise UserError(f"dim is {dim}; the teacher's patches have {teacher.dim} channels")
        self.teacher = teacher
        self.bits = bits
        self.before = before
        self.after = after
        self.project_before = projection(bits, dim)
        self.project_after = projection(bits, dim)

    def forward(
        self, images: Tensor, features: Tensor, codes: Tensor, grid: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Weighted losses of images [B, 3, H, W], of features and codes [B, N, z] in raster order."""
        if self.teacher is None:
            return {}
        target = regrid(self.teacher(images).patches, self.teacher.grid, grid)
        before = cosine_distance(self.project_before(features), target).mean()
        after = cosine_distance(self.project_after(codes), target).mean()
        return {
            "distillation_before": self.before * before,
            "distillation_after": self.after * after,
        }


class BitPrior(Configured, nn.Module):
    """A small causal transformer that predicts each next token's bits from the codes before it; its
    cross-entropy teaches it and, through the codes on both sides, the tokenizer.
    """

    def __init__(
        self,
        bits: int = 128,
        width: int = 256,
        depth: int = 4,
        num_heads: int = 4,
        weight: float = 0.1,
    ) -> None:
        super().__init__()
        self.bits = bits
        self.weight = weight
        self.head_dim = width // num_heads
        self.input = nn.Linear(bits, width)
        hidden = swiglu_hidden(width)
        self.blocks = nn.ModuleList(LlamaBlock(width, num_heads, hidden) for _ in range(depth))
        self.norm = nn.RMSNorm(width)
        self.output = nn.Linear(width, bits)

    def forward(self, codes: Tensor) -> Tensor:
        """Weighted loss, in nats a bit, of codes [B, N, z] of -1 and 1 that gradients pass."""
        before = codes[:, :-1]
        n = before.shape[1]
        angles = torch.arange(n, device=codes.device)[:, None] * frequencies(self.head_dim // 2).to(
            codes.device
        )
        slots = Slots(torch.arange(n)[None], 0, n, None, n > 1)
        shared = Pass(
            Positions(angles.cos()[None], angles.sin()[None]), NoCache(codes.device), slots
        )
        x = self.input(before.to(self.input.weight.dtype))
        for number, block in enumerate(self.blocks):
            x = block(x, number, shared)
        log_odds = at_least_float32(self.output(self.norm(x)))
        # -log p of a bit whose sign is that of the code.
        return self.weight * F.softplus(-codes[:, 1:] * log_odds).mean()
