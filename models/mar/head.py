"""The diffusion head of MAR: a small MLP that denoises one token given its vector z (arXiv
2406.11838, section 3.3).
"""

from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.layers.adaln import Modulation, modulate
from tessellar.layers.precision import at_least_float32
from tessellar.layers.time_embedding import TimeEmbedding


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


class DiffusionMLP(nn.Module):
    """Noisy tokens [n, C], integer steps [n] and z [n, D] to predicted noise and variance share,
    each [n, C].
    """

    def __init__(self, channels: int, condition_dim: int, width: int, depth: int) -> None:
        super().__init__()
        self.channels = channels
        self.time = TimeEmbedding(width)
        self.condition = nn.Linear(condition_dim, width)
        self.input = nn.Linear(channels, width)
        self.blocks = nn.ModuleList(DiffusionBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = Modulation(width, count=2)
        self.output = nn.Linear(width, 2 * channels)
        self.init_weights()

    def init_weights(self) -> None:
        """Xavier; times N(0, 0.02); modulations and the output at zero, so that blocks start as the
        identity.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and "modulation" not in name:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for linear in (self.time.fc1, self.time.fc2):
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(self.output.weight)

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        condition = self.time(t) + self.condition(z)
        h = self.input(x)
        for block in self.blocks:
            h = block(h, condition)
        shift, scale = self.modulation(condition)
        eps, v = at_least_float32(self.output(modulate(self.norm(h), scale, shift))).chunk(2, -1)
        return eps, v
