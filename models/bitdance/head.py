"""BitDance's binary diffusion head: from noisy bits of one token, or of the tokens of one patch, and
what the transformer says of them, to clean bits (arXiv 2602.14041).

It predicts the data, not the velocity. Bits are the numbers -1 and 1 on a straight path, and time is
the official one here: 0 is noise, 1 data. Shapes: n groups of P tokens, z bits, D channels.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.errors import UserError
from tessellar.layers.adaln import modulate
from tessellar.layers.attention import attention as attend
from tessellar.layers.llama import PackedSwiGLU
from tessellar.layers.precision import at_least_float32
from tessellar.layers.time_embedding import TimeEmbedding

EPS = 1e-6
LEAST = 0.05  # what 1 - t is at least, where it divides


def gated(width: int) -> PackedSwiGLU:
    return PackedSwiGLU(width, int(1.5 * width), width)


class TokenBlock(nn.Module):
    """x += gate * SwiGLU(LN(x) (1 + scale) + shift), each token alone."""

    vectors = 3

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.mlp = gated(width)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor, gate: Tensor) -> Tensor:
        return x + gate * self.mlp(modulate(self.norm(x), scale, shift))


class PatchBlock(nn.Module):
    """Attention among the tokens of a patch, without positions, before the same SwiGLU; three vectors
    for each.
    """

    vectors = 6

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.wqkv = nn.Linear(width, 3 * width)
        self.wo = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = gated(width)

    def forward(self, x: Tensor, *vectors: Tensor) -> Tensor:
        scale1, shift1, gate1, scale2, shift2, gate2 = vectors
        x = x + gate1 * self.attention(modulate(self.norm1(x), scale1, shift1))
        return x + gate2 * self.mlp(modulate(self.norm2(x), scale2, shift2))

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(
            self.wqkv(x), "n p (three h d) -> three n h p d", three=3, h=self.num_heads
        )
        return self.wo(rearrange(attend(q, k, v), "n h p d -> n p (h d)"))


class BinaryHead(nn.Module):
    """`depth` blocks of `width` over groups of `tokens` tokens of `bits` bits; `groups` modulations, each
    of as many blocks in a row.

    `bounded`: predictions are in (-1, 1), as of the text-to-image model. Raises UserError where the
    depth is no multiple of the groups, or the width of `head_dim`, the channels of a patch's
    attention heads.
    """

    def __init__(
        self,
        bits: int,
        condition_width: int,
        width: int,
        depth: int,
        groups: int = 1,
        tokens: int = 1,
        head_dim: int = 64,
        bounded: bool = False,
    ) -> None:
        super().__init__()
        if groups < 1 or depth % groups:
            raise UserError(f"{groups} modulations do not divide the head's {depth} blocks")
        if tokens > 1 and width % head_dim:
            raise UserError(f"attention heads of {head_dim} channels do not divide {width}")
        self.bounded = bounded
        self.run = depth // groups  # blocks that share a modulation
        self.time = TimeEmbedding(width, exact=False)
        self.condition = nn.Linear(condition_width, width)
        self.input = nn.Linear(bits, width)
        self.blocks = nn.ModuleList(
            TokenBlock(width) if tokens == 1 else PatchBlock(width, width // head_dim)
            for _ in range(depth)
        )
        vectors = TokenBlock.vectors if tokens == 1 else PatchBlock.vectors
        self.modulations = nn.ModuleList(nn.Linear(width, vectors * width) for _ in range(groups))
        self.norm = nn.LayerNorm(width, eps=EPS, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, bits)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialisation; so the head predicts 0 at first.

        | weight                      | distribution            |
        |-----------------------------|-------------------------|
        | Linear                      | Xavier uniform, bias 0  |
        | of the time embedding       | N(0, 0.02)              |
        | modulations, output         | 0                       |
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for linear in (self.time.fc1, self.time.fc2):
            nn.init.normal_(linear.weight, std=0.02)
        for linear in (*self.modulations, self.modulation, self.output):
            nn.init.zeros_(linear.weight)  # type: ignore[arg-type]

    def forward(self, noisy: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Clean bits [n, P, z], at least float32, of noisy ones [n, P, z] at times [n] given [n, P, D]."""
        dtype = self.input.weight.dtype
        time = self.time(1000 * t)[:, None]
        y = F.silu(time + self.condition(condition.to(dtype)))
        x = self.input(noisy.to(dtype))
        for number, block in enumerate(self.blocks):
            if number % self.run == 0:
                modulation = self.modulations[number // self.run]
                vectors = modulation(y).chunk(block.vectors, dim=-1)  # type: ignore[arg-type]
            x = block(x, *vectors)
        # y is activated already: no SiLU here, unlike in other heads.
        scale, shift = self.modulation(y).chunk(2, dim=-1)
        clean = at_least_float32(self.output(modulate(self.norm(x), scale, shift)))
        return 2 * clean.sigmoid() - 1 if self.bounded else clean

    def row_losses(self, clean: Tensor, t: Tensor, noise: Tensor, condition: Tensor) -> Tensor:
        """Squared error of the velocity [n, P], mean over bits, of clean bits [n, P, z] at times [n]."""
        at = t[:, None, None]
        noisy = (1 - at) * noise + at * clean
        # v - v^ = (x - z_t) / (1 - t) - (x^ - z_t) / (1 - t)
        error = (clean - self(noisy, t, condition)) / (1 - at).clamp(min=LEAST)
        return error.square().mean(-1)


def sincos_table(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """Fixed positions [N, width] of `rows`, `columns` [N]: the column in the first half of the channels,
    the row in the second, sines before cosines in each (the text-to-image model's).

    Raises UserError for a width that is no multiple of 4.
    """
    if width % 4:
        raise UserError(f"fixed positions need a multiple of 4 channels, not {width}")
    quarter = width // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter)
    parts = []
    for place in (columns, rows):
        angles = place[:, None].double() * frequencies
        parts += [angles.sin(), angles.cos()]
    return torch.cat(parts, dim=-1).float()
