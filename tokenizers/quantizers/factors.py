"""Tokens of several quantizers side by side, as sub-tokens of one position."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tessellar.protocol.layout import Categorical, Factorized, Kind


def vocabs_of(kind: Kind) -> tuple[int, ...]:
    """Vocabulary of each sub-token; raises ValueError for bits and continuous tokens."""
    match kind:
        case Categorical(vocab):
            return (vocab,)
        case Factorized(vocabs):
            return vocabs
    raise ValueError(f"{kind} has no ids that could be a sub-token")


def factorized(kinds: Sequence[Kind]) -> Factorized:
    """The kind of all sub-tokens, in order."""
    vocabs: list[int] = []
    for kind in kinds:
        vocabs += vocabs_of(kind)
    return Factorized(tuple(vocabs))


def factors(tokens: Tensor, kind: Kind) -> Tensor:
    """Tokens with a last axis of sub-tokens, [..., F]."""
    return tokens[..., None] if isinstance(kind, Categorical) else tokens


def split_tokens(tokens: Tensor, kinds: Sequence[Kind]) -> list[Tensor]:
    """Tokens [..., F] of all quantizers to those of each."""
    counts = [len(vocabs_of(kind)) for kind in kinds]
    split = []
    for part, kind in zip(tokens.split(counts, -1), kinds, strict=True):
        split.append(part[..., 0] if isinstance(kind, Categorical) else part)
    return split


def named_sum(losses: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Sum of each named loss over quantizers; one that lacks a name counts as zero."""
    terms: dict[str, list[Tensor]] = {}
    for of_one in losses:
        for name, value in of_one.items():
            terms.setdefault(name, []).append(value)
    return {name: torch.stack(values).sum() for name, values in terms.items()}
