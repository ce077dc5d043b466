"""`convert.py cache`: encode a data set with a tokenizer, once, for training generators from its
tokens.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tessellar import distributed
from tessellar.checkpoints.reading import read_source
from tessellar.checkpoints.staging import check_target
from tessellar.cli.next_steps import after_cache
from tessellar.cli.sample import pick_device
from tessellar.data.datamodule import ImageDataModule
from tessellar.data.token_cache.files import HEADER
from tessellar.data.token_cache.writing import encode_dataset
from tessellar.errors import UserError
from tessellar.pipeline import assemble
from tessellar.progress import count_of
from tessellar.protocol.packages import trust
from tessellar.protocol.ranges import check_whole
from tessellar.protocol.tokenizer import Tokenizer
from tessellar.sampling.run import MAX_IMAGES

log = logging.getLogger(__name__)
PARTS = ("train", "val")


def cache(
    tokenizer: str,
    data: ImageDataModule | None = None,
    out: str = "",
    parts: list[Literal["train", "val"]] | None = None,
    batch_size: int = 64,
    precision: Literal["float32", "bf16"] = "float32",
    device: str = "auto",
    raw: bool = False,
    package: str = "",
    overwrite: bool = False,
) -> None:
    """Encode a data set once: all crops and mirror images of training, one view of validation.

    Interrupted, the same command goes on. torchrun starts it on several processes or GPUs.

    Args:
        tokenizer: export folder, .safetensors, .ckpt or hub id of a tokenizer, or of a generator, which holds one
        data: data set, as in a training YAML: a class, then --data.root and so on, or the YAML of a data set
        out: folder of the cache; training names it as data.root of tessellar.data.CachedTokensData
        parts: of train and val (default: both)
        batch_size: images at once
        precision: arithmetic of the tokenizer
        device: auto, cpu, cuda, ...
        raw: weights of the last step instead of the averaged ones
        package: packages of others whose classes may be built, separated by commas
        overwrite: replace an older cache
    """
    trust(package)
    if data is None:
        raise UserError(
            "say what to encode, for example --data tessellar.data.ImageFolderData --data.root DIR"
        )
    if data.buckets:
        raise UserError("a cache holds tokens of one layout: leave data.buckets out")
    if not out:
        raise UserError("say where to write: --out FOLDER")
    check_whole("--batch-size", batch_size, least=1, most=MAX_IMAGES)
    chosen = parts or list(PARTS)
    for part in chosen:  # before hours of encoding, not after
        check_target(Path(out) / part, HEADER, overwrite)
    with distributed.session():
        _encode(
            tokenizer,
            data,
            Path(out),
            chosen,
            raw=raw,
            device=device,
            overwrite=overwrite,
            batch_size=batch_size,
            precision=precision,
        )


def _encode(
    tokenizer: str,
    data: ImageDataModule,
    out: Path,
    parts: Sequence[str],
    *,
    raw: bool,
    device: str,
    overwrite: bool,
    batch_size: int,
    precision: Literal["float32", "bf16"],
) -> None:
    """Encode the parts, on as many processes as torchrun started."""
    loaded = assemble(read_source(tokenizer, raw=raw))
    model = (loaded if isinstance(loaded, Tokenizer) else loaded.tokenizer).to(pick_device(device))
    for part in parts:
        dataset = data.train_dataset() if part == "train" else data.val_dataset()
        if distributed.rank() == 0:
            log.info(
                "%s: %s images of %s, views of each: %d; writes %s",
                part,
                f"{len(dataset):,}",
                count_of(len(dataset.class_names), "class", "classes"),
                dataset.num_views,
                out / part,
            )
        options = {
            "batch_size": batch_size,
            "num_workers": data.num_workers,
            "precision": precision,
        }
        header = encode_dataset(
            model, dataset, out / part, name=data.name, overwrite=overwrite, **options
        )
        if distributed.rank() > 0:
            continue
        size = sum(file.stat().st_size for file in (out / part).iterdir())
        skipped = f", {header.corrupt} of them corrupt and replaced" if header.corrupt else ""
        print(
            f"{part}: {header.count} images{skipped}, views of each: {header.views}, {size / 1e6:.2f} MB"
        )
    if distributed.rank() == 0:
        print(f"wrote {out}")
        log.info("%s", after_cache(tokenizer, model, data, str(out)))
