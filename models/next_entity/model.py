"""Next-entity prediction over a categorical layout: the tokens of an entity, whatever it is, at
once, by queries.

The position queries of LPD (arXiv 2507.01957, models/parts/position_queries.py) on Llama's blocks:
any partition of any layout with categories is an X (LPD's own order is `local:STEPS`), and one
fixed partition is trained unless `random_order` asks for random ones of the same sizes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.errors import UserError
from tessellar.layers.kv_cache import Slots
from tessellar.layers.llama import Pass, Positions
from tessellar.models.llamagen.model import rope_table
from tessellar.models.parts.llama import ClassPrefix, LlamaGenerator
from tessellar.models.parts.position_queries import PositionQueries, spots_of
from tessellar.protocol.distribution import Logits
from tessellar.protocol.entities import parse_entities
from tessellar.protocol.generator import State
from tessellar.protocol.layout import Layout


class NextEntity(PositionQueries, LlamaGenerator):
    """Class-conditional generator of the entities `x` (as `parse_entities` reads it) of a
    categorical layout.

    `random_order` is the share of training samples with a uniform order of their own, in entities
    of the same sizes; a model that has seen them decodes in any partition of such sizes. Raises
    UserError for tokens without categories.
    """

    def __init__(
        self,
        layout: Layout,
        x: str = "cell:2",
        width: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        num_classes: int = 1000,
        condition_dropout: float = 0.1,
        dropout: float = 0.1,
        drop_path: float = 0.0,
        random_order: float = 0.0,
        ffn_multiple_of: int = 256,
        norm_eps: float = 1e-5,
        rope_base: float = 10000.0,
        attention: str = "auto",
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__(
            width,
            depth,
            num_heads=num_heads,
            ffn_multiple_of=ffn_multiple_of,
            norm_eps=norm_eps,
            dropout=dropout,
            drop_path=drop_path,
            attention=attention,
        )
        if not layout.is_categorical:
            raise UserError(
                f"NextEntity predicts categorical tokens; this tokenizer gives {layout}"
            )
        self.layout = layout
        self.entities = parse_entities(x, layout)
        self.random_order = random_order
        # Sizes are read while the model is built, on the meta device too.
        with torch.device("cpu"):
            self.vocab = layout.vocab()
        self.conditioning = ClassPrefix(num_classes, width, dropout=condition_dropout)
        self.token_embedding = nn.Embedding(int(self.vocab.max()), width)
        self.position_embedding = nn.Embedding(layout.length, width)
        self.query = nn.Parameter(torch.empty(width))
        self.output = nn.Linear(width, int(self.vocab.max()), bias=False)
        cos, sin = rope_table(layout, 0, self.head_dim, rope_base)
        # Row 0: the prefix.
        self.set_rotations(F.pad(cos, (0, 0, 1, 0), value=1.0), F.pad(sin, (0, 0, 1, 0)))
        self.init_weights(zero_init_residual)

    def init_weights(self, zero_init_residual: bool = False) -> None:
        super().init_weights(zero_init_residual)
        nn.init.normal_(self.query, std=0.02)

    def placed(self, x: Tensor, spot: Tensor) -> Tensor:
        return x + self.position_embedding(spot)

    def positions(self, place: Tensor, state: State) -> Positions:
        """Tokens and queries turn by their place on the layout, whatever the order; the prefix does
        not turn.
        """
        assert state.prefix is not None
        index = place - state.prefix.length
        order = (
            state.entities.order
            if state.entities.order.ndim == 1
            else state.rows(state.entities.order)
        )
        row = torch.where(index < 0, 0, spots_of(index.clamp(min=0), order) + 1).to(
            self.rope_cos.device
        )
        return Positions(self.rope_cos[row], self.rope_sin[row])

    def shared(self, place: Tensor, state: State, slots: Slots) -> Pass:
        assert state.cache is not None
        return Pass(
            self.positions(place, state), state.cache, self.hide_queries(place, state, slots)
        )

    def head(self, state: State, hidden: Tensor, first: Tensor, want: int) -> Logits:
        logits = self.head_at(state, hidden, state.entities.steps(first, want)).logits
        if bool((self.vocab == self.vocab[0]).all()):
            return Logits(logits)
        sizes = self.vocab[state.entities.indices(first, want)].to(logits.device)
        absent = torch.arange(logits.shape[-1], device=logits.device) >= sizes[..., None]
        return Logits(logits.masked_fill(absent, -torch.inf))
