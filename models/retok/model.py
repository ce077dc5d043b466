"""ReToK's generator: LlamaGen's transformer with learned absolute positions in place of rotations
(arXiv 2601.01535).

Position 0 is the class, position i + 1 the i-th token; both are added to the embeddings. The order
of ReToK's tokens is coarse to fine, so a prefix of what is generated can be decoded.
"""

import torch
from torch import Tensor, nn

from tessellar.models.llamagen import LlamaGen
from tessellar.models.parts.llama import SIZE_B, SIZE_L, SIZE_XL, SIZE_XXL
from tessellar.protocol.condition import Condition
from tessellar.protocol.entities import Entities
from tessellar.protocol.generator import Prefix
from tessellar.protocol.layout import Layout


class ReToKGPT(LlamaGen):
    """Next-token generator over a categorical layout, conditioned on one of `num_classes` classes."""

    def __init__(
        self,
        layout: Layout,
        width: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        num_classes: int = 1000,
        condition_dropout: float = 0.1,
        dropout: float = 0.1,
        ffn_multiple_of: int = 256,
        norm_eps: float = 1e-5,
        attention: str = "auto",
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__(
            layout,
            width,
            depth,
            num_heads,
            num_classes,
            condition_dropout=condition_dropout,
            dropout=dropout,
            ffn_multiple_of=ffn_multiple_of,
            norm_eps=norm_eps,
            attention=attention,
            zero_init_residual=zero_init_residual,
        )
        self.num_classes = num_classes
        self.position_embedding = nn.Parameter(torch.empty(layout.length + 1, width))
        nn.init.normal_(self.position_embedding, std=width**-0.5)
        self.rope_cos.fill_(1)  # no place is rotated
        self.rope_sin.fill_(0)

    def prefix(self, condition: Condition) -> Prefix:
        return Prefix(super().prefix(condition).embeddings + self.position_embedding[0])

    def embed(self, tokens: Tensor, index: Tensor, entities: Entities) -> Tensor:
        place = index.clamp(max=entities.length - 1).to(tokens.device) + 1
        return super().embed(tokens, index, entities) + self.position_embedding[place]


# Published variants, of the sizes in models/parts/llama.py; parameters (16,384 codes, 1,000 classes, 256 tokens)
def retok_gpt_b(layout: Layout, num_classes: int = 1000) -> ReToKGPT:
    """111,085,824 parameters."""
    return ReToKGPT(layout, num_classes=num_classes, **SIZE_B)


def retok_gpt_l(layout: Layout, num_classes: int = 1000) -> ReToKGPT:
    """343,174,144 parameters."""
    return ReToKGPT(layout, num_classes=num_classes, **SIZE_L)


def retok_gpt_xl(layout: Layout, num_classes: int = 1000) -> ReToKGPT:
    """775,028,480 parameters."""
    return ReToKGPT(layout, num_classes=num_classes, **SIZE_XL)


def retok_gpt_xxl(layout: Layout, num_classes: int = 1000) -> ReToKGPT:
    """1,411,367,424 parameters."""
    return ReToKGPT(layout, num_classes=num_classes, **SIZE_XXL)
