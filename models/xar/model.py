"""xAR: next-X prediction of continuous tokens with flow matching and noisy context (arXiv
2502.20388, v2).

One transformer denoises entity n while it sees the entities before it: in training noisy ones, each
at its own noise level, in sampling clean ones at time 0, whose keys are cached. X is any partition:
cell, token, subsample, image or the scales of a pyramid. Different from the official code: any
grid, X, batch and class count; a condition is embedded once an entity instead of once a token; a
single entity is fully guided; clean context is trained with two streams.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tessellar.errors import UserError
from tessellar.layers.adaln import AdaLNBlock, Modulation, spread
from tessellar.layers.kv_cache import KVCache, NoCache, PlacedCache, Slots
from tessellar.layers.llama import LlamaAttention, Pass, Positions, SwiGLU, grid_angles
from tessellar.layers.precision import at_least_float32
from tessellar.layers.tags import tag
from tessellar.layers.time_embedding import TimeEmbedding
from tessellar.processes import flow
from tessellar.protocol.condition import ClassConditioning, Condition
from tessellar.protocol.distribution import ImplicitFlow
from tessellar.protocol.entities import Entities, parse_entities, take
from tessellar.protocol.generator import Generator, State
from tessellar.protocol.guidance import NO_GUIDANCE, Guidance
from tessellar.protocol.layout import Continuous, Layout

ContextNoise = Literal["random", "increasing", "decreasing", "clean"]


class GatedGELU(SwiGLU):
    """SwiGLU's layers with biases, gated by the exact GELU."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__(width, hidden, bias=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.dropout(F.gelu(self.w1(x)) * self.w3(x)))


def block(width: int, num_heads: int, hidden: int, dropout: float, attention: str) -> AdaLNBlock:
    """One block; the norms have no weights, the modulation no zero initialisation."""
    made = AdaLNBlock(
        LlamaAttention(width, num_heads, attention, bias=True, dropout=dropout),
        GatedGELU(width, hidden, dropout),
        nn.RMSNorm(width, eps=1e-6, elementwise_affine=False),
        Modulation(width, zero=False),
        dropout,
    )
    for linear in (
        m for part in (made.attention, made.mlp) for m in part.modules() if isinstance(m, nn.Linear)
    ):
        tag(linear.weight, "hidden")
    return made


class Stack(nn.Module):
    """Project, add learned positions, maybe normalise, run blocks, normalise: [R, n, in] to [R, n,
    D].

    `offset` is the number of its first block in the cache.
    """

    def __init__(
        self,
        blocks: Sequence[AdaLNBlock],
        in_dim: int,
        width: int,
        length: int,
        norm: bool,
        offset: int,
    ):
        super().__init__()
        self.offset = offset
        self.activation_checkpointing = False
        self.project = nn.Linear(in_dim, width)
        self.positions = nn.Parameter(torch.empty(length, width))
        self.norm_in = nn.RMSNorm(width, eps=1e-6) if norm else nn.Identity()
        self.blocks = nn.ModuleList(blocks)
        self.norm_out = nn.RMSNorm(width, eps=1e-6)

    def forward(
        self, x: Tensor, place: Tensor, condition: Tensor, sizes: Sequence[int], shared: Pass
    ) -> Tensor:
        x = self.norm_in(self.project(x) + self.positions[place])
        for number, layer in enumerate(self.blocks, self.offset):
            if self.activation_checkpointing and self.training:
                x = checkpoint(layer, x, condition, sizes, number, shared, use_reentrant=False)
            else:
                x = layer(x, condition, sizes, number, shared)
        return self.norm_out(x)


