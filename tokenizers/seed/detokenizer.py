"""From the embedding of an image to an image: what stands behind SEED's codes (arXiv 2307.08041).

`UnCLIP` is the published way, diffusers' Stable Diffusion 2.1 unCLIP from a local folder, never
trained and in no export. `PixelDetokenizer` is ours: small, trained in SEED's stage "detokenizer", so
that a generator over SEED's tokens can be trained, sampled and measured.
"""

from abc import ABC, abstractmethod
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tessellar.errors import UserError
from tessellar.layers.precision import at_least_float32
from tessellar.layers.tags import tag
from tessellar.layers.vit import ViTBlock
from tessellar.protocol.configured import Configured, LossOnly, refuse_outside


class Detokenizer(Configured, nn.Module, ABC):
    """Embeddings [B, E] to images [B, 3, H, W], about [-1, 1]."""

    @abstractmethod
    def forward(self, embedding: Tensor) -> Tensor:
        """Images of the detokenizer's own size."""

    @property
    def last_layer(self) -> Tensor | None:
        """Weight of the last layer; None where nothing is trained."""
        return None


class PixelDetokenizer(Detokenizer):
    """A vision transformer over learned positions, to each of which the embedding is added.

    What one embedding does not say it cannot draw: images are those of a mean. Raises UserError for
    patches that do not divide the image.
    """

    def __init__(
        self,
        dim: int,
        image_size: int = 224,
        patch_size: int = 14,
        width: int = 512,
        depth: int = 8,
        num_heads: int = 8,
        attention: str = "auto",
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise UserError(f"patch_size {patch_size} does not divide image_size {image_size}")
        self.patch_size = patch_size
        count = (image_size // patch_size) ** 2
        self.embed = nn.Linear(dim, width)
        self.positions = tag(nn.Parameter(torch.randn(1, count, width) * 0.02), "no_decay")
        # Each place takes its own part of the embedding: a product, beside the sum.
        self.scales = tag(nn.Parameter(torch.ones(1, count, width)), "no_decay")
        self.blocks = nn.ModuleList(
            ViTBlock(width, num_heads, attention=attention) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.to_pixels = nn.Linear(width, 3 * patch_size**2)

    @property
    def last_layer(self) -> Tensor:
        return self.to_pixels.weight

    def forward(self, embedding: Tensor) -> Tensor:
        embedded = self.embed(embedding.to(self.embed.weight.dtype))[:, None]
        x = embedded * self.scales + self.positions
        for block in self.blocks:
            x = block(x)
        pixels = self.to_pixels(self.norm(x))
        p = self.patch_size
        side = isqrt(x.shape[1])
        images = rearrange(pixels, "b (h w) (c p q) -> b c (h p) (w q)", h=side, p=p, q=p)
        return at_least_float32(images)


class UnCLIP(LossOnly, Detokenizer):
    """diffusers' `StableUnCLIPImg2ImgPipeline` in the folder `path` (stabilityai/stable-diffusion-2-1-unclip),
    with the settings of SEED's authors: 20 steps, guidance 10, noise level 0, 768 pixels.

    Images are reduced to `image_size`. An export holds none of it: give it again where images are
    wanted (`SEED.detokenizer = UnCLIP(path)`). Image b of a batch depends on `seed` alone. Raises
    UserError where the folder or diffusers is not there.
    """

    def __init__(
        self,
        path: str,
        image_size: int = 224,
        steps: int = 20,
        guidance: float = 10.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        refuse_outside(f"a folder of diffusers, {path}")
        if not (Path(path) / "model_index.json").is_file():
            raise UserError(
                f"{path} is no folder of a diffusers pipeline (it has no model_index.json): give one of "
                "stable-diffusion-2-1-unclip"
            )
        self.path = path
        self.image_size = image_size
        self.steps = steps
        self.guidance = guidance
        self.seed = seed
        self._pipelines: list[Any] = []  # made at the first image; a list hides it from the module

    def pipeline(self, device: torch.device) -> Any:
        """Read once; raises UserError where diffusers is not installed."""
        if not self._pipelines:
            try:
                from diffusers import (  # type: ignore[import-not-found]
                    StableUnCLIPImg2ImgPipeline,
                )
            except ImportError as error:
                raise UserError(
                    "unCLIP needs diffusers, which is not installed: pip install 'tessellar[unclip]'"
                ) from error
            made = StableUnCLIPImg2ImgPipeline.from_pretrained(self.path, local_files_only=True)
            made.set_progress_bar_config(disable=True)
            self._pipelines.append(made.to(device))
        return self._pipelines[0]

    @torch.no_grad()
    def forward(self, embedding: Tensor) -> Tensor:
        pipeline = self.pipeline(embedding.device)
        drawn = []
        for row in embedding.split(1):
            found = pipeline(
                image_embeds=row,
                guidance_scale=self.guidance,
                num_inference_steps=self.steps,
                noise_level=0,
                generator=torch.Generator("cpu").manual_seed(self.seed),
                output_type="pt",
            ).images
            drawn.append(torch.as_tensor(found).float().to(embedding.device))
        images = 2 * torch.cat(drawn) - 1
        size = (self.image_size, self.image_size)
        return F.interpolate(images, size, mode="bicubic", antialias=True).clamp(-1, 1)
