import subprocess
import sys
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser
from lightning import LightningModule, Trainer
from PIL import Image

import tessellar.data
from tessellar.data import FashionMNISTData, ImageDataModule, ImageFolderData, ShapesData, collate
from tessellar.data.batch import normalised
from tessellar.data.framing import Framing
from tessellar.errors import UserError
from tessellar.images import from_uint8, to_uint8


class Recorder(LightningModule):
    """Notes the indices of every batch that it is trained and validated on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.train_indices: dict[int, list[int]] = {}
        self.val_indices: list[int] = []

    def training_step(self, batch):
        self.train_indices.setdefault(self.current_epoch, []).extend(batch["index"].tolist())
        return self.weight * batch["image"].mean()

    def validation_step(self, batch):
        self.val_indices.extend(batch["index"].tolist())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def fit(data: ImageDataModule, epochs: int, root: Path) -> Recorder:
    module = Recorder()
    Trainer(max_epochs=epochs, **QUIET, default_root_dir=root).fit(module, data)
    return module


@pytest.fixture(params=["shapes", "fashion-mnist", "pictures"])
def data(request: pytest.FixtureRequest, idx_root: Path, image_root: Path) -> ImageDataModule:
    match request.param:
        case "shapes":
            return ShapesData(size=16, length=70, val_length=30, batch_size=4)
        case "fashion-mnist":
            return FashionMNISTData(str(idx_root), batch_size=4, flip=True)
        case _:
            return ImageFolderData(str(image_root), size=16, val_share=0.25, batch_size=4)


def test_all_sets_offer_the_same_facts(data: ImageDataModule, request: pytest.FixtureRequest):
    assert data.name == request.node.callspec.params["data"]
    assert data.num_classes == len(data.class_names) == len(data.train_dataset().class_names)
    assert int(data.train_dataset().labels.max()) < data.num_classes
    assert data.fingerprint() == data.fingerprint()
    assert torch.equal(data.test_dataset()[1]["image"], data.val_dataset()[1]["image"])
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        batch = next(iter(loader))
        # Files are handed over as bytes; the module's hook makes floats of them on the device.
        of_files = isinstance(data, ImageFolderData)
        assert batch["image"].dtype == (torch.uint8 if of_files else torch.float32)
        batch = data.on_after_batch_transfer(batch, 0)
        assert batch["image"].shape[1:] == (3, *data.image_size)
        assert batch["image"].dtype == torch.float32 and batch["image"].abs().max() <= 1
        assert batch["label"].dtype == batch["index"].dtype == torch.int64
        assert all(isinstance(caption, str) for caption in batch["caption"]) and len(
            batch["caption"]
        ) == len(batch["image"])


def test_a_tokenizer_is_trained_from_bytes_as_from_floats(image_root: Path):
    """Whether its images come through the data module's hook or from a bare loader."""
    data = ImageFolderData(str(image_root), size=16, batch_size=4)
    batch = next(iter(data.train_dataloader()))
    found = data.on_after_batch_transfer(batch, 0)["image"]
    assert torch.equal(to_uint8(found), batch["image"])
    assert torch.equal(found, from_uint8(batch["image"])) and found is not batch["image"]
    assert data.on_after_batch_transfer({"tokens": found}, 0)["tokens"] is found


def test_training_drops_the_last_partial_batch_and_validation_keeps_it(data: ImageDataModule):
    train = [batch["index"] for batch in data.train_dataloader()]
    assert {len(index) for index in train} == {4} and len(train) == len(data.train_dataset()) // 4
    val = torch.cat([batch["index"] for batch in data.val_dataloader()])
    assert val.tolist() == list(range(len(data.val_dataset())))


def test_a_batch_is_what_collating_its_samples_gives(data: ImageDataModule):
    dataset = data.train_dataset()
    one = normalised(dataset.__getitems__([5, 0, 3]))
    other = collate([dataset[5], dataset[0], dataset[3]])
    assert set(one) == set(other) and one["caption"] == other["caption"]
    assert all(torch.equal(one[key], other[key]) for key in ("image", "label", "index"))


def test_reference_images_are_not_augmented(data: ImageDataModule):
    reference = data.train_dataset(augment=False)
    first = reference.batch(range(8))["image"]
    reference.set_epoch(1)
    assert torch.equal(reference.batch(range(8))["image"], first)
    assert len(reference) == len(data.train_dataset())


