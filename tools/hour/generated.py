"""Data for the first hour, generated: photographs in class folders, Fashion-MNIST's files, tars with captions."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("beach", "city", "desert", "forest", "lake", "meadow", "mountain", "snow")
PER_CLASS = 30


def photographs(root: Path) -> None:
    """A sky, a ground and some things in the colours of the class, of many sizes and kinds.

    Eight class folders with JPEG, PNG with transparency, grey and WebP; and beside them a HEIC, a text and a file of
    macOS, which are no pictures.
    """
    draw = np.random.default_rng(0)
    for number, name in enumerate(CLASSES):
        folder = root / name
        folder.mkdir(parents=True)
        hues = np.random.default_rng(number).integers(40, 220, (3, 3))
        for i in range(PER_CLASS):
            height, width = (int(side) for side in draw.integers(70, 140, 2))
            save(Image.fromarray(scene(hues, height, width, draw)), folder, i)
    (root / CLASSES[0] / "IMG_0001.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    (root / CLASSES[1] / "notes.txt").write_text("where these were taken\n")
    (root / CLASSES[2] / "._0.png").write_bytes(b"\0\5\26\7")


def scene(hues: np.ndarray, height: int, width: int, draw: np.random.Generator) -> np.ndarray:
    """uint8 [H, W, 3]."""
    horizon = int(height * draw.uniform(0.35, 0.65))
    rows = np.arange(height)[:, None, None]
    ground = rows >= horizon
    pixels = np.where(ground, hues[1], hues[0]) * np.ones((height, width, 1))
    pixels = pixels * (0.8 + 0.4 * rows / height)
    y, x = np.mgrid[:height, :width]
    for _ in range(int(draw.integers(2, 6))):
        at_y = draw.uniform(0, height)
        at_x = draw.uniform(0, width)
        inside = ((y - at_y) / 9) ** 2 + ((x - at_x) / 14) ** 2 < draw.uniform(0.5, 2)
        pixels[inside] = hues[2]
    return np.clip(pixels + draw.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)


def save(picture: Image.Image, folder: Path, i: int) -> None:
    """JPEG mostly; some PNG with transparency, some grey, some WebP."""
    match i % 6:
        case 0:
            picture.convert("RGBA").save(folder / f"{i}.png")
        case 1:
            picture.convert("L").save(folder / f"{i}.jpg")
        case 2:
            picture.save(folder / f"{i}.webp")
        case _:
            picture.save(folder / f"{i}.JPG", format="JPEG")


def fashion(root: Path) -> None:
    """The four IDX files of Fashion-MNIST with patches of light in place of clothes."""
    root.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for prefix, count in (("train", 96), ("t10k", 32)):
        labels = np.arange(count) % 10
        images = draw.integers(0, 60, (count, 28, 28))
        for place, label in enumerate(labels):
            images[place, 2 * label : 2 * label + 9, 6:22] += 180
        for name, array in ((f"{prefix}-images-idx3", images), (f"{prefix}-labels-idx1", labels)):
            sizes = b"".join(side.to_bytes(4, "big") for side in array.shape)
            content = bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()
            (root / f"{name}-ubyte.gz").write_bytes(gzip.compress(content))


def clip_art(root: Path) -> None:
    """Tars of pictures with captions: two of training, one of validation."""
    root.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name, count in (("train-0000", 24), ("train-0001", 24), ("val", 16)):
        with tarfile.open(root / f"{name}.tar", "w") as tar:
            for i in range(count):
                kind = CLASSES[i % len(CLASSES)]
                hues = np.random.default_rng(i % len(CLASSES)).integers(40, 220, (3, 3))
                stream = io.BytesIO()
                Image.fromarray(scene(hues, 64, 64, draw)).save(stream, "PNG")
                add(tar, f"{name}-{i}.png", stream.getvalue())
                add(tar, f"{name}-{i}.txt", f"a {kind} with things in it".encode())


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """One member."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
