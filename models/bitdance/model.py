"""BitDance: next-token and next-patch generation of tokens of bits, drawn by a binary diffusion head
(arXiv 2602.14041).

A Llama reads class tokens and the bits so far; its states are what the head (head.py) denoises P
tokens under, together, and the signs are the tokens. P = 1, 4 or 16 tokens are a patch of p x p:

    places     class 0 .. 62 | class 63, queries 1 .. P - 1 | patch 0 | ... | patch M - 2
    block      0 .. 62       | 63                           | 64      | ... | 62 + M       sees blocks up to its own
    predicts   -             | patch 0                      | patch 1 | ... | patch M - 1

Cells turn by column and row, classes and queries do not. As published, where guidance is 1 at the
first patch its null rows go on from a first patch of their own (`share_first` gives them the
image's). With `caption_dim` it is the text-to-image model's form on a caption's features in place of
its language model: 1-D rotations, fixed positions added to tokens and states, a bounded head.
"""

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.layers.llama import PackedSwiGLU, frequencies, grid_angles
from tessellar.layers.tags import tag
from tessellar.models.bitdance.head import LEAST, BinaryHead, sincos_table
from tessellar.models.parts.llama import CaptionPrefix, LlamaGenerator
from tessellar.processes.flow import Times
from tessellar.protocol.condition import ClassConditioning, Condition
from tessellar.protocol.distribution import BinaryFlow, Draws, Model
from tessellar.protocol.entities import Entities, cells
from tessellar.protocol.generator import Evaluation, Generator, Prefix, State
from tessellar.protocol.guidance import NO_GUIDANCE, Guidance
from tessellar.protocol.layout import Bits, Layout
from tessellar.protocol.noise import Noise

TIMES = Times(mean=0.8, std=0.8)  # of our noise time; the official 1 - t has mean -0.8


class ClassTokens(ClassConditioning, nn.Module):
    """`length` positions of each label; the last row stands for no class."""

    def __init__(self, num_classes: int, length: int, width: int, dropout: float) -> None:
        super().__init__(num_classes, dropout=dropout)
        self.length = length
        self.embedding = nn.Embedding(num_classes + 1, length * width)

    def forward(self, condition: Condition) -> Prefix:
        assert condition.ids is not None
        return Prefix(self.embedding(condition.ids).unflatten(-1, (self.length, -1)))


class NullFirst:
    """The first patch of the null rows of B images, [B, P, z], once one was drawn."""

    def __init__(self, tokens: Tensor | None = None) -> None:
        self.tokens = tokens

    def rollback(self, fed: Tensor) -> None:
        """It depends on no patch: what was drawn stays, or is drawn anew."""

    def select(self, index: Tensor) -> "NullFirst":
        return NullFirst(None if self.tokens is None else self.tokens[index.to(self.tokens.device)])


@dataclass(frozen=True, kw_only=True)
class FirstPatch(BinaryFlow):
    """A first patch without guidance: behind it, that of the null rows is drawn and kept."""

    null: BinaryFlow
    kept: NullFirst

    def sample(self, settings: Draws, noise: Noise) -> Tensor:
        tokens = super().sample(settings, noise)
        self.kept.tokens = self.null.sample(settings, noise)
        return tokens


