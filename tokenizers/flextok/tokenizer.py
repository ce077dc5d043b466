"""FlexTok: an image as an ordered sequence of tokens, any prefix of which decodes (arXiv
2502.13967).

A transformer reads the latents of a frozen VAE (or the pixels) into causal registers, which FSQ
quantizes; a rectified flow, conditioned on the first k registers, draws the latents. Nested dropout
draws k for each training image, REPA (arXiv 2410.06940) aligns early features of the decoder with a
vision model's. Different from the official code: it has no trainer (the loss and what its
configuration names are built here), encoding takes the mode of the VAE's posterior.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from tessellar.layers.precision import at_least_float32
from tessellar.networks.vision import Teacher
from tessellar.processes import flow
from tessellar.protocol.layout import Categorical, sequence_layout
from tessellar.protocol.noise import Noise
from tessellar.protocol.tokenizer import Quantizer, TokenizerOutput
from tessellar.tokenizers.flextok.flow_decoding import (
    FlowDecoding,
    FlowTraining,
    Scale,
    flow_loss,
    solve,
)
from tessellar.tokenizers.flextok.transformer import (
    Decoder,
    Encoder,
    TransformerSize,
    Velocity,
)
from tessellar.tokenizers.flextok.vae import flextok_vae
from tessellar.tokenizers.kl_vae import KLVAE
from tessellar.tokenizers.losses.alignment import cosine_distance, projection, regrid
from tessellar.tokenizers.parts.latent_maps import (
    LatentMaps,
    grid_of,
    kept_lengths,
    streams_of,
)
from tessellar.tokenizers.quantizers.fsq import FSQ

LEVELS = (8, 8, 8, 5, 5, 5)


class FlexTok(LatentMaps):
    """Square images as `num_tokens` ordered tokens, decodable from the first on.

    `vae` gives the latents that the flow draws; it is frozen and part of the weights. None: the
    flow draws pixels. `repa_dim` channels of a projection of the patches behind block `tap` are
    compared with `teacher`'s. `decoding` is what `decode` does unless told otherwise. `table` is
    the side of the tables of positions (None: the grid's). Raises ValueError for sizes that do not
    fit each other.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        image_size: int = 256,
        num_tokens: int = 256,
        vae: KLVAE | None = None,
        patch_size: int = 2,
        encoder_size: TransformerSize = TransformerSize(768, 12),  # noqa: B008
        decoder_size: TransformerSize = TransformerSize(768, 12),  # noqa: B008
        decoding: FlowDecoding = FlowDecoding(),  # noqa: B008
        training_settings: FlowTraining = FlowTraining(),  # noqa: B008
        repa_dim: int | None = None,
        teacher: Teacher | None = None,
        tap: int = 1,
        null: Literal["learned", "zero"] = "learned",
        max_timestep: float = 1.0,
        table: int | None = None,
        attention: str = "auto",
    ) -> None:
        super().__init__()
        grid = grid_of(vae, image_size, patch_size, table)
        if not isinstance(quantizer.kind, Categorical) or num_tokens < 1:
            raise ValueError(
                f"FlexTok needs one id a token and at least 1 token, not {num_tokens} of {quantizer.kind}"
            )
        if teacher is not None and teacher.dim != repa_dim:
            raise ValueError(
                f"repa_dim is {repa_dim}; the teacher's patches have {teacher.dim} channels"
            )
        self.image_size = (image_size, image_size)
        self.num_tokens = num_tokens
        self.grid = grid
        self.layout = sequence_layout(num_tokens, quantizer.kind, min_prefix=1)
        self.decoding = decoding
        self.training_settings = training_settings
        self.teacher = teacher
        code_dim = quantizer.in_dim
        self.vae = None if vae is None else vae.eval().requires_grad_(False)
        self.encoder = Encoder(encoder_size, grid, num_tokens, code_dim, attention)
        self.quantizer = quantizer
        self.decoder = Decoder(
            decoder_size,
            grid,
            registers=num_tokens,
            code_dim=quantizer.dim,
            tap=tap,
            null=null,
            time_factor=1000.0 / max_timestep,
            implementation=attention,
        )
        self.repa = None if repa_dim is None else projection(decoder_size.width, repa_dim)

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.head.weight

    def encode(self, images: Tensor, length: int | None = None) -> Tensor:
        """The first `length` tokens (None: all); the encoder computes no more than those."""
        self.check_length(length)
        return self.quantizer.encode(self.encoder(self.latents(images), length))

    def decode(
        self,
        tokens: Tensor,
        steps: int | None = None,
        guidance: Scale | None = None,
        noise: Noise | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Images of the first k tokens [B, k], or of `lengths` [B] of them; image b is drawn by
        stream b of `noise`.

        Without `noise` an image's stream is seeded by its first token, so that all prefixes of an
        image start from the same noise and a batch changes nothing. `steps` and `guidance` default
        to `decoding`'s.
        """
        self.layout.check(tokens)
        noise = streams_of(tokens, noise, Tensor.tolist)
        how = self.decoding if steps is None else replace(self.decoding, steps=steps)
        start = noise.normal(self.grid.channels, self.grid.side, self.grid.side)
        return self.render(self.denoise(tokens, start, how, guidance, lengths))

    def decode_seeded(self, tokens: Tensor, seeds: Sequence[int]) -> Tensor:
        return self.decode(tokens, noise=Noise(seeds, tokens.device))

    @torch.no_grad()
    def denoise(
        self,
        tokens: Tensor,
        start: Tensor,
        decoding: FlowDecoding | None = None,
        guidance: Scale | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Latents [B, C, h, w] of tokens [B, k] from the noise `start`.

        Raises ValueError for `lengths` [B] that are not in [1, k].
        """
        decoding = decoding or self.decoding
        guidance = decoding.guidance if guidance is None else guidance
        kept = kept_lengths(tokens, lengths)
        dtype = next(self.decoder.parameters()).dtype
        codes = self.quantizer.decode(tokens).to(dtype)
        # With guidance all images are drawn twice at once: under their tokens, and under none.
        no = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        registers = self.decoder.condition(codes, kept)
        if guidance != 1:
            registers = torch.cat([registers, self.decoder.condition(codes, kept, ~no)])

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return at_least_float32(self.decoder(x.to(dtype), t, registers).velocity)

        return solve(velocity, start, len(registers) // len(tokens), decoding, guidance)

    def predict(
        self,
        latents: Tensor,
        noise: Tensor,
        t: Tensor,
        codes: Tensor,
        kept: Tensor,
        null: Tensor | None = None,
    ) -> Velocity:
        """Velocity at times t [B] of the path from latents to noise [B, C, h, w], given codes and
        what is kept.
        """
        noisy = flow.interpolate(latents, noise, t.view(-1, 1, 1, 1))
        return self.decoder(noisy, t, self.decoder.condition(codes, kept, null))

    def forward(self, images: Tensor) -> TokenizerOutput:
        """In training the losses `flow` and `repa`, already weighted.

        The reconstruction is then the one-step estimate x_t - t v in pixel space. With a VAE it is
        not rendered (that would cost more than the step) and is NaN, which a pixel loss left
        switched on cannot miss. In eval mode it is the decoded image, as of any tokenizer.
        """
        if not self.training:
            tokens = self.encode(images)
            return TokenizerOutput(self.decode(tokens), tokens, {})
        how = self.training_settings
        device = images.device
        latents = self.latents(images, how.sample_posterior)
        quantized = self.quantizer(self.encoder(latents))
        t = how.times.draw(len(images), device)
        noise = torch.randn_like(latents)
        kept = how.draw_lengths(len(images), self.num_tokens).to(device)
        null = torch.rand(len(images), device=device) < how.null
        found = self.predict(latents, noise, t, quantized.quantized, kept, null)
        losses = quantized.losses | {"flow": flow_loss(found.velocity, latents, noise).mean()}
        if self.teacher is not None and self.repa is not None and how.repa_weight:
            losses["repa"] = how.repa_weight * self.repa_distance(found.features, images).mean()
        # x_t - t v = (1 - t) x + t n - t v: the clean latents where v = n - x.
        estimate = latents + t.view(-1, 1, 1, 1) * (
            noise - latents - at_least_float32(found.velocity)
        )
        if self.vae is not None:
            estimate = torch.full_like(images, torch.nan)
        return TokenizerOutput(estimate, quantized.tokens, losses)

    def repa_distance(self, features: Tensor, images: Tensor) -> Tensor:
        """1 - cosine similarity [B] between projected patches, resized to the teacher's grid, and
        the teacher's.
        """
        assert self.teacher is not None and self.repa is not None
        side = self.grid.patches
        return cosine_distance(
            self.repa(regrid(features, (side, side), self.teacher.grid).to(features.dtype)),
            self.teacher(images).patches,
        )


def _published(
    encoder: int,
    decoder: int,
    vae_weights: str | None,
    vae_scale: float | None,
    repa_dim: int | None,
    teacher: Teacher | None,
) -> FlexTok:
    return FlexTok(
        FSQ(LEVELS),
        vae=flextok_vae(16, scale=vae_scale, weights=vae_weights),
        encoder_size=TransformerSize(64 * encoder, encoder),
        decoder_size=TransformerSize(64 * decoder, decoder),
        repa_dim=repa_dim,
        teacher=teacher,
    )


def flextok_d12_d12(
    vae_weights: str | None = None,
    vae_scale: float | None = None,
    repa_dim: int | None = None,
    teacher: Teacher | None = None,
) -> FlexTok:
    """341,651,737 parameters without REPA: 85,382,406 encoder, 172,448,320 decoder, 83,821,011 VAE;
    256 tokens.
    """
    return _published(12, 12, vae_weights, vae_scale, repa_dim, teacher)


def flextok_d18_d18(
    vae_weights: str | None = None,
    vae_scale: float | None = None,
    repa_dim: int | None = None,
    teacher: Teacher | None = None,
) -> FlexTok:
    """949,734,553 parameters without REPA: 287,326,086 encoder, 578,587,456 decoder, 83,821,011
    VAE; 256 tokens.
    """
    return _published(18, 18, vae_weights, vae_scale, repa_dim, teacher)


def flextok_d18_d28(
    vae_weights: str | None = None,
    vae_scale: float | None = None,
    repa_dim: int | None = None,
    teacher: Teacher | None = None,
) -> FlexTok:
    """2,540,882,841 parameters without REPA: 287,326,086 encoder, 2,169,735,744 decoder, 83,821,011
    VAE; 256 tokens.
    """
    return _published(18, 28, vae_weights, vae_scale, repa_dim, teacher)
