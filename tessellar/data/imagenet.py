"""ImageNet as it is downloaded, made into what training reads: class folders or shards, and small crops.

The training file is a tar of 1,000 tars, one a class; the validation file is a tar of 50,000 pictures
whose classes stand in the development kit, or in the CSV that Kaggle gives. Folders that are there
already are taken as they are. Every class is written beside its place and then moved there, so that
an interrupted command goes on where it was.
"""

import csv
import io
import logging
import os
import re
import shutil
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from tessellar.data.captions import decode_text
from tessellar.data.crops import center_crop
from tessellar.data.image_file import UnreadableImage, read_image
from tessellar.data.tars.headers import LARGEST_MEMBER, Header, RefusedHeader
from tessellar.data.tars.index import load_index
from tessellar.data.tars.unpacking import Unpacked
from tessellar.errors import UserError, check_is_file, writing
from tessellar.progress import Progress

log = logging.getLogger(__name__)
CLASS = re.compile(r"n\d{8}")
PICTURES = (".jpeg", ".jpg", ".png")
NUMBER = re.compile(r"_(\d{8})$")
EXPECTED = {"train": 1_281_167, "val": 50_000}
CLASSES = 1000
SHARD = 10_000  # pictures of a shard
DEVKIT_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
DEVKIT_CLASSES = "data/meta.mat"
LARGEST_LIST = 64 << 20  # bytes of one of the two; the kit's have some 700 kB

Labels = Mapping[str, str]  # class of a picture, by its file's name without ending


def prepare_train(source: Path, target: Path) -> None:
    """Class folders of the training pictures in `target`: unpacked from a tar of tars or a folder of
    tars, or a link to a folder of class folders.
    """
    if source.is_dir() and _class_folders(source):
        _link(source, target)
        return
    if source.is_dir():
        tars = sorted(path for path in source.glob("n*.tar") if CLASS.fullmatch(path.stem))
        if not tars:
            raise UserError(f"{source} holds neither class folders (n01440764, ...) nor their tars")
        with Progress("unpacking", len(tars), "classes") as bar:
            for path in tars:
                with open(path, "rb") as file:
                    _unpack_class(file, path.stem, target, str(path))
                bar.update()
        return
    with _open_tar(source) as outer:
        with Progress("unpacking", None, "classes") as bar:
            for member in _members(outer, str(source)):
                name = Path(member.name)
                if not member.isfile() or not CLASS.fullmatch(name.stem) or name.suffix != ".tar":
                    raise UserError(
                        f"{source} holds {member.name!r}; ImageNet's training file holds one tar a class, n01440764.tar"
                    )
                inner = outer.extractfile(member)
                assert inner is not None
                _unpack_class(inner, name.stem, target, f"{source}:{member.name}")  # type: ignore[arg-type]
                bar.update()


def _unpack_class(file: BinaryIO, name: str, target: Path, where: str) -> None:
    """The pictures of one class's tar in `target`/`name`, unless they are there.

    Their contents alone are written: a tar's owners, modes and paths are not taken over.
    """
    folder = target / name
    if folder.is_dir():
        return
    staged = target / f".{name}.part"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    with writing(folder), _open_tar(where, file) as tar:
        for member in _files(tar, where):
            content = tar.extractfile(member)
            assert content is not None
            place = staged / Path(member.name).name
            with open(place, "wb") as out:
                shutil.copyfileobj(content, out)
            if place.stat().st_size != member.size:
                raise UserError(
                    f"{member.name} ends too early: the file was not downloaded to its end"
                )
        staged.replace(folder)


def prepare_val(source: Path, target: Path, labels: Path | None) -> None:
    """Class folders of the validation pictures: of a tar or a folder of pictures with `labels`, or a
    link to a folder of class folders.
    """
    if source.is_dir() and _class_folders(source):
        _link(source, target)
        return
    if target.is_dir():
        return
    if labels is None:
        raise UserError(
            f"{source} holds pictures without classes: name them, --labels with the development kit "
            "(ILSVRC2012_devkit_t12.tar.gz), Kaggle's LOC_val_solution.csv, or a text of one class a line"
        )
    classes = read_labels(labels)
    staged = target.with_name(f".{target.name}.part")
    with writing(target), Progress("sorting", len(classes), "pictures") as bar:
        for name, content in _pictures(source):
            stem = Path(name).stem
            if stem not in classes:
                raise UserError(f"{labels} tells no class of {name}")
            place = staged / classes[stem] / Path(name).name
            if not place.is_file():
                place.parent.mkdir(parents=True, exist_ok=True)
                part = place.with_suffix(".part")
                with open(part, "wb") as out:
                    shutil.copyfileobj(content, out)
                part.replace(place)
            bar.update()
        staged.replace(target)


