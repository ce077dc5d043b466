"""The TF-compatible Inception network of FID: torch-fidelity's port of the 2015 TensorFlow graph.

Features are the 2048 pooled activations (`pool_3`), logits come without bias as in the ADM suite
and torch-fidelity, spatial features for sFID are the first 7 channels of `mixed_6/conv` (17 x 17,
channels last), arXiv 2103.03841. Weights other than the published file are measured with, but never
called FID.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from urllib.error import URLError

import torch
from einops import rearrange
from torch import Tensor
from torch.hub import load_state_dict_from_url
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    FeatureExtractorInceptionV3,
)

from tessellar.errors import UserError
from tessellar.evaluation.networks.extractors import Extractor, Features
from tessellar.evaluation.networks.resize import RESIZERS
from tessellar.networks.facts import INCEPTION, sha256_of
from tessellar.tensor_files import read_state

SIZE = (299, 299)
SPATIAL_BLOCK = "Mixed_6d"
SPATIAL_CHANNELS = 7  # TensorFlow's mixed_6; its first branch is mixed_6/conv


def is_inception(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is of this network."""
    return "Conv2d_1a_3x3.conv.weight" in state and "Mixed_7c.branch_pool.conv.weight" in state


class Inception(Extractor):
    """`resize` is "tf1-bilinear" (ADM, torch-fidelity) or "clean-bicubic" (clean-fid)."""

    dim = 2048
    num_classes = 1008
    spatial_dim = 17 * 17 * SPATIAL_CHANNELS

    def __init__(self, state: Mapping[str, Tensor], sha256: str, resize: str = "any") -> None:
        super().__init__()
        self.sha256 = sha256
        self.name = "inception" if self.is_published else f"inception-{sha256[:8]}"
        self.resize = "tf1-bilinear" if resize == "any" else resize
        # torch-fidelity reads its weights with the unsafe unpickler, so it gets a file that we
        # wrote ourselves.
        file = io.BytesIO()
        torch.save(dict(state), file)
        file.seek(0)
        # A run that measures draws the same numbers as one that does not.
        with torch.random.fork_rng(devices=[]):
            self.network = FeatureExtractorInceptionV3(
                "inception", ["2048"], feature_extractor_weights_path=file
            )  # type: ignore
        self.network.to(memory_format=torch.channels_last)

    @property
    def is_published(self) -> bool:
        return self.sha256 == INCEPTION

    @property
    def distance(self) -> str:
        if not self.is_published:
            return super().distance
        return "FID" if self.resize == "tf1-bilinear" else f"FID({self.resize})"

    @classmethod
    def from_file(cls, path: Path, resize: str = "any") -> "Inception":
        """Raises UserError for a file that does not hold this network."""
        state = read_state(path)
        if not isinstance(state, Mapping) or not is_inception(state):
            raise UserError(f"{path} does not hold the weights of torch-fidelity's InceptionV3")
        return cls(state, sha256_of(path), resize)

    @classmethod
    def download(cls, resize: str = "any") -> "Inception":
        """The published weights from torch-fidelity's release, kept in torch's hub cache; raises
        UserError offline.
        """
        try:
            state = load_state_dict_from_url(
                URL_INCEPTION_V3, map_location="cpu", check_hash=True, weights_only=True
            )
        except (URLError, OSError, RuntimeError) as error:
            raise UserError(
                f"the Inception weights cannot be downloaded ({error}); give a file instead, --extractor "
                f"{URL_INCEPTION_V3.rsplit('/', 1)[1]} (from {URL_INCEPTION_V3}), or another network: "
                "--extractor NET.safetensors, which `evaluate.py extractor` trains"
            ) from error
        return cls(state, INCEPTION, resize)

    def extract(self, images: Tensor) -> Features:
        x = (RESIZERS[self.resize](images, SIZE) - 128) / 128
        x = x.contiguous(memory_format=torch.channels_last)
        spatial = None
        for name, block in self.network.named_children():
            if name == "fc":
                break
            x = block(x)
            if name == SPATIAL_BLOCK:
                spatial = rearrange(x[:, :SPATIAL_CHANNELS], "b c h w -> b (h w c)")
        pooled = x.flatten(1)
        return Features(pooled, pooled @ self.network.fc.weight.T, spatial)
