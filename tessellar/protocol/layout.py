"""Layout: what the tokens of a tokenizer are and in which order they are generated.

A tokenizer declares one layout; generators are built from it, the trainer counts code usage with
it, caches and exports store it. So no vocabulary size and no grid side is ever typed twice. A
layout is a sequence of segments (a grid, a 1D sequence, holistic tokens then a grid, levels,
scales), each with its shape and with what one position holds.
"""

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from tessellar.errors import UserError

MAX_POSITIONS = 1 << 20  # a megapixel of tokens: tables over positions stay small


@dataclass(frozen=True)
class Categorical:
    """One index in [0, vocab) a position."""

    vocab: int


@dataclass(frozen=True)
class Factorized:
    """Several indices a position, sub-token f in [0, vocabs[f])."""

    vocabs: tuple[int, ...]


@dataclass(frozen=True)
class Bits:
    """`n` binary values a position, each 0 or 1."""

    n: int


@dataclass(frozen=True)
class Continuous:
    """A real vector of `dim` channels a position."""

    dim: int


Kind = Categorical | Factorized | Bits | Continuous


@dataclass(frozen=True)
class Segment:
    """Positions of one shape and kind: `(n,)` for a sequence, `(h, w)` for a grid in raster order."""

    shape: tuple[int, ...]
    kind: Kind
    name: str = "tokens"

    def __post_init__(self) -> None:
        if not self.shape or any(side < 1 for side in self.shape):
            raise ValueError(
                f"segment {self.name!r} has shape {self.shape}; every side must be at least 1"
            )
        if self.length > MAX_POSITIONS:
            raise UserError(
                f"segment {self.name!r} has {self.length} positions; there may be {MAX_POSITIONS}"
            )

    @property
    def length(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """Segments in generation order.

    `min_prefix` is the length of the shortest prefix that the tokenizer can decode; None means that
    only the complete sequence can be decoded. Token ids are local to their segment.
    """

    segments: tuple[Segment, ...]
    min_prefix: int | None = None

    def __post_init__(self) -> None:
        if not self.segments:
            raise ValueError("a layout needs at least one segment")
        if self.length > MAX_POSITIONS:
            raise UserError(f"a layout has {self.length} positions; there may be {MAX_POSITIONS}")
        if len({self._trailing(s.kind) for s in self.segments}) > 1:
            raise ValueError(
                "all segments of a layout must hold the same number of values a position"
            )
        if len({isinstance(s.kind, Continuous) for s in self.segments}) > 1:
            raise ValueError(
                "segments of real vectors and of ids cannot share one tensor of tokens"
            )
        if self.min_prefix is not None and not 1 <= self.min_prefix <= self.length:
            raise ValueError(
                f"min_prefix is {self.min_prefix}; it must be in [1, {self.length}] or None"
            )

    @staticmethod
    def _trailing(kind: Kind) -> tuple[int, ...]:
        match kind:
            case Categorical():
                return ()
            case Factorized(vocabs):
                return (len(vocabs),)
            case Bits(n):
                return (n,)
            case Continuous(dim):
                return (dim,)

    @property
    def length(self) -> int:
        """Number of positions N."""
        return sum(s.length for s in self.segments)

    @property
    def starts(self) -> tuple[int, ...]:
        """First position of each segment, and N at the end."""
        starts = [0]
        for segment in self.segments:
            starts.append(starts[-1] + segment.length)
        return tuple(starts)

    @property
    def is_categorical(self) -> bool:
        return all(isinstance(s.kind, Categorical) for s in self.segments)

    @property
    def is_continuous(self) -> bool:
        return all(isinstance(s.kind, Continuous) for s in self.segments)

    @property
    def grid(self) -> tuple[int, int] | None:
        """(h, w) if the layout is one grid, else None."""
        shape = self.segments[0].shape
        return (shape[0], shape[1]) if len(self.segments) == 1 and len(shape) == 2 else None

    def differs_in_shapes(self, other: "Layout") -> bool:
        """Whether both have the same kinds of tokens in the same segments, of whatever shapes: what one
        set of weights can be for.
        """
        return [(s.kind, s.name, len(s.shape)) for s in self.segments] == [
            (s.kind, s.name, len(s.shape)) for s in other.segments
        ]

    def first(self, count: int) -> "Layout":
        """The layout of the first `count` positions; raises ValueError where they are no prefix
        that can be decoded.
        """
        if count == self.length:
            return self
        shortest = self.length if self.min_prefix is None else self.min_prefix
        if not shortest <= count < self.length:
            raise ValueError(f"the first {count} positions of {self} cannot be decoded alone")
        kept = []
        for start, segment in zip(self.starts, self.segments, strict=False):
            left = count - start
            if left >= segment.length:
                kept.append(segment)
            elif left > 0:
                # A part of a grid is a run of its cells.
                kept.append(replace(segment, shape=(left,)))
        return Layout(tuple(kept), self.min_prefix)

    def starts_with(self, other: "Layout") -> bool:
        """Whether `other` is this layout, or that of first positions of it that can be decoded
        alone.
        """
        try:
            return self.first(other.length) == other
        except ValueError:
            return False

    def vocab(self) -> Tensor:
        """Vocabulary size of each position, int64 [N]; raises TypeError unless the layout is
        categorical.
        """
        sizes = []
        for segment in self.segments:
            if isinstance(segment.kind, Categorical):
                sizes.append(torch.full((segment.length,), segment.kind.vocab, device="cpu"))
        if not self.is_categorical:
            raise TypeError(f"only a categorical layout has vocabularies; this one is {self}")
        return torch.cat(sizes)

    def blank(self, batch: int) -> Tensor:
        """Zeroed tokens of a batch: int64 [B, N] or [B, N, F], float32 [B, N, C] for continuous
        layouts.
        """
        dtype = torch.float32 if self.is_continuous else torch.int64
        return torch.zeros(
            batch, self.length, *self._trailing(self.segments[0].kind), dtype=dtype, device="cpu"
        )

    def check(self, tokens: Tensor) -> None:
        """Raise ValueError unless `tokens` [B, n <= N, ...] fit: shape, type, and what each
        segment's kind may hold.
        """
        trailing = self._trailing(self.segments[0].kind)
        shortest = self.length if self.min_prefix is None else self.min_prefix
        if tokens.shape[2:] != trailing or not shortest <= tokens.shape[1] <= self.length:
            needed = ", ".join(map(str, ("B", self.length, *trailing)))
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}; {self} needs [{needed}]")
        if self.is_continuous:
            if not tokens.is_floating_point():
                raise ValueError(f"tokens are {tokens.dtype}; {self} needs real numbers")
            if not bool(tokens.isfinite().all()):
                raise ValueError(f"some of the tokens of {self} are not finite")
            return
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise ValueError(f"tokens are {tokens.dtype}; {self} needs integers")
        for start, segment in zip(self.starts, self.segments, strict=False):
            check_range(tokens[:, start : start + segment.length], segment)

    def __str__(self) -> str:
        parts = [f"{'x'.join(map(str, s.shape))} {s.name} of {s.kind}" for s in self.segments]
        prefix = "" if self.min_prefix is None else f", decodable from {self.min_prefix}"
        return " + ".join(parts) + prefix


