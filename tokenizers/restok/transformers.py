"""ResTok's transformers: an encoder whose image tokens are merged on the way, residual latents, a
decoder over both.

Arxiv 2601.03955. The sequence is [image scales, coarsest first | latents by level]; a token sees
its own and all earlier levels, so that image tokens never see latents and coarse scales never see
finer ones. A merging block splits the coarsest scale into every second token (as released; the
paper averages pairs) and what is left without them.
"""

from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.layers.attention import attention as attend
from tessellar.layers.llama import rotate
from tessellar.layers.precision import ExactTables
from tessellar.layers.tags import tag

Merge = Literal["nearest", "average"]
Grid = tuple[int, int]


class Rotation(NamedTuple):
    """cos, sin [1, n, head_dim / 2] of a sequence."""

    cos: Tensor
    sin: Tensor


def rotation(rows: Tensor, columns: Tensor, head_dim: int, base: float = 10000.0) -> Rotation:
    """Row angles, then column angles, in float64 until the end."""
    pairs = head_dim // 4
    frequencies = base ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    angles = torch.cat(
        [rows[:, None].double() * frequencies, columns[:, None].double() * frequencies], -1
    )
    return Rotation(angles.cos().float()[None], angles.sin().float()[None])


def level_sizes(length: int) -> tuple[int, ...]:
    """1, 1, 2, 4, .., N / 2; raises ValueError unless N is a power of two."""
    if length < 2 or length & (length - 1):
        raise ValueError(f"ResTok has a power of two of tokens, not {length}")
    return (1, *(1 << k for k in range(length.bit_length() - 1)))


