"""Full and read-only disks: one line that names the file, and nothing half-written.

A full disk is shown by a limit on the size of files, and by a tmpfs of a few kilobytes where this process may mount
one; a read-only one by a mount, else by permissions.
"""

import ctypes
import errno
import io
import json
import os
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from benchmarks.attacked import tells_of_end
from tessellar.callbacks.grids import log_image
from tessellar.checkpoints.export import export_tokenizer
from tessellar.checkpoints.staging import staged_folder
from tessellar.cli import train
from tessellar.cli.errors import run
from tessellar.data.sets.shapes import Shapes
from tessellar.data.token_cache.writing import encode_dataset
from tessellar.errors import UserError, writing
from tessellar.evaluation.pictures import metric_curves
from tessellar.evaluation.record import write_record
from tessellar.npz import write_arrays
from tessellar.sampling.output import SampleFolder, save_png
from tessellar.tensor_files import write_safetensors
from tessellar.text.encoders import FeatureCache
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ
from tessellar.training.continuing import keep_config
from tessellar.training.metrics_file import MetricsFile
from tessellar.training.run_log import RunLog, logging_into
from tessellar.training.runs import LateTensorBoard, Run


@contextmanager
def full_disk(limit: int = 512) -> Iterator[None]:
    """No file grows beyond `limit` bytes here; Python ignores the signal that comes with it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


NEWNS, NEWUSER = 0x00020000, 0x10000000
RDONLY, REMOUNT, BIND, REC, PRIVATE = 1, 32, 4096, 16384, 1 << 18


def mounted(folder: Path, kind: str) -> bool:
    """Whether `folder` could be made a read-only mount, or a tmpfs of 16 kilobytes, for this process alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(NEWNS) != 0:
        if libc.unshare(NEWNS | NEWUSER) != 0:
            return False
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    target = os.fsencode(folder)
    libc.mount(b"none", b"/", None, REC | PRIVATE, None)
    if kind == "small":
        return libc.mount(b"none", target, b"tmpfs", 0, b"size=16k") == 0
    bound = libc.mount(target, target, None, BIND, None) == 0
    return bound and libc.mount(None, target, None, REMOUNT | BIND | RDONLY, None) == 0


def on_a_disk(
    folder: Path, kind: str, action: Callable[[], int | None], change_to: bool = False
) -> tuple[int, str]:
    """The exit code and stderr of a command in a process that sees `folder` as a disk of that kind."""
    folder.mkdir(exist_ok=True)
    reading, ending = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.dup2(ending, 2)
        sys.stderr = os.fdopen(ending, "w", buffering=1)
        code = 99
        with suppress(BaseException):
            if not mounted(folder, kind):  # then a user's permissions and a quota do the same
                folder.chmod(0o555 if kind == "read-only" else 0o755)
                if kind == "small":
                    resource.setrlimit(resource.RLIMIT_FSIZE, (32768, 32768))
            if change_to:
                os.chdir(folder)
            code = run(action)
        sys.stderr.flush()
        os._exit(code)
    os.close(ending)
    with os.fdopen(reading) as file:
        said = file.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    folder.chmod(0o755)
    return code, said


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


def samples(path: Path) -> None:
    folder = SampleFolder(path.parent, [0] * 8, (16, 16), png=False, npz=True, grid=False)
    folder.finish()


def log_of_a_run(path: Path) -> None:
    """What was written before a disk was full stays, as in any log."""
    log = RunLog(path.parent)
    with logging_into(log):
        log.open()
        try:
            log.say("x" * 5000)
        finally:
            path.unlink()


def curves(path: Path) -> None:
    rows = path.parent.parent / "metrics.csv"
    rows.write_text("step,loss\n1,2\n2,1\n")
    metric_curves(rows, path)


def tokenizer() -> ViTVQ:
    return ViTVQ(VectorQuantizer(16, 4), 16, 4, 16, 1, 1, 2)


def features(path: Path) -> None:
    def encoder(texts: list[str], device: torch.device) -> list[torch.Tensor]:
        return [torch.zeros(100, 64) for _ in texts]

    encoder.source = "x"  # type: ignore[attr-defined]
    encoder.length = 100  # type: ignore[attr-defined]
    cache = FeatureCache(encoder, str(path.parent))  # type: ignore[arg-type]
    cache.path = lambda text: path  # type: ignore[method-assign]
    cache(["a text"], torch.device("cpu"))


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
    "folder": staged,
    "export": lambda path: export_tokenizer(tokenizer(), path) and None,
    "cache": lambda path: (
        encode_dataset(tokenizer(), Shapes(16, 200), path, name="shapes") and None
    ),
    "samples.npz": samples,
    "curves.png": curves,
    "log.txt": log_of_a_run,
    "features.safetensors": features,
    "interrupted": lambda path: Run(path.parent.name, path.parent.parent).interrupted("x" * 5000),
}


