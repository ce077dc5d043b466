"""Generators of next scales that read maps of their tokenizer: what they ask of it, and which place
is of which scale (VAR, TokenFlow).
"""

from typing import Protocol, cast

import torch
from torch import Tensor

from tessellar.errors import UserError
from tessellar.models.parts.prefix_transformer import PrefixTransformer
from tessellar.protocol.tokenizer import Tokenizer


class ScaleInputs(Protocol):
    """What such a generator asks of its tokenizer."""

    @property
    def latent_dim(self) -> int: ...

    def next_inputs(self, tokens: Tensor, count: int) -> Tensor:
        """Inputs [B, n, latent_dim] of scales 1 .. count - 1, raster in each, from tokens [B, N] of
        coarser ones.
        """
        ...


class ScaleReader(PrefixTransformer):
    """A subclass sets `layout`, `entities` (scales) and `latent_dim`, and leaves `bound` empty."""

    latent_dim: int
    #: A tuple, so that the tokenizer's weights stay the tokenizer's.
    bound: tuple[ScaleInputs, ...] = ()

    def bind(self, tokenizer: Tokenizer) -> None:
        own = type(self).__name__
        if not hasattr(tokenizer, "next_inputs"):
            raise UserError(
                f"{own} reads the summed maps of a multi-scale tokenizer; {type(tokenizer).__name__} has none"
            )
        inputs = cast(ScaleInputs, tokenizer)
        if inputs.latent_dim != self.latent_dim:
            raise UserError(
                f"{own} was built for latents of {self.latent_dim} channels, the tokenizer has {inputs.latent_dim}"
            )
        self.bound = (inputs,)

    @property
    def first(self) -> int:
        """Tokens of the coarsest scale, whose input is the condition alone."""
        return self.entities.sizes[0]

    def scale_of(self, place: Tensor) -> Tensor:
        """Number of the scale of places of the layout; grows past the last one."""
        past = (place - self.layout.length).clamp(min=0)
        return torch.bucketize(place, self.entities.ends[1:], right=True) + past

    def scale_inputs(self, tokens: Tensor, place: Tensor) -> Tensor:
        """Inputs [R, n, latent_dim] of places [R or 1, n] of scales behind the first, from token
        buffers [R, N]; raises UserError where no tokenizer is bound.
        """
        if not self.bound:
            raise UserError(
                f"{type(self).__name__} has no tokenizer yet, whose maps are its inputs: bind one"
            )
        needed = int(self.scale_of(place.max())) + 1
        inputs = self.bound[0].next_inputs(tokens, needed)
        rows = torch.arange(len(tokens))[:, None]
        return inputs[rows, place - self.first]
