"""LlamaGen's image tokenizer: taming's VQGAN with a small, l2-normalised codebook (arXiv 2406.06525, section 2.1).

Convolutional encoder and decoder (arXiv 2012.09841), attention only at the coarsest level, downsampling padded at the
right and bottom only. Different from the official code: no queue of recent codes (usage is a callback's business), and
codes can be restarted.
"""

from typing import NamedTuple

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.layers.precision import at_least_float32
from tessellar.tokenizers.base import Tokenizer, TokenizerOutput
from tessellar.tokenizers.layout import grid_layout
from tessellar.tokenizers.quantizers.base import Quantizer
from tessellar.tokenizers.quantizers.vq import VectorQuantizer


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResBlock(nn.Module):
    """Two convolutions behind norms and SiLU, added to the input (1x1 where the channels change)."""

    def __init__(self, channels: int, out_channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.conv1 = group_norm(channels), nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2, self.conv2 = group_norm(out_channels), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.shortcut = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (x if self.shortcut is None else self.shortcut(x))


class SpatialAttention(nn.Module):
    """One head over all positions of the map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v = (nn.Conv2d(channels, channels, 1) for _ in range(3))
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(layer(h), "b c h w -> b (h w) c") for layer in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)
        # contiguous: GroupNorm on CPU loses precision on transposed memory
        return x + self.proj(rearrange(out, "b (h w) c -> b c h w", h=x.shape[2]).contiguous())


class Downsample(nn.Module):
    """Stride-2 convolution on a map padded by one zero row below and one zero column on the right."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks (with attention after each, if wanted), then a change of resolution."""

    def __init__(
        self, channels: int, out_channels: int, blocks: int, attention: bool, resample: nn.Module | None, dropout: float
    ) -> None:
        super().__init__()
        widths = [channels] + [out_channels] * blocks
        self.res = nn.ModuleList(ResBlock(a, b, dropout) for a, b in zip(widths, widths[1:], strict=False))
        self.attn = nn.ModuleList(SpatialAttention(out_channels) for _ in range(blocks if attention else 0))
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[number](x)
        return x if self.resample is None else self.resample(x)


def middle(channels: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        ResBlock(channels, channels, dropout), SpatialAttention(channels), ResBlock(channels, channels, dropout)
    )


class Sizes(NamedTuple):
    """What encoder and decoder share."""

    channels: int
    multipliers: tuple[int, ...]
    num_res_blocks: int
    z_channels: int
    dropout: float

    @property
    def widths(self) -> list[int]:
        return [self.channels * m for m in self.multipliers]


class Encoder(nn.Module):
    """Images [B, 3, H, W] to features [B, z_channels, H / f, W / f], f = 2^(levels - 1)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        widths, last = sizes.widths, len(sizes.widths) - 1
        self.conv_in = nn.Conv2d(3, sizes.channels, 3, padding=1)
        self.levels = nn.ModuleList(
            Level(
                previous,
                width,
                sizes.num_res_blocks,
                attention=i == last,
                resample=None if i == last else Downsample(width),
                dropout=sizes.dropout,
            )
            for i, (previous, width) in enumerate(zip([sizes.channels, *widths], widths, strict=False))
        )
        self.mid = middle(widths[-1], sizes.dropout)
        self.norm_out, self.conv_out = group_norm(widths[-1]), nn.Conv2d(widths[-1], sizes.z_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        h = self.conv_in(images)
        for level in self.levels:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Features to images; levels run from the coarsest to the finest."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        widths = sizes.widths[::-1]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(sizes.z_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0], sizes.dropout)
        self.levels = nn.ModuleList(
            Level(
                previous,
                width,
                sizes.num_res_blocks + 1,
                attention=i == 0,
                resample=None if i == last else Upsample(width),
                dropout=sizes.dropout,
            )
            for i, (previous, width) in enumerate(zip([widths[0], *widths], widths, strict=False))
        )
        self.norm_out, self.conv_out = group_norm(widths[-1]), nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        h = self.mid(self.conv_in(features))
        for level in self.levels:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class LlamaGenVQ(Tokenizer):
    """VQGAN over images of `image_size` (one side, or height and width); convolutional, so any multiple of the stride.

    Raises ValueError where the stride does not divide the image size.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        image_size: int | tuple[int, int] = 256,
        channels: int = 128,
        multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        z_channels: int = 256,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.stride = 2 ** (len(multipliers) - 1)
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height % self.stride or width % self.stride:
            raise ValueError(f"the stride {self.stride} does not divide image_size {image_size}")
        self.image_size = (height, width)
        self.layout = grid_layout(height // self.stride, width // self.stride, quantizer.kind)
        sizes = Sizes(channels, tuple(multipliers), num_res_blocks, z_channels, dropout)
        self.encoder, self.decoder = Encoder(sizes), Decoder(sizes)
        self.quant_conv = nn.Conv2d(z_channels, quantizer.dim, 1)
        self.quantizer = quantizer
        self.post_quant_conv = nn.Conv2d(quantizer.dim, z_channels, 1)

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.conv_out.weight

    def latents(self, images: Tensor) -> Tensor:
        """Latents before quantization [B, h, w, C], of images of any multiple of the stride."""
        return rearrange(self.quant_conv(self.encoder(images)), "b c h w -> b h w c")

    def render(self, vectors: Tensor) -> Tensor:
        """Images of code vectors [B, h, w, C]."""
        vectors = vectors.to(self.post_quant_conv.weight.dtype)
        return self.decoder(self.post_quant_conv(rearrange(vectors, "b h w c -> b c h w").contiguous()))

    def encode(self, images: Tensor) -> Tensor:
        self.check_images(images)
        return self.quantizer.encode(self.latents(images)).flatten(1)

    def decode(self, tokens: Tensor) -> Tensor:
        self.layout.check(tokens)
        height = self.image_size[0] // self.stride
        vectors = rearrange(self.quantizer.decode(tokens), "b (h w) c -> b h w c", h=height)
        return at_least_float32(self.render(vectors))

    def forward(self, images: Tensor) -> TokenizerOutput:
        self.check_images(images)
        quantized = self.quantizer(self.latents(images))
        reconstruction = self.render(quantized.quantized)
        return TokenizerOutput(at_least_float32(reconstruction), quantized.tokens.flatten(1), quantized.losses)


def vq_16(image_size: int | tuple[int, int] = 256, vocab_size: int = 16384, code_dim: int = 8) -> LlamaGenVQ:
    """71,883,403 parameters; 16 x 16 tokens at 256 pixels."""
    return LlamaGenVQ(VectorQuantizer(vocab_size, code_dim), image_size, multipliers=(1, 1, 2, 2, 4))


def vq_8(image_size: int | tuple[int, int] = 256, vocab_size: int = 16384, code_dim: int = 8) -> LlamaGenVQ:
    """70,109,835 parameters; 32 x 32 tokens at 256 pixels."""
    return LlamaGenVQ(VectorQuantizer(vocab_size, code_dim), image_size, multipliers=(1, 2, 2, 4))
