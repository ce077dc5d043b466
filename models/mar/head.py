"""The diffusion head of MAR: a small MLP that denoises one token given its vector z (arXiv
2406.11838, section 3.3).
"""

from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.layers.adaln import Modulation, modulate
from tessellar.models.parts.token_head import TokenHead


class DiffusionBlock(nn.Module):
    """x += gate * MLP(LN(x) (1 + scale) + shift); vectors in the order shift, scale, gate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, width)
        self.modulation = Modulation(width, count=3)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition)
        return x + gate * self.fc2(F.silu(self.fc1(modulate(self.norm(x), scale, shift))))


class DiffusionMLP(TokenHead):
    """Noisy tokens [n, C], integer steps [n] and z [n, D] to predicted noise and variance share,
    each [n, C].
    """

    def __init__(self, channels: int, condition_dim: int, width: int, depth: int) -> None:
        super().__init__(
            channels,
            2 * channels,
            condition_dim=condition_dim,
            width=width,
            depth=depth,
            block=DiffusionBlock,
        )

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        eps, v = self.denoised(x, t, z).chunk(2, -1)
        return eps, v
