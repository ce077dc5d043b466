"""Generators that read what their tokenizer makes of the tokens so far, in the loop (VAR, TokenFlow,
MingTok): one way to ask for it, and to roll it back.
"""

from abc import abstractmethod
from typing import ClassVar, cast

from torch import Tensor

from tessellar.errors import UserError
from tessellar.models.parts.prefix_transformer import PrefixTransformer
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import Distribution
from tessellar.protocol.entities import Entities
from tessellar.protocol.generator import State
from tessellar.protocol.guidance import NO_GUIDANCE, Guidance
from tessellar.protocol.in_loop import InLoop, LoopInputs
from tessellar.protocol.tokenizer import Tokenizer


class LoopReader(PrefixTransformer):
    """A subclass says what it reads, in messages, and of how many channels, and embeds it."""

    #: What the tokenizer must give, in messages.
    reads: ClassVar[str]
    #: A tuple, so that the tokenizer's weights stay the tokenizer's.
    bound: tuple[InLoop, ...] = ()

    @property
    @abstractmethod
    def input_dim(self) -> int:
        """Channels of what is read."""

    @abstractmethod
    def ranks(self, index: Tensor) -> Tensor:
        """Generation ranks of the tokens that the inputs at indices behind the prefix predict."""

    @abstractmethod
    def embed_inputs(self, inputs: Tensor, index: Tensor) -> Tensor:
        """Embeddings [R, n, D] of inputs [R, n, input_dim] at indices behind the prefix [R or 1, n]."""

    def bind(self, tokenizer: Tokenizer) -> None:
        own = type(self).__name__
        if not hasattr(tokenizer, "begin"):
            raise UserError(f"{own} reads {self.reads}; {type(tokenizer).__name__} has none")
        maker = cast(InLoop, tokenizer)
        if maker.input_dim != self.input_dim:
            raise UserError(
                f"{own} was built for inputs of {self.input_dim} channels, the tokenizer has {maker.input_dim}"
            )
        self.bound = (maker,)

    def begin(self, entities: Entities, batch: int, window: int | None) -> LoopInputs:
        """What the bound tokenizer gives of new images; raises UserError where none is bound."""
        if not self.bound:
            raise UserError(
                f"{type(self).__name__} has no tokenizer yet, which makes its inputs: bind one"
            )
        return self.bound[0].begin(entities, batch, window)

    def start(
        self,
        condition: Condition,
        guidance: Guidance = NO_GUIDANCE,
        entities: Entities | None = None,
        window: int = 1,
    ) -> State:
        state = super().start(condition, guidance, entities, window)
        state.part = self.begin(state.entities, state.batch, window)
        return state

    def predict(
        self, state: State, tokens: Tensor, count: int = 1, want: int | None = None
    ) -> Distribution:
        found = super().predict(state, tokens, count, want)
        # Images that wait for others at their start were given inputs that do not count.
        self.part_of(state).rollback(state.fed)
        return found

    def part_of(self, state: State) -> LoopInputs:
        """Inputs of a state; of one that `start` did not make, for one pass."""
        if state.part is None:
            state.part = self.begin(state.entities, state.batch, None)
        return cast(LoopInputs, state.part)

    def inputs(self, state: State, tokens: Tensor, rank: Tensor) -> Tensor:
        """Inputs [R, n, input_dim] of tokens of generation rank [R or 1, n], of buffers of images."""
        images = rank if len(rank) == 1 else rank[: state.batch]
        return state.rows(self.part_of(state).inputs(tokens, images))

    def _embed(self, state: State, tokens: Tensor, index: Tensor) -> Tensor:
        return self.embed_inputs(self.inputs(state, tokens, self.ranks(index)), index)

    def embed(self, tokens: Tensor, index: Tensor, entities: Entities) -> Tensor:
        made = self.begin(entities, len(tokens), None)
        return self.embed_inputs(made.inputs(tokens, self.ranks(index)), index)
