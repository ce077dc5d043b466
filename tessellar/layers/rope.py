"""Rotary position embedding over pairs of adjacent channels, with LlamaGen's two-dimensional table.

RoFormer (arXiv 2104.09864); the 2D table as in LlamaGen (arXiv 2406.06525): the first half of the
rotation pairs turns with the row, the second half with the column.
"""

import torch
from einops import rearrange
from torch import Tensor

from tessellar.layers.precision import at_least_float32


def frequencies(pairs: int, base: float = 10000.0) -> Tensor:
    """base^(-j / pairs) for j = 0 .. pairs - 1, float32 [pairs]."""
    return 1.0 / base ** (torch.arange(pairs, dtype=torch.float32) / pairs)


def grid_angles(rows: Tensor, columns: Tensor, head_dim: int, base: float = 10000.0) -> Tensor:
    """Angles [N, head_dim / 2] of positions `rows`, `columns` [N]: row angles, then column angles."""
    if head_dim % 4:
        raise ValueError(f"head_dim is {head_dim}; two-dimensional rotation needs a multiple of 4")
    freqs = frequencies(head_dim // 4, base).to(rows.device)
    return torch.cat([rows[:, None] * freqs, columns[:, None] * freqs], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (2j, 2j + 1) of x [B, H, n, D] by cos, sin [B or 1, n, D / 2]; computed in
    float32, of float64 in float64.

    One complex product: a third of the memory traffic of the four real ones.
    """
    pairs = torch.view_as_complex(
        rearrange(at_least_float32(x), "b h n (d two) -> b h n d two", two=2).contiguous()
    )
    rotated = torch.view_as_real(pairs * torch.complex(cos, sin)[:, None])
    return rearrange(rotated, "b h n d two -> b h n (d two)").to(x.dtype)
