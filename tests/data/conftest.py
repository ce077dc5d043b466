"""Small data sets on disk."""

import gzip
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
        for name, content in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
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
        path = root / ("red_fox", "cat", "dog")[i % 3] / ("deeper" if i == 5 else "") / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = generator.integers(20, 90, 2)
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    (root / "cat" / "notes.txt").write_text("not an image")
    (root / ".hidden").mkdir()
    return root
