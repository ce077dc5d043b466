"""What every map-style data set offers: samples by index, whole batches at once, labels, a
fingerprint of its content.

A set implements `batch`; a single sample is a batch of one, so both are the same to the bit. The
loader calls `__getitems__`, so sets that live in memory slice a batch instead of collating samples.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from json.encoder import encode_basestring_ascii
from math import ceil
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tessellar.data.batch import Batch, Sample, TokenBatch
from tessellar.errors import UserError

B = TypeVar("B", bound=Batch | TokenBatch)


class IndexedDataset(Dataset, Generic[B], ABC):
    """Labelled samples by index; randomness depends on (seed, epoch, index) only."""

    class_names: tuple[str, ...]
    labels: Tensor  # int64 [N]
    _epoch: Tensor | None = None  # in shared memory
    has_captions: bool = True  # whether there is any text to samples
    own_captions: bool = True  # whether some of it is more than names of classes

    @abstractmethod
    def batch(self, indices: Sequence[int]) -> B:
        """Samples of the given indices, each in [0, N)."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of what the samples are; equal for equal content, whatever the folder."""

    def content(self) -> str:
        """`fingerprint` and, in sets with captions of their own, these: what a resumed run has to
        find again.
        """
        return self.fingerprint()

    def captions(self, indices: Sequence[int]) -> list[str]:
        """Texts to samples; raises UserError for a set without any."""
        texts: list[str] = []
        for start in range(0, len(indices), 512):
            batch = self.batch(indices[start : start + 512])
            if "caption" not in batch:
                raise UserError("this data set gives no captions")
            texts += batch["caption"]
        return texts

    @property
    def epoch(self) -> int:
        """Whose augmentation is drawn."""
        return 0 if self._epoch is None else int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw the augmentation of this epoch from now on, in the processes of a loader too, which
        outlive an epoch.
        """
        if self._epoch is None:
            self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> B:
        return self.batch(indices)


class ImageDataset(IndexedDataset[Batch], ABC):
    """Labelled images. A visit shows one of `num_views` views, which a cache of tokens enumerates."""

    corrupt: Sequence[int] = ()  # images found to be corrupt so far, and skipped

    @property
    def num_views(self) -> int:
        """How many views an image has: crops and mirror images."""
        return 1

    def views(self, index: int) -> Batch:
        """All views of one image, without randomness: view k in row k, each with the same label and
        caption.
        """
        return self.batch([index])

    def __getitem__(self, index: int) -> Sample:
        # The range raises IndexError past the end.
        batch = self.batch([range(len(self))[index]])
        sample: Sample = {"image": batch["image"][0], "index": int(batch["index"][0])}
        if "label" in batch:
            sample["label"] = int(batch["label"][0])
        if "caption" in batch:
            sample["caption"] = batch["caption"][0]
        return sample


def digest(**facts: Any) -> str:
    """16 hexadecimal digits that identify JSON-able facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _digest_of(name: str) -> str:
    """`digest(file=name)`, a third of its time: a data set has a million of them."""
    text = f'{{"file": {encode_basestring_ascii(name)}}}'
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hold_out(
    names: Sequence[str], share: float, labels: Sequence[int] | None = None
) -> tuple[list[int], list[int]]:
    """Places of training and validation samples, both ascending: the latter are the share of the
    lowest hashes, of each class of `labels` [N] alike.

    At least one sample on each side, and of each class one in training where there is another to
    hold out. One keeps its side when others come and go, but for the few at the border. Raises
    UserError where that cannot be.
    """
    if len(names) < 2 or not 0 < share < 1:
        raise UserError(
            f"cannot hold out {share} of {len(names)} images; the share must be between 0 and 1. To train on "
            "all of them name a validation set (val_root, val_shards or val_split, which may be the same), and "
            "--trainer.limit_val_batches 0 where nothing shall be validated"
        )
    ranked: dict[int, list[int]] = {}
    for place in sorted(range(len(names)), key=[_digest_of(name) for name in names].__getitem__):
        ranked.setdefault(0 if labels is None else int(labels[place]), []).append(place)
    wanted = min(ceil(share * len(names)), max(len(names) - len(ranked), 1))
    counts = _shares({label: len(places) for label, places in ranked.items()}, share, wanted)
    held_out: set[int] = set()
    for label, places in ranked.items():
        held_out |= set(places[: counts[label]])
    return sorted(set(range(len(names))) - held_out), sorted(held_out)


def _shares(sizes: Mapping[int, int], share: float, wanted: int) -> dict[int, int]:
    """How many samples of each class to hold out, `wanted` in all: its share rounded down, and one
    more where the largest fractions are left; a class keeps one sample while another can give one.
    """
    most = {label: size - 1 for label, size in sizes.items()}
    if not any(most.values()):
        most = dict(sizes)
    counts = {label: min(int(share * size), most[label]) for label, size in sizes.items()}
    while sum(counts.values()) < wanted:
        left: dict[int, float] = {}  # of those that can give one more
        for label, size in sizes.items():
            if counts[label] < most[label]:
                left[label] = share * size - counts[label]
        counts[max(left, key=lambda label: (left[label], -label))] += 1
    return counts
