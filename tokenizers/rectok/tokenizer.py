"""RecTok: continuous latents on a grid, trained on their noisy versions (arXiv 2512.13421).

    patches, some hidden -> encoder -> z -> x_t = (1 - t) z + t gamma noise -> pixels
                                                                            -> features of a vision model

Both decoders read x_t and must give back hidden patches too, so that latents of many channels stay
easy for a generator that denoises them. Stage "decoder" then trains the pixel decoder alone, on clean
latents. Different from the official code: the statistics that normalise tokens are measured while
training.
"""

from collections.abc import Mapping
from math import isqrt
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.layers.precision import at_least_float32
from tessellar.layers.tags import tag
from tessellar.networks.vision import Teacher
from tessellar.protocol.layout import grid_layout
from tessellar.protocol.tokenizer import GridTokenizer, Quantizer, TokenizerOutput
from tessellar.tokenizers.losses.alignment import cosine_distance, regrid
from tessellar.tokenizers.parts.hidden_patches import draw_places, spread
from tessellar.tokenizers.quantizers.gaussian import Posterior
from tessellar.tokenizers.rectok.bottleneck import ChannelBottleneck
from tessellar.tokenizers.rectok.transformer import Encoder, PixelDecoder, SemanticDecoder
from tessellar.tokenizers.titok.tokenizer import SIZES, ViTSize

Stage = Literal["all", "decoder"]
TINY = ViTSize(192, 3, 4)


class Seen(NamedTuple):
    """What decoders read in a training pass: x_t [B, n, C] of the patches at `places` [B, n] (None:
    of all), and the posterior.
    """

    latents: Tensor
    places: Tensor | None
    posterior: Posterior


