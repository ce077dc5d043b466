"""FlexTok's transformers (arXiv 2502.13967): an encoder onto causal registers, a flow decoder that
registers condition.

Pre-norm blocks without biases; every norm, those of queries and keys too, is without weights.
Scores are scaled by 8 / head_dim (muP), which is the usual scale at the published head_dim 64
alone. The decoder's AdaLN-Zero has one set of six vectors for patches and one for registers.
Different from the official code: images of a batch are not packed into one sequence, and the rows
of a modulation are ordered as in `AdaLNBlock`.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from tessellar.layers.adaln import AdaLNBlock, Modulation, modulate
from tessellar.layers.llama import SwiGLU
from tessellar.layers.split_attention import SplitAttention
from tessellar.layers.tags import tag
from tessellar.layers.time_embedding import TimeEmbedding
from tessellar.protocol.arguments import in_ranges
from tessellar.tokenizers.parts.latent_maps import Grid

EPS = 1e-5
TIME_PERIOD = 256.0


@in_ranges
@dataclass(frozen=True)
class TransformerSize:
    """Width, number of blocks, channels a head; published: width 64 x depth."""

    width: int
    depth: int
    head_dim: int = 64

    def __post_init__(self) -> None:
        if self.width % self.head_dim or self.width % 4:
            raise ValueError(
                f"width {self.width} must be a multiple of 4 and of head_dim {self.head_dim}"
            )


def norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=EPS, elementwise_affine=False)


def attention_of(size: TransformerSize, implementation: str) -> SplitAttention:
    """With normed queries and keys, whose scores have the scale of heads of 64 channels."""
    return SplitAttention(
        size.width,
        size.width // size.head_dim,
        head_norm=norm(size.head_dim),
        scale=8 / size.head_dim,
        implementation=implementation,
    )


class Block(nn.Module):
    """x += Attention(norm x); x += SwiGLU(norm x)."""

    def __init__(self, size: TransformerSize, implementation: str) -> None:
        super().__init__()
        self.norm = norm(size.width)
        self.attention = attention_of(size, implementation)
        self.mlp = feed_forward(size.width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x), mask=mask)
        return x + self.mlp(self.norm(x))


class PairModulation(nn.Module):
    """Six vectors for patches and six for registers of a condition [B, D], each [B, 2, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vectors = Modulation(width, 12)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        pairs = torch.stack(self.vectors(condition), dim=1)
        return rearrange(pairs, "b (kind six) d -> six b kind d", kind=2).unbind()


def feed_forward(width: int) -> SwiGLU:
    return SwiGLU(width, int(8 * width / 3))


def positions_2d(side: int, width: int) -> Tensor:
    """Frozen sin-cos table [1, D, side, side]: channels sin and cos of the row, then of the column."""
    row = torch.arange(side, dtype=torch.float64)
    angles = row[:, None] * 10000.0 ** (
        -torch.arange(width // 4, dtype=torch.float64) / (width // 4)
    )
    along = torch.cat([angles.sin(), angles.cos()], dim=1).T.float()
    rows = along[:, :, None].expand(-1, -1, side)
    columns = along[:, None].expand(-1, side, -1)
    return torch.cat([rows, columns])[None]


def prefix_mask(patches: int, registers: int) -> Tensor:
    """Which of [patches | registers] each of them sees: all patches, and of the registers itself
    and earlier ones.
    """
    key = torch.arange(patches + registers)
    return (key < patches) | (key <= key[:, None])


class PatchEmbedding(nn.Module):
    """Maps to tokens [B, n, D] with their positions; a smaller grid takes the table's top left
    corner.
    """

    def __init__(self, grid: Grid, width: int) -> None:
        super().__init__()
        self.grid = grid
        self.proj = nn.Linear(grid.patch_dim, width)
        self.table = nn.Parameter(positions_2d(grid.table, width), requires_grad=False)

    def forward(self, maps: Tensor) -> Tensor:
        side = self.grid.patches
        return self.proj(self.grid.split(maps)) + rearrange(
            self.table[..., :side, :side], "n d h w -> n (h w) d"
        )


class Encoder(nn.Module):
    """Maps [B, C, h, w] to codes before quantization [B, k, code_dim] of the first k registers."""

    def __init__(
        self, size: TransformerSize, grid: Grid, registers: int, code_dim: int, implementation: str
    ) -> None:
        super().__init__()
        self.embed = PatchEmbedding(grid, size.width)
        self.registers = nn.Parameter(torch.empty(registers, size.width))
        self.blocks = nn.ModuleList(Block(size, implementation) for _ in range(size.depth))
        self.norm = norm(size.width)
        self.head = nn.Linear(size.width, code_dim)
        init_weights(self)

    def forward(self, maps: Tensor, count: int | None = None) -> Tensor:
        patches = self.embed(maps)
        registers = self.registers[:count]
        x = torch.cat([patches, registers.to(patches.dtype).expand(len(maps), -1, -1)], dim=1)
        mask = prefix_mask(patches.shape[1], len(registers)).to(x.device)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x[:, patches.shape[1] :]))


