"""Pictures that tell what numbers hide: the nearest training images of samples (memorisation), and
curves of a run.
"""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tessellar.distributed import all_gather, own_share, rank
from tessellar.errors import UserError, check_is_file, writing
from tessellar.evaluation.sources import ImageSource
from tessellar.evaluation.subset import subset
from tessellar.images import from_uint8
from tessellar.progress import Progress
from tessellar.sampling.grid import picture_grid

Embed = Callable[[Tensor], Tensor]


class Neighbours(NamedTuple):
    """For each of N images its k nearest: `images` uint8 [N, k, 3, H, W], `distances` [N, k]
    ascending.
    """

    images: Tensor
    distances: Tensor


def pixels(images: Tensor) -> Tensor:
    """Embedding by pixel values in [-1, 1]: uint8 [B, 3, H, W] to [B, D]."""
    return from_uint8(images).flatten(1)


def pick_images(source: ImageSource, count: int) -> Tensor:
    """A fixed random part of `count` images of a source, the same on every rank; uint8 [n, 3, H,
    W].
    """
    picked: dict[int, Tensor] = {}
    places = subset(source.count, count)
    for batch in source.batches(64):
        rows = torch.isin(batch.index, places)
        picked |= zip(batch.index[rows].tolist(), batch.images[rows], strict=True)
    chosen: dict[int, Tensor] = {}
    for part in all_gather(picked):
        chosen |= part
    return torch.stack([chosen[index] for index in sorted(chosen)])


def nearest(
    queries: Tensor, source: ImageSource, count: int, embed: Embed = pixels, batch_size: int = 256
) -> Neighbours:
    """The `count` images of `source` nearest to each of the uint8 images `queries` [N, 3, H, W],
    over all ranks.

    Distances are Euclidean between `embed(images)` [B, D].
    """
    points = embed(queries).cpu().double()
    best: Neighbours | None = None
    with Progress("searching", len(own_share(source.count)), "images", quiet=rank() > 0) as bar:
        for batch in source.batches(batch_size):
            if batch.images.shape[1:] != queries.shape[1:]:
                raise UserError(
                    f"samples are {tuple(queries.shape[2:])}, images of {source.name} are "
                    f"{tuple(batch.images.shape[2:])}: compare images of one size (--data.size)"
                )
            distances = torch.cdist(points, embed(batch.images).cpu().double())
            closest = distances.sort(dim=1, stable=True)
            found = Neighbours(batch.images[closest.indices[:, :count]], closest.values[:, :count])
            best = found if best is None else _closest([best, found], count)
            bar.update(len(batch.images))
    parts = [part for part in all_gather(best) if part is not None]
    if not parts:
        raise UserError(f"{source.name} holds no images")
    return _closest(parts, count)


def _closest(parts: list[Neighbours], count: int) -> Neighbours:
    images, distances = (torch.cat(column, dim=1) for column in zip(*parts, strict=True))
    order = distances.sort(dim=1, stable=True).indices[:, :count]
    rows = torch.arange(len(order))[:, None]
    return Neighbours(images[rows, order], distances[rows, order])


def neighbour_grid(queries: Tensor, neighbours: Neighbours) -> Tensor:
    """One uint8 picture [3, H', W']: each row an image of `queries` and, to its right, its
    neighbours.
    """
    cells = torch.cat([queries[:, None].cpu(), neighbours.images], dim=1)
    columns = ["sample"]
    for number in range(1, cells.shape[1]):
        columns.append(f"nearest {number}")
    return picture_grid(cells.unbind(), column_labels=columns)


def metric_curves(metrics_csv: str | Path, out: str | Path, prefix: str = "") -> list[str]:
    """Draw every column of a run's metrics.csv that begins with `prefix` over its steps, a panel
    each, as one PNG.

    Returns the names of the columns drawn; without any, no file is written. Raises UserError for
    another kind of file.
    """
    # Slow to import; a Figure of its own needs no display.
    from matplotlib.figure import Figure

    curves = columns_of(Path(metrics_csv), prefix)
    if not curves:
        return []
    rows = -(-len(curves) // 3)
    figure = Figure(figsize=(12, 2.6 * rows), layout="constrained")
    for place, (name, points) in enumerate(curves.items(), start=1):
        panel = figure.add_subplot(rows, 3, place)
        panel.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else "")
        panel.set_title(name, fontsize=9)
    with writing(out, unfinished=out):
        figure.savefig(out, dpi=100)
    return list(curves)


def columns_of(path: Path, prefix: str) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by column, without empty cells and bookkeeping columns."""
    curves: dict[str, list[tuple[int, float]]] = {}
    check_is_file(path)
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if value and name.startswith(prefix) and name not in ("step", "epoch"):
                        curves.setdefault(name, []).append((int(row["step"]), float(value)))
    except (OSError, ValueError, KeyError, AttributeError, csv.Error) as error:
        raise UserError(f"{path} is not a metrics.csv of a run ({error})") from error
    return curves
