"""ResTok: tokens in levels from coarse to fine, from a transformer with hierarchical residuals
(arXiv 2601.03955).

A CNN makes a map, a transformer (`restok_vit.py`) N latents in levels of 1, 1, 2, 4, .., N / 2;
nested dropout makes any coarse prefix decodable. In training the coarsest image tokens and a branch
of the decoder follow a vision model. The released weights read the latents without transposing them
(`legacy`); new models do it right. Pair it with HAR.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.layers.cnn import Sizes
from tessellar.layers.starts import start_layers
from tessellar.networks.vision import Teacher
from tessellar.protocol.layout import sequence_layout
from tessellar.protocol.tokenizer import Quantizer, Tokenizer, TokenizerOutput
from tessellar.tokenizers.losses.alignment import cosine_distance, regrid
from tessellar.tokenizers.maskgit_vqgan.tokenizer import Decoder, Encoder
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.restok.transformers import (
    Encoded,
    Grid,
    Merge,
    ResTokDecoder,
    ResTokEncoder,
    level_sizes,
)

PUBLISHED_WIDTH = 1024  # of ResTok-L's transformers
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def keep_probabilities(length: int, shortest: int, share: float) -> dict[int, float]:
    """Probability of keeping n = `shortest`, twice that, .., N tokens: `share` in all below N,
    doubling with n.
    """
    count = (length // shortest).bit_length() - 1
    kept = {}
    for i in range(count):
        kept[shortest << i] = share * 2**i / (2**count - 1)  # weights 1, 2, 4, ...
    return {**kept, length: 1 - sum(kept.values())}


class ResTok(Tokenizer):
    """Square images of `image_size` as N = `num_tokens` codes, decodable from the first
    `min_tokens` on.

    `drop` is the share of training samples of which only a prefix is kept. `vision_dim` makes the
    projections that a `teacher` of that many channels needs. Raises ValueError where sizes do not
    fit each other.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        image_size: int = 256,
        num_tokens: int = 128,
        min_tokens: int = 4,
        channels: int = 128,
        multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        z_channels: int = 256,
        encoder_width: int = 1024,
        encoder_depth: int = 24,
        encoder_heads: int = 16,
        decoder_width: int = 1024,
        decoder_depth: int = 24,
        decoder_heads: int = 16,
        stages: int = 4,
        merge: Merge = "nearest",
        drop: float = 0.2,
        legacy: bool = False,
        teacher: Teacher | None = None,
        vision_dim: int | None = None,
        vision_weight: float = 1.0,
        vision_margin: float = 0.25,
        attention: str = "auto",
    ) -> None:
        super().__init__()
        stride = 2 ** (len(multipliers) - 1)
        if image_size % stride:
            raise ValueError(f"the stride {stride} does not divide image_size {image_size}")
        if teacher is not None and teacher.dim != vision_dim:
            raise ValueError(
                f"vision_dim is {vision_dim}; the teacher's patches have {teacher.dim} channels"
            )
        self.image_size = (image_size, image_size)
        side = image_size // stride
        self.sizes = level_sizes(num_tokens)
        self.legacy = legacy
        self.teacher = teacher
        self.layout = sequence_layout(num_tokens, quantizer.kind, min_prefix=min_tokens)
        self.vision_weight = vision_weight
        self.vision_margin = vision_margin
        self.keeps = keep_probabilities(num_tokens, min_tokens, drop)
        sizes = Sizes(channels, tuple(multipliers), num_res_blocks, z_channels)
        grid = (side, side)
        encoder = (encoder_width, encoder_depth, encoder_heads, stages, merge, attention)
        decoder = (decoder_width, decoder_depth, decoder_heads, vision_dim is not None, attention)
        self.cnn_encoder = Encoder(sizes)
        self.cnn_decoder = Decoder(sizes)
        self.encoder = ResTokEncoder(grid, z_channels, num_tokens, *encoder)
        self.decoder = ResTokDecoder(grid, quantizer.dim, z_channels, num_tokens, *decoder)
        self.to_code = nn.ModuleList(
            nn.Conv1d(encoder_width, quantizer.in_dim, 1) for _ in self.sizes
        )
        # As published, over both CNNs too; the tokens have N(0, 1 / width), the projections to
        # vision torch's default.
        small = min(encoder_width, decoder_width) < PUBLISHED_WIDTH
        start_layers(self, (nn.Linear, nn.Conv1d, nn.Conv2d), small)
        self.quantizer = quantizer
        self.encoder_to_vision = (
            nn.Linear(encoder_width, vision_dim, bias=False) if vision_dim else None
        )
        self.decoder_to_vision = (
            nn.Linear(decoder_width, vision_dim, bias=False) if vision_dim else None
        )
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    @property
    def last_layer(self) -> Tensor:
        return self.cnn_decoder.conv_out.weight

    def features(self, images: Tensor) -> Tensor:
        """The CNN's map of images in [-1, 1]."""
        self.check_images(images)
        normalised = ((images + 1) / 2 - self.mean) / self.std
        return self.cnn_encoder(normalised.to(images.dtype))

    def latents(self, encoded: Encoded) -> Tensor:
        """Vectors before quantization [B, N, c]; `legacy` reads the memory of [B, N, D] as [B, D,
        N].
        """
        h = encoded.latents
        channels = (
            h.reshape(h.shape[0], h.shape[2], h.shape[1]) if self.legacy else h.transpose(1, 2)
        )
        parts = zip(channels.split(self.sizes, 2), self.to_code, strict=True)
        return rearrange(torch.cat([conv(part) for part, conv in parts], 2), "b c n -> b n c")

    def render(self, codes: Tensor, keep: Tensor | None = None) -> Tensor:
        """Images of code vectors [B, N, c], of which the first `keep` [B] count."""
        maps = self.decoder(codes.to(self.decoder.output.weight.dtype), keep)
        with torch.autocast(maps.device.type, enabled=False):
            # float32, but in a model that was cast itself
            dtype = next(self.cnn_decoder.parameters()).dtype
            return 2 * self.cnn_decoder(maps.to(dtype)) - 1

    def encode(self, images: Tensor) -> Tensor:
        return self.quantizer.encode(self.latents(self.encoder(self.features(images))))

    def decode(self, tokens: Tensor) -> Tensor:
        """Images of N tokens, or of the first n."""
        self.layout.check(tokens)
        missing = self.layout.length - tokens.shape[1]
        codes = F.pad(self.quantizer.decode(tokens), (0, 0, 0, missing))
        return self.render(codes, torch.full((len(tokens),), tokens.shape[1]) if missing else None)

    def forward(self, images: Tensor) -> TokenizerOutput:
        return self.forward_with(images, self.draw_keep(len(images)) if self.training else None)

    def draw_keep(self, batch: int) -> Tensor:
        """How many tokens of each sample are kept, [B], from `keeps`."""
        counts, weights = zip(*self.keeps.items(), strict=True)
        return torch.tensor(counts)[
            torch.multinomial(torch.tensor(weights), batch, replacement=True)
        ]

    def forward_with(self, images: Tensor, keep: Tensor | None) -> TokenizerOutput:
        """The training pass with the first `keep` [B] tokens of each image (None: all)."""
        encoded = self.encoder(self.features(images))
        quantized = self.quantizer(self.latents(encoded))
        losses = dict(quantized.losses)
        if self.teacher is not None and self.training:
            found = self.teacher(images)
            prefix = found.prefix[:, 0] if found.prefix.shape[1] else found.patches.mean(1)
            given = (prefix, found.patches, self.teacher.grid)
            losses["vision"] = self.vision_loss(encoded, quantized.quantized, keep, *given)
        return TokenizerOutput(self.render(quantized.quantized, keep), quantized.tokens, losses)

    def vision_loss(
        self,
        encoded: Encoded,
        codes: Tensor,
        keep: Tensor | None,
        pooled: Tensor,
        patches: Tensor,
        grid: Grid,
    ) -> Tensor:
        """Both cosine losses with a margin: coarsest image tokens to the class token, decoder cells
        to the patches.
        """
        assert self.encoder_to_vision is not None and self.decoder_to_vision is not None
        coarsest = self.encoder_to_vision(encoded.coarsest).mean(1, keepdim=True)
        cells = self.decoder_to_vision(
            self.decoder.features(codes.to(self.decoder.output.weight.dtype), keep)
        )
        target = regrid(patches, grid, self.decoder.grid)
        encoder = cosine_distance(coarsest, pooled[:, None], self.vision_margin).mean()
        return self.vision_weight * (
            encoder + cosine_distance(cells, target, self.vision_margin).mean()
        )


def restok_l_128(teacher: Teacher | None = None, image_size: int = 256) -> ResTok:
    """659,693,771 parameters; 661,791,947 with the projections for a teacher of 1,024 channels."""
    return ResTok(
        VectorQuantizer(8192, 8, unit_codes=False),
        image_size,
        teacher=teacher,
        vision_dim=1024 if teacher else None,
    )
