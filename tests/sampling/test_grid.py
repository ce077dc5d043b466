"""Grids: cells at a size to look at, gaps, labels beside rows, captions that are wrapped."""

import pytest
import torch

from tessellar.sampling.grid import CELL, GAP, LABEL_WIDTH, picture_grid, text_width, wrapped

BLACK = torch.zeros(3, 24, 24, dtype=torch.uint8)


def test_small_cells_are_enlarged_and_apart() -> None:
    image = torch.randint(0, 256, (3, 24, 24), dtype=torch.uint8)
    grid = picture_grid([[image, BLACK], [BLACK]])
    side = 24 * 5
    assert grid.shape == (3, 2 * side + 3 * GAP, 2 * side + 3 * GAP)
    assert torch.equal(grid[:, GAP : GAP + side : 5, GAP : GAP + side : 5], image)
    assert bool((grid[:, :, GAP + side : 2 * GAP + side] == 255).all())
    assert bool((grid[:, 2 * GAP + side :, 2 * GAP + side :] == 255).all())  # the short row


def test_images_of_a_size_to_look_at_stay_as_they_are() -> None:
    image = torch.randint(0, 256, (3, 2 * CELL, CELL), dtype=torch.uint8)
    grid = picture_grid([[image]])
    assert torch.equal(grid[:, GAP:-GAP, GAP:-GAP], image)


def test_labels_stand_beside_and_above_in_places_of_their_own() -> None:
    plain = picture_grid([[BLACK], [BLACK]])
    named = picture_grid(
        [[BLACK], [BLACK]], row_labels=["bag", "an ankle boot of brown leather and more"]
    )
    assert named.shape[1] == plain.shape[1]
    left = named.shape[2] - plain.shape[2]
    assert 0 < left <= LABEL_WIDTH + 2 * GAP
    assert torch.equal(named[:, :, left:], plain)
    assert bool((named[:, :, :left] < 128).any())  # ink
    above = picture_grid([[BLACK], [BLACK]], column_labels=["sample"])
    assert torch.equal(above[:, -plain.shape[1] :], plain) and bool((above[:, :20] < 128).any())


def test_captions_are_wrapped_below_their_cells() -> None:
    captions = [["arrow right, arrow left, icons and letters of many kinds"], ["a"]]
    plain = picture_grid([[BLACK], [BLACK]])
    grid = picture_grid([[BLACK], [BLACK]], captions=captions)
    assert grid.shape[2] == plain.shape[2] and grid.shape[1] > plain.shape[1] + 2 * 18
    assert bool((grid[:, :, :GAP] == 255).all() and (grid[:, :, -GAP:] == 255).all())


@pytest.mark.parametrize(
    "text", ["arrow right, arrow left, icons", "a" * 90, "", "naïve\nline\x1bbreak"]
)
def test_wrapped_lines_fit_and_break_at_words(text: str) -> None:
    lines = wrapped(text, 120, 3)
    assert len(lines) <= 3 and all(text_width(line) <= 120 for line in lines)
    assert all(line.isprintable() for line in lines)
    if not lines[-1].endswith("..."):
        words = text.replace("\n", " ").replace("\x1b", " ").split()
        assert " ".join(lines).split() == words


def test_what_does_not_fit_ends_in_dots() -> None:
    assert wrapped("one two three four five six seven eight nine", 60, 2)[-1].endswith("...")
