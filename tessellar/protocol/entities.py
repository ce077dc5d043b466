"""Entities: the "X" of next-X prediction, an ordered partition of a layout's N tokens.

An entity is the set of tokens that a generator predicts at once: a token, a cell, a subsample, a
level, a scale, the whole image. It is only data (an order and sizes), so decoding loops index with
it and know nothing of what X is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor

from tessellar.errors import UserError
from tessellar.protocol.layout import Layout
from tessellar.protocol.local_order import (
    Thresholds,
    local_order_of,
    local_sizes,
    seeded_chances,
)


@dataclass(frozen=True, eq=False)
class Entities:
    """Ordered partition of N tokens.

    `order` [N], or [B, N] where every image has its own: `order[i]` is the place on the layout's
    token axis of the i-th token generated. `sizes` are the tokens of each entity, in the same
    order. Lives on the CPU, where host code reads it, or where `to` brings it: entity numbers given
    to its methods lie there too, and of entities of one size nothing is read on the host.
    """

    order: Tensor
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if sum(self.sizes) != self.order.shape[-1] or min(self.sizes, default=0) < 1:
            raise ValueError(
                f"entity sizes {self.sizes} must be positive and sum to {self.order.shape[-1]} tokens"
            )
        ends = torch.tensor((0, *self.sizes), device="cpu").cumsum(0)
        object.__setattr__(self, "ends", ends)
        object.__setattr__(
            self,
            "_entity",
            torch.arange(len(self.sizes), device="cpu").repeat_interleave(ends.diff()),
        )
        object.__setattr__(self, "uniform", len(set(self.sizes)) == 1)

    ends: Tensor = None  # type: ignore[assignment]  # [count + 1] tokens before each entity, and N
    _entity: Tensor = None  # type: ignore[assignment]  # [N] entity of the i-th token generated
    uniform: bool = False  # all entities are of one size

    def to(self, device: torch.device | str) -> "Entities":
        """The same partition with its tables on `device`."""
        moved = Entities(self.order.to(device), self.sizes)
        object.__setattr__(moved, "ends", self.ends.to(device))
        object.__setattr__(moved, "_entity", self._entity.to(device))
        return moved

    @property
    def count(self) -> int:
        return len(self.sizes)

    @property
    def length(self) -> int:
        return int(self.order.shape[-1])

    def span(self, first: Tensor, count: int) -> tuple[Tensor, int]:
        """First generated token of each row [B] and the number of tokens T of `count` entities from
        `first` [B].

        Past the end, entities continue with the last size. Raises ValueError where rows would get
        unequal T.
        """
        if self.uniform:
            return first * self.sizes[0], count * self.sizes[0]
        past = (first - self.count).clamp(min=0) * self.sizes[-1]
        starts = self.ends[first.clamp(max=self.count)] + past
        last = first + count
        stops = (
            self.ends[last.clamp(max=self.count)]
            + (last - self.count).clamp(min=0) * self.sizes[-1]
        )
        lengths = (stops - starts).unique()
        if len(lengths) > 1:
            raise ValueError(
                f"rows stand at entities {first.tolist()} of unequal size; they must be in step"
            )
        return starts, int(lengths)

    def steps(self, first: Tensor, count: int) -> Tensor:
        """[B, T] generation ranks of the tokens of `count` entities from `first` [B]; not clamped
        past the end.
        """
        starts, length = self.span(first, count)
        return starts[:, None] + torch.arange(length, device=starts.device)

    def indices(self, first: Tensor, count: int) -> Tensor:
        """[B, T] places on the token axis of `count` entities from `first` [B]; clamped to the last
        token.
        """
        steps = self.steps(first, count).clamp(max=self.length - 1)
        return self.order.expand(len(first), -1).gather(1, steps)

    def entity_of(self, first: Tensor, count: int) -> Tensor:
        """[B, T] entity number of those tokens; grows past `count`, not clamped."""
        return self.entity_at(self.steps(first, count))

    def entity_at(self, rank: Tensor) -> Tensor:
        """Entity numbers of tokens by their generation ranks; they grow past `count`, not clamped."""
        if self.uniform:
            return rank.div(self.sizes[0], rounding_mode="floor")
        inside = self._entity[rank.clamp(max=self.length - 1)]
        past = self.count + (rank - self.length).div(self.sizes[-1], rounding_mode="floor")
        return torch.where(rank < self.length, inside, past)

    def ranks_of(self, places: Tensor) -> Tensor:
        """[B, T] generation ranks of the tokens at `places` [B, T]."""
        return self.inverse.expand(len(places), -1).gather(1, places)

    def get(self, tokens: Tensor, first: Tensor, count: int) -> Tensor:
        """Tokens [B, T, ...] of `count` entities from `first` [B], read from the token buffer [B,
        N, ...].
        """
        return take(tokens, self.indices(first, count))

    def put(
        self, tokens: Tensor, first: Tensor, count: int, values: Tensor, keep: Tensor | None = None
    ) -> Tensor:
        """A copy of the buffer with `values` [B, T, ...] in place; where `keep` [B, T] is False
        nothing is written.

        Tokens past the end are never written.
        """
        inside = (self.steps(first, count) < self.length).to(tokens.device)
        keep = inside if keep is None else keep.to(tokens.device) & inside
        index = self.indices(first, count).to(tokens.device)
        return put(tokens, index, values, keep)

    def select(self, index: Tensor) -> "Entities":
        """The partition of images `index` where every image has its own order."""
        if self.order.ndim == 1:
            return self
        chosen = Entities(self.order[index.to(self.order.device)].cpu(), self.sizes)
        return chosen.to(self.order.device)

    @property
    def numbers(self) -> Tensor:
        """[N] entity of the i-th token generated."""
        return self._entity

    @property
    def inverse(self) -> Tensor:
        """[N] or [B, N]: `inverse[p]` is when the token at place p is generated; undoes `order`."""
        return self.order.argsort(-1)

    def mask(self) -> Tensor:
        """[N, N] block-causal visibility in generation order: row i sees column j iff entity(j) <=
        entity(i).
        """
        return self._entity[None, :] <= self._entity[:, None]


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [B, T] of `x` [B, N, ...] along the second axis."""
    rows = torch.arange(len(x), device=x.device)[:, None]
    return x[rows, index.to(x.device)]


