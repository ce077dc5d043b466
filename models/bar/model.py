"""BAR: next-token prediction over tokens of k bits, of which no index is ever formed (arXiv
2602.09024; its official code read through specs/bar.md, for which no outputs are recorded).

A causal transformer as RAR's (random orders that anneal to raster order, the next place told to each
input, blocks modulated by class and index) gives a vector for each token; `head.py` fills in its
bits. The prefix is a learned token and 32 copies of the class. Rotations (two axes, own place at
keys and half of the query heads, the next one's place at the other half) leave the prefix as it is.
With `patch` p a position is p x p tokens side by side. Guidance acts on the logits of bits inside of
the head's steps. Different from the official code: any grid or sequence of bits, and the cache is an
argument. No outputs are recorded: names, orders and starts are those that its code spells.

Shapes: B images, R rows, N tokens, s = p x p tokens a position, L = N / s positions, k bits a token.
"""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.errors import UserError
from tessellar.layers.adaln import Modulation, modulate
from tessellar.layers.attention import attention as attend
from tessellar.layers.kv_cache import KVCache, NoCache, PlacedCache, Slots
from tessellar.layers.llama import Positions, SwiGLU, rotate
from tessellar.layers.tags import tag
from tessellar.models.bar.head import (
    BitEmbedding,
    MaskedBitHead,
    MaskedBits,
    draw_masks,
    masked_bit_loss,
)
from tessellar.models.llamagen.model import rope_table
from tessellar.models.parts.prefix_transformer import PrefixTransformer
from tessellar.protocol.condition import ClassConditioning, Condition
from tessellar.protocol.distribution import Bits, Distribution
from tessellar.protocol.entities import Entities, cells, take
from tessellar.protocol.generator import Prefix, State
from tessellar.protocol.guidance import Guidance
from tessellar.protocol.layout import Bits as BitKind
from tessellar.protocol.layout import Layout, grid_layout, sequence_layout

CLASS_COPIES = 32
PREFIX = 1 + CLASS_COPIES
SPARE_POSITIONS = 128  # rows that the official tables have beyond L
SPARE_STEPS = 100
FIRST_CLASS = 3  # rows of the official label table before the classes


class BARPass(NamedTuple):
    """What all blocks of one pass share: rotations at the inputs' own places and at the places that
    they predict, the condition [R, n, D] of each, and the cache.
    """

    own: Positions
    target: Positions
    condition: Tensor
    cache: KVCache | NoCache | PlacedCache
    slots: Slots


