"""MingTok: a continuous tokenizer of three stages (Ming-UniVision, arXiv 2510.06590).

    image, some patches hidden -> encoder -> latents -> semantic decoder -> features -> pixels
                                                |       (causal)             |
                                     fine features of a teacher     features of a teacher

Generators predict the latents and read the features, one position at a time (`begin`). The authors
released no training code: losses, masks and stages here are our recipe, in the words of the paper's
abstract (masked modelling with supervision at several levels). Stage "pixels" then trains the pixel
decoder alone, on whole images.
"""

from collections.abc import Mapping
from math import isqrt
from typing import Literal, Self

import torch
from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.layers.kv_cache import KVCache
from tessellar.layers.precision import at_least_float32
from tessellar.layers.tags import tag
from tessellar.networks.vision import Teacher
from tessellar.protocol.entities import Entities
from tessellar.protocol.in_loop import LoopInputs, Streamed
from tessellar.protocol.layout import grid_layout
from tessellar.protocol.tokenizer import GridTokenizer, TokenizerOutput
from tessellar.tokenizers.losses.alignment import cosine_distance, regrid
from tessellar.tokenizers.mingtok.transformers import (
    FINER,
    Encoder,
    PixelDecoder,
    SemanticDecoder,
    patchify,
)
from tessellar.tokenizers.parts.hidden_patches import draw_places, spread, taken
from tessellar.tokenizers.quantizers.latent_norm import LatentNorm
from tessellar.tokenizers.titok.tokenizer import ViTSize

Stage = Literal["all", "pixels"]
#: Mean and standard deviation of the published latents.
PUBLISHED = (1.46817409, 8.09449291)


