"""The generator protocol: what a decoding algorithm may ask of a generator, and the state that it
drives.

`start` makes a State (prefix prefilled, guidance branches stacked), `predict` feeds the inputs of
the next entities and returns the distribution of the same entities, `State.rollback` takes entities
back. The input of an entity is a pure function of the tokens before it, the entities and the
condition: no decoded value lives in the state, so drafts, roll-back, forks and resuming need no
code in any generator.

Shapes: B images, R = B x branches rows (all conditional rows, then all null rows), T tokens of a
span, n positions.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.layers.kv_cache import KVCache, NoCache, PlacedCache
from tessellar.layers.precision import ExactTables
from tessellar.protocol.condition import Condition, Conditioner, Conditioning
from tessellar.protocol.configured import Configured
from tessellar.protocol.distribution import Distribution
from tessellar.protocol.entities import Entities
from tessellar.protocol.guidance import NO_GUIDANCE, Guidance
from tessellar.protocol.layout import Layout
from tessellar.protocol.noise import Noise
from tessellar.protocol.tokenizer import Tokenizer
from tessellar.protocol.work import Work, linear_macs


class Prefix(NamedTuple):
    """Condition as a generator reads it: embeddings [R, P, D], `valid` [R, P] (False = padding) or
    None; on the CPU unless the state is fixed.
    """

    embeddings: Tensor
    valid: Tensor | None = None

    @property
    def length(self) -> int:
        return self.embeddings.shape[1]


class TokenizerPart(Protocol):
    """What a tokenizer inside the loop keeps of the tokens so far (maps, a cache of a decoder), of
    B images.

    A pure function of the tokens of the first `fed` entities, so it can be forgotten and forked
    with them.
    """

    def rollback(self, fed: Tensor) -> None:
        """Forget all but the first `fed` [B] entities of each image."""
        ...

    def select(self, index: Tensor) -> "TokenizerPart":
        """That of images `index` [b], copied."""
        ...


@dataclass
class State:
    """One batch being decoded; made by `Generator.start`, driven by a decoding algorithm."""

    condition: Condition  # R rows
    guidance: Guidance
    entities: Entities
    fed: Tensor  # [B] entities whose input is in the cache = entities predicted so far
    prefix: Prefix | None = None
    cache: KVCache | NoCache | PlacedCache | None = None
    input_ends: Tensor | None = None  # [count + 1] cache length after the inputs of n entities
    part: TokenizerPart | None = None  # of a tokenizer that is asked in the loop
    input_size: int | None = None  # positions of each entity's input; set where the state is fixed
    ahead: Any = None  # what a generator has computed for steps to come (`steps_ahead`)

    # `fed`, `input_ends`, the entities and the prefix's padding lie on the CPU, where the host
    # reads them, or all on one device (`fixed`).

    @property
    def batch(self) -> int:
        """Number of images B."""
        return len(self.fed)

    def rows(self, x: Tensor) -> Tensor:
        """[B, ...] of images to [R, ...] of rows; batch-independent data [1, ...] stays as it is."""
        plain = self.guidance is NO_GUIDANCE
        if plain or len(x) != self.batch or self.guidance.branches == 1:
            return x
        return torch.cat([x] * self.guidance.branches)

    def merge(self, x: Tensor, entity: Tensor, factor: int = 0) -> Tensor:
        """Guidance: predictions [R, T, ...] of entities [B, T], or of their sub-tokens `factor`, to
        [B, T, ...].
        """
        if self.guidance is NO_GUIDANCE:
            return x
        return self.guidance.merge(x, entity, self.entities, factor)

    def _input_end(self, entity: Tensor) -> Tensor:
        assert self.input_ends is not None
        count = self.entities.count
        step = self.input_ends[-1] - self.input_ends[-2]
        return self.input_ends[entity.clamp(max=count)] + (entity - count).clamp(min=0) * step

    def places(self, count: int) -> Tensor:
        """[R, n] sequence places of the next inputs ([1, n] where all images agree), extrapolated
        past the end.

        Raises ValueError where images stand at entities with inputs of unequal length.
        """
        if self.input_size is not None:
            span = torch.arange(count * self.input_size, device=self.fed.device)
            return self.rows(self._input_end(self.fed)[:, None] + span)
        first = self.fed[:1] if bool((self.fed == self.fed[0]).all()) else self.fed
        starts = self._input_end(first)
        stops = self._input_end(first + count)
        lengths = (stops - starts).unique()
        if len(lengths) > 1:
            raise ValueError(
                f"images stand at entities {first.tolist()} of unequal inputs; they must be in step"
            )
        places = starts[:, None] + torch.arange(int(lengths))
        return places if len(places) == 1 else self.rows(places)

    def advance(self, count: int) -> None:
        """The inputs of `count` more entities of each image were fed."""
        if self.input_size is None:
            self.fed = self.fed + count
        else:
            self.fed.add_(count)  # in place: a captured step goes on from there

    def fixed(self, device: torch.device | str) -> "State":
        """The same state with positions, lengths and tables on `device`, of which the host reads
        nothing: the shapes of a step depend on no value, so it can be captured.

        Raises UserError where entities have inputs of unequal length: their shapes are values.
        """
        if self.input_ends is None or not isinstance(self.cache, KVCache):
            raise UserError("only a state with a cache of one run of inputs can be fixed")
        lengths = self.input_ends.diff().unique()
        if len(lengths) > 1:
            raise UserError(
                f"entities with inputs of {lengths.tolist()} positions give steps of unequal shapes"
            )
        prefix = self.prefix
        if prefix is not None and prefix.valid is not None:
            prefix = Prefix(prefix.embeddings, prefix.valid.to(device))
        fix = getattr(self.part, "fixed", None)
        part = self.part if fix is None else fix(device)
        return replace(
            self,
            entities=self.entities.to(device),
            fed=self.fed.to(device).clone(),
            prefix=prefix,
            cache=self.cache.fixed(),
            input_ends=self.input_ends.to(device),
            input_size=int(lengths),
            part=part,
        )

    def keep_places(self, keep: Tensor) -> None:
        """What the last window of places read stays where `keep` [B, T] is True, and is forgotten
        elsewhere.
        """
        assert isinstance(self.cache, PlacedCache), "the state is not one of `start_places`"
        self.cache.keep(self.rows(keep))

    def rollback(self, fed: Tensor) -> None:
        """Forget all but the first `fed` [B] entities of each image."""
        assert not isinstance(self.cache, PlacedCache), (
            "of windows of places, `keep_places` forgets"
        )
        if self.input_size is None:
            self.fed = fed.to(self.fed.device).clone()
        else:
            self.fed.copy_(fed)
        if self.part is not None:
            self.part.rollback(self.fed)
        if isinstance(self.cache, KVCache):
            # Rows are all conditional ones, then all null ones: the lengths of images, repeated.
            self.cache.truncate(self._input_end(self.fed).repeat(self.guidance.branches))

    def select(self, index: Tensor) -> "State":
        """The state of images `index` [b], all their rows copied: fork, reorder, drop."""
        index = index.to(self.fed.device)
        rows = torch.cat([index + branch * self.batch for branch in range(self.guidance.branches)])
        prefix = self.prefix and Prefix(
            self.prefix.embeddings[rows.to(self.prefix.embeddings.device)],
            None if self.prefix.valid is None else self.prefix.valid[rows],
        )
        has_rows = isinstance(self.cache, (KVCache, PlacedCache))
        cache = self.cache.select(rows) if has_rows else self.cache  # type: ignore[union-attr]
        return replace(
            self,
            condition=self.condition.select(rows),
            entities=self.entities.select(index),
            fed=self.fed[index],
            prefix=prefix,
            cache=cache,
            part=None if self.part is None else self.part.select(index),
        )


class Evaluation(NamedTuple):
    """What validation measures of a batch: named losses, and nats [B] of each image where there is
    a likelihood.
    """

    losses: dict[str, Tensor]
    nats: Tensor | None


class Generator(Configured, ExactTables, ABC):
    """Tokens from a condition, entity by entity.

    The constructor sets `layout`, `entities` (the default partition) and `conditioning` (what is
    read as a condition, which one stands for none, and how often training takes that one).
    """

    layout: Layout
    entities: Entities
    conditioning: Conditioning
    #: In sampling: for how many steps at once a generator may compute what it knows of them beforehand.
    steps_ahead: int = 1
    #: Whether it can be sampled by itself; a drafter (FLASH's) only drafts for another generator.
    draws_alone: bool = True

    @property
    def condition_dropout(self) -> float:
        """How often training takes the null condition; set where the conditioning is made."""
        return self.conditioning.dropout

    def null(self, condition: Condition) -> Condition:
        """The unconditional counterpart of every row."""
        return self.conditioning.null(condition)

    @abstractmethod
    def loss(
        self, tokens: Tensor, condition: Condition, weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Named training losses of tokens [B, N, ...]; their sum is minimised. `weight` [B] weighs
        samples.
        """

    def nats(self, tokens: Tensor, condition: Condition) -> Tensor | None:
        """-log p [B] in nats of whole images [B, N, ...] under their condition; None where there is
        no likelihood.
        """
        return None

    def evaluate(self, tokens: Tensor, condition: Condition) -> Evaluation:
        """Losses and nats of a batch in validation; a generator that has both from one pass
        overrides this.
        """
        return Evaluation(self.loss(tokens, condition), self.nats(tokens, condition))

    @abstractmethod
    def start(
        self,
        condition: Condition,
        guidance: Guidance = NO_GUIDANCE,
        entities: Entities | None = None,
        window: int = 1,
    ) -> State:
        """A state with nothing predicted; `window` entities past the end fit into its cache."""

    @abstractmethod
    def predict(
        self, state: State, tokens: Tensor, count: int = 1, want: int | None = None
    ) -> Distribution:
        """Feed the inputs of `count` entities, read from the token buffer [B, N, ...] (committed or
        drafted alike).

        Advances `state.fed` and returns the guided distribution of the last `want` (default: all)
        of those entities.
        """

    def predict_again(self, state: State, tokens: Tensor) -> Distribution:
        """Distribution of the entity that `predict` gave last, of inputs that hold its own tokens too.

        Neither the state nor what later entities read changes. For generators that are trained on
        maps which may hold a draft (TokenFlow); raises UserError, naming the generator, for all
        others.
        """
        raise UserError(f"{type(self).__name__} reads no draft of the entity that it predicts")

    def start_places(
        self,
        condition: Condition,
        guidance: Guidance = NO_GUIDANCE,
        entities: Entities | None = None,
    ) -> State:
        """A state for windows of places (`predict_places`), with nothing read but the prefix.

        Raises UserError, naming the generator, where it predicts none.
        """
        raise UserError(f"{type(self).__name__} predicts runs of entities, not any set of places")

    def predict_places(
        self, state: State, tokens: Tensor, places: Tensor, groups: Tensor | None = None
    ) -> Distribution:
        """Distribution of the tokens at `places` [B, T] of the layout, any set of them, each once.

        For algorithms whose window is no run of entities: images stand at several fronts at once.
        A generator with a cache reads the input of each place, which sees what was kept of earlier
        windows and, of this one, the inputs of group 0 (final ones; the default) and of its own
        group in `groups` [B, T] (one a front), as far as they come before it. Then
        `State.keep_places` says which inputs stay. A place of -1 is padding: nobody sees it, and
        what is predicted there means nothing. Generators that fill masks read the tokens of the
        entities before `state.fed`. Raises UserError, naming the generator, where positions are not
        found by place.
        """
        raise UserError(f"{type(self).__name__} predicts runs of entities, not any set of places")

    def plan(self, noise: Noise, steps: int | None = None) -> Entities:
        """The partition to decode in; generators of random order draw one for each image, in
        `steps` entities.

        Raises UserError for a number of steps that is not this generator's to choose.
        """
        if steps is not None:
            raise UserError(f"{type(self).__name__} has an order of its own: leave steps out")
        return self.entities

    def free_order(self) -> Entities | None:
        """The units that `start` takes in any order, first those that are given; None where the order
        is fixed.

        A generator that is trained on orders of all kinds has a law for each: that of the rest given any
        units.
        """
        return None

    def take_layout(self, layout: Layout) -> None:
        """Predict tokens of another layout from now on, one that differs only in the shapes of its
        segments; weights stay. The other half of `Tokenizer.take_size`.

        A generator that can overrides it. Raises UserError, naming the generator, for all others.
        """
        if layout != self.layout:
            raise UserError(f"{type(self).__name__} predicts tokens of one layout, {self.layout}")

    def bind(self, tokenizer: Tokenizer) -> None:
        """Told once whose tokens these are; for generators that read more of the tokenizer than its
        layout (VAR).
        """

    def learn_from(self, target: "Generator") -> None:
        """Told once, before training, of a frozen generator that it learns from (FLASH's drafter).

        Raises UserError, naming the generator, for all others.
        """
        raise UserError(f"{type(self).__name__} learns from tokens alone: leave target out")

    def code_embeddings(self) -> Tensor | None:
        """Embeddings [V, D] of the codes of a categorical layout, which say what codes are alike (GSD);
        None where a code has none of its own.
        """
        table = getattr(self, "token_embedding", None)
        return table.weight if isinstance(table, nn.Embedding) else None

    def starting_from(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Weights of another instance as training goes on from them (`init_from`): as they are.

        A generator whose tables of positions can be enlarged overrides it.
        """
        return state

    def work(self) -> Work:
        """Positions and MACs of one image, an estimate: every linear layer once a token, without
        attention.
        """
        return Work(self.layout.length, linear_macs(self) * self.layout.length, 0)

    def make_conditioner(self) -> Conditioner:
        """What turns a batch of data into this generator's condition."""
        return self.conditioning.conditioner()

    def drop_condition(self, condition: Condition) -> Condition:
        """In training, rows become null as often as `conditioning.dropout` says."""
        return self.conditioning.drop(condition) if self.training else condition

    def stack_branches(self, condition: Condition, guidance: Guidance) -> Condition:
        """Rows of all guidance branches: the condition, what is blended with it, its null."""
        if guidance is NO_GUIDANCE:
            return condition
        return guidance.conditions(condition, self.null)


def require_categorical(layout: Layout, generator: str) -> int:
    """The one vocabulary size of a categorical layout; raises UserError, naming the generator, for
    any other layout.
    """
    if not layout.is_categorical:
        raise UserError(f"{generator} predicts categorical tokens; this tokenizer gives {layout}")
    sizes: Sequence[int] = layout.vocab().unique().tolist()
    if len(sizes) > 1:
        raise UserError(f"{generator} reads one vocabulary; this tokenizer has {sizes} in {layout}")
    return sizes[0]
