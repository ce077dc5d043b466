"""Noise: random numbers of an image, so that it depends on its own seed and not on its batch.

Every number is a hash of (the image's seed, how many draws came before, its place in the draw), in
integer arithmetic that is the same on every device: counters instead of a generator's state
(Salmon and others: Parallel random numbers, as easy as 1, 2, 3, SC 2011), mixed by SplitMix64
(Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014). Nothing is drawn
on the host, so a step that draws can be captured.
"""

from collections.abc import Sequence
from math import pi, prod

import torch
from torch import Tensor

from tessellar.randomness import derive

# SplitMix64's numbers as int64, which wraps around as uint64 does.
STEP = 0x9E3779B97F4A7C15 - 2**64
FIRST = 0xBF58476D1CE4E5B9 - 2**64
SECOND = 0x94D049BB133111EB - 2**64


def _shift(x: Tensor, bits: int) -> Tensor:
    """x >> bits with zeros from the left."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * FIRST
    x = (x ^ _shift(x, 27)) * SECOND
    return x ^ _shift(x, 31)


class Noise:
    """Draws of shape [B, *shape] on `device`, row b by `seeds[b]`.

    A draw counts as one for each of its images, so image b is the same alone and in any batch, on one
    process and on several. Uniform draws are the same to the bit on every device; of normal and
    exponential ones the last bit may differ, by the devices' logarithms.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        keys = [derive(int(seed)) for seed in seeds]
        self.keys = torch.tensor(keys, dtype=torch.int64).to(device)
        self.count = torch.zeros_like(self.keys)  # draws so far

    @property
    def device(self) -> torch.device:
        return self.keys.device

    @property
    def wide(self) -> torch.dtype:
        """The precision of logarithms; Apple's GPUs have no float64."""
        return torch.float32 if self.device.type == "mps" else torch.float64

    def __len__(self) -> int:
        return len(self.keys)

    def _bits(self, *shape: int) -> Tensor:
        """64 random bits each, int64 [B, *shape]; the next draw has others."""
        if not prod(shape):  # no number is drawn: nothing to count
            return torch.zeros(len(self.keys), *shape, dtype=torch.int64, device=self.device)
        of_draw = _mix(self.keys + STEP * self._next())[:, None]
        place = torch.arange(1, prod(shape) + 1, device=self.device)
        return _mix(of_draw + STEP * place).view(len(self.keys), *shape)

    def _next(self) -> Tensor:
        """The number [B] of this draw, from 1."""
        return self.count.add_(1)  # in place: a captured step goes on from there

    def uniform(self, *shape: int) -> Tensor:
        """Uniform draws in [0, 1), float32 [B, *shape]: multiples of 2^-24."""
        return _shift(self._bits(*shape), 40).to(torch.float32) * 2.0**-24

    def normal(self, *shape: int) -> Tensor:
        """Standard normal draws, float32 [B, *shape], by Box and Muller from 32 bits each."""
        bits = self._bits(*shape)
        radius = (_shift(bits, 32).to(self.wide) + 1) * 2.0**-32
        angle = (bits & (2**32 - 1)).to(self.wide) * (2 * pi * 2.0**-32)
        return ((-2 * radius.log()).sqrt() * angle.cos()).float()

    def exponential(self, *shape: int) -> Tensor:
        """Exp(1) draws, strictly positive, float32 [B, *shape]."""
        shares = (_shift(self._bits(*shape), 12).to(self.wide) + 0.5) * 2.0**-52
        return (-shares.log()).float().clamp(min=torch.finfo(torch.float32).tiny)

    def select(self, index: Tensor) -> "Noise":
        """Streams of images `index` [b], continuing where they are; an image named twice gets two
        equal streams.
        """
        index = index.to(self.device)
        chosen = Noise([], self.device)
        chosen.keys = self.keys[index]
        chosen.count = self.count[index]
        return chosen

    def part(self, index: Tensor) -> "Noise":
        """The streams of images `index` [b], each named once: what is drawn of them here moves them
        on there.
        """
        return Part(self, index.to(self.device))


class Part(Noise):
    """Streams of some images of another noise."""

    def __init__(self, whole: Noise, index: Tensor) -> None:
        self.keys = whole.keys[index]
        # A part of a part draws from the first one's whole.
        is_part = isinstance(whole, Part)
        self.whole: Noise = whole.whole if is_part else whole
        self.index = whole.index[index] if is_part else index

    @property
    def count(self) -> Tensor:  # type: ignore[override]
        return self.whole.count[self.index]

    def _next(self) -> Tensor:
        self.whole.count.index_add_(0, self.index, torch.ones_like(self.index))
        return self.count
