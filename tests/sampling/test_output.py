"""Files of a set of samples: what a reader of PNG, grid and npz gets is what was drawn."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tessellar.sampling.grid import picture_grid
from tessellar.sampling.output import SampleFolder, grid_rows

IMAGES = torch.randint(
    0, 256, (5, 3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_all_files_hold_the_images(tmp_path: Path) -> None:
    folder = SampleFolder(tmp_path, [7, 2, 7, 2, 7], (4, 6), png=True, npz=True, grid=True)
    folder.write([3, 0, 4], IMAGES[[3, 0, 4]])
    folder.write([1, 2], IMAGES[[1, 2]])
    folder.finish()
    names = [f"{i:06d}_{c:04d}.png" for i, c in enumerate([7, 2, 7, 2, 7])]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*names, "grid.png", "samples.npz"]
    channels_last = IMAGES.permute(0, 2, 3, 1).numpy()
    assert all(
        np.array_equal(pixels(tmp_path / name), channels_last[i]) for i, name in enumerate(names)
    )
    saved = np.load(tmp_path / "samples.npz")
    assert np.array_equal(saved["arr_0"], channels_last) and saved["arr_1"].tolist() == [
        7,
        2,
        7,
        2,
        7,
    ]
    grid = pixels(tmp_path / "grid.png")
    rows = [[IMAGES[0], IMAGES[2], IMAGES[4]], [IMAGES[1], IMAGES[3]]]
    expected = picture_grid(rows, row_labels=["7", "2"])
    assert np.array_equal(grid, expected.permute(1, 2, 0).numpy())


def test_names_of_classes_are_in_the_files_and_beside_the_rows(tmp_path: Path) -> None:
    titles = ["bag", "a/b: c", "été"]
    folder = SampleFolder(
        tmp_path, [2, 1, 2], (4, 6), png=True, npz=False, grid=True, titles=titles
    )
    folder.write([0, 1, 2], IMAGES[:3])
    folder.finish()
    names = ["000000_0002_été.png", "000001_0001_a-b-c.png", "000002_0002_été.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*names, "grid.png"]
    rows = [[IMAGES[0], IMAGES[2]], [IMAGES[1]]]
    expected = picture_grid(rows, row_labels=["été", "a/b: c"])
    assert np.array_equal(pixels(tmp_path / "grid.png"), expected.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("kind", ["png", "npz", "grid"])
def test_each_kind_alone(tmp_path: Path, kind: str) -> None:
    only = {name: name == kind for name in ("png", "npz", "grid")}
    folder = SampleFolder(tmp_path, [0, 1], (4, 6), **only)
    folder.write([0, 1], IMAGES[:2])
    folder.finish()
    expected = {
        "png": ["000000_0000.png", "000001_0001.png"],
        "npz": ["samples.npz"],
        "grid": ["grid.png"],
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == expected[kind]


def test_grids_show_a_row_a_class_or_a_square() -> None:
    assert grid_rows([4, 4, 1, 4]) == [[0, 1, 3], [2]]
    assert grid_rows([0] * 5) == [[0, 1, 2], [3, 4]]
    many = grid_rows([i % 30 for i in range(600)])
    assert len(many) == 20 and many[3] == list(range(3, 300, 30))
