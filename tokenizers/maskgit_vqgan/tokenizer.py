"""MaskGIT-VQGAN: the convolutional tokenizer whose codes TiTok's first stage predicts and RAR
generates.

16 x 16 tokens of 1,024 codes at 256 pixels (MaskGIT, arXiv 2202.04200; as TiTok's repository ports it, arXiv
2406.07550). No attention, no biases inside blocks, average pooling; where channels change, a block adds a 1x1
convolution of its own output and forgets its input, as the published weights need. Works on images in [0, 1] inside.
"""

from typing import Self

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.absent import stays_random
from tessellar.errors import UserError
from tessellar.layers.cnn import Sizes, Upsample, group_norm
from tessellar.layers.precision import at_least_float32
from tessellar.layers.tags import tag
from tessellar.protocol.configured import Configured, LossOnly
from tessellar.protocol.layout import grid_layout
from tessellar.protocol.tokenizer import Quantizer
from tessellar.tokenizers.parts.vqgan import VQGAN
from tessellar.tokenizers.quantizers.vq import VectorQuantizer


class Block(nn.Module):
    """Two 3x3 convolutions h behind norms and SiLU; x + h, or h + S(h) where the channels change."""

    def __init__(self, channels: int, out_channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = group_norm(channels)
        self.norm2 = group_norm(out_channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.dropout = nn.Dropout(dropout)
        changes = channels != out_channels
        self.shortcut = nn.Conv2d(out_channels, out_channels, 1, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (x if self.shortcut is None else self.shortcut(h))


def _blocks(channels: int, out_channels: int, sizes: Sizes) -> nn.Sequential:
    widths = [channels] + [out_channels] * sizes.num_res_blocks
    return nn.Sequential(
        *(Block(a, b, sizes.dropout) for a, b in zip(widths, widths[1:], strict=False))
    )


class Encoder(nn.Module):
    """Images [B, 3, H, W] in [0, 1] to features [B, z_channels, H / f, W / f], f = 2^(levels - 1)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        widths = sizes.widths
        self.conv_in = nn.Conv2d(3, sizes.channels, 3, padding=1, bias=False)
        self.levels = nn.ModuleList(
            _blocks(a, b, sizes) for a, b in zip([sizes.channels, *widths], widths, strict=False)
        )
        self.mid = _blocks(widths[-1], widths[-1], sizes)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], sizes.z_channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        h = self.conv_in(images.contiguous())
        for number, level in enumerate(self.levels):
            h = level(h if number == 0 else F.avg_pool2d(h, 2))
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Features [B, z_channels, h, w] to images; `levels` are counted from the finest and run from
    the coarsest.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        widths = sizes.widths
        self.conv_in = nn.Conv2d(sizes.z_channels, widths[-1], 3, padding=1)
        self.mid = _blocks(widths[-1], widths[-1], sizes)
        self.levels = nn.ModuleList(
            _blocks(a, b, sizes) for a, b in zip([*widths[1:], widths[-1]], widths, strict=True)
        )
        # After level i + 1.
        self.upsample = nn.ModuleList(Upsample(width) for width in widths[1:])
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        # contiguous: GroupNorm on CPU loses precision on channels-last memory
        h = self.mid(self.conv_in(features.contiguous()))
        for number in reversed(range(len(self.levels))):
            h = self.levels[number](h)
            if number:
                h = self.upsample[number - 1](h)
        return self.conv_out(F.silu(self.norm_out(h)))


class MaskGITVQGAN(VQGAN):
    """Images of `image_size` (one side, or height and width) as a grid of codes.

    Raises ValueError where the stride does not divide the size.
    """

    encoder: Encoder
    decoder: Decoder

    def __init__(
        self,
        quantizer: Quantizer,
        image_size: int | tuple[int, int] = 256,
        channels: int = 128,
        multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(image_size, stride=2 ** (len(multipliers) - 1))
        self.layout = grid_layout(*self.grid, quantizer.kind)
        sizes = Sizes(channels, tuple(multipliers), num_res_blocks, quantizer.dim, dropout)
        self.encoder = Encoder(sizes)
        self.decoder = Decoder(sizes)
        self.quantizer = quantizer

    def maps(self, images: Tensor) -> Tensor:
        return self.encoder((images + 1) / 2)

    def paint(self, maps: Tensor) -> Tensor:
        dtype = self.decoder.conv_in.weight.dtype
        return 2 * at_least_float32(self.decoder(maps.to(dtype))) - 1


class PixelDecoder(Configured, nn.Module):
    """The codebook and the decoder of a MaskGIT-VQGAN: what draws TiTok's scores over its codes.

    30,478,339 + 262,144 parameters at the published sizes.
    """

    def __init__(
        self,
        vocab_size: int = 1024,
        dim: int = 256,
        channels: int = 128,
        multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.stride = 2 ** (len(multipliers) - 1)
        self.codebook = nn.Embedding(vocab_size, dim)
        tag(self.codebook.weight, "no_decay")
        nn.init.uniform_(self.codebook.weight, -1 / vocab_size, 1 / vocab_size)
        self.decoder = Decoder(Sizes(channels, tuple(multipliers), num_res_blocks, dim))

    def forward(self, logits: Tensor, hard: bool = False) -> Tensor:
        """Images [B, 3, H, W] of scores [B, h, w, V]: of the expected code, or with `hard` of the
        likeliest one.
        """
        codes = self.codebook.weight
        features = (
            codes[logits.argmax(-1)]
            if hard
            else at_least_float32(logits).softmax(-1).to(codes.dtype) @ codes
        )
        return 2 * at_least_float32(self.decoder(rearrange(features, "b h w c -> b c h w"))) - 1

    @torch.no_grad()
    def copy_from(self, vqgan: MaskGITVQGAN) -> None:
        """Start as the VQGAN's decoder and codebook; raises UserError where sizes differ."""
        quantizer = vqgan.quantizer
        if (
            not isinstance(quantizer, VectorQuantizer)
            or quantizer.codebook.weight.shape != self.codebook.weight.shape
        ):
            raise UserError(
                f"the pixel decoder has {self.vocab_size} codes; the VQGAN's are {vqgan.layout}"
            )
        self.codebook.weight.copy_(quantizer.codebook.weight)
        try:
            self.decoder.load_state_dict(vqgan.decoder.state_dict())
        except RuntimeError as error:
            raise UserError(
                "the pixel decoder and the VQGAN's decoder have different sizes"
            ) from error


class ProxyCodes(LossOnly, nn.Module):
    """A frozen MaskGIT-VQGAN that only the first stage's loss reads: in no parameters, state dict,
    config or export.
    """

    def __init__(self, model: MaskGITVQGAN) -> None:
        super().__init__()
        # A tuple hides it from the module's parameters.
        self._held = (model.eval().requires_grad_(False),)

    @property
    def model(self) -> MaskGITVQGAN:
        return self._held[0]

    def _apply(self, fn: object, recurse: bool = True) -> Self:
        self.model._apply(fn, recurse)  # type: ignore[arg-type]
        return super()._apply(fn, recurse)  # type: ignore[arg-type]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Codes [B, h * w] of images in [-1, 1], in raster order."""
        with torch.autocast(images.device.type, enabled=False):
            return self.model.encode(images)


def proxy_codes(weights: str, image_size: int = 256) -> ProxyCodes:
    """Of an export of a MaskGIT-VQGAN (`convert.py import maskgit_vqgan`); blank where the default
    device is meta.

    Raises UserError where the file is something else.
    """
    from tessellar.checkpoints.reading import load_tokenizer

    if torch.get_default_device().type == "meta" or stays_random(weights):
        return ProxyCodes(maskgit_vqgan(image_size))
    model = load_tokenizer(weights)
    if not isinstance(model, MaskGITVQGAN) or model.image_size != (image_size, image_size):
        raise UserError(
            f"{weights} is {type(model).__name__} at {model.image_size}, not MaskGITVQGAN at {image_size}"
        )
    return ProxyCodes(model)


def maskgit_vqgan(image_size: int = 256) -> MaskGITVQGAN:
    """54,515,587 parameters; 16 x 16 tokens of 1,024 codes at 256 pixels."""
    return MaskGITVQGAN(VectorQuantizer(1024, 256, l2_normalize=False), image_size)
