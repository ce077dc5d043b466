"""A tokenizer inside the decoding loop: what a generator reads is made by its tokenizer from the tokens
so far (VAR's and TokenFlow's maps, MingTok's features).

`InLoop` is what the generator asks of such a tokenizer, once a state. What it gets, `LoopInputs`, is
the part of the state that rolls back and forks with it (`State.part`). There are two kinds:
`Recomputed` keeps nothing and makes its inputs anew from all tokens, `Streamed` reads each token once
through a causal decoder, whose keys and values it keeps.
"""

from collections.abc import Callable
from typing import Protocol, Self

import torch
from torch import Tensor

from tessellar.layers.kv_cache import KVCache
from tessellar.protocol.entities import Entities, take


class LoopInputs(Protocol):
    """Inputs of a generator, of B images."""

    def inputs(self, tokens: Tensor, rank: Tensor) -> Tensor:
        """[B, n, input_dim]: what is read to predict the tokens of generation `rank` [B or 1, n], a run
        of them behind the first entity, from token buffers [B, N, ...].

        It depends on tokens of earlier entities alone; past the end it means nothing.
        """
        ...

    def rollback(self, fed: Tensor) -> None:
        """Forget all but the first `fed` [B] entities of each image."""
        ...

    def select(self, index: Tensor) -> "LoopInputs":
        """Those of images `index` [b], copied."""
        ...

    def fixed(self, device: torch.device | str) -> "LoopInputs":
        """The same with what the host reads on `device` (`State.fixed`)."""
        ...


class InLoop(Protocol):
    """A tokenizer that makes the inputs of generators."""

    @property
    def input_dim(self) -> int:
        """Channels of an input."""
        ...

    def begin(self, entities: Entities, batch: int, window: int | None) -> LoopInputs:
        """Inputs of `batch` images of which nothing is read; `window` entities past the end fit.

        `window` None: for one pass over all tokens, which keeps nothing (training, scoring).
        """
        ...


class ScaleInputs:
    """Mixin of tokenizers whose inputs are maps of all coarser scales; it sets `latent_dim` and has
    `next_inputs`.
    """

    latent_dim: int

    @property
    def input_dim(self) -> int:
        return self.latent_dim

    def next_inputs(self, tokens: Tensor, count: int) -> Tensor:
        """Inputs [B, n, latent_dim] of scales 1 .. count - 1, raster in each, from tokens [B, N] of
        coarser ones.
        """
        raise NotImplementedError(type(self).__name__)

    def begin(self, entities: Entities, batch: int, window: int | None) -> LoopInputs:
        return Recomputed(self.next_inputs, entities)


class Recomputed:
    """Inputs of entities 1 .. count - 1 by `make(tokens, count)`, side by side: nothing is kept."""

    def __init__(self, make: Callable[[Tensor, int], Tensor], entities: Entities) -> None:
        self.make = make
        self.entities = entities

    def inputs(self, tokens: Tensor, rank: Tensor) -> Tensor:
        ends = self.entities.ends
        needed = int(torch.bucketize(rank.max(), ends[1:], right=True)) + 1
        rows = torch.arange(len(tokens))[:, None]
        return self.make(tokens, needed)[rows, rank - int(ends[1])]

    def rollback(self, fed: Tensor) -> None:
        pass

    def select(self, index: Tensor) -> Self:
        return self

    def fixed(self, device: torch.device | str) -> Self:
        return self


class Streamed:
    """Inputs of entities of one token: what a causal decoder makes of the token before.

    `decode(tokens [B, n, ...], cache)` gives [B, n, input_dim], of tokens that stand behind those in
    the cache, and keeps theirs there; without a cache, of tokens from the first on.
    """

    def __init__(
        self, decode: Callable[[Tensor, KVCache | None], Tensor], cache: KVCache | None
    ) -> None:
        self.decode = decode
        self.cache = cache

    @torch.no_grad()
    def inputs(self, tokens: Tensor, rank: Tensor) -> Tensor:
        #   rank      1      2      ..  r
        #   reads     t_0    t_1    ..  t_(r - 1)
        #   cache     holds tokens 0 .. L - 1: those in the input of rank L and below
        last = tokens.shape[1] - 1
        if self.cache is None:
            index = (rank - 1).clamp(max=last)
            features = self.decode(tokens[:, : int(index.max()) + 1], None)
            return take(features, index.expand(len(tokens), -1))
        read = self.cache.lengths[:, None]
        count = rank.shape[1]
        place = read + torch.arange(count, device=read.device)
        # Images that have read nothing yet ask for their first input again: it is not used.
        offset = (rank - 1 - read).clamp(min=0, max=count - 1)
        features = self.decode(take(tokens, place.clamp(max=last)), self.cache)
        return take(features, offset)

    def rollback(self, fed: Tensor) -> None:
        if self.cache is None:
            return
        # The input of the first entity holds no token.
        kept = (fed.to(self.cache.lengths.device) - 1).clamp(min=0)
        self.cache.truncate(torch.minimum(kept, self.cache.lengths))

    def select(self, index: Tensor) -> "Streamed":
        cache = None if self.cache is None else self.cache.select(index)
        return Streamed(self.decode, cache)

    def fixed(self, device: torch.device | str) -> "Streamed":
        return Streamed(self.decode, None if self.cache is None else self.cache.fixed())
