"""Nearest training images, and curves."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from tessellar.errors import UserError
from tessellar.evaluation.pictures import metric_curves, nearest, neighbour_grid, pick_images
from tessellar.evaluation.sources import ArrayImages
from tessellar.sampling.grid import picture_grid

Images = Callable[..., Tensor]
Write = Callable[..., Path]


def test_nearest_equals_a_full_search(
    random_images: Images, write_npz: Write, tmp_path: Path
) -> None:
    train, queries = random_images(40, seed=1), random_images(5, seed=2)
    queries[2] = train[17]
    found = nearest(queries, ArrayImages(write_npz(train, tmp_path / "t.npz")), 3, batch_size=7)
    distances = torch.cdist(queries.flatten(1).double() / 127.5, train.flatten(1).double() / 127.5)
    expected = distances.sort(dim=1)
    torch.testing.assert_close(found.distances, expected.values[:, :3], rtol=1e-5, atol=1e-5)
    assert (
        torch.equal(found.images, train[expected.indices[:, :3]])
        and float(found.distances[2, 0]) == 0
    )


def test_nearness_is_that_of_the_embedding(
    random_images: Images, write_npz: Write, tmp_path: Path
) -> None:
    """By mean brightness alone, the nearest is the one of equal brightness, whatever it shows."""
    train = torch.stack(
        [torch.full((3, 8, 8), level, dtype=torch.uint8) for level in (10, 90, 200)]
    )
    query = torch.randint(80, 100, (1, 3, 8, 8), dtype=torch.uint8)
    source = ArrayImages(write_npz(train, tmp_path / "t.npz"))
    found = nearest(query, source, 1, lambda images: images.float().mean(dim=(1, 2, 3))[:, None])
    assert torch.equal(found.images[0, 0], train[1])


def test_each_row_is_a_sample_and_its_neighbours(
    random_images: Images, write_npz: Write, tmp_path: Path
) -> None:
    train, queries = random_images(9, seed=1), random_images(2, seed=2)
    found = nearest(queries, ArrayImages(write_npz(train, tmp_path / "t.npz")), 3)
    grid = neighbour_grid(queries, found)
    rows = [[queries[row], *found.images[row]] for row in range(2)]
    columns = ["sample", "nearest 1", "nearest 2", "nearest 3"]
    assert torch.equal(grid, picture_grid(rows, column_labels=columns))


def test_picked_images_are_always_the_same_part(
    random_images: Images, write_npz: Write, tmp_path: Path
) -> None:
    source = ArrayImages(write_npz(random_images(50), tmp_path / "t.npz"))
    assert (
        torch.equal(pick_images(source, 6), pick_images(source, 6))
        and len(pick_images(source, 6)) == 6
    )


def test_curves_of_a_csv_logger(tmp_path: Path) -> None:
    rows = ["epoch,step,train/loss,val/distance", "0,1,3.0,", "0,2,2.0,", "0,2,,9.5", "1,4,,8.5"]
    (tmp_path / "metrics.csv").write_text("\n".join(rows))
    assert metric_curves(tmp_path / "metrics.csv", tmp_path / "all.png") == [
        "train/loss",
        "val/distance",
    ]
    assert metric_curves(tmp_path / "metrics.csv", tmp_path / "val.png", prefix="val/") == [
        "val/distance"
    ]
    assert Image.open(tmp_path / "all.png").size[0] == 1200
    assert metric_curves(tmp_path / "metrics.csv", tmp_path / "none.png", prefix="test/") == []
    assert not (tmp_path / "none.png").exists()
    with pytest.raises(UserError, match="is not a metrics.csv"):
        metric_curves(tmp_path / "missing.csv", tmp_path / "none.png")