def _pictures(source: Path) -> Iterator[tuple[str, BinaryIO]]:
    """Names and contents of the pictures of a tar or of a flat folder."""
    if source.is_dir():
        for path in sorted(source.iterdir()):
            if _is_picture(path):
                with open(path, "rb") as file:
                    yield path.name, file
        return
    with _open_tar(source) as tar:
        for member in _files(tar, str(source)):
            if _is_picture(Path(member.name)):
                content = tar.extractfile(member)
                assert content is not None
                yield Path(member.name).name, content  # type: ignore[misc]


def read_labels(path: Path) -> Labels:
    """Classes of the validation pictures: of the development kit, Kaggle's CSV, or a text with the
    class of picture 1, 2, ... a line. Raises UserError for anything else.
    """
    check_is_file(path)
    if path.name.endswith((".tar.gz", ".tgz", ".tar")):
        return _of_devkit(path)
    try:
        text = decode_text(path.read_bytes(), f"--labels {path}")
    except OSError as error:
        raise UserError(f"--labels {path} cannot be read ({error})") from error
    if path.suffix == ".csv":
        try:
            rows = list(csv.reader(io.StringIO(text)))
        except csv.Error as error:
            raise UserError(f"--labels {path} is no CSV ({error})") from error
        labels = {row[0]: row[1].split(" ")[0] for row in rows[1:] if len(row) > 1}
    else:
        labels = _numbered(text.split())
    wrong = next((name for name in labels.values() if not CLASS.fullmatch(name)), None)
    if not labels:
        raise UserError(f"--labels {path} names no class")
    if wrong is not None:
        raise UserError(f"--labels {path}: {wrong!r} is no class such as n01440764")
    return labels


def _numbered(classes: Sequence[str]) -> dict[str, str]:
    return {f"ILSVRC2012_val_{i:08d}": name for i, name in enumerate(classes, start=1)}