def put(tokens: Tensor, index: Tensor, values: Tensor, keep: Tensor) -> Tensor:
    """A copy of the buffer [B, N, ...] with `values` [B, T, ...] at places `index` [B, T], where
    `keep` [B, T].
    """
    # What is not kept goes behind the end and is cut off: so no number of tokens is read.
    spare = torch.zeros_like(tokens[:, :1])
    result = torch.cat([tokens, spare], 1)
    rows = torch.arange(len(tokens), device=tokens.device)[:, None]
    result[rows, torch.where(keep, index, tokens.shape[1])] = values.to(tokens.dtype)
    return result[:, :-1].contiguous()


def token_order(layout: Layout) -> Entities:
    """One token at a time, in the layout's own order (raster on a grid)."""
    return Entities(torch.arange(layout.length, device="cpu"), (1,) * layout.length)


def ordered(order: Sequence[int] | Tensor, sizes: Sequence[int]) -> Entities:
    """Entities from a list of places and their sizes; raises ValueError unless `order` is a
    permutation.
    """
    order = torch.as_tensor(order, dtype=torch.int64)
    if not torch.equal(order.sort(-1).values, torch.arange(order.shape[-1]).expand_as(order)):
        raise ValueError(f"an order must contain each of its {order.shape[-1]} places exactly once")
    return Entities(order, tuple(sizes))


def image_entity(layout: Layout) -> Entities:
    """Everything at once."""
    return Entities(torch.arange(layout.length, device="cpu"), (layout.length,))


