"""UniWeTok's attention over a map: Llama blocks without a causal mask, 2-D rotations, and register
tokens before the cells (arXiv 2602.14178).

Pairs of channels turn with the column first, then with the row, by (position + 1) f; registers do
not turn. Every side is stretched to the eight cells of 256 pixels, by two rules that agree there:

    side N         encoder                    decoder
    position i     7 i / (N - 1) + 0.5        7.5 (i + 0.5) / (N - 0.5)
"""

from collections.abc import Callable

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.errors import UserError
from tessellar.layers.kv_cache import NoCache, Slots
from tessellar.layers.llama import LlamaBlock, Pass, Positions, grid_angles, swiglu_hidden
from tessellar.layers.starts import STD

EPS = 1e-6
REGISTERS = 4

Stretch = Callable[[int], Tensor]


def from_edge_to_edge(side: int) -> Tensor:
    """The encoder's positions [side], 0.5 to 7.5; the official ones of a single cell are no numbers."""
    return 7 * torch.arange(side) / max(side - 1, 1) + 0.5


def by_centres(side: int) -> Tensor:
    """The decoder's positions [side], up to 7.5."""
    return (torch.arange(side) + 0.5) * 7.5 / (side - 0.5)


class RegisterAttention(nn.Module):
    """`depth` blocks over maps [B, C, h, w] of any size; `stretch` gives the positions of a side.

    Raises UserError where the heads do not divide the channels into multiples of four.
    """

    def __init__(self, width: int, depth: int, num_heads: int, stretch: Stretch) -> None:
        super().__init__()
        if width % (4 * num_heads):
            raise UserError(
                f"{num_heads} heads of {width} channels cannot turn by row and column: a head needs a multiple of 4"
            )
        self.head_dim = width // num_heads
        self.stretch = stretch
        self.registers = nn.Parameter(torch.empty(REGISTERS, width))
        hidden = swiglu_hidden(width)
        self.blocks = nn.ModuleList(
            LlamaBlock(width, num_heads, hidden, norm_eps=EPS) for _ in range(depth)
        )
        nn.init.normal_(self.registers, std=STD)

    def forward(self, maps: Tensor) -> Tensor:
        height, width = maps.shape[2:]
        registers = repeat(self.registers, "r c -> b r c", b=len(maps))
        x = torch.cat([registers, rearrange(maps, "b c h w -> b (h w) c")], dim=1)
        shared = everything_seen(x, self.positions(height, width))
        for number, block in enumerate(self.blocks):
            x = block(x, number, shared)
        cells = rearrange(x[:, REGISTERS:], "b (h w) c -> b c h w", h=height)
        return cells.contiguous()  # GroupNorm on a CPU loses precision on transposed memory

    def positions(self, height: int, width: int) -> Positions:
        """Rotations of the registers (none) and of the cells in raster order."""
        rows = self.stretch(height).repeat_interleave(width) + 1
        columns = self.stretch(width).repeat(height) + 1
        angles = F.pad(grid_angles(columns, rows, self.head_dim), (0, 0, REGISTERS, 0))
        angles = angles.to(self.registers.device)
        return Positions(angles.cos()[None], angles.sin()[None])


def everything_seen(x: Tensor, positions: Positions) -> Pass:
    """A pass over x [B, n, D] in which every position sees all."""
    n = x.shape[1]
    slots = Slots(torch.arange(n)[None], 0, n, None, False)
    return Pass(positions, NoCache(x.device), slots)
