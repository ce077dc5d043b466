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
    return Factorized(tuple(vocab for kind in kinds for vocab in vocabs_of(kind)))


def factors(tokens: Tensor, kind: Kind) -> Tensor:
    """Tokens with a last axis of sub-tokens, [..., F]."""
    return tokens[..., None] if isinstance(kind, Categorical) else tokens


def split_tokens(tokens: Tensor, kinds: Sequence[Kind]) -> list[Tensor]:
    """Tokens [..., F] of all quantizers to those of each."""
    parts = tokens.split([len(vocabs_of(kind)) for kind in kinds], -1)
    return [
        p[..., 0] if isinstance(k, Categorical) else p for p, k in zip(parts, kinds, strict=True)
    ]


def named_mean(losses: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of each named loss over quantizers; one that lacks a name counts as zero."""
    names = {name: None for some in losses for name in some}
    return {
        name: torch.stack([some[name] for some in losses if name in some]).sum() / len(losses)
        for name in names
    }