def check_range(tokens: Tensor, segment: Segment) -> None:
    """Raise ValueError unless the ids [B, n] or [B, n, F] of a segment lie in its vocabularies."""
    match segment.kind:
        case Categorical(vocab):
            sizes = torch.tensor(vocab)
        case Factorized(vocabs):
            sizes = torch.tensor(vocabs)
        case Bits():
            sizes = torch.tensor(2)
        case Continuous():
            return
    outside = (tokens < 0) | (tokens >= sizes.to(tokens.device))
    if bool(outside.any()):
        wrong = int(tokens[outside][0])
        raise ValueError(
            f"the {segment.name} hold {wrong}, outside the vocabulary of {segment.kind}"
        )


def codebooks(segment: Segment) -> list[int]:
    """Sizes of the codebooks that a position of a segment draws from."""
    match segment.kind:
        case Categorical(vocab):
            return [vocab]
        case Factorized(vocabs):
            return list(vocabs)
        case Bits(n):
            return [2] * n
    raise TypeError(f"{segment.name} has no codebook: {segment.kind}")


def grid_layout(height: int, width: int, kind: Kind, name: str = "tokens") -> Layout:
    """One grid of `height` x `width` positions in raster order."""
    return Layout((Segment((height, width), kind, name),))


def sequence_layout(
    length: int, kind: Kind, min_prefix: int | None = None, name: str = "tokens"
) -> Layout:
    """One sequence of `length` positions."""
    return Layout((Segment((length,), kind, name),), min_prefix)
