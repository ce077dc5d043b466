"""How the bits of a binary quantizer (LFQ, BSQ) become tokens: one id, several ids of a few bits
each, or bits.

Ids of more than about 24 bits are useless to a generator, and floats cannot hold them: take groups
or bits then. The order is explicit because published code disagrees: SEED-Voken, WeTok and BitDance
make channel 0 of a group the least significant bit, vector-quantize-pytorch and BSQ-ViT the most
significant.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tessellar.protocol.layout import Bits, Categorical, Factorized, Kind

FORMS = ("index", "bits")
MOST = 62  # bits of an id, which is an int64


@dataclass(frozen=True)
class BitCode:
    """Tokens of bits [..., n], n = sum(split); `form` is `index` (one id for each part of the
    split) or `bits`.

    Raises ValueError for an unknown form, an empty part, and ids that an int64 cannot hold.
    """

    split: tuple[int, ...]
    form: str = "index"
    big_endian: bool = False

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"form of tokens is {self.form!r}; there are {', '.join(FORMS)}")
        if not self.split or min(self.split) < 1:
            raise ValueError(f"bits are split into {self.split}; every part needs at least one")
        if self.form == "index" and max(self.split) > MOST:
            raise ValueError(
                f"an id cannot hold {max(self.split)} bits; split them, or use form 'bits'"
            )

    @property
    def kind(self) -> Kind:
        if self.form == "bits":
            return Bits(sum(self.split))
        vocabs = tuple(2**n for n in self.split)
        return Categorical(vocabs[0]) if len(vocabs) == 1 else Factorized(vocabs)

    def _places(self, n: int, device: torch.device) -> Tensor:
        places = torch.arange(n, device=device)
        return places.flip(0) if self.big_endian else places

    def tokens(self, bits: Tensor) -> Tensor:
        """Tokens of bits [..., n] (0 and 1, or booleans)."""
        bits = bits.long()
        if self.form == "bits":
            return bits
        ids = []
        for part in bits.split(self.split, -1):
            ids.append((part << self._places(part.shape[-1], bits.device)).sum(-1))
        return ids[0] if len(ids) == 1 else torch.stack(ids, -1)

    def bits(self, tokens: Tensor) -> Tensor:
        """Bits [..., n] of tokens, int64."""
        if self.form == "bits":
            return tokens
        ids = tokens[..., None] if len(self.split) == 1 else tokens
        parts = zip(ids.unbind(-1), self.split, strict=True)
        return torch.cat(
            [part[..., None] >> self._places(n, part.device) & 1 for part, n in parts], -1
        )


def bit_code(
    dim: int, groups: int, split: tuple[int, ...] | None, form: str, big_endian: bool
) -> BitCode:
    """Code of `dim` bits, in `groups` equal parts unless `split` says otherwise; ValueError where
    they do not fit.
    """
    if groups < 1 or dim % groups:
        raise ValueError(f"{dim} bits do not make {groups} equal groups")
    parts = tuple(split) if split else (dim // groups,) * groups
    if sum(parts) != dim:
        raise ValueError(f"bits are split into {parts}, which are not {dim}")
    return BitCode(parts, form, big_endian)
