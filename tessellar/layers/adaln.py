"""Adaptive normalisation: a condition scales, shifts and gates each residual branch (AdaLN, DiT,
arXiv 2212.09748).

xAR, VAR and diffusion decoders share it. Attention and MLP are given, only the wiring is here: one
linear layer makes six vectors of the condition, in the order gate1, gate2, scale1, scale2, shift1,
shift2 (xAR's and VAR's; DiT's rows are shift, scale, gate of each branch, an importer permutes
them).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x (1 + scale) + shift."""
    return x * (1 + scale) + shift


def spread(vectors: Tensor, sizes: Sequence[int]) -> Tensor:
    """Vectors [B, E, D] of entities to [B, sum(sizes), D] of their positions; [B, 1, D] stays and
    broadcasts.
    """
    if len(sizes) == 1:
        return vectors
    if len(set(sizes)) == 1:
        return vectors.repeat_interleave(sizes[0], dim=1)
    return vectors.repeat_interleave(
        torch.tensor(sizes, device=vectors.device), dim=1, output_size=sum(sizes)
    )


class Modulation(nn.Module):
    """`count` vectors [B, E, D] of a condition [B, E, D]: Linear(SiLU(c)).

    With `zero` the layer starts at zero (AdaLN-Zero: every branch is off), else with Xavier
    weights.
    """

    def __init__(
        self, width: int, count: int = 6, condition_width: int | None = None, zero: bool = True
    ) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(condition_width or width, count * width)
        (nn.init.zeros_ if zero else nn.init.xavier_uniform_)(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(condition)).chunk(self.count, dim=-1)


class AdaLNBlock(nn.Module):
    """x += gate1 Attention(norm1(x) (1 + scale1) + shift1); x += gate2 MLP(norm2(x) (1 + scale2) +
    shift2).

    `attention` is called with the modulated input and the rest of the arguments; the norms should
    have no weights.
    """

    def __init__(
        self,
        attention: nn.Module,
        mlp: nn.Module,
        norm: nn.Module,
        modulation: nn.Module,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dropout: nn.Module = nn.Dropout(dropout)
        self.norm = norm
        self.attention = attention
        self.mlp = mlp
        self.modulation = modulation

    def forward(self, x: Tensor, condition: Tensor, sizes: Sequence[int], *rest: Any) -> Tensor:
        """x [B, n, D]; condition [B, E, D] of E entities that hold `sizes` positions, n in all (E =
        1: all of them).
        """
        vectors = self.modulation(condition)
        # Broadcasting over [B, E, n / E, D] is cheaper than repeating.
        if len(sizes) > 1 and len(set(sizes)) == 1:
            vectors = [v[:, :, None] for v in vectors]
            shape = (len(sizes), sizes[0])
        else:
            vectors = [spread(v, sizes) for v in vectors]
            shape = (x.shape[1],)
        #   x [B, n, D] -> [B, E, n / E, D] where entities are of one size; vectors [B, E, 1, D]
        #   else x stays, and vectors are [B, n, D] or [B, 1, D]
        gate1, gate2, scale1, scale2, shift1, shift2 = vectors
        x = x.unflatten(1, shape)
        branch = self.dropout(
            self.attention(modulate(self.norm(x), scale1, shift1).flatten(1, -2), *rest)
        )
        x = x + gate1 * branch.unflatten(1, shape)
        x = x + gate2 * self.dropout(self.mlp(modulate(self.norm(x), scale2, shift2)))
        return x.flatten(1, -2)
