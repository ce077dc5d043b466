"""Encode a data set once, into a folder that training then reads instead of images
(`cached_tokens.py`).

The folder is written beside its place and moved there, the header last, so what an interruption
leaves never looks complete. Every view (crops, mirror images) of an image is encoded; it is read
and decoded once.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from tessellar.checkpoints.fingerprint import model_fingerprint
from tessellar.checkpoints.staging import staged_folder
from tessellar.data.batch import Batch
from tessellar.data.captions import SEPARATOR
from tessellar.data.dataset import ImageDataset
from tessellar.data.token_cache.files import (
    CAPTIONS,
    CHECKSUMS,
    ENDS,
    HEADER,
    LABELS,
    TOKENS,
    Header,
    Precision,
    crc_of,
    crc_of_rows,
)
from tessellar.data.token_cache.storage import Storage, pack, storage_of
from tessellar.data.workers import ignore_interruptions
from tessellar.errors import UserError
from tessellar.protocol.configured import describe
from tessellar.protocol.tokenizer import Tokenizer

Posterior = Callable[[Tensor], tuple[Tensor, Tensor]]


def posterior_of(tokenizer: Tokenizer) -> Posterior | None:
    """`posterior(images) -> (mean, std)`, both [B, N, C] in the space of the tokens, where a
    tokenizer offers it.
    """
    return getattr(tokenizer, "posterior", None) if tokenizer.layout.is_continuous else None


def encode_dataset(
    tokenizer: Tokenizer,
    dataset: ImageDataset,
    folder: str | Path,
    *,
    name: str,
    batch_size: int = 64,
    num_workers: int = 0,
    precision: Precision = "float32",
    overwrite: bool = False,
) -> Header:
    """Encode all views of all images on the tokenizer's device, and return the header of the
    finished cache.

    Of a tokenizer with a posterior, mean and standard deviation are cached, to be sampled at each
    visit. Puts the tokenizer in eval mode. Raises UserError where `folder` exists: a cache is
    replaced with `overwrite`, anything else never.
    """
    shown = tuple(dataset.views(0)["image"].shape[2:])
    if shown != tuple(tokenizer.image_size):
        ours, theirs = ("x".join(map(str, size)) for size in (shown, tokenizer.image_size))
        raise UserError(f"the data set {name} has images of {ours}, the tokenizer takes {theirs}")
    tokenizer.eval()
    storage = storage_of(tokenizer.layout, posterior_of(tokenizer) is not None)
    loader = DataLoader(
        _Views(dataset),
        batch_size=max(1, batch_size // dataset.num_views),
        num_workers=num_workers,
        collate_fn=list,
        generator=torch.Generator(),  # else a loader draws its base seed from the global random numbers
        worker_init_fn=ignore_interruptions,
    )
    with staged_folder(Path(folder), HEADER, overwrite) as stage:
        with open(stage / TOKENS, "wb") as tokens, open(stage / CAPTIONS, "wb") as captions:
            _start(tokens, (len(dataset), dataset.num_views, *storage.shape), storage.dtype)
            labels, ends, sums = _write(tokenizer, loader, storage, precision, tokens, captions)
        np.save(stage / LABELS, np.array(labels, dtype=np.int64))
        np.save(stage / CHECKSUMS, np.concatenate(sums).reshape(len(dataset), dataset.num_views))
        if ends:
            np.save(stage / ENDS, np.array(ends, dtype=np.int64))
        header = _header(tokenizer, dataset, name, storage, precision, bool(ends))
        small = [name for name in (LABELS, CHECKSUMS, CAPTIONS, ENDS) if (stage / name).is_file()]
        header = replace(header, checksums={name: crc_of(stage / name) for name in small})
        (stage / HEADER).write_text(
            json.dumps(asdict(header) | {"storage": storage._asdict()}, indent=1)
        )
    return header


class _Views(Dataset):
    """All views of one image as one item, so that it is read once."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Batch:
        return self.dataset.views(index)


def _write(
    tokenizer: Tokenizer,
    loader: DataLoader,
    storage: Storage,
    precision: Precision,
    tokens: BinaryIO,
    captions: BinaryIO,
) -> tuple[list[int], list[int], list[np.ndarray]]:
    """Append tokens and captions; returns labels, where captions end, and the checksums of the rows
    of tokens.
    """
    labels: list[int] = []
    ends: list[int] = []
    sums: list[np.ndarray] = []
    for items in _progress(loader):
        images = torch.cat([item["image"] for item in items])
        packed = pack(encode(tokenizer, images, precision), storage)
        tokens.write(packed.tobytes())
        sums.append(crc_of_rows(packed))
        for item in items:
            labels.append(int(item["label"][0]) if "label" in item else 0)
            if "caption" in item:
                texts = item.get("texts") or [item["caption"][0]]
                captions.write(SEPARATOR.join(texts).encode())
                ends.append(captions.tell())
    return labels, ends, sums


def _progress(loader: DataLoader) -> Iterator[list[Batch]]:
    with tqdm(total=len(loader.dataset), unit="image", leave=False, disable=None) as bar:  # type: ignore[arg-type]
        for items in loader:
            yield items
            bar.update(len(items))


@torch.no_grad()
def encode(tokenizer: Tokenizer, images: Tensor, precision: Precision = "float32") -> Tensor:
    """What a cache holds of images: their tokens, or mean and standard deviation side by side."""
    device = next(tokenizer.parameters()).device
    with torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext():
        images = images.to(device)
        posterior = posterior_of(tokenizer)
        tokens = torch.cat(posterior(images), dim=-1) if posterior else tokenizer.encode(images)
    if not bool(tokens.isfinite().all()):
        raise UserError(
            f"the tokenizer makes tokens that are not finite in {precision}; its weights may be damaged"
        )
    if posterior is None:
        tokenizer.layout.check(tokens)
    return tokens


def _start(file: BinaryIO, shape: tuple[int, ...], dtype: str) -> None:
    """The header of an npy file whose rows follow; rows are appended, since a mapped file dies on a
    full disk.
    """
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_2_0(
        file, {"descr": descr, "fortran_order": False, "shape": shape}
    )


def _header(
    tokenizer: Tokenizer,
    dataset: ImageDataset,
    name: str,
    storage: Storage,
    precision: Precision,
    captions: bool,
) -> Header:
    return Header(
        data=name,
        data_fingerprint=dataset.fingerprint(),
        class_names=tuple(dataset.class_names),
        image_size=tuple(tokenizer.image_size),  # type: ignore[arg-type]
        tokenizer=model_fingerprint(tokenizer),
        tokenizer_config=tokenizer.config,
        layout=describe(tokenizer.layout),
        storage=storage,
        precision=precision,
        count=len(dataset),
        views=dataset.num_views,
        captions=captions,
        corrupt=len(dataset.corrupt),
    )
