"""Small data sets on disk."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def idx_bytes(array: np.ndarray) -> bytes:
    sizes = b"".join(side.to_bytes(4, "big") for side in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


@pytest.fixture
def idx_root(tmp_path: Path) -> Path:
    """A Fashion-MNIST folder: 70 training images (gzipped), 30 test images (plain)."""
    generator = np.random.default_rng(0)
    for prefix, count in (("train", 70), ("t10k", 30)):
        images = idx_bytes(generator.integers(0, 256, (count, 28, 28)))
        labels = idx_bytes(np.arange(count) % 10)
        for name, content in (
            (f"{prefix}-images-idx3-ubyte", images),
            (f"{prefix}-labels-idx1-ubyte", labels),
        ):
            if prefix == "train":
                (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.fixture
def image_root(tmp_path: Path) -> Path:
    """Three classes, twelve PNG files of different sizes, one of them in a deeper folder."""
    generator = np.random.default_rng(0)
    root = tmp_path / "pictures"
    for i in range(12):
        path = (
            root / ("red_fox", "cat", "dog")[i % 3] / ("deeper" if i == 5 else "") / f"{i:02}.png"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = generator.integers(20, 90, 2)
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    (root / "cat" / "notes.txt").write_text("not an image")
    (root / ".hidden").mkdir()
    return root


def png(colour: int, size: int = 12) -> bytes:
    """A picture whose pixels are all `colour`."""
    stream = io.BytesIO()
    Image.new("RGB", (size, size), (colour, colour, colour)).save(stream, "PNG")
    return stream.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """A tar of plain files in the given order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample_members(first: int, count: int) -> dict[str, bytes]:
    """Samples of a WebDataset tar: picture i has the colour i, class i % 3 and the caption `picture i`."""
    members = {}
    for i in range(first, first + count):
        facts = {
            "caption": f"picture {i}",
            "class": i % 3,
            "class_name": ("cat", "dog", "owl")[i % 3],
        }
        members |= {f"{i:06}.png": png(i), f"{i:06}.json": json.dumps(facts).encode()}
    return members


@pytest.fixture
def make_tar() -> Callable[[Path, dict[str, bytes]], Path]:
    return write_tar


@pytest.fixture
def make_samples() -> Callable[[int, int], dict[str, bytes]]:
    return sample_members


@pytest.fixture
def make_png() -> Callable[..., bytes]:
    return png


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder with train-0000.tar (20 samples), train-0001.tar (10) and val.tar (6)."""
    root = tmp_path / "shards"
    for name, first, count in (("train-0000", 0, 20), ("train-0001", 20, 10), ("val", 30, 6)):
        write_tar(root / f"{name}.tar", sample_members(first, count))
    return root
