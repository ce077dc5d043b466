"""Remote WebDataset shards (http, https, hf, gs, ...), read as streams with the `webdataset`
library.

Nothing is exact here, by the nature of a stream: shards are drawn with repetition, samples mixed
within a buffer, and an epoch is a declared number of samples, so an epoch may show a sample twice
or not at all, and a resumed run goes on with freshly drawn shards. Validation shards are read once
through, each sample once. Copy the shards to disk and use WebDatasetData for exact epochs and
resume. Decoding is that of `members.py`; addresses that run commands are refused.
"""

import logging
import random
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain, islice
from typing import Any, BinaryIO
from urllib.parse import urlparse

from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.filters import shuffle
from webdataset.tariterators import url_opener

from tessellar.data.batch import Sample, collate
from tessellar.data.captions import class_text, pick, tell_missing
from tessellar.data.damage import SAMPLE, too_many, warn_of_first
from tessellar.data.datamodule import PictureDataModule
from tessellar.data.dataset import ImageDataset, digest
from tessellar.data.framing import DRAWS, Framing
from tessellar.data.image_file import UnreadableImage
from tessellar.data.pictures import MAX_CORRUPT, to_pixels
from tessellar.data.tars.headers import LARGEST_MEMBER, Header, RefusedHeader
from tessellar.data.tars.index import Keys
from tessellar.data.tars.members import (
    FIELDS,
    IMAGE_FIELDS,
    UnreadableMember,
    captions_of,
    decode,
    label_of,
    split_name,
)
from tessellar.data.tars.shards import expand_braces
from tessellar.data.tars.unpacking import Unpacked
from tessellar.data.workers import attended, starting_readers
from tessellar.errors import UserError
from tessellar.protocol.arguments import in_ranges
from tessellar.randomness import derive

log = logging.getLogger(__name__)
# Without pipe, which runs a shell.
SCHEMES = (
    "",
    "file",
    "http",
    "https",
    "hf",
    "gs",
    "ais",
    "sftp",
    "ftps",
    "scp",
)
Raw = dict[str, bytes]
PEEKED = 100  # samples looked at before a run that reads text


def stream_members(url: str) -> Iterator[tuple[str, str, bytes]]:
    """Key, field and content of what one tar's samples are made of, in order; other members are
    passed over unread. Raises UserError for a stream that breaks off or holds what is refused.
    """
    if urlparse(url).scheme not in SCHEMES:
        raise UserError(
            f"{url} is not opened: it must be a path or begin with {', '.join(filter(None, SCHEMES))}"
        )
    try:
        with starting_readers():
            sources = list(url_opener(iter([{"url": url}])))
        for opened in sources:
            yield from _members(opened["stream"], url)
    except RefusedHeader as error:
        raise UserError(f"{url}: {error}") from error
    except UserError:
        raise
    except Exception as error:
        # The library passes on whatever its openers and Python's tar reader raise.
        raise UserError(
            f"{url} cannot be read: {error.args[0] if error.args else type(error).__name__}"
        ) from error


class _Header(Header):
    """A header that also tells its tar when it is the block of zeros that ends it.

    Python's reader takes a stream that stops between two members, or a damaged header, for the end.
    """

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "_Header":
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            tarfile_.has_end_mark = True  # type: ignore[attr-defined]
            raise


def _members(stream: BinaryIO, url: str) -> Iterator[tuple[str, str, bytes]]:
    unpacked: Any = Unpacked(stream, url)
    with tarfile.open(fileobj=unpacked, mode="r|", tarinfo=_Header) as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # which would grow with the tar
            if not member.isreg():
                continue
            try:
                parts = split_name(member.name)
            except UserError as error:
                raise UserError(f"{url}: {error}") from error
            if parts is None:
                continue
            if member.size > LARGEST_MEMBER:  # in a compressed tar that may be a few kilobytes
                raise UserError(
                    f"{url}: member {member.name!r} has {member.size} bytes, more than {LARGEST_MEMBER}"
                )
            file = tar.extractfile(member)
            assert file is not None
            yield *parts, file.read()
        if not getattr(tar, "has_end_mark", False):
            raise UserError(
                f"{url} breaks off, or is damaged, behind byte {tar.offset}: there is no end mark"
            )
        unpacked.check_rest()


def stream_samples(url: str) -> Iterator[tuple[str, Raw]]:
    """Name and fields of each sample of one tar: runs of members with the same name up to the first
    dot.
    """
    current = ""
    fields = {}
    for key, field, content in stream_members(url):
        if key != current:
            if fields:
                yield f"{url}:{current}", fields
            current = key
            fields = {}
        fields[field] = content
    if fields:
        yield f"{url}:{current}", fields


