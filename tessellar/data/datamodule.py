"""The data sets as LightningDataModules, to be named in a run's YAML: `class_path:
tessellar.data.ShapesData`.

The base class makes the loaders: a deterministic order from (seed, epoch), whole batches in
training, every sample once in validation, and no draw from the global random numbers, so that the
rest of a run does not depend on its loaders.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader

from tessellar.checkpoints.data_facts import DataFacts
from tessellar.data.batch import collate, normalised
from tessellar.data.buckets import Bucketing, InBuckets, bucketing_of
from tessellar.data.classes import shown
from tessellar.data.crops import Resize, sides
from tessellar.data.dataset import ImageDataset, IndexedDataset, digest
from tessellar.data.framing import Crop, Framing
from tessellar.data.pictures import MAX_CORRUPT, PictureDataset
from tessellar.data.sampler import BucketSampler, ByBatches, ResumableSampler
from tessellar.data.workers import attended, sensible_workers
from tessellar.errors import UserError
from tessellar.progress import count_of
from tessellar.protocol.arguments import in_ranges

log = logging.getLogger(__name__)
SHOWN = 5  # corrupt images that are named, of all that are counted
Split = Literal["train", "val", "test"]
UNEVEN = 10  # times as many images of one class as of another


class ImageDataModule(LightningDataModule, ABC):
    """Loaders over two or three data sets; `batch_size` is that of one process.

    `name` identifies the data in records, `image_size` is (height, width). `num_workers` None: as
    many as help on this machine. `seed` fixes the order of training, crops and flips; None: it is
    that of the run (`follow`). With `balance` each class is drawn equally often in training,
    whatever the number of its images.
    """

    name: str
    image_size: tuple[int, int]
    class_names: tuple[str, ...]
    #: Sizes (height, width) of the batches, the first one that of `image_size`; none: all have that size.
    buckets: tuple[tuple[int, int], ...] = ()

    def __init__(
        self,
        batch_size: int,
        num_workers: int | None,
        seed: int | None = None,
        balance: bool = False,
    ) -> None:
        super().__init__()
        if batch_size < 1 or (num_workers is not None and num_workers < 0):
            raise ValueError(
                f"batch_size is {batch_size}, num_workers {num_workers}; at least 1 and 0 are needed"
            )
        if seed is not None and not 0 <= seed < 2**63:
            raise ValueError(f"data.seed is {seed}; it must be at least 0 and below 2^63")
        self.batch_size = batch_size
        self.num_workers = sensible_workers() if num_workers is None else num_workers
        self.seed = 0 if seed is None else seed
        self.balance = balance
        self._follows = seed is None
        self._loaded: list[IndexedDataset] = []
        self._facts: DataFacts | None = None

    @abstractmethod
    def train_dataset(self, augment: bool = True) -> ImageDataset:
        """The training images; without augmentation (the same at each visit) they serve as a
        reference.
        """

    @abstractmethod
    def val_dataset(self) -> ImageDataset:
        """The validation images, never augmented."""

    def test_dataset(self) -> ImageDataset:
        """The test images; the validation images where a set has no others."""
        return self.val_dataset()

    def follow(self, seed: int) -> None:
        """Take a run's seed for the order, crops and flips, unless this data has a seed of its own."""
        if self._follows:
            self.seed = seed

    def take_size(self, image_size: tuple[int, int]) -> None:
        """Give images of one size (height, width) from now on, and no buckets.

        A set that frames pictures overrides it. Raises UserError, naming the set, for all others.
        """
        if tuple(image_size) != tuple(self.image_size):
            raise UserError(
                f"{self.name} has images of {self.image_size}, not of {tuple(image_size)}"
            )

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def holds_out(self) -> bool:
        """Whether the validation images are a share of the training set, which training then lacks."""
        return False

    def check_files(self) -> None:
        """Raise UserError where files are missing or cannot be understood, before a run begins."""
        self.val_dataset()
        self._tell_counts(self.train_dataset())

    def _tell_counts(self, train: IndexedDataset) -> None:
        """Warn of classes without any training image, which keep their random embedding, and of
        classes that are far rarer than others.
        """
        names = self.class_names
        counts = train.labels.bincount(minlength=len(names)).tolist()
        empty = [name for name, count in zip(names, counts, strict=True) if not count]
        if empty:
            log.warning(
                "%s: %d of %d classes have no training image: %s",
                self.name,
                len(empty),
                len(names),
                shown(empty),
            )
        rarest = min(range(len(names)), key=counts.__getitem__)
        commonest = max(range(len(names)), key=counts.__getitem__)
        uneven = counts[commonest] >= UNEVEN * max(counts[rarest], 1)
        if uneven and not empty and not self.balance:
            log.warning(
                "%s is uneven: %d training images of %r, %d of %r; data.balance draws all classes equally often",
                self.name,
                counts[rarest],
                names[rarest],
                counts[commonest],
                names[commonest],
            )

    def found(self) -> str:
        """What was found, for the start of a run: numbers of images and classes, and whether those
        of validation are held out of the training set.
        """
        train, val = (len(dataset) for dataset in self.text_datasets())
        held_out = " (held out, never trained on)" if self.holds_out else ""
        classes = count_of(self.num_classes, "class", "classes")
        return f"{train:,} training and {val:,} validation images{held_out}, {classes}"

    def text_datasets(self) -> Sequence[IndexedDataset]:
        """The training and validation sets as a generator reads them: their captions, their number."""
        return [self.train_dataset(), self.val_dataset()]

    def check_captions(self) -> None:
        """For a run that reads text: raise UserError where there is none, and say where names of
        classes stand in.
        """
        datasets = self.text_datasets()
        if not all(dataset.has_captions for dataset in datasets):
            raise UserError(
                f"{self.name} has no captions, which this generator reads: tars hold them in .txt or .json members, "
                "Hugging Face data sets in a column (data.caption), folders in the names of several classes"
            )
        if not all(dataset.own_captions for dataset in datasets):
            log.warning(
                "%s has no captions of its own: the names of its classes are the texts", self.name
            )

    def fingerprint(self) -> str:
        """Hash of the training and validation images, without augmentation."""
        train = self.train_dataset(augment=False).fingerprint()
        return digest(parts=[train, self.val_dataset().fingerprint()])

    def contents(self) -> tuple[str, str]:
        """Hashes of the training and of the validation samples, without augmentation."""
        return self.train_dataset(augment=False).content(), self.val_dataset().content()

    def facts(self) -> DataFacts:
        """What a run with this data is trained on, for its checkpoints; looked at once, files are
        not opened.
        """
        if self._facts is None:
            train, val = self.contents()
            self._facts = DataFacts(self.name, tuple(self.class_names), self.image_size, train, val)
        return self._facts

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.train_dataset(), "train")

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.val_dataset(), "val")

    def test_dataloader(self) -> DataLoader:
        return self._loader(self.test_dataset(), "test")

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Images as floats, made where they are needed, in the precision that the run's inputs have."""
        batch = normalised(batch)
        return self.trainer.precision_plugin.convert_input(batch) if self.trainer else batch

    def teardown(self, stage: str) -> None:
        """Say how many corrupt images were skipped, and name the first ones."""
        for dataset in self._loaded:
            if not isinstance(dataset, PictureDataset) or not dataset.corrupt:
                continue
            count = len(dataset.corrupt)
            more = f" and {count - SHOWN} more" if count > SHOWN else ""
            log.warning(
                "%d of %d images are corrupt and were skipped: %s%s",
                count,
                len(dataset),
                ", ".join(map(dataset.where, dataset.corrupt[:SHOWN])),
                more,
            )
        self._loaded.clear()

    def _loader(self, dataset: IndexedDataset, split: Split) -> DataLoader:
        rank, world_size = self._share()
        train = split == "train"
        if train and len(dataset) < self.batch_size * world_size:
            raise UserError(
                f"{self.name} has {len(dataset)} training images, too few for a batch of {self.batch_size} on each of "
                f"{world_size} processes: lower data.batch_size"
            )
        sampler = self._sampler(dataset, split, rank, world_size)
        if train:
            sampler.seek(*self._place(sampler.total))
        self._loaded.append(dataset)
        makes_batches = isinstance(sampler, BucketSampler)
        return DataLoader(
            ByBatches(dataset) if makes_batches else dataset,
            batch_size=None if makes_batches else self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=collate,
            drop_last=train and not makes_batches,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),
            worker_init_fn=attended(),
        )

    def _sampler(
        self, dataset: IndexedDataset, split: Split, rank: int, world_size: int
    ) -> ResumableSampler:
        """The order of a split's samples, or batches."""
        train = split == "train"
        labels = dataset.labels.numpy() if train and self.balance else None
        return ResumableSampler(
            dataset, self.seed, train, rank, world_size, drop_last=train, balance=labels
        )

    def _share(self) -> tuple[int, int]:
        """Rank and number of the processes that read different samples: under tensor parallelism
        several read the same.
        """
        if not self.trainer:
            return 0, 1
        strategy = self.trainer.strategy
        if isinstance(strategy, ModelParallelStrategy):
            share = strategy.distributed_sampler_kwargs
            return share["rank"], share["num_replicas"]
        return self.trainer.global_rank, self.trainer.world_size

    def _place(self, total: int) -> tuple[int, int]:
        """Epoch and samples consumed in it, as our training modules count them.

        Lightning starts the first workers before it names the epoch, and after a resume it would
        give the epoch's first samples again. Raises UserError where this data has fewer samples
        than were consumed.
        """
        module = getattr(self.trainer, "lightning_module", None)
        if module is None or not hasattr(module, "epoch_samples"):
            return self.trainer.current_epoch if self.trainer else 0, 0
        epoch = int(module.epoch)
        start = int(module.epoch_samples)  # type: ignore[arg-type]
        if start > total:
            raise UserError(
                f"the run was at sample {start} of an epoch; {self.name} now has {total}: continue it with its own data"
            )
        return epoch, start