#: Where the memory map of the pixels shall fit, and the npz that is made of it not.
LIMITS = {"samples.npz": 6400}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    with full_disk(LIMITS.get(name, 512)):
        code = run(lambda: WRITERS[name](folder / name))
    said = capsys.readouterr().err
    assert code == 2 and said.count("\n") == 1, said
    assert "could not be written: " in said and "File too large" in said
    assert name in said and str(folder) in said
    left = {path.name for path in folder.iterdir()}
    assert left <= ({"pixels.npy"} if name == "samples.npz" else set())


@pytest.mark.parametrize("name", WRITERS)
def test_a_read_only_disk_is_one_line_and_changes_nothing(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    code, said = on_a_disk(folder, "read-only", lambda: WRITERS[name](folder / name))
    assert code == 2 and said.count("\n") == 1, said
    assert str(folder) in said and ("Read-only file system" in said or "Permission" in said), said
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["pixels.npy", "cache", "export"])
def test_a_disk_of_a_few_kilobytes_is_one_line_and_is_empty_again(
    tmp_path: Path, name: str
) -> None:
    """Space for the pixels is reserved: a memory map on a full tmpfs ends in SIGBUS otherwise."""
    folder = tmp_path / "x"
    folder.mkdir()

    def action() -> None:
        try:
            WRITERS[name](folder / name)
        finally:
            assert list(folder.iterdir()) == []

    code, said = on_a_disk(folder, "small", action)
    assert code == 2 and said.count("\n") == 1, said
    assert "could not be written: " in said and str(folder) in said


def test_a_run_on_a_small_disk_is_one_line_and_can_go_on(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))

    def action() -> int:
        code = train.main(["--config", str(tmp_path / "run.yaml"), "--name", "x"])
        return code + 50  # it ended well

    code, said = on_a_disk(tmp_path / "disk", "small", action, change_to=True)
    errors = [line for line in said.splitlines() if tells_of_end(line)]
    assert code == 2 and len(errors) == 1, said
    assert "runs/x/" in errors[0] and "could not be written" in errors[0]


def test_a_run_that_cannot_write_its_config_leaves_no_folder(
    folder: Path, config: dict[str, Any]
) -> None:
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    said = io.StringIO()
    with full_disk(), redirect_stderr(said):
        code = run(lambda: train.main(["--config", "run.yaml", "--name", "x"]))
    line = "error: runs/x/config.yaml could not be written: File too large"
    assert (code, said.getvalue().splitlines()[-1]) == (2, line)
    assert not Path("runs").exists()


def test_the_last_row_of_metrics_stays_whole_on_a_full_disk(tmp_path: Path) -> None:
    table = MetricsFile(tmp_path / "metrics.csv")
    for step in range(1, 4):
        table.log_metrics({"a": 1.0, "b": 2.0}, step)
    table.log_metrics({"c": 3.0}, 4)
    whole = table.path.read_bytes()
    with full_disk(len(whole) + 3), pytest.raises(UserError, match="metrics.csv could not be"):
        table.log_metrics({"a": 1.234567}, 4)
    assert table.path.read_bytes() == whole
    table.log_metrics({"a": 1.234567}, 4)
    assert table.path.read_text().splitlines()[-1] == "4,1.234567,,3"


def test_tensorboard_on_a_full_disk_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Its thread meets the full disk first."""
    folder = Run("x", tmp_path)
    folder.create()
    folder.begin("", {"command": "", "commit": ""})
    logger = LateTensorBoard(folder, name="", version="tensorboard")
    logger.log_metrics({"a": 0.0}, 0)
    log_image(logger, "a picture", torch.zeros(3, 2, 2, dtype=torch.uint8), 0)
    logger.experiment.flush()
    (events,) = (folder.folder / "tensorboard").glob("events*")
    assert b"a picture" in events.read_bytes()

    def action() -> None:
        for step in range(200):
            logger.log_metrics({f"loss_{step}": 1.0}, step)
            logger.experiment.flush()

    def through_the_logger() -> None:
        try:
            action()
        except OSError:
            logger.log_metrics({"a": 0.0}, 1)

    with full_disk(1000):
        code = run(through_the_logger)
        logger.finalize("failed")
    said = capsys.readouterr().err
    assert code == 2 and said.count("\n") == 1, said
    assert "tensorboard could not be written: File too large" in said


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


def test_a_pipe_or_a_device_is_no_output_and_stays_what_it_is(tmp_path: Path) -> None:
    """A file that is moved into the place of a device would be the end of it: `--out /dev/null`, by root."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    run_of_one = tmp_path / "metrics.csv"
    run_of_one.write_text("step,a\n1,2\n")
    writers: list[Callable[[], Any]] = [
        lambda: write_record({"metrics": {}}, pipe),  # type: ignore[typeddict-item]
        lambda: write_arrays(pipe, {"a": np.zeros(1)}),
        lambda: write_safetensors({"a": torch.zeros(1)}, pipe),
        lambda: save_png(torch.zeros(3, 2, 2, dtype=torch.uint8), pipe),
        lambda: metric_curves(run_of_one, pipe),
    ]
    for write in writers:
        with pytest.raises(UserError, match="pipe is a pipe or a device, not a file"):
            write()
        assert pipe.is_fifo() and sorted(tmp_path.iterdir()) == [run_of_one, pipe]