def test_every_epoch_has_another_order_which_the_seed_repeats(tmp_path: Path):
    first, second = (
        fit(ShapesData(size=8, length=24, val_length=10, batch_size=4), 2, tmp_path)
        for _ in range(2)
    )
    assert first.train_indices == second.train_indices
    assert first.train_indices[0] != first.train_indices[1]
    assert sorted(first.train_indices[0]) == sorted(first.train_indices[1]) == list(range(24))
    assert first.val_indices == 2 * list(range(10))
    other = fit(ShapesData(size=8, length=24, val_length=10, batch_size=4, seed=1), 1, tmp_path)
    assert other.train_indices[0] != first.train_indices[0]


def test_a_run_resumed_between_epochs_sees_the_order_of_its_epoch(tmp_path: Path):
    def data() -> ShapesData:
        return ShapesData(size=8, length=24, val_length=10, batch_size=4, num_workers=1)

    whole = fit(data(), 2, tmp_path)
    module, trainer = Recorder(), Trainer(max_epochs=1, **QUIET, default_root_dir=tmp_path)
    trainer.fit(module, data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = Recorder()
    Trainer(max_epochs=2, **QUIET, default_root_dir=tmp_path).fit(
        resumed, data(), ckpt_path=tmp_path / "last.ckpt"
    )
    assert resumed.train_indices == {1: whole.train_indices[1]}


def test_workers_change_nothing(image_root: Path, tmp_path: Path):
    def images(num_workers: int) -> list[torch.Tensor]:
        data = ImageFolderData(
            str(image_root), 16, crop="random", batch_size=4, num_workers=num_workers
        )
        loader = data.train_dataloader()
        assert loader.persistent_workers == (num_workers > 0)  # one start for all epochs
        found = []
        for epoch in (3, 4, 7):
            loader.sampler.set_epoch(epoch)
            found += [batch["image"] for batch in loader]
        return found

    alone, shared = images(0), images(2)
    assert len(alone) == 6 and all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


def test_a_loader_draws_nothing_from_the_global_random_numbers():
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    assert len(list(ShapesData(size=8, length=20, batch_size=4).train_dataloader())) == 5
    assert (torch.rand(1), np.random.rand()) == expected


@pytest.mark.parametrize("num_workers", [0, 2])
def test_corrupt_images_are_counted_over_workers_and_named_at_the_end(
    image_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, num_workers: int
):
    for name in ("cat/01.png", "dog/02.png"):
        (image_root / name).write_bytes(b"")
    data = ImageFolderData(
        str(image_root), 16, val_share=0.01, batch_size=2, num_workers=num_workers, max_corrupt=0.5
    )
    seen = fit(data, 2, tmp_path).train_indices
    assert all(len(set(epoch)) == len(epoch) == 10 for epoch in seen.values())
    (line,) = [
        record.getMessage() for record in caplog.records if "were skipped" in record.getMessage()
    ]
    assert line.startswith("2 of 11 images") and "01.png" in line and "02.png" in line


def test_ranks_see_different_images():
    class Ranked(ShapesData):
        rank = 0

        @property
        def trainer(self):
            facts = {"global_rank": self.rank, "world_size": 2, "current_epoch": 1}
            return type("Trainer", (), {**facts, "strategy": None})

        @trainer.setter
        def trainer(self, value) -> None: ...

    seen, val = [], []
    for rank in range(2):
        data = Ranked(size=8, length=21, val_length=11, batch_size=5)
        data.rank = rank
        seen += torch.cat([batch["index"] for batch in data.train_dataloader()]).tolist()
        val += torch.cat([batch["index"] for batch in data.val_dataloader()]).tolist()
    assert len(set(seen)) == len(seen) == 20
    assert sorted(val) == list(range(11))


def test_too_few_images_for_a_batch_are_refused():
    with pytest.raises(
        UserError, match="shapes has 5 training images, too few for a batch of 6 .*batch_size"
    ):
        ShapesData(length=5, batch_size=6).train_dataloader()
    with pytest.raises(ValueError, match="batch_size is 0"):
        ShapesData(batch_size=0)


def test_validation_folders_are_read_and_must_have_the_same_classes(
    image_root: Path, tmp_path: Path
):
    val = tmp_path / "val"
    for name in ("cat", "dog", "wolf"):
        (val / name).mkdir(parents=True)
        Image.new("RGB", (20, 20), (9, 9, 9)).save(val / name / "x.png")
    data = ImageFolderData(str(image_root), 16, val_root=str(val))
    with pytest.raises(UserError, match="different classes, for example 'red_fox'"):
        data.val_dataset()
    (val / "wolf").rename(val / "red_fox")
    data = ImageFolderData(str(image_root), 16, val_root=str(val), name="pets")
    assert (len(data.train_dataset()), len(data.val_dataset()), data.name) == (12, 3, "pets")
    assert data.val_dataset()[0]["image"].unique().numel() == 1


def test_the_fingerprint_ignores_augmentation_and_follows_content(image_root: Path):
    one, other = (
        ImageFolderData(str(image_root), 16, crop=crop, flip=False) for crop in ("adm", "random")
    )
    assert one.fingerprint() == other.fingerprint()
    assert one.fingerprint() != ImageFolderData(str(image_root), 8).fingerprint()
    assert ShapesData().fingerprint() != ShapesData(seed=1).fingerprint()


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("ShapesData", {"size": 16}),
        ("FashionMNISTData", {"root": "somewhere"}),
        (
            "ImageFolderData",
            {"root": "somewhere", "size": 16, "crop": "ten", "flip": False, "ten_ratios": [1.1]},
        ),
        (
            "WebDatasetData",
            {"shards": "somewhere/{00..11}.tar", "size": 16, "val_shards": ["a.tar", "b.tar"]},
        ),
        (
            "WebDatasetStreamData",
            {"shards": "a", "val_shards": "b", "size": 16, "epoch_length": 1000},
        ),
        ("HFData", {"path": "owner/name", "size": 16, "label": None, "caption": "text"}),
        (
            "CachedTokensData",
            {"root": "somewhere", "images": {"class_path": "tessellar.data.ShapesData"}},
        ),
    ],
)
def test_sets_are_built_from_yaml_without_touching_files(name: str, arguments: dict):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageDataModule, "data")
    config = parser.parse_object(
        {"data": {"class_path": f"tessellar.data.{name}", "init_args": arguments}}
    )
    built = parser.instantiate(config).data
    assert (
        type(built).__name__ == name
        and isinstance(built, ImageDataModule)
        and built.batch_size == 64
    )


