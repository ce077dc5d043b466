"""Feature networks: what a distance is measured with. Only the TF-compatible Inception network may be called FID.

An extractor takes uint8 images and gives float32 features, always in eval mode and in full float32 precision (a bf16
autocast or TF32 around it would move the distance). `load_extractor` finds the right class for a name or a file.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from tessellar.errors import UserError
from tessellar.evaluation.network_facts import PUBLISHED, PURPOSE, NetworkFacts
from tessellar.interop.weights import read_metadata, read_safetensors, require_file, say_unchecked


class Features(NamedTuple):
    """What a network says about B images, float32: `features` [B, D], class `logits` [B, C], `spatial` [B, S]."""

    features: Tensor
    logits: Tensor
    spatial: Tensor | None = None


class Extractor(nn.Module, ABC):
    """A frozen feature network; `sha256` is that of its weights file, `resize` how images reach its input size."""

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
        return {"name": self.name, "sha256": self.sha256, "features": self.dim, "resize": self.resize}


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


def load_extractor(
    source: str | Path = "inception", network: NetworkFacts | None = None, resize: str = "any"
) -> Extractor:
    """An extractor: "inception" (downloaded), a file of Inception weights, a timm network's file, or "none".

    `resize` is for Inception alone: "tf1-bilinear" (also for "any") or "clean-bicubic". A timm network is a safetensors
    file that says in its metadata what it is, or a published one that is known by its hash, or one that `network`
    describes. Raises UserError where none of this holds.
    """
    from tessellar.evaluation.inception import Inception, is_inception
    from tessellar.evaluation.no_network import NoNetwork
    from tessellar.evaluation.timm_network import TimmNetwork

    if str(source) == "none":
        return NoNetwork()
    if str(source) == "inception":
        return Inception.download(resize)
    path = Path(source)
    require_file(path)
    if path.suffix != ".safetensors":
        return Inception.from_file(path, resize)
    state, metadata = read_safetensors(path)
    if is_inception(state):
        return Inception.from_file(path, resize)
    digest = sha256_of(path)
    facts = network or PUBLISHED.get(digest) or NetworkFacts.from_metadata(metadata, path)
    if "teacher" in (facts.purpose, metadata.get("purpose")):
        raise UserError(f"{path} is a network for teaching; a model that it taught may not be measured with it")
    if digest not in PUBLISHED:  # else the file's own hash is its checksum
        say_unchecked(path, metadata)
    return TimmNetwork(facts, state, digest, str(path))


def sha256_of(path: Path) -> str:
    """Hash of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_evaluator(path: str | Path) -> None:
    """Raise UserError if a weights file is a network that measures: it may not teach, select or reject samples.

    Whatever loads a teacher, a feature loss or a scorer calls this first; else a model is trained for its own exam.
    """
    path = Path(path)
    if path.suffix != ".safetensors" or not path.is_file():
        return
    if read_metadata(path).get("purpose") == PURPOSE or sha256_of(path) in PUBLISHED:
        raise UserError(f"{path} is a network for evaluation; a loss, a teacher or a filter of samples may not use it")
