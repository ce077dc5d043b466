"""What the codes of a set of images are like: how many occur, how evenly and where, and how much a
code tells of its image's class. And RobustTok's swap of codes by near ones (arXiv 2503.08354).
"""

from collections.abc import Iterator
from math import log, log2
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from tessellar.protocol.layout import Layout, codebooks


class Column(NamedTuple):
    """The codes [B] that one place of a layout holds: of `position`, and there of one factor or bit.

    `book` names the codebook that they come from, which has `size` codes.
    """

    book: str
    position: int
    size: int
    codes: Tensor


def columns(tokens: Tensor, layout: Layout) -> Iterator[Column]:
    """The places of tokens [B, N] or [B, N, F] one by one.

    The scales of a pyramid share one codebook; factors and bits have one each.
    """
    starts = layout.starts
    for segment, start in zip(layout.segments, starts, strict=False):
        sizes = codebooks(segment)
        name = "scales" if segment.name.startswith("scale") else segment.name
        ids = tokens[:, start : start + segment.length].reshape(len(tokens), segment.length, -1)
        for place in range(segment.length):
            for factor, size in enumerate(sizes):
                book = name if len(sizes) == 1 else f"{name} {factor}"
                yield Column(book, start + place, size, ids[:, place, factor])


def entropy_bits(codes: Tensor) -> float:
    """Entropy of the frequencies of `codes`, in bits; 0 where all are equal."""
    counts = codes.flatten().unique(return_counts=True)[1].double()
    return float(torch.special.entr(counts / counts.sum()).sum() / log(2))


class CodeUse(NamedTuple):
    """By codebook: the share of its codes that occur, and the entropy of their frequencies over
    log2 of their number. By position (factors and bits averaged): both, of the codes there.
    """

    usage: dict[str, float]
    evenness: dict[str, float]
    usage_by_position: list[float]
    bits_by_position: list[float]


def code_use(tokens: Tensor, layout: Layout) -> CodeUse:
    """Usage and entropy of the codes of images, tokens [B, N] or [B, N, F].

    Entropies are those of the frequencies found: of B images a position can show log2(B) bits.
    """
    of_books: dict[str, list[Column]] = {}
    of_positions: dict[int, list[Column]] = {}
    for column in columns(tokens, layout):
        of_books.setdefault(column.book, []).append(column)
        of_positions.setdefault(column.position, []).append(column)
    usage = {}
    evenness = {}
    for book, parts in of_books.items():
        codes = torch.cat([part.codes for part in parts])
        usage[book] = len(codes.unique()) / parts[0].size
        evenness[book] = entropy_bits(codes) / max(log2(parts[0].size), 1e-12)
    shares = []
    bits = []
    for parts in of_positions.values():
        shares.append(sum(len(p.codes.unique()) / p.size for p in parts) / len(parts))
        bits.append(sum(entropy_bits(p.codes) for p in parts) / len(parts))
    return CodeUse(usage, evenness, shares, bits)


class Purity(NamedTuple):
    """Of codes [M] with classes [M]: the share that belongs to the commonest class of its code, and
    the mutual information of code and class over the entropy of the classes.
    """

    share: float
    information: float


def purity(codes: Tensor, labels: Tensor) -> Purity:
    """How well codes tell classes apart; both numbers are 1 where every code belongs to one class.

    Both grow with the number of codes for each image: compare with those of shuffled labels.
    """
    _, code = codes.unique(return_inverse=True)
    _, label = labels.unique(return_inverse=True)
    kinds = int(label.max()) + 1
    joint = (code * kinds + label).bincount(minlength=kinds * (int(code.max()) + 1))
    table = rearrange(joint, "(c k) -> c k", k=kinds).double()
    total = table.sum()
    share = table.max(dim=1).values.sum() / total
    parts = [table.sum(1), table.sum(0), table]
    of_codes, of_labels, together = (torch.special.entr(part / total).sum() for part in parts)
    information = (of_codes + of_labels - together) / of_labels.clamp(min=1e-300)
    return Purity(float(share), float(information))


def swapped(tokens: Tensor, near: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Tokens [N] of one image, each with probability `share` replaced by one of the codes [N, K] that
    are `near` its latent.

    The nearest code is one of them, so K = 1 changes nothing.
    """
    chosen = torch.rand(len(tokens), generator=generator) < share
    rank = torch.randint(near.shape[-1], (len(tokens), 1), generator=generator)
    drawn = near.cpu().gather(1, rank)[:, 0]
    return torch.where(chosen, drawn, tokens.cpu()).to(tokens.device)
