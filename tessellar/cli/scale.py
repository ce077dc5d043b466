"""`convert.py scale`: measure the scale of a tokenizer's continuous latents on a data set and store
it in an export.

Training measures the scale too; this is for imported weights on other data, and for averaged
weights.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tessellar.checkpoints.export import WEIGHTS, export_tokenizer
from tessellar.checkpoints.reading import load_tokenizer, read_source
from tessellar.checkpoints.staging import check_target
from tessellar.cli.sample import pick_device
from tessellar.data.datamodule import ImageDataModule
from tessellar.errors import UserError
from tessellar.protocol.packages import trust
from tessellar.protocol.ranges import check_whole
from tessellar.sampling.run import MAX_IMAGES
from tessellar.tokenizers.quantizers.gaussian import measure_scale


def scale(
    tokenizer: str,
    data: ImageDataModule | None = None,
    out: str = "",
    count: int = 10_000,
    batch_size: int = 64,
    device: str = "auto",
    raw: bool = False,
    package: str = "",
    overwrite: bool = False,
) -> None:
    """Make an export whose latents have unit variance on a data set: 1 / their standard deviation;
    MingTok's and RecTok's are also shifted to mean 0.

    Args:
        tokenizer: export folder, .safetensors, .ckpt or hub id of a tokenizer with continuous latents
        data: data set, as in a training YAML: a class, then --data.root and so on
        out: folder of the export
        count: training images to measure on, spread over the data set (or all, if there are fewer)
        batch_size: images at once
        device: auto, cpu, cuda, ...
        raw: weights of the last step instead of the averaged ones
        package: packages of others whose classes may be built, separated by commas
        overwrite: replace an older export
    """
    trust(package)
    if data is None:
        raise UserError(
            "say what to measure on, for example --data tessellar.data.ImageFolderData --data.root DIR"
        )
    if not out:
        raise UserError("say where to write: --out FOLDER")
    check_whole("--count", count, least=1, most=MAX_IMAGES)
    check_whole("--batch-size", batch_size, least=1, most=MAX_IMAGES)
    check_target(Path(out), WEIGHTS, overwrite)
    model = load_tokenizer(tokenizer, raw=raw).to(pick_device(device))
    before = float(
        getattr(getattr(model.source, "quantizer", None), "scale", torch.tensor(1.0)).mean()
    )
    after = measure_scale(model.source, _images(data, count, batch_size, pick_device(device)))
    record = replace(read_source(tokenizer, raw=raw).record, data=data.name)
    export_tokenizer(model.cpu(), out, record=record, overwrite=overwrite)
    print(f"scale {before:.4f} -> {after:.4f}\nwrote {out}")


def _images(
    data: ImageDataModule, count: int, batch_size: int, device: torch.device
) -> Iterator[Tensor]:
    """Batches [B, 3, H, W] of every k-th training image."""
    dataset = data.train_dataset()
    chosen = torch.arange(0, len(dataset), max(1, len(dataset) // count))[:count]
    for index in chosen.split(batch_size):
        yield dataset.batch(index.tolist())["image"].to(device)
