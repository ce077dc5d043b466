"""Local WebDataset tars as a map-style set: every sample once an epoch, exactly shuffled and
resumed.

A sample has an image and, as it may be, a class (`cls`, or an entry of `json`) and a caption
(`txt`, or an entry of `json`). `tar_index.py` says how its place is known, `members.py` what is
decoded.
"""

import hashlib
import logging
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tessellar import distributed
from tessellar.data.damage import too_many
from tessellar.data.datamodule import PictureDataModule
from tessellar.data.dataset import digest, hold_out
from tessellar.data.framing import Framing
from tessellar.data.image_file import UnreadableImage, decode_image, read_shape
from tessellar.data.pictures import MAX_CORRUPT, PictureDataset
from tessellar.data.tars.index import Keys, TarIndex, load_index
from tessellar.data.tars.members import FIELDS, captions_of, decode
from tessellar.data.tars.shards import find_shards
from tessellar.errors import UserError
from tessellar.progress import Progress
from tessellar.protocol.arguments import in_ranges
from tessellar.randomness import derive

log = logging.getLogger(__name__)


class TarSamples:
    """The samples of several tars, numbered through; some of them after `take`."""

    def __init__(
        self, shards: Sequence[TarIndex], keys: Keys = Keys(), rows: np.ndarray | None = None
    ) -> None:  # noqa: B008
        self.shards = tuple(shards)
        self.keys = keys
        self.starts = np.cumsum([0, *(len(shard) for shard in shards)])
        self.rows = np.arange(self.starts[-1]) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, places: Sequence[int]) -> "TarSamples":
        """Some of these samples, in the given order."""
        return TarSamples(self.shards, self.keys, self.rows[np.asarray(places, dtype=np.int64)])

    def find(self, place: int) -> tuple[TarIndex, int]:
        """The tar of a sample, and its number there."""
        shard = int(np.searchsorted(self.starts, self.rows[place], side="right")) - 1
        return self.shards[shard], int(self.rows[place] - self.starts[shard])

    def name(self, place: int) -> str:
        shard, sample = self.find(place)
        return f"{shard.path.name}:{shard.name(sample)}"

    @property
    def labels(self) -> np.ndarray:
        """Classes, int64 [N], -1 for none."""
        return np.concatenate([shard.labels for shard in self.shards])[self.rows]

    @property
    def captioned(self) -> np.ndarray:
        """Whether samples have a caption, bool [N]."""
        return np.concatenate([shard.captioned for shard in self.shards])[self.rows].astype(bool)

    @property
    def class_names(self) -> dict[int, str]:
        """Names of classes as far as the tars give them; raises UserError where they differ."""
        names: dict[int, str] = {}
        for shard in self.shards:
            for label, name in shard.class_names.items():
                if names.setdefault(label, name) != name:
                    raise UserError(
                        f"{shard.path}: class {label} is {name!r} here and {names[label]!r} before"
                    )
        return names

    def split(self, val_share: float) -> tuple["TarSamples", "TarSamples"]:
        """Training and validation part, the latter the share `val_share` of the samples (see
        `hold_out`).
        """
        names = list(map(self.name, range(len(self))))
        train, val = hold_out(names, val_share, self.labels.tolist())
        return self.take(train), self.take(val)


def read_shards(
    spec: str | Sequence[str], keys: Keys = Keys(), max_corrupt: float = MAX_CORRUPT
) -> TarSamples:  # noqa: B008
    """All samples of the tars that `spec` names; raises UserError where none is left or too many
    had to be left out.
    """
    shards = []
    left_out: list[str] = []
    paths = find_shards(spec)
    with Progress("reading shards", len(paths), "shards", quiet=distributed.rank() > 0) as bar:
        for path in paths:
            shard = load_index(path, keys)
            shards.append(shard)
            left_out += shard.left_out
            bar.update()
    samples = TarSamples(shards, keys)
    total = len(samples) + len(left_out)
    if not len(samples):
        raise UserError(f"{spec} holds no image" + (f"; {left_out[0]}" if left_out else ""))
    if too_many(len(left_out), total, max_corrupt):
        raise UserError(
            f"{len(left_out)} of {total} samples of {spec} cannot be used, more than max_corrupt {max_corrupt} allows; "
            f"the first: {left_out[0]}"
        )
    if left_out:
        log.warning(
            "%d of %d samples are left out, the first: %s", len(left_out), total, left_out[0]
        )
    return samples