@pytest.mark.parametrize(
    "name", ["ImageFolderData", "WebDatasetData", "WebDatasetStreamData", "HFData"]
)
def test_sets_of_own_pictures_take_the_same_options(name: str) -> None:
    """By their names in YAML, with the same defaults; a stream cannot draw classes equally often."""
    path = f"tessellar.data.{name}"
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageDataModule, "data")
    where = {"root": "a", "shards": "a", "val_shards": "b", "path": "a", "epoch_length": 64}
    own = signature(getattr(tessellar.data, name)).parameters
    given = {key: value for key, value in where.items() if key in own}
    framing = {"crop": "ten", "flip": False, "ten_ratios": [1.1, 1.3], "max_corrupt": 0.25}
    loading = {"batch_size": 8, "num_workers": 0, "seed": 5, "name": "mine"}
    arguments = {"size": 16, **given, **framing, **loading}
    config = parser.parse_object({"data": {"class_path": path, "init_args": arguments}})
    built = parser.instantiate(config).data
    assert built.framing == Framing(16, "ten", False, (1.1, 1.3)) and built.name == "mine"
    assert (built.batch_size, built.seed, built.max_corrupt) == (8, 5, 0.25)
    refused = {"class_path": path, "init_args": {**arguments, "balance": True}}
    if name == "WebDatasetStreamData":
        with pytest.raises(ArgumentError, match="balance"):
            parser.parse_object({"data": refused})
    else:
        assert parser.instantiate(parser.parse_object({"data": refused})).data.balance


def test_importing_the_package_is_light_and_unknown_names_are_errors():
    code = "import sys, tessellar.data as d; assert not {'torch', 'lightning'} & set(sys.modules); d.Nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "has no attribute 'Nothing'" in done.stderr


def test_samples_with_different_keys_do_not_collate():
    image = torch.zeros(3, 2, 2)
    with pytest.raises(ValueError, match="different keys"):
        collate([{"image": image, "index": 0, "label": 1}, {"image": image, "index": 1}])
    assert set(collate([{"image": image, "index": 4}])) == {"image", "index"}
