"""What convolutional tokenizers share (VQGAN, arXiv 2012.09841): maps of the encoder are quantized
cell by cell, maps of codes are drawn.

Shapes: images [B, 3, H, W], maps [B, C, h, w] at the stride of the encoder, vectors [B, h w, C].
"""

from einops import rearrange
from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.layers.cnn import Decoder, Encoder, Sizes
from tessellar.layers.precision import at_least_float32
from tessellar.protocol.layout import grid_layout
from tessellar.protocol.tokenizer import GridTokenizer, Quantizer


class VQGAN(GridTokenizer):
    """Images of `image_size` (one side, or height and width), any multiple of `stride`.

    Subclasses set `layout`, `quantizer`, `encoder` and `decoder`, and 1x1 convolutions to the
    quantizer and from it, where they have them. Raises ValueError where the stride does not divide
    the image size.
    """

    encoder: nn.Module
    decoder: nn.Module
    quant_conv: nn.Module
    post_quant_conv: nn.Module

    def __init__(self, image_size: int | tuple[int, int], stride: int) -> None:
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height % stride or width % stride:
            raise ValueError(f"the stride {stride} does not divide image_size {image_size}")
        self.image_size = (height, width)
        self.stride = stride
        self.grid = (height // stride, width // stride)

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.conv_out.weight  # type: ignore[union-attr, return-value]

    def take_size(self, image_size: tuple[int, int]) -> None:
        """Convolutions go over images of any multiple of the stride; scales are of one size (VAR)."""
        if self.layout.grid is None:
            return super().take_size(image_size)
        height, width = image_size
        if height % self.stride or width % self.stride:
            raise UserError(
                f"the stride {self.stride} does not divide images of {height} x {width}"
            )
        (segment,) = self.layout.segments
        self.image_size = (height, width)
        self.grid = (height // self.stride, width // self.stride)
        self.layout = grid_layout(*self.grid, segment.kind, segment.name)

    def maps(self, images: Tensor) -> Tensor:
        """Maps before quantization, of images of any multiple of the stride."""
        return self.quant_conv(self.encoder(images))

    def paint(self, maps: Tensor) -> Tensor:
        """Images of maps of codes, of any size."""
        # Half precision, in a model that was cast.
        dtype = next(self.decoder.parameters()).dtype
        # contiguous: GroupNorm on a CPU loses precision on channels-last memory
        images = self.decoder(self.post_quant_conv(maps.to(dtype).contiguous()))
        return at_least_float32(images)

    def latents(self, images: Tensor) -> Tensor:
        self.check_images(images)
        return rearrange(self.maps(images), "b c h w -> b (h w) c")

    def render(self, vectors: Tensor) -> Tensor:
        return self.paint(rearrange(vectors, "b (h w) c -> b c h w", h=self.grid[0]))


class TamingVQGAN(VQGAN):
    """A VQGAN of taming's halves, with 1x1 convolutions to the quantizer and from it.

    `encoding` and `decoding` are the sizes of the halves; `encoder_attention` and
    `decoder_attention` their levels with attention, 0 the finest (None: the coarsest alone).
    """

    encoder: Encoder
    decoder: Decoder

    def __init__(
        self,
        quantizer: Quantizer,
        image_size: int | tuple[int, int],
        encoding: Sizes,
        decoding: Sizes,
        encoder_attention: tuple[int, ...] | None = None,
        decoder_attention: tuple[int, ...] | None = None,
        segment: str = "tokens",
    ) -> None:
        super().__init__(image_size, stride=2 ** (len(encoding.multipliers) - 1))
        self.layout = grid_layout(*self.grid, quantizer.kind, segment)
        self.encoder = Encoder(encoding, encoder_attention)
        self.decoder = Decoder(decoding, decoder_attention)
        self.quant_conv = nn.Conv2d(encoding.z_channels, quantizer.in_dim, 1)
        self.quantizer = quantizer
        self.post_quant_conv = nn.Conv2d(quantizer.dim, decoding.z_channels, 1)