def cells(layout: Layout, h: int, w: int) -> Entities:
    """Cells of `h` rows x `w` columns of a grid, cells in raster order and raster order inside
    (xAR's default X).

    On one sequence, cells of a single row are `w` consecutive tokens.
    """
    if h == 1 and len(layout.segments) == 1 and len(layout.segments[0].shape) == 1:
        if w < 1 or layout.length % w:
            raise UserError(f"windows of {w} do not divide the sequence of {layout.length} tokens")
        return Entities(torch.arange(layout.length, device="cpu"), (w,) * (layout.length // w))
    rows, columns = _grid(layout, "cells", h, w)
    order = rearrange(
        torch.arange(rows * columns, device="cpu"),
        "(r h c w) -> (r c h w)",
        h=h,
        c=columns // w,
        w=w,
    )
    return Entities(order, (h * w,) * (rows * columns // (h * w)))


def subsamples(layout: Layout, down: int, across: int | None = None) -> Entities:
    """`down` x `across` tokens spread evenly over the grid at once (xAR, arXiv 2502.20388,
    algorithm 1).

    Neighbours inside an entity are (height / down, width / across) apart: the numbers count tokens,
    not distances.
    """
    across = across or down
    h, w = _grid(layout, "subsamples", down, across)
    order = rearrange(
        torch.arange(h * w, device="cpu"), "(i h j w) -> (h w i j)", i=down, j=across, w=w // across
    )
    return Entities(order, (down * across,) * (h * w // (down * across)))


def levels(layout: Layout, sizes: Sequence[int] | None = None) -> Entities:
    """Runs of tokens in the layout's own order: of the given sizes, or one a segment (levels,
    scales).
    """
    sizes = tuple(sizes or (segment.length for segment in layout.segments))
    if sum(sizes) != layout.length or min(sizes) < 1:
        raise UserError(
            f"levels of {sizes} tokens must be positive and sum to the {layout.length} tokens of {layout}"
        )
    return Entities(torch.arange(layout.length, device="cpu"), sizes)


def scales(layout: Layout) -> Entities:
    """One entity a scale of a pyramid: grids that grow, or sequences that do; raises UserError for
    any other layout.
    """
    shapes = [segment.shape for segment in layout.segments]
    alike = len({len(shape) for shape in shapes}) == 1
    grow = all(
        small <= large
        for coarse, fine in pairwise(shapes)
        for small, large in zip(coarse, fine, strict=False)
    )
    if len(shapes) < 2 or not alike or not grow:
        raise UserError(
            "scales need a layout of grids, or of sequences, from coarse to fine; "
            f"this tokenizer gives {layout}"
        )
    return levels(layout)


def random_order(
    layout: Layout,
    generator: torch.Generator,
    batch: int | None = None,
    sizes: Sequence[int] | None = None,
) -> Entities:
    """Tokens in random order, [N] or one order an image [B, N]; entities of `sizes` (default: one
    token each).
    """
    orders = [
        torch.randperm(layout.length, generator=generator, device="cpu") for _ in range(batch or 1)
    ]
    return Entities(
        orders[0] if batch is None else torch.stack(orders), tuple(sizes or (1,) * layout.length)
    )


def shuffled(entities: Entities, generator: torch.Generator) -> Entities:
    """The same entities in random order, each with its tokens as they were; every image shares the
    order.
    """
    parts = entities.order.split(entities.sizes)
    chosen = torch.randperm(entities.count, generator=generator, device="cpu").tolist()
    return Entities(torch.cat([parts[n] for n in chosen]), tuple(entities.sizes[n] for n in chosen))


def local_order(
    layout: Layout,
    steps: int,
    seed: int = 0,
    thresholds: Thresholds = Thresholds(),  # noqa: B008
) -> Entities:
    """Tokens of a grid in LPD's locality-aware order (`local_order.py`), in `steps` entities that
    grow.
    """
    rows, columns = _grid(layout, "local orders", 1, 1)
    sizes = local_sizes(rows * columns, steps)
    chances = seeded_chances(rows * columns, steps, seed)
    order = local_order_of((rows, columns), sizes, chances, thresholds)
    return Entities(torch.tensor(order, device="cpu"), sizes)


def parse_entities(text: str, layout: Layout) -> Entities:
    """X as a flag: token, image, level, scale, cell:4 (4x4), cell:2x8, subsample:2, level:1,1,2,4,
    random:SEED.

    `local:STEPS` or `local:STEPS,SEED` is LPD's order.

    Raises UserError for anything else, and where X does not fit the layout.
    """
    name, _, given = text.partition(":")
    parts = given.replace("x", ",").split(",") if given else []
    numbers = tuple(int(part) for part in parts if part.isdecimal())
    if len(numbers) < len(parts):
        name = ""
    match name, numbers:
        case "token", ():
            return token_order(layout)
        case "image", ():
            return image_entity(layout)
        case "scale", ():
            return scales(layout)
        case "level", sizes:
            return levels(layout, sizes or None)
        case ("cell", (k,)) | ("window", (k,)):
            return cells(layout, k, k)
        case "cell", (h, w):
            return cells(layout, h, w)
        case "subsample", (d,):
            return subsamples(layout, d)
        case "subsample", (down, across):
            return subsamples(layout, down, across)
        case "local", (steps,):
            return local_order(layout, steps)
        case "local", (steps, seed):
            return local_order(layout, steps, seed)
        case "random", (seed,):
            return random_order(layout, torch.Generator().manual_seed(seed))
    raise UserError(
        f"entity {text!r} is none of token, image, scale, level, level:SIZES, cell:K, cell:HxW, window:K, subsample:D, "
        "random:SEED, local:STEPS, local:STEPS,SEED"
    )


def _grid(layout: Layout, name: str, height: int, width: int) -> tuple[int, int]:
    """Sides of a layout that is one grid and divides into height x width; raises UserError for any
    other.
    """
    if layout.grid is None:
        raise UserError(f"{name} need a layout of one grid; this tokenizer gives {layout}")
    if height < 1 or width < 1 or layout.grid[0] % height or layout.grid[1] % width:
        raise UserError(
            f"{name} of {height}x{width} do not divide the grid of {layout.grid[0]}x{layout.grid[1]}"
        )
    return layout.grid
