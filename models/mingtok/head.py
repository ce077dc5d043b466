"""The head of Ming-UniVision's generator (arXiv 2510.06590): a condition of each hidden state, and the
velocity of a latent given it.
"""

from torch import Tensor, nn

from tessellar.layers.adaln import Modulation, modulate
from tessellar.layers.gated_block import packed_hidden
from tessellar.layers.llama import PackedSwiGLU
from tessellar.models.parts.token_head import TokenHead

EPS = 1e-6


class GatedHeadBlock(nn.Module):
    """h += gate * SwiGLU(LN(h) (1 + scale) + shift); vectors in the order shift, scale, gate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.mlp = PackedSwiGLU(width, packed_hidden(4 * width), width)
        self.modulation = Modulation(width, count=3)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition)
        return h + gate * self.mlp(modulate(self.norm(h), scale, shift))


class FlowHead(TokenHead):
    """Velocities to the data, data - noise, [..., C] of noisy tokens x [..., C] at times [...] in [0,
    1], 1 is noise, given z [..., D].

    1,284,876,320 parameters at the published 32 channels, width and condition of 3,072, 12 blocks.
    """

    def __init__(self, channels: int, condition_dim: int, width: int, depth: int) -> None:
        super().__init__(
            channels,
            channels,
            condition_dim=condition_dim,
            width=width,
            depth=depth,
            block=GatedHeadBlock,
        )

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        return self.denoised(x, 1000 * t, z)


class ConditionHead(nn.Module):
    """Hidden states [..., D] to conditions [..., W] of the flow head (their `vis_head`)."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.norm = nn.LayerNorm(out, eps=EPS)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(self.linear(hidden))
