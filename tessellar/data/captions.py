"""Text of data sets: files as a person reads them, captions that are texts, and one of several
drawn at each visit.
"""

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from tessellar.data.classes import are_numbers
from tessellar.errors import UserError
from tessellar.randomness import derive, uniforms

log = logging.getLogger(__name__)
CAPTION = 0xCA  # sets the choice of a caption apart from that of a crop
SEPARATOR = "\0"  # between the captions of one image in a cache; no caption holds it
# Longer marks first: that of UTF-32 begins with that of UTF-16.
MARKS = (
    (b"\xff\xfe\0\0", "utf-32"),
    (b"\0\0\xfe\xff", "utf-32"),
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)


class UnreadableText(UserError):
    """What should be a text is none."""


def decode_text(content: bytes, name: str) -> str:
    """Text in UTF-8, or in UTF-16 or UTF-32 with a byte order mark; line ends become a line feed,
    no space around it.

    Raises UnreadableText naming the file for bytes that are no text.
    """
    encoding = next((encoding for mark, encoding in MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        shown = encoding.removesuffix("-sig").upper()
        raise UnreadableText(
            f"{name} is not {shown} ({error.reason} at byte {error.start})"
        ) from error
    if "\0" in text:
        raise UnreadableText(
            f"{name} holds zero bytes: save it as UTF-8, or as UTF-16 with a byte order mark"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def read_captions(value: Any, name: str) -> tuple[str, ...]:
    """The captions that a text, or a list of texts, holds; empty where there is none (None, empty
    text).

    Raises UnreadableText, naming the sample, for anything else, such as a number, bytes or a
    dictionary.
    """
    if value is None:
        return ()
    several = isinstance(value, (list, tuple, np.ndarray))
    texts = [_text(each, value, name) for each in (value if several else [value])]
    return tuple(filter(None, texts))


def _text(one: Any, value: Any, name: str) -> str:
    if one is None:
        return ""
    if not isinstance(one, str):
        raise UnreadableText(
            f"{name}: the caption is {repr(value)[:40]}; it must be text, or a list of texts"
        )
    # Half of a surrogate pair, which JSON can spell but UTF-8 cannot.
    if any("\ud800" <= letter <= "\udfff" for letter in one):
        raise UnreadableText(f"{name}: the caption cannot be written as UTF-8")
    if SEPARATOR in one:
        raise UnreadableText(f"{name}: the caption holds a zero character, which is no text")
    return one.replace("\r\n", "\n").replace("\r", "\n").strip()


def class_text(class_names: Sequence[str], label: int) -> tuple[str, ...]:
    """The name of a class as its images' caption; none where the set has one class, or the name is
    a number.
    """
    name = class_names[label]
    if len(class_names) < 2 or are_numbers([name]):
        return ()
    return (name.replace("_", " "),)


def draw_captions(
    texts: Sequence[tuple[str, ...]], indices: Sequence[int] | np.ndarray, seed: int, epoch: int
) -> list[str]:
    """One caption of each image, drawn from (seed, epoch, index) alone; empty where an image has
    none.
    """
    draws = uniforms(derive(seed, epoch, CAPTION), indices, 1)[:, 0]
    return [pick(several, draw) for several, draw in zip(texts, draws.tolist(), strict=True)]


def pick(texts: tuple[str, ...], draw: float) -> str:
    """The caption that a number in [0, 1) chooses."""
    return texts[int(draw * len(texts))] if texts else ""


@cache  # a set is made several times in a run, and its gaps are said once
def tell_missing(missing: int, total: int, first: str, instead: str) -> None:
    """Say that some images of a set have no caption, and what stands in its place."""
    log.warning(
        "%d of %d images (%.1f %%) have no caption, the first is %s: %s",
        missing,
        total,
        100 * missing / total,
        first,
        instead,
    )
