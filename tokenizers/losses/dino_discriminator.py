"""VAR's discriminator: small heads on the layers of a frozen DINO network (StyleGAN-T, arXiv
2301.09515).

Used by VAR's tokenizer (arXiv 2404.02905), Hita-U and ResTok. The published network is DINO's
ViT-S/16, in timm `vit_small_patch16_224.dino`; its GELU is exact there and approximated by a tanh
in VAR's code.
"""

import math
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from tessellar.errors import UserError
from tessellar.layers.precision import at_least_float32
from tessellar.networks.vision import Teacher
from tessellar.protocol.arguments import COUNTS
from tessellar.protocol.configured import Configured
from tessellar.tokenizers.losses.diff_augment import DiffAugment


class LocalBatchNorm(nn.Module):
    """Batch norm of [B, C, L] over groups of at most `virtual_batch` images, without running
    statistics.

    A batch that is no multiple of it falls into the smallest number of equal groups.
    """

    def __init__(self, channels: int, virtual_batch: int = 8, eps: float = 1e-6) -> None:
        super().__init__()
        self.virtual_batch = virtual_batch
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        groups = math.ceil(len(x) / self.virtual_batch)
        while len(x) % groups:
            groups += 1
        grouped = rearrange(at_least_float32(x), "(g b) c l -> g b c l", g=groups)
        variance, mean = torch.var_mean(grouped, (1, 3), correction=0, keepdim=True)
        normed = rearrange((grouped - mean) / (variance + self.eps).sqrt(), "g b c l -> (g b) c l")
        return (normed * self.weight[:, None] + self.bias[:, None]).to(x.dtype)


class Head(nn.Module):
    """A layer's features [B, C, L] to logits [B, L]."""

    def __init__(self, channels: int, kernel: int, virtual_batch: int) -> None:
        super().__init__()
        self.first = _block(channels, 1, virtual_batch)
        self.second = _block(channels, kernel, virtual_batch)
        self.to_logits = spectral_norm(nn.Conv1d(channels, 1, 1), eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.to_logits((self.second(x) + x) / math.sqrt(2)).squeeze(1)


class DinoDiscriminator(Configured, nn.Module):
    """Images [B, 3, H, W] in [-1, 1] to logits [B, (layers + 1) * L] of the L patches of the
    embedding and each layer.

    `vision` is a vision transformer with a class token, which is added to its patches; it is no
    part of checkpoints. `layers` are its blocks, from 0. Images larger than its input are cropped
    at a random place with probability `crop`, otherwise averaged down; smaller ones are enlarged.
    `augment` acts on all that is shown, also while the tokenizer trains. 5 heads of kernel 9 on
    ViT-S/16 have 7,386,245 parameters. Raises UserError for a network without blocks or a class
    token, and for layers that it does not have.
    """

    ranges: ClassVar = {
        "layers": COUNTS
    }  # places of blocks; elsewhere they count from the end, too

    def __init__(
        self,
        vision: Teacher,
        layers: tuple[int, ...] = (2, 5, 8, 11),
        kernel: int = 9,
        virtual_batch: int = 8,
        crop: float = 0.5,
        augment: DiffAugment | None = None,
    ) -> None:
        super().__init__()
        network: Any = vision.model.network
        if not hasattr(network, "blocks") or getattr(network, "cls_token", None) is None:
            raise UserError(
                f"{vision.model.name} is no vision transformer with a class token, as this discriminator needs"
            )
        if not layers or not all(0 <= layer < len(network.blocks) for layer in layers):
            raise UserError(
                f"{vision.model.name} has blocks 0 to {len(network.blocks) - 1}; layers is {list(layers)}"
            )
        self.vision = vision
        self.layers = tuple(sorted(layers))
        self.crop = crop
        self.augment = augment
        self.heads = nn.ModuleList(
            Head(network.embed_dim, kernel, virtual_batch) for _ in range(len(self.layers) + 1)
        )

    def forward(self, images: Tensor) -> Tensor:
        if self.augment is not None:
            images = self.augment(images)
        found = self._features(self.at_network_size(images))
        return torch.cat(
            [head(features) for head, features in zip(self.heads, found, strict=True)], dim=1
        )

    def at_network_size(self, images: Tensor) -> Tensor:
        """At the network's size."""
        (height, width), (rows, columns) = self.vision.model.input_size, images.shape[-2:]
        if rows > height and columns > width and torch.rand((), device="cpu") < self.crop:
            top = int(torch.randint(0, rows - height + 1, (), device="cpu"))
            left = int(torch.randint(0, columns - width + 1, (), device="cpu"))
            return images[..., top : top + height, left : left + width]
        if (rows, columns) == (height, width):
            return images
        return F.interpolate(images, (height, width), mode="area" if rows > height else "bicubic")

    def _features(self, images: Tensor) -> list[Tensor]:
        """Patches plus the class token [B, C, L], before the blocks and after those of `layers`;
        gradients pass.
        """
        self.vision.model.check_filled()
        network: Any = self.vision.model.network
        x = network.norm_pre(
            network._pos_embed(network.patch_embed(self.vision.model.preprocess(images)))
        )
        states = [x]
        for index, block in enumerate(network.blocks[: self.layers[-1] + 1]):
            x = block(x)
            if index in self.layers:
                states.append(x)
        prefix = network.num_prefix_tokens
        return [rearrange(x[:, prefix:] + x[:, :1], "b l c -> b c l") for x in states]


def _block(channels: int, kernel: int, virtual_batch: int) -> nn.Sequential:
    conv = nn.Conv1d(channels, channels, kernel, padding=kernel // 2, padding_mode="circular")
    return nn.Sequential(
        spectral_norm(conv, eps=1e-12), LocalBatchNorm(channels, virtual_batch), nn.LeakyReLU(0.2)
    )
