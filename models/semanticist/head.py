"""The flow head of Semanticist's generator (arXiv 2503.08685): MAR's diffusion head (arXiv
2406.11838) that predicts a velocity, and where its condition is read.

| conditioning | blocks and output are modulated by | and read beside their input |
|--------------|------------------------------------|-----------------------------|
| `concat`     | the time alone                     | the condition               |
| `adaln`      | the time plus the condition        | nothing (as in MAR)         |

`concat` is what was published; `adaln` is the official code's other method.
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.layers.adaln import Modulation, modulate
from tessellar.layers.precision import at_least_float32
from tessellar.layers.time_embedding import TimeEmbedding
from tessellar.protocol.ranges import check_name

EPS = 1e-6
HeadConditioning = Literal["concat", "adaln"]


class FlowBlock(nn.Module):
    """h += gate * MLP([LN(h) (1 + scale) + shift, c]); vectors in the order shift, scale, gate.

    `c` [..., extra] is what is read beside the input, nothing where `extra` is 0.
    """

    def __init__(self, width: int, extra: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.fc1 = nn.Linear(width + extra, width)
        self.fc2 = nn.Linear(width, width)
        self.modulation = Modulation(width, count=3)

    def forward(self, h: Tensor, modulating: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(modulating)
        read = torch.cat([modulate(self.norm(h), scale, shift), c], -1)
        return h + gate * self.fc2(F.silu(self.fc1(read)))


class FlowMLP(nn.Module):
    """Velocities from noise to data [..., C] of noisy tokens x [..., C] at times [...], given z
    [..., D].

    Times are shares of data, 0 to 1, and are embedded as they are, not scaled. Raises UserError for
    an unknown `conditioning`.
    """

    def __init__(
        self,
        channels: int,
        condition_dim: int,
        width: int,
        depth: int,
        conditioning: HeadConditioning = "concat",
    ) -> None:
        super().__init__()
        check_name("conditioning of the head", conditioning, get_args(HeadConditioning))
        self.concatenates = conditioning == "concat"
        extra = width if self.concatenates else 0
        self.time = TimeEmbedding(width)
        self.condition = nn.Linear(condition_dim, width)
        self.input = nn.Linear(channels, width)
        self.blocks = nn.ModuleList(FlowBlock(width, extra) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=EPS, elementwise_affine=False)
        self.modulation = Modulation(width, count=2)
        self.output = nn.Linear(width + extra, channels)
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
        modulating = time
        if not self.concatenates:
            modulating = time + c
            c = c[..., :0]
        h = self.input(x)
        for block in self.blocks:
            h = block(h, modulating, c)
        shift, scale = self.modulation(modulating)
        read = torch.cat([modulate(self.norm(h), scale, shift), c], -1)
        return at_least_float32(self.output(read))