@in_ranges
class PictureDataModule(ImageDataModule):
    """Pictures of any size in files or tars, framed as squares of `size` pixels, or as rectangles
    [height, width]: what all sets of one's own pictures take.

    `crop`, `flip`, `ten_ratios`, `resize` and `centring` apply to training (see Framing). Corrupt
    images are skipped up to the share `max_corrupt`. Where no `name` is given, a set names itself.

    With `buckets`, further sizes [height, width], each picture is framed to the one of `size` and
    these that its proportions are nearest to, and a batch has pictures of one of them. References
    and caches, which have one size, are of `size`.
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        crop: Crop = "adm",
        flip: bool = True,
        ten_ratios: Sequence[float] = (1.1,),
        batch_size: int = 64,
        num_workers: int | None = None,
        seed: int | None = None,
        name: str | None = None,
        max_corrupt: float = MAX_CORRUPT,
        resize: Resize | None = None,
        balance: bool = False,
        centring: tuple[int, int] | None = None,
        buckets: Sequence[tuple[int, int]] = (),
    ) -> None:
        super().__init__(batch_size, num_workers, seed, balance)
        self.image_size = sides(size)
        self.framing = Framing(size, crop, flip, tuple(ten_ratios), resize, centring)
        self.name = name or ""
        self.max_corrupt = max_corrupt
        if buckets and balance:
            raise UserError("balance draws single samples, buckets whole batches: choose one")
        if buckets:
            self.buckets = tuple(dict.fromkeys([self.image_size, *map(sides, buckets)]))
        self._framings(self.framing)  # raises for a size that cannot be framed to
        self._bucketings: dict[Split, Bucketing] = {}

    def take_size(self, image_size: tuple[int, int]) -> None:
        self.framing = replace(self.framing, size=image_size)
        self.image_size = sides(image_size)
        self.buckets = ()

    def found(self) -> str:
        """With the number of training images in each bucket."""
        if not self.buckets:
            return super().found()
        dataset = self.train_dataset()
        assert isinstance(dataset, PictureDataset)
        bucketing = self._bucketing(dataset, "train")
        return f"{super().found()}; in buckets {bucketing.spelled()}"

    def contents(self) -> tuple[str, str]:
        if not self.buckets:
            return super().contents()
        train, val = super().contents()
        return digest(parts=[train, self.buckets]), digest(parts=[val, self.buckets])

    def _framings(self, framing: Framing) -> tuple[Framing, ...]:
        return tuple(replace(framing, size=size) for size in self.buckets)

    def _bucketing(self, dataset: PictureDataset, split: Split) -> Bucketing:
        """The buckets of a split's pictures, looked at once and said."""
        if split not in self._bucketings:
            self._bucketings[split] = bucketing_of(dataset, self.buckets)
            if split == "train":
                batch = self.batch_size * self._share()[1]
                self._bucketings[split].tell(self.name, batch)
        return self._bucketings[split]

    def _sampler(
        self, dataset: IndexedDataset, split: Split, rank: int, world_size: int
    ) -> ResumableSampler:
        if not self.buckets:
            return super()._sampler(dataset, split, rank, world_size)
        assert isinstance(dataset, PictureDataset)
        train = split == "train"
        bucketing = self._bucketing(dataset, split)
        dataset.in_buckets = InBuckets(bucketing.of, self._framings(dataset.framing))
        sampler = BucketSampler(
            dataset,
            bucketing.of,
            self.batch_size,
            seed=self.seed,
            shuffle=train,
            rank=rank,
            world_size=world_size,
            drop_last=train,
        )
        if not sampler.total:
            raise UserError(
                f"{self.name}: no bucket ({bucketing.spelled()}) has the {sampler.step} images of a step: "
                "lower data.batch_size or give fewer buckets"
            )
        return sampler