class BitDance(LlamaGenerator):
    """Generator of one grid of bits, a patch of `patch` x `patch` tokens at a time.

    Give `num_classes` for `class_tokens` positions of a class, or `caption_dim` (and
    `caption_length`) for caption features. `head_groups` modulations are shared by runs of the
    head's blocks, whose attention has heads of `head_dim` channels. Training reads each bit flipped
    with a probability that is uniform up to `flip`, and draws `repeats` noise levels for each patch.
    Raises UserError for other layouts and for sizes that do not fit each other.
    """

    conditioning: ClassTokens | CaptionPrefix

    def __init__(
        self,
        layout: Layout,
        width: int = 768,
        depth: int = 24,
        num_heads: int = 12,
        head_width: int = 768,
        head_depth: int = 6,
        head_groups: int = 2,
        patch: int = 1,
        num_classes: int | None = 1000,
        class_tokens: int = 64,
        caption_dim: int | None = None,
        caption_length: int = 120,
        condition_dropout: float = 0.1,
        flip: float = 0.1,
        repeats: int = 4,
        times: Times = TIMES,
        head_dim: int = 64,
        share_first: bool = False,
        norm_eps: float = 1e-6,
        attention: str = "auto",
    ) -> None:
        super().__init__(
            width, depth, num_heads, norm_eps=norm_eps, dropout=0.0, attention=attention
        )
        kind = layout.segments[0].kind
        if layout.grid is None or not isinstance(kind, Bits):
            raise UserError(f"BitDance generates one grid of bits; this tokenizer gives {layout}")
        if caption_dim is not None:
            num_classes = None
        if num_classes is None and caption_dim is None:
            raise UserError("BitDance needs either num_classes or caption_dim")
        if self.head_dim % 4:
            raise UserError(
                f"heads of {self.head_dim} channels cannot turn by row and column: give a width of "
                f"{num_heads} heads times a multiple of 4, not {width}"
            )
        if class_tokens < 1 or repeats < 1:
            raise UserError(f"class_tokens {class_tokens} and repeats {repeats} must be at least 1")
        if not 0 <= flip <= 1:
            raise UserError(f"flip is {flip}; a probability is in [0, 1]")
        self.layout = layout
        self.entities = cells(layout, patch, patch)
        self.area = patch**2
        self.bits = kind.n
        self.flip = flip
        self.repeats = repeats
        self.times = times
        self.share_first = share_first
        self.is_of_text = caption_dim is not None
        if caption_dim is not None:
            self.conditioning = CaptionPrefix(
                caption_dim, caption_length, width=width, dropout=condition_dropout
            )
        else:
            assert num_classes is not None
            self.conditioning = ClassTokens(num_classes, class_tokens, width, condition_dropout)
        self.query = nn.Parameter(torch.empty(1, self.area - 1, width)) if patch > 1 else None
        self.token_input = PackedSwiGLU(self.bits, int(1.5 * width), width)
        self.input_norm = nn.RMSNorm(width, eps=norm_eps)
        self.head_positions = None if self.is_of_text else nn.Embedding(layout.length, width)
        self.init_weights()
        if self.query is not None:
            nn.init.normal_(self.query, std=0.02)
            tag(self.query, "no_decay")
        # A head of its own table of initial values.
        self.denoiser = BinaryHead(
            self.bits,
            width,
            head_width,
            head_depth,
            groups=head_groups,
            tokens=self.area,
            head_dim=head_dim,
            bounded=self.is_of_text,
        )
        with torch.device("cpu"):  # also where the model is built on the meta device
            self._set_positions(width)
        for parameter in self.token_input.parameters():
            tag(parameter, "no_decay")
        if isinstance(self.conditioning, ClassTokens):
            tag(self.conditioning.embedding.weight, "no_decay")

    def _set_positions(self, width: int) -> None:
        """Rotations of the sequence, in the order of generation; of text, the fixed positions too."""
        place = self.entities.order
        side = self.layout.segments[0].shape[1]
        rows = place // side
        columns = place % side
        if self.is_of_text:
            places = torch.arange(self.prefix_length + self.layout.length)
            angles = places[:, None] * frequencies(self.head_dim // 2)
            self.set_rotations(angles.cos(), angles.sin())
        else:
            # Grid units: the middle of a cell, counted from 1.
            angles = grid_angles(columns + 1.5, rows + 1.5, self.head_dim)
            angles = torch.cat([torch.zeros(self.prefix_length, self.head_dim // 2), angles])
            self.set_rotations(angles.cos(), angles.sin())
        table = sincos_table(rows, columns, width) if self.is_of_text else None
        self.register_buffer("fixed_positions", table, persistent=False)
        self.fixed_positions: Tensor | None

    # the sequence

    @property
    def prefix_length(self) -> int:
        """Positions of the condition, and the queries of the first patch."""
        return self.conditioning.length + self.area - 1

    def prefix(self, condition: Condition) -> Prefix:
        embeddings, valid = self.conditioning(condition)
        if self.query is not None:
            query = repeat(self.query, "one q d -> (b one) q d", b=len(embeddings))
            embeddings = torch.cat([embeddings, query.to(embeddings.dtype)], dim=1)
        if valid is not None:
            valid = nn.functional.pad(valid, (0, self.area - 1), value=True)
        return Prefix(self.input_norm(embeddings), valid)

    def embed(self, tokens: Tensor, index: Tensor, entities: Entities) -> Tensor:
        """Input i is the i-th token generated: its bits as -1 and 1."""
        index = index.clamp(max=entities.length - 1).to(tokens.device)
        place = entities.order.to(tokens.device)[index].expand(len(tokens), -1)
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        x = self.token_input((2 * tokens[rows, place] - 1).to(self.input_norm.weight.dtype))
        if self.fixed_positions is not None:
            x = x + self.fixed_positions[index].to(x.dtype)
        return self.input_norm(x)

    def input_ends(self, prefix_length: int, entities: Entities) -> Tensor:
        """Each patch has the places of the patch before it; the first, the last of the condition and
        the queries.
        """
        if set(entities.sizes) != {self.area} or entities.order.ndim > 1:
            raise UserError(
                f"BitDance draws its own patches of {self.area} tokens, all images in one order"
            )
        return prefix_length - self.area + torch.arange(entities.count + 1) * self.area

    def block(self, place: Tensor) -> Tensor:
        """Causal up to the first patch's places, then one number a patch."""
        first = self.conditioning.length - 1
        patch = (place - first).div(self.area, rounding_mode="floor")
        return torch.where(place < first, place, first + patch)

    def num_reads(self, state: State, first: Tensor, want: int) -> int:
        return want * self.area

    def _embed(self, state: State, tokens: Tensor, index: Tensor) -> Tensor:
        rows = state.rows(tokens)
        if isinstance(state.part, NullFirst) and state.part.tokens is not None:
            rows = rows.clone()
            rows[state.batch :, state.entities.order[: self.area].to(rows.device)] = (
                state.part.tokens
            )
        return self.embed(rows, index, state.entities)

    # what is predicted

    def start(
        self,
        condition: Condition,
        guidance: Guidance = NO_GUIDANCE,
        entities: Entities | None = None,
        window: int = 1,
    ) -> State:
        state = super().start(condition, guidance, entities, window)
        if not self.share_first and guidance.schedule is not None:
            if guidance.blend is not None:
                raise UserError(
                    "BitDance draws its first patch of unguided rows by itself: classes cannot be blended"
                )
            first = guidance.schedule(torch.zeros(1, 1, dtype=torch.int64), state.entities)
            state.part = NullFirst() if bool((first == 1).all()) else None
        return state

    def head(self, state: State, hidden: Tensor, first: Tensor, want: int) -> BinaryFlow:
        """Guidance acts on the velocity."""
        rank = state.entities.steps(first, want)
        entity = state.entities.entity_at(rank)
        z = self.placed(hidden, state.rows(rank))

        def flow(model: Model) -> BinaryFlow:
            shape = (rank.shape[1], self.bits)
            return BinaryFlow(model, shape, int(entity.min()), state.entities.count)

        if isinstance(state.part, NullFirst) and int(entity.max()) == 0:
            conditional, null = z.chunk(2)
            own = flow(lambda x, t: self.velocity(x, t, null))
            found = flow(lambda x, t: self.velocity(x, t, conditional))
            return FirstPatch(
                found.model, found.shape, count=found.count, null=own, kept=state.part
            )
        return flow(lambda x, t: state.merge(self.velocity(state.rows(x), t, z), entity))

    def placed(self, hidden: Tensor, rank: Tensor) -> Tensor:
        """States [R, n, D] with the positions of their tokens, by generation ranks [R or 1, n]."""
        rank = rank.clamp(max=self.layout.length - 1).to(hidden.device)
        if self.fixed_positions is not None:
            return hidden + self.fixed_positions[rank].to(hidden.dtype)
        assert self.head_positions is not None
        return hidden + self.head_positions(rank)

    def velocity(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """Velocities [R, n, z], noise minus data, of noisy bits [R, n, z] at the scalar time t (1 is
        noise), from states [R, n, D] of whole patches.
        """
        t = t.to(x.device, torch.float64)
        noisy = rearrange(x.float(), "r (m p) c -> (r m) p c", p=self.area)
        states = rearrange(z, "r (m p) d -> (r m) p d", p=self.area)
        time = (1 - t).float().expand(len(noisy))
        clean = self.denoiser(noisy, time, states)
        v = (noisy - clean) / t.float().clamp(min=LEAST)
        return rearrange(v, "(r m) p c -> r (m p) c", r=len(x))

    # training

    def loss(
        self, tokens: Tensor, condition: Condition, weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        rows = self.repeats * len(tokens) * self.entities.count
        t = 1 - self.times.draw(rows, tokens.device)
        noise = torch.randn(rows, self.area, self.bits, device=tokens.device)
        read = tokens
        if self.training and self.flip:
            draws = torch.rand(2, *tokens.shape, device=tokens.device)
            read = flipped(tokens, self.flip, draws[0], draws[1])
        condition = self.drop_condition(condition)
        states = self.states(read, condition)
        return {"flow": self.flow_loss(states, self.patches(tokens), t, noise, weight)}

    def states(self, tokens: Tensor, condition: Condition) -> Tensor:
        """What the head reads of every patch, [B M, P, D], teacher-forced."""
        hidden = self.score(tokens, condition).hidden
        assert hidden is not None
        z = self.placed(hidden, torch.arange(self.layout.length)[None])
        return rearrange(z, "b (m p) d -> (b m) p d", p=self.area)

    def patches(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N, z] as the patches of signs [B M, P, z] that the head learns."""
        inside = tokens[:, self.entities.order.to(tokens.device)]
        return rearrange(2.0 * inside - 1, "b (m p) c -> (b m) p c", p=self.area)

    def flow_loss(
        self,
        states: Tensor,
        clean: Tensor,
        t: Tensor,
        noise: Tensor,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Mean squared error of the velocity; the rows are repeated as a whole, `repeats` times, and t
        [K B M] (0 is noise) and noise [K B M, P, z] are indexed by repetition, sample, patch.
        """
        repeats = len(t) // len(clean)
        z = states.repeat(repeats, 1, 1)
        losses = self.denoiser.row_losses(clean.repeat(repeats, 1, 1), t, noise, z).mean(1)
        if weight is None:
            return losses.mean()
        share = weight.repeat_interleave(self.entities.count).repeat(repeats)
        return (losses * share).sum() / share.sum().clamp(min=torch.finfo(losses.dtype).eps)

    def nats(self, tokens: Tensor, condition: Condition) -> None:
        """None: a diffusion head has no likelihood."""

    def evaluate(self, tokens: Tensor, condition: Condition) -> Evaluation:
        return Generator.evaluate(self, tokens, condition)


def flipped(tokens: Tensor, most: float, r1: Tensor, r2: Tensor) -> Tensor:
    """Bits, each flipped where r1 < most * r2, of uniform draws of its own: at a rate of most / 2."""
    return torch.where(r1 < most * r2, 1 - tokens, tokens)


# Published variants: width, depth, heads; head width, depth, modulations; side of a patch.      parameters on 16 x 16
# tokens of 32 bits, 1,000 classes
def bitdance_b_1x(layout: Layout, num_classes: int = 1000, patch: int = 1) -> BitDance:
    """242,373,152 parameters."""
    return BitDance(
        layout,
        768,
        depth=24,
        num_heads=12,
        head_width=768,
        head_depth=6,
        head_groups=2,
        patch=patch,
        num_classes=num_classes,
    )


def bitdance_b_4x(layout: Layout, num_classes: int = 1000) -> BitDance:
    """260,102,432 parameters; 2 x 2 tokens at once."""
    return bitdance_b_1x(layout, num_classes, patch=2)


def bitdance_b_16x(layout: Layout, num_classes: int = 1000) -> BitDance:
    """260,111,648 parameters; 4 x 4 tokens at once."""
    return bitdance_b_1x(layout, num_classes, patch=4)


def bitdance_l_1x(layout: Layout, num_classes: int = 1000) -> BitDance:
    """527,271,968 parameters."""
    return BitDance(
        layout,
        1024,
        depth=32,
        num_heads=16,
        head_width=1024,
        head_depth=8,
        head_groups=2,
        num_classes=num_classes,
        flip=0.05,
    )


def bitdance_h_1x(layout: Layout, num_classes: int = 1000) -> BitDance:
    """1,007,960,352 parameters."""
    return BitDance(
        layout,
        1280,
        depth=40,
        num_heads=20,
        head_width=1280,
        head_depth=12,
        head_groups=3,
        num_classes=num_classes,
        flip=0.05,
    )
