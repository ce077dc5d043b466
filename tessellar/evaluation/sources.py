"""Where images to measure come from: a folder of PNG files, an ADM npz, a data set. A model that
samples is another source (`generation.py`).

A source yields this rank's share in batches of uint8 images with their place in the set; over all
ranks every image comes exactly once. Its fingerprint is quick to compute and serves as a cache key.
"""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from tessellar import npz
from tessellar.data.batch import collate
from tessellar.data.crops import Size, center_crop
from tessellar.data.dataset import ImageDataset, digest
from tessellar.data.framing import Framing
from tessellar.data.image_file import read_image
from tessellar.data.sets.image_folder import list_folder
from tessellar.data.workers import attended
from tessellar.distributed import own_share, rank, world_size
from tessellar.errors import UserError
from tessellar.evaluation.subset import subset
from tessellar.images import to_uint8
from tessellar.networks.facts import UsedNetwork
from tessellar.plain_data import read_json
from tessellar.sampling.older import in_one_line, respell

LOSSY = (".jpg", ".jpeg", ".webp", ".avif")
SAMPLE_NAME = re.compile(r"\d+_\d+(_.*)?\.png")
# Of `sample.py`'s record.
MADE_KEYS = (
    "model",
    "weights",
    "fingerprint",
    "sampling",
    "seed",
    "precision",
    "search",
    "selected_by",
    "edit",
)


class ImageBatch(NamedTuple):
    """uint8 `images` [B, 3, H, W], their place `index` [B] in the set, `labels` [B], `originals` if
    reconstructed.
    """

    images: Tensor
    index: Tensor
    labels: Tensor | None = None
    originals: Tensor | None = None


class ImageSource(ABC):
    """`name` and `split` are for records, `label_plan` says how labels were chosen, `crop` how whole
    pictures became these images (empty: not known), `warnings` what to be wary of.

    `class_names[label]` is the name of a label's class; empty where labels are bare numbers.
    `class_counts[label]` is the number of its images; empty where labels are not known.
    """

    name: str
    count: int
    split: str | None = None
    label_plan: str = "unknown"
    crop: str = ""
    has_originals: bool = False
    warnings: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    class_counts: tuple[int, ...] = ()

    @property
    def selected_by(self) -> tuple[UsedNetwork, ...]:
        """Networks that chose the images among others: they may not judge them."""
        return ()

    @abstractmethod
    def batches(self, batch_size: int) -> Iterator[ImageBatch]:
        """This rank's images, in order."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when the images change."""

    def describe(self) -> dict[str, Any]:
        """Plain data for records: where the images come from and how they were made."""
        facts = {"name": self.name, "images": self.count, "labels": self.label_plan}
        return {**facts, "crop": self.crop} if self.crop else facts


def counts_of(labels: Tensor | None) -> tuple[int, ...]:
    """How many of `labels` [N] each class has; empty where there are none, or no ids."""
    if labels is None or bool((labels < 0).any()):
        return ()
    return tuple(labels.bincount().tolist())


def label_plan_of(labels: Tensor | None) -> str:
    """ "balanced" if the classes present in `labels` [N] are equally frequent, up to one image."""
    if labels is None:
        return "unknown"
    counts = labels.unique(return_counts=True)[1]
    return "balanced" if int(counts.max() - counts.min()) <= 1 else "uneven"


def crop_name(crop: str, size: Size) -> str:
    """How pictures were cropped, in words for records."""
    shape = size if isinstance(size, int) else " x ".join(map(str, size))
    if crop == "none":
        return f"none, they have {shape} pixels"
    return f"ADM's centre crop to {shape} (halved with a box filter, then bicubic)"


