"""BAR's masked-bit head (arXiv 2602.09024): an MLP that, given a position's vector and some of its
bits, predicts the others; a token is drawn in a few steps of unmasking.

Its size grows with the number k of bits (2 x k outputs), never with the 2^k codes. Ours beyond the
paper: `full_share`, for at 16 bits the training schedule draws the state in which every token begins,
all bits masked, nine times in a million.

Shapes: B images, R rows, T positions, k bits of a position, D width of the transformer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import pi

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.errors import UserError
from tessellar.layers.adaln import Modulation, modulate
from tessellar.layers.llama import SwiGLU
from tessellar.layers.precision import at_least_float32
from tessellar.protocol.distribution import Distribution, Draws
from tessellar.protocol.noise import Noise

MASK = 2
"""Row of a table of bits that stands for a hidden one."""
STEPS = 4  # of sampling, where no allocation is given


class BitEmbedding(nn.Module):
    """Values 0, 1, MASK of k bits [..., k] to vectors [..., D]: k short embeddings from one table,
    side by side, and a linear layer.
    """

    def __init__(self, bits: int, width: int) -> None:
        super().__init__()
        each = -(-width // bits)
        self.table = nn.Embedding(3, each)
        self.project = nn.Linear(bits * each, width)

    def forward(self, values: Tensor) -> Tensor:
        return self.project(self.table(values).flatten(-2))


class HeadBlock(nn.Module):
    """x + gate SwiGLU(norm(x) (1 + scale) + shift)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.mlp = SwiGLU(width, int(8 * width / 3), bias=True)
        self.modulation = Modulation(width, count=3)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition)
        return x + gate * self.mlp(modulate(self.norm(x), scale, shift))