class WebDatasetStream(IterableDataset[Sample]):
    """`length` samples of endlessly drawn shards for this rank, or with `length` None every sample
    of them once.

    `class_names` bound the classes: one outside is a mistake (UserError); a sample without one has
    class 0. Corrupt samples are skipped, counted in each worker. A pass depends on (seed, epoch,
    start, rank, number of workers), where `start` is the step that a run was resumed at.
    """

    def __init__(
        self,
        urls: Sequence[str],
        class_names: tuple[str, ...],
        framing: Framing,
        length: int | None = None,
        buffer: int = 1000,
        batch_size: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        keys: Keys = Keys(),  # noqa: B008
        max_corrupt: float = MAX_CORRUPT,
    ) -> None:
        self.urls = tuple(urls)
        self.class_names = class_names
        self.framing = framing
        self.length = length
        self.buffer = buffer
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.keys = keys
        self.max_corrupt = max_corrupt
        self.epoch = self.start = 0
        self.corrupt = self.met = 0
        self.captioned = self.uncaptioned = 0
        self.first_uncaptioned = ""
        self.gaps_told = False

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        place = self.rank * workers + number
        places = self.world_size * workers
        if self.length is None:
            return self._once(place, places)
        batches = len(range(number, self.length // self.batch_size, workers))
        return islice(self._endless(place, places), batches * self.batch_size)

    def _once(self, place: int, places: int) -> Iterator[Sample]:
        """Every `places`-th sample of all shards, from `place` on."""
        index = 0
        for name, fields in chain.from_iterable(map(stream_samples, self.urls)):
            sample = None
            if index % places == place:
                sample = self._decode(name, fields, index, [0.0] * (DRAWS + 1))
            index += 1
            if sample is not None:
                yield sample
        if not index:
            raise UserError(f"{_named(self.urls)} no sample: nothing with {', '.join(FIELDS)}")

    def _endless(self, place: int, places: int) -> Iterator[Sample]:
        rng = random.Random(derive(self.seed, self.epoch, self.start, place, places))

        def samples() -> Iterator[tuple[str, Raw]]:
            empty: set[str] = set()
            while len(empty) < len(set(self.urls)):
                url = rng.choice(self.urls)
                has_samples = False
                for sample in stream_samples(url):
                    has_samples = True
                    yield sample
                if not has_samples and url not in empty:
                    empty.add(url)
                    log.warning("%s holds no sample", url)
            raise UserError(f"{_named(self.urls)} no sample: nothing with {', '.join(FIELDS)}")

        mixed: Any = (
            shuffle(self.buffer, initial=self.buffer, rng=rng)(samples())
            if self.buffer
            else samples()
        )
        for number, (name, fields) in enumerate(mixed):
            # The last one chooses a caption.
            draws = [rng.random() for _ in range(DRAWS + 1)]
            if sample := self._decode(name, fields, number * places + place, draws):
                yield sample

    def _decode(self, name: str, fields: Raw, index: int, draws: list[float]) -> Sample | None:
        """A sample, or None for a corrupt one."""
        self.met += 1
        try:
            return self._sample(name, fields, index, draws)
        except (UnreadableImage, UnreadableMember) as error:
            self.corrupt += 1
            if too_many(self.corrupt, max(self.met, SAMPLE), self.max_corrupt):
                raise UserError(
                    f"{self.corrupt} of {self.met} samples read so far are corrupt, more than max_corrupt "
                    f"{self.max_corrupt} allows; the last: {error}"
                ) from error
            if self.corrupt == 1:
                warn_of_first(error, self.max_corrupt)
            return None

    def _sample(self, name: str, fields: Raw, index: int, draws: list[float]) -> Sample:
        image_field = next((field for field in IMAGE_FIELDS if field in fields), None)
        if image_field is None:
            raise UnreadableMember(f"{name} has no image")
        decoded = _decoded(name, fields, (image_field, "json", "txt", "cls"))
        label = label_of(decoded, self.keys.label, name) or 0
        if label >= len(self.class_names):
            raise UserError(
                f"{name} has class {label}; it must be below {len(self.class_names)} (num_classes)"
            )
        own = captions_of(decoded, self.keys.caption, name)
        self._count_caption(bool(own), name)
        texts = own or class_text(self.class_names, label)
        shown = self.framing.draw(decoded[image_field], draws[:DRAWS], name, self.epoch)
        return {
            "image": to_pixels([shown])[0],
            "index": index,
            "label": label,
            "caption": pick(texts, draws[DRAWS]),
        }

    def _count_caption(self, there: bool, name: str) -> None:
        """Say once that captions are missing, as soon as some samples have one and some do not."""
        self.captioned += there
        self.uncaptioned += not there
        if not there and not self.first_uncaptioned:
            self.first_uncaptioned = name
        if self.captioned and self.uncaptioned and not self.gaps_told:
            self.gaps_told = True
            met = self.captioned + self.uncaptioned
            tell_missing(
                self.uncaptioned,
                met,
                self.first_uncaptioned,
                "an empty text is taken, as for others to come",
            )


def _named(urls: Sequence[str]) -> str:
    return f"{urls[0]} holds" if len(urls) == 1 else f"{urls[0]} and {len(urls) - 1} others hold"


def _decoded(name: str, fields: Raw, wanted: Sequence[str]) -> dict[str, Any]:
    """What the wanted fields of a sample hold, as far as it has them."""
    found = {}
    for field in wanted:
        if field in fields:
            found[field] = decode(field, fields[field], f"{name}.{field}")
    return found


class _EpochLoader(DataLoader):
    """Another epoch at each pass: Lightning tells samplers of epochs, and a stream has none."""

    def __iter__(self) -> Any:
        iterator = super().__iter__()
        assert isinstance(self.dataset, WebDatasetStream)
        self.dataset.epoch += 1
        return iterator


@in_ranges
class WebDatasetStreamData(PictureDataModule):
    """Remote shards; `shards` and `val_shards` may hold braces, as in `.../train-{0000..0127}.tar`.
    Nothing is exact.

    `epoch_length` samples over all ranks make an epoch. There is no image by index, so measure
    against a folder or a statistics file. `options` are those of PictureDataModule but `balance`:
    how rare a class is does not show before all is read.
    """

    def __init__(
        self,
        shards: str | list[str],
        val_shards: str | list[str],
        size: int | tuple[int, int],
        epoch_length: int,
        num_classes: int = 1,
        buffer: int = 1000,
        label: str = "class",
        caption: str = "caption",
        name: str = "webdataset",
        **options: Any,
    ) -> None:
        super().__init__(size, name=name, balance=False, **options)
        if self.buckets:
            raise UserError(
                f"{name} is a stream, whose pictures cannot be sorted into buckets beforehand: "
                "WebDatasetData reads local tars"
            )
        if num_classes < 1 or epoch_length < 1 or buffer < 0:
            raise ValueError(
                f"num_classes {num_classes} and epoch_length {epoch_length} must be positive, buffer >= 0"
            )
        self.shards = shards
        self.val_shards = val_shards
        self.epoch_length = epoch_length
        self.buffer = buffer
        self.class_names = tuple(map(str, range(num_classes)))
        self.keys = Keys(label=label, caption=caption)

    def train_dataset(self, augment: bool = True) -> ImageDataset:
        raise UserError(
            f"{self.name} is a stream, without images by index: measure against a folder or statistics"
        )

    def val_dataset(self) -> ImageDataset:
        return self.train_dataset()

    def check_files(self) -> None:
        _ = expand_braces(self.shards), expand_braces(self.val_shards)

    def found(self) -> str:
        shards = len(expand_braces(self.shards)), len(expand_braces(self.val_shards))
        return (
            f"{shards[0]:,} training and {shards[1]:,} validation shards, streamed: "
            f"{self.epoch_length:,} images an epoch"
        )

    def check_captions(self) -> None:
        """Looks at the first samples of the first training and the first validation shard."""
        for spec in (self.shards, self.val_shards):
            url = expand_braces(spec)[0]
            looked_at = 0
            captioned = False
            for name, fields in islice(stream_samples(url), PEEKED):
                looked_at += 1
                with suppress(UnreadableMember):  # a text that cannot be read is none
                    text = _decoded(name, fields, ("json", "txt"))
                    captioned |= bool(captions_of(text, self.keys.caption, name))
            if not captioned:
                raise UserError(
                    f"none of the first {looked_at} samples of {url} has a caption, which this generator reads: a "
                    f".txt member, or {self.keys.caption!r} in its .json (data.caption)"
                )

    def fingerprint(self) -> str:
        parts = [expand_braces(self.shards), expand_braces(self.val_shards)]
        return digest(set="webdataset-stream", shards=parts, size=self.image_size)

    def contents(self) -> tuple[str, str]:
        """Hashes of the names of the shards: what they hold is not known before it is read."""
        size = self.image_size
        train = digest(set="webdataset-stream", shards=expand_braces(self.shards), size=size)
        val = digest(set="webdataset-stream", shards=expand_braces(self.val_shards), size=size)
        return train, val

    def train_dataloader(self) -> DataLoader:
        world_size = self.trainer.world_size if self.trainer else 1
        steps = self.epoch_length // (self.batch_size * world_size)
        if steps < 1:
            raise UserError(
                f"{self.name}: an epoch of {self.epoch_length} is too short for a batch of {self.batch_size} on each "
                f"of {world_size} processes: raise data.epoch_length"
            )
        return self._stream(self.shards, self.framing, steps * self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return self._stream(self.val_shards, self.framing.still(), None)

    def test_dataloader(self) -> DataLoader:
        return self.val_dataloader()

    def _stream(self, spec: str | list[str], framing: Framing, length: int | None) -> DataLoader:
        rank, world_size = (
            (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        )
        dataset = WebDatasetStream(
            expand_braces(spec),
            self.class_names,
            framing=framing,
            length=length,
            buffer=self.buffer,
            batch_size=self.batch_size,
            rank=rank,
            world_size=world_size,
            seed=self.seed,
            keys=self.keys,
            max_corrupt=self.max_corrupt,
        )
        if self.trainer:
            dataset.epoch = self.trainer.current_epoch
            dataset.start = self.trainer.global_step
        return _EpochLoader(
            dataset,
            self.batch_size,
            num_workers=self.num_workers,
            collate_fn=collate,
            drop_last=length is not None,
            worker_init_fn=attended(),
        )
