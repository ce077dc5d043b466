"""A small MLP that denoises one token given its vector z: MAR's head (arXiv 2406.11838, section 3.3),
whose blocks others change (Ming-UniVision's are SwiGLU, arXiv 2510.06590).
"""

from collections.abc import Callable

from torch import Tensor, nn

from tessellar.layers.adaln import Modulation, modulate
from tessellar.layers.precision import at_least_float32
from tessellar.layers.time_embedding import TimeEmbedding


class TokenHead(nn.Module):
    """Noisy tokens [..., C], times [...] as they are embedded, and z [..., D] to [..., `out`].

    `block(width)` makes one of `depth` blocks, which are called with hidden states and the condition,
    the sum of time and z.
    """

    def __init__(
        self,
        channels: int,
        out: int,
        condition_dim: int,
        width: int,
        depth: int,
        block: Callable[[int], nn.Module],
    ) -> None:
        super().__init__()
        self.channels = channels
        self.time = TimeEmbedding(width)
        self.condition = nn.Linear(condition_dim, width)
        self.input = nn.Linear(channels, width)
        self.blocks = nn.ModuleList(block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = Modulation(width, count=2)
        self.output = nn.Linear(width, out)
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

    def denoised(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """[..., out], at least float32."""
        condition = self.time(t) + self.condition(z)
        h = self.input(x)
        for block in self.blocks:
            h = block(h, condition)
        shift, scale = self.modulation(condition)
        return at_least_float32(self.output(modulate(self.norm(h), scale, shift)))