def name_classes(samples: TarSamples, name: str, num_classes: int | None) -> tuple[str, ...]:
    """A name for each class: the tars', else its number; without classes there is one, `name`.

    Raises UserError where some samples have a class and others have none, or one is `num_classes`
    or more.
    """
    labels = samples.labels
    given = samples.class_names
    if (labels < 0).all():
        return (name,) if num_classes is None else tuple(map(str, range(num_classes)))
    if (labels < 0).any():
        raise UserError(f"{samples.name(int(labels.argmin()))} has no class, but others have one")
    count = int(labels.max()) + 1 if num_classes is None else num_classes
    if labels.max() >= count:
        worst = samples.name(int(labels.argmax()))
        raise UserError(f"{worst} has class {labels.max()}; it must be below {count} (num_classes)")
    return tuple(given.get(label, str(label)) for label in range(count))


class WebDatasetTars(PictureDataset):
    """The given samples, framed as Framing says.

    Raises UserError for a class that has no name in `class_names`.
    """

    def __init__(
        self,
        samples: TarSamples,
        class_names: tuple[str, ...],
        framing: Framing,
        seed: int = 0,
        max_corrupt: float = MAX_CORRUPT,
        shuffle_captions: bool = False,
        vary_captions: bool = False,
    ) -> None:
        self.samples = samples
        chosen = torch.Generator().manual_seed(derive(seed))
        self.told = (
            torch.randperm(len(samples), generator=chosen)
            if shuffle_captions
            else torch.arange(len(samples))
        )
        labels = torch.from_numpy(samples.labels).clamp(min=0)
        if int(labels.max()) >= len(class_names):
            worst = int(labels.argmax())
            raise UserError(
                f"{samples.name(worst)} has class {labels[worst]}; there are {len(class_names)} classes"
            )
        captioned = torch.from_numpy(samples.captioned)[self.told]
        super().__init__(
            labels,
            class_names,
            framing=framing,
            seed=seed,
            max_corrupt=max_corrupt,
            captioned=captioned,
            vary_captions=vary_captions,
        )

    def where(self, index: int) -> str:
        shard, sample = self.samples.find(index)
        return shard.where(sample)

    def open(self, index: int) -> Image.Image:
        shard, sample = self.samples.find(index)
        field = shard.image_field(sample)
        name = f"{shard.where(sample)}.{field}"
        try:
            return decode_image(shard.read(sample, field), name)
        except OSError as error:
            raise UnreadableImage(f"cannot read the image {name}: {error}") from error

    def shape(self, index: int) -> tuple[int, int]:
        shard, sample = self.samples.find(index)
        field = shard.image_field(sample)
        return read_shape(shard.read(sample, field), f"{shard.where(sample)}.{field}")

    def members(self, index: int) -> dict[str, Any]:
        """All that is known of a sample, decoded: `json`, `txt`, `cls`, `npy`, and its image under
        its own field.
        """
        shard, sample = self.samples.find(index)
        return _decoded(shard, sample, FIELDS)

    def texts(self, index: int) -> tuple[str, ...]:
        return super().texts(int(self.told[index]))

    def own_texts(self, index: int) -> tuple[str, ...]:
        shard, sample = self.samples.find(index)
        read = _decoded(shard, sample, ("txt", "json"))
        return captions_of(read, self.samples.keys.caption, shard.where(sample))

    def fingerprint(self) -> str:
        names: list[str] = []
        sizes: list[int] = []
        for shard in self.samples.shards:
            names += map(shard.name, range(len(shard)))
            sizes += shard.image_sizes().tolist()
        images = [(names[row], sizes[row]) for row in self.samples.rows.tolist()]
        labels = self.labels.tolist()
        size = self.framing.size
        views = self.framing.describe()
        return digest(set="webdataset", images=images, labels=labels, size=size, views=views)

    def content(self) -> str:
        """With the sizes of all texts of the tars, and whose text each image is told."""
        texts: list[int] = []
        for shard in self.samples.shards:
            texts += shard.text_sizes().tolist()
        told = hashlib.sha256(self.told.numpy().tobytes()).hexdigest()
        return digest(images=self.fingerprint(), texts=texts, told=told)


