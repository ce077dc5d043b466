"""AliTok: a 1D tokenizer whose tokens a next-token generator finds predictable (arXiv 2506.05289).

A bidirectional encoder writes a prefix and one token a patch:

    prefix 0 | prefix 1 .. g | patch (0, 0), (0, 1) .. (g - 1, g - 1)      g = image side / patch side
    patch (0, 0) | row 0     |          the image in raster order          <- what each must rebuild

In stage "causal" the decoder's row of a token sees only tokens up to it, and draws that token's own
patch; the prefix draws a strip of its own, so that the first row has a context. In stage
"bidirectional" encoder and codes stay as they are, and a decoder with full attention and some spare
rows learns the same tokens. Works on images in [0, 1] inside. Different from the official code:
other grids weigh the strip by 10 P / g^2, and small models start otherwise.
"""

from collections.abc import Mapping
from typing import Literal, Self

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.errors import UserError
from tessellar.layers.precision import at_least_float32
from tessellar.layers.starts import STD, start_layers
from tessellar.layers.tags import tag, untag
from tessellar.layers.vit import ViTBlock
from tessellar.protocol.layout import Layout, Segment
from tessellar.protocol.tokenizer import QuantizedTokenizer, Quantizer, TokenizerOutput
from tessellar.tokenizers.quantizers.clustering import ClusteringVQ
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.titok.tokenizer import SIZES, ViTSize, learned

Stage = Literal["causal", "bidirectional"]
STRIP_WEIGHT = 10.0  # of the prefix's loss, times its share of tokens


class Transformer(nn.Module):
    """Norm, blocks, norm; attention in float32 whatever the run's precision, as published."""

    def __init__(self, size: ViTSize, causal: bool, attention: str) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(size.width)
        self.norm_out = nn.LayerNorm(size.width)
        self.blocks = nn.ModuleList(
            ViTBlock(
                size.width,
                size.num_heads,
                attention=attention,
                gelu="none",
                causal=causal,
                exact_attention=True,
            )
            for _ in range(size.depth)
        )

    def run(self, x: Tensor) -> Tensor:
        """States [B, n, D] of a sequence of embeddings [B, n, D]."""
        x = self.norm_in(x)
        for block in self.blocks:
            x = block(x)
        return self.norm_out(x)


class Encoder(Transformer):
    """Images [B, 3, H, W] in [0, 1] to latents [B, N, C]: patches, then learned tokens, all seeing
    all.
    """

    def __init__(
        self,
        cells: int,
        num_tokens: int,
        patch_size: int,
        size: ViTSize,
        out_dim: int,
        attention: str,
    ) -> None:
        super().__init__(size, causal=False, attention=attention)
        self.patch_size = patch_size
        self.patch_in = nn.Linear(3 * patch_size**2, size.width)
        self.positions = learned(cells, size.width)
        self.tokens = learned(num_tokens, size.width)
        self.token_positions = learned(num_tokens, size.width)
        self.to_code = nn.Linear(size.width, out_dim)

    def forward(self, images: Tensor) -> Tensor:
        p = self.patch_size
        cells = self.patch_in(rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p))
        tokens = repeat(self.tokens + self.token_positions, "n d -> b n d", b=len(images))
        sequence = torch.cat([cells + self.positions, tokens.to(cells.dtype)], dim=1)
        return self.to_code(self.run(sequence)[:, -len(self.tokens) :])


class PatchHead(nn.Module):
    """States [B, h * w, D] of tokens to an image [B, 3, h p, w p] in [0, 1], each its own patch."""

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.to_pixels = nn.Linear(width, 3 * patch_size**2)
        self.smooth = nn.Conv2d(3, 3, 1)

    def forward(self, states: Tensor, height: int) -> Tensor:
        p = self.patch_size
        images = rearrange(
            self.to_pixels(states), "b (h w) (p q c) -> b c (h p) (w q)", h=height, p=p, q=p
        )
        return at_least_float32(self.smooth(images.contiguous())).sigmoid()


class Decoder(Transformer):
    """Code vectors [B, N, C] to states [B, N, D], behind `first` learned rows that draw nothing."""

    def __init__(
        self, num_tokens: int, first: int, size: ViTSize, dim: int, causal: bool, attention: str
    ) -> None:
        super().__init__(size, causal, attention)
        self.from_code = nn.Linear(dim, size.width)
        self.first = learned(first, size.width)
        self.positions = learned(first + num_tokens, size.width)

    def forward(self, vectors: Tensor) -> Tensor:
        tokens = self.from_code(vectors.to(self.from_code.weight.dtype))
        first = repeat(self.first, "n d -> b n d", b=len(tokens)).to(tokens.dtype)
        sequence = torch.cat([first, tokens], dim=1) + self.positions
        return self.run(sequence)[:, len(self.first) :]


