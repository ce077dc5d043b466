"""`tessellar data`: make a data set that was downloaded into what training and evaluation read."""

import json
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tessellar.cli.functions import run_functions
from tessellar.cli.spelling import spelled
from tessellar.data import imagenet as made
from tessellar.errors import UserError, writing

log = logging.getLogger(__name__)
INDEX = "index.json"


def imagenet(
    train: str,
    val: str,
    out: str = "",
    form: Literal["folders", "shards"] = "folders",
    labels: str = "",
    size: int | None = None,
    crop_train: bool = False,
    extractor: str = "",
    shard_size: int = made.SHARD,
    device: str = "auto",
) -> None:
    """Prepare ImageNet (ILSVRC2012) from its downloads; given again, it goes on where it was.

    Args:
        train: ILSVRC2012_img_train.tar, a folder of its class tars, or a folder of class folders
        val: ILSVRC2012_img_val.tar, a folder of its pictures, or a folder of class folders
        out: folder to write: train and val with a folder a class, index.json, and what is asked for
        form: folders, or shards: WebDataset tars with their index as well, for disks that dislike small files
        labels: classes of the validation pictures: ILSVRC2012_devkit_t12.tar.gz, LOC_val_solution.csv, or a text
        size: write the validation pictures as ADM's centre crops of this size too, as val_SIZE
        crop_train: with size, the training pictures too, as train_SIZE
        extractor: with size, write reference statistics of the crops by this network, inception or a file
        shard_size: pictures of a shard
        device: auto, cpu, cuda, ... for the statistics
    """
    if not out:
        raise UserError("say where to write: --out FOLDER")
    if size is None and (extractor or crop_train):
        raise UserError("crops and their statistics need a size, for example --size 256")
    if size is not None and size < 1:
        raise UserError(f"--size is {size}; it must be at least 1")
    target = Path(out)
    target.mkdir(parents=True, exist_ok=True)
    made.prepare_train(Path(train), target / "train")
    made.prepare_val(Path(val), target / "val", Path(labels) if labels else None)
    counts = {split: made.count_pictures(target / split) for split in ("train", "val")}
    if set(counts["train"]) != set(counts["val"]):
        differing = sorted(set(counts["train"]) ^ set(counts["val"]))
        raise UserError(
            f"{target}: training and validation have different classes, for example {differing[0]}"
        )
    for split, found in counts.items():
        print(made.tell_counts(split, found))
    # Classes in the order of their ids, and the number of pictures of each.
    index = {"classes": sorted(counts["train"]), "pictures": counts}
    staged = (target / INDEX).with_suffix(".part")
    with writing(target / INDEX, unfinished=staged):
        staged.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        staged.replace(target / INDEX)
    if form == "shards":
        for split in counts:
            number = made.write_shards(target / split, target / "shards", shard_size)
            print(f"{split}: {number} shards in {target / 'shards'}")
    if size is not None:
        _crops(target, size, crop_train, extractor, device)
    # The options by which training reads what was prepared.
    if form == "shards":
        train_tars = shlex.quote(f"{target}/shards/train-*.tar")
        val_tars = shlex.quote(f"{target}/shards/val-*.tar")
        options = (
            f"--data tessellar.data.WebDatasetData --data.shards {train_tars} "
            f"--data.val_shards {val_tars}"
        )
    else:
        train_folder = shlex.quote(str(target / "train"))
        val_folder = shlex.quote(str(target / "val"))
        options = f"--data.root {train_folder} --data.val_root {val_folder}"
    log.info(
        "next: %s --config imagenet256/vq_16 %s (weights/vgg16.pth is torchvision's VGG-16)",
        spelled("train"),
        options,
    )


def _crops(target: Path, size: int, crop_train: bool, extractor: str, device: str) -> None:
    """Crops of the sets, and statistics of what they hold."""
    for split in ("train", "val") if crop_train else ("val",):
        folder = target / f"{split}_{size}"
        count = made.write_crops(target / split, folder, size)
        print(f"{split}: {count:,} crops of {size} x {size} in {folder}")
        reference = target / f"{split}_{size}.npz"
        if extractor and not reference.is_file():
            # the statistics' network is heavy: it is imported where it is asked for
            from tessellar.cli.evaluation_tools import stats

            stats(str(folder), size=size, extractor=[extractor], out=str(reference), device=device)


COMMANDS = {"imagenet": imagenet}


def main(argv: Sequence[str] | None = None) -> int | None:
    """Entry of `tessellar data`."""
    return run_functions(COMMANDS, argv, "data")
