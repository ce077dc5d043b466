"""Semanticist: an image as slots of which each explains what those before it left (arXiv
2503.08685).

A causal ViT writes 256 slots of 16 channels, each standardised over its channels; a diffusion
transformer draws the latents of a frozen VAE, with the slots in its sequence. Nested dropout keeps
a random prefix and puts learned nulls behind it, so that any prefix decodes and slots come in order
of the variance that they explain. Different from the official code: the nested phase is counted in
training passes of the weights, an image's noise comes from a stream of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.absent import stays_random
from tessellar.layers.precision import at_least_float32
from tessellar.networks.vision import Teacher
from tessellar.processes.diffusion import (
    TRAINING_STEPS,
    Diffusion,
    ancestral_diffusion,
    kept_steps,
    linear_process,
    respaced,
)
from tessellar.protocol.layout import Continuous, sequence_layout
from tessellar.protocol.noise import Noise
from tessellar.protocol.ranges import check_number, check_whole
from tessellar.protocol.tokenizer import Tokenizer, TokenizerOutput
from tessellar.tokenizers.kl_vae import KLVAE, kl16
from tessellar.tokenizers.kl_vae.tokenizer import KL16_SCALE
from tessellar.tokenizers.losses.alignment import cosine_distance
from tessellar.tokenizers.parts.inner import inner_tokenizer
from tessellar.tokenizers.parts.latent_maps import (
    LatentMaps,
    grid_of,
    kept_lengths,
    streams_of,
)
from tessellar.tokenizers.semanticist.transformers import SlotDiT, SlotEncoder
from tessellar.tokenizers.titok import ViTSize
from tessellar.tokenizers.titok.tokenizer import SIZES


@dataclass(frozen=True)
class SlotDecoding:
    """How `decode` draws: respaced steps, guidance, and the scale of their noise.

    Guidance 1 is none, as generated slots are decoded; the README reconstructs with 3.
    """

    steps: int = 250
    guidance: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_whole("steps of the diffusion decoder", self.steps, 2, TRAINING_STEPS)
        check_number("guidance of the diffusion decoder", self.guidance, least=0)
        check_number("temperature of the diffusion decoder", self.temperature, least=0)


@dataclass(frozen=True)
class SlotTraining:
    """What a training pass draws and weighs.

    For `nested_after` passes, images lose all slots with probability `null`; from then on each
    keeps a uniform number of them, at least 1. `repa_weight` multiplies REPA. `sample_posterior`:
    latents are drawn from the VAE's posterior, else its mode.
    """

    nested_after: int = 0
    null: float = 0.1
    repa_weight: float = 1.0
    sample_posterior: bool = True

    def __post_init__(self) -> None:
        check_whole("nested_after", self.nested_after, least=0)
        check_number("null", self.null, least=0, most=1)
        check_number("repa_weight", self.repa_weight, least=0)


class Semanticist(LatentMaps):
    """Square images as `num_slots` ordered slots of `slot_dim` channels, decodable from the first
    on.

    `vae` (or the path of one) gives the latents that are drawn; it is frozen and part of the
    weights. None: pixels are drawn, in patches of `decoder_patch_size`. `repa_dim` makes the
    projection to a `teacher` of that many channels, behind `tap` blocks of the decoder. Raises
    ValueError for sizes that do not fit each other.
    """

    passes: Tensor

    def __init__(
        self,
        image_size: int = 256,
        patch_size: int = 16,
        num_slots: int = 256,
        slot_dim: int = 16,
        vae: Tokenizer | str | None = None,
        decoder_patch_size: int = 2,
        encoder_size: ViTSize = SIZES["base"],
        decoder_size: ViTSize = SIZES["large"],
        drop_path: float = 0.1,
        decoding: SlotDecoding = SlotDecoding(),  # noqa: B008
        training_settings: SlotTraining = SlotTraining(),  # noqa: B008
        repa_dim: int | None = None,
        teacher: Teacher | None = None,
        tap: int = 8,
        attention: str = "auto",
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"patch_size {patch_size} does not divide image_size {image_size}")
        if slot_dim < 2 or num_slots < 1:
            raise ValueError(
                f"Semanticist has at least 1 slot of 2 channels, not {num_slots} of {slot_dim}"
            )
        if teacher is not None and teacher.dim != repa_dim:
            raise ValueError(
                f"repa_dim is {repa_dim}; the teacher's patches have {teacher.dim} channels"
            )
        inner = None if vae is None else inner_tokenizer(self, vae, "vae")
        if inner is not None and not isinstance(inner, KLVAE):
            raise ValueError(f"the latents are those of a KLVAE, not of {type(inner).__name__}")
        self.grid = grid_of(inner, image_size, decoder_patch_size, None)
        self.image_size = (image_size, image_size)
        self.num_slots = num_slots
        self.layout = sequence_layout(num_slots, Continuous(slot_dim), min_prefix=1)
        self.decoding = decoding
        self.training_settings = training_settings
        self.teacher = teacher
        self.vae = None if inner is None else inner.eval().requires_grad_(False)
        self.encoder = SlotEncoder(
            image_size // patch_size,
            patch_size,
            num_slots=num_slots,
            size=encoder_size,
            drop_path=drop_path,
            attention=attention,
        )
        self.to_slot = nn.Linear(encoder_size.width, slot_dim)
        self.decoder = SlotDiT(
            self.grid,
            num_slots,
            slot_dim=slot_dim,
            size=decoder_size,
            repa_dim=repa_dim,
            tap=tap,
            attention=attention,
        )
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.head.weight

    def slots(self, images: Tensor, count: int | None = None) -> Tensor:
        """The first `count` slots [B, n, C] of images (None: all), standardised."""
        self.check_images(images)
        return standardised(self.to_slot(self.encoder((images + 1) / 2, count)))

    def encode(self, images: Tensor, length: int | None = None) -> Tensor:
        """The first `length` slots (None: all); the encoder computes no more than those."""
        self.check_length(length)
        return self.slots(images, length)

    def decode(
        self,
        tokens: Tensor,
        steps: int | None = None,
        guidance: float | None = None,
        noise: Noise | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Images of the first k slots [B, k, C], or of `lengths` [B] of them; image b is drawn by
        stream b of `noise`.

        Without `noise` an image's stream is seeded by its first slot, so that all prefixes of an
        image start from the same noise and a batch changes nothing. `steps` and `guidance` default
        to `decoding`'s. Raises ValueError for lengths that are not in [1, k].
        """
        self.layout.check(tokens)
        noise = streams_of(tokens, noise, seeds_of)
        kept = kept_lengths(tokens, lengths)
        how = self.decoding
        how = how if steps is None else replace(how, steps=steps)
        how = how if guidance is None else replace(how, guidance=guidance)
        return self.render(self.denoise(tokens, kept, how, noise))

    def decode_seeded(self, tokens: Tensor, seeds: Sequence[int]) -> Tensor:
        return self.decode(tokens, noise=Noise(seeds, tokens.device))

    @torch.no_grad()
    def denoise(self, slots: Tensor, kept: Tensor, decoding: SlotDecoding, noise: Noise) -> Tensor:
        """Maps [B, C, h, w] drawn under the first `kept` [B] of slots [B, k, C]."""
        dtype = self.decoder.head.weight.dtype
        slots = slots.to(dtype)
        batch = len(slots)
        given = self.decoder.fill(slots, kept)
        if decoding.guidance != 1:
            # All images are drawn twice at once: under their slots, and under none.
            given = torch.cat([given, self.decoder.fill(slots, torch.zeros_like(kept))])

        def model(x: Tensor, t: Tensor) -> Tensor:
            maps = maps_of(x, self.grid.side).to(dtype).repeat(len(given) // batch, 1, 1, 1)
            found = self.decoder(maps, t.to(x.device).expand(len(maps)), given)
            eps = at_least_float32(found.eps)
            if decoding.guidance != 1:
                conditional, null = eps.chunk(2)
                eps = null + decoding.guidance * (conditional - null)
            # The variance stays the conditional one.
            share = at_least_float32(found.share[:batch])
            return torch.cat([latents_of(eps), latents_of(share)], -1)

        x = ancestral_diffusion(
            model,
            process_of(decoding.steps),
            (self.grid.side**2, self.grid.channels),
            noise=noise,
            temperature=decoding.temperature,
        )
        return maps_of(x, self.grid.side)

    def forward(self, images: Tensor) -> TokenizerOutput:
        """In training the losses `diffusion`, `bound` and `repa`, already weighted, and no
        reconstruction; in eval mode the decoded image, as of any tokenizer.
        """
        if not self.training:
            tokens = self.encode(images)
            return TokenizerOutput(self.decode(tokens), tokens, {})
        slots = self.slots(images)
        latents = self.latents(images, self.training_settings.sample_posterior)
        t = torch.randint(TRAINING_STEPS, (len(images),), device=images.device)
        kept = self.draw_kept(len(images))
        losses = self.losses(images, latents, slots, kept, t, torch.randn_like(latents))
        self.passes += 1
        return TokenizerOutput(images[:, :0], slots.detach(), losses)

    def draw_kept(self, batch: int) -> Tensor:
        """How many slots each image of a training pass keeps, [B]; 0 is none."""
        how = self.training_settings
        device = self.passes.device
        nested = torch.randint(1, self.num_slots + 1, (batch,), device=device)
        whole = (torch.rand(batch, device=device) >= how.null) * self.num_slots
        return torch.where(self.passes >= how.nested_after, nested, whole)

    def losses(
        self,
        images: Tensor,
        latents: Tensor,
        slots: Tensor,
        kept: Tensor,
        t: Tensor,
        noise: Tensor,
    ) -> dict[str, Tensor]:
        """Losses at steps t [B] with noise [B, C, h, w], under the first `kept` [B] slots."""
        process = linear_process()
        clean = at_least_float32(latents).flatten(1)
        flat = at_least_float32(noise).flatten(1)
        noisy = process.noisy(clean, t, flat).view_as(latents).to(latents.dtype)
        found = self.decoder(noisy, t, self.decoder.fill(slots, kept))
        eps = at_least_float32(found.eps).flatten(1)
        share = at_least_float32(found.share).flatten(1)
        error, bound = process.losses(eps, share, clean, t, flat)
        losses = {"diffusion": error.mean(), "bound": bound.mean()}
        if self.teacher is not None and found.features is not None:
            weight = self.training_settings.repa_weight
            losses["repa"] = weight * self.repa(found.features, images)
        return losses

    def repa(self, features: Tensor, images: Tensor) -> Tensor:
        """Mean of -cos between projected features [B, n, D], resized to the teacher's grid, and its
        patches.
        """
        assert self.teacher is not None
        maps = rearrange(at_least_float32(features), "b (h w) d -> b d h w", h=self.grid.patches)
        resized = F.interpolate(maps, self.teacher.grid, mode="bicubic")
        own = rearrange(resized, "b d h w -> b (h w) d")
        return cosine_distance(own, self.teacher(images).patches).mean() - 1


def standardised(slots: Tensor) -> Tensor:
    """Slots [..., C] less their mean over their unbiased standard deviation, which has no epsilon."""
    slots = at_least_float32(slots)
    return (slots - slots.mean(-1, keepdim=True)) / slots.std(-1, keepdim=True)


def seeds_of(slots: Tensor) -> list[int]:
    """A seed for each of slots [B, C], of their rounded values: float noise rarely changes it."""
    seeds = []
    for values in (4 * at_least_float32(slots)).round().long().tolist():
        seed = 0
        for value in values:
            seed = (seed * 1_000_003 + value) % 2**62
        seeds.append(seed)
    return seeds


def maps_of(latents: Tensor, side: int) -> Tensor:
    return rearrange(latents, "b (h w) c -> b c h w", h=side)


def latents_of(maps: Tensor) -> Tensor:
    return rearrange(maps, "b c h w -> b (h w) c").contiguous()


@lru_cache
def process_of(steps: int) -> Diffusion:
    """The process of training, respaced to that many steps."""
    return respaced(linear_process(), kept_steps(steps))


NESTED_AFTER = 31_250  # 50 epochs of 625 batches of 2,048


def _published(
    decoder: ViTSize, vae_weights: str | None, repa_dim: int | None, teacher: Teacher | None
) -> Semanticist:
    vae = kl16(scale=KL16_SCALE)
    on_meta = torch.get_default_device().type == "meta"
    if vae_weights is not None and not on_meta and not stays_random(vae_weights):
        from tessellar.tokenizers.semanticist.official_vae import load_vae

        vae = load_vae(vae_weights, vae.image_size[0])
    return Semanticist(
        vae=vae,
        decoder_size=decoder,
        training_settings=SlotTraining(nested_after=NESTED_AFTER),
        repa_dim=repa_dim,
        teacher=teacher,
    )


def semanticist_l(
    vae_weights: str | None = None, repa_dim: int | None = 768, teacher: Teacher | None = None
) -> Semanticist:
    """551,169,680 parameters without the VAE: 86,237,952 encoder, 464,919,424 decoder.

    `vae_weights`: MAR's `kl16.ckpt` or an export of it; without it the VAE waits for a state dict.
    """
    return _published(ViTSize(1024, 24, 16), vae_weights, repa_dim, teacher)


def semanticist_xl(
    vae_weights: str | None = None, repa_dim: int | None = 768, teacher: Teacher | None = None
) -> Semanticist:
    """768,326,544 parameters without the VAE: 86,237,952 encoder, 682,076,288 decoder."""
    return _published(ViTSize(1152, 28, 16), vae_weights, repa_dim, teacher)