def level_grid(size: int) -> Grid:
    """Grid of a level of 2^k tokens: as square as it can be, wider than high."""
    k = size.bit_length() - 1
    return 1 << (k // 2), 1 << (k - k // 2)


def residual_pyramid(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Latents [B, N, C] of a map [B, C, h, w]: averages of what coarser levels left over, level by
    level.
    """
    parts = []
    for size in sizes:
        pooled = F.adaptive_avg_pool2d(x, level_grid(size))
        parts.append(rearrange(pooled, "b c h w -> b (h w) c"))
        x = x - F.interpolate(pooled, x.shape[-2:], mode="nearest")
    return torch.cat(parts, 1)


class ResTokBlock(nn.Module):
    """x += gamma_1 Attention(LN x); x += gamma_2 MLP(LN x): normed queries and keys, keys without a
    bias.
    """

    def __init__(self, width: int, num_heads: int, implementation: str) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.implementation = implementation
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.q_norm = nn.LayerNorm(width // num_heads)
        self.k_norm = nn.LayerNorm(width // num_heads)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.gamma_1 = nn.Parameter(torch.ones(width))
        self.gamma_2 = nn.Parameter(torch.ones(width))
        for linear in (self.qkv, self.proj, self.fc1, self.fc2):
            tag(linear.weight, "hidden")

    def attend(self, x: Tensor, turn: Rotation, mask: Tensor | None) -> Tensor:
        """The attention branch, added."""
        normed = self.norm1(x)
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]).to(normed.dtype)
        qkv = F.linear(normed, self.qkv.weight.to(normed.dtype), bias)
        q, k, v = rearrange(qkv, "b n (t h d) -> t b h n d", t=3, h=self.num_heads)
        q = rotate(self.q_norm(q), turn.cos, turn.sin).to(v.dtype)
        k = rotate(self.k_norm(k), turn.cos, turn.sin).to(v.dtype)
        out = attend(q, k, v, mask, implementation=self.implementation)
        return x + self.gamma_1 * self.proj(rearrange(out, "b h n d -> b n (h d)"))

    def mlp(self, x: Tensor) -> Tensor:
        """The other branch, added."""
        return x + self.gamma_2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))


def learned(*shape: int, width: int) -> nn.Parameter:
    """Normal of variance 1 / width, not decayed."""
    return tag(nn.Parameter(torch.randn(*shape) * width**-0.5), "no_decay")


def level_tables(count: int, width: int) -> nn.ParameterList:
    return nn.ParameterList(learned(1, width, width=width) for _ in range(count))


class Encoded(NamedTuple):
    """Latents [B, N, D] behind the last norm, and the coarsest image tokens [B, n, D]."""

    latents: Tensor
    coarsest: Tensor


class ResTokEncoder(nn.Module):
    """A map [B, C, h, w] to N latents; `stages` - 1 blocks merge the coarsest image tokens."""

    def __init__(
        self, grid: Grid, in_dim: int, length: int, width: int, depth: int, num_heads: int, stages: int, merge: Merge,
        attention: str,
    ) -> None:  # fmt: skip
        super().__init__()
        self.grid = grid
        self.sizes = level_sizes(length)
        self.merge = merge
        self.head_dim = width // num_heads
        if grid[1] % 2 ** (stages - 1):
            raise ValueError(f"{stages - 1} merges do not divide {grid[1]} columns")
        self.merging = tuple(int(i / stages * depth) - 1 for i in range(1, stages))
        self.project = nn.Conv2d(in_dim, width, 1)
        tag(self.project.weight, "no_decay")  # as published: an embedding of patches
        self.norm_in = nn.LayerNorm(width)
        self.norm_out = nn.LayerNorm(width)
        self.scale_embeddings, self.level_embeddings = (
            level_tables(stages, width),
            level_tables(len(self.sizes), width),
        )
        self.blocks = nn.ModuleList(ResTokBlock(width, num_heads, attention) for _ in range(depth))

    def forward(self, features: Tensor) -> Encoded:
        return self.run(self.sequence(features))

    def sequence(self, features: Tensor) -> Tensor:
        """[image tokens, latents] with the embeddings of their levels."""
        maps = self.project(features)
        levels = torch.cat(
            [t.expand(s, -1) for t, s in zip(self.level_embeddings, self.sizes, strict=True)]
        )
        image = rearrange(maps, "b c h w -> b (h w) c") + self.scale_embeddings[0]
        return torch.cat([image, residual_pyramid(maps, self.sizes) + levels], 1)

    def run(self, x: Tensor) -> Encoded:
        """Blocks, merges, and the norm of the latents."""
        x = self.norm_in(x)
        grids = [self.grid]
        merged = 0
        turn, mask = self.facts(grids, x.device)
        for number, block in enumerate(self.blocks):
            x = block.attend(x, turn, mask)  # type: ignore[operator]
            if number not in self.merging:
                x = block.mlp(x)  # type: ignore[operator]
                continue
            # A merge stands between attention and MLP of a block: the coarsest scale becomes half as
            # many columns, and what those leave of it stays behind them.
            #
            #   before   [h x w              | latents]
            #   after    [h x w / 2 | h x w  | latents]
            grids = [(grids[0][0], grids[0][1] // 2), *grids]
            x = block.mlp(self.split(x, grids[0]))  # type: ignore[operator]
            merged += 1
            count = grids[0][0] * grids[0][1]
            x = torch.cat([x[:, :count] + self.scale_embeddings[merged], x[:, count:]], 1)
            turn, mask = self.facts(grids, x.device)
        latents = self.norm_out(x[:, -sum(self.sizes) :])
        return Encoded(latents, x[:, : grids[0][0] * grids[0][1]])

    def split(self, x: Tensor, coarser: Grid) -> Tensor:
        """The coarsest scale, first in the sequence, as a coarser one and what that leaves of it."""
        count = coarser[0] * coarser[1]
        pairs = rearrange(x[:, : 2 * count], "b (n two) c -> b n two c", two=2)
        kept = pairs[:, :, 0] if self.merge == "nearest" else pairs.mean(2)
        rest = rearrange(pairs - kept[:, :, None], "b n two c -> b (n two) c")
        return torch.cat([kept, rest, x[:, 2 * count :]], 1)

    def levels(self, grids: list[Grid]) -> Tensor:
        """Level number of every token of the sequence; scales first, the coarsest 0."""
        counts = [h * w for h, w in grids] + list(self.sizes)
        return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))

    def facts(self, grids: list[Grid], device: torch.device) -> tuple[Rotation, Tensor]:
        """Rotation (a grid starts where the tokens before it end, on both axes) and mask of the
        sequence.
        """
        rows = []
        columns = []
        start = 0
        for h, w in grids:
            cell = torch.arange(h * w)
            rows.append(start + cell // w)
            columns.append(start + cell % w)
            start += h * w
        line = start + torch.arange(sum(self.sizes))
        turn = rotation(torch.cat([*rows, line]), torch.cat([*columns, line]), self.head_dim)
        # Visible is what is no finer: all of one's own level, and everything before it.
        level = self.levels(grids)
        mask = level[None, :] <= level[:, None]
        return Rotation(turn.cos.to(device), turn.sin.to(device)), mask[None, None].to(device)


class ResTokDecoder(ExactTables):
    """Code vectors [B, N, c] to a map [B, C, h, w], and the features of a training branch [B, h w,
    D].
    """

    def __init__(
        self, grid: Grid, code_dim: int, out_dim: int, length: int, width: int, depth: int, num_heads: int,
        features: bool, attention: str,
    ) -> None:  # fmt: skip
        super().__init__()
        self.grid = grid
        self.sizes = level_sizes(length)
        self.mask_code = learned(1, 1, code_dim, width=width)
        self.mask_token = learned(1, 1, width, width=width)
        self.feature_token = learned(1, 1, width, width=width) if features else None
        self.inputs = nn.ModuleList(nn.Linear(code_dim, width) for _ in self.sizes)
        for linear in self.inputs:
            tag(linear.weight, "no_decay")  # type: ignore[arg-type]  # as published: embeddings of codes
        self.level_embeddings = level_tables(len(self.sizes), width)
        self.norm_in = nn.LayerNorm(width)
        self.norm_out = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(ResTokBlock(width, num_heads, attention) for _ in range(depth))
        self.output = nn.Conv2d(width, out_dim, 1)
        cell = torch.arange(grid[0] * grid[1])
        line = torch.arange(length)
        rows = torch.cat([line, length + cell // grid[1]])
        columns = torch.cat([line, length + cell % grid[1]])
        turn = rotation(rows, columns, width // num_heads)
        self.register_buffer("cos", turn.cos, persistent=False)
        self.register_buffer("sin", turn.sin, persistent=False)
        self.cos: Tensor
        self.sin: Tensor

    def forward(self, codes: Tensor, keep: Tensor | None = None) -> Tensor:
        """The map; of each image only the first `keep` [B] codes count."""
        image = self.norm_out(self._image_tokens(codes, keep, self.mask_token))
        return self.output(rearrange(image, "b (h w) c -> b c h w", h=self.grid[0]).contiguous())

    def features(self, codes: Tensor, keep: Tensor | None = None) -> Tensor:
        """What a vision model's patches are compared with: image tokens of their own query, before
        the norm.
        """
        assert self.feature_token is not None, "this decoder was built without features"
        return self._image_tokens(codes, keep, self.feature_token)

    def _image_tokens(self, codes: Tensor, keep: Tensor | None, query: Tensor) -> Tensor:
        count = self.grid[0] * self.grid[1]
        length = codes.shape[1]
        if keep is not None:
            shown = torch.arange(length, device=codes.device) < keep[:, None].to(codes.device)
            codes = torch.where(shown[..., None], codes, self.mask_code.to(codes.dtype))
        parts = zip(codes.split(self.sizes, 1), self.inputs, self.level_embeddings, strict=True)
        latents = torch.cat([linear(part) + level for part, linear, level in parts], 1)
        x = self.norm_in(torch.cat([latents, query.expand(len(codes), count, -1)], 1))
        for block in self.blocks:
            x = block.mlp(block.attend(x, Rotation(self.cos, self.sin), None))  # type: ignore[operator]
        return x[:, length:]
