"""Writing a set of samples: numbered PNG files, one grid with a row a class, and the npz that ADM's
evaluator reads.

Works in several processes that share a file system: each writes its own images, the first one the
grid and the npz.
"""

import os
import re
from collections.abc import Mapping, Sequence
from itertools import chain, islice
from math import ceil, sqrt
from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image
from torch import Tensor

from tessellar import distributed
from tessellar.errors import writing
from tessellar.sampling.grid import picture_grid

GRID_CLASSES = 20
GRID_PER_CLASS = 10
NAME_LENGTH = 40


def save_png(image: Tensor, path: Path) -> None:
    """One uint8 image [3, H, W]."""
    with writing(path, unfinished=path):
        Image.fromarray(rearrange(image, "c h w -> h w c").cpu().numpy()).save(path)


def grid_rows(labels: Sequence[int]) -> list[list[int]]:
    """Indices of the images in a grid: a row a class (at most 20, 10 images each), or a square for
    a single class.
    """
    by_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        by_class.setdefault(label, []).append(index)
    if len(by_class) > 1:
        return [row[:GRID_PER_CLASS] for row in islice(by_class.values(), GRID_CLASSES)]
    shown = list(range(len(labels)))[: GRID_PER_CLASS**2]
    columns = max(1, ceil(sqrt(len(shown))))
    return [shown[i : i + columns] for i in range(0, len(shown), columns)]


def file_name(index: int, label: int, titles: Sequence[str] = ()) -> str:
    """`<index>_<class>_<name>.png`, or without the name where classes have none."""
    title = titles[label] if titles else ""
    plain = re.sub(r"[^\w]+", "-", title).strip("-")[:NAME_LENGTH]
    return "_".join(filter(None, (f"{index:06d}", f"{label:04d}", plain))) + ".png"


class SampleFolder:
    """Takes samples in any order and writes them into `folder`; `labels` are the classes of all
    images.

    `titles[label]` is the name of a class, or the prompt; empty where there are none. Files:
    `<index>_<class>_<name>.png`, `grid.png`, `samples.npz` (`arr_0` uint8 [N, H, W, 3], `arr_1`
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
        titles: Sequence[str] = (),
    ) -> None:
        self.folder = folder
        self.labels = labels
        self.titles = titles
        self.png = png
        self.npz = npz
        self.rows = grid_rows(labels) if grid else []
        self.shown: dict[int, Tensor] = {}
        self._wanted = set(chain.from_iterable(self.rows))
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
                name = file_name(index, self.labels[index], self.titles)
                save_png(image, self.folder / name)
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
            save_png(self._grid(shown), self.folder / "grid.png")
        if self._pixels is not None:
            target = self.folder / "samples.npz"
            with writing(target, unfinished=target):
                np.savez(target, self._pixels, np.asarray(self.labels, dtype=np.int64))
            self._pixels = None
            (self.folder / "pixels.npy").unlink()

    def _grid(self, shown: Mapping[int, Tensor]) -> Tensor:
        """A row a class, with its name beside it where there is one, else its id."""
        cells = []
        names: dict[int, str] = {}
        for row in self.rows:
            cells.append([shown[index] for index in row])
            label = self.labels[row[0]]
            names[label] = self.titles[label] if self.titles else str(label)
        if len(names) < len(cells):  # several rows of one class
            return picture_grid(cells)
        return picture_grid(cells, row_labels=list(names.values()))