class Velocity(NamedTuple):
    """Velocity [B, C, h, w], and features of the patches [B, n, D] behind the tapped block."""

    velocity: Tensor
    features: Tensor


class Decoder(nn.Module):
    """Velocity of noisy maps, conditioned on codes of registers.

    `null` "learned": a vector stands in all registers of an unconditional image; "zero": zeros do.
    """

    def __init__(
        self,
        size: TransformerSize,
        grid: Grid,
        registers: int,
        code_dim: int,
        tap: int = 1,
        null: Literal["learned", "zero"] = "learned",
        time_factor: float = 1000.0,
        implementation: str = "auto",
    ) -> None:
        super().__init__()
        if not 0 <= tap < size.depth:
            raise ValueError(
                f"the tapped block is {tap}; the decoder has {size.depth}, the first is 0"
            )
        width = size.width
        self.tap = tap
        self.time_factor = time_factor
        self.from_code = nn.Linear(code_dim, width)
        self.register_positions = nn.Parameter(torch.empty(registers, width))
        self.mask_token = nn.Parameter(torch.empty(width))
        self.null = nn.Parameter(torch.empty(width)) if null == "learned" else None
        self.embed = PatchEmbedding(grid, width)
        self.time = TimeEmbedding(width, period=TIME_PERIOD)
        self.blocks = nn.ModuleList(
            AdaLNBlock(
                attention_of(size, implementation),
                feed_forward(width),
                norm(width),
                PairModulation(width),
            )
            for _ in range(size.depth)
        )
        self.norm = norm(width)
        self.modulation = Modulation(width, 2)
        self.head = nn.Linear(width, grid.patch_dim)
        init_weights(self)

    def condition(self, codes: Tensor, kept: Tensor, null: Tensor | None = None) -> Tensor:
        """Registers [B, N, D] of codes [B, k, C]: of image b the first kept[b], then the mask
        token; all null if so.
        """
        positions = self.register_positions
        x = self.from_code(codes.to(self.from_code.weight.dtype)) + positions[: codes.shape[1]]
        x = nn.functional.pad(x, (0, 0, 0, len(positions) - codes.shape[1]))
        hidden = torch.arange(len(positions), device=x.device) >= kept.to(x.device)[:, None]
        x = torch.where(hidden[..., None], self.mask_token.to(x.dtype), x)
        if null is None:
            return x
        vector = torch.zeros_like(self.mask_token) if self.null is None else self.null
        return torch.where(null.to(x.device)[:, None, None], vector.to(x.dtype), x)

    def embed_time(self, t: Tensor) -> Tensor:
        """[B, D] of times [B] in [0, 1]."""
        return self.time(t * self.time_factor)

    def forward(self, maps: Tensor, t: Tensor, registers: Tensor) -> Velocity:
        """Of noisy maps [B, C, h, w] at times [B], given what `condition` made."""
        patches = self.embed(maps)
        condition = self.embed_time(t)
        sizes = (patches.shape[1], registers.shape[1])
        x = torch.cat([patches, registers.to(patches.dtype)], dim=1)
        features = patches
        for number, block in enumerate(self.blocks):
            x = block(x, condition, sizes)
            if number == self.tap:
                features = x[:, : sizes[0]]
        shift, scale = self.modulation(condition[:, None])
        out = self.head(modulate(self.norm(x[:, : sizes[0]]), scale, shift))
        return Velocity(self.embed.grid.join(out), features)


def init_weights(module: nn.Module) -> None:
    """Linear layers Xavier-uniform with zero biases; modulations and the output head zero; vectors
    normal, std 0.02.
    """
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith("head.") or "modulation" in name or name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif name.endswith("weight"):
            nn.init.xavier_uniform_(parameter)
        else:
            nn.init.trunc_normal_(parameter, std=0.02)
        if name.startswith("blocks.") and parameter.ndim == 2 and "modulation" not in name:
            tag(parameter, "hidden")
        elif not name.endswith("weight"):
            tag(parameter, "no_decay")
