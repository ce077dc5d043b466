import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tessellar.data.sets.fashion_mnist import FashionMNIST, FashionMNISTData
from tessellar.data.sets.idx import find_idx, read_idx
from tessellar.errors import UserError
from tessellar.images import to_uint8


def test_images_are_padded_with_black_and_have_three_equal_channels(idx_root: Path):
    batch = FashionMNIST(idx_root).batch([3, 14])
    pixels = to_uint8(batch["image"])
    stored = read_idx(find_idx(idx_root, "train-images-idx3-ubyte"), axes=3)
    assert pixels.shape == (2, 3, 32, 32)
    for channel in range(3):
        assert np.array_equal(pixels[:, channel, 2:30, 2:30].numpy(), stored[[3, 14]])
    frame = torch.ones(32, 32, dtype=torch.bool)
    frame[2:30, 2:30] = False
    assert (batch["image"][..., frame] == -1).all()
    assert batch["label"].tolist() == [3, 4] and batch["index"].tolist() == [3, 14]
    assert batch["caption"] == ["a photo of a dress", "a photo of a coat"]


def test_another_size_shows_the_same_images(idx_root: Path) -> None:
    data = FashionMNISTData(str(idx_root), size=64)
    images = data.val_dataset().batch([2, 5])["image"]
    assert data.image_size == (64, 64) and images.shape == (2, 3, 64, 64)
    plain = FashionMNISTData(str(idx_root)).val_dataset()
    assert plain.fingerprint() != data.val_dataset().fingerprint()
    smaller = F.avg_pool2d(images, 2)  # pairs of pixels lie about the one that they come from
    assert float((smaller - plain.batch([2, 5])["image"]).abs().mean()) < 0.2


def test_splits_are_read_from_gzipped_and_plain_files(idx_root: Path):
    train, test = FashionMNIST(idx_root), FashionMNIST(idx_root, "test")
    assert (len(train), len(test)) == (70, 30)
    assert test[9]["caption"] == "a photo of an ankle boot"
    assert train.fingerprint() != test.fingerprint()


def test_a_flip_is_a_coin_of_seed_epoch_and_index(idx_root: Path):
    data, plain = (
        FashionMNIST(idx_root, flip=True, seed=1),
        FashionMNIST(idx_root).batch(range(70))["image"],
    )

    def mirrored(epoch: int) -> list[bool]:
        data.set_epoch(epoch)
        images = data.batch(range(70))["image"]
        same, flipped = ((images == x).flatten(1).all(1) for x in (plain, plain.flip(-1)))
        assert (same | flipped).all()
        return flipped.tolist()

    first = mirrored(0)
    assert 20 < sum(first) < 50
    assert mirrored(1) != first and mirrored(0) == first
    assert torch.equal(data[5]["image"], data.batch([9, 5])["image"][1])


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("t10k-images-idx3-ubyte", lambda b: b[:-1], "its header .* needs 23536"),
        ("t10k-images-idx3-ubyte", lambda b: b + b"x", "23537 bytes"),
        ("t10k-images-idx3-ubyte", lambda b: b"", "begins with"),
        ("t10k-images-idx3-ubyte", lambda b: b[:6], "needs"),
        (
            "t10k-labels-idx1-ubyte",
            lambda b: b"PK" + b[2:],
            "begins with 504b0801.*begins with 00000801",
        ),
        ("t10k-labels-idx1-ubyte", lambda b: b[:7] + b"\x1d" + b[8:-1], "no match"),
        ("t10k-labels-idx1-ubyte", lambda b: b[:-1] + b"\x0b", "label 11"),
    ],
)
def test_a_damaged_file_is_named(idx_root: Path, name: str, change, message: str):
    replace(idx_root / name, change((idx_root / name).read_bytes()))
    with pytest.raises(UserError, match=f"{name}.*{message}"):
        FashionMNIST(idx_root, "test")


def test_a_truncated_or_foreign_gzip_file_is_named(idx_root: Path):
    path = idx_root / "train-images-idx3-ubyte.gz"
    for content in (path.read_bytes()[:1000], b"not gzip", path.read_bytes()[:200] + b"\0" * 300):
        replace(path, content)
        with pytest.raises(UserError, match="train-images-idx3-ubyte.gz cannot be read as a gzip"):
            FashionMNIST(idx_root)


def test_a_missing_file_says_what_to_put_where(tmp_path: Path):
    with pytest.raises(UserError, match="train-images-idx3-ubyte is missing .*put"):
        FashionMNIST(tmp_path)


def test_images_of_another_size_are_refused(idx_root: Path):
    header = bytes([0, 0, 8, 3, 0, 0, 0, 30, 0, 0, 0, 2, 0, 0, 0, 2])
    replace(idx_root / "t10k-images-idx3-ubyte", header + bytes(120))
    with pytest.raises(UserError, match="no match"):
        FashionMNIST(idx_root, "test")


def test_the_fingerprint_follows_the_content_and_not_the_folder(idx_root: Path, tmp_path: Path):
    before = FashionMNIST(idx_root, "test").fingerprint()
    path = idx_root / "t10k-images-idx3-ubyte"
    plain, zipped = path.read_bytes(), idx_root / f"{path.name}.gz"

    zipped.write_bytes(gzip.compress(plain))
    path.unlink()
    assert FashionMNIST(idx_root, "test").fingerprint() == before
    zipped.write_bytes(gzip.compress(plain[:-1] + bytes([plain[-1] ^ 1])))
    assert FashionMNIST(idx_root, "test").fingerprint() != before
