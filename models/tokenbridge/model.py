"""TokenBridge: masked autoregression over tokens of quantised channels (arXiv 2503.16430).

MAR's masked backbone (`parts/masked_backbone.py`) reads the latents that the known tokens stand for
and gives a vector z for each place; a small transformer over the channels (`head.py`) predicts the
indices of a token given its z, with cross-entropy. Order, sets and masks are MAR's
(`parts/random_sets.py`); guidance acts on z. Different from the official code: it knows no grid,
for the tokenizer says what tokens stand for, and the head has a cache in sampling. Parallel heads,
groups of channels and any order of channels are the paper's ablations, which its code lacks; tokens
revealed by confidence are the algorithm `MaskGIT`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tessellar.errors import UserError
from tessellar.layers.precision import at_least_float32
from tessellar.models.parts.masked_backbone import MaskedBackbone
from tessellar.models.parts.random_sets import RandomSets
from tessellar.models.tokenbridge.head import (
    ChannelClasses,
    ChannelHead,
    ChannelLogits,
    FirstInput,
)
from tessellar.models.tokenbridge.order import KL16_ORDER
from tessellar.protocol.condition import ClassConditioning, Condition
from tessellar.protocol.entities import take
from tessellar.protocol.generator import State
from tessellar.protocol.layout import Factorized, Layout
from tessellar.protocol.tokenizer import Tokenizer


class TokenBridge(RandomSets):
    """Class-conditional generator over one grid of tokens of several indices each.

    `channel_order` is the order in which channels are predicted (default: their own), `group` how
    many are one class, `parallel` predicts all at once. `first_input` is that of `ChannelHead`.
    Width, depth and heads of the decoder, dropout of attention weights, and dropout of the head are
    those of the encoder and of the projections unless given. Its tokenizer must be bound
    (`ImageGenerator` does it). Raises UserError for other layouts and tokenizers.
    """

    def __init__(
        self,
        layout: Layout,
        width: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_width: int | None = None,
        decoder_depth: int | None = None,
        decoder_heads: int | None = None,
        head_width: int = 768,
        head_depth: int = 4,
        head_heads: int = 8,
        num_classes: int = 1000,
        buffer: int = 64,
        condition_dropout: float = 0.1,
        dropout: float = 0.1,
        attention_dropout: float | None = None,
        head_dropout: float | None = None,
        mlp_ratio: float = 4.0,
        least_masked: float = 0.7,
        steps: int = 64,
        channel_order: tuple[int, ...] | None = None,
        group: int = 1,
        parallel: bool = False,
        first_input: FirstInput = "train_consistent",
    ) -> None:
        kind = layout.segments[0].kind
        if layout.grid is None or not isinstance(kind, Factorized):
            raise UserError(
                f"TokenBridge generates one grid of tokens of several indices; this tokenizer gives {layout}"
            )
        super().__init__(layout, patch=1, steps=steps, least_masked=least_masked)
        count = len(kind.vocabs)
        order = tuple(range(count)) if channel_order is None else tuple(channel_order)
        self.channels = ChannelClasses(kind.vocabs, order, group)
        self.conditioning = ClassConditioning(num_classes, dropout=condition_dropout)
        self.backbone = MaskedBackbone(
            count,
            self.length,
            width=width,
            depth=depth,
            num_heads=num_heads,
            decoder_width=decoder_width,
            decoder_depth=decoder_depth,
            decoder_heads=decoder_heads,
            num_classes=num_classes,
            buffer=buffer,
            dropout=dropout,
            attention_dropout=attention_dropout,
            mlp_ratio=mlp_ratio,
        )
        self.head = ChannelHead(
            self.backbone.out_dim,
            self.channels.sizes,
            width=head_width,
            depth=head_depth,
            num_heads=head_heads,
            dropout=dropout if head_dropout is None else head_dropout,
            parallel=parallel,
            first_input=first_input,
        )
        # A tuple, so that the tokenizer's weights stay the tokenizer's.
        self.bound: tuple[Tokenizer, ...] = ()
        self.backbone.init_weights()
        self.head.init_weights()

    def bind(self, tokenizer: Tokenizer) -> None:
        """Raises UserError for a tokenizer whose tokens do not stand for a vector of as many
        channels.
        """
        inner = tokenizer.source.layout
        count = len(self.channels.vocabs)
        if not inner.is_continuous or inner.blank(1).shape[2] != count:
            raise UserError(
                f"TokenBridge reads latents of {count} channels that tokens stand for; "
                f"{type(tokenizer).__name__} quantises {inner}"
            )
        self.bound = (tokenizer,)

    def latents(self, tokens: Tensor) -> Tensor:
        """Latents [B, N, C] that tokens [B, N, C] stand for."""
        if not self.bound:
            raise UserError(
                "TokenBridge has no tokenizer yet, which says what tokens stand for: bind one"
            )
        return self.bound[0].to_source(tokens)

    def vectors(self, tokens: Tensor, known: Tensor, condition: Condition) -> Tensor:
        """z [R, N, D] of all places, given the `known` [R, N] tokens (as many in each row)."""
        latents = self.to_patches(self.latents(tokens))
        return self.backbone(latents, self.known_patches(known), condition)

    def fill(
        self, state: State, tokens: Tensor, known: Tensor, places: Tensor, entity: Tensor
    ) -> ChannelLogits:
        """Guidance acts on z."""
        z = self.vectors(state.rows(tokens), state.rows(known), state.condition)
        z = take(z, state.rows(self.patches_at(places)))
        return ChannelLogits.of(self.head, self.channels, state.merge(z, entity))

    def loss(
        self, tokens: Tensor, condition: Condition, weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Cross-entropy at the masked tokens (`draw_mask`), in nats a class."""
        masked = self.draw_mask(len(tokens))
        condition = self.drop_condition(condition)
        return {"cross_entropy": self.masked_loss(tokens, masked, condition, weight)}

    def masked_loss(
        self, tokens: Tensor, masked: Tensor, condition: Condition, weight: Tensor | None = None
    ) -> Tensor:
        """Mean cross-entropy over masked tokens [B, N] and positions of the head; samples count by
        `weight` [B].
        """
        z = self.vectors(tokens, ~masked, condition)
        masked = masked.to(tokens.device)
        classes = self.channels.classes(tokens[masked])
        logits = self.head(z[masked], classes)
        losses = []
        for given, wanted in zip(logits, classes.unbind(1), strict=True):
            losses.append(F.cross_entropy(at_least_float32(given), wanted, reduction="none"))
        each = torch.stack(losses).mean(0)
        if weight is None:
            return each.mean()
        share = weight[:, None].expand(masked.shape)[masked]
        return (each * share).sum() / share.sum().clamp(min=torch.finfo(each.dtype).eps)


