"""The tokens of a binary tokenizer in another form, with its trained weights as they are: one id a
token (for a softmax over all codes), several ids of a few bits (Open-MAGVIT2's sub-tokens), or bits
(BitDance, BAR).

A binary code has no order of its own, so any of these forms says the same. Caches hold the inner
tokenizer's tokens, so one cache serves every form.
"""

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.protocol.layout import Bits, Kind, Layout, codebooks
from tessellar.protocol.tokenizer import Tokenizer, TokenizerOutput
from tessellar.tokenizers.parts.inner import inner_tokenizer
from tessellar.tokenizers.quantizers.bits import BitCode


class RegroupedBits(Tokenizer):
    """`tokenizer` (or the path of one), frozen, whose tokens hold the same bits at every position.

    `form` and `split` are those of `BitCode`: `index`, one id for each part of the split (default:
    one for all), or `bits`; the first bit of a part is its least significant one. Raises UserError
    for a tokenizer whose codebooks are no powers of two, and for a split that does not make its
    bits.
    """

    def __init__(
        self, tokenizer: Tokenizer | str, form: str = "index", split: tuple[int, ...] | None = None
    ) -> None:
        super().__init__()
        tokenizer = inner_tokenizer(self, tokenizer)
        self.given = code_of(tokenizer.layout)
        bits = sum(self.given.split)
        parts = (bits,) if split is None else tuple(split)
        if sum(parts) != bits:
            raise UserError(f"split {list(parts)} makes {sum(parts)} bits; a token has {bits}")
        try:
            self.code = BitCode(parts, form)
        except ValueError as error:
            raise UserError(str(error)) from error
        self.tokenizer = tokenizer
        self.image_size = tokenizer.image_size
        segments = (replace(one, kind=self.code.kind) for one in tokenizer.layout.segments)
        self.layout = Layout(tuple(segments), tokenizer.layout.min_prefix)
        self.requires_grad_(False)

    @property
    def last_layer(self) -> Tensor:
        return self.tokenizer.last_layer

    is_derived: ClassVar[bool] = True

    @property
    def source(self) -> Tokenizer:
        return self.tokenizer

    def from_source(self, tokens: Tensor) -> Tensor:
        return self.code.tokens(self.given.bits(tokens))

    def to_source(self, tokens: Tensor) -> Tensor:
        return self.given.tokens(self.code.bits(tokens))

    def encode(self, images: Tensor) -> Tensor:
        return self.from_source(self.tokenizer.encode(images))

    def draw(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.from_source(self.tokenizer.draw(images, generator))

    def decode(self, tokens: Tensor) -> Tensor:
        self.layout.check(tokens)
        return self.tokenizer.decode(self.to_source(tokens))

    def forward(self, images: Tensor) -> TokenizerOutput:
        """Nothing is trained: no losses."""
        tokens = self.encode(images)
        return TokenizerOutput(self.decode(tokens), tokens, {})


def code_of(layout: Layout) -> BitCode:
    """How the tokens of a layout hold bits; raises UserError where they do not."""
    kinds: set[Kind] = {segment.kind for segment in layout.segments}
    if len(kinds) > 1 or layout.is_continuous:
        raise UserError(f"bits are regrouped of tokens of one binary code; this one has {layout}")
    kind = layout.segments[0].kind
    if isinstance(kind, Bits):
        return BitCode((kind.n,), "bits")
    vocabs = codebooks(layout.segments[0])
    sizes = tuple(vocab.bit_length() - 1 for vocab in vocabs)
    if any(2**size != vocab or size < 1 for size, vocab in zip(sizes, vocabs, strict=True)):
        raise UserError(f"codebooks of {vocabs} codes are no powers of two, so they hold no bits")
    return BitCode(sizes)