def _decoded(shard: TarIndex, sample: int, wanted: Sequence[str]) -> dict[str, Any]:
    """What the wanted fields of a sample hold, as far as it has them."""
    found = {}
    for field in wanted:
        if field in shard.members(sample):
            content = shard.read(sample, field)
            found[field] = decode(field, content, f"{shard.where(sample)}.{field}")
    return found


@in_ranges
class WebDatasetData(PictureDataModule):
    """Local WebDataset tars: `shards` is a path with `*` or `{0000..0127}`, a folder of tars, or a
    list of such.

    Without `val_shards`, the share `val_share` of the samples is held out for validation, never
    trained on. `label`, `class_name` and `caption` name entries of a sample's `.json`; a `.cls` or
    `.txt` member goes before them. Of a list of captions, training draws one at each visit.
    `shuffle_captions` gives training images each other's captions, in an order that `seed` fixes:
    the control that shows what text does. `options` are those of PictureDataModule; the set has the
    folder's name.
    """

    def __init__(
        self,
        shards: str | list[str],
        size: int | tuple[int, int],
        val_shards: str | list[str] | None = None,
        val_share: float = 0.05,
        num_classes: int | None = None,
        label: str = "class",
        class_name: str = "class_name",
        caption: str = "caption",
        shuffle_captions: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(size, **options)
        self.shuffle_captions = shuffle_captions
        self.shards = shards
        self.val_shards = val_shards
        self.val_share = val_share
        self.given_classes = num_classes
        self.keys = Keys(label, class_name, caption)
        first = shards if isinstance(shards, str) else shards[0]
        self.name = self.name or Path(first).absolute().parent.name

    @property
    def holds_out(self) -> bool:
        return self.val_shards is None

    @cached_property
    def _samples(self) -> tuple[TarSamples, TarSamples]:
        read = partial(read_shards, keys=self.keys, max_corrupt=self.max_corrupt)
        if self.val_shards is None:
            return read(self.shards).split(self.val_share)
        return read(self.shards), read(self.val_shards)

    @cached_property
    def class_names(self) -> tuple[str, ...]:  # type: ignore[override]
        train, val = self._samples
        given = train.class_names
        for label, name in val.class_names.items():
            if given.get(label, name) != name:
                raise UserError(
                    f"{self.val_shards}: class {label} is {name!r} here, {given[label]!r} in {self.shards}"
                )
        return name_classes(train, self.name, self.given_classes)

    def train_dataset(self, augment: bool = True) -> WebDatasetTars:
        framing = self.framing if augment else self.framing.still()
        return WebDatasetTars(
            self._samples[0],
            self.class_names,
            framing=framing,
            seed=self.seed,
            max_corrupt=self.max_corrupt,
            shuffle_captions=self.shuffle_captions,
            vary_captions=augment,
        )

    def val_dataset(self) -> WebDatasetTars:
        return WebDatasetTars(
            self._samples[1],
            self.class_names,
            framing=self.framing.still(),
            seed=self.seed,
            max_corrupt=self.max_corrupt,
        )
