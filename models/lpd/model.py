"""LPD: locality-aware parallel decoding, a grid's tokens in few steps (arXiv 2507.01957, section
3).

A GPT without any position but learned ones of places reads the tokens so far and queries of the
places that are drawn next (models/parts/position_queries.py); one LayerNorm follows the sum of each
with its place. Training draws a number of steps for each batch and an order for each sample, so
both are chosen when images are drawn: by default near what is known and far from each other
(tessellar/protocol/local_order.py), each image by chances of its own.

Guidance counts tokens, not groups: the tokens of one group have different scales. Different from
the official code: orders are drawn with the images instead of read from a file, all processes train
on one number of steps, and grids of other sizes train on the same shares of their number of tokens.
"""

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar import distributed
from tessellar.errors import UserError
from tessellar.layers.kv_cache import KVCache, NoCache, PlacedCache, Slots
from tessellar.layers.precision import at_least_float32
from tessellar.layers.tags import tag
from tessellar.models.parts.cached_attention import CachedAttention
from tessellar.models.parts.position_queries import PositionQueries
from tessellar.protocol.condition import ClassConditioning, Condition
from tessellar.protocol.distribution import Logits
from tessellar.protocol.entities import Entities, local_order, token_order
from tessellar.protocol.generator import Prefix, State, require_categorical
from tessellar.protocol.layout import Layout
from tessellar.protocol.local_order import Chances, Thresholds, local_order_of, local_sizes
from tessellar.protocol.noise import Noise

EPS = 1e-6  # of every LayerNorm
TOKENS = 256  # of the published grid of 256 pixels
TRAINED = (256, 128, 64, 32, 24, 20, 16, 12, 8)  # numbers of steps that its training draws from
TRAINED_1024 = (1024, 512, 256, 224, 192, 160, 128, 96, 80, 64, 56, 48, 40, 32)  # of 512 pixels


class LPDPass(NamedTuple):
    """What all blocks of one pass share."""

    cache: KVCache | NoCache | PlacedCache
    slots: Slots


class LPDBlock(nn.Module):
    """x += Attention(norm1 x); x += MLP(norm2 x), exact GELU."""

    def __init__(
        self, width: int, num_heads: int, hidden: int, dropout: float, implementation: str
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        # Attention weights are not dropped: the official option of that name is never given to the kernel.
        self.attention = CachedAttention(
            width, num_heads, dropout=dropout, implementation=implementation
        )
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)
        for linear in (self.attention.qkv, self.attention.proj, self.fc1, self.fc2):
            tag(linear.weight, "hidden")

    def forward(self, x: Tensor, layer: int, shared: LPDPass) -> Tensor:
        x = x + self.attention(self.norm1(x), layer, shared)
        hidden = self.dropout(F.gelu(self.fc1(self.norm2(x))))
        return x + self.dropout(self.fc2(hidden))


