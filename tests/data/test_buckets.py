"""Buckets: the nearest proportions, one shape a batch, every sample once, the same after a resume."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tessellar.cli.cache import cache
from tessellar.data.buckets import bucketing_of, nearest_buckets
from tessellar.data.image_file import read_image, read_shape
from tessellar.data.sampler import BucketSampler
from tessellar.data.sets.image_folder import ImageFolder, ImageFolderData
from tessellar.data.tars.webdataset_stream import WebDatasetStreamData
from tessellar.errors import UserError

SIZES = ((16, 16), (16, 24), (24, 16))
SHAPES = {"square": (20, 20), "wide": (20, 30), "tall": (33, 20), "strip": (10, 40)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve squares, ten wide, seven tall pictures and three strips, in one folder."""
    generator = np.random.default_rng(0)
    counts = {"square": 12, "wide": 10, "tall": 7, "strip": 3}
    root = tmp_path / "pictures"
    root.mkdir()
    for kind, count in counts.items():
        for number in range(count):
            pixels = generator.integers(0, 255, (*SHAPES[kind], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"{kind}{number}.png")
    return root


def data(folder: Path, **options) -> ImageFolderData:
    settings = {"batch_size": 3, "num_workers": 0, "crop": "random", "buckets": SIZES[1:]}
    return ImageFolderData(str(folder), 16, val_root=str(folder), **{**settings, **options})


def test_pictures_go_to_the_nearest_proportions_and_to_what_they_fill() -> None:
    shapes = np.array([[20, 20], [100, 150], [33, 20], [10, 40], [40, 38]])
    chosen, kept = nearest_buckets(shapes, SIZES)
    assert chosen.tolist() == [0, 1, 2, 1, 0]
    assert kept == pytest.approx([1, 1, 1.5 / 1.65, 1.5 / 4, 38 / 40])
    # Of the same proportions: the largest that is no larger than the picture, else the smallest.
    sizes = ((16, 16), (32, 32), (64, 64))
    shapes = np.array([[8, 8], [20, 20], [40, 39], [200, 200]])
    assert nearest_buckets(shapes, sizes)[0].tolist() == [0, 0, 1, 2]


def test_a_header_tells_the_upright_shape(tmp_path: Path) -> None:
    image = Image.new("RGB", (30, 20))
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    image.save(tmp_path / "turned.jpg", exif=exif)
    image.save(tmp_path / "plain.png")
    for name in ("turned.jpg", "plain.png"):
        shown = read_image(tmp_path / name)
        assert read_shape(tmp_path / name, name) == (shown.height, shown.width)
        assert read_shape((tmp_path / name).read_bytes(), name) == (shown.height, shown.width)
    (tmp_path / "broken.png").write_bytes(b"x")
    with pytest.raises(UserError, match="broken.png"):
        read_shape(tmp_path / "broken.png", "broken.png")


def test_a_batch_has_one_size_and_all_of_a_bucket_come(folder: Path) -> None:
    made = data(folder)
    loader = made.train_dataloader()
    shapes = []
    seen = []
    for batch in loader:
        shapes.append(tuple(batch["image"].shape))
        seen += batch["index"].tolist()
    assert len(shapes) == len(loader) == 4 + 4 + 2
    assert {shape[0] for shape in shapes} == {3} and {shape[2:] for shape in shapes} == set(SIZES)
    assert len(set(seen)) == len(seen) == 12 + 12 + 6  # 13 wide ones and strips, 7 tall ones
    again = [batch["index"].tolist() for batch in data(folder).train_dataloader()]
    assert sum(again, []) == seen
    assert isinstance(loader.sampler, BucketSampler)
    loader.sampler.set_epoch(1)
    assert [batch["index"].tolist() for batch in loader] != again
    # Validation: every picture once, whatever is left of a bucket in a smaller batch.
    batches = list(made.val_dataloader())
    assert sorted(i for batch in batches for i in batch["index"].tolist()) == list(range(32))
    assert len(batches) == len(made.val_dataloader()) == 4 + 5 + 3


def test_workers_frame_to_the_same_buckets(folder: Path) -> None:
    here = [batch["image"] for batch in data(folder).train_dataloader()]
    there = [batch["image"] for batch in data(folder, num_workers=1).train_dataloader()]
    assert all(map(torch.equal, here, there))


def test_counts_are_said_and_what_fits_none_or_fills_no_batch(folder: Path, caplog) -> None:
    made = data(folder, batch_size=8)
    assert "in buckets 16 x 16: 12, 16 x 24: 13, 24 x 16: 7" in made.found()
    assert "3 of 32 images fit no bucket" in caplog.text
    assert "bucket 24 x 16 has 7 images, too few for a batch of 8" in caplog.text
    assert {tuple(b["image"].shape[2:]) for b in made.train_dataloader()} == set(SIZES[:2])


def test_references_and_other_users_see_one_size(folder: Path) -> None:
    made = data(folder)
    assert made.val_dataset().batch(range(4))["image"].shape == (4, 3, 16, 16)
    assert made.contents() != data(folder, buckets=()).contents()
    made.take_size((16, 24))
    assert made.image_size == (16, 24) and not made.buckets
    assert next(iter(made.train_dataloader()))["image"].shape == (3, 3, 16, 24)


def test_what_does_not_go_together_is_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="choose one"):
        data(folder, balance=True)
    with pytest.raises(UserError, match="no bucket .* has the 20 images of a step"):
        data(folder, batch_size=20).train_dataloader()
    with pytest.raises(UserError, match="a stream"):
        WebDatasetStreamData("a.tar", "a.tar", 16, 10, buckets=SIZES)
    with pytest.raises(UserError, match="leave data.buckets out"):
        cache("nowhere", data(folder), out=str(tmp_path / "c"))
    with pytest.raises(UserError, match="crop 'none' needs"):
        list(data(folder, crop="none").train_dataloader())


