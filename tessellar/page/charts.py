"""Tokens with their entropies, and what evaluations committed, as pictures."""

from collections.abc import Sequence
from math import ceil

import numpy as np
import torch
from einops import rearrange
from matplotlib import colormaps
from PIL import Image, ImageDraw
from torch import Tensor

from tessellar.page.watching import Moment
from tessellar.protocol.layout import Layout, Segment
from tessellar.sampling.grid import picture_grid

COLUMNS = 16  # tokens in a row of a sequence
WIDEST = 960  # pixels of a chart
LARGEST_CELL = 56
NUMBERED = 26  # cells of fewer pixels hold no id
GAP = 12
LINE = 18
MISSING = (221, 221, 221)  # of tokens that are not drawn yet
PLAIN = (207, 227, 247)  # of tokens without an entropy
BAR = (49, 104, 142)
SHOWN = 384  # pixels of the longer side of an image on the page

Colour = tuple[int, int, int]


def token_chart(moment: Moment, layout: Layout) -> Image.Image:
    """Every token in its place (segments side by side), coloured by its entropy, with its id; below
    them the scale of the colours in nats.
    """
    shapes = [cells_of(segment) for segment in layout.segments]
    columns = sum(shape[1] for shape in shapes)
    rows = max(shape[0] for shape in shapes)
    gaps = GAP * (len(shapes) + 1)
    cell = max(2, min(LARGEST_CELL, (WIDEST - gaps) // columns))
    width = max(columns * cell + gaps, 240)
    picture = Image.new("RGB", (width, rows * cell + 3 * GAP + 2 * LINE), "white")
    pen = ImageDraw.Draw(picture)
    highest = highest_entropy(moment)
    left = GAP
    for start, segment, shape in zip(layout.starts, layout.segments, shapes, strict=False):
        for place in range(segment.length):
            row, column = divmod(place, shape[1])
            corner = (left + column * cell, GAP + row * cell)
            _draw_cell(pen, corner, cell, moment=moment, place=start + place, highest=highest)
        left += shape[1] * cell + GAP
    if not bool(moment.entropy.isnan().all()):
        _draw_scale(pen, (GAP, rows * cell + 2 * GAP), width - 2 * GAP, highest)
    return picture


def highest_entropy(moment: Moment) -> float:
    """The largest entropy that is known, where colours end."""
    known = moment.entropy[~moment.entropy.isnan()]
    return max(float(known.max()), 0.1) if len(known) else 0.1


def _draw_cell(
    pen: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    size: int,
    *,
    moment: Moment,
    place: int,
    highest: float,
) -> None:
    left, top = corner
    colour = MISSING
    is_known = bool(moment.known[place])
    if is_known:
        entropy = moment.entropy[place]
        colour = PLAIN if bool(entropy.isnan()) else viridis(float(entropy) / highest)
    pen.rectangle((left, top, left + size - 2, top + size - 2), fill=colour)
    if is_known and moment.tokens.ndim == 1 and size >= NUMBERED:
        ink = "white" if sum(colour) < 380 else "black"
        middle = (left + size / 2, top + size / 2)
        pen.text(middle, str(int(moment.tokens[place])), fill=ink, anchor="mm")


def _draw_scale(
    pen: ImageDraw.ImageDraw, corner: tuple[int, int], width: int, highest: float
) -> None:
    left, top = corner
    for x in range(width):
        pen.line((left + x, top, left + x, top + LINE // 2), fill=viridis(x / width))
    below = top + LINE // 2 + 2
    pen.text((left, below), "0", fill="black")
    pen.text((left + width / 2, below), "entropy, nats", fill="black", anchor="ma")
    pen.text((left + width, below), f"{highest:.2f}", fill="black", anchor="ra")


def viridis(share: float) -> Colour:
    """The colour of a share in [0, 1]."""
    red, green, blue, _ = colormaps["viridis"](min(max(share, 0.0), 1.0), bytes=True)
    return int(red), int(green), int(blue)


def cells_of(segment: Segment) -> tuple[int, int]:
    """Rows and columns that a segment is drawn in: its own, or rows of COLUMNS tokens of a sequence."""
    if len(segment.shape) == 2:
        return segment.shape[0], segment.shape[1]
    columns = min(COLUMNS, segment.length)
    return ceil(segment.length / columns), columns


def commit_chart(committed: Sequence[int]) -> Image.Image:
    """How many tokens each evaluation committed, a bar each."""
    width = 440
    height = 130
    picture = Image.new("RGB", (width, height + LINE + 2 * GAP), "white")
    pen = ImageDraw.Draw(picture)
    highest = max(committed, default=1)
    for number, count in enumerate(committed):
        left = GAP + number * (width - 2 * GAP) / len(committed)
        right = GAP + (number + 1) * (width - 2 * GAP) / len(committed)
        top = GAP + height * (1 - count / highest)
        pen.rectangle((left, top, max(right - 2, left), GAP + height), fill=BAR)
    below = height + GAP + 2
    said = f"tokens of evaluations 1 to {len(committed)}; the most: {highest}"
    pen.text((GAP, below), said, fill="black")
    return picture


def shown(image: Tensor | None) -> Image.Image | None:
    """An image uint8 [3, H, W] at a size to look at, pixels as squares."""
    if image is None:
        return None
    picture = _as_picture(image)
    factor = max(1, SHOWN // max(picture.size))
    size = (picture.width * factor, picture.height * factor)
    return picture.resize(size, Image.Resampling.NEAREST)


def rows_shown(rows: Sequence[Sequence[Tensor]]) -> Image.Image:
    """Images uint8 [3, H, W] in rows, as one picture."""
    return _as_picture(picture_grid([torch.stack(list(row)) for row in rows]))


def _as_picture(image: Tensor) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(rearrange(image.numpy(), "c h w -> h w c")))