class MingTok(GridTokenizer):
    """Square images of `image_size` as a grid of latents, a patch each.

    `trained_size`: the image size whose grid the positions were learned on (None: the same).
    What follows is of training alone. `masked`: the share of hidden patches of a batch is drawn from
    this range (None: none is hidden, as in exports for generators). `teacher` gives features of
    `semantic_dim` channels to the semantic decoder, `detail_teacher` those of `detail_dim` to a
    linear layer on the latents. `reconstruct_hidden` False: pixels of hidden patches cost nothing.
    `stage` "pixels" trains the pixel decoder alone. Raises UserError for sizes that do not fit each
    other.
    """

    quantizer: LatentNorm

    def __init__(
        self,
        quantizer: LatentNorm,
        image_size: int = 512,
        patch_size: int = 32,
        encoder_size: ViTSize = ViTSize(768, 12, 12),  # noqa: B008
        semantic_size: ViTSize = ViTSize(1024, 24, 16),  # noqa: B008
        pixel_size: ViTSize = ViTSize(1024, 24, 16),  # noqa: B008
        trained_size: int | None = None,
        masked: tuple[float, float] | None = None,
        reconstruct_hidden: bool = True,
        teacher: Teacher | None = None,
        semantic_dim: int | None = None,
        semantic_weight: float = 1.0,
        detail_teacher: Teacher | None = None,
        detail_dim: int | None = None,
        detail_weight: float = 0.5,
        stage: Stage = "all",
        attention: str = "auto",
    ) -> None:
        super().__init__()
        trained_size = trained_size or image_size
        for size in (image_size, trained_size):
            if patch_size % FINER or size < patch_size or size % patch_size:
                raise UserError(
                    f"patch_size {patch_size} must be even and divide the image size {size}"
                )
        if masked is not None and not masked[0] <= masked[1] < 1:
            raise UserError(f"masked is {masked}; it must be a range below 1")
        check_teacher("semantic_dim", semantic_dim, teacher)
        check_teacher("detail_dim", detail_dim, detail_teacher)
        if stage not in ("all", "pixels"):
            raise UserError(f'stage is {stage!r}; it must be "all" or "pixels"')
        side = image_size // patch_size
        self.image_size = (image_size, image_size)
        self.side = side
        self.layout = grid_layout(side, side, quantizer.kind, "latents")
        self.masked = masked
        self.reconstruct_hidden = reconstruct_hidden
        self.teacher = teacher
        self.semantic_weight = semantic_weight
        self.detail_teacher = detail_teacher
        self.detail_weight = detail_weight
        self.stage = stage
        self.encoder = Encoder(
            trained_size // patch_size,
            patch_size,
            size=encoder_size,
            dim=quantizer.dim,
            attention=attention,
        )
        self.quantizer = quantizer
        self.semantic_decoder = SemanticDecoder(quantizer.dim, semantic_size, attention)
        width = semantic_size.width
        self.pixel_decoder = PixelDecoder(patch_size, width, size=pixel_size, attention=attention)
        # Of training alone; no published file has them.
        self.hidden_latent = None
        if masked is not None:
            self.hidden_latent = tag(nn.Parameter(torch.zeros(1, 1, quantizer.dim)), "no_decay")
        self.semantic_head = None if semantic_dim is None else nn.Linear(width, semantic_dim)
        self.detail_head = None if detail_dim is None else nn.Linear(quantizer.dim, detail_dim)
        self.init_weights()
        if stage == "pixels":
            self.requires_grad_(False)
            self.pixel_decoder.requires_grad_(True)

    def init_weights(self) -> None:
        """Initialisation (ours).

        | weight                         | distribution         |
        |--------------------------------|----------------------|
        | linear layers                  | truncated N(0, 0.02) |
        | positions, class token         | truncated N(0, 0.02) |
        | what stands for hidden latents | 0                    |
        | biases                         | 0                    |
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for table in (self.encoder.positions, self.encoder.class_token):
            nn.init.trunc_normal_(table, std=0.02)

    def train(self, mode: bool = True) -> Self:
        """In stage "pixels" all but the pixel decoder stays in eval mode."""
        super().train(mode and self.stage == "all")
        self.training = mode
        self.pixel_decoder.train(mode)
        return self

    @property
    def last_layer(self) -> Tensor:
        return self.pixel_decoder.to_pixels.weight

    @property
    def input_dim(self) -> int:
        """Channels of the features that a generator reads."""
        return self.semantic_decoder.size.width

    def latents(self, images: Tensor) -> Tensor:
        """Latents [B, N, C] of all patches, as the encoder gives them."""
        self.check_images(images)
        return self.encoder(images)[:, :-1]

    def semantics(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Features [B, n, D] of tokens [B, n, C]: the first ones, or those behind what a cache holds,
        which keeps them.
        """
        return self.semantic_decoder(self.quantizer.decode(tokens), cache)

    def begin(self, entities: Entities, batch: int, window: int | None) -> LoopInputs:
        """Features as inputs of a generator (`InLoop`); raises UserError for an order that is not
        one token after the other.
        """
        raster = torch.arange(len(entities.sizes))
        if set(entities.sizes) != {1} or not torch.equal(entities.order.cpu(), raster):
            raise UserError(
                "MingTok's features are made of one token after the other, in raster order"
            )
        cache = None
        if window is not None:
            cache = self.semantic_decoder.new_cache(batch, entities.count + window)
        return Streamed(self.semantics, cache)

    def render(self, vectors: Tensor) -> Tensor:
        return at_least_float32(self.pixel_decoder(self.semantic_decoder(vectors)))

    def forward(self, images: Tensor) -> TokenizerOutput:
        if not self.training:
            return super().forward(images)
        if self.stage == "pixels":
            with torch.no_grad():
                latents = self.latents(images)
                features = self.semantic_decoder(latents)
            reconstruction = at_least_float32(self.pixel_decoder(features))
            return TokenizerOutput(reconstruction, self.quantizer.encode(latents), {})
        self.check_images(images)
        places = None
        if self.masked is not None:
            places = draw_places(self.masked, len(images), self.side**2)
            places = None if places is None else places.to(images.device)
        return self.masked_forward(images, places)

    def masked_forward(self, images: Tensor, places: Tensor | None) -> TokenizerOutput:
        """The training pass that sees the patches at `places` [B, n] (None: all)."""
        latents = self.encoder(images, places)[:, :-1]
        quantized = self.quantizer(latents)
        tokens = quantized.tokens.detach()
        if places is not None:
            assert self.hidden_latent is not None
            others = self.hidden_latent.expand(len(latents), self.side**2, -1)
            latents = spread(quantized.quantized, places, others)
            # Every position has its token, though this pass encoded only some.
            tokens = spread(tokens, places, torch.zeros_like(latents))
        features = self.semantic_decoder(latents)
        losses = {}
        if self.teacher is not None:
            target = self.on_grid(self.teacher, images)
            losses["semantic"] = self.semantic_weight * self.semantic_loss(features, target)
        if self.detail_teacher is not None:
            target = self.on_grid(self.detail_teacher, images)
            seen = quantized.quantized
            if places is not None:
                target = taken(target, places)
            losses["detail"] = self.detail_weight * self.detail_loss(seen, target)
        reconstruction = at_least_float32(self.pixel_decoder(features))
        if places is not None and not self.reconstruct_hidden:
            shown = torch.ones_like(places, dtype=torch.bool)[..., None]
            hidden = ~spread(shown, places, torch.zeros_like(tokens[..., :1], dtype=torch.bool))
            reconstruction = torch.where(self.pixels_of(hidden), images, reconstruction)
        return TokenizerOutput(reconstruction, tokens, losses)

    def on_grid(self, teacher: Teacher, images: Tensor) -> Tensor:
        """Features [B, N, D] of a teacher, one a patch of ours."""
        features = teacher(images).patches
        own = isqrt(features.shape[1])
        return regrid(features, (own, own), (self.side, self.side))

    def pixels_of(self, patches: Tensor) -> Tensor:
        """Values [B, N, 1] of patches at each of their pixels, [B, 1, H, W]."""
        size = self.image_size[0] // self.side
        maps = patches.unflatten(1, (self.side, self.side)).movedim(-1, 1)
        return maps.repeat_interleave(size, -1).repeat_interleave(size, -2)

    def semantic_loss(self, features: Tensor, target: Tensor) -> Tensor:
        """1 - cosine of features [B, N, D], of hidden patches too, to a teacher's."""
        if self.semantic_head is None:
            raise UserError("this MingTok has no semantic head: give semantic_dim")
        return cosine_distance(self.semantic_head(features), target).mean()

    def detail_loss(self, latents: Tensor, target: Tensor) -> Tensor:
        """1 - cosine of a linear layer of latents [B, n, C] to a teacher's fine features."""
        if self.detail_head is None:
            raise UserError("this MingTok has no detail head: give detail_dim")
        return cosine_distance(self.detail_head(latents), target).mean()

    def starting_from(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What only another one's training has is left out."""
        own = self.state_dict().keys()
        of_training = ("hidden_latent", "semantic_head.", "detail_head.")
        return {
            name: tensor
            for name, tensor in state.items()
            if name in own or not name.startswith(of_training)
        }


def check_teacher(name: str, dim: int | None, teacher: Teacher | None) -> None:
    """Raise UserError unless a teacher's patches have as many channels as its head gives."""
    if teacher is not None and teacher.dim != dim:
        raise UserError(f"{name} is {dim}; the teacher's patches have {teacher.dim} channels")


def visible_l1(
    reconstruction: Tensor, images: Tensor, patch_size: int, hidden: Tensor | None = None
) -> Tensor:
    """Mean |difference| over patches of `patch_size`, or over those that `hidden` [B, N], 1 where
    hidden, of patches twice as large a side, leaves (the official loss "L1-plain").
    """
    difference = patchify(reconstruction, patch_size) - patchify(images, patch_size)
    each = difference.abs().mean(-1)
    if hidden is None:
        return each.mean()
    side = isqrt(hidden.shape[1])
    grid = hidden.unflatten(1, (side, side))
    finer = grid.repeat_interleave(FINER, -1).repeat_interleave(FINER, -2).flatten(1)
    shown = 1 - finer.to(each.dtype)
    return (each * shown).sum() / shown.sum()


def mingtok_512(
    image_size: int = 512,
    mean: float | None = None,
    deviation: float | None = None,
    masked: tuple[float, float] | None = None,
    teacher: Teacher | None = None,
    semantic_dim: int | None = None,
    detail_teacher: Teacher | None = None,
    detail_dim: int | None = None,
    stage: Stage = "all",
) -> MingTok:
    """697,719,584 parameters without what only training has; 16 x 16 latents of 32 channels at 512
    pixels. The published `mean` and `deviation` of latents are `PUBLISHED`.
    """
    return MingTok(
        LatentNorm(32, mean, deviation),
        image_size,
        trained_size=512,
        masked=masked,
        teacher=teacher,
        semantic_dim=semantic_dim,
        detail_teacher=detail_teacher,
        detail_dim=detail_dim,
        stage=stage,
    )