def test_a_picture_that_cannot_be_read_has_the_first_bucket(folder: Path) -> None:
    (folder / "wide0.png").write_bytes(b"no picture")
    dataset = ImageFolder(folder, 16)
    bucketing = bucketing_of(dataset, SIZES)
    assert bucketing.counts == [13, 12, 7]
    made = data(folder, max_corrupt=0.1)
    assert sum(len(batch["image"]) for batch in made.val_dataloader()) == 32


def sampler(buckets: np.ndarray, world: int = 1, rank: int = 0, batch: int = 2, **options):
    settings = {"seed": 5, "drop_last": True, **options}
    return BucketSampler(
        range(len(buckets)), buckets, batch, rank=rank, world_size=world, **settings
    )


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 3), st.booleans())
def test_steps_of_several_ranks_are_those_of_one_process(of: list, world: int, drop: bool) -> None:
    buckets = np.array(of)
    options = {"drop_last": drop, "shuffle": drop}
    alone = list(sampler(buckets, batch=2 * world, **options))
    ranks = [list(sampler(buckets, world, rank, **options)) for rank in range(world)]
    lengths = [len(sampler(buckets, world, rank, **options)) for rank in range(world)]
    assert lengths == [len(batches) for batches in ranks]
    together = sorted(i for batches in ranks for batch in batches for i in batch)
    assert together == sorted(sum(alone, []))
    for batches in [alone, *ranks]:
        assert all(len(set(buckets[batch])) == 1 for batch in batches)
    if drop:
        for step, batch in enumerate(alone):
            assert sorted(sum((batches[step] for batches in ranks), [])) == sorted(batch)
    else:
        assert together == list(range(len(of)))


def test_a_resumed_order_goes_on_with_the_next_batch() -> None:
    buckets = np.arange(41) % 3
    first = sampler(buckets)
    batches = list(first)
    iterator = iter(first)
    for _ in range(5):
        next(iterator)
    state = first.state_dict()
    assert state["start"] == 10 and state["step"] == 2
    resumed = sampler(buckets)
    resumed.load_state_dict(state)
    assert list(resumed) == batches[5:]
    assert list(resumed) == batches  # a start holds for one pass
    two = [sampler(buckets, 2, rank, batch=1) for rank in range(2)]
    for one in two:
        one.load_state_dict(state)
    assert [a + b for a, b in zip(*two, strict=True)] == batches[5:]
    with pytest.raises(ValueError, match="2 samples a step; this one has 4"):
        sampler(buckets, batch=4).load_state_dict(state)
    with pytest.raises(UserError, match="at sample 10 of an epoch, within a batch of 4"):
        sampler(buckets, batch=4).seek(0, 10)
