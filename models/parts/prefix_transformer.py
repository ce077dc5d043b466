"""Prefix transformers: `start`, `predict` and `score` of every generator that is one sequence
behind a prefix.

A subclass has its blocks (`layers`) and last norm, and says what the prefix is, what is read at
each sequence index, who sees whom, what a pass tells its blocks and how hidden states become a
distribution. Sequence: prefix places 0 .. P-1, then input index i at place P + i. The input of
entity 0 is the last prefix position, so `start` prefills all but that one and every entity of a
token generator takes exactly one position.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from tessellar.errors import UserError
from tessellar.layers.kv_cache import NEVER, KVCache, NoCache, PlacedCache, Slots
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Distribution, Logits, ProjectedLogits
from tessellar.protocol.entities import Entities, take
from tessellar.protocol.generator import Evaluation, Generator, Prefix, State
from tessellar.protocol.guidance import NO_GUIDANCE, Guidance
from tessellar.protocol.work import Work, causal_attention_macs, linear_macs


class PrefixTransformer(Generator):
    """A stack of blocks driven through the generator protocol.

    Subclasses set `layers` (called with hidden states, their number and what `shared` gives),
    `norm`, `embedding_dropout`, `num_heads` and `head_dim`.
    """

    layers: nn.ModuleList
    norm: nn.Module
    embedding_dropout: nn.Module
    num_heads: int
    head_dim: int
    #: Training only: what a block computed is computed again in the backward pass; with `selective` all but products of
    #: matrices and attention, which cost most of the time.
    activation_checkpointing: bool | Literal["selective"] = False
    #: Which attention the layers take; with `flex` a pass over all tokens has FlexAttention's masks.
    attention: str = "auto"
    #: Whether a training loss of many codes is computed in parts; None: the head cannot do so.
    chunked_loss: bool | None = None
    #: Training only: what teacher forcing reads in the place of tokens [B, N, ...]; what is predicted stays as it is.
    reader: Callable[[Tensor, Entities], Tensor] | None = None
    #: Training only: what becomes of the inputs [R, n, D] of tokens, at their indices [R or 1, n].
    veil: Callable[[Tensor, Tensor], Tensor] | None = None
    #: Training only: every position sees all others, whatever its block.
    sees_all: bool = False
    #: Training only: the share of samples that are read in a uniform order of their own; None: the generator has one.
    random_order: float | None = None
    #: Whether a window may be any set of places: one token an entity, and a head that asks `ranks` alone.
    predicts_places: ClassVar[bool] = False
    #: Keys and values that the cache holds beside those of `layers`.
    further_caches: ClassVar[int] = 0

    @abstractmethod
    def shared(self, place: Tensor, state: State, slots: Slots) -> Any:
        """What all blocks of one pass share, at places [R or 1, n]; it holds `state.cache` and
        `slots`.
        """

    @abstractmethod
    def prefix(self, condition: Condition) -> Prefix:
        """Prefix of R rows."""

    @abstractmethod
    def embed(self, tokens: Tensor, index: Tensor, entities: Entities) -> Tensor:
        """[R, n, D] input embeddings at indices behind the prefix [R or 1, n], from token buffers
        [R, N, ...].
        """

    @abstractmethod
    def head(self, state: State, hidden: Tensor, first: Tensor, want: int) -> Distribution:
        """Distribution of `want` entities from `first` [B], of normed hidden states [R, reads, D];
        merges guidance.
        """

    def block(self, place: Tensor) -> Tensor:
        """Visibility number of places; default: causal."""
        return place

    def input_ends(self, prefix_length: int, entities: Entities) -> Tensor:
        """[count + 1] sequence length after the inputs of the first n entities; default: one
        position an entity.
        """
        return torch.arange(entities.count + 1) + prefix_length - 1

    def num_reads(self, state: State, first: Tensor, want: int) -> int:
        """How many of the last hidden states `head` reads; default: one a token."""
        return state.entities.span(first, want)[1]

    def work(self) -> Work:
        """Blocks at every position of the sequence with its longest prefix, other linear layers
        once a token.
        """
        with torch.device("cpu"):  # also where the model is built on the meta device
            positions = int(self.input_ends(self.prefix_length, self.entities)[-1])
        attention = causal_attention_macs(
            len(self.layers), self.num_heads * self.head_dim, positions
        )
        blocks = linear_macs(self.layers)
        around = (linear_macs(self) - blocks) * self.layout.length
        return Work(positions, blocks * positions + attention, around)

    @property
    def prefix_length(self) -> int:
        """Positions of the longest prefix."""
        return int(getattr(getattr(self, "conditioning", None), "length", 1))

    def start(
        self,
        condition: Condition,
        guidance: Guidance = NO_GUIDANCE,
        entities: Entities | None = None,
        window: int = 1,
    ) -> State:
        state = self._state(condition, guidance, entities or self.entities)
        assert state.input_ends is not None and state.prefix is not None
        spare = window * int(state.input_ends[-1] - state.input_ends[-2])
        state.cache = self._new_cache(
            len(state.prefix.embeddings), int(state.input_ends[-1]) + spare
        )
        prefilled = int(state.input_ends[0])
        if prefilled:
            self._run(state, torch.arange(prefilled)[None], None)
        return state

    def _state(self, condition: Condition, guidance: Guidance, entities: Entities) -> State:
        rows = self.stack_branches(condition, guidance)
        prefix = self.prefix(rows)
        return State(
            condition=rows,
            guidance=guidance,
            entities=entities,
            fed=torch.zeros(condition.batch, dtype=torch.int64),
            prefix=prefix,
            input_ends=self.input_ends(prefix.length, entities),
        )

    def _new_cache(self, rows: int, capacity: int) -> KVCache:
        weight = next(self.layers.parameters())
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        heads = getattr(self, "num_kv_heads", self.num_heads)
        return KVCache(
            len(self.layers) + self.further_caches,
            rows,
            heads=heads,
            capacity=capacity,
            dim=self.head_dim,
            dtype=dtype,
            device=weight.device,
        )

    def predict(
        self, state: State, tokens: Tensor, count: int = 1, want: int | None = None
    ) -> Distribution:
        want = count if want is None else want
        hidden = self._run(state, state.places(count), tokens)
        state.advance(count)
        first = state.fed - want
        return self._distribution(state, hidden, self.num_reads(state, first, want), first, want)

    def start_places(
        self,
        condition: Condition,
        guidance: Guidance = NO_GUIDANCE,
        entities: Entities | None = None,
    ) -> State:
        entities = entities or self.entities
        if not self.predicts_places or set(entities.sizes) != {1}:
            return super().start_places(condition, guidance, entities)
        state = self.start(condition, guidance, entities)
        assert isinstance(state.cache, KVCache)
        state.cache = PlacedCache.after(state.cache)
        return state

    def predict_places(
        self, state: State, tokens: Tensor, places: Tensor, groups: Tensor | None = None
    ) -> Distribution:
        if not self.predicts_places:
            return super().predict_places(state, tokens, places, groups)
        assert isinstance(state.cache, PlacedCache) and state.prefix is not None
        places = places.to(state.entities.order.device)
        rank = state.entities.ranks_of(places.clamp(min=0))
        # The input of the token of rank r is at sequence place P - 1 + r.
        place = state.rows(rank + state.prefix.length - 1)
        groups = torch.zeros_like(places) if groups is None else groups
        slot = torch.where(state.rows(places) < 0, -1, place)
        slots = state.cache.reserve(slot, state.rows(groups), self.visibility(state, place))
        hidden = self._run(state, place, tokens, slots)
        normed = self.norm(hidden)
        return self.head_at(state, normed, rank).with_hidden(normed[: state.batch])

    def head_at(self, state: State, hidden: Tensor, rank: Tensor) -> Distribution:
        """Distribution of the tokens of generation `rank` [B, T], of their normed hidden states [R,
        T, D]; every class with `predicts_places` has it.
        """
        raise NotImplementedError(type(self).__name__)

    def score(
        self, tokens: Tensor, condition: Condition, entities: Entities | None = None
    ) -> Distribution:
        """Teacher-forced distribution of all entities of tokens [B, N, ...] in one differentiable
        pass.
        """
        state = self._state(condition, NO_GUIDANCE, entities or self.entities)
        assert state.input_ends is not None
        state.cache = NoCache(tokens.device, self.attention == "flex")
        hidden = self._run(
            state, torch.arange(int(state.input_ends[-1]))[None], self.read(tokens, state.entities)
        )
        count = state.entities.count
        return self._distribution(
            state, hidden, self.num_reads(state, state.fed, count), state.fed, count
        )

    def _distribution(
        self, state: State, hidden: Tensor, reads: int, first: Tensor, want: int
    ) -> Distribution:
        """What the head makes of the last `reads` hidden states [R, n, D]; those of the images ride
        along.
        """
        normed = self.norm(hidden[:, hidden.shape[1] - reads :])
        return self.head(state, normed, first, want).with_hidden(normed[: state.batch])

    def loss(
        self, tokens: Tensor, condition: Condition, weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Losses of tokens [B, N, ...] in the order of training."""
        entities = self.training_order(len(tokens)) if self.training else self.entities
        scores = self.score(tokens, self.drop_condition(condition), entities)
        return self.losses_of(scores, generated(tokens, entities), weight)

    def losses_of(
        self, scores: Distribution, targets: Tensor, weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Named losses of teacher-forced scores; `targets` [B, N, ...] are the tokens in generation
        order.
        """
        assert isinstance(scores, Logits | ProjectedLogits)
        return {"cross_entropy": scores.cross_entropy(targets, weight)}

    def nats(self, tokens: Tensor, condition: Condition) -> Tensor | None:
        return self.score(tokens, condition).nats(generated(tokens, self.entities))

    def evaluate(self, tokens: Tensor, condition: Condition) -> Evaluation:
        """Losses and nats from one pass; a subclass with a `loss` of its own overrides this too."""
        scores = self.score(tokens, condition)
        targets = generated(tokens, self.entities)
        return Evaluation(self.losses_of(scores, targets), scores.nats(targets))

    def training_order(self, batch: int) -> Entities:
        """The partition that a training step reads: a uniform order with probability
        `random_order`, else its own.
        """
        if not self.random_order:
            return self.entities
        drawn = torch.rand(batch, self.layout.length).argsort(1)
        chosen = torch.rand(batch, 1) < self.random_order
        return Entities(torch.where(chosen, drawn, self.entities.order), self.entities.sizes)

    def read(self, tokens: Tensor, entities: Entities) -> Tensor:
        """Tokens as teacher forcing reads them: through `reader`, where one is set."""
        return tokens if self.reader is None else self.reader(tokens, entities)

    def context_rows(self, entities: Entities) -> tuple[Tensor, Tensor]:
        """Rows of a teacher-forced pass that read one token (counted from the end, below 0) and its
        generation rank.

        Raises UserError for a generator with other inputs, unless it says which of them are tokens.
        """
        if set(entities.sizes) != {1}:
            raise UserError(f"{type(self).__name__} does not read one token a position")
        ranks = torch.arange(entities.length - 1)
        return ranks - len(ranks), ranks

    def token_table(self) -> Tensor:
        """The vectors [V, D] that ids are read as; raises UserError where they are not one table."""
        table = getattr(self, "token_embedding", None)
        vocab = self.layout.vocab().unique().tolist() if self.layout.is_categorical else []
        if not isinstance(table, nn.Embedding) or vocab != [table.num_embeddings]:
            raise UserError(f"{type(self).__name__} has no single table of its tokens' vectors")
        return table.weight

    def _run(
        self, state: State, place: Tensor, tokens: Tensor | None, slots: Slots | None = None
    ) -> Tensor:
        """Hidden states [R, n, D] of the inputs at `place` [R or 1, n]; their keys are committed to
        the cache, in `slots` that were reserved for them or in the next ones.
        """
        assert state.cache is not None and state.prefix is not None
        x = self.embedding_dropout(self._inputs(state, place, tokens))
        if slots is None:
            assert not isinstance(state.cache, PlacedCache)
            slots = state.cache.reserve(self.visibility(state, place))
        x = self.through_layers(x, self.shared(place, state, slots))
        state.cache.commit()
        return x

    def through_layers(self, x: Tensor, shared: Any, layers: nn.ModuleList | None = None) -> Tensor:
        """Hidden states [R, n, D] of inputs x, which all blocks (of `layers`, if others than the
        generator's) read with what they share.
        """
        for number, layer in enumerate(self.layers if layers is None else layers):
            if self.activation_checkpointing == "selective" and self.training:
                x = checkpoint(
                    layer, x, number, shared, use_reentrant=False, context_fn=products_kept
                )
            elif self.activation_checkpointing and self.training:
                x = checkpoint(layer, x, number, shared, use_reentrant=False)
            else:
                x = layer(x, number, shared)
        return x

    def _inputs(self, state: State, place: Tensor, tokens: Tensor | None) -> Tensor:
        """Prefix embeddings at places below P, token inputs from there on; a batch may hold both."""
        #   place    0 .. P - 1    P .. P + count - 2
        #   input    the prefix    tokens of entities 0 .. count - 2
        #
        # The last place of the prefix is the input of entity 0, so nothing is shifted but the name.
        prefix = state.prefix.embeddings  # type: ignore[union-attr]
        length = prefix.shape[1]
        in_order = state.input_size is None and not isinstance(state.cache, PlacedCache)
        if len(place) == 1 and in_order:
            before = int((place < length).sum())
            parts = [prefix[:, place[0, :before]]] if before else []
            if before < place.shape[1]:
                assert tokens is not None
                parts.append(self._embed(state, tokens, place[:, before:] - length))
            return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        # Images stand at different places: both kinds of inputs are made for all, and one is taken.
        assert tokens is not None
        behind = self._embed(state, tokens, (place - length).clamp(min=0))
        place = place.to(prefix.device).expand(len(prefix), -1)
        rows = torch.arange(len(prefix), device=prefix.device)[:, None]
        before = prefix[rows, place.clamp(max=length - 1)]
        return torch.where((place < length)[..., None], before, behind)

    def _embed(self, state: State, tokens: Tensor, index: Tensor) -> Tensor:
        entities = state.entities
        if entities.order.ndim == 2:
            images = torch.arange(state.batch, device=entities.order.device)
            entities = entities.select(images.repeat(state.guidance.branches))
        inputs = self.embed(state.rows(tokens), index, entities)
        return inputs if self.veil is None else self.veil(inputs, index)

    def visibility(self, state: State, place: Tensor) -> Tensor:
        """Visibility numbers [R or 1, n] of places of a sequence, NEVER at the padding of a prefix."""
        block = torch.zeros_like(place) if self.sees_all else self.block(place)
        valid = state.prefix.valid  # type: ignore[union-attr]
        if valid is None or (state.input_size is None and bool(valid.all())):
            return block
        place = place.expand(len(valid), -1)
        inside = place.clamp(max=valid.shape[1] - 1)
        padded = (place < valid.shape[1]) & ~valid.gather(1, inside)
        return torch.where(padded, NEVER, block)


KEPT = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)


def products_kept() -> Any:
    """Contexts of `checkpoint` that keep the results of KEPT and compute all else again."""

    def policy(context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        is_kept = operation in KEPT
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def generated(tokens: Tensor, entities: Entities) -> Tensor:
    """Tokens [B, N, ...] in the order in which they are generated."""
    return take(tokens, entities.order.expand(len(tokens), -1))
