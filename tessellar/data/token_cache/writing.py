"""Encode a data set once, into a folder that training then reads instead of images
(`cached_tokens.py`).

The folder is written beside its place and moved there, the header last, so what an interruption
leaves never looks complete; the same command goes on with it (`blocks.py`), on any number of
processes. Every view (crops, mirror images) of an image is encoded; it is read and decoded once.
"""

import io
import json
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tessellar import distributed
from tessellar.checkpoints.fingerprint import model_fingerprint
from tessellar.checkpoints.staging import check_target, finish
from tessellar.data.batch import Batch
from tessellar.data.captions import SEPARATOR
from tessellar.data.dataset import ImageDataset
from tessellar.data.token_cache import blocks as blocks_of
from tessellar.data.token_cache.blocks import Block, Blocks
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
from tessellar.data.workers import attended
from tessellar.errors import UserError
from tessellar.progress import Progress
from tessellar.protocol.configured import describe
from tessellar.protocol.tokenizer import Tokenizer

log = logging.getLogger(__name__)
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
    visit; of one that quantises another's tokens, those of the other (`Tokenizer.source`), so that
    one cache serves all of them. Puts the tokenizer in eval mode. Raises UserError where `folder` exists: a cache is
    replaced with `overwrite`, anything else never.
    """
    tokenizer = tokenizer.source
    shown = tuple(dataset.views(0)["image"].shape[2:])
    if shown != tuple(tokenizer.image_size):
        raise UserError(
            f"the data set {name} has images of {shown[0]}x{shown[1]}, the tokenizer takes "
            f"{tokenizer.image_size[0]}x{tokenizer.image_size[1]}"
        )
    tokenizer.eval()
    target = Path(os.path.abspath(folder))
    check_target(target, HEADER, overwrite)
    storage = storage_of(tokenizer.layout, posterior_of(tokenizer) is not None)
    header = _header(tokenizer, dataset, name, storage, precision)
    at_once = max(1, batch_size // dataset.num_views)
    size = -(-blocks_of.SIZE // at_once) * at_once
    plan = {**asdict(header), "content": dataset.content(), "batch_size": batch_size, "block": size}
    with blocks_of.unfinished(target, plan, len(dataset), size) as blocks:
        shape = (len(dataset), dataset.num_views, *storage.shape)
        start = _start(blocks.folder / TOKENS, shape, storage.dtype)
        _encode_blocks(
            tokenizer,
            dataset,
            blocks,
            storage=storage,
            precision=precision,
            start=start,
            at_once=at_once,
            num_workers=num_workers,
        )
        distributed.barrier()
        if distributed.rank() == 0:
            header = _finish(blocks, header, dataset.num_views)
            finish(blocks.folder, target, HEADER, overwrite)
            Blocks(target, blocks.count, blocks.size).clear()
    return distributed.broadcast(header)


class _Views(Dataset):
    """All views of one image as one item, so that it is read once."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Batch:
        return self.dataset.views(index)


def _encode_blocks(
    tokenizer: Tokenizer,
    dataset: ImageDataset,
    blocks: Blocks,
    *,
    storage: Storage,
    precision: Precision,
    start: int,
    at_once: int,
    num_workers: int,
) -> None:
    """Encode this process's share of the blocks that are not done; `start` is where rows begin."""
    done = blocks.done()
    open_ones = sorted(set(range(blocks.number)) - set(done))
    distributed.barrier()  # all have looked before one writes
    own = open_ones[distributed.rank() :: distributed.world_size()]
    batches = []
    total = 0
    for block in own:
        images = blocks.images(block)
        total += len(images)
        for place in range(0, len(images), at_once):
            batches.append(list(images[place : place + at_once]))
    loader = DataLoader(
        _Views(dataset),
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=num_workers,
        collate_fn=list,
        generator=torch.Generator(),  # else a loader draws its base seed from the global random numbers
        worker_init_fn=attended(),
    )
    if done and distributed.rank() == 0:
        log.info("goes on after %d of %d blocks", len(done), blocks.number)
    loaded = iter(loader) if batches else iter(())
    width = int(np.prod(storage.shape)) * np.dtype(storage.dtype).itemsize * dataset.num_views
    with (
        Progress("encoding", total, "images", quiet=distributed.rank() > 0) as bar,
        open(blocks.folder / TOKENS, "r+b") as tokens,
    ):
        for block in own:
            images = blocks.images(block)
            tokens.seek(start + images.start * width)
            content = _Content()
            for _ in range(0, len(images), at_once):
                items = next(loaded)
                images_of_all = torch.cat([item["image"] for item in items])
                packed = pack(encode(tokenizer, images_of_all, precision), storage)
                tokens.write(packed.tobytes())
                content.add(items, packed)
                bar.update(len(items))
            tokens.flush()
            os.fsync(tokens.fileno())
            corrupt = sum(index in images for index in dataset.corrupt)
            blocks.write(block, content.as_block(corrupt))


