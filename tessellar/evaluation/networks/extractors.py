"""Feature networks: what a distance is measured with. Only the TF-compatible Inception network may
be called FID.

An extractor takes uint8 images and gives float32 features, always in eval mode and in full float32
precision (a bf16 autocast or TF32 around it would move the distance). `load_extractor` finds the
right class for a name or a file.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from tessellar.errors import UserError


class Features(NamedTuple):
    """What a network says about B images, float32: `features` [B, D], class `logits` [B, C],
    `spatial` [B, S].
    """

    features: Tensor
    logits: Tensor
    spatial: Tensor | None = None


class Extractor(nn.Module, ABC):
    """A frozen feature network; `sha256` is that of its weights file, `resize` how images reach its
    input size.
    """

    name: str
    sha256: str
    dim: int
    num_classes: int
    class_names: tuple[str, ...] = ()  # empty where they are not known
    resize: str
    spatial_dim: int | None = None

    @property
    def distance(self) -> str:
        """How a Fréchet distance with this network is written."""
        return f"FD({self.name})"

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @abstractmethod
    def extract(self, images: Tensor) -> Features:
        """Features of uint8 images [B, 3, H, W] on this network's device."""

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """Features of uint8 images [B, 3, H, W] on any device; raises UserError for anything else."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise UserError(
                f"features are taken from uint8 images [B, 3, H, W]; given are {images.dtype} {tuple(images.shape)}"
            )
        with full_precision(self.device.type):
            return self.extract(images.to(self.device))

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode."""
        return super().train(False)

    def describe(self) -> dict[str, Any]:
        """Plain data for records: what must be equal for two numbers to be comparable."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "features": self.dim,
            "resize": self.resize,
        }


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Within it, float32 means float32: no autocast, no TF32."""
    backends = [torch.backends.cudnn.conv, torch.backends.cuda.matmul]  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
