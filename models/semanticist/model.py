"""Semanticist's generator (epsilon-LlamaGen): Llama blocks without rotation over [class, slots], a
flow head for each slot (arXiv 2503.08685).

It models the first slots alone, 32 as published: the decoder of the tokenizer puts its nulls in the
places of the rest. Slots are generated as they are drawn, not standardised again. Different from
the official code: the head is evaluated once a solver's step (theirs twice, with equal inputs).
Inferred, as the spec says nothing: the initialisation of the blocks and of the position tables.

    input    class    s_1    s_2   ..  s_31      + learned positions, then an RMSNorm
    output   s_1      s_2    s_3   ..  s_32      from z_i = hidden state + learned positions
"""

import torch
from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.layers.precision import at_least_float32
from tessellar.models.parts.flow_tokens import velocity_error
from tessellar.models.parts.llama import ClassPrefix, LlamaGenerator
from tessellar.models.semanticist.head import FlowMLP, HeadConditioning
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import ImplicitFlow
from tessellar.protocol.entities import Entities, take, token_order
from tessellar.protocol.generator import Evaluation, Prefix, State
from tessellar.protocol.layout import Continuous, Layout


class SemanticistAR(LlamaGenerator):
    """Class-conditional next-token generator over the first `num_tokens` (None: all) of continuous
    tokens.

    `repeats` is how many noise levels each token is trained at in one update; `head_conditioning`
    says where the head reads what it is to predict (`head.py`). Raises UserError for
    other layouts, and for a number of tokens that cannot be decoded alone.
    """

    conditioning: ClassPrefix

    def __init__(
        self,
        layout: Layout,
        width: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        num_classes: int = 1000,
        num_tokens: int | None = None,
        head_width: int = 1536,
        head_depth: int = 12,
        head_conditioning: HeadConditioning = "concat",
        condition_dropout: float = 0.1,
        dropout: float = 0.1,
        repeats: int = 4,
        ffn_multiple_of: int = 256,
        norm_eps: float = 1e-5,
        attention: str = "auto",
    ) -> None:
        kind = layout.segments[0].kind
        if not isinstance(kind, Continuous):
            raise UserError(
                f"Semanticist's generator predicts continuous tokens; this tokenizer gives {layout}"
            )
        try:
            read = layout.first(num_tokens or layout.length)
        except ValueError as error:
            raise UserError(f"num_tokens is {num_tokens}; {error}") from error
        super().__init__(
            width,
            depth,
            num_heads=num_heads,
            ffn_multiple_of=ffn_multiple_of,
            norm_eps=norm_eps,
            dropout=dropout,
            attention=attention,
        )
        self.layout = read
        self.entities = token_order(self.layout)
        self.repeats = repeats
        self.channels = kind.dim
        # Of attention's output and of the feed-forward alone.
        self.embedding_dropout = nn.Identity()
        self.conditioning = ClassPrefix(num_classes, width, dropout=condition_dropout)
        self.input = nn.Linear(kind.dim, width)
        self.input_norm = nn.RMSNorm(width, eps=norm_eps)
        length = self.layout.length
        self.input_positions = nn.Parameter(torch.empty(1, 1 + length, width))
        self.z_positions = nn.Parameter(torch.empty(1, length, width))
        # No rotation: learned positions alone.
        half = self.head_dim // 2
        self.set_rotations(torch.ones(1, half), torch.zeros(1, half))
        self.init_weights()
        for table in (self.input_positions, self.z_positions):
            nn.init.normal_(table, std=0.02)
        self.flow_head = FlowMLP(
            kind.dim, width, width=head_width, depth=head_depth, conditioning=head_conditioning
        )

    def prefix(self, condition: Condition) -> Prefix:
        embeddings = self.conditioning(condition).embeddings + self.input_positions[:, :1]
        return Prefix(self.input_norm(embeddings))

    def embed(self, tokens: Tensor, index: Tensor, entities: Entities) -> Tensor:
        index = index.clamp(max=self.layout.length - 1).to(tokens.device)
        read = self.input(take(tokens, index).to(self.input.weight.dtype))
        return self.input_norm(read + self.input_positions[0, index + 1])

    def head_at(  # type: ignore[override]
        self, state: State, hidden: Tensor, rank: Tensor
    ) -> ImplicitFlow:
        """Guidance acts on the velocity."""
        place = rank.clamp(max=self.layout.length - 1).to(hidden.device)
        z = hidden + state.rows(self.z_positions[0, place])
        entity = state.entities.entity_at(rank)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            # Their t is the share of data and their velocity goes to it: 1 - t and -v of ours.
            noisy = state.rows(x.to(z.dtype))
            time = (1 - t).to(noisy.device, torch.float32).expand(noisy.shape[:2])
            return state.merge(-self.flow_head(noisy, time, z), entity)

        shape = (rank.shape[1], self.channels)
        return ImplicitFlow(velocity, shape, int(entity.min()), state.entities.count)

    def loss(
        self, tokens: Tensor, condition: Condition, weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The flow's squared error, at `repeats` times and noises of each token."""
        shape = (self.repeats, len(tokens), self.layout.length)
        t = torch.rand(shape, device=tokens.device)
        noise = torch.randn(*shape, self.channels, device=tokens.device)
        condition = self.drop_condition(condition)
        return {"flow": self.flow_loss(tokens, condition, t, noise, weight)}

    def flow_loss(
        self,
        tokens: Tensor,
        condition: Condition,
        t: Tensor,
        noise: Tensor,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Mean squared error of the velocity at times t [K, B, N] (1 is noise) with noise [K, B, N,
        C]; `weight` [B] weighs samples.
        """
        clean = at_least_float32(tokens[:, : self.layout.length])
        hidden = self.score(clean, condition).hidden
        assert hidden is not None
        z = hidden + self.z_positions

        def velocity(noisy: Tensor, t: Tensor) -> Tensor:
            # Their velocity goes to the data, and their t is the share of data.
            return -self.flow_head(noisy.to(z.dtype), 1 - t, z.expand(len(t), -1, -1, -1))

        return velocity_error(velocity, clean, t, noise, weight)

    def nats(self, tokens: Tensor, condition: Condition) -> Tensor | None:
        return None  # a flow head has no likelihood

    def evaluate(self, tokens: Tensor, condition: Condition) -> Evaluation:
        return Evaluation(self.loss(tokens, condition), None)


# Published variants: width, depth, heads; head of 12 blocks of 1,536.   parameters at 32 tokens of 16 channels
def _published(layout: Layout, sizes: tuple[int, int, int], num_classes: int) -> SemanticistAR:
    width, depth, num_heads = sizes
    tokens = min(32, layout.length)
    return SemanticistAR(layout, width, depth, num_heads, num_classes, num_tokens=tokens)


def semanticist_ar_b(layout: Layout, num_classes: int = 1000) -> SemanticistAR:
    """264,518,416 parameters; defined officially, not trained."""
    return _published(layout, (768, 12, 12), num_classes)


def semanticist_ar_l(layout: Layout, num_classes: int = 1000) -> SemanticistAR:
    """488,566,800 parameters."""
    return _published(layout, (1024, 24, 16), num_classes)


def semanticist_ar_xl(layout: Layout, num_classes: int = 1000) -> SemanticistAR:
    """912,381,200 parameters; defined officially, not trained."""
    return _published(layout, (1280, 36, 20), num_classes)