class DatasetImages(ImageSource):
    """Images of a data set: all, or a fixed random part of `limit` images (data sets are often
    sorted by class).
    """

    label_plan = "data"

    def __init__(
        self,
        dataset: ImageDataset,
        name: str,
        split: str | None = None,
        limit: int | None = None,
        num_workers: int = 0,
    ) -> None:
        if limit is not None and not 1 <= limit <= len(dataset):
            raise UserError(f"{limit} images were asked of {name}, which has {len(dataset)}")
        self.dataset = dataset
        self.num_workers = num_workers
        self.count = limit or len(dataset)
        self.name = name if split is None else f"{name} {split}"
        self.split = split
        self.class_names = tuple(dataset.class_names)
        framing = getattr(dataset, "framing", None)
        if isinstance(framing, Framing):
            self.crop = crop_name(framing.crop, framing.size)
        self.class_counts = counts_of(dataset.labels[subset(len(dataset), self.count)])

    def captions(self) -> list[str]:
        """Texts to the images, in their order; raises UserError where there are none."""
        return self.dataset.captions(subset(len(self.dataset), self.count).tolist())

    @property
    def warnings(self) -> tuple[str, ...]:  # type: ignore[override]
        """Corrupt images are known only after they were met."""
        corrupt = len(self.dataset.corrupt)
        return (
            (f"{corrupt} images of {self.name} are corrupt; others were taken instead",)
            if corrupt
            else ()
        )

    def batches(self, batch_size: int) -> Iterator[ImageBatch]:
        places = list(own_share(self.count))
        rows = subset(len(self.dataset), self.count)[places].tolist()
        loader = DataLoader(
            self.dataset,
            batch_size=batch_size,
            sampler=rows,
            num_workers=self.num_workers,
            collate_fn=collate,
            generator=torch.Generator(),  # else a loader draws its base seed from the global random numbers
            worker_init_fn=attended(),
        )
        for batch, first in zip(loader, range(0, len(places), batch_size), strict=True):
            index = torch.tensor(places[first : first + batch_size])
            yield ImageBatch(to_uint8(batch["image"]), index, batch.get("label"))

    def fingerprint(self) -> str:
        return digest(dataset=self.dataset.fingerprint(), count=self.count)


class FolderImages(ImageSource):
    """PNG files in one folder, or in one sub-folder a class; of a folder that `sample.py` wrote,
    its samples. With `size` the centre of each is cropped to it, as ADM does.

    Lossy files are refused as samples, since their artefacts are measured too (2.5 points of FID in
    mage#8); as a reference they give a warning.
    """

    def __init__(self, root: str | Path, as_samples: bool = True, size: int | None = None) -> None:
        if size is not None and size < 1:
            raise UserError(f"--size {size} must be at least 1")
        self.root = Path(root)
        self.size = size
        self.crop = "" if size is None else crop_name("adm", size)
        self.name = self.root.resolve().name
        self.made = made_by(self.root)
        listed = sampled_files(self.root) if self.made else listed_files(self.root)
        self.files, self.labels, self.class_names = listed
        self.count = len(self.files)
        self.label_plan = label_plan_of(self.labels)
        self.class_counts = counts_of(self.labels)
        lossy = [file for file in self.files if is_lossy(self.root / file)]
        if lossy and as_samples:
            raise UserError(
                f"{self.root / lossy[0]} is compressed with loss, which a distance measures too: save samples as PNG, "
                "or as uint8 in an npz"
            )
        if as_samples and size is None:
            check_sizes(self.root, self.files)
        self.warnings = older_spelling(self.root)
        if lossy:
            self.warnings = (
                f"{len(lossy)} images of the reference {self.name} are JPEG or WebP, with artefacts",
            )

    def batches(self, batch_size: int) -> Iterator[ImageBatch]:
        for index in torch.tensor(own_share(self.count), dtype=torch.int64).split(batch_size):
            images = list(map(self._read, index.tolist()))
            if any(image.shape != images[0].shape for image in images):
                raise UserError(
                    f"images in {self.root} differ in size; crop those of both sides to one: --size N"
                )
            labels = None if self.labels is None else self.labels[index]
            yield ImageBatch(torch.stack(images), index, labels)

    def _read(self, i: int) -> Tensor:
        image = read_image(self.root / self.files[i])
        if self.size is not None:
            image = center_crop(image, self.size)
        return rearrange(torch.from_numpy(np.array(image)), "h w c -> c h w")

    def fingerprint(self) -> str:
        files = []
        for file in self.files:
            facts = (self.root / file).stat()
            files.append((file, facts.st_size, facts.st_mtime_ns))
        return digest(set="folder", files=files, **self._crop)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), **self._crop, **self.made}

    @property
    def selected_by(self) -> tuple[UsedNetwork, ...]:
        return selecting_networks(self.root)

    @property
    def _crop(self) -> dict[str, int]:
        """The size that images are cropped to, where they are."""
        return {} if self.size is None else {"size": self.size}


