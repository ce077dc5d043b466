"""How much faster a cache of tokens is than encoding images, and than one file an image; and what each takes on disk.

    python benchmarks/data.py [--images 4000] [--rounds 5] [--batch 64] [--size 32] [--json FILE]

Coloured shapes are written as PNG files; a ViT-VQ tokenizer with random weights (that of configs/fashion_mnist, the
cheapest one here, so ratios against encoding are at their lowest) encodes every view. Then batches at the same random
places are read in four ways, in turn, round after round, and the fastest round of each counts. All files are in the
page cache: a cold disk favours the cache further, since it reads one place instead of opening a file. Numbers belong to
the machine that made them; tests never look at them.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tessellar.data.sets.image_folder import ImageFolder
from tessellar.data.sets.shapes import Shapes
from tessellar.data.token_cache.cached_tokens import CachedTokens
from tessellar.data.token_cache.writing import encode, encode_dataset
from tessellar.images import to_uint8
from tessellar.sampling.output import save_png
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ

Read = Callable[[list[int]], Tensor]


def write_images(folder: Path, count: int, size: int) -> ImageFolder:
    """Shapes as PNG files, read back with mirror images as a second view."""
    folder.mkdir()
    shapes = Shapes(size, count)
    for first in range(0, count, 500):
        batch = to_uint8(shapes.batch(range(first, min(first + 500, count)))["image"])
        for i, image in enumerate(batch, first):
            save_png(image, folder / f"{i:06}.png")
    return ImageFolder(folder, size, flip=True)


def write_one_file_an_image(folder: Path, cache: CachedTokens) -> None:
    """The views of each image in an npy file of its own, uint16."""
    folder.mkdir()
    tokens = np.load(cache.folder / "tokens.npy", mmap_mode="r")
    for i, views in enumerate(tokens):
        np.save(folder / f"{i:06}.npy", views)


def disk(folder: Path) -> tuple[int, int, int]:
    """Bytes of content, bytes of occupied blocks, and files of a folder."""
    stats = [file.stat() for file in folder.rglob("*") if file.is_file()]
    return sum(s.st_size for s in stats), sum(s.st_blocks * 512 for s in stats), len(stats)


def fastest(readers: dict[str, Read], places: np.ndarray, batch: int) -> dict[str, float]:
    """Seconds an image of each reader, in its fastest round; `places` [rounds, images]."""
    best = dict.fromkeys(readers, float("inf"))
    for row in places:
        for name, read in readers.items():
            start = time.perf_counter()
            for first in range(0, len(row), batch):
                read(row[first : first + batch].tolist())
            best[name] = min(best[name], (time.perf_counter() - start) / len(row))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (("images", 4000), ("rounds", 5), ("batch", 64), ("size", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--reads", type=int, default=512, help="images a round")
    parser.add_argument("--json", default="", help="write the numbers here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = measure(Path(folder), options)
    print_report(report)
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1))


def measure(root: Path, options: argparse.Namespace) -> dict:
    """Write the three kinds of files, read them in four ways."""
    torch.manual_seed(0)
    tokenizer = ViTVQ(
        VectorQuantizer(512, 16), options.size, encoder_depth=2, decoder_depth=4
    ).eval()
    images = write_images(root / "images", options.images, options.size)
    start = time.perf_counter()
    encode_dataset(tokenizer, images, root / "cache", name="shapes", batch_size=options.batch)
    seconds = time.perf_counter() - start
    cache = CachedTokens(root / "cache")
    write_one_file_an_image(root / "files", cache)

    def from_files(indices: list[int]) -> Tensor:
        rows = [np.load(root / "files" / f"{i:06}.npy")[i % 2] for i in indices]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    readers: dict[str, Read] = {
        "cache": lambda indices: cache.batch(indices)["tokens"],
        "one file an image": from_files,
        "images, without encoding": lambda indices: images.batch(indices)["image"],
        "images, encoded": lambda indices: encode(tokenizer, images.batch(indices)["image"]),
    }
    places = np.random.default_rng(0).integers(0, options.images, (options.rounds, options.reads))
    times = fastest(readers, places, options.batch)
    folders = {"cache": "cache", "one file an image": "files", "images, encoded": "images"}
    return {
        "images": options.images,
        "views": cache.header.views,
        "tokens": tokenizer.layout.length,
        "batch": options.batch,
        "encoding_seconds": seconds,
        "microseconds_an_image": {name: 1e6 * t for name, t in times.items()},
        "times_the_cache": {name: t / times["cache"] for name, t in times.items()},
        "disk": {name: disk(root / folder) for name, folder in folders.items()},
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}",
    }


def print_report(report: dict) -> None:
    print(
        f"{report['images']} images, {report['views']} views of {report['tokens']} tokens; {report['machine']}"
    )
    print(f"encoding all views once: {report['encoding_seconds']:.1f} s")
    print(f"{'':<26}{'us/image':>10}{'of cache':>10}{'MB':>9}{'MB on disk':>12}{'files':>9}")
    for name, micro in report["microseconds_an_image"].items():
        size = report["disk"].get(name)
        where = f"{size[0] / 1e6:9.2f}{size[1] / 1e6:12.2f}{size[2]:9}" if size else ""
        print(f"{name:<26}{micro:10.1f}{report['times_the_cache'][name]:9.1f}x{where}")


if __name__ == "__main__":
    main()
