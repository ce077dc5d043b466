"""ReToK: a flexible 1D tokenizer with redundant token padding and semantic regularisation (arXiv
2601.01535).

A CNN makes a map, a Q-Former turns it into N ordered tokens followed by M = N - K redundant ones:
copies of all but the first K, which take the tail of nested dropout so that real tail tokens are
kept more often. A second Q-Former spreads the first k tokens over the map, a CNN with adaptive
norms draws it (architecture: GigaTok, arXiv 2504.08736). Different from the official code: all
sizes are arguments and k is given when decoding; nested dropout and the schedule of the semantic
loss, which the released code lacks, are inferred (`Inferred`).
"""

from dataclasses import dataclass
from math import log2
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.layers.cnn import Encoder, Sizes
from tessellar.layers.cnn_adaptive import AdaptiveDecoder
from tessellar.layers.precision import at_least_float32
from tessellar.layers.tags import tag, untag
from tessellar.networks.vision import Teacher
from tessellar.protocol.arguments import in_ranges
from tessellar.protocol.layout import sequence_layout
from tessellar.protocol.tokenizer import Quantizer, Tokenizer, TokenizerOutput
from tessellar.tokenizers.losses.alignment import cosine_distance, regrid
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.retok.qformer import (
    SIZES,
    QFormerSize,
    Spread,
    TokenDecoder,
    TokenEncoder,
    block_grid,
    init_weights,
)


@in_ranges
@dataclass(frozen=True)
class Inferred:
    """What the released code does not show: how many tokens are kept, and how much the teacher says
    then.

    k is uniform over the multiples of `multiple` in [`shortest`, `longest`] (None: K and N + M),
    one for each image or for a batch. The weight of the semantic loss falls from 1 at K tokens to 0
    at N (`linear`, `cosine`), or is constant.
    """

    nested_dropout: bool = True
    shortest: int | None = None
    longest: int | None = None
    multiple: int = 1
    one_length: bool = False
    semantic_schedule: Literal["linear", "cosine", "constant"] = "linear"

    def lengths(self, always: int, total: int) -> list[int]:
        """The numbers of tokens that nested dropout may keep, of K = `always` and `total` = N + M.

        Raises ValueError where there are none.
        """
        shortest = self.shortest or always
        longest = self.longest or total
        lengths = [k for k in range(shortest, longest + 1) if k % self.multiple == 0]
        if not lengths or not 1 <= shortest <= longest <= total:
            raise ValueError(
                f"nested dropout keeps [{shortest}, {longest}] tokens; there are {total} with redundant ones"
            )
        return lengths