class LPD(PositionQueries):
    """Class-conditional generator of one grid of categorical tokens.

    `steps`, `proximity` and `repulsion` are those of the orders that images are drawn in;
    `trained_steps` are the numbers of steps that training draws from (None: the published ones, or
    the same shares of another number of tokens). Raises UserError for other layouts, and for
    numbers of steps that the grid does not have.
    """

    def __init__(
        self,
        layout: Layout,
        width: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        num_classes: int = 1000,
        steps: int = 20,
        proximity: float = 1.0,
        repulsion: float = 2.0,
        trained_steps: Sequence[int] | None = None,
        condition_dropout: float = 0.1,
        dropout: float = 0.1,
        mlp_ratio: float = 4.0,
        attention: str = "auto",
    ) -> None:
        super().__init__()
        if layout.grid is None:
            raise UserError(f"LPD generates one grid; this tokenizer gives {layout}")
        if width % num_heads:
            raise UserError(f"num_heads {num_heads} does not divide width {width}")
        self.layout = layout
        self.vocab = require_categorical(layout, "LPD")
        self.grid = layout.grid
        self.steps = steps
        self.thresholds = Thresholds(proximity, repulsion)
        self.entities = local_order(layout, steps, thresholds=self.thresholds)
        self.by_token = token_order(layout)
        self.trained_sizes = [
            local_sizes(layout.length, count)
            for count in trained_steps or published_steps(layout.length)
        ]
        self.num_classes = num_classes
        self.conditioning = ClassConditioning(num_classes, dropout=condition_dropout)
        self.num_heads = num_heads
        self.head_dim = width // num_heads
        self.class_embedding = nn.Embedding(num_classes, width)
        self.null_embedding = nn.Parameter(torch.empty(1, width))
        self.token_embedding = nn.Embedding(self.vocab, width)
        self.position_embedding = nn.Parameter(torch.empty(1, 1 + layout.length, width))
        self.query = nn.Parameter(torch.empty(1, 1, width))
        self.input_norm = nn.LayerNorm(width, eps=EPS)
        self.embedding_dropout = nn.Identity()
        self.layers = nn.ModuleList(
            LPDBlock(
                width,
                num_heads,
                hidden=int(mlp_ratio * width),
                dropout=dropout,
                implementation=attention,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.output = nn.Linear(width, self.vocab, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Linear layers Xavier uniform, biases 0; tables, the null class and the query N(0, 0.02).

        As published, all of these decay but biases and norms.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for table in (self.null_embedding, self.position_embedding, self.query):
            nn.init.normal_(table, std=0.02)

    def plan(self, noise: Noise, steps: int | None = None) -> Entities:
        """An order of its own for each image, by two draws of its noise a step and cell."""
        sizes = local_sizes(self.layout.length, self.steps if steps is None else steps)
        draws = noise.uniform(len(sizes), self.layout.length + 1)
        orders = [
            local_order_of(self.grid, sizes, Chances.of(one), self.thresholds) for one in draws
        ]
        return Entities(torch.tensor(orders, device="cpu"), sizes)

    def free_order(self) -> Entities:
        return self.by_token

    def training_order(self, batch: int) -> Entities:
        """Uniform orders of the samples, in one of the trained numbers of steps: the same on all
        processes.
        """
        drawn = int(torch.randint(len(self.trained_sizes), (), device="cpu"))
        sizes = self.trained_sizes[distributed.broadcast(drawn)]
        return Entities(torch.rand(batch, self.layout.length, device="cpu").argsort(1), sizes)

    def prefix(self, condition: Condition) -> Prefix:
        assert condition.ids is not None
        known = self.class_embedding(condition.ids.clamp(max=self.num_classes - 1))
        is_null = (condition.ids == self.num_classes)[:, None]
        label = torch.where(is_null, self.null_embedding, known)[:, None]
        return Prefix(self.input_norm(label + self.position_embedding[:, :1]))

    def placed(self, x: Tensor, spot: Tensor) -> Tensor:
        """Row 0 of the table is the class's; the norm comes after the sum."""
        return self.input_norm(x + self.position_embedding[0, 1 + spot])

    def shared(self, place: Tensor, state: State, slots: Slots) -> LPDPass:
        assert state.cache is not None
        return LPDPass(state.cache, self.hide_queries(place, state, slots))

    def head(self, state: State, hidden: Tensor, first: Tensor, want: int) -> Logits:
        """A token's guidance goes by its own place in the order: w(p / N)."""
        logits = at_least_float32(self.output(hidden))
        rank = state.entities.steps(first, want)
        return Logits(state.guidance.merge(logits, rank, self.by_token))

    def starting_from(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Positions of a model of another grid are resized, as published for 512 pixels."""
        name = "position_embedding"
        return {
            key: resize_positions(tensor, self.grid) if key == name else tensor
            for key, tensor in state.items()
        }


def published_steps(length: int) -> list[int]:
    """Numbers of steps that training draws from, of a grid of so many tokens."""
    if length == 4 * TOKENS:
        return list(TRAINED_1024)
    return sorted({max(1, length * steps // TOKENS) for steps in TRAINED}, reverse=True)


def resize_positions(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """A table [1, 1 + n, D] of a square grid for another grid: bicubic, without antialiasing; the
    class's row stays.

    A table that fits, or that is of no square, is given back as it is.
    """
    side = isqrt(table.shape[1] - 1)
    if side**2 != table.shape[1] - 1 or table.shape[1] - 1 == grid[0] * grid[1]:
        return table
    cells = rearrange(table[:, 1:], "one (h w) d -> one d h w", h=side)
    resized = F.interpolate(cells, grid, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], rearrange(resized, "one d h w -> one (h w) d")], dim=1)


# Published variants: width, depth, heads; how far apart the tokens of a group are.
# parameters at 16 x 16 tokens of 16,384 codes, 1,000 classes
def lpd_l(layout: Layout, num_classes: int = 1000, steps: int = 20, repulsion: float = 2.0) -> LPD:
    """337,157,120 parameters (337,943,552 at 32 x 32, with 48 steps and a repulsion of 4)."""
    return LPD(
        layout, 1024, 24, num_heads=16, num_classes=num_classes, steps=steps, repulsion=repulsion
    )


def lpd_xl(layout: Layout, num_classes: int = 1000, steps: int = 20, repulsion: float = 2.0) -> LPD:
    """751,947,520 parameters (752,930,560 at 32 x 32, with 48 steps and a repulsion of 4)."""
    return LPD(
        layout, 1280, 36, num_heads=20, num_classes=num_classes, steps=steps, repulsion=repulsion
    )


def lpd_xxl(
    layout: Layout, num_classes: int = 1000, steps: int = 20, repulsion: float = 3.0
) -> LPD:
    """1,412,184,576 parameters."""
    return LPD(
        layout, 1536, 48, num_heads=24, num_classes=num_classes, steps=steps, repulsion=repulsion
    )