class AliTok(QuantizedTokenizer):
    """Square images of `image_size` as g + 1 prefix tokens and g x g tokens of patches.

    `buffer`: learned rows before the tokens in stage "bidirectional"; the causal decoder has one.
    `prefix_weight` weighs the squared error of the strip that the prefix draws (None: 10 (g + 1) /
    g^2). Raises ValueError for sizes that do not fit each other, and for an unknown stage.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        image_size: int = 256,
        patch_size: int = 16,
        encoder_size: ViTSize = SIZES["base"],
        decoder_size: ViTSize = SIZES["large"],
        stage: Stage = "causal",
        buffer: int = 32,
        prefix_weight: float | None = None,
        attention: str = "auto",
    ) -> None:
        super().__init__()
        if patch_size < 1 or image_size < patch_size or image_size % patch_size:
            raise ValueError(f"patch_size {patch_size} does not divide image_size {image_size}")
        if stage not in ("causal", "bidirectional"):
            raise ValueError(f'stage is {stage!r}; it must be "causal" or "bidirectional"')
        if buffer < 1:
            raise ValueError(f"buffer is {buffer}; it must be at least 1")
        causal = stage == "causal"
        self.image_size = (image_size, image_size)
        self.patch_size = patch_size
        self.stage = stage
        self.side = image_size // patch_size
        self.prefix = self.side + 1
        self.layout = Layout(
            (
                Segment((self.prefix,), quantizer.kind, "prefix"),
                Segment((self.side, self.side), quantizer.kind, "patches"),
            )
        )
        share = self.prefix / self.side**2
        self.prefix_weight = STRIP_WEIGHT * share if prefix_weight is None else prefix_weight
        length = self.layout.length
        self.encoder = Encoder(
            self.side**2,
            length,
            patch_size=patch_size,
            size=encoder_size,
            out_dim=quantizer.in_dim,
            attention=attention,
        )
        self.decoder = Decoder(
            length,
            1 if causal else buffer,
            size=decoder_size,
            dim=quantizer.dim,
            causal=causal,
            attention=attention,
        )
        self.head = PatchHead(decoder_size.width, patch_size)
        self.strip_head = PatchHead(decoder_size.width, patch_size) if causal else None
        self.quantizer = quantizer
        self.init_weights(min(encoder_size.width, decoder_size.width) < SIZES["small"].width)
        if not causal:
            self.encoder.requires_grad_(False)
            self.quantizer.requires_grad_(False)

    def init_weights(self, small: bool) -> None:
        """Initialisation; of `small` models, below the published widths, as TiTok's are.

        | weight                            | published widths     | `small` ones    |
        |-----------------------------------|----------------------|-----------------|
        | linear layers, convolutions       | truncated N(0, 0.02) | torch's default |
        | codes of a VQ                     | truncated N(0, 0.02) | the same        |
        | tokens, positions, spare rows     | N(0, 1 / width)      | the same        |
        | biases                            | 0                    | 0               |

        As published, weight decay acts on every parameter.
        """
        start_layers(self, (nn.Linear, nn.Conv2d), small)
        if isinstance(self.quantizer, VectorQuantizer) and not self.quantizer.l2_normalize:
            nn.init.trunc_normal_(self.quantizer.codebook.weight, std=STD)
        for parameter in self.parameters():
            tag(untag(parameter, "no_decay"), "decay")

    def train(self, mode: bool = True) -> Self:
        """In stage "bidirectional" the encoder and the quantizer stay in eval mode."""
        super().train(mode)
        if self.stage == "bidirectional":
            self.encoder.eval()
            self.quantizer.eval()
        return self

    @property
    def last_layer(self) -> Tensor:
        return self.head.smooth.weight

    def latents(self, images: Tensor) -> Tensor:
        """Vectors before quantization [B, N, C]."""
        self.check_images(images)
        return self.encoder((images + 1) / 2)

    def render(self, vectors: Tensor) -> Tensor:
        """Images of code vectors [B, N, C]."""
        return self.draw_image(self.decoder(vectors))

    def draw_image(self, states: Tensor) -> Tensor:
        """The image [B, 3, H, W] in [-1, 1] of the decoder's states [B, N, D]."""
        return 2 * self.head(states[:, self.prefix :], height=self.side) - 1

    def draw_strip(self, states: Tensor) -> Tensor:
        """What the prefix draws, [B, 3, p, (g + 1) p] in [0, 1]; of stage "causal"."""
        if self.strip_head is None:
            raise UserError('the prefix of AliTok draws a strip in stage "causal" alone')
        return self.strip_head(states[:, : self.prefix], height=1)

    def strip_of(self, images: Tensor) -> Tensor:
        """What the prefix should draw: the first patch, then the first row of patches, in [0, 1]."""
        p = self.patch_size
        row = (images[:, :, :p] + 1) / 2
        return torch.cat([row[..., :p], row], dim=-1)

    def forward(self, images: Tensor) -> TokenizerOutput:
        trains_codes = self.stage == "causal"
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains_codes):
            quantized = self.quantizer(self.latents(images))
        states = self.decoder(quantized.quantized)
        losses: dict[str, Tensor] = {}
        if trains_codes:
            error = F.mse_loss(self.draw_strip(states), self.strip_of(images))
            losses = {**quantized.losses, "prefix": self.prefix_weight * error}
        return TokenizerOutput(self.draw_image(states), quantized.tokens, losses)

    def starting_from(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Stage "bidirectional" goes on from a causal tokenizer: all but what one decoder alone
        has.

        As published, the decoder's blocks are taken over; its spare rows and its positions, which
        differ in number, start afresh.
        """
        causal = any(name.startswith("strip_head.") for name in state)
        if self.stage == "causal" or not causal:
            return dict(state)
        own = self.state_dict()
        taken = {}
        for name, tensor in state.items():
            if not name.startswith("strip_head."):
                taken[name] = tensor
        for name in ("decoder.first", "decoder.positions"):
            taken[name] = own[name]
        return taken


def alitok_256(stage: Stage = "bidirectional") -> AliTok:
    """389,899,308 parameters (stage "causal": 390,623,032); 17 + 16 x 16 tokens of 4,096 codes."""
    return AliTok(
        ClusteringVQ(4096, 32),
        256,
        patch_size=16,
        encoder_size=SIZES["base"],
        decoder_size=SIZES["large"],
        stage=stage,
    )
