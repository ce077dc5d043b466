"""Writing a set of samples: numbered PNG files, one grid with a row a class, and the npz that ADM's
evaluator reads.

Works in several processes that share a file system: each writes its own images, the first one the
grid and the npz.
"""

import os
from collections.abc import Mapping, Sequence
from math import ceil, sqrt
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from tessellar import distributed
from tessellar.errors import writing

GRID_CLASSES = 20
GRID_PER_CLASS = 10


def save_png(image: Tensor, path: Path) -> None:
    """One uint8 image [3, H, W]."""
    with writing(path, unfinished=path):
        Image.fromarray(rearrange(image, "c h w -> h w c").cpu().numpy()).save(path)


def tile(images: Tensor, columns: int) -> Tensor:
    """uint8 images [n, 3, H, W] side by side, `columns` a row, as one image; black where the last
    row is short.
    """
    missing = -len(images) % columns
    images = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
    return rearrange(images, "(r k) c h w -> c (r h) (k w)", k=columns)


def grid_rows(labels: Sequence[int]) -> list[list[int]]:
    """Indices of the images in a grid: a row a class (at most 20, 10 images each), or a square for
    a single class.
    """
    by_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        by_class.setdefault(label, []).append(index)
    if len(by_class) > 1:
        return [indices[:GRID_PER_CLASS] for indices in list(by_class.values())[:GRID_CLASSES]]
    shown = list(range(len(labels)))[: GRID_PER_CLASS**2]
    columns = max(1, ceil(sqrt(len(shown))))
    return [shown[i : i + columns] for i in range(0, len(shown), columns)]


def tile_rows(images: Mapping[int, Tensor], rows: Sequence[Sequence[int]]) -> Tensor:
    """The images of each row side by side, rows on top of each other; short rows end in black."""
    columns = max(map(len, rows))
    black = torch.zeros_like(next(iter(images.values())))
    cells = [images[row[k]] if k < len(row) else black for row in rows for k in range(columns)]
    return tile(torch.stack(cells), columns)


class SampleFolder:
    """Takes samples in any order and writes them into `folder`; `labels` are the classes of all
    images.

    Files: `<index>_<class>.png`, `grid.png`, `samples.npz` (`arr_0` uint8 [N, H, W, 3], `arr_1`
    int64 [N]).
    """

    def __init__(
        self,
        folder: Path,
        labels: Sequence[int],
        image_size: tuple[int, int],
        png: bool,
        npz: bool,
        grid: bool,
    ) -> None:
        self.folder = folder
        self.labels = labels
        self.png = png
        self.npz = npz
        self.rows = grid_rows(labels) if grid else []
        self.shown: dict[int, Tensor] = {}
        self._wanted = {index for row in self.rows for index in row}
        self._pixels = self.open_pixels(len(labels), image_size) if npz else None

    def open_pixels(self, count: int, image_size: tuple[int, int]) -> np.ndarray:
        """An array on disk that all processes write their rows into."""
        path = self.folder / "pixels.npy"
        shape = (count, *image_size, 3)
        if distributed.rank() == 0:
            with writing(path, unfinished=path):
                np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape).flush()
                # A full disk is met here, not as SIGBUS at a later access.
                with path.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        distributed.barrier()
        return np.lib.format.open_memmap(path, mode="r+")

    def write(self, indices: Sequence[int], images: Tensor) -> None:
        """Images `indices` of the set, uint8 [b, 3, H, W]."""
        for index, image in zip(indices, images, strict=True):
            if self.png:
                save_png(image, self.folder / f"{index:06d}_{self.labels[index]:04d}.png")
            if self._pixels is not None:
                self._pixels[index] = rearrange(image, "c h w -> h w c").numpy()
            if index in self._wanted:
                self.shown[index] = image.clone()

    def finish(self) -> None:
        """Write what needs all images; every process calls it."""
        if isinstance(self._pixels, np.memmap):
            self._pixels.flush()
        shown: dict[int, Tensor] = {}
        for part in distributed.all_gather(self.shown):
            shown |= part
        distributed.barrier()
        if distributed.rank() > 0:
            return
        if self.rows:
            save_png(tile_rows(shown, self.rows), self.folder / "grid.png")
        if self._pixels is not None:
            target = self.folder / "samples.npz"
            with writing(target, unfinished=target):
                np.savez(target, self._pixels, np.asarray(self.labels, dtype=np.int64))
            self._pixels = None
            (self.folder / "pixels.npy").unlink()
