"""VAT: an in-context transformer, a Gaussian space, and residual quantization over scales of growing
token counts ("3D representation in 512-Byte", arXiv 2412.02202).

As an image tokenizer: patches and latent tokens share one transformer (TiTok's), the latents become
means and variances, a draw of which is quantized scale by scale; VAR and HAR generate the scales.
Out of scope is the paper's 3D part: point clouds in, a triplane and shapes out. It publishes no code.
Named here for want of it: the weight of the KL term, channels, sizes of the transformers, how
sequences are resized (`quantizer.py`), and a decoder of mask tokens.
"""

import torch
from torch import Tensor

from tessellar.protocol.in_loop import ScaleInputs
from tessellar.protocol.layout import Layout
from tessellar.protocol.tokenizer import Quantizer
from tessellar.tokenizers.quantizers.gaussian import GaussianSpace
from tessellar.tokenizers.titok import TiTok, ViTSize
from tessellar.tokenizers.titok.tokenizer import SIZES
from tessellar.tokenizers.vat.quantizer import SequenceScales

LENGTHS_256 = (1, 1, 2, 4, 8, 16, 32, 64, 128)  # 256 tokens, of 128 latents


class VAT(TiTok, ScaleInputs):
    """Square images of `image_size` as the scales of `quantizer`, a Gaussian space over
    `SequenceScales`.

    The first scales alone decode too; a scale that is not complete is not looked at. Raises
    ValueError for other quantizers.
    """

    quantizer: GaussianSpace

    def __init__(
        self,
        quantizer: GaussianSpace,
        image_size: int = 256,
        patch_size: int = 16,
        encoder_size: ViTSize = SIZES["base"],
        decoder_size: ViTSize = SIZES["base"],
        attention: str = "auto",
    ) -> None:
        super().__init__(
            quantizer,
            image_size,
            patch_size,
            num_tokens=scales_of(quantizer).length,
            encoder_size=encoder_size,
            decoder_size=decoder_size,
            attention=attention,
        )
        self.latent_dim = quantizer.dim

    def make_layout(self, num_tokens: int, quantizer: Quantizer) -> Layout:
        """One segment a scale, decodable from the coarsest on."""
        segments = scales_of(quantizer).segments
        return Layout(segments, min_prefix=segments[0].length)

    @torch.no_grad()
    def next_inputs(self, tokens: Tensor, count: int) -> Tensor:
        """Inputs [B, n, C] of scales 1 .. count - 1 from the tokens [B, N] of the coarser ones, as
        VAR reads them.
        """
        return scales_of(self.quantizer).next_inputs(tokens, count)


def scales_of(quantizer: Quantizer) -> SequenceScales:
    """The scales in a Gaussian space; raises ValueError for quantizers without them."""
    inner = quantizer.inner if isinstance(quantizer, GaussianSpace) else None
    if not isinstance(inner, SequenceScales):
        raise ValueError(
            f"VAT quantizes by SequenceScales in a GaussianSpace, not by {type(quantizer).__name__}"
        )
    return inner


def vat_b256(vocab_size: int = 256, image_size: int = 256) -> VAT:
    """172,030,068 parameters; 256 tokens of 8 bits, 256 bytes an image (512 with 65,536 codes)."""
    return VAT(GaussianSpace(SequenceScales(vocab_size, 16, LENGTHS_256)), image_size)
