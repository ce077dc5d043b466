"""UniWeTok: one binary token of 128 bits for 32 x 32 pixels, for understanding and generation (arXiv
2602.14178).

As BitDance's autoencoder, but attention over the coarsest map on both sides, an encoder whose
downsampling changes the width and whose last norm has no activation, features bounded by SigLu
(2 sigmoid(h) - 1) and a decoder that always reads noise. Training code, teacher, weights, steps and
the sizes of the released weights are not published: what the paper names is an option (losses.py),
and the defaults are this project's, not the paper's.
"""

from collections import OrderedDict

from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.layers.cnn import Sizes, group_norm
from tessellar.layers.cnn_binary import BinaryDecoder, plain_blocks
from tessellar.protocol.layout import grid_layout
from tessellar.protocol.ranges import check_name
from tessellar.protocol.tokenizer import Quantizer, TokenizerOutput
from tessellar.tokenizers.bitdance.tokenizer import Trained, signs
from tessellar.tokenizers.parts.noisy_decoder import NoisyDecoder, freeze_codes
from tessellar.tokenizers.uniwetok.attention import (
    RegisterAttention,
    by_centres,
    from_edge_to_edge,
)
from tessellar.tokenizers.uniwetok.losses import BitPrior, Distillation


class EncoderLevel(nn.Module):
    """Residual blocks of one width, then a convolution of stride 2 to the next level's."""

    def __init__(self, channels: int, blocks: int, next_channels: int | None) -> None:
        super().__init__()
        self.res = plain_blocks(channels, blocks)
        self.resample = None
        if next_channels is not None:
            self.resample = nn.Conv2d(channels, next_channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.res(x)
        return x if self.resample is None else self.resample(x)


class Encoder(nn.Module):
    """Images [B, 3, H, W] to features [B, z, h, w] in (-1, 1)."""

    def __init__(self, sizes: Sizes, attention: RegisterAttention) -> None:
        super().__init__()
        widths = sizes.widths
        self.conv_in = nn.Conv2d(3, sizes.channels, 3, padding=1, bias=False)
        self.levels = nn.ModuleList(
            EncoderLevel(width, sizes.num_res_blocks, after)
            for width, after in zip(widths, [*widths[1:], None], strict=True)
        )
        self.attention = attention
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], sizes.z_channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        h = self.conv_in(images.contiguous())
        for level in self.levels:
            h = level(h)
        h = self.conv_out(self.norm_out(self.attention(h)))
        return 2 * h.sigmoid() - 1  # SigLu


class UniWeTok(NoisyDecoder):
    """Images of `image_size` (one side, or height and width) as a grid of signs.

    `attention_depth` blocks of `num_heads` stand on each side. `distillation` and `prior` add their
    losses to training; `train="decoder"` leaves the codes as they are. Raises ValueError where the
    stride does not divide the size, UserError for sizes that do not fit each other.
    """

    encoder: Encoder

    def __init__(
        self,
        quantizer: Quantizer,
        image_size: int | tuple[int, int] = 256,
        channels: int = 256,
        multipliers: tuple[int, ...] = (1, 1, 2, 2, 4, 4),
        num_res_blocks: int = 4,
        attention_depth: int = 4,
        num_heads: int = 16,
        distillation: Distillation | None = None,
        prior: BitPrior | None = None,
        train: Trained = "all",
    ) -> None:
        super().__init__(image_size, stride=2 ** (len(multipliers) - 1))
        check_name("train", train, ("all", "decoder"))
        if multipliers[0] != 1:
            raise UserError(
                f"multipliers are {tuple(multipliers)}; UniWeTok's first level has the width of its "
                "first convolution: begin with 1"
            )
        for part in (distillation, prior):
            if part is not None and part.bits != quantizer.dim:
                raise UserError(
                    f"{type(part).__name__} reads {part.bits} bits; the tokens have {quantizer.dim}"
                )
        self.layout = grid_layout(*self.grid, quantizer.kind)
        self.noisy = True
        self.train_codes = train == "all"
        sizes = Sizes(channels, tuple(multipliers), num_res_blocks, quantizer.dim)
        widest = sizes.widths[-1]
        self.encoder = Encoder(
            sizes, RegisterAttention(widest, attention_depth, num_heads, from_edge_to_edge)
        )
        self.decoder = BinaryDecoder(sizes, 2 * quantizer.dim)
        attention = RegisterAttention(widest, attention_depth, num_heads, by_centres)
        middle = {"attention": attention, "blocks": self.decoder.mid}
        self.decoder.mid = nn.Sequential(OrderedDict(middle))
        self.quantizer = quantizer
        self.distillation = distillation
        self.prior = prior
        if not self.train_codes:
            freeze_codes(self)

    def forward(self, images: Tensor) -> TokenizerOutput:
        features = self.latents(images)
        quantized = self.quantizer(features)
        losses = dict(quantized.losses) if self.train_codes else {}
        if self.train_codes and self.training:
            if self.distillation is not None:
                losses |= self.distillation(images, features, quantized.quantized, self.grid)
            if self.prior is not None:
                losses["prior"] = self.prior(quantized.quantized)
        return TokenizerOutput(self.render(quantized.quantized), quantized.tokens, losses)


def uniwetok_128(
    image_size: int | tuple[int, int] = 256,
    distillation: Distillation | None = None,
    prior: BitPrior | None = None,
    train: Trained = "all",
) -> UniWeTok:
    """697,044,355 parameters, if the released sizes are BitDance's with one more level and four blocks
    of attention a side, which no published file says; 8 x 8 tokens of 128 bits at 256 pixels.
    """
    quantizer = signs(128, bounded=True)
    return UniWeTok(quantizer, image_size, distillation=distillation, prior=prior, train=train)
