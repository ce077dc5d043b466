"""Sizes that the keys and shapes of official weights show, and the words for weights that do not
show them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd

from torch import Tensor

from tessellar.errors import UserError
from tessellar.layers.llama import swiglu_hidden

HEAD_DIM = 64
"""Channels of a head in the published models whose weights do not tell."""


def count(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many numbers (from 0 on) the group of a regular expression takes among the keys;
    UserError for none.
    """
    found = [int(match[1]) for key in state if (match := re.match(pattern, key))]
    if not found:
        readable = pattern.replace("\\", "").replace("(d+)", "N")
        raise UserError(
            f"these are other weights than this importer reads: no key is like {readable}"
        )
    return 1 + max(found)


def heads_of(width: int, given: int | None = None) -> int:
    """The number of heads that is given, or that of heads of HEAD_DIM channels; UserError where
    those do not fit.
    """
    if given is None and width % HEAD_DIM:
        raise UserError(f"the number of heads of width {width} is not known: give --num_heads")
    return given or width // HEAD_DIM


def ffn_multiple(width: int, hidden: int, multiple_of: int = 256) -> int:
    """The `ffn_multiple_of` of LlamaGen's layers that gives `hidden` channels: `multiple_of`, or
    `hidden` itself.

    Raises UserError for fewer channels than 8 / 3 of the width, which the official
    `ffn_dim_multiplier` can ask for.
    """
    for candidate in (multiple_of, hidden):
        if swiglu_hidden(width, candidate) == hidden:
            return candidate
    raise UserError(
        f"feed-forward layers of {hidden} channels at width {width}: an ffn_dim_multiplier below 1 is not supported"
    )


@dataclass(frozen=True)
class CNNSizes:
    """Of one half of a convolutional autoencoder: channels, multiples of them by level, residual
    blocks a level.
    """

    channels: int
    multipliers: tuple[int, ...]
    blocks: int

    @property
    def levels(self) -> int:
        return len(self.multipliers)


def cnn_sizes(state: Mapping[str, Tensor], block: str, channels: int | None = None) -> CNNSizes:
    """Sizes of a half whose residual blocks have keys `block`, such as
    `encoder.down.{i}.block.{j}`, by levels i.

    Without `channels`, they are what the widths of all levels are multiples of: only an encoder
    shows them.
    """
    pattern = re.escape(block).replace(r"\{i\}", "{i}").replace(r"\{j\}", "{j}")
    levels = count(state, pattern.format(i=r"(\d+)", j=r"\d+"))
    widths = [len(state[f"{block.format(i=i, j=0)}.conv2.weight"]) for i in range(levels)]
    channels = channels or gcd(*widths)
    if any(width % channels for width in widths):
        raise UserError(
            f"the widths {widths} of {block.split('.')[0]} are not multiples of its {channels} channels"
        )
    return CNNSizes(
        channels,
        tuple(w // channels for w in widths),
        count(state, pattern.format(i="0", j=r"(\d+)")),
    )


def matrix(t: Tensor) -> Tensor:
    """The weight of a 1x1 convolution [D, C, 1, 1] as that of a linear layer [D, C]."""
    return t[:, :, 0, 0]


def convolution(t: Tensor) -> Tensor:
    """The weight of a linear layer [D, C] as that of a 1x1 convolution [D, C, 1, 1]."""
    return t[:, :, None, None]