class _Content:
    """Labels, checksums and captions of a block, as its images come."""

    def __init__(self) -> None:
        self._labels: list[int] = []
        self._sums: list[np.ndarray] = []
        self._captions = bytearray()
        self._ends: list[int] = []

    def add(self, items: Sequence[Batch], packed: np.ndarray) -> None:
        self._sums.append(crc_of_rows(packed))
        for item in items:
            self._labels.append(int(item["label"][0]) if "label" in item else 0)
            if "caption" in item:
                texts = item.get("texts") or [item["caption"][0]]
                self._captions += SEPARATOR.join(texts).encode()
                self._ends.append(len(self._captions))

    def as_block(self, corrupt: int) -> Block:
        return Block(
            labels=np.array(self._labels, dtype=np.int64),
            sums=np.concatenate(self._sums),
            captions=bytes(self._captions),
            ends=np.array(self._ends, dtype=np.int64),
            corrupt=corrupt,
        )


def _finish(blocks: Blocks, header: Header, views: int) -> Header:
    """Write what the blocks brought as the cache's own files, and the header that it is complete by."""
    stage = blocks.folder
    labels: list[np.ndarray] = []
    sums: list[np.ndarray] = []
    ends: list[np.ndarray] = []
    captions = bytearray()
    corrupt = 0
    for number in range(blocks.number):
        block = blocks.read(number)
        labels.append(block.labels)
        sums.append(block.sums)
        ends.append(block.ends + len(captions))
        captions += block.captions
        corrupt += block.corrupt
    np.save(stage / LABELS, np.concatenate(labels))
    np.save(stage / CHECKSUMS, np.concatenate(sums).reshape(blocks.count, views))
    (stage / CAPTIONS).write_bytes(captions)
    all_ends = np.concatenate(ends).astype(np.int64)
    if len(all_ends):
        np.save(stage / ENDS, all_ends)
    checksums = {}
    for name in (LABELS, CHECKSUMS, CAPTIONS, ENDS):
        if (stage / name).is_file():
            checksums[name] = crc_of(stage / name)
    header = replace(header, captions=len(all_ends) > 0, corrupt=corrupt, checksums=checksums)
    text = json.dumps(asdict(header) | {"storage": header.storage._asdict()}, indent=1)
    (stage / HEADER).write_text(text)
    return header


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


def _start(path: Path, shape: tuple[int, ...], dtype: str) -> int:
    """Make the npy file of all rows, as large as it will be, unless it is there; returns where its
    rows begin.

    Rows are written with `write`, since a mapped file dies on a full disk.
    """
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    head = io.BytesIO()
    np.lib.format.write_array_header_2_0(
        head, {"descr": descr, "fortran_order": False, "shape": shape}
    )
    start = len(head.getvalue())
    if distributed.rank() == 0 and not path.is_file():
        with open(path, "wb") as file:
            file.write(head.getvalue())
            file.truncate(start + int(np.prod(shape)) * np.dtype(dtype).itemsize)
    distributed.barrier()
    return start


def _header(
    tokenizer: Tokenizer,
    dataset: ImageDataset,
    name: str,
    storage: Storage,
    precision: Precision,
) -> Header:
    """What is known before the first image is read."""
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
        captions=False,
    )
