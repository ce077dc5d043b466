"""TokenFlow: tokens that serve understanding and generation (arXiv 2412.03069).

    image -> vision transformer, trained from its teacher's weights -> semantic vectors \\
                                                                                         one index -> scales
    image -> CNN (LlamaGen's)                                       -> pixel vectors    /

The semantic halves of the summed codes are decoded to the features of the frozen teacher, the pixel
halves to the image. Images whose size is not that of the CNN's grid are resized on both sides of the
CNN (SigLIP's 384 pixels: 27 x 27 cells of 16). Different from the official code: scales that do not
end in the input are refused, unused codes may be restarted, and the trained parameters are named.
"""

from collections.abc import Mapping
from math import isqrt
from typing import Any, Literal, Self

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.errors import UserError
from tessellar.layers.cnn import Decoder, Encoder, Sizes
from tessellar.layers.precision import at_least_float32
from tessellar.networks.vision import Preprocessing, Teacher
from tessellar.protocol.in_loop import ScaleInputs
from tessellar.protocol.layout import Layout
from tessellar.protocol.tokenizer import GridTokenizer, TokenizerOutput
from tessellar.tokenizers.losses.alignment import cosine_distance, regrid
from tessellar.tokenizers.tokenflow.quantizer import SIDES, SharedQuantizer
from tessellar.tokenizers.tokenflow.semantic import (
    SemanticDecoder,
    SemanticDecoderSize,
    SemanticVision,
    task_layer,
)

Stage = Literal["all", "decoder"]
AS_IS = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
"""Images in [-1, 1] as they are."""