def is_lossy(path: Path) -> bool:
    """Whether a file is compressed with loss, by its name; of WebP, which may be either, by its
    content.
    """
    suffix = path.suffix.lower()
    return suffix in LOSSY and not (suffix == ".webp" and is_lossless_webp(path))


def is_lossless_webp(path: Path) -> bool:
    """Whether the pixels of a WebP file are in a VP8L chunk: RIFF, size, WEBP, then chunks of name,
    size and content, padded to an even number of bytes.
    """
    try:
        with path.open("rb") as file:
            head = file.read(12)
            while head[:4] == b"RIFF" and head[8:12] == b"WEBP":
                chunk = file.read(8)
                if len(chunk) < 8 or chunk[:4] in (b"VP8L", b"VP8 ", b"ANMF"):
                    return chunk[:4] == b"VP8L"
                size = int.from_bytes(chunk[4:], "little")
                file.seek(size + size % 2, os.SEEK_CUR)
    except OSError:
        pass  # reading it says what is wrong
    return False


def check_sizes(root: Path, files: Sequence[str]) -> None:
    """Raise UserError, before anything is measured, where images differ in size."""
    first: tuple[str, tuple[int, int]] | None = None
    for name in files:
        try:
            with Image.open(root / name) as picture:
                size = picture.size
        except Exception:  # reading it says what is wrong
            continue
        first = first or (name, size)
        if size != first[1]:
            sizes = f"{first[0]} is {first[1][0]}x{first[1][1]}, {name} is {size[0]}x{size[1]}"
            raise UserError(
                f"images in {root} differ in size ({sizes}); crop those of both sides to one: --size N"
            )


def made_by(folder: Path) -> dict[str, Any]:
    """How `sample.py` made the images of a folder, as its record says; empty where there is none."""
    record = _record(folder)
    made = {key: record[key] for key in MADE_KEYS if key in record}
    now = _respelled(record)
    return made if now is None else {**made, "sampling": now}


def selecting_networks(folder: Path) -> tuple[UsedNetwork, ...]:
    """Networks that chose the images of a folder in a search, as the record of `sample.py` says."""
    listed = _record(folder).get("selected_by") or []
    try:
        return tuple(
            UsedNetwork(str(entry["name"]), str(entry["sha256"]), tuple(map(str, entry["marks"])))
            for entry in listed
        )
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{folder / 'samples.json'}: selected_by does not list the networks that chose the samples"
        ) from error


def older_spelling(folder: Path) -> tuple[str, ...]:
    """A warning where the record of `sample.py` has its settings in an older spelling, with the
    present one.
    """
    now = _respelled(_record(folder))
    if now is None:
        return ()
    spelled = in_one_line(now)
    return (
        f"{folder / 'samples.json'}: sampling is in the older spelling; it is now sampling: {spelled}",
    )


def _respelled(record: dict[str, Any]) -> dict[str, Any] | None:
    sampling = record.get("sampling")
    try:
        return respell(sampling) if isinstance(sampling, dict) else None
    except (AttributeError, KeyError, TypeError, ValueError):  # no settings of any version
        return None


def names_of_record(folder: Path) -> tuple[str, ...]:
    """Names of the model's classes, as the record of `sample.py` says; empty where it does not."""
    names = _record(folder).get("class_names") or []
    if not isinstance(names, list):
        raise UserError(f"{folder / 'samples.json'}: class_names is no list of names")
    return tuple(map(str, names))


def _record(folder: Path) -> dict[str, Any]:
    path = folder / "samples.json"
    if not path.is_file():
        return {}
    record = read_json(path)
    if not isinstance(record, dict):
        raise UserError(f"{path} cannot be read: it holds no record of sample.py")
    return record


class ListedFiles(NamedTuple):
    """Files relative to their folder, their labels, and the names of classes as far as they are
    known.
    """

    files: list[str]
    labels: Tensor | None
    class_names: tuple[str, ...]


