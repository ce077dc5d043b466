"""RAR: next-token prediction over randomly permuted orders that anneal to raster order (arXiv
2411.00776).

Every input carries the position of its own token and, added to it, the position of the token that
it predicts (the target-aware embedding), so one network models all orders. Blocks are modulated by
the class and the sequence index (AdaLN-Zero). `OrderAnnealing` sets the share of samples with a
random order during training; decoding runs in raster order. Different from the official code: any
categorical layout, and the cache is an argument.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.layers.adaln import Modulation, modulate
from tessellar.layers.kv_cache import Slots
from tessellar.layers.precision import at_least_float32
from tessellar.layers.tags import tag
from tessellar.models.parts.modulated_block import ModulatedBlock, ModulatedPass
from tessellar.models.parts.prefix_transformer import PrefixTransformer
from tessellar.protocol.condition import ClassConditioning, Condition
from tessellar.protocol.distribution import Logits
from tessellar.protocol.entities import Entities, token_order
from tessellar.protocol.generator import Prefix, State, require_categorical
from tessellar.protocol.guidance import Guidance
from tessellar.protocol.layout import Layout

PREFIX = 2  # a learned start token and the class
SPARE_POSITIONS = 1024
SPARE_STEPS = 100  # rows that the official tables have beyond N


class Ahead(NamedTuple):
    """Modulations of every block [R, steps, 6 D] at places from `first` on, under one condition."""

    first: int
    condition: Condition
    modulations: list[Tensor]

    def is_of(self, state: State) -> bool:
        """Whether rows were neither chosen nor put in another order since."""
        return self.condition is state.condition


class RAR(PrefixTransformer):
    """Class-conditional generator of one categorical vocabulary.

    `random_order` is the share of training samples with an order of their own, uniform over
    permutations; the others follow the layout's order. Raises UserError for a layout that is not
    categorical or has several vocabularies.
    """

    predicts_places = True

    def __init__(
        self,
        layout: Layout,
        width: int = 768,
        depth: int = 24,
        num_heads: int = 16,
        hidden: int = 3072,
        num_classes: int = 1000,
        condition_dropout: float = 0.1,
        dropout: float = 0.1,
        random_order: float = 1.0,
        attention: str = "auto",
    ) -> None:
        super().__init__()
        self.layout = layout
        self.entities = token_order(layout)
        self.num_classes = num_classes
        self.random_order = random_order
        self.vocab = require_categorical(layout, "RAR")
        self.conditioning = ClassConditioning(num_classes, dropout=condition_dropout)
        self.num_heads = num_heads
        self.head_dim = width // num_heads
        # rows: tokens, a mask token that is never used, classes, no class
        self.embedding = nn.Embedding(self.vocab + 1 + num_classes + 1, width)
        self.start_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.empty(1, layout.length + SPARE_POSITIONS, width))
        self.target_position = nn.Parameter(torch.empty(1, layout.length + SPARE_POSITIONS, width))
        self.step_embedding = nn.Parameter(torch.empty(1, layout.length + SPARE_STEPS, width))
        self.embedding_dropout = nn.Identity()
        self.layers = nn.ModuleList(
            ModulatedBlock(width, num_heads, hidden, dropout, attention) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.last_modulation = Modulation(width, count=2)
        self.output = nn.Linear(width, self.vocab)
        self.init_weights()

    def init_weights(self) -> None:
        """Truncated N(0, 0.02); every modulation starts at zero, so each block starts as the
        identity.
        """
        for name, parameter in self.named_parameters():
            if "modulation" in name or name == "start_token" or "norm" in name:
                continue
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.trunc_normal_(parameter, std=0.02)
        # As published: the tables and the last modulation are not decayed, the start token is.
        tables = (self.position, self.target_position, self.step_embedding, self.embedding.weight)
        for parameter in (*tables, self.last_modulation.linear.weight):
            tag(parameter, "no_decay")

    def class_embedding(self, condition: Condition) -> Tensor:
        """[R, 1, D]; it is both a token of the prefix and the condition of every block."""
        assert condition.ids is not None
        return self.embedding(condition.ids + self.vocab + 1)[:, None]

    def code_embeddings(self) -> Tensor:
        return self.embedding.weight[: self.vocab]

    def prefix(self, condition: Condition) -> Prefix:
        label = self.class_embedding(condition)
        return Prefix(
            torch.cat([self.start_token.expand(len(label), -1, -1), label], 1)
            + self.position[:, :PREFIX]
        )

    def free_order(self) -> Entities:
        return token_order(self.layout)

    def _state(self, condition: Condition, guidance: Guidance, entities: Entities) -> State:
        """The class position also says where the first token goes."""
        state = super()._state(condition, guidance, entities)
        assert state.prefix is not None
        first = state.rows(entities.order.expand(state.batch, -1)[:, :1])
        prefix = state.prefix.embeddings
        target = F.pad(
            self.target_position[0, PREFIX + first.to(prefix.device)], (0, 0, PREFIX - 1, 0)
        )
        state.prefix = Prefix(prefix + target)
        return state

    def embed(self, tokens: Tensor, index: Tensor, entities: Entities) -> Tensor:
        """The i-th token, where it stands, and where the next one goes (nowhere behind the last
        one).
        """
        order = entities.order.view(-1, entities.length)
        last = entities.length - 1
        rows = max(len(order), len(index))
        order = order.expand(rows, -1)
        index = index.expand(rows, -1)
        place = order.gather(1, index.clamp(max=last)).to(tokens.device)
        target = order.gather(1, (index + 1).clamp(max=last)).to(tokens.device)
        has_target = (index < last).to(tokens.device)[..., None]
        ids = tokens.gather(1, place.expand(len(tokens), -1))
        aware = torch.where(has_target, self.target_position[0, PREFIX + target], 0.0)
        return self.embedding(ids) + self.position[0, PREFIX + place] + aware

    def conditions(self, place: Tensor, condition: Condition) -> Tensor:
        """c = class embedding + step embedding at sequence places [R or 1, n]: [R, n, D]."""
        place = place.clamp(max=self.step_embedding.shape[1] - 1).to(self.step_embedding.device)
        return self.class_embedding(condition) + self.step_embedding[0, place]

    def shared(self, place: Tensor, state: State, slots: Slots) -> ModulatedPass:
        assert state.cache is not None
        condition = self.conditions(place, state.condition)
        modulations = self._modulations(place, state)
        return ModulatedPass(condition, state.cache, slots, modulations)

    def _modulations(self, place: Tensor, state: State) -> list[Tensor] | None:
        """Those of all blocks at one place: class and place are known before decoding begins, and so
        a third of all weights is read once in `steps_ahead` tokens.
        """
        on_host = place.device.type == "cpu" and state.input_size is None
        if self.steps_ahead == 1 or place.numel() > 1 or not on_host:
            return None
        first = int(place) // self.steps_ahead * self.steps_ahead
        if state.ahead is None or state.ahead.first != first or not state.ahead.is_of(state):
            places = torch.arange(first, first + self.steps_ahead)[None]
            active = F.silu(self.conditions(places, state.condition))
            vectors = [layer.modulation.linear(active) for layer in self.layers]  # type: ignore[union-attr, operator]
            state.ahead = Ahead(first, state.condition, vectors)
        step = int(place) - first
        return [vectors[:, step : step + 1] for vectors in state.ahead.modulations]

    def head(self, state: State, hidden: Tensor, first: Tensor, want: int) -> Logits:
        return self.head_at(state, hidden, state.entities.steps(first, want))

    def head_at(self, state: State, hidden: Tensor, rank: Tensor) -> Logits:
        place = state.rows(rank + PREFIX - 1)
        scale, shift = self.last_modulation(self.conditions(place, state.condition))
        logits = at_least_float32(self.output(modulate(hidden, scale, shift)))
        return Logits(state.merge(logits, state.entities.entity_at(rank)))


# Published variants: width, depth, heads, MLP.     parameters at N = 256, 1,024 codes, 1,000 classes
def rar_b(layout: Layout, num_classes: int = 1000) -> RAR:
    """260,923,648 parameters."""
    return RAR(layout, 768, 24, 16, 3072, num_classes)


def rar_l(layout: Layout, num_classes: int = 1000) -> RAR:
    """461,668,352 parameters."""
    return RAR(layout, 1024, 24, 16, 4096, num_classes)


def rar_xl(layout: Layout, num_classes: int = 1000) -> RAR:
    """955,425,024 parameters."""
    return RAR(layout, 1280, 32, 16, 5120, num_classes)


def rar_xxl(layout: Layout, num_classes: int = 1000) -> RAR:
    """1,498,520,704 parameters."""
    return RAR(layout, 1408, 40, 16, 6144, num_classes)
