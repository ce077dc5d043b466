"""Full disks, shown by a limit on the size of files: one line that names the file, and nothing half-written."""

import errno
import json
import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from tessellar.checkpoints.staging import staged_folder
from tessellar.cli.errors import run
from tessellar.errors import UserError, writing
from tessellar.evaluation.npz import write_arrays
from tessellar.evaluation.record import write_record
from tessellar.sampling.output import SampleFolder, save_png
from tessellar.tensor_files import write_safetensors
from tessellar.training.continuing import keep_config
from tessellar.training.metrics_file import MetricsFile
from tessellar.training.runs import Run


@contextmanager
def full_disk(limit: int = 512) -> Iterator[None]:
    """No file grows beyond `limit` bytes here; Python ignores the signal that comes with it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def metrics(path: Path) -> None:
    MetricsFile(path).log_metrics({f"name_{n}": float(n) for n in range(200)}, 1)


def facts(path: Path) -> None:
    Run(path.parent.name, path.parent.parent).write(path.name, {"text": "x" * 5000})


def config(path: Path) -> None:
    keep_config(path.parent, "x: 1\n" * 2000, "python train.py")


def pictures(path: Path) -> None:
    save_png(torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8), path)


def pixels(path: Path) -> None:
    SampleFolder(path.parent, [0] * 100, (32, 32), png=False, npz=True, grid=False)


def staged(path: Path) -> None:
    with staged_folder(path, "marker") as stage, open(stage / "tokens", "wb") as file:
        file.write(b"x" * 5000)


WRITERS: dict[str, Callable[[Path], None]] = {
    "metrics.csv": metrics,
    "run.json": facts,
    "config.yaml": config,
    "picture.png": pictures,
    "pixels.npy": pixels,
    "weights.safetensors": lambda path: write_safetensors({"w": torch.zeros(5000)}, path),
    "record.json": lambda path: write_record({"text": "x" * 5000}, path),  # type: ignore[arg-type]
    "statistics.npz": lambda path: write_arrays(
        path, {"mu": np.random.default_rng(0).normal(size=5000)}
    ),
    "export": staged,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    with full_disk():
        code = run(lambda: WRITERS[name](folder / name))
    said = capsys.readouterr().err
    assert code == 2 and said.count("\n") == 1, said
    assert f"{folder / name} could not be written: " in said and "File too large" in said
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["run.json", "config.yaml", "weights.safetensors", "record.json", "statistics.npz"]
)
def test_what_was_there_before_a_failed_write_is_still_there(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / name).write_text("as it was")
    with full_disk(), pytest.raises(UserError, match="could not be written"):
        WRITERS[name](folder / name)
    assert [path.name for path in folder.iterdir()] == [name] and (
        folder / name
    ).read_text() == "as it was"


def test_errors_that_are_no_failed_writes_keep_their_own_words(tmp_path: Path) -> None:
    for error in (
        RuntimeError("of the network"),
        OSError("image file is truncated"),
        FileNotFoundError(2, "no", "a.png"),
    ):
        with pytest.raises(type(error), match="network|truncated|a.png"), writing(tmp_path / "x"):
            raise error
    with (
        pytest.raises(UserError, match="x could not be written: No space left on device"),
        writing(tmp_path / "x"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_of_two_commands_into_one_output_one_wins_and_the_other_is_refused(tmp_path: Path) -> None:
    target, both = tmp_path / "samples", threading.Barrier(2)
    ended = []

    def command(content: str) -> None:
        try:
            with staged_folder(target, "marker.json") as stage:
                for name in ("marker.json", "a", "b"):
                    (stage / name).write_text(json.dumps(content))
                both.wait()
            ended.append(content)
        except UserError as error:
            ended.append(str(error))

    threads = [threading.Thread(target=command, args=(content,)) for content in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [line for line in ended if "exists; choose another --out" in line]
    assert len(refused) == 1 and len(ended) == 2
    winner = next(line for line in ended if line not in refused)
    assert {json.loads(path.read_text()) for path in target.iterdir()} == {winner}
    assert [path.name for path in tmp_path.iterdir()] == ["samples"]
