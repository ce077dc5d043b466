"""Pictures made of pictures: cells at a size to look at, gaps between them, labels beside the rows,
captions below the cells.

Small images are enlarged by a whole factor, every pixel a square, so that nothing is smoothed away.
"""

import os
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CELL = 128  # pixels that a small cell is enlarged to, about
GAP = 4
FONT = 14
LINE = 18
LABEL_WIDTH = 150
CAPTION_LINES = 4
INK = "black"
PAPER = "white"


def picture_grid(
    rows: Sequence[Sequence[Tensor] | Tensor],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
) -> Tensor:
    """uint8 images [3, H, W] of one size in rows, as one uint8 picture [3, H', W'].

    Short rows end in paper. Labels stand to the left of rows and above columns, captions below
    their cells, all wrapped at words.
    """
    first = rows[0][0]
    factor = enlargement(first.shape[1], first.shape[2])
    height = first.shape[1] * factor
    width = first.shape[2] * factor
    left = 0
    if row_labels:  # as wide as the longest of them, up to LABEL_WIDTH
        longest = max(text_width(" ".join(_words(label))) for label in row_labels)
        left = min(longest, LABEL_WIDTH) + 2 * GAP
    top = 0 if not column_labels else GAP + LINE * _lines_of(column_labels, width)
    below = 0 if not captions else LINE * _lines_of(list(chain.from_iterable(captions)), width)
    columns = max(map(len, rows))
    size = (
        left + columns * (width + GAP) + GAP,
        top + len(rows) * (height + below + GAP) + GAP,
    )
    page = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(page)
    for column, label in enumerate(column_labels):
        _write(draw, label, (left + GAP + column * (width + GAP), GAP), width, CAPTION_LINES)
    for r, row in enumerate(rows):
        y = top + GAP + r * (height + below + GAP)
        if row_labels:
            _write(draw, row_labels[r], (GAP, y), left - GAP, max(1, height // LINE))
        for c, image in enumerate(row):
            x = left + GAP + c * (width + GAP)
            picture = Image.fromarray(rearrange(image.cpu(), "c h w -> h w c").contiguous().numpy())
            page.paste(picture.resize((width, height), Image.Resampling.NEAREST), (x, y))
            if captions:
                _write(draw, captions[r][c], (x, y + height), width, CAPTION_LINES)
    return rearrange(torch.from_numpy(np.array(page)), "h w c -> c h w")


def enlargement(height: int, width: int) -> int:
    """The whole factor that makes the longer side about CELL pixels; 1 for images that have them."""
    return max(1, round(CELL / max(height, width)))


def wrapped(text: str, width: int, lines: int) -> list[str]:
    """`text` in at most `lines` lines of at most `width` pixels, broken at words; a word that is
    longer than a line is broken anywhere, and `...` says that something is left out.
    """
    found: list[str] = []
    line = ""
    for word in _pieces(text, width):
        longer = f"{line} {word}".strip()
        if text_width(longer) <= width:
            line = longer
        else:
            found.append(line)
            line = word
    found.append(line)
    if len(found) <= lines:
        return found
    last = found[lines - 1]
    while last and text_width(f"{last}...") > width:
        last = last[:-1].rstrip()
    return [*found[: lines - 1], f"{last}..."]


def text_width(text: str) -> int:
    """Pixels of a line of text."""
    return round(_font().getlength(text))


def _pieces(text: str, width: int) -> list[str]:
    """The words of a text, those that are too long for a line in parts."""
    pieces: list[str] = []
    for word in _words(text):
        while text_width(word) > width and len(word) > 1:
            end = len(word) - 1
            while end > 1 and text_width(word[:end]) > width:
                end -= 1
            pieces.append(word[:end])
            word = word[end:]
        pieces.append(word)
    return pieces


def _words(text: str) -> list[str]:
    """Words, whatever is no printable character left out: names may come from files of others."""
    return "".join(c if c.isprintable() else " " for c in text).split()


def _lines_of(texts: Sequence[str], width: int) -> int:
    """Lines that the longest of some texts takes."""
    return max(len(wrapped(text, width, CAPTION_LINES)) for text in texts)


def _label_width(labels: Sequence[str]) -> int:
    """Pixels of the column of row labels: of the longest one, up to LABEL_WIDTH."""
    if not labels:
        return 0
    longest = max(text_width(" ".join(_words(label))) for label in labels)
    return min(longest, LABEL_WIDTH) + 2 * GAP


def _write(
    draw: ImageDraw.ImageDraw, text: str, place: tuple[int, int], width: int, lines: int
) -> None:
    """Text, wrapped, with its upper left corner at `place` (x, y)."""
    x, y = place
    for number, line in enumerate(wrapped(text, width, lines)):
        draw.text((x, y + number * LINE), line, fill=INK, font=_font())


def _enlarged(image: Tensor, factor: int) -> Image.Image:
    picture = Image.fromarray(rearrange(image.cpu(), "c h w -> h w c").contiguous().numpy())
    if factor == 1:
        return picture
    size = (picture.width * factor, picture.height * factor)
    return picture.resize(size, Image.Resampling.NEAREST)


@lru_cache
def _font() -> Any:
    """DejaVu Sans as matplotlib brings it (Latin, Greek, Cyrillic, ...), else Pillow's own font.

    matplotlib itself is not imported: that takes seconds.
    """
    found = find_spec("matplotlib")
    if found is not None and found.origin is not None:
        path = Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if path.is_file():
            return ImageFont.truetype(os.fspath(path), FONT)
    return ImageFont.load_default(FONT)