class BARAttention(nn.Module):
    """Attention with biases and RMS-normed queries and keys; half of the query heads stand at the
    place that is predicted.
    """

    def __init__(self, width: int, num_heads: int, dropout: float, implementation: str) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.implementation = implementation
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.q_norm = nn.RMSNorm(width // num_heads, eps=1e-6)
        self.k_norm = nn.RMSNorm(width // num_heads, eps=1e-6)

    def forward(self, x: Tensor, layer: int, shared: BARPass) -> Tensor:
        q, k, v = rearrange(
            self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads
        )
        here, there = self.q_norm(q).tensor_split([(self.num_heads + 1) // 2], dim=1)
        own, target = shared.own, shared.target
        q = torch.cat([rotate(here, own.cos, own.sin), rotate(there, target.cos, target.sin)], 1)
        k = rotate(self.k_norm(k), own.cos, own.sin)
        k, v = shared.cache.write(layer, shared.slots, k, v)
        slots = shared.slots
        out = attend(q.to(k.dtype), k, v, slots.mask, slots.is_causal, self.implementation)
        out = self.proj(rearrange(out, "b h n d -> b n (h d)"))
        return F.dropout(out, self.dropout, self.training)


class BARBlock(nn.Module):
    """x += gate Attention(mod(norm1 x)); x += gate SwiGLU(mod(norm2 x)): shift, scale, gate of each
    branch in turn.
    """

    def __init__(self, width: int, num_heads: int, dropout: float, implementation: str) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(width, eps=1e-6)
        self.norm2 = nn.RMSNorm(width, eps=1e-6)
        self.attention = BARAttention(width, num_heads, dropout, implementation)
        self.mlp = SwiGLU(width, int(8 * width / 3), bias=True)
        self.modulation = Modulation(width)
        self.dropout = nn.Dropout(dropout)
        for linear in (self.attention.qkv, self.attention.proj, *self.mlp.children()):
            tag(linear.weight, "hidden")  # type: ignore[arg-type]

    def forward(self, x: Tensor, layer: int, shared: BARPass) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(shared.condition)
        x = x + gate1 * self.attention(modulate(self.norm1(x), scale1, shift1), layer, shared)
        mixed = modulate(self.norm2(x), scale2, shift2)
        hidden = F.silu(self.mlp.w1(mixed)) * self.mlp.w3(mixed)
        return x + gate2 * self.mlp.w2(self.dropout(hidden))


class BAR(PrefixTransformer):
    """Class-conditional generator of one grid, or sequence, of tokens of bits.

    `random_order` is the share of training samples with an order of their own. `full_share` and
    `known_weight` are those of `draw_masks` and `masked_bit_loss`. With `sets`, numbers of bits of a
    token that follow one another in channel order, bits are not unmasked by confidence but set by
    set: then a token has a likelihood, and drafts can be judged. Raises UserError for other layouts,
    and for sets that do not make a token.
    """

    def __init__(
        self,
        layout: Layout,
        width: int = 768,
        depth: int = 24,
        num_heads: int = 12,
        patch: int = 1,
        head_width: int = 2048,
        head_depth: int = 3,
        num_classes: int = 1000,
        condition_dropout: float = 0.1,
        dropout: float = 0.1,
        random_order: float = 1.0,
        full_share: float = 0.0,
        known_weight: float = 0.1,
        sets: tuple[int, ...] | None = None,
        attention: str = "auto",
    ) -> None:
        super().__init__()
        kind = layout.segments[0].kind
        if len(layout.segments) > 1 or not isinstance(kind, BitKind):
            raise UserError(f"BAR predicts tokens of bits; this tokenizer gives {layout}")
        self.layout = layout
        grid = layout.grid
        self.entities = cells(layout, patch, patch) if grid else cells(layout, 1, patch**2)
        self.tokens_each = patch**2
        self.bits = kind.n * self.tokens_each
        self.sets = None if sets is None else tuple(sets)
        if self.sets is not None and (patch > 1 or sum(self.sets) != kind.n or min(self.sets) < 1):
            raise UserError(
                f"sets {list(self.sets)} must make the {kind.n} bits of a token, with patch 1"
            )
        self.random_order = random_order
        self.full_share = full_share
        self.known_weight = known_weight
        self.conditioning = ClassConditioning(num_classes, dropout=condition_dropout)
        self.num_heads = num_heads
        self.head_dim = width // num_heads
        positions = self.entities.count
        self.embedding = BitEmbedding(self.bits, width)
        self.start_token = nn.Parameter(torch.empty(1, 1, width))
        self.labels = nn.Embedding(FIRST_CLASS + num_classes + 1, width)
        self.position = nn.Parameter(torch.empty(1, positions + SPARE_POSITIONS, width))
        self.target_position = nn.Parameter(torch.empty(1, positions + SPARE_POSITIONS, width))
        self.step_embedding = nn.Parameter(torch.empty(1, positions + SPARE_STEPS, width))
        self.embedding_dropout = nn.Identity()
        self.layers = nn.ModuleList(
            BARBlock(width, num_heads, dropout, attention) for _ in range(depth)
        )
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.bit_head = MaskedBitHead(width, self.bits, head_width, depth=head_depth)
        of_cells = sequence_layout(positions, kind)
        if grid is not None:
            of_cells = grid_layout(grid[0] // patch, grid[1] // patch, kind)
        cos, sin = rope_table(of_cells, 0, self.head_dim, 10000.0)
        # The prefix is not turned: row L is the identity.
        self.register_buffer("rope_cos", F.pad(cos, (0, 0, 0, 1), value=1.0), persistent=False)
        self.register_buffer("rope_sin", F.pad(sin, (0, 0, 0, 1)), persistent=False)
        self.rope_cos: Tensor
        self.rope_sin: Tensor
        # Of each token: the cell in which it lies.
        self._cell = self.entities.inverse // self.tokens_each
        self.init_weights()

    def init_weights(self) -> None:
        """Truncated N(0, 0.02); every modulation starts at zero, so each block starts as the
        identity.
        """
        for name, parameter in self.named_parameters():
            if "modulation" in name or "norm" in name:
                continue
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.trunc_normal_(parameter, std=0.02)
        # Officially by names: all with "embed" or "ln" in them, so the head's output ("output_embed"),
        # its layers of the ratio ("t_embedder") and all modulations ("adaLN") too; the start token decays.
        for parameter in (
            self.position,
            self.target_position,
            self.step_embedding,
            self.labels.weight,
            self.embedding.table.weight,
            self.bit_head.embedding.table.weight,
            self.bit_head.ratio_in.weight,
            self.bit_head.ratio_out.weight,
            self.bit_head.output.weight,
        ):
            tag(parameter, "no_decay")
        for module in self.modules():
            if isinstance(module, Modulation):
                tag(module.linear.weight, "no_decay")

    def class_embedding(self, condition: Condition) -> Tensor:
        """[R, 1, D]; it is both the prefix and the condition of every block."""
        assert condition.ids is not None
        return self.labels(condition.ids + FIRST_CLASS)[:, None]

    def prefix(self, condition: Condition) -> Prefix:
        label = self.class_embedding(condition)
        start = self.start_token.expand(len(label), -1, -1)
        copies = label.expand(-1, CLASS_COPIES, -1)
        return Prefix(torch.cat([start, copies], 1) + self.position[:, :PREFIX])

    @property
    def prefix_length(self) -> int:
        return PREFIX

    def cells_of(self, entities: Entities) -> Tensor:
        """[B or 1, L] cell of each entity, in the order of generation."""
        order = entities.order.view(-1, entities.length)[:, :: self.tokens_each]
        return self._cell.to(order.device)[order]

    def free_order(self) -> Entities:
        return self.entities

    def _state(self, condition: Condition, guidance: Guidance, entities: Entities) -> State:
        """Every position of the prefix also says where the first token goes."""
        state = super()._state(condition, guidance, entities)
        assert state.prefix is not None
        prefix = state.prefix.embeddings
        first = self.cells_of(entities)[:, :1].expand(state.batch, -1)
        target = self.target_position[0, PREFIX + state.rows(first).to(prefix.device)]
        state.prefix = Prefix(prefix + target)
        return state

    def num_reads(self, state: State, first: Tensor, want: int) -> int:
        return want

    def embed(self, tokens: Tensor, index: Tensor, entities: Entities) -> Tensor:
        """The i-th entity's bits, where it stands, and where the next one goes (nowhere behind the
        last one).
        """
        last = entities.count - 1
        own, target = self.places_of(index, entities)
        place = own.clamp(max=last).to(tokens.device)
        base = self.entities.order.view(entities.count, self.tokens_each).to(tokens.device)
        inside = base[place].flatten(1)  # tokens of each cell
        read = take(tokens, inside.expand(len(tokens), -1))
        bits = rearrange(read, "b (n s) k -> b n (s k)", s=self.tokens_each)
        next_place = target.to(tokens.device)
        has_target = (next_place <= last)[..., None]
        aware = self.target_position[0, PREFIX + next_place.clamp(max=last)]
        aware = torch.where(has_target, aware, 0.0)
        return self.embedding(bits) + self.position[0, PREFIX + place] + aware

    def places_of(self, index: Tensor, entities: Entities) -> tuple[Tensor, Tensor]:
        """Cells [R or 1, n] of the inputs `index`, and of the entities behind them; L where there is
        none.
        """
        order = self.cells_of(entities)
        rows = max(len(order), len(index))
        padded = F.pad(order, (0, 1), value=entities.count).expand(rows, -1)
        index = index.expand(rows, -1).clamp(max=entities.count - 1)
        return padded.gather(1, index), padded.gather(1, index + 1)

    def shared(self, place: Tensor, state: State, slots: Slots) -> BARPass:
        assert state.cache is not None
        entities = state.entities
        order = self.cells_of(entities)
        behind = place - PREFIX
        if len(order) > 1:
            order = state.rows(order)
        rows = max(len(order), len(place))
        # The prefix has no place of its own: row L.
        table = F.pad(order, (1, 1), value=entities.count).expand(rows, -1)
        index = behind.expand(rows, -1).clamp(min=-1, max=entities.count - 1)
        own = table.gather(1, index + 1)
        # Every position of the prefix predicts the first token's place; behind the last is nothing.
        target = table.gather(1, index + 2)
        target = torch.where(target == entities.count, own, target)
        step = place.clamp(max=self.step_embedding.shape[1] - 1).to(self.step_embedding.device)
        condition = self.class_embedding(state.condition) + self.step_embedding[0, step]
        return BARPass(self._rotation(own), self._rotation(target), condition, state.cache, slots)

    def _rotation(self, cell: Tensor) -> Positions:
        cell = cell.to(self.rope_cos.device)
        return Positions(self.rope_cos[cell], self.rope_sin[cell])

    def head(self, state: State, hidden: Tensor, first: Tensor, want: int) -> Distribution:
        entity = first[:, None] + torch.arange(want, device=first.device)

        def model(bits: Tensor, masked: Tensor, ratio: Tensor) -> Tensor:
            given = (state.rows(x) for x in (bits, masked, ratio))
            return state.merge(self.bit_head(hidden, *given), entity)

        batch = len(entity)
        if self.sets is None:
            shape = (batch, want, self.bits)
            return MaskedBits(model, shape, self.tokens_each, hidden.device)

        def log_odds(known: Tensor, shown: Tensor) -> Tensor:
            masked = (~shown).expand_as(known)
            logits = model(known, masked, masked.float().mean(-1))
            return logits[..., 1] - logits[..., 0]

        starts = [sum(self.sets[:i]) for i in range(len(self.sets))]
        sets = tuple(
            tuple(range(start, start + size)) for start, size in zip(starts, self.sets, strict=True)
        )
        return Bits(log_odds, sets, (batch, want), hidden.device)

    def losses_of(
        self, scores: Distribution, targets: Tensor, weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Cross-entropy of bits in nats a bit, some of them hidden by chance."""
        assert scores.hidden is not None
        bits = rearrange(targets, "b (n s) k -> b n (s k)", s=self.tokens_each)
        drawn = draw_masks((bits.shape[0], bits.shape[1]), self.bits, self.full_share)
        masked, ratio = (t.to(bits.device) for t in drawn)
        logits = self.bit_head(scores.hidden, bits, masked, ratio)
        loss = masked_bit_loss(logits, bits, masked, self.known_weight, weight)
        return {"cross_entropy": loss}

    def training_order(self, batch: int) -> Entities:
        """Whole cells change places."""
        if not self.random_order:
            return self.entities
        base = self.entities.order.view(self.entities.count, self.tokens_each)
        drawn = base[torch.rand(batch, self.entities.count).argsort(1)].flatten(1)
        chosen = torch.rand(batch, 1) < self.random_order
        return Entities(torch.where(chosen, drawn, self.entities.order), self.entities.sizes)


# Published variants, with 1,000 classes: width, depth, heads; patch, bits a token.
# Counts are of parameters and of the head's 256 fixed frequencies.
def bar_b(layout: Layout, num_classes: int = 1000) -> BAR:
    """415,322,158 at 16 x 16 tokens of 16 bits."""
    return BAR(layout, 768, depth=24, num_heads=12, num_classes=num_classes, dropout=0.0)


def bar_b_2(layout: Layout, num_classes: int = 1000) -> BAR:
    """415,076,098 at 16 x 16 tokens of 16 bits, 2 x 2 of them a position."""
    return BAR(layout, 768, depth=24, num_heads=12, patch=2, num_classes=num_classes, dropout=0.0)


def bar_b_4(layout: Layout, num_classes: int = 1000) -> BAR:
    """415,752,223 at 16 x 16 tokens of 16 bits, 4 x 4 of them a position."""
    return BAR(layout, 768, depth=24, num_heads=12, patch=4, num_classes=num_classes, dropout=0.0)


def bar_l(layout: Layout, num_classes: int = 1000) -> BAR:
    """1,107,798,990 at 16 x 16 tokens of 16 bits."""
    return BAR(layout, 1280, depth=32, num_heads=16, num_classes=num_classes, dropout=0.2)


def bar_l_512(layout: Layout, num_classes: int = 1000) -> BAR:
    """1,110,727,993 at 32 x 32 tokens of 10 bits."""
    return bar_l(layout, num_classes)
