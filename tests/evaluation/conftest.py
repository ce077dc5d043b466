"""A tiny feature network on disk, random Inception weights, and small sets of images."""

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from tessellar.evaluation.networks.extractors import Extractor
from tessellar.evaluation.networks.loading import load_extractor
from tessellar.evaluation.networks.timm_network import network_of
from tessellar.networks.facts import NetworkFacts

TINY = NetworkFacts(
    name="tiny",
    arch="test_resnet",
    num_classes=4,
    image_size=(32, 32),
    training={"data": "nothing"},
)


def blurry_noise(count: int, size: int = 32, seed: int = 0, smooth: int = 8) -> Tensor:
    """uint8 [count, 3, size, size]: blurry noise, so that images differ in more than their grain."""
    noise = torch.rand(count, 3, smooth, smooth, generator=torch.Generator().manual_seed(seed))
    return (255 * torch.nn.functional.interpolate(noise, (size, size), mode="bilinear")).to(
        torch.uint8
    )


def write_png_files(images: Tensor, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(folder / f"{i:05}.png")
    return folder


def write_npz_file(images: Tensor, path: Path, labels: Tensor | None = None) -> Path:
    arrays = [images.permute(0, 2, 3, 1).numpy(), *([] if labels is None else [labels.numpy()])]
    np.savez(path, *arrays)
    return path


@pytest.fixture(scope="session")
def random_images() -> Callable[..., Tensor]:
    return blurry_noise


@pytest.fixture(scope="session")
def write_pngs() -> Callable[..., Path]:
    return write_png_files


@pytest.fixture(scope="session")
def write_npz() -> Callable[..., Path]:
    return write_npz_file


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-describing extractor file with random weights."""
    torch.manual_seed(0)
    network = network_of(TINY).eval()
    path = tmp_path_factory.mktemp("extractor") / "tiny.safetensors"
    save_file(network.state_dict(), path, metadata=TINY.to_metadata())
    return path


@pytest.fixture(scope="session")
def tiny(tiny_file: Path) -> Extractor:
    return load_extractor(tiny_file)


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of torch-fidelity's Inception, as it would save them; scaled so that activations do not vanish."""
    with (
        mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"),
        mock.patch("torch.load"),
    ):
        with torch.device("meta"):
            network = FeatureExtractorInceptionV3(
                "random", ["2048"], feature_extractor_weights_path="none"
            )
    draw = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in network.state_dict().items():
        if tensor.ndim > 1:
            gain = (
                2 if tensor.ndim == 4 else 10_000
            )  # logits that differ by class, else all are equally likely
            state[name] = (
                torch.randn(tensor.shape, generator=draw) * (gain / tensor[0].numel()) ** 0.5
            )
        elif name.endswith(("running_var", "bn.weight")):
            state[name] = torch.ones(tensor.shape)
        else:
            state[name] = 0.1 * torch.randn(tensor.shape, generator=draw).to(tensor.dtype)
    path = tmp_path_factory.mktemp("inception") / "weights-inception-random.pth"
    torch.save(state, path)
    return path


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No weights are kept, and any attempt to download fails."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
