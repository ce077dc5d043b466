"""The grid that each channel is quantised to: the means of a standard normal in bins of equal
probability, or equal steps (TokenBridge, arXiv 2503.16430, section 3.2).

Values in [lowest, highest] are mapped to [-r, r], where the grid is. Different from the official
code: the equal steps, which the paper names as nearly as good.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.protocol.ranges import check_name, check_number, check_whole

Spacing = Literal["gaussian", "uniform"]


def gaussian_levels(levels: int, spread: float) -> tuple[Tensor, Tensor]:
    """Levels [B] and boundaries [B + 1]: bins of N(0, 1) of equal probability, cut at +-`spread`,
    and its mean in each.
    """
    shares = torch.linspace(0, 1, levels + 1, dtype=torch.float64, device="cpu")
    boundaries = torch.special.ndtri(shares).clamp(-spread, spread).float()
    # In float32 from here on: the published tables are, and so ours have their bits.
    density = (-boundaries.square() / 2).exp() / (2 * torch.pi) ** 0.5
    below = 0.5 * (1 + (boundaries / 2**0.5).erf())
    return -density.diff() / below.diff(), boundaries


def uniform_levels(levels: int, spread: float) -> tuple[Tensor, Tensor]:
    """Levels [B], the middles of bins of equal width in +-`spread`, and their boundaries [B + 1]."""
    boundaries = torch.linspace(-spread, spread, levels + 1, device="cpu")
    return (boundaries[1:] + boundaries[:-1]) / 2, boundaries


class ChannelGrid(nn.Module):
    """`levels` values for numbers in [`lowest`, `highest`]; what lies outside takes the outermost.

    `spread` is where the normal of the Gaussian grid is cut. Nothing of it is learnt. Raises
    UserError for numbers that make no grid.
    """

    def __init__(
        self,
        levels: int = 64,
        lowest: float = -5.0,
        highest: float = 5.0,
        spread: float = 3.0,
        spacing: Spacing = "gaussian",
    ) -> None:
        super().__init__()
        check_whole("levels", levels, least=2)
        check_number("lowest", lowest)
        check_number("highest", highest, above=lowest)
        check_number("spread", spread, above=0)
        check_name("spacing", spacing, ("gaussian", "uniform"))
        make = gaussian_levels if spacing == "gaussian" else uniform_levels
        values, boundaries = make(levels, spread)
        if bool((boundaries.diff() <= 0).any()):
            raise UserError(
                f"{levels} levels of a normal cut at {spread} leave bins empty: give a larger spread"
            )
        self.levels = levels
        self.lowest = lowest
        self.highest = highest
        self.spread = spread
        self.register_buffer("values", values)
        self.values: Tensor

    def quantize(self, x: Tensor) -> Tensor:
        """Index of the nearest level of each number [...], the lower one of two."""
        inside = (x.float() - self.lowest) / (self.highest - self.lowest)
        inside = (2 * self.spread * inside - self.spread).clamp(-self.spread, self.spread)
        upper = torch.searchsorted(self.values, inside.contiguous()).clamp(1, self.levels - 1)
        lower = upper - 1
        is_lower = inside - self.values[lower] <= self.values[upper] - inside
        return torch.where(is_lower, lower, upper)

    def dequantize(self, index: Tensor) -> Tensor:
        """The numbers that indices [...] stand for, float32."""
        share = (self.values[index] + self.spread) / (2 * self.spread)
        return share * (self.highest - self.lowest) + self.lowest