def _of_devkit(path: Path) -> Labels:
    """The kit numbers classes by its own table, a MATLAB file that scipy reads."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UserError(
            f"{path} needs the package scipy (pip install scipy); or give Kaggle's LOC_val_solution.csv as --labels"
        ) from error
    found: dict[str, bytes] = {}
    with _open_tar(path) as tar:
        for member in _files(tar, str(path)):
            for wanted in (DEVKIT_TRUTH, DEVKIT_CLASSES):
                if member.name.endswith(wanted):
                    content = tar.extractfile(member)
                    assert content is not None
                    if member.size > LARGEST_LIST:
                        raise UserError(f"{path}: {member.name} has {member.size} bytes")
                    found[wanted] = content.read()
    if len(found) < 2:
        raise UserError(f"{path} is not ImageNet's development kit: it lacks {DEVKIT_TRUTH}")
    try:
        table = loadmat(io.BytesIO(found[DEVKIT_CLASSES]), squeeze_me=True)["synsets"]
        by_number = {int(row[0]): str(row[1]) for row in table}
        return _numbered([by_number[int(number)] for number in found[DEVKIT_TRUTH].split()])
    except Exception as error:  # whatever the reader of MATLAB's files raises on a damaged one
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path} is damaged ({type(error).__name__}: {reason})") from error


def write_shards(folder: Path, target: Path, size: int = SHARD) -> int:
    """The class folders of `folder` as tars of `size` pictures with their classes, and the index of
    each; returns their number.

    Pictures are dealt out in turn, so that every shard holds all classes. Shards that are there are
    left.
    """
    files = sorted(filter(_is_picture, folder.glob("*/*")))
    classes = sorted({path.parent.name for path in files})
    count = max(1, -(-len(files) // size))
    target.mkdir(parents=True, exist_ok=True)
    with Progress("writing shards", count, "shards") as bar:
        for number in range(count):
            path = target / f"{folder.name}-{number:05d}.tar"
            staged = path.with_suffix(".part")
            if not path.is_file():
                with writing(path, unfinished=staged):
                    _write_shard(staged, files[number::count], classes)
                    staged.replace(path)
            load_index(path)
            bar.update()
    return count


def _write_shard(path: Path, files: Sequence[Path], classes: Sequence[str]) -> None:
    with tarfile.open(path, "w") as tar:
        for file in files:
            name = file.parent.name
            tar.add(file, arcname=f"{name}_{file.stem}{file.suffix.lower()}", recursive=False)
            label = str(classes.index(name)).encode()
            info = tarfile.TarInfo(f"{name}_{file.stem}.cls")
            info.size = len(label)
            tar.addfile(info, io.BytesIO(label))


def write_crops(folder: Path, target: Path, size: int) -> int:
    """The pictures of class folders as `size` x `size` PNG files, cropped from the centre as ADM
    does; returns their number. Classes that are there are left.
    """
    total = 0
    classes = _class_folders(folder)
    with Progress("cropping", len(classes), "classes") as bar:
        for name in classes:
            total += _crop_class(folder / name, target / name, size)
            bar.update()
    return total


def _crop_class(folder: Path, target: Path, size: int) -> int:
    if target.is_dir():
        return sum(1 for _ in target.glob("*.png"))
    staged = target.with_name(f".{target.name}.part")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    count = 0
    with writing(target):
        for path in sorted(folder.iterdir()):
            if not _is_picture(path):
                continue
            try:
                center_crop(read_image(path), size).save(staged / f"{path.stem}.png")
                count += 1
            except UnreadableImage as error:
                log.warning("left out: %s", error)
        staged.replace(target)
    return count


def count_pictures(folder: Path) -> dict[str, int]:
    """Pictures of each class folder."""
    counts = {}
    for name in _class_folders(folder):
        counts[name] = sum(map(_is_picture, (folder / name).iterdir()))
    return counts


def tell_counts(split: str, counts: Mapping[str, int]) -> str:
    """`train: 1,281,167 pictures of 1,000 classes`, and what ImageNet would have where it differs."""
    total = sum(counts.values())
    said = f"{split}: {total:,} pictures of {len(counts):,} classes"
    if total == EXPECTED[split] and len(counts) == CLASSES:
        return said
    return f"{said} (all of ImageNet: {EXPECTED[split]:,} of {CLASSES:,})"


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURES


def _class_folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


def _link(source: Path, target: Path) -> None:
    """A link to a folder that is as it should be: nothing is copied."""
    if target.is_symlink() and target.resolve() == source.resolve():
        return
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists and is not a link to {source}; choose another --out")
    target.parent.mkdir(parents=True, exist_ok=True)
    os.symlink(source.resolve(), target)


@contextmanager
def _open_tar(path: str | Path, content: BinaryIO | None = None) -> Iterator[tarfile.TarFile]:
    """The tar at `path`, or the one whose `content` is given; packed ones are read as streams."""
    if content is None and not Path(path).exists():
        raise UserError(f"{path} does not exist")
    with ExitStack() as stack:
        try:
            file = content or stack.enter_context(open(path, "rb"))
            begin = file.tell()
            unpacked: Any = Unpacked(file, str(path))
            if unpacked.is_packed:
                tar = tarfile.open(fileobj=unpacked, mode="r|", tarinfo=Header)
            else:
                file.seek(begin)
                tar = tarfile.open(fileobj=file, mode="r:", tarinfo=Header)
        except RefusedHeader as error:
            raise UserError(f"{path}: {error}") from error
        except (OSError, EOFError, tarfile.TarError) as error:
            raise UserError(f"{path} is not a tar, or it is cut off") from error
        stack.enter_context(tar)
        try:
            yield tar
        except tarfile.TarError as error:  # while a member's content is read
            raise UserError(f"{path} is damaged or cut off: {error}") from error


def _members(tar: tarfile.TarFile, where: str) -> Iterator[tarfile.TarInfo]:
    """All members; raises UserError where the tar is damaged or claims what ImageNet's do not."""
    members = iter(tar)
    while True:
        try:
            member = next(members, None)
        except RefusedHeader as error:
            raise UserError(f"{where}: {error}") from error
        except (OSError, EOFError, tarfile.TarError) as error:
            raise UserError(f"{where} cannot be read: {error}") from error
        if member is None:
            return
        yield member


def _files(tar: tarfile.TarFile, where: str) -> Iterator[tarfile.TarInfo]:
    """Members that are files of a picture's size: a compressed tar could hold any number of zeros."""
    for member in _members(tar, where):
        if not member.isfile():
            continue
        if member.size > LARGEST_MEMBER:
            raise UserError(
                f"{where}: {member.name!r} has {member.size} bytes, more than {LARGEST_MEMBER}"
            )
        yield member
