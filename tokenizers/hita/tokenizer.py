"""Hita: holistic tokens first, then a grid of patch tokens, each with a codebook of its own (arXiv
2507.02358).

Learned queries read CNN patches and the features of a frozen vision model; both parts are then made
causal, so that a generator can follow their order. A causal fusion transformer whose output is read
`shift` positions early paints the first patches from holistic tokens alone. `vision_loss` is the
later release (Hita-U), which also predicts the vision model's patches from the holistic tokens.
Different from the official code: restarts of unused codes are possible.
"""

from math import sqrt

import torch
from einops import rearrange
from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.layers.cnn import Decoder, Encoder, Sizes
from tessellar.layers.gated_block import GatedBlock, packed_hidden
from tessellar.layers.precision import at_least_float32
from tessellar.layers.tags import tag
from tessellar.layers.vit import resized_positions
from tessellar.protocol.layout import Layout, Segment
from tessellar.protocol.tokenizer import Quantizer, Tokenizer, TokenizerOutput
from tessellar.tokenizers.hita.vision import HitaVision
from tessellar.tokenizers.losses.alignment import cosine_distance
from tessellar.tokenizers.quantizers.vq import VectorQuantizer


def learned(*shape: int) -> nn.Parameter:
    """Learned vectors, N(0, 1 / C)."""
    return tag(nn.Parameter(torch.randn(1, *shape) / sqrt(shape[-1])), "no_decay")


class HolisticEncoder(nn.Module):
    """Patches [B, N, C] and vision features [B, V, Dv] to holistic vectors [B, S, C] and patches,
    causally ordered.
    """

    def __init__(
        self,
        length: int,
        holistic: int,
        width: int,
        vision_dim: int,
        depth: int,
        num_heads: int,
        hidden: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.queries = learned(holistic, width)
        self.positions = learned(length, width)
        self.project = nn.Sequential(
            nn.Linear(vision_dim, width, bias=False), nn.LayerNorm(width), nn.ReLU(),
            nn.Linear(width, width, bias=False), nn.LayerNorm(width),
        )  # fmt: skip
        self.norm_mixing = nn.LayerNorm(width)
        self.norm_ordering = nn.LayerNorm(width)
        self.mixing = nn.ModuleList(
            GatedBlock(width, num_heads, hidden, bias=False, dropout=dropout) for _ in range(depth)
        )
        self.ordering = nn.ModuleList(
            GatedBlock(width, num_heads, hidden, attention_dropout=dropout) for _ in range(depth)
        )

    def forward(self, patches: Tensor, vision: Tensor) -> tuple[Tensor, Tensor]:
        holistic = self.queries.shape[1]
        queries = self.queries.expand(len(patches), -1, -1)
        vision = self.project(vision.to(patches.dtype))
        x = self.norm_mixing(torch.cat([queries, vision, patches + self.positions], 1))
        for block in self.mixing:
            x = block(x)
        x = torch.cat([x[:, :holistic], x[:, holistic + vision.shape[1] :]], 1)
        x = self.norm_ordering(x)
        for block in self.ordering:
            x = block(x, is_causal=True)
        return x[:, :holistic], x[:, holistic:]


class FusionDecoder(nn.Module):
    """Holistic vectors [B, S, C] and patches [B, N, C] to the N vectors that the CNN paints, read
    `shift` early.

    Where `vision_dim` is given, `predict_vision` predicts that many channels of the vision model's
    patches.
    """

    def __init__(
        self, grid: tuple[int, int], holistic: int, width: int, shift: int, depth: int, num_heads: int, hidden: int,
        dropout: float, vision_dim: int | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.grid = grid
        self.shift = shift
        self.positions = learned(grid[0] * grid[1], width)
        self.holistic_positions = learned(holistic, width)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            GatedBlock(width, num_heads, hidden, attention_dropout=dropout) for _ in range(depth)
        )
        self.mask_token = learned(1, width) if vision_dim else None
        self.norm_vision = nn.LayerNorm(width) if vision_dim else None
        self.to_vision = nn.Linear(width, vision_dim) if vision_dim else None
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, holistic: Tensor, patches: Tensor) -> Tensor:
        x = self.norm(torch.cat([holistic + self.holistic_positions, patches + self.positions], 1))
        for block in self.blocks:
            x = block(x, is_causal=True)
        first = holistic.shape[1] - self.shift
        return x[:, first : first + patches.shape[1]]

    def predict_vision(self, holistic: Tensor, side: int) -> Tensor:
        """Features [B, side^2, Dv]: mask tokens see everything, holistic ones only each other,
        causally.
        """
        assert (
            self.mask_token is not None
            and self.norm_vision is not None
            and self.to_vision is not None
        )
        masks = (self.mask_token + resized_positions(self.positions, 0, side)).expand(
            len(holistic), -1, -1
        )
        x = self.norm_vision(torch.cat([holistic, masks], 1))
        count = holistic.shape[1]
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
        mask[:count] = mask[:count].tril()
        mask[:count, count:] = False
        for block in self.blocks:
            x = block(x, mask)
        return self.to_vision(x[:, count:])