def sampled_files(root: Path) -> ListedFiles:
    """Files `<index>_<class>_<name>.png` of `sample.py`, and their classes; its grid is no sample."""
    found = []
    labels = []
    for name in sorted(os.listdir(root)):
        if SAMPLE_NAME.fullmatch(name):
            found.append(name)
            labels.append(int(Path(name).stem.split("_")[1]))
    if not found:
        raise UserError(
            f"{root} holds a samples.json but no images <index>_<class>.png; measure its samples.npz"
        )
    return ListedFiles(found, torch.tensor(labels), names_of_record(root))


def listed_files(root: Path) -> ListedFiles:
    """All images, numbered as a data set of the same folder is; one class alone says nothing."""
    listing = list_folder(root)
    if len(listing.class_names) == 1:
        return ListedFiles(list(listing.files), None, ())
    return ListedFiles(list(listing.files), listing.labels, listing.class_names)


class ArrayImages(ImageSource):
    """The array `arr_0` (uint8 [N, H, W, 3]) of an npz file as the ADM suite exchanges them;
    `arr_1` holds labels.

    Read as a stream, so 50,000 images need no 10 GB of memory.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.name = self.path.stem
        with npz.open_rows(self.path, "arr_0") as rows:
            self.count = rows.shape[0] if rows.shape else 0
            if rows.dtype != np.uint8 or len(rows.shape) != 4 or rows.shape[3] != 3:
                raise UserError(
                    f"arr_0 of {self.path} is {rows.dtype} {rows.shape}; needed is uint8 [N, H, W, 3]"
                )
            if not self.count or 0 in rows.shape:
                raise UserError(f"arr_0 of {self.path} is {rows.shape}: it holds no images")
        labels = npz.read_arrays(self.path, {"labels": ("arr_1", "labels")}).get("labels")
        self.labels = None if labels is None else _labels(labels, self.path)
        if self.labels is not None and len(self.labels) != self.count:
            raise UserError(f"{self.path} holds {self.count} images but {len(self.labels)} labels")
        self.label_plan = label_plan_of(self.labels)
        self.class_counts = counts_of(self.labels)
        self.class_names = () if self.labels is None else names_of_record(self.path.parent)
        self.warnings = older_spelling(self.path.parent)

    def batches(self, batch_size: int) -> Iterator[ImageBatch]:
        with npz.open_rows(self.path, "arr_0") as rows:
            for first in range(0, self.count, batch_size * world_size()):
                stop = min(first + batch_size * world_size(), self.count)
                # All ranks read all, each keeps its share.
                images = rows.read(stop - first)
                index = torch.arange(first, stop)[rank() :: world_size()]
                own = rearrange(
                    torch.from_numpy(images[rank() :: world_size()]), "b h w c -> b c h w"
                )
                if len(index):
                    yield ImageBatch(
                        own, index, None if self.labels is None else self.labels[index]
                    )

    def fingerprint(self) -> str:
        stat = self.path.stat()
        return digest(set="npz", file=self.path.name, size=stat.st_size, time=stat.st_mtime_ns)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), **made_by(self.path.parent)}

    @property
    def selected_by(self) -> tuple[UsedNetwork, ...]:
        return selecting_networks(self.path.parent)


def _labels(array: np.ndarray, path: Path) -> Tensor:
    """Labels int64 [N]; raises UserError for anything but whole numbers of at least 0."""
    if array.dtype.kind not in "iu" or (array.size and not 0 <= array.min() <= array.max() < 2**31):
        raise UserError(f"the labels (arr_1) of {path} are no whole numbers of at least 0")
    return torch.from_numpy(array.astype(np.int64)).flatten()


def open_images(path: str | Path, as_samples: bool = True, size: int | None = None) -> ImageSource:
    """A folder of images, cropped to `size` where one is given, or an npz with `arr_0`.

    Raises UserError for anything else, and for a size beside an npz, whose images have one.
    """
    path = Path(path)
    if path.is_dir():
        return FolderImages(path, as_samples, size)
    if size is not None and path.suffix == ".npz":
        raise UserError(
            f"--size crops the images of a folder; those of {path} have one size already"
        )
    if path.suffix == ".npz":
        return ArrayImages(path)
    raise UserError(f"{path} is neither a folder of images nor an npz file")
