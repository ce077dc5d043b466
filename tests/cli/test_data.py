"""`tessellar data imagenet`: tars of tars, labels by every way, folders as they are; resumable, counted."""

import csv
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tessellar.cli.data import main
from tessellar.cli.main import dispatch
from tessellar.data import ImageFolderData, WebDatasetData, imagenet
from tessellar.errors import UserError

CLASSES = ("n01440764", "n01443537", "n02129165")


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG")
    return content.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def class_tar(number: int) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for i in range(4):
            add(tar, f"{CLASSES[number]}_{i}.JPEG", jpeg(10 * number + i))
    return content.getvalue()


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both tars, with the classes of the six validation pictures in a CSV and in a text."""
    monkeypatch.chdir(tmp_path)
    with tarfile.open("train.tar", "w") as tar:
        for number, name in enumerate(CLASSES):
            add(tar, f"{name}.tar", class_tar(number))
    with tarfile.open("val.tar", "w") as tar:
        for i in range(6):
            add(tar, f"ILSVRC2012_val_{i + 1:08d}.JPEG", jpeg(100 + i))
    told = [CLASSES[i % 3] for i in range(6)]
    with open("labels.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["ImageId", "PredictionString"])
        rows.writerows(
            [f"ILSVRC2012_val_{i + 1:08d}", f"{name} 1 2 3 4 "] for i, name in enumerate(told)
        )
    Path("labels.txt").write_text("\n".join(told) + "\n")
    return tmp_path


def call(*words: str) -> None:
    main(["imagenet", *words])


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("labels", ["labels.csv", "labels.txt"])
def test_tars_become_class_folders_with_counts(downloads: Path, capsys, labels: str) -> None:
    call("train.tar", "val.tar", "--out", "imagenet", "--labels", labels)
    printed = capsys.readouterr().out
    assert "train: 12 pictures of 3 classes (all of ImageNet: 1,281,167 of 1,000)" in printed
    assert "val: 6 pictures of 3 classes" in printed
    assert (downloads / "imagenet/val/n01443537/ILSVRC2012_val_00000002.JPEG").read_bytes() == jpeg(
        101
    )
    index = json.loads(Path("imagenet/index.json").read_text())
    assert index["classes"] == list(CLASSES) and index["pictures"]["train"] == dict.fromkeys(
        CLASSES, 4
    )
    data = ImageFolderData("imagenet/train", 16, val_root="imagenet/val")
    assert (
        data.class_names == CLASSES
        and len(data.train_dataset()) == 12
        and len(data.val_dataset()) == 6
    )
    assert not [name for name in names(Path("imagenet")) if ".part" in name]


def test_an_interrupted_command_goes_on(downloads: Path, monkeypatch) -> None:
    copy = shutil.copyfileobj
    written = []

    def stop_at_sixth(content, out):
        if len(written) == 6:
            raise KeyboardInterrupt
        written.append(out.name)
        copy(content, out)

    def counted(content, out):
        written.append(out.name)
        copy(content, out)

    words = ("train.tar", "val.tar", "--out", "imagenet", "--labels", "labels.csv")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfileobj", stop_at_sixth)
        with pytest.raises(KeyboardInterrupt):
            call(*words)
    assert (downloads / "imagenet/train/n01440764").is_dir()
    assert not (downloads / "imagenet/train/n01443537").exists()
    written.clear()
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfileobj", counted)
        call(*words)
    # The class that was whole is not unpacked again.
    assert sum("imagenet/train/" in name for name in written) == 8
    before = names(Path("imagenet"))
    call(*words)
    assert names(Path("imagenet")) == before and len(before) == 12 + 6 + 1


def test_shards_crops_and_folders_as_they_are(downloads: Path, capsys) -> None:
    call("train.tar", "val.tar", "--out", "first", "--labels", "labels.txt")
    words = (
        "first/train",
        "first/val",
        "--out",
        "second",
        "--form",
        "shards",
        "--shard-size",
        "5",
        "--size",
        "16",
    )
    call(*words)
    printed = capsys.readouterr().out
    assert Path("second/train").is_symlink() and "train: 3 shards" in printed
    assert "val: 6 crops of 16 x 16 in second/val_16" in printed
    shards = sorted(Path("second/shards").glob("train-*.tar"))
    assert len(shards) == 3 and len(list(Path("second/shards").glob("*.index.npz"))) == 5
    data = WebDatasetData(
        str(Path("second/shards") / "train-*.tar"), 16, "second/shards/val-*.tar", num_classes=3
    )
    assert len(data.train_dataset()) == 12 and data.train_dataset().labels.bincount().tolist() == [
        4,
        4,
        4,
    ]
    with Image.open("second/val_16/n01440764/ILSVRC2012_val_00000001.png") as crop:
        assert crop.size == (16, 16)
    call(*words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train.tar val.tar", "say where to write: --out FOLDER"),
        ("train.tar val.tar --out x", "holds pictures without classes: name them, --labels"),
        ("nowhere.tar val.tar --out x", "nowhere.tar does not exist"),
        ("val.tar val.tar --out x", "ImageNet's training file holds one tar a class"),
        ("labels.txt val.tar --out x", "labels.txt is not a tar"),
        ("train.tar val.tar --out x --labels train.tar", "is not ImageNet's development kit"),
        ("train.tar val.tar --out x --labels bad.csv", "'cat' is no class such as n01440764"),
        ("train.tar val.tar --out x --extractor inception", "need a size, for example --size 256"),
        ("empty val.tar --out x", "holds neither class folders"),
    ],
)
def test_what_does_not_fit_is_one_line(downloads: Path, words: str, message: str) -> None:
    Path("empty").mkdir()
    Path("bad.csv").write_text("ImageId,PredictionString\nILSVRC2012_val_00000001,cat 1\n")
    with pytest.raises(UserError, match=message) as caught:
        call(*words.split())
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_paths_in_tars_stay_inside(downloads: Path) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        add(tar, "../../outside.JPEG", jpeg(1))
    with tarfile.open("evil.tar", "w") as tar:
        add(tar, "n01440764.tar", content.getvalue())
    imagenet.prepare_train(Path("evil.tar"), Path("x/train"))
    assert (
        names(Path("x")) == {"train/n01440764/outside.JPEG"} and not Path("outside.JPEG").exists()
    )


def test_the_command_has_its_help(capsys) -> None:
    assert dispatch("data", ["imagenet", "--help"]) == 0
    text = capsys.readouterr().out
    assert "TRAIN VAL" in text and "--crop-train" in text and len(text.splitlines()) <= 48
    assert dispatch("data", ["--help"]) == 0
