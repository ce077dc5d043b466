"""Ming-UniVision's generation of images (arXiv 2510.06590) on a Llama behind a class or a caption: it
reads semantic features of the tokens so far and predicts the next latent with a flow head.

    reads      prefix         f_1           f_2           ..   f_k of t_1 .. t_k: causal semantic decoder
    predicts   t_1            t_2           t_3           ..   latents, normalised

The tokenizer's semantic decoder runs inside the loop, its cache in the state (`protocol/in_loop.py`).
Different from the official model: no mixture of experts and no chat around the image; guidance has
two branches, as there is no input image; positions are a rotation over the sequence.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.layers.llama import frequencies
from tessellar.layers.precision import at_least_float32
from tessellar.models.mingtok.head import ConditionHead, FlowHead
from tessellar.models.parts.flow_tokens import velocity_error
from tessellar.models.parts.llama import SIZE_L, CaptionPrefix, ClassPrefix, LlamaGenerator
from tessellar.models.parts.loop_reader import LoopReader
from tessellar.protocol.condition import Condition
from tessellar.protocol.distribution import ImplicitFlow
from tessellar.protocol.entities import token_order
from tessellar.protocol.generator import Evaluation, State
from tessellar.protocol.layout import Continuous, Layout


class MingTokAR(LoopReader, LlamaGenerator):
    """Next-latent generator over a grid or sequence of continuous tokens that its tokenizer expands
    into features of `feature_dim` channels.

    Give `num_classes`, or `caption_dim` channels of captions of `caption_length`. `repeats` is how
    many noise levels each token is trained at in one update. Its tokenizer must be bound
    (`ImageGenerator` does it). Raises UserError for other layouts, and for a tokenizer that makes no
    features.
    """

    reads: ClassVar[str] = "the features of a tokenizer that is decoded in the loop"
    conditioning: ClassPrefix | CaptionPrefix

    def __init__(
        self,
        layout: Layout,
        width: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        num_classes: int | None = None,
        caption_dim: int | None = None,
        caption_length: int = 120,
        feature_dim: int = 1024,
        head_width: int = 1536,
        head_depth: int = 12,
        condition_dropout: float = 0.1,
        dropout: float = 0.0,
        repeats: int = 4,
        ffn_multiple_of: int = 256,
        num_kv_heads: int | None = None,
        norm_eps: float = 1e-5,
        rope_base: float = 10000.0,
        attention: str = "auto",
    ) -> None:
        kind = layout.segments[0].kind
        if not isinstance(kind, Continuous):
            raise UserError(f"MingTokAR predicts continuous tokens; this tokenizer gives {layout}")
        if (num_classes is None) == (caption_dim is None):
            raise UserError("MingTokAR needs either num_classes or caption_dim")
        super().__init__(
            width,
            depth,
            num_heads=num_heads,
            ffn_multiple_of=ffn_multiple_of,
            norm_eps=norm_eps,
            dropout=dropout,
            attention=attention,
            num_kv_heads=num_kv_heads,
        )
        self.layout = layout
        self.entities = token_order(layout)
        self.channels = kind.dim
        self.feature_dim = feature_dim
        self.repeats = repeats
        if num_classes is not None:
            self.conditioning = ClassPrefix(num_classes, width, dropout=condition_dropout)
        else:
            assert caption_dim is not None
            self.conditioning = CaptionPrefix(
                caption_dim, caption_length, width=width, dropout=condition_dropout
            )
        # Official names: linear_proj, vis_head, diffloss.
        self.project = nn.Sequential(
            nn.Linear(feature_dim, width), nn.GELU(), nn.Linear(width, width)
        )
        self.to_condition = ConditionHead(width, head_width)
        places = self.prefix_length + layout.length
        angles = torch.arange(places)[:, None] * frequencies(self.head_dim // 2, rope_base)
        self.set_rotations(angles.cos(), angles.sin())
        self.init_weights()
        self.flow_head = FlowHead(kind.dim, head_width, width=head_width, depth=head_depth)

    @property
    def input_dim(self) -> int:
        return self.feature_dim

    def ranks(self, index: Tensor) -> Tensor:
        return index + 1

    def embed_inputs(self, inputs: Tensor, index: Tensor) -> Tensor:
        return self.project(inputs.to(self.to_condition.linear.weight.dtype))

    def head_at(  # type: ignore[override]
        self, state: State, hidden: Tensor, rank: Tensor
    ) -> ImplicitFlow:
        """Guidance acts on the velocity."""
        z = self.to_condition(hidden)
        entity = state.entities.entity_at(rank)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            # Their velocity goes to the data.
            noisy = state.rows(x.to(z.dtype))
            time = t.to(noisy.device, torch.float32).expand(noisy.shape[:2])
            return state.merge(-self.flow_head(noisy, time, z), entity)

        shape = (rank.shape[1], self.channels)
        return ImplicitFlow(velocity, shape, int(entity.min()), state.entities.count)

    def loss(
        self, tokens: Tensor, condition: Condition, weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The flow's squared error, at `repeats` uniform times and noises of each token."""
        shape = (self.repeats, *tokens.shape[:2])
        t = torch.rand(shape, device=tokens.device)
        noise = torch.randn(*shape, self.channels, device=tokens.device)
        return {"flow": self.flow_loss(tokens, self.drop_condition(condition), t, noise, weight)}

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
        clean = at_least_float32(tokens)
        hidden = self.score(clean, condition).hidden
        assert hidden is not None
        z = self.to_condition(hidden)

        def velocity(noisy: Tensor, t: Tensor) -> Tensor:
            return -self.flow_head(noisy.to(z.dtype), t, z.expand(len(t), -1, -1, -1))

        return velocity_error(velocity, clean, t, noise, weight)

    def nats(self, tokens: Tensor, condition: Condition) -> Tensor | None:
        return None  # a flow head has no likelihood

    def evaluate(self, tokens: Tensor, condition: Condition) -> Evaluation:
        return Evaluation(self.loss(tokens, condition), None)


def mingtok_ar_l(layout: Layout, num_classes: int = 1000) -> MingTokAR:
    """634,607,136 parameters on `mingtok_512`: LlamaGen-L's Llama with a head of 12 x 1,536 (ours: the
    published model is a chat model of 16B).
    """
    return MingTokAR(layout, **SIZE_L, num_classes=num_classes)