# Published variants, on 16 x 16 tokens of KL-16's 16 channels in 64 levels:          parameters
def tokenbridge_b(layout: Layout, num_classes: int = 1000) -> TokenBridge:
    """218,024,704 parameters; in the code, but without published weights."""
    sizes = {"width": 768, "depth": 12, "num_heads": 12, "head_width": 768, "head_depth": 4}
    return _on_kl16(layout, num_classes, sizes)


def tokenbridge_l(layout: Layout, num_classes: int = 1000) -> TokenBridge:
    """486,889,472 parameters."""
    sizes = {"width": 1024, "depth": 16, "num_heads": 16, "head_width": 1024, "head_depth": 4}
    return _on_kl16(layout, num_classes, sizes)


def tokenbridge_h(layout: Layout, num_classes: int = 1000) -> TokenBridge:
    """910,040,576 parameters."""
    sizes = {"width": 1280, "depth": 20, "num_heads": 16, "head_width": 1024, "head_depth": 6}
    return _on_kl16(layout, num_classes, sizes)


def _on_kl16(layout: Layout, num_classes: int, sizes: Mapping[str, int]) -> TokenBridge:
    options: dict[str, Any] = {"num_classes": num_classes, "channel_order": KL16_ORDER}
    return TokenBridge(layout, **sizes, **options)
