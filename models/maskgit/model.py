"""MaskGIT over any categorical layout: all masked tokens predicted at once (arXiv 2202.04200),
TiTok's generators.

TiTok (arXiv 2406.07550) and One-D-Piece publish two backbones: a post-norm BERT encoder (`vit`) and
a U-ViT with long skips (`uvit`). The sequence is a class embedding, then the tokens, masked ones as
id V. Decoding by confidence is `tessellar/sampling/confidence.py`. Different from the official
code: one embedding module of our own instead of transformers' BERT, and any layout.
"""

from itertools import pairwise
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.errors import UserError
from tessellar.layers.attention import attention as attend
from tessellar.layers.precision import at_least_float32
from tessellar.layers.tags import tag
from tessellar.protocol.condition import ClassConditioning, Condition
from tessellar.protocol.distribution import Logits
from tessellar.protocol.entities import Entities, take, token_order
from tessellar.protocol.generator import State, require_categorical
from tessellar.protocol.layout import Layout
from tessellar.protocol.masked import MaskedGenerator
from tessellar.protocol.noise import Noise


class BertLayer(nn.Module):
    """Post-norm: x = LN(x + Attention(x)); x = LN(x + MLP(x)), eps 1e-12 (BERT, arXiv 1810.04805)."""

    def __init__(self, width: int, num_heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.rate = dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=1e-12)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.mlp_norm = nn.LayerNorm(width, 1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q = rearrange(self.query(x), "b n (h d) -> b h n d", h=self.num_heads)
        k = rearrange(self.key(x), "b n (h d) -> b h n d", h=self.num_heads)
        v = rearrange(self.value(x), "b n (h d) -> b h n d", h=self.num_heads)
        out = attend(q, k, v, dropout=self.rate if self.training else 0.0)
        x = self.attention_norm(x + self.dropout(self.proj(rearrange(out, "b h n d -> b n (h d)"))))
        return self.mlp_norm(x + self.dropout(self.fc2(F.gelu(self.fc1(x)))))


class Bert(nn.Module):
    """Token ids [B, n] to hidden states [B, n, D]; learned positions, and the one token type that
    is used.
    """

    def __init__(
        self,
        ids: int,
        length: int,
        width: int,
        depth: int,
        num_heads: int,
        hidden: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(ids, width)
        self.position = nn.Embedding(length, width)
        self.token_type = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            BertLayer(width, num_heads, hidden, dropout) for _ in range(depth)
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.token_type.weight[0] + self.position.weight[: ids.shape[1]]
        x = self.dropout(self.norm(x))
        for layer in self.layers:
            x = layer(x)
        return x


class UViTBlock(nn.Module):
    """Pre-norm block without biases of queries, keys and values; an outer one first joins a skip
    (arXiv 2209.12152).
    """

    def __init__(self, width: int, num_heads: int, hidden: int, skip: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.skip = nn.Linear(2 * width, width) if skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip is not None:
            assert skip is not None
            x = self.skip(torch.cat([x, skip], -1))
        q, k, v = rearrange(
            self.qkv(self.norm1(x)), "b n (three h d) -> three b h n d", three=3, h=self.num_heads
        )
        x = x + self.proj(rearrange(attend(q, k, v), "b h n d -> b n (h d)"))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class UViT(nn.Module):
    """Token ids [B, n] to hidden states [B, n, D]; the outputs of the first half are read again by
    the second.
    """

    def __init__(
        self, ids: int, length: int, width: int, depth: int, num_heads: int, hidden: int
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(ids, width)
        self.position = nn.Parameter(torch.empty(1, length, width))
        self.in_blocks = nn.ModuleList(
            UViTBlock(width, num_heads, hidden) for _ in range(depth // 2)
        )
        self.mid_block = UViTBlock(width, num_heads, hidden)
        self.out_blocks = nn.ModuleList(
            UViTBlock(width, num_heads, hidden, skip=True) for _ in range(depth // 2)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.position[:, : ids.shape[1]]
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        return self.norm(x)


class MaskGIT(MaskedGenerator):
    """Class-conditional; `known_weight` and `label_smoothing` shape the training loss.

    Embedding rows: V tokens, the mask, the classes, no class. Raises UserError for a layout that is
    not categorical or has several vocabularies.
    """

    def __init__(
        self,
        layout: Layout,
        backbone: Literal["vit", "uvit"] = "vit",
        width: int = 768,
        depth: int = 24,
        num_heads: int = 16,
        hidden: int = 3072,
        num_classes: int = 1000,
        condition_dropout: float = 0.1,
        dropout: float = 0.1,
        label_smoothing: float = 0.1,
        known_weight: float = 0.1,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.entities = token_order(layout)
        self.vocab = require_categorical(layout, "MaskGIT")
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.known_weight = known_weight
        self.conditioning = ClassConditioning(num_classes, dropout=condition_dropout)
        ids = self.vocab + 1 + num_classes + 1
        length = layout.length + 1
        if backbone == "vit":
            self.backbone: Bert | UViT = Bert(
                ids,
                length,
                width=width,
                depth=depth,
                num_heads=num_heads,
                hidden=hidden,
                dropout=dropout,
            )
        else:
            self.backbone = UViT(ids, length, width, depth, num_heads, hidden)
        self.output = nn.Linear(width, self.vocab)
        self.init_weights()

    def init_weights(self) -> None:
        """Truncated N(0, 0.02) for matrices and tables, 0 for biases; norms start as the identity."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, (BertLayer, UViTBlock)):
                for linear in (m for m in module.modules() if isinstance(m, nn.Linear)):
                    tag(linear.weight, "hidden")
        # As published, no table of embeddings is decayed.
        tag(self.backbone.embedding.weight, "no_decay")
        if isinstance(self.backbone, UViT):
            nn.init.trunc_normal_(tag(self.backbone.position, "no_decay"), std=0.02)
        else:
            tag(self.backbone.position.weight, "no_decay")
            tag(self.backbone.token_type.weight, "no_decay")

    def free_order(self) -> Entities:
        return token_order(self.layout)

    def plan(self, noise: Noise, steps: int | None = None) -> Entities:
        """A random order of its own for each image, in sets of about one size (default: one token
        each).
        """
        length = self.layout.length
        ends = [length * i // (steps or length) for i in range((steps or length) + 1)]
        sizes = tuple(b - a for a, b in pairwise(ends))
        if min(sizes) < 1:
            raise UserError(f"{steps} steps for {length} tokens; give 1 to {length}")
        return Entities(noise.uniform(length).argsort(1).cpu(), sizes)

    def logits(self, tokens: Tensor, masked: Tensor, condition: Condition) -> Tensor:
        """Logits [B, N, V] of tokens [B, N], of which those that are `masked` [B, N] are not looked
        at.
        """
        assert condition.ids is not None
        ids = torch.where(masked, self.vocab, tokens)
        label = self.vocab + 1 + condition.ids
        hidden = self.backbone(torch.cat([label[:, None], ids], 1))
        return at_least_float32(self.output(hidden[:, 1:]))

    def fill(
        self, state: State, tokens: Tensor, known: Tensor, places: Tensor, entity: Tensor
    ) -> Logits:
        masked = state.rows(~known).to(tokens.device)
        logits = self.logits(state.rows(tokens), masked, state.condition)
        return Logits(state.merge(take(logits, state.rows(places)), entity))

    def loss(
        self, tokens: Tensor, condition: Condition, weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Cross-entropy at a mask ratio of arccos(u) 2 / pi for uniform u, at least one token
        masked.
        """
        ratio = torch.rand(len(tokens), device=tokens.device).arccos() * 2 / torch.pi
        count = (ratio * self.layout.length).round().clamp(min=1)
        rank = torch.rand(tokens.shape, device=tokens.device).argsort(1).argsort(1)
        return {
            "cross_entropy": self.masked_loss(
                tokens, rank < count[:, None], self.drop_condition(condition), weight
            )
        }

    def masked_loss(
        self, tokens: Tensor, masked: Tensor, condition: Condition, weight: Tensor | None = None
    ) -> Tensor:
        """Smoothed cross-entropy; known tokens count `known_weight` of a masked one, samples by
        `weight` [B].
        """
        logits = self.logits(tokens, masked, condition).transpose(1, 2)
        losses = F.cross_entropy(
            logits, tokens, reduction="none", label_smoothing=self.label_smoothing
        )
        share = torch.where(masked, 1.0, self.known_weight)
        share = share if weight is None else share * weight[:, None]
        return (losses * share).sum() / share.sum().clamp(min=torch.finfo(losses.dtype).eps)

    @torch.no_grad()
    def masked_accuracy(self, tokens: Tensor, masked: Tensor, condition: Condition) -> Tensor:
        """Share of the masked tokens that are the most likely ones: of each sample, then the mean
        of the samples.
        """
        right = (self.logits(tokens, masked, condition).argmax(-1) == tokens) & masked
        return (right.sum(1) / masked.sum(1).clamp(min=1)).mean()


# Published variants                                                    parameters at 4,096 codes, 1,000 classes
def maskgit_vit(layout: Layout, num_classes: int = 1000) -> MaskGIT:
    """177,202,432 parameters at 32 tokens (TiTok-L), 177,227,008 at 64 (TiTok-B)."""
    return MaskGIT(
        layout, "vit", width=768, depth=24, num_heads=16, hidden=3072, num_classes=num_classes
    )


def maskgit_uvit(layout: Layout, num_classes: int = 1000) -> MaskGIT:
    """294,990,848 parameters at 128 tokens (TiTok-S)."""
    return MaskGIT(
        layout, "uvit", width=1024, depth=20, num_heads=16, hidden=4096, num_classes=num_classes
    )
