"""Initial drafts: what the end of a speculative window is filled with before the generator has seen
it.

The schemes of SJD (arXiv 2410.01699), on any layout: neighbours are taken inside a segment, a
sequence is one row. A source that is not known yet is replaced by the last known token, as in the
official code, so one fill copies one token.

| scheme        | token                                             | law q it is judged by |
|---------------|---------------------------------------------------|-----------------------|
| `random`      | uniform over the codes                            | one-hot               |
| `uniform`     | uniform over the codes                            | 1 / V                 |
| `repeat-left` | the left neighbour                                | one-hot               |
| `repeat-up`   | the neighbour above                               | one-hot               |
| `argmax-left` | the likeliest token of the left neighbour's law   | one-hot               |
| `sample-left` | a sample of the left neighbour's law              | that law              |

Where there is no neighbour (first column, first row, nothing known) the token is `random`. In the
official code `repeat_horizon` and `sample_horizon` are our repeat-left and argmax-left; its laws
are always one-hot, which `uniform` and `sample-left` improve on: a draft judged by the law it was
drawn from is accepted more often.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tessellar.protocol.choice import race
from tessellar.protocol.entities import Entities
from tessellar.protocol.layout import Layout

SCHEMES = ("random", "uniform", "repeat-left", "repeat-up", "argmax-left", "sample-left")


@dataclass(frozen=True, eq=False)
class Neighbourhood:
    """What drafts need of a layout: the place to the left and above (-1: none) and the vocabulary,
    each [N].
    """

    left: Tensor
    up: Tensor
    vocab: Tensor

    @staticmethod
    def of(layout: Layout) -> "Neighbourhood":
        left = []
        up = []
        for start, segment in zip(layout.starts, layout.segments, strict=False):
            place = torch.arange(segment.length, device="cpu")
            width = segment.shape[-1]
            left.append(torch.where(place % width > 0, start + place - 1, -1))
            up.append(
                torch.where((place >= width) & (len(segment.shape) > 1), start + place - width, -1)
            )
        # Tokens of sub-tokens have no vocabulary of their own: all are alike.
        vocab = layout.vocab() if layout.is_categorical else torch.ones(layout.length).long()
        return Neighbourhood(torch.cat(left), torch.cat(up), vocab)


def sources(
    scheme: str, hood: Neighbourhood, entities: Entities, ranks: Tensor, last: Tensor
) -> Tensor:
    """Places [B, K] that the tokens of generation ranks `ranks` [B, K] copy; -1: none, the token is
    random.

    Ranks up to `last` [B] are known.
    """
    if scheme in ("random", "uniform"):
        return torch.full_like(ranks, -1)
    place = look_up(entities.order, ranks.clamp(max=entities.length - 1))
    neighbour = (hood.up if scheme == "repeat-up" else hood.left)[place]
    rank = torch.minimum(look_up(entities.order.argsort(-1), neighbour.clamp(min=0)), last[:, None])
    source = look_up(entities.order, rank.clamp(min=0))
    foreign = hood.vocab[source] != hood.vocab[place]
    return torch.where((neighbour < 0) | (last[:, None] < 0) | foreign, -1, source)


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """Entries `index` [B, K] of a table [N] that all images share, or of one [B, N] with a row an
    image.
    """
    return table[index] if table.ndim == 1 else table.gather(1, index)


class Fill(NamedTuple):
    """New drafts [B, K] and their laws [B, K, V]."""

    tokens: Tensor
    law: Tensor


def fill(
    scheme: str,
    source: Tensor,
    known: Tensor,
    vocab: Tensor,
    law: Tensor,
    uniform: Tensor,
    exponential: Tensor,
) -> Fill:
    """Drafts of K places, of which `source` [B, K] says what to copy from the buffer `known` [B, N]
    (-1: random).

    `vocab` [B, K] are their vocabularies, `law` [B, V] is the law of the last known token,
    `uniform` [B, K] and `exponential` [B, K, V] are noise (the latter only for sample-left).
    """
    random = torch.minimum((uniform * vocab).long(), vocab - 1)
    if scheme == "argmax-left":
        copied = law.argmax(-1, keepdim=True).expand_as(source)
    elif scheme == "sample-left":
        copied = race(law[:, None], exponential)
    else:
        copied = known.gather(1, source.clamp(min=0))
    tokens = torch.where(source >= 0, copied, random)
    drawn_from = torch.zeros(*tokens.shape, law.shape[-1], device=law.device)
    drawn_from.scatter_(-1, tokens[..., None], 1.0)
    if scheme == "uniform":
        codes = torch.arange(law.shape[-1], device=law.device)
        drawn_from = (codes < vocab[..., None]) / vocab[..., None].float()
    elif scheme == "sample-left":
        drawn_from = torch.where((source >= 0)[..., None], law[:, None], drawn_from)
    return Fill(tokens, drawn_from)
