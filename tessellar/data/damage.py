"""Corrupt images: counted, the first one named, and skipped, up to a share of the set at which a
run stops and says so.

In the place of a corrupt image comes the next readable one of the set, with its own label and
caption. So a batch keeps its size, ranks stay equally long, and what an index gives depends on the
files alone, not on workers or on the order. The record lies in shared memory: the workers of a
loader and the process that made the set count together.
"""

import logging
from collections.abc import Callable
from itertools import chain
from typing import TypeVar

import torch

from tessellar.data.image_file import UnreadableImage
from tessellar.errors import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")
UNREAD = 0
READABLE = 1
CORRUPT = 2
# The share is taken of at least this many images (or the whole set), so that an early one stops
# nothing.
SAMPLE = 1000


class Damage:
    """What is known of the `total` images of one set; `where(index)` names one of them.

    `max_share` of 0 allows no corrupt image, any other share at least one.
    """

    def __init__(self, total: int, max_share: float, where: Callable[[int], str]) -> None:
        if not 0 <= max_share < 1:
            raise ValueError(f"max_corrupt is {max_share}; it must be at least 0 and below 1")
        self.max_share = max_share
        self.where = where
        self.state = torch.zeros(total, dtype=torch.uint8).share_memory_()

    @property
    def corrupt(self) -> list[int]:
        """Indices of the images found to be corrupt so far, ascending."""
        return (self.state == CORRUPT).nonzero().flatten().tolist()

    def read(self, index: int, read: Callable[[int], T]) -> tuple[int, T]:
        """`read(index)` and `index`, or both of the next readable image behind it (the first
        follows the last).

        Raises UserError when more images are corrupt than allowed.
        """
        for candidate in chain(range(index, len(self.state)), range(index)):
            if self.state[candidate] == CORRUPT:
                continue
            try:
                image = read(candidate)
            except UnreadableImage as error:
                self.note(candidate, error)
                continue
            self.state[candidate] = READABLE
            return candidate, image
        raise UserError(f"no image can be read, not even {self.where(index)}")

    def note(self, index: int, error: UnreadableImage) -> None:
        if self.max_share == 0:
            raise error
        self.state[index] = CORRUPT
        corrupt = self.corrupt
        met = int((self.state != UNREAD).sum())
        if too_many(len(corrupt), max(met, min(len(self.state), SAMPLE)), self.max_share):
            raise UserError(
                f"{len(corrupt)} of {met} images read so far are corrupt, more than max_corrupt {self.max_share} "
                f"allows; one is {self.where(corrupt[0])}, the last: {error}"
            ) from error
        if len(corrupt) == 1:
            warn_of_first(error, self.max_share)


def too_many(corrupt: int, total: int, max_share: float) -> bool:
    """Whether more than the share of `total` are corrupt; a single one is borne wherever any is."""
    return corrupt > (max(1, max_share * total) if max_share else 0)


def warn_of_first(error: UserError, max_share: float) -> None:
    log.warning(
        "%s. It is skipped, as others will be in silence, up to a share of %g", error, max_share
    )