class XAR(Generator):
    """Next-X generator over continuous tokens, conditioned on `num_classes` classes.

    `entity` is X, as `parse_entities` reads it: cell:8x8, token, subsample:2, image, scale, ...
    `context_noise` is how noise levels are ordered over the entities in training. `depth` counts
    the blocks of each stack. `loss_over` weighs tokens or entities alike, which differs for scales.
    Raises UserError for a layout that is not continuous or that X does not fit.
    """

    def __init__(
        self,
        layout: Layout,
        entity: str = "cell:8x8",
        width: int = 768,
        depth: int = 8,
        num_heads: int = 12,
        num_classes: int = 1000,
        context_noise: ContextNoise = "random",
        condition_dropout: float = 0.1,
        dropout: float = 0.1,
        mlp_ratio: float = 4.0,
        decoder_depth: int | None = None,
        loss_over: Literal["tokens", "entities"] = "tokens",
        attention: str = "auto",
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.entities = parse_entities(entity, layout)
        self.width = width
        self.num_heads = num_heads
        self.num_classes = num_classes
        self.context_noise = context_noise
        self.loss_over = loss_over
        self.flex = attention == "flex"
        if self.flex and (dropout or context_noise == "clean"):
            raise UserError(
                "FlexAttention has no dropout and no clean context here; set dropout 0 and context noise"
            )
        self.channels = channels_of(layout)
        self.conditioning = ClassConditioning(num_classes, dropout=condition_dropout)
        # A gated MLP has three matrices: two thirds of the width keep the parameters of two.
        hidden = int(width * mlp_ratio * 2 / 3)
        total = depth + (depth if decoder_depth is None else decoder_depth)
        blocks = [
            block(width, num_heads, hidden, dropout, "auto" if self.flex else attention)
            for _ in range(total)
        ]
        self.encoder = Stack(blocks[:depth], self.channels, width, layout.length, True, 0)
        self.decoder = Stack(blocks[depth:], width, width, layout.length, False, depth)
        self.class_embedding = nn.Embedding(num_classes + 1, width)
        self.time_embedding = TimeEmbedding(width)
        self.output = nn.Linear(width, self.channels)
        angles = grid_angles(*coordinates(layout), width // num_heads)
        self.register_buffer("rope_cos", angles.cos(), persistent=False)
        self.register_buffer("rope_sin", angles.sin(), persistent=False)
        self.rope_cos: Tensor
        self.rope_sin: Tensor
        self.init_weights(zero_init)

    def init_weights(self, zero_init: bool) -> None:
        """Initialisation.

        | weight                            | distribution                                                      |
        |-----------------------------------|-------------------------------------------------------------------|
        | every Linear                      | Xavier uniform, bias 0                                            |
        | class embedding, position tables  | N(0, 0.02)                                                        |
        | modulations, output               | 0 with `zero_init` (AdaLN-Zero; not in the paper, helps short runs) |
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for table in (self.class_embedding.weight, self.encoder.positions, self.decoder.positions):
            nn.init.normal_(table, std=0.02)
        if zero_init:
            for linear in (
                self.output,
                *(m.linear for m in self.modules() if isinstance(m, Modulation)),
            ):
                nn.init.zeros_(linear.weight)

    @property
    def activation_checkpointing(self) -> bool:
        return self.encoder.activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, on: bool) -> None:
        self.encoder.activation_checkpointing = self.decoder.activation_checkpointing = on

    # training

    def loss(
        self, tokens: Tensor, condition: Condition, weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        t = self.draw_times(len(tokens), tokens.device)
        return {
            "flow": self.flow_loss(
                tokens, self.drop_condition(condition), t, torch.randn_like(tokens), weight
            )
        }

    def draw_times(self, batch: int, device: torch.device | str = "cpu") -> Tensor:
        """Flow times [B, entities], in the order that `context_noise` says."""
        # One level an entity: the context of entity n is as noisy as its own entities were drawn.
        t = flow.logit_normal(batch, self.entities.count, device=device)
        if self.context_noise in ("increasing", "decreasing"):
            t = t.sort(dim=1, descending=self.context_noise == "decreasing").values
        return t

    def flow_loss(
        self,
        tokens: Tensor,
        condition: Condition,
        t: Tensor,
        noise: Tensor,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Mean squared error of the velocity, of tokens [B, N, C] at times [B, entities].

        `noise` [B, N, C] is in the order of generation. `weight` [B] weighs samples.
        """
        x = self.in_order(tokens)
        noisy = flow.interpolate(x, noise, spread_times(t, self.entities))
        clean = x if self.context_noise == "clean" else None
        velocity = at_least_float32(self.velocity(noisy, t, condition, clean))
        error = (velocity - flow.target(x, noise)).square().mean(-1)
        if self.loss_over == "entities":
            sizes = torch.tensor(self.entities.sizes, device=error.device)
            error = error * (error.shape[1] / self.entities.count / sizes).repeat_interleave(sizes)
        if weight is None:
            return error.mean()
        return (error.mean(1) * weight).sum() / weight.sum().clamp(min=torch.finfo(error.dtype).eps)

    def in_order(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N, C] in the order of generation."""
        return take(tokens, self.entities.order.expand(len(tokens), -1))

    def velocity(
        self, noisy: Tensor, t: Tensor, condition: Condition, clean: Tensor | None = None
    ) -> Tensor:
        """Velocities [B, N, C] of noisy tokens in the order of generation at times [B, entities],
        in one pass.

        Entities see the noisy ones before them; with `clean` tokens they see those instead, as in
        sampling.
        """
        order = (
            self.entities.order.expand(1, -1)
            if self.entities.order.ndim == 1
            else self.entities.order
        )
        sizes = self.entities.sizes
        cache = NoCache(noisy.device, self.flex)
        if clean is None:
            slots = cache.reserve(self.entities.numbers[None])
            return self._run(
                noisy,
                order,
                t=t,
                sizes=sizes,
                condition=condition,
                cache=cache,
                slots=slots,
            )
        both = (
            torch.cat([clean, noisy], 1),
            torch.cat([order, order], 1),
            torch.cat([torch.zeros_like(t), t], 1),
        )
        mask = two_streams(self.entities).to(noisy.device)
        slots = Slots(torch.arange(2 * len(mask))[None], 0, len(mask), mask[None, None], False)
        return self._run(*both, sizes + sizes, condition, cache, slots)[:, noisy.shape[1] :]

    # sampling

    def start(
        self,
        condition: Condition,
        guidance: Guidance = NO_GUIDANCE,
        entities: Entities | None = None,
        window: int = 1,
    ) -> State:
        entities = entities or self.entities
        rows = self.stack_branches(condition, guidance)
        assert rows.ids is not None
        weight = self.output.weight
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        layers = len(self.encoder.blocks) + len(self.decoder.blocks)
        head_dim = self.width // self.num_heads
        capacity = entities.length + window * entities.sizes[-1]
        return State(
            condition=rows,
            guidance=guidance,
            entities=entities,
            fed=torch.zeros(condition.batch, dtype=torch.int64),
            cache=KVCache(
                layers,
                rows.batch,
                heads=self.num_heads,
                capacity=capacity,
                dim=head_dim,
                dtype=dtype,
                device=weight.device,
            ),
            input_ends=torch.cat([torch.zeros(1, dtype=torch.int64), entities.ends[:-1]]),
        )

    def predict(
        self, state: State, tokens: Tensor, count: int = 1, want: int | None = None
    ) -> ImplicitFlow:
        """Feed the clean entities before entity fed + count - 1 and return that one; it takes no
        others.
        """
        if (count if want is None else want) != 1:
            raise UserError("xAR draws one entity at a time; entities cannot be predicted together")
        read = (state.fed - 1).clamp(min=0)
        state.advance(count)
        target = state.fed - 1
        missing = (target - read).unique()
        if len(missing) > 1:
            raise ValueError(
                f"images stand at entities {target.tolist()} with unequal inputs; they must be in step"
            )
        if int(missing):
            self._feed(state, tokens, read, int(missing))
        return self._entity(state, target)

    def _feed(self, state: State, tokens: Tensor, first: Tensor, count: int) -> None:
        """Commit the keys of `count` clean entities at time 0."""
        assert state.cache is not None and not isinstance(state.cache, PlacedCache)
        x = state.entities.get(tokens, first, count)
        place = state.entities.indices(first, count)
        slots = state.cache.reserve(_shared(state.entities.entity_of(first, count), state))
        t = torch.zeros(1, 1, device=x.device)
        condition = state.condition
        self._run(
            state.rows(x),
            _shared(place, state),
            t=t,
            sizes=(x.shape[1],),
            condition=condition,
            cache=state.cache,
            slots=slots,
        )
        state.cache.commit()

    def _entity(self, state: State, entity: Tensor) -> ImplicitFlow:
        """The law of one entity of each image: noisy calls that see the cache and leave no trace in
        it.
        """
        assert state.cache is not None and not isinstance(state.cache, PlacedCache)
        place = _shared(state.entities.indices(entity, 1), state)
        number = state.entities.entity_of(entity, 1)
        slots = state.cache.reserve(_shared(number, state))
        length = number.shape[1]
        cache = state.cache

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            rows = state.rows(x.float())
            time = t.to(x.device, torch.float32).expand(1, 1)
            v = self._run(
                rows,
                place,
                t=time,
                sizes=(length,),
                condition=state.condition,
                cache=cache,
                slots=slots,
            )
            return state.merge(v.float(), number)

        return ImplicitFlow(
            velocity, (length, self.channels), int(entity.min()), state.entities.count
        )

    def _run(
        self,
        x: Tensor,
        place: Tensor,
        t: Tensor,
        sizes: Sequence[int],
        condition: Condition,
        cache: KVCache | NoCache,
        slots: Slots,
    ) -> Tensor:
        """Velocities [R, n, C] of x [R, n, C] at places [R or 1, n]; times [R or 1, E] of E
        entities of `sizes`.
        """
        assert condition.ids is not None
        vectors = self.class_embedding(condition.ids)[:, None] + self.time_embedding(time_index(t))
        place = place.to(x.device)
        shared = Pass(Positions(self.rope_cos[place], self.rope_sin[place]), cache, slots)
        dtype = self.output.weight.dtype
        hidden = self.encoder(x.to(dtype), place, vectors.to(dtype), sizes, shared)
        return self.output(self.decoder(hidden, place, vectors.to(dtype), sizes, shared))


def time_index(t: Tensor) -> Tensor:
    """What the network reads of a time: 1000 t in float32, truncated (not rounded), as the official
    code does.
    """
    return (t.float() * 1000).floor()


def spread_times(t: Tensor, entities: Entities) -> Tensor:
    """Times [B, entities] to [B, N, 1] of their tokens, in the order of generation."""
    return spread(t[..., None], entities.sizes)


def two_streams(entities: Entities) -> Tensor:
    """[2 N, 2 N] visibility for clean tokens, then noisy ones: all see clean entities before, and
    their own alone.
    """
    #                 clean keys        noisy keys
    #   clean queries   before, own       none
    #   noisy queries   before            own
    before = entities.numbers[None, :] < entities.numbers[:, None]
    own = entities.numbers[None, :] == entities.numbers[:, None]
    nothing = torch.zeros_like(own)
    return torch.cat([torch.cat([before | own, nothing], 1), torch.cat([before, own], 1)])


def channels_of(layout: Layout) -> int:
    """Channels of a continuous layout; raises UserError for any other."""
    kind = layout.segments[0].kind
    if not layout.is_continuous or not isinstance(kind, Continuous):
        raise UserError(f"xAR predicts continuous tokens; this tokenizer gives {layout}")
    return kind.dim


def coordinates(layout: Layout) -> tuple[Tensor, Tensor]:
    """Rows and columns [N] of the layout's tokens on its last (finest) grid.

    The token of a coarser grid sits at the middle of what it covers; a sequence runs along the
    rows.
    """
    finest = layout.segments[-1].shape
    rows = []
    columns = []
    for segment in layout.segments:
        is_grid = len(segment.shape) == 2
        h, w = segment.shape if is_grid else (segment.length, 1)
        fine_h, fine_w = finest if is_grid and len(finest) == 2 else (h, w)
        rows.append(((torch.arange(h) + 0.5) * fine_h / h - 0.5).repeat_interleave(w))
        columns.append(((torch.arange(w) + 0.5) * fine_w / w - 0.5).repeat(h))
    return torch.cat(rows), torch.cat(columns)


def _shared(index: Tensor, state: State) -> Tensor:
    """[B, n] per image to [R, n] per row, or [1, n] where all images agree."""
    return index[:1] if bool((index == index[:1]).all()) else state.rows(index)


def xar_b(layout: Layout, entity: str = "cell:8x8", num_classes: int = 1000) -> XAR:
    """172,638,224 parameters over 16 x 16 latents of 16 channels."""
    return XAR(layout, entity, 768, 8, 12, num_classes)


def xar_l(layout: Layout, entity: str = "cell:8x8", num_classes: int = 1000) -> XAR:
    """608,397,968 parameters over 16 x 16 latents of 16 channels."""
    return XAR(layout, entity, 1024, 16, 16, num_classes)


def xar_h(layout: Layout, entity: str = "cell:8x8", num_classes: int = 1000) -> XAR:
    """1,186,024,096 parameters over 16 x 16 latents of 16 channels."""
    return XAR(layout, entity, 1280, 20, 16, num_classes)
