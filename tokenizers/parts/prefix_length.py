"""How many tokens to keep, for tokenizers whose prefixes decode: by a size in bytes or by a quality
(arXiv 2501.10064).

Works for any categorical layout with `min_prefix`: One-D-Piece, ReToK.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.protocol.layout import Layout
from tessellar.protocol.tokenizer import Tokenizer


def prefix_bits(layout: Layout) -> Tensor:
    """Bits of the first 1, 2, ..., N tokens at a whole number of bits a token, int64 [N]; of 4,096
    codes 12 each.
    """
    vocab = layout.vocab()
    each = [max(int(size) - 1, 1).bit_length() for size in vocab]
    return torch.tensor(each).cumsum(0)


def prefix_bytes(layout: Layout, length: int) -> int:
    """Bytes that the first `length` tokens take when their bits are packed."""
    return -(-int(prefix_bits(layout)[length - 1]) // 8)


def length_for_bytes(layout: Layout, size: int) -> int:
    """The longest prefix that fits in `size` bytes; raises UserError where not even the shortest
    one does.
    """
    shortest = _shortest(layout)
    fitting = int((prefix_bits(layout) <= 8 * size).sum())
    if fitting < shortest:
        least = prefix_bytes(layout, shortest)
        raise UserError(
            f"{size} bytes hold {fitting} tokens; the shortest prefix is {shortest}: {least} bytes"
        )
    return fitting


def candidates(layout: Layout) -> tuple[int, ...]:
    """The shortest prefix, its doublings, and N."""
    length = _shortest(layout)
    found = []
    while length < layout.length:
        found.append(length)
        length *= 2
    return (*found, layout.length)


@torch.no_grad()
def quality_by_length(
    tokenizer: Tokenizer, images: Tensor, lengths: Sequence[int] | None = None
) -> Iterator[tuple[int, Tensor]]:
    """PSNR in dB [B] of each image from its first n tokens, for each n of `lengths` (default
    `candidates`).
    """
    tokens = tokenizer.encode(images)
    layout = tokenizer.layout
    shortest = _shortest(layout)
    wanted = list(candidates(layout)) if lengths is None else sorted(lengths)
    if not wanted or wanted[0] < shortest or wanted[-1] > layout.length:
        raise UserError(f"lengths are {wanted}; each must be in [{shortest}, {layout.length}]")
    for length in wanted:
        error = (tokenizer.decode(tokens[:, :length]).clamp(-1, 1) - images) / 2
        yield length, -10 * error.square().flatten(1).mean(1).clamp(min=1e-10).log10()


def length_for_quality(
    tokenizer: Tokenizer, images: Tensor, psnr: float, lengths: Sequence[int] | None = None
) -> Tensor:
    """For each image the first of `lengths` (ascending) that reaches `psnr` dB; N where none does.
    int64 [B].
    """
    chosen = torch.full((len(images),), tokenizer.layout.length, device=images.device)
    open_ones = torch.ones_like(chosen, dtype=torch.bool)
    for length, reached in quality_by_length(tokenizer, images, lengths):
        now = open_ones & (reached >= psnr)
        chosen[now] = length
        open_ones &= ~now
        if not bool(open_ones.any()):
            break
    return chosen


def _shortest(layout: Layout) -> int:
    if layout.min_prefix is None:
        raise UserError(f"only complete sequences of this tokenizer decode; its layout is {layout}")
    return layout.min_prefix
