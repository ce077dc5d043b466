"""What reconstructions do not tell of a tokenizer, though generators feel it: how codes are used by
position, what a prefix of the tokens is worth, and how much codes may err.

pFD is RobustTok's pFID (arXiv 2503.08354): the distance of reconstructions from tokens of which a
share was replaced by near ones; nothing of it is trained here.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from tessellar.distributed import gather_rows
from tessellar.errors import UserError
from tessellar.evaluation.engine import Yardstick, evaluate
from tessellar.evaluation.generation import Reconstructions
from tessellar.evaluation.protocols import Metric
from tessellar.evaluation.sources import ImageBatch, ImageSource
from tessellar.evaluation.token_views import latents_of
from tessellar.images import from_uint8, to_uint8
from tessellar.measures.codes import swapped
from tessellar.measures.paired import psnr
from tessellar.protocol.layout import Layout
from tessellar.protocol.tokenizer import Tokenizer

Change = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Tokens [B, N] of images [B, 3, H, W] with their places [B] in the set, to those that are decoded."""


class ChangedReconstructions(Reconstructions):
    """Images from changed tokens of theirs, each beside its original; `scores` [B] are the PSNR of
    each in dB, in the order of this rank's images, once all were drawn.
    """

    def __init__(self, tokenizer: Tokenizer, originals: ImageSource, change: Change) -> None:
        super().__init__(tokenizer, originals)
        self.change = change
        self.tokens: list[Tensor] = []
        self.scores = torch.empty(0)

    @torch.no_grad()
    def batches(self, batch_size: int) -> Iterator[ImageBatch]:
        device = next(self.tokenizer.parameters()).device
        scores = []
        self.tokens = []
        for batch in self.originals.batches(batch_size):
            self._check_size(batch.images)
            images = from_uint8(batch.images).to(device)
            tokens = self.tokenizer.encode(images)
            self.tokens.append(tokens.cpu())
            drawn = self.tokenizer.decode(self.change(tokens, images, batch.index))
            found = to_uint8(drawn).cpu()
            scores.append(psnr(found, batch.images))
            yield ImageBatch(found, batch.index, batch.labels, batch.images)
        self.scores = torch.cat(scores)


def unchanged(tokens: Tensor, images: Tensor, index: Tensor) -> Tensor:
    return tokens


@dataclass(frozen=True)
class Prefix:
    """Only the first `length` tokens."""

    length: int

    def __call__(self, tokens: Tensor, images: Tensor, index: Tensor) -> Tensor:
        return tokens[:, : self.length]


@dataclass(frozen=True)
class Swap:
    """Each token with probability `alpha` one of the `delta` codes nearest to its latent, drawn
    with `seed` + the image's place.
    """

    tokenizer: Tokenizer
    alpha: float
    delta: int
    seed: int

    def __call__(self, tokens: Tensor, images: Tensor, index: Tensor) -> Tensor:
        quantizer: Any = self.tokenizer.quantizer
        neighbours = quantizer.neighbours(latents_of(self.tokenizer, images), self.delta)
        changed = []
        for row, near, place in zip(tokens, neighbours, index.tolist(), strict=True):
            generator = torch.Generator().manual_seed(self.seed + place)
            changed.append(swapped(row, near, self.alpha, generator))
        return torch.stack(changed)


def check_swaps(tokenizer: Tokenizer, alphas: Sequence[float], deltas: Sequence[int]) -> None:
    """Raise UserError where codes of this tokenizer cannot be swapped so."""
    if not alphas and not deltas:
        return
    if not alphas or not deltas:
        raise UserError("pFD needs both --alpha (shares of the tokens) and --delta (nearest codes)")
    wrong = [alpha for alpha in alphas if not 0 <= alpha <= 1]
    if wrong:
        raise UserError(f"--alpha is {wrong[0]}; it is a share of the tokens, in [0, 1]")
    quantizer = getattr(tokenizer, "quantizer", None)
    layout = tokenizer.layout
    one_book = len(layout.segments) == 1 and layout.is_categorical
    if not one_book or not getattr(quantizer, "has_neighbours", False):
        raise UserError(
            "pFD swaps codes of one codebook that can be told near from far; "
            f"{type(tokenizer).__name__} has {layout} by {type(quantizer).__name__}"
        )
    vocab = int(layout.vocab()[0])
    wrong_counts = [delta for delta in deltas if not 1 <= delta <= vocab]
    if wrong_counts:
        raise UserError(f"--delta is {wrong_counts[0]}; it must be in [1, {vocab}] codes")


def prefix_lengths(layout: Layout, wanted: Sequence[int] = ()) -> list[int]:
    """Lengths of prefixes to decode, the whole last: those `wanted`, else whole segments of several,
    else the shortest, its doublings and all. Only the whole where no prefix decodes.

    Raises UserError for a length that does not decode.
    """
    shortest = layout.min_prefix or layout.length
    if wanted:
        for length in wanted:
            if not shortest <= length <= layout.length:
                raise UserError(
                    f"a prefix of {length} tokens was asked for; {layout} decodes from {shortest} "
                    f"to {layout.length}"
                )
        return sorted({*wanted, layout.length})
    if len(layout.segments) > 1:
        ends = layout.starts[1:]
        return [end for end in ends if end >= shortest]
    lengths = []
    length = shortest
    while length < layout.length:
        lengths.append(length)
        length *= 2
    return [*lengths, layout.length]


def prefix_curve(
    tokenizer: Tokenizer,
    originals: ImageSource,
    lengths: Sequence[int],
    yardsticks: Sequence[Yardstick],
    batch_size: int,
) -> list[dict[str, float]]:
    """For each length: PSNR, SSIM, the distances where there are networks; the standard error of the
    mean PSNR, and the mean step from the length before, image by image, with its standard error.
    """
    curve = []
    before = None
    for length in lengths:
        source = ChangedReconstructions(tokenizer, originals, Prefix(length))
        found = _measured(source, yardsticks, batch_size)
        scores = gather_rows(source.scores)
        point = {"tokens": length, **found, "PSNR error": standard_error(scores)}
        if before is not None:
            point["PSNR step"] = float((scores - before).mean())
            point["PSNR step error"] = standard_error(scores - before)
        before = scores
        curve.append(point)
    return curve


def swap_distances(
    tokenizer: Tokenizer,
    originals: ImageSource,
    alphas: Sequence[float],
    deltas: Sequence[int],
    seed: int,
    yardsticks: Sequence[Yardstick],
    batch_size: int,
) -> list[dict[str, float]]:
    """PSNR, SSIM and distances after swaps, for each share and number of nearest codes."""
    cells = []
    for alpha in alphas:
        for delta in deltas:
            change = Swap(tokenizer, alpha, delta, seed)
            source = ChangedReconstructions(tokenizer, originals, change)
            found = _measured(source, yardsticks, batch_size)
            cells.append({"alpha": alpha, "delta": delta, **found})
    return cells


def _measured(
    source: Reconstructions, yardsticks: Sequence[Yardstick], batch_size: int
) -> dict[str, float]:
    metrics: list[Metric] = ["fd", "paired"] if yardsticks[0].extractor.dim else ["paired"]
    return evaluate(source, yardsticks, metrics=metrics, batch_size=batch_size)["metrics"]


def standard_error(values: Tensor) -> float:
    """Of the mean of values [N]; 0 for a single one."""
    if len(values) < 2:
        return 0.0
    return float(values.std() / sqrt(len(values)))
