"""Pictures of the study of tokenizers that understand: reconstructions, and what prefixes of scales draw."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tessellar.checkpoints.reading import load_tokenizer
from tessellar.data.sets.fashion_mnist import FashionMNISTData
from tessellar.evaluation.token_metrics import prefix_lengths
from tessellar.images import to_uint8
from tessellar.sampling.grid import picture_grid

SHOWN = 10  # test images, one of each class


def shown_images(data: Path) -> tuple[Tensor, list[str]]:
    """The first test image of each class, float32 [10, 3, 32, 32] in [-1, 1], and the classes' names."""
    images = FashionMNISTData(str(data)).val_dataset()
    first = [int((images.labels == label).nonzero()[0]) for label in range(SHOWN)]
    return images.batch(first)["image"], list(images.class_names)


@torch.no_grad()
def reconstructions(exports: Mapping[str, Path], data: Path) -> Tensor:
    """A row for the originals, then one for each tokenizer by its name: uint8 [3, H, W]."""
    images, names = shown_images(data)
    rows = [to_uint8(images)]
    for export in exports.values():
        tokenizer = load_tokenizer(export).eval()
        rows.append(to_uint8(tokenizer.decode(tokenizer.encode(images))))
    return picture_grid(rows, row_labels=["original", *exports], column_labels=names)


@torch.no_grad()
def scales(exports: Mapping[str, Path], data: Path) -> Tensor:
    """A row for each prefix of whole scales of each tokenizer: uint8 [3, H, W]."""
    images, names = shown_images(data)
    rows = []
    labels = []
    for name, export in exports.items():
        tokenizer = load_tokenizer(export).eval()
        tokens = tokenizer.encode(images)
        for length in prefix_lengths(tokenizer.layout):
            rows.append(to_uint8(tokenizer.decode(tokens[:, :length])))
            labels.append(f"{name}: {length}")
    rows.append(to_uint8(images))
    return picture_grid(rows, row_labels=[*labels, "original"], column_labels=names)