class TokenFlow(GridTokenizer, ScaleInputs):
    """Square images of `image_size`, as many cells as `semantic` has patches there.

    `semantic_dim`: channels of the features that the semantic decoder gives back, those of `teacher`
    where there is one; its table of positions is for `semantic_side` cells (None: those of
    `semantic`). `decoder_channels`, `decoder_multipliers` and `decoder_blocks` are the pixel
    decoder's own (None: the encoder's); the published enhanced decoder has 256 and 4. `stage`
    "decoder" trains the pixel decoder alone. Raises UserError for sizes that do not fit each other.

    A prefix of whole scales decodes; one that ends within a scale is refused.
    """

    quantizer: SharedQuantizer

    def __init__(
        self,
        quantizer: SharedQuantizer,
        semantic: SemanticVision,
        image_size: int = 224,
        channels: int = 128,
        multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        z_channels: int = 256,
        decoder_channels: int | None = None,
        decoder_multipliers: tuple[int, ...] | None = None,
        decoder_blocks: int | None = None,
        decoder_size: SemanticDecoderSize = SemanticDecoderSize(),  # noqa: B008
        semantic_dim: int = 768,
        semantic_side: int | None = None,
        semantic_weight: float = 1.0,
        teacher: Teacher | None = None,
        stage: Stage = "all",
    ) -> None:
        super().__init__()
        side = semantic.side_at(image_size)
        if quantizer.sides[-1] != side:
            raise UserError(
                f"the finest scale is {quantizer.sides[-1]} x {quantizer.sides[-1]}, but images of {image_size} have "
                f"{side} x {side} patches"
            )
        if teacher is not None and teacher.dim != semantic_dim:
            raise UserError(
                f"semantic_dim is {semantic_dim}; the teacher's patches have {teacher.dim} channels"
            )
        if stage not in ("all", "decoder"):
            raise UserError(f'stage is {stage!r}; it must be "all" or "decoder"')
        self.image_size = (image_size, image_size)
        self.side = side
        self.pixel_size = side * 2 ** (len(multipliers) - 1)
        self.layout = Layout(quantizer.segments, min_prefix=quantizer.ends[1])
        self.latent_dim = quantizer.dim
        self.semantic_weight = semantic_weight
        self.teacher = teacher
        self.stage = stage
        sizes = Sizes(channels, tuple(multipliers), num_res_blocks, z_channels)
        decoding = sizes._replace(
            channels=decoder_channels or channels, num_res_blocks=decoder_blocks or num_res_blocks
        )
        self.semantic = semantic
        self.to_semantic_code = task_layer(semantic.dim, quantizer.semantic_dim)
        self.encoder = Encoder(sizes)
        self.quant_conv = nn.Conv2d(z_channels, quantizer.pixel_dim, 1)
        self.quantizer = quantizer
        self.semantic_decoder = SemanticDecoder(
            semantic_side or semantic.side, quantizer.semantic_dim, decoder_size, semantic_dim
        )
        self.post_quant_conv = nn.Conv2d(quantizer.pixel_dim, z_channels, 1)
        self.decoder = Decoder(decoding.decoding(decoder_multipliers))
        self.semantic_decoder.init_weights()
        if stage == "decoder":
            self.requires_grad_(False)
            self.decoder.requires_grad_(True)

    def train(self, mode: bool = True) -> Self:
        """In stage "decoder" all but the pixel decoder stays in eval mode."""
        super().train(mode and self.stage == "all")
        self.training = mode
        self.decoder.train(mode)
        return self

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.conv_out.weight

    def latents(self, images: Tensor) -> Tensor:
        self.check_images(images)
        pixels = at_size(images, self.pixel_size)
        # contiguous: GroupNorm on a CPU loses precision on channels-last memory
        maps = self.quant_conv(self.encoder(pixels.contiguous()))
        semantic = self.semantic_latents(images)
        pixel = rearrange(maps, "b c h w -> b (h w) c")
        return torch.cat([semantic, pixel.to(semantic.dtype)], dim=-1)

    def semantic_latents(self, images: Tensor) -> Tensor:
        """The semantic part of `latents`, [B, N, semantic_dim of the codes]."""
        return self.to_semantic_code(self.semantic.patch_features(images))

    def render(self, vectors: Tensor) -> Tensor:
        _, pixel = self.quantizer.split(vectors)
        maps = rearrange(pixel, "b (h w) c -> b c h w", h=self.side)
        maps = maps.to(self.post_quant_conv.weight.dtype).contiguous()
        images = at_least_float32(self.decoder(self.post_quant_conv(maps)))
        return at_size(images, self.image_size[0])

    def read(self, vectors: Tensor) -> Tensor:
        """The teacher's features [B, N, D] as the semantic decoder has them of summed codes."""
        semantic, _ = self.quantizer.split(vectors)
        return self.semantic_decoder(semantic)

    def semantics(self, tokens: Tensor) -> Tensor:
        """As `read`, of tokens of whole scales."""
        self.check_prefix(tokens)
        return self.read(self.quantizer.decode(tokens))

    def check_prefix(self, tokens: Tensor) -> None:
        """Raise ValueError unless tokens [B, n] fit the layout, UserError unless they end with a
        scale.
        """
        self.layout.check(tokens)
        ends = self.quantizer.ends[1:]
        if tokens.shape[1] not in ends:
            raise UserError(
                f"{tokens.shape[1]} tokens end within a scale; prefixes of this tokenizer have "
                f"{', '.join(map(str, ends))}"
            )

    def decode(self, tokens: Tensor) -> Tensor:
        self.check_prefix(tokens)
        return self.render(self.quantizer.decode(tokens))

    @torch.no_grad()
    def next_inputs(self, tokens: Tensor, count: int) -> Tensor:
        """Inputs [B, n, C] of scales 1 .. count - 1 from the tokens [B, N] of the coarser ones, as
        generators of next scales read them.
        """
        return self.quantizer.next_inputs(tokens, count)

    @torch.no_grad()
    def code_vectors(self, tokens: Tensor) -> Tensor:
        """What tokens [B, n] add at their own scale, [B, n, C]."""
        return self.quantizer.vectors(tokens)

    def forward(self, images: Tensor) -> TokenizerOutput:
        target = None
        if self.training and self.stage == "all" and self.teacher is not None:
            features = self.teacher(images).patches
            own = isqrt(features.shape[1])
            target = regrid(features, (own, own), (self.side, self.side))
        return self.forward_with(images, target)

    def forward_with(self, images: Tensor, target: Tensor | None) -> TokenizerOutput:
        """The training pass against given features [B, N, D] of the teacher, or without any."""
        trains_all = self.stage == "all"
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains_all):
            quantized = self.quantizer(self.latents(images))
        losses = dict(quantized.losses) if trains_all else {}
        if target is not None:
            distance = cosine_distance(self.read(quantized.quantized), target).mean()
            losses["semantic"] = self.semantic_weight * distance
        return TokenizerOutput(self.render(quantized.quantized), quantized.tokens, losses)

    def starting_from(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Stage "decoder" takes all but a pixel decoder of other sizes, which starts afresh (the
        enhanced one).
        """
        own = self.state_dict()
        drawn = {name: tensor for name, tensor in own.items() if name.startswith("decoder.")}
        there = {name: t.shape for name, t in state.items() if name.startswith("decoder.")}
        same = there == {name: tensor.shape for name, tensor in drawn.items()}
        if self.stage == "all" or same:
            return state
        return {name: t for name, t in state.items() if name not in there} | drawn


def at_size(images: Tensor, size: int) -> Tensor:
    """Images [B, 3, H, W] resized to `size`, bicubically, without antialiasing."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode="bicubic")


CLIP_B = {"name": "vit_base_patch16_clip_quickgelu_224", "image_size": 224}
VITAMIN_XL: dict[str, Any] = {
    "name": "vitamin_xlarge_256",
    "image_size": 256,
    "options": {"fc_norm": False, "final_norm": False},
}
SIGLIP_SO400M: dict[str, Any] = {
    "name": "vit_so400m_patch14_siglip_384",
    "image_size": 384,
    "options": {"act_layer": "gelu_tanh"},
    "layers": (-2,),
    "normed": False,
}


def _published(
    semantic: SemanticVision,
    image_size: int,
    width: int,
    semantic_dim: int,
    teacher: Teacher | None,
    stage: Stage,
    enhanced: bool = False,
) -> TokenFlow:
    decoder: dict[str, Any] = {}
    if enhanced:
        decoder = {"decoder_channels": 256, "decoder_blocks": 4}
    return TokenFlow(
        SharedQuantizer(sides=SIDES[semantic.side_at(image_size)]),
        semantic,
        image_size,
        decoder_size=SemanticDecoderSize(width),
        semantic_dim=semantic_dim,
        teacher=teacher,
        stage=stage,
        **decoder,
    )


# Published variants: vision model, image size.                 parameters, tokens of 32,768 codes
def tokenflow_b(
    weights: str | None = None,
    teacher: Teacher | None = None,
    enhanced: bool = False,
    stage: Stage = "all",
) -> TokenFlow:
    """181,902,251 parameters (376,569,643 with the enhanced decoder), 561 tokens at 224 pixels; from
    OpenAI's CLIP ViT-B/16, in `weights`.
    """
    semantic = SemanticVision(**CLIP_B, weights=weights, preprocessing=AS_IS)  # type: ignore[arg-type]
    return _published(
        semantic,
        224,
        width=768,
        semantic_dim=512,
        teacher=teacher,
        stage=stage,
        enhanced=enhanced,
    )


def tokenflow_b_256(
    weights: str | None = None,
    teacher: Teacher | None = None,
    enhanced: bool = True,
    stage: Stage = "all",
) -> TokenFlow:
    """376,569,643 parameters, 817 tokens at 256 pixels, with the tables of positions of 224; the
    generator's.
    """
    semantic = SemanticVision(**CLIP_B, weights=weights, preprocessing=AS_IS)  # type: ignore[arg-type]
    return _published(
        semantic,
        256,
        width=768,
        semantic_dim=512,
        teacher=teacher,
        stage=stage,
        enhanced=enhanced,
    )


def tokenflow_l(
    weights: str | None = None, teacher: Teacher | None = None, stage: Stage = "all"
) -> TokenFlow:
    """559,964,139 parameters, 817 tokens at 256 pixels; from ViTamin-XL, in `weights`."""
    semantic = SemanticVision(**VITAMIN_XL, weights=weights)
    return _published(semantic, 256, width=1152, semantic_dim=1152, teacher=teacher, stage=stage)


def tokenflow_xl(
    weights: str | None = None, teacher: Teacher | None = None, stage: Stage = "all"
) -> TokenFlow:
    """554,009,963 parameters, 2,227 tokens at 384 pixels; from SigLIP-SO400M, in `weights`."""
    semantic = SemanticVision(**SIGLIP_SO400M, weights=weights)
    return _published(semantic, 384, width=1152, semantic_dim=1152, teacher=teacher, stage=stage)
