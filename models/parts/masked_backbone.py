"""MAR's masked backbone (arXiv 2406.11838): a vector z for each patch of a grid, given those that
are known.

An encoder reads the known patches behind a buffer of class embeddings, a decoder sees all places.
What a vector is turned into (a diffusion head, a head over channels) is the generator's own.

Shapes: R rows, L patches of C channels, V of them visible, P positions of the buffer, D widths.
"""

from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from tessellar.layers.tags import tag
from tessellar.protocol.condition import Condition
from tessellar.protocol.entities import take


class MaskedBackbone(nn.Module):
    """Patches [R, L, C], which of them are known, and a class, to vectors z [R, L, `out_dim`].

    Width, depth and heads of the decoder, and dropout of attention weights, are those of the
    encoder and of the projections unless given. Whoever builds it calls `init_weights`, when all
    parts of the generator are there.
    """

    def __init__(
        self,
        channels: int,
        length: int,
        width: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_width: int | None = None,
        decoder_depth: int | None = None,
        decoder_heads: int | None = None,
        num_classes: int = 1000,
        buffer: int = 64,
        dropout: float = 0.1,
        attention_dropout: float | None = None,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        inner = decoder_width or width
        self.length = length
        self.buffer = buffer
        self.num_classes = num_classes
        self.out_dim = inner
        make = partial(
            Block,
            mlp_ratio=mlp_ratio,
            qkv_bias=True,
            proj_drop=dropout,
            attn_drop=dropout if attention_dropout is None else attention_dropout,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),  # type: ignore[arg-type]
        )
        self.class_embedding = nn.Embedding(num_classes, width)
        self.null_embedding = nn.Parameter(torch.empty(1, width))
        self.input = nn.Linear(channels, width)
        self.input_norm = nn.LayerNorm(width, eps=1e-6)
        self.encoder_positions = nn.Parameter(torch.empty(1, buffer + length, width))
        self.encoder_blocks = nn.ModuleList(make(width, num_heads) for _ in range(depth))
        self.encoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_input = nn.Linear(width, inner)
        self.mask_token = nn.Parameter(torch.empty(1, 1, inner))
        self.decoder_positions = nn.Parameter(torch.empty(1, buffer + length, inner))
        self.decoder_blocks = nn.ModuleList(
            make(inner, decoder_heads or num_heads) for _ in range(decoder_depth or depth)
        )
        self.decoder_norm = nn.LayerNorm(inner, eps=1e-6)
        self.z_positions = nn.Parameter(torch.empty(1, length, inner))

    def init_weights(self) -> None:
        """Tables, tokens and the class embedding N(0, 0.02), linear layers Xavier, biases 0."""
        tables = (
            self.null_embedding,
            self.encoder_positions,
            self.mask_token,
            self.decoder_positions,
            self.z_positions,
        )
        for table in (*tables, self.class_embedding.weight):
            nn.init.normal_(table, std=0.02)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
                if "blocks" in name:
                    tag(module.weight, "hidden")

    def embed_classes(self, condition: Condition) -> Tensor:
        """[R, D]; the number of classes stands for none."""
        assert condition.ids is not None
        known = self.class_embedding(condition.ids.clamp(max=self.num_classes - 1))
        return torch.where((condition.ids == self.num_classes)[:, None], self.null_embedding, known)

    def encode(self, patches: Tensor, visible: Tensor, condition: Condition) -> Tensor:
        """Buffer and visible patches [R, P + V, D]; `visible` [R, V] are their places, ascending."""
        label = self.embed_classes(condition)[:, None].expand(-1, self.buffer, -1)
        x = self.input_norm(
            torch.cat([label, self.input(patches.to(label.dtype))], 1) + self.encoder_positions
        )
        x = torch.cat([x[:, : self.buffer], take(x, visible + self.buffer)], 1)
        for block in self.encoder_blocks:
            x = block(x)
        return self.encoder_norm(x)

    def forward(self, patches: Tensor, known: Tensor, condition: Condition) -> Tensor:
        """z [R, L, D] of all patches, given the `known` [R, L] ones (as many in each row)."""
        count = int(known[0].sum())
        assert bool((known.sum(1) == count).all()), "images must be in step"
        visible = (~known).to(torch.int8).argsort(dim=1, stable=True)[:, :count].to(patches.device)
        encoded = self.decoder_input(self.encode(patches, visible, condition))
        x = self.mask_token.expand(len(patches), self.length, -1).to(encoded.dtype)
        x = x.scatter(1, visible[..., None].expand(-1, -1, x.shape[-1]), encoded[:, self.buffer :])
        x = torch.cat([encoded[:, : self.buffer], x], 1) + self.decoder_positions
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, self.buffer :] + self.z_positions