class ReToK(Tokenizer):
    """Square images of `image_size` as `num_tokens` ordered tokens, decodable from the first
    `always` (K) on.

    `semantic_dim` channels of a decoder layer are compared with `teacher`'s patches in training,
    where there is one. `feature_weight` pulls the decoder's map to the encoder's for the first
    `feature_steps` training passes. `stage` "decoder" trains the decoders alone, on all N tokens.
    Raises ValueError for sizes that do not fit each other.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        image_size: int = 256,
        num_tokens: int = 256,
        always: int = 32,
        channels: int = 128,
        multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        z_channels: int = 256,
        encoder_size: QFormerSize = QFormerSize(512, 6, 8),  # noqa: B008
        decoder_size: QFormerSize = QFormerSize(768, 12, 12),  # noqa: B008
        semantic_dim: int | None = 768,
        semantic_layer: int = 3,
        semantic_weight: float = 0.5,
        teacher: Teacher | None = None,
        feature_weight: float = 0.0,
        feature_steps: int = 15_000,
        inferred: Inferred = Inferred(),  # noqa: B008
        stage: Literal["all", "decoder"] = "all",
        attention: str = "auto",
        decoder_multipliers: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        stride = 2 ** (len(multipliers) - 1)
        side = image_size // stride
        redundant = num_tokens - always
        _check_sizes(image_size, stride, num_tokens, always, semantic_layer, decoder_size.depth)
        self.image_size = (image_size, image_size)
        self.side = side
        self.num_tokens = num_tokens
        self.always = always
        self.redundant = redundant
        self.layout = sequence_layout(num_tokens, quantizer.kind, min_prefix=always)
        self.semantic_weight = semantic_weight
        self.feature_weight = feature_weight
        self.feature_steps = feature_steps
        self.inferred = inferred
        self.stage = stage
        self.teacher = teacher
        self.lengths = inferred.lengths(always, num_tokens + redundant)
        if teacher is not None and teacher.dim != semantic_dim:
            raise ValueError(
                f"semantic_dim is {semantic_dim}; the teacher's patches have {teacher.dim} channels"
            )
        sizes = Sizes(channels, tuple(multipliers), num_res_blocks, z_channels)
        self.encoder = Encoder(sizes, attention=(), middle_attention=False)
        self.token_encoder = TokenEncoder(
            side, num_tokens, redundant, z_channels, encoder_size, attention
        )
        self.token_decoder = TokenDecoder(
            side,
            num_tokens,
            redundant=redundant,
            z=z_channels,
            size=decoder_size,
            semantic_dim=semantic_dim,
            semantic_layer=semantic_layer,
            attention=attention,
        )
        self.decoder = AdaptiveDecoder(sizes.decoding(decoder_multipliers))
        init_weights(
            self,
            small=min(encoder_size.width, decoder_size.width, 2 * channels) < SIZES["tiny"].width,
        )
        self.to_code = nn.Linear(z_channels, quantizer.dim)
        self.from_code = nn.Linear(quantizer.dim, z_channels)
        self.quantizer = quantizer
        for parameter in self.parameters():
            # One group in the official optimizer: biases, norms and tables decay too.
            untag(parameter, "no_decay")
            tag(parameter, "decay")
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.passes: Tensor
        if stage == "decoder":
            for module in self._encoding:
                module.requires_grad_(False)

    @property
    def _encoding(self) -> tuple[nn.Module, ...]:
        return self.encoder, self.token_encoder, self.to_code, self.quantizer

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.conv_out.weight

    def train(self, mode: bool = True) -> "ReToK":
        """With stage "decoder" the encoding side stays in eval mode."""
        super().train(mode)
        if self.stage == "decoder":
            for module in self._encoding:
                module.eval()
        return self

    def latents(self, spatial: Tensor) -> Tensor:
        """Vectors before quantization of all tokens, redundant ones too, [B, N + M, C], of the
        encoder's map.
        """
        return self.to_code(self.token_encoder(spatial))

    def spread(self, vectors: Tensor, visible: Tensor | None = None) -> Spread:
        """The map of the code vectors [B, k, C] of the first k tokens."""
        return self.token_decoder(self.from_code(vectors.to(self.from_code.weight.dtype)), visible)

    def encode_all(self, images: Tensor) -> Tensor:
        """Tokens of the images with the redundant ones behind, [B, N + M]; generators get only the
        first N.
        """
        self.check_images(images)
        return self.quantizer.encode(self.latents(self.encoder(images)))

    def encode(self, images: Tensor) -> Tensor:
        return self.encode_all(images)[:, : self.num_tokens]

    def decode(self, tokens: Tensor) -> Tensor:
        """Images of the first k tokens [B, k], K <= k <= N."""
        self.layout.check(tokens)
        return self.decode_all(tokens)

    def decode_all(self, tokens: Tensor) -> Tensor:
        """As `decode`, of up to N + M tokens that `encode_all` gave."""
        return at_least_float32(self.decoder(self.spread(self.quantizer.decode(tokens)).spatial))

    def draw_lengths(self, batch: int) -> Tensor:
        """How many tokens each image keeps, int64 [B] on the CPU: drawn in training, N otherwise."""
        if not self.training or not self.inferred.nested_dropout or self.stage == "decoder":
            return torch.full((batch,), self.num_tokens, device="cpu")
        draws = torch.randint(
            len(self.lengths), (1 if self.inferred.one_length else batch,), device="cpu"
        )
        return torch.tensor(self.lengths, device="cpu")[draws].expand(batch)

    def forward(self, images: Tensor) -> TokenizerOutput:
        self.check_images(images)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.stage == "all"):
            spatial = self.encoder(images)
            quantized = self.quantizer(self.latents(spatial))
        # Images keep unequal numbers of tokens: all are spread at the longest length, and a mask
        # hides the rest of the others.
        kept = self.draw_lengths(len(images))
        longest = int(kept.max())
        visible = (
            (torch.arange(longest) < kept[:, None]).to(images.device)
            if int(kept.min()) < longest
            else None
        )
        found = self.spread(quantized.quantized[:, :longest], visible)
        losses = dict(quantized.losses) if self.stage == "all" else {}
        if self.training:
            losses |= self.training_losses(images, spatial, found, kept)
        reconstruction = at_least_float32(self.decoder(found.spatial))
        return TokenizerOutput(reconstruction, quantized.tokens[:, : self.num_tokens], losses)

    def training_losses(
        self, images: Tensor, spatial: Tensor, found: Spread, kept: Tensor
    ) -> dict[str, Tensor]:
        losses = {}
        if self.teacher is not None and found.semantic is not None and self.semantic_weight:
            target = regrid(self.teacher(images).patches, self.teacher.grid, (self.side, self.side))
            weight = self.semantic_factor(kept).to(images.device)
            losses["semantic"] = (
                self.semantic_weight * (weight * cosine_distance(found.semantic, target)).mean()
            )
        if self.feature_weight:
            # Early on the map behind the tokens is pulled to the CNN's own.
            distance = feature_distance(spatial, found.spatial)
            losses["feature"] = self.feature_weight * (self.passes < self.feature_steps) * distance
            self.passes += 1
        return losses

    def semantic_factor(self, kept: Tensor) -> Tensor:
        """What multiplies the semantic loss of images of which `kept` tokens [B] are seen."""
        progress = ((kept - self.always) / max(self.num_tokens - self.always, 1)).clamp(0, 1)
        match self.inferred.semantic_schedule:
            case "linear":
                return 1 - progress
            case "cosine":
                return (1 + torch.cos(torch.pi * progress)) / 2
            case _:
                return torch.ones_like(progress)


def feature_distance(spatial: Tensor, decoded: Tensor) -> Tensor:
    """Mean squared difference between the encoder's map, held constant, and the decoder's."""
    return F.mse_loss(at_least_float32(decoded), at_least_float32(spatial.detach()))


def _check_sizes(
    image_size: int, stride: int, tokens: int, always: int, semantic_layer: int, depth: int
) -> None:
    side = image_size // stride
    if image_size % stride:
        raise ValueError(f"the stride {stride} does not divide image_size {image_size}")
    if (
        tokens < 2
        or 2 ** int(log2(tokens)) != tokens
        or any(side % n for n in block_grid(int(log2(tokens))))
    ):
        raise ValueError(
            f"num_tokens is {tokens}; it must be a power of two whose blocks divide a map of {side}x{side}"
        )
    if not 1 <= always < tokens:
        raise ValueError(f"always is {always}; it must be in [1, {tokens - 1}]")
    if not 1 <= semantic_layer <= depth:
        raise ValueError(f"semantic_layer is {semantic_layer}; the decoder has {depth} layers")


def _published(
    decoder: str, teacher: Teacher | None, semantic_dim: int | None, feature_weight: float
) -> ReToK:
    quantizer = VectorQuantizer(16384, 8, rotation=True)
    size = SIZES[decoder]
    return ReToK(
        quantizer,
        decoder_size=size,
        semantic_dim=semantic_dim,
        teacher=teacher,
        feature_weight=feature_weight,
    )


def retok_s_s(
    teacher: Teacher | None = None, semantic_dim: int | None = 768, feature_weight: float = 0.0
) -> ReToK:
    """136,302,603 parameters (129,481,995 with semantic_dim None); 256 tokens of 16,384 codes at
    256 pixels.
    """
    return _published("small", teacher, semantic_dim, feature_weight)


def retok_s_b(
    teacher: Teacher | None = None, semantic_dim: int | None = 768, feature_weight: float = 0.0
) -> ReToK:
    """232,686,347 parameters (218,523,659 with semantic_dim None); 256 tokens of 16,384 codes at
    256 pixels.
    """
    return _published("base", teacher, semantic_dim, feature_weight)
