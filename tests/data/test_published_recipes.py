"""A published recipe trains on all images of its data set: none is held out for validation."""

from pathlib import Path

import pytest
import yaml
from PIL import Image

from tessellar.cli.evaluation_run import split_of
from tessellar.data import HFData, ImageFolderData, WebDatasetData
from tessellar.data.token_cache.cached_tokens import CachedTokensData
from tessellar.errors import UserError
from tessellar.evaluation.protocols import HELD_OUT, PROTOCOLS

CONFIGS = Path(__file__).parents[2] / "configs"
FOLDERS = sorted((CONFIGS / "imagenet256").glob("*.yaml"))
TARS = sorted((CONFIGS / "t2i").glob("*.yaml"))


def folder(path: Path, count: int) -> str:
    """`count` images of two classes."""
    for i in range(count):
        place = path / f"class{i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (i, i, i)).save(place / f"{i:03d}.png")
    return str(path)


def block(path: Path, kind: type) -> dict:
    """The arguments of the data set in a YAML."""
    data = yaml.safe_load(path.read_text())["data"]
    assert data["class_path"] == f"tessellar.data.{kind.__name__}"
    return data["init_args"]


@pytest.mark.parametrize("path", FOLDERS, ids=lambda path: path.stem)
def test_recipes_of_folders_train_on_the_whole_root(path: Path, tmp_path: Path) -> None:
    given = block(path, ImageFolderData)
    assert given["root"] == "data/imagenet/train" and given["val_root"] == "data/imagenet/val"
    here = {"root": folder(tmp_path / "train", 40), "val_root": folder(tmp_path / "val", 6)}
    data = ImageFolderData(**{**given, **here})
    assert (len(data.train_dataset()), len(data.val_dataset()), data.holds_out) == (40, 6, False)
    assert "--data.root IMAGENET/train --data.val_root IMAGENET/val" in path.read_text()


@pytest.mark.parametrize("path", TARS, ids=lambda path: path.stem)
def test_recipes_of_tars_train_on_all_shards(path: Path, shards: Path) -> None:
    given = block(path, WebDatasetData)
    assert given["val_shards"] and given["val_shards"] != given["shards"]
    here = {"shards": str(shards / "train-*.tar"), "val_shards": str(shards / "val.tar")}
    data = WebDatasetData(**{**given, **here})
    assert (len(data.train_dataset()), len(data.val_dataset()), data.holds_out) == (30, 6, False)


def test_what_is_held_out_is_said_and_never_passes_for_a_validation_set(tmp_path: Path) -> None:
    data = ImageFolderData(folder(tmp_path / "mine", 40), 32)
    said = "38 training and 2 validation images (held out, never trained on), "
    assert data.found().startswith(said)
    source = split_of("val", data)
    assert source.split == HELD_OUT and split_of("train", data).split == "train"
    facts = (50_000, "data", "inception", "tf1-bilinear")
    for split, measured in ((HELD_OUT, None), ("val", HELD_OUT)):
        with pytest.raises(
            UserError,
            match="rfid-val needs the validation images .* held out of its training images",
        ):
            PROTOCOLS["rfid-val"].check(*facts, split, measured)
    assert PROTOCOLS["rfid-val"].check(*facts, "val", "val") == []
    assert PROTOCOLS["free"].check(*facts, HELD_OUT, HELD_OUT) == []


def test_every_data_set_knows_whether_it_holds_images_out(tmp_path: Path) -> None:
    assert HFData("some", 32).holds_out and not HFData("some", 32, val_split="validation").holds_out
    assert (
        WebDatasetData("some", 32).holds_out
        and not WebDatasetData("some", 32, val_shards="other").holds_out
    )
    folders = ImageFolderData(str(tmp_path), 32)
    assert CachedTokensData("some", folders).holds_out and not CachedTokensData("some").holds_out