class MaskedBitHead(nn.Module):
    """Logits [..., k, 2] of all bits of a position, of its vector [..., D], its known bits and how
    many of them are hidden.
    """

    frequencies: Tensor

    def __init__(
        self,
        condition_dim: int,
        bits: int,
        width: int = 2048,
        depth: int = 3,
        num_frequencies: int = 256,
    ) -> None:
        super().__init__()
        self.bits = bits
        self.embedding = BitEmbedding(bits, width)
        self.norm_in = nn.RMSNorm(width, eps=1e-6)
        # Drawn once, never trained.
        self.register_buffer("frequencies", torch.randn(num_frequencies))
        self.ratio_in = nn.Linear(2 * num_frequencies, width)
        self.ratio_out = nn.Linear(width, width)
        self.condition = nn.Linear(condition_dim, width)
        self.blocks = nn.ModuleList(HeadBlock(width) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.last_modulation = Modulation(width, count=2)
        self.output = nn.Linear(width, 2 * bits)

    def forward(self, vectors: Tensor, bits: Tensor, masked: Tensor, ratio: Tensor) -> Tensor:
        """Logits, float32, for `bits` [..., k], of which those that are `masked` are not read;
        `ratio` [...] is the share of masked ones that the head is told.
        """
        h = self.norm_in(self.embedding(bits.masked_fill(masked, MASK)))
        angles = 2 * pi * ratio[..., None].to(self.frequencies.dtype) * self.frequencies
        waves = torch.cat([angles.sin(), angles.cos()], -1).to(h.dtype)
        told = self.ratio_out(F.silu(self.ratio_in(waves)))
        # Modulations apply SiLU once more, as officially.
        condition = F.silu(told + self.condition(vectors))
        for block in self.blocks:
            h = block(h, condition)
        scale, shift = self.last_modulation(condition)
        logits = self.output(modulate(self.norm(h), scale, shift))
        return at_least_float32(logits).unflatten(-1, (self.bits, 2))


def draw_masks(shape: tuple[int, int], bits: int, full_share: float = 0.0) -> tuple[Tensor, Tensor]:
    """Which bits training hides, [B, T, k], and the shares [B, T] that the head is told.

    m = clamp(1 - sigmoid(0.8 n), 1 / k, 1) of a normal n a token, max(1, round(k m)) bits of it;
    with probability `full_share` all.
    """
    ratio = (1 - (0.8 * torch.randn(shape)).sigmoid()).clamp(min=1 / bits, max=1.0)
    if full_share:
        ratio = torch.where(torch.rand(shape) < full_share, 1.0, ratio)
    count = (bits * ratio).round().clamp(min=1)
    rank = torch.rand(*shape, bits).argsort(-1).argsort(-1)
    return rank < count[..., None], ratio


def masked_bit_loss(
    logits: Tensor,
    bits: Tensor,
    masked: Tensor,
    known_weight: float = 0.1,
    weight: Tensor | None = None,
) -> Tensor:
    """sum w CE / sum w of logits [B, T, k, 2] over the batch, w = 1 at masked bits [B, T, k] and
    `known_weight` at the others; samples count by `weight` [B].
    """
    each = F.cross_entropy(logits.flatten(0, 2), bits.flatten(), reduction="none").view(bits.shape)
    share = torch.where(masked, 1.0, known_weight)
    if weight is not None:
        share = share * weight[:, None, None]
    return (share * each).sum() / share.sum().clamp(min=torch.finfo(each.dtype).eps)


BitModel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(bits [B, T, k], masked [B, T, k], share of masked ones [B, T]) to guided logits [B, T, k, 2]."""


@dataclass(frozen=True)
class MaskedBits(Distribution):
    """T positions of k bits, unmasked in steps by confidence; `tokens_each` tokens are a position.

    How likely a token is, no formula says: the order of its bits is drawn with it.
    """

    model: BitModel
    shape: tuple[int, int, int]  # B, T, k
    tokens_each: int = 1
    device: torch.device | str = "cpu"
    hidden: Tensor | None = None

    def sample(self, settings: Draws, noise: Noise) -> Tensor:
        """Tokens [B, T x `tokens_each`, bits], in as many steps as `bit_steps` of the choice has
        numbers; the temperature falls to a step's share of it.
        """
        batch, length, count = self.shape
        allocation = settings.choice.bit_steps or even_steps(count)
        if sum(allocation) != count:
            raise UserError(
                f"bit_steps {list(allocation)} make {sum(allocation)} bits; a position has {count}"
            )
        bits = torch.zeros(batch, length, count, dtype=torch.int64, device=self.device)
        masked = torch.ones_like(bits, dtype=torch.bool)
        kept = 0
        for step, more in enumerate(allocation):
            ratio = torch.full((batch, length), 1 - kept / count, device=self.device)
            logits = self.model(bits, masked, ratio)
            temperature = settings.choice.temperature * (1 - step / len(allocation))
            drawn = draw_bits(logits, temperature, noise)
            drawn = torch.where(masked, drawn, bits)
            kept += more
            kept_now = most_confident(logits, drawn, masked, kept, temperature, noise)
            bits = torch.where(kept_now, drawn, bits)
            masked = ~kept_now
        return bits.unflatten(-1, (self.tokens_each, -1)).flatten(1, 2)


def even_steps(count: int) -> tuple[int, ...]:
    """STEPS numbers that make `count`, the larger ones last; fewer for fewer bits."""
    steps = min(STEPS, count)
    return tuple((count * (i + 1)) // steps - (count * i) // steps for i in range(steps))


def draw_bits(logits: Tensor, temperature: float, noise: Noise) -> Tensor:
    """A bit of each logits [B, ..., 2]: 1 with probability sigmoid((l1 - l0) / temperature)."""
    uniform = noise.uniform(*logits.shape[1:-1])
    odds = logits[..., 1] - logits[..., 0]
    if temperature == 0:
        return (odds > 0).long()
    return (uniform < (odds / temperature).sigmoid()).long()


def most_confident(
    logits: Tensor, drawn: Tensor, masked: Tensor, count: int, temperature: float, noise: Noise
) -> Tensor:
    """[B, T, k], True at the known bits and the most confident new ones, `count` in all.

    Confidence is the raw logit of the drawn value, not its log-probability, and Gumbel noise times
    the temperature.
    """
    gumbel = -noise.exponential(*drawn.shape[1:]).log()
    confidence = logits.gather(-1, drawn[..., None])[..., 0] + temperature * gumbel
    confidence = confidence.masked_fill(~masked, torch.inf)
    rank = confidence.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return rank < count