class Hita(Tokenizer):
    """Square images of `image_size` to `holistic` tokens and a grid of patches, the latter at the
    CNN's stride.

    `vision` is part of the encoder; without it (an imported checkpoint, which has none) only
    decoding works. Raises UserError for a shift that reaches before the first token, or a size that
    the stride does not divide.
    """

    def __init__(
        self,
        holistic_quantizer: Quantizer,
        quantizer: Quantizer,
        vision: HitaVision | None = None,
        image_size: int = 336,
        channels: int = 128,
        multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        width: int = 512,
        depth: int = 3,
        num_heads: int = 8,
        mlp_dim: int = 2048,
        holistic: int = 128,
        shift: int = 4,
        dropout: float = 0.1,
        vision_dim: int = 1024,
        vision_loss: float = 0.0,
        decoder_multipliers: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        stride = 2 ** (len(multipliers) - 1)
        if image_size % stride:
            raise UserError(f"the stride {stride} does not divide image_size {image_size}")
        if not 0 <= shift <= holistic:
            raise UserError(
                f"shift is {shift}; it must be in [0, {holistic}], the number of holistic tokens"
            )
        self.image_size = (image_size, image_size)
        side = image_size // stride
        self.holistic = holistic
        self.vision_loss = vision_loss
        self.layout = Layout(
            (
                Segment((holistic,), holistic_quantizer.kind, "holistic"),
                Segment((side, side), quantizer.kind, "patches"),
            )
        )
        vision_dim = vision.dim if vision else vision_dim
        sizes = Sizes(channels, tuple(multipliers), num_res_blocks, width)
        self.cnn_encoder = Encoder(sizes)
        self.cnn_decoder = Decoder(sizes.decoding(decoder_multipliers))
        hidden = packed_hidden(mlp_dim)
        self.encoder = HolisticEncoder(
            side**2,
            holistic,
            width=width,
            vision_dim=vision_dim,
            depth=depth,
            num_heads=num_heads,
            hidden=hidden,
            dropout=dropout,
        )
        self.decoder = FusionDecoder(
            (side, side),
            holistic,
            width=width,
            shift=shift,
            depth=depth,
            num_heads=num_heads,
            hidden=hidden,
            dropout=dropout,
            vision_dim=vision_dim if vision_loss else None,
        )
        self.vision = vision
        self.holistic_quantizer = holistic_quantizer
        self.quantizer = quantizer
        self.to_code = nn.Conv2d(width, quantizer.in_dim, 1)
        self.from_code = nn.Conv2d(quantizer.dim, width, 1)
        self.to_holistic_code = nn.Linear(width, holistic_quantizer.in_dim)
        self.from_holistic_code = nn.Linear(holistic_quantizer.dim, width)

    @property
    def last_layer(self) -> Tensor:
        return self.cnn_decoder.conv_out.weight

    def read_vision(self, images: Tensor) -> Tensor:
        """Features of the vision model; raises UserError where there is none."""
        if self.vision is None:
            raise UserError(
                "this Hita has no vision model, which its encoder reads: it can decode tokens, not make them"
            )
        return self.vision.sequence(images)

    def latents(self, images: Tensor, vision: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors before quantization, holistic [B, S, C1] and patches [B, N, C2], from vision
        features [B, V, Dv].
        """
        maps = self.cnn_encoder(images)
        holistic, patches = self.encoder(rearrange(maps, "b c h w -> b (h w) c"), vision)
        maps = rearrange(patches, "b (h w) c -> b c h w", h=maps.shape[2]).contiguous()
        return self.to_holistic_code(holistic), rearrange(
            self.to_code(maps), "b c h w -> b (h w) c"
        )

    def render(self, holistic: Tensor, patches: Tensor) -> Tensor:
        """Images of code vectors, holistic [B, S, C1] and patches [B, N, C2]."""
        fused = self.fuse(holistic, patches)
        side = self.layout.segments[1].shape[0]
        return at_least_float32(
            self.cnn_decoder(rearrange(fused, "b (h w) c -> b c h w", h=side).contiguous())
        )

    def fuse(self, holistic: Tensor, patches: Tensor) -> Tensor:
        """What the CNN paints, [B, N, width], of code vectors."""
        side = self.layout.segments[1].shape[0]
        weight = self.from_code.weight
        maps = rearrange(patches.to(weight.dtype), "b (h w) c -> b c h w", h=side).contiguous()
        patches = rearrange(self.from_code(maps), "b c h w -> b (h w) c")
        return self.decoder(self.from_holistic_code(holistic.to(weight.dtype)), patches)

    def encode(self, images: Tensor) -> Tensor:
        self.check_images(images)
        holistic, patches = self.latents(images, self.read_vision(images))
        return torch.cat(
            [self.holistic_quantizer.encode(holistic), self.quantizer.encode(patches)], 1
        )

    def decode(self, tokens: Tensor) -> Tensor:
        self.layout.check(tokens)
        holistic = tokens[:, : self.holistic]
        patches = tokens[:, self.holistic :]
        return self.render(self.holistic_quantizer.decode(holistic), self.quantizer.decode(patches))

    def swap_holistic(self, tokens: Tensor, donor: Tensor) -> Tensor:
        """Images with the patches of `tokens` and the holistic tokens of `donor` (section 4.4's
        style transfer).
        """
        return self.decode(torch.cat([donor[:, : self.holistic], tokens[:, self.holistic :]], 1))

    def forward(self, images: Tensor) -> TokenizerOutput:
        self.check_images(images)
        return self.forward_with(images, self.read_vision(images))

    def forward_with(self, images: Tensor, vision: Tensor) -> TokenizerOutput:
        """The training pass on given vision features [B, V, Dv]."""
        holistic, patches = self.latents(images, vision)
        parts = (self.holistic_quantizer(holistic), self.quantizer(patches))
        losses = {}
        for name, loss in parts[0].losses.items():
            losses[name] = torch.stack([loss, parts[1].losses[name]]).sum()
        if self.vision_loss:
            predicted = self.predict_vision(parts[0].quantized)
            losses["vision"] = (
                self.vision_loss
                * cosine_distance(predicted, vision[:, -predicted.shape[1] :], eps=1e-6).mean()
            )
        reconstruction = self.render(parts[0].quantized, parts[1].quantized)
        tokens = torch.cat([parts[0].tokens, parts[1].tokens], 1)
        return TokenizerOutput(reconstruction, tokens, losses)

    def predict_vision(self, holistic: Tensor) -> Tensor:
        """Patches of the vision model [B, n, Dv] from holistic code vectors [B, S, C1] (Hita-U)."""
        side = self.vision.grid[0] if self.vision else 16
        return self.decoder.predict_vision(
            self.from_holistic_code(holistic.to(self.from_code.weight.dtype)), side
        )


def _published(vision: HitaVision | None, vision_loss: float, image_size: int) -> Hita:
    quantizers = VectorQuantizer(16384, 12), VectorQuantizer(16384, 8)
    return Hita(*quantizers, vision, image_size, vision_loss=vision_loss)


def hita_v(vision: HitaVision | None = None, image_size: int = 336) -> Hita:
    """104,240,839 parameters without the vision model (DINOv2 ViT-L/14 with registers, 224 pixels)."""
    return _published(vision, 0.0, image_size)


def hita_u(vision: HitaVision | None = None, image_size: int = 336) -> Hita:
    """104,767,687 parameters without the vision model."""
    return _published(vision, 1.0, image_size)
