"""The flow head of Semanticist's generator (arXiv 2503.08685): MAR's diffusion head (arXiv
2406.11838) whose blocks read the condition beside their input, and are modulated by the time alone.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.layers.adaln import Modulation, modulate
from tessellar.layers.precision import at_least_float32
from tessellar.layers.time_embedding import TimeEmbedding

EPS = 1e-6


class FlowBlock(nn.Module):
    """h += gate * MLP([LN(h) (1 + scale) + shift, c]); vectors in the order shift, scale, gate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.fc1 = nn.Linear(2 * width, width)
        self.fc2 = nn.Linear(width, width)
        self.modulation = Modulation(width, count=3)

    def forward(self, h: Tensor, time: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(time)
        read = torch.cat([modulate(self.norm(h), scale, shift), c], -1)
        return h + gate * self.fc2(F.silu(self.fc1(read)))


class FlowMLP(nn.Module):
    """Velocities from noise to data [..., C] of noisy tokens x [..., C] at times [...], given z
    [..., D].

    Times are shares of data, 0 to 1, and are embedded as they are, not scaled.
    """

    def __init__(self, channels: int, condition_dim: int, width: int, depth: int) -> None:
        super().__init__()
        self.time = TimeEmbedding(width)
        self.condition = nn.Linear(condition_dim, width)
        self.input = nn.Linear(channels, width)
        self.blocks = nn.ModuleList(FlowBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=EPS, elementwise_affine=False)
        self.modulation = Modulation(width, count=2)
        self.output = nn.Linear(2 * width, channels)
        self.init_weights()

    def init_weights(self) -> None:
        """Xavier; times N(0, 0.02); modulations and the output at zero, so that it starts at 0."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and "modulation" not in name:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for linear in (self.time.fc1, self.time.fc2):
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(self.output.weight)

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        time = self.time(t)
        c = self.condition(z)
        h = self.input(x)
        for block in self.blocks:
            h = block(h, time, c)
        shift, scale = self.modulation(time)
        read = torch.cat([modulate(self.norm(h), scale, shift), c], -1)
        return at_least_float32(self.output(read))