class RecTok(GridTokenizer):
    """Square images of `image_size` as a grid of latents.

    `masked`: the share of hidden patches of a batch is drawn from this range, and below 0 it is 0.
    `gamma` scales the noise. `semantic_dim`: channels of the features that the semantic decoder
    gives back, those of `teacher` where there is one (None: no such decoder, as in exports for
    generators). `stage` "decoder" trains the pixel decoder alone. Raises UserError for sizes that do
    not fit each other.
    """

    quantizer: ChannelBottleneck

    def __init__(
        self,
        quantizer: ChannelBottleneck,
        image_size: int = 256,
        patch_size: int = 16,
        encoder_size: ViTSize = SIZES["base"],
        decoder_size: ViTSize = SIZES["base"],
        semantic_size: ViTSize = TINY,
        semantic_dim: int | None = 1024,
        semantic_weight: float = 1.0,
        teacher: Teacher | None = None,
        masked: tuple[float, float] = (-0.1, 0.4),
        gamma: float = 1.0,
        qk_norm: bool = False,
        stage: Stage = "all",
        attention: str = "auto",
    ) -> None:
        super().__init__()
        if patch_size < 1 or image_size < patch_size or image_size % patch_size:
            raise UserError(f"patch_size {patch_size} does not divide image_size {image_size}")
        if not masked[0] <= masked[1] < 1:
            raise UserError(f"masked is {masked}; it must be a range below 1")
        if teacher is not None and teacher.dim != semantic_dim:
            raise UserError(
                f"semantic_dim is {semantic_dim}; the teacher's patches have {teacher.dim} channels"
            )
        if stage not in ("all", "decoder"):
            raise UserError(f'stage is {stage!r}; it must be "all" or "decoder"')
        side = image_size // patch_size
        self.image_size = (image_size, image_size)
        self.side = side
        self.layout = grid_layout(side, side, quantizer.kind, "latents")
        self.semantic_weight = semantic_weight
        self.teacher = teacher
        self.masked = masked
        self.gamma = gamma
        self.stage = stage
        #: Of the time of noise: latents of more values need more of it.
        self.shift = (side**2 * quantizer.dim / 4096) ** 0.5
        options = (quantizer.dim, qk_norm, attention)
        self.encoder = Encoder(side, patch_size, encoder_size, *options)
        self.quantizer = quantizer
        self.decoder = PixelDecoder(side, patch_size, decoder_size, *options)
        self.semantic_decoder = None
        if semantic_dim is not None:
            self.semantic_decoder = SemanticDecoder(
                side,
                semantic_size,
                dim=quantizer.dim,
                out=semantic_dim,
                qk_norm=qk_norm,
                attention=attention,
            )
        self.init_weights()
        if stage == "decoder":
            self.requires_grad_(False)
            self.decoder.requires_grad_(True)
            self.decoder.hidden.requires_grad_(False)  # no patch is hidden in this stage

    def init_weights(self) -> None:
        """Initialisation.

        | weight                                      | distribution         |
        |---------------------------------------------|----------------------|
        | linear layers, convolutions                 | truncated N(0, 0.02) |
        | positions, what stands for hidden pixels    | N(0, 1 / width)      |
        | what stands for hidden features             | 0                    |
        | biases                                      | 0                    |

        As published, weights whose names say "embed" do not decay.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        readers = [self.decoder, self.semantic_decoder]
        for part in (self.encoder, *readers):
            if part is not None:
                nn.init.normal_(part.positions, std=part.positions.shape[-1] ** -0.5)
        nn.init.normal_(self.decoder.hidden, std=self.decoder.hidden.shape[-1] ** -0.5)
        tag(self.encoder.patch_in.weight, "no_decay")
        for part in readers:
            if part is not None:
                tag(part.from_latent.weight, "no_decay")
        if self.semantic_decoder is not None:
            nn.init.zeros_(self.semantic_decoder.hidden)

    def train(self, mode: bool = True) -> Self:
        """In stage "decoder" all but the pixel decoder stays in eval mode."""
        super().train(mode and self.stage == "all")
        self.training = mode
        self.decoder.train(mode)
        return self

    def bottlenecks(self) -> list[Quantizer]:
        """None: its latents are disturbed by its own `gamma` and `masked`."""
        return []

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.conv_out.weight

    def latents(self, images: Tensor) -> Tensor:
        """Moments [B, N, 2 C] of all patches."""
        self.check_images(images)
        return self.encoder(images)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [B, N, C] of the tokens, which a cache keeps."""
        return self.quantizer.law(self.latents(images))

    def render(self, vectors: Tensor) -> Tensor:
        return at_least_float32(self.decoder(vectors))

    def draw_places(self, batch: int) -> Tensor | None:
        """Visible patches [B, n] of a training pass: as many in every image of all processes."""
        return draw_places(self.masked, batch, self.side**2)

    def time(self, uniform: Tensor) -> Tensor:
        """Share of noise of uniform draws, shifted towards noise."""
        return self.shift * uniform / (1 + (self.shift - 1) * uniform)

    def noisy(self, latents: Tensor, uniform: Tensor, noise: Tensor) -> Tensor:
        """x_t of latents and noise [B, n, C] at the times of uniform draws [B, 1, 1]."""
        t = self.time(uniform)
        return (1 - t) * latents + t * self.gamma * noise

    def see(self, images: Tensor) -> Seen:
        """What the decoders read of images in a training pass; outside of one, clean means."""
        if not self.training:
            posterior = self.quantizer.posterior(self.latents(images))
            return Seen(posterior.mean, None, posterior)
        self.check_images(images)
        places = None
        if self.stage == "all":
            places = self.draw_places(len(images))
            places = None if places is None else places.to(images.device)
        posterior = self.quantizer.posterior(self.encoder(images, places))
        z = posterior.sample(torch.randn_like(posterior.mean))
        if self.stage == "decoder":
            return Seen(z, None, posterior)
        self.quantizer.measure(posterior.mean.detach())
        uniform = torch.rand(len(z), 1, 1, device=z.device)
        return Seen(self.noisy(z, uniform, torch.randn_like(z)), places, posterior)

    def forward(self, images: Tensor) -> TokenizerOutput:
        trains_all = self.stage == "all"
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains_all):
            seen = self.see(images)
        losses = {}
        if trains_all:
            losses["kl"] = self.quantizer.loss(seen.posterior)
        if self.training and trains_all and self.teacher is not None:
            features = self.teacher(as_stored(images)).patches
            own = isqrt(features.shape[1])
            target = regrid(features, (own, own), (self.side, self.side))
            losses["semantic"] = self.semantic_weight * self.semantic_loss(seen, target)
        reconstruction = at_least_float32(self.decoder(seen.latents, seen.places))
        tokens = self.quantizer.normalised(seen.posterior.mean)
        if seen.places is not None:
            # Every position has its token, though this pass encoded only some.
            blank = tokens.new_zeros(len(tokens), self.side**2, tokens.shape[-1])
            tokens = spread(tokens, seen.places, blank)
        return TokenizerOutput(reconstruction, tokens.detach(), losses)

    def semantic_loss(self, seen: Seen, target: Tensor) -> Tensor:
        """1 - cosine between the features [B, N, D] that the semantic decoder gives back and those
        of the teacher: a mean over all patches, hidden ones too.
        """
        return cosine_distance(self.read(seen.latents, seen.places), target).mean()

    def read(self, latents: Tensor, places: Tensor | None = None) -> Tensor:
        """The teacher's features [B, N, D] as the semantic decoder has them of latents [B, n, C] of
        the patches at `places` [B, n] (None: all); raises UserError without such a decoder.
        """
        if self.semantic_decoder is None:
            raise UserError("this RecTok has no semantic decoder: give semantic_dim")
        return self.semantic_decoder(latents, places)

    def semantics(self, tokens: Tensor) -> Tensor:
        """As `read`, of tokens [B, N, C]."""
        return self.read(self.quantizer.decode(tokens))

    def starting_from(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A tokenizer without a semantic decoder leaves another's out."""
        if self.semantic_decoder is not None:
            return dict(state)
        return {name: t for name, t in state.items() if not name.startswith("semantic_decoder.")}


def as_stored(images: Tensor) -> Tensor:
    """Images in [-1, 1] as whole numbers of 0 to 255 would hold them, which the teacher reads."""
    return ((images + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1


def rectok_b(
    teacher: Teacher | None = None, semantic_dim: int | None = 1024, stage: Stage = "all"
) -> RecTok:
    """171,970,900 parameters, and 1,606,336 of the semantic decoder (none with semantic_dim None);
    16 x 16 latents of 128 channels at 256 pixels.
    """
    return RecTok(ChannelBottleneck(128), teacher=teacher, semantic_dim=semantic_dim, stage=stage)
