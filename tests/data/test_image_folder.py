from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tessellar.data.crops import center_crop, ten_crop
from tessellar.data.image_file import read_image
from tessellar.data.sets.image_folder import ImageFolder, list_folder, split_listing
from tessellar.errors import UserError
from tessellar.images import to_uint8


def pixels(image: torch.Tensor) -> np.ndarray:
    return to_uint8(image).permute(1, 2, 0).numpy()


def test_classes_are_sorted_folders_and_files_are_found_below_them(image_root: Path):
    data = ImageFolder(image_root, 16)
    assert data.class_names == ("cat", "dog", "red_fox") and len(data) == 12
    assert data.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert data.files[4:8] == ("dog/02.png", "dog/08.png", "dog/11.png", "dog/deeper/05.png")
    sample = data[9]
    assert sample["caption"] == "red fox" and sample["label"] == 2 and sample["index"] == 9
    assert sample["image"].shape == (3, 16, 16) and sample["image"].dtype == torch.float32


def test_the_adm_crop_is_deterministic(image_root: Path):
    data = ImageFolder(image_root, 16)
    expected = center_crop(read_image(image_root / data.files[7]), 16)
    assert np.array_equal(pixels(data[7]["image"]), np.asarray(expected))
    assert data.num_views == 1 and torch.equal(data.view(7, 0), data[7]["image"])


@pytest.mark.parametrize(
    "options",
    [{"flip": True}, {"crop": "random"}, {"crop": "random", "flip": True}, {"crop": "ten"}],
)
def test_augmentation_is_a_function_of_seed_epoch_and_index(image_root: Path, options: dict):
    def epoch(number: int, seed: int = 0) -> torch.Tensor:
        data = ImageFolder(image_root, 16, seed=seed, **options)
        data.set_epoch(number)
        assert torch.equal(data[3]["image"], data.batch([8, 3])["image"][1])
        return data.batch(range(12))["image"]

    assert torch.equal(epoch(2), epoch(2))
    assert not torch.equal(epoch(2), epoch(3)) and not torch.equal(epoch(2), epoch(2, seed=1))


def test_every_visit_shows_one_of_the_enumerated_views(image_root: Path):
    for options, count in (
        ({"flip": True}, 2),
        ({"crop": "ten"}, 10),
        ({"crop": "ten", "ten_ratios": (1.1, 1.05)}, 20),
    ):
        data = ImageFolder(image_root, 40, **options)
        views = [data.view(5, k) for k in range(count)]
        assert data.num_views == count
        seen = set()
        for epoch in range(8 * count):
            data.set_epoch(epoch)
            image = data[5]["image"]
            seen.add(next(k for k, view in enumerate(views) if torch.equal(view, image)))
        assert len(seen) >= 0.9 * count


def test_ten_crop_views_come_in_the_order_of_ratios_and_crops(image_root: Path):
    data = ImageFolder(image_root, 20, crop="ten", ten_ratios=(1.1, 1.5))
    image = read_image(image_root / data.files[2])
    assert np.array_equal(pixels(data.view(2, 7)), np.asarray(ten_crop(image, 20, 7, 1.1)))
    assert np.array_equal(pixels(data.view(2, 13)), np.asarray(ten_crop(image, 20, 3, 1.5)))
    with pytest.raises(ValueError, match="view is 20"):
        data.view(2, 20)


def test_random_crops_cannot_be_enumerated(image_root: Path):
    data = ImageFolder(image_root, 16, crop="random")
    with pytest.raises(UserError, match="cannot be enumerated"):
        data.view(0, 0)


def test_without_a_crop_files_must_have_the_size(tmp_path: Path):
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 9)).save(tmp_path / "b.png")
    data = ImageFolder(tmp_path, 8, crop="none")
    assert (pixels(data[0]["image"]) == (255, 0, 0)).all()
    with pytest.raises(UserError, match="b.png is 8x9; crop 'none' needs 8x8"):
        data[1]


def test_a_flat_folder_is_one_class_of_its_own_name(tmp_path: Path):
    root = tmp_path / "faces"
    root.mkdir()
    for name in ("b.PNG", "a.webp"):
        Image.new("RGB", (8, 8)).save(root / name)
    data = ImageFolder(root, 8)
    assert (
        data.files == ("a.webp", "b.PNG")
        and data.class_names == ("faces",)
        and data.labels.tolist() == [0, 0]
    )


def test_a_damaged_image_gives_place_to_the_next_or_is_refused_by_name(image_root: Path):
    path = image_root / "cat" / "10.png"
    path.write_bytes(path.read_bytes()[:200])
    data, sound = ImageFolder(image_root, 16), ImageFolder(image_root, 16)
    batch = data.batch(range(12))
    assert data.files[3] == "cat/10.png" and data.corrupt == [3]
    assert torch.equal(batch["image"][3], sound[4]["image"]) and batch["index"].tolist() == list(
        range(12)
    )
    assert batch["label"][3] == 1 and batch["caption"][3] == "dog"
    with pytest.raises(UserError, match="cat/10.png: .*truncated"):
        ImageFolder(image_root, 16, max_corrupt=0).batch(range(12))


def test_folders_that_cannot_be_understood_are_refused(image_root: Path, tmp_path: Path):
    with pytest.raises(UserError, match="nowhere is not a folder"):
        list_folder(tmp_path / "nowhere")
    (tmp_path / "void").mkdir()
    with pytest.raises(UserError, match="void holds no image"):
        list_folder(tmp_path / "void")
    (image_root / "bird").mkdir()
    with pytest.raises(UserError, match="bird holds no image"):
        list_folder(image_root)
    Image.new("RGB", (8, 8)).save(image_root / "stray.png")
    with pytest.raises(UserError, match="stray.png.*bird"):
        list_folder(image_root)


def test_wrong_arguments_are_refused(image_root: Path):
    for options in (
        {"crop": "five"},
        {"crop": "ten", "flip": True},
        {"crop": "ten", "ten_ratios": (0.9,)},
        {"size": 0},
    ):
        with pytest.raises(ValueError):
            ImageFolder(image_root, **({"size": 16} | options))


def test_a_held_out_share_is_disjoint_complete_and_stable(image_root: Path):
    listing = list_folder(image_root)
    train, val = split_listing(listing, 0.25)
    assert len(val.files) == 3 and sorted([*train.files, *val.files]) == sorted(listing.files)
    assert train.class_names == val.class_names == listing.class_names
    for part in (train, val):
        for file, label in zip(part.files, part.labels, strict=True):
            assert file.startswith(listing.class_names[label] + "/")
    assert set(split_listing(listing.take(range(11)), 0.25)[1].files) <= set(
        split_listing(listing, 0.5)[1].files
    )
    assert len(split_listing(listing, 0.0001)[1].files) == 1
    assert len(split_listing(listing, 0.9999)[0].files) == 3  # one of each class
    for share, count in ((0.0, 12), (1.0, 12), (0.5, 1)):
        with pytest.raises(UserError, match="hold out"):
            split_listing(listing.take(range(count)), share)


def test_the_fingerprint_follows_files_and_views(image_root: Path):
    def fingerprint(**options) -> str:
        return ImageFolder(image_root, **({"size": 16} | options)).fingerprint()

    before = fingerprint()
    assert fingerprint(ten_ratios=(1.2,), seed=3) == before
    assert len({before, fingerprint(size=8), fingerprint(flip=True), fingerprint(crop="ten")}) == 4
    Image.new("RGB", (40, 40)).save(image_root / "cat" / "00.png")
    assert fingerprint() != before
