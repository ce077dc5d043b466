"""Noise on the context of teacher forcing: a generator reads some random tokens and still predicts
the true ones.

In training a generator sees true tokens only, in sampling its own; noise on what it reads narrows
that gap. The default is reAR's noisy context (arXiv 2510.04450): each image draws its rate
uniformly in [0, f(t)] and each token is replaced with that probability by a uniform one, with f(t)
= max(0, 1 - 4 t / 3) of the share t of the run. The formulas are the paper's as its readers report
them; that a replacement may draw the true token again is our reading.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.models.parts.prefix_transformer import PrefixTransformer
from tessellar.protocol.arguments import SHARES, in_ranges
from tessellar.protocol.entities import Entities
from tessellar.protocol.generator import Generator
from tessellar.protocol.layout import Layout


@in_ranges
@dataclass(frozen=True)
class ContextNoise:
    """Rate of replaced tokens: `rate` at the start, falling to 0 at the share `end` of the run
    unless constant.

    With `uniform` each image draws its own rate below that one; without, it is the rate of all. A
    replacement may draw the true token again, as all codes do in VA-pi's and reAR's, unless
    `exclude_true`. Raises UserError for numbers outside [0, 1].
    """

    ranges: ClassVar = {"end": SHARES}

    rate: float = 1.0
    end: float = 0.75
    decay: Literal["constant", "linear", "cosine"] = "linear"
    uniform: bool = True
    exclude_true: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1 or not 0 < self.end <= 1:
            raise UserError(
                f"context noise of rate {self.rate} that ends at {self.end}: 0 <= rate <= 1, 0 < end <= 1"
            )

    def rate_at(self, progress: float) -> float:
        """Rate (or its upper bound) at a share of the run in [0, 1]."""
        if self.decay == "constant":
            return self.rate
        passed = min(1.0, progress / self.end)
        return self.rate * (
            1 - passed if self.decay == "linear" else (1 + math.cos(math.pi * passed)) / 2
        )

    def corrupt(self, tokens: Tensor, layout: Layout, progress: float) -> Tensor:
        """Tokens [B, N] with some replaced by uniform ones of their own vocabulary."""
        rate = self.rate_at(progress)
        if rate == 0:
            return tokens
        bound = torch.rand(len(tokens), 1, device=tokens.device) * rate if self.uniform else rate
        vocab = layout.vocab().to(tokens.device)
        share = torch.rand(tokens.shape, device=tokens.device, dtype=torch.float64)
        if self.exclude_true:
            # One of the others: so many steps further, round the vocabulary.
            further = 1 + (share * (vocab - 1)).to(tokens.dtype)
            drawn = (tokens + further) % vocab
        else:
            drawn = (share * vocab).to(tokens.dtype)
        return replaced(tokens, torch.rand(tokens.shape, device=tokens.device) < bound, drawn)


def replaced(tokens: Tensor, mask: Tensor, drawn: Tensor) -> Tensor:
    """Tokens [B, N] with those `drawn` where `mask` is True."""
    return torch.where(mask, drawn, tokens)


def require_teacher_forcing(generator: Generator, option: str) -> PrefixTransformer:
    """The generator, if it reads categorical tokens by teacher forcing; raises UserError, naming
    the option, if not.
    """
    if not isinstance(generator, PrefixTransformer) or not generator.layout.is_categorical:
        raise UserError(
            f"{option} needs a generator that reads categorical tokens by teacher forcing, such as LlamaGen; "
            f"{type(generator).__name__} does not"
        )
    return generator


@contextmanager
def reading(
    generator: PrefixTransformer, reader: Callable[[Tensor, Entities], Tensor]
) -> Iterator[None]:
    """Inside, teacher forcing reads tokens through `reader`."""
    generator.reader = reader
    try:
        yield
    finally:
        generator.reader = None
