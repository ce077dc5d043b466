"""How many processes load data where nobody said it."""

import multiprocessing
import os
import sys

import pytest
import torch

from tessellar.data import ImageFolderData, ShapesData
from tessellar.data.workers import ignore_interruptions, sensible_workers


@pytest.mark.parametrize(
    ("gpus", "cores", "here", "workers"),
    [(0, 64, None, 0), (1, 4, None, 4), (1, 64, None, 8), (8, 64, None, 8), (8, 32, None, 4), (8, 4, "8", 1)],
)  # fmt: skip
def test_the_number_follows_gpus_and_cores(monkeypatch, gpus, cores, here, workers) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
    if here is None:
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    assert sensible_workers() == workers
    assert ImageFolderData("nowhere", 16).num_workers == workers
    assert ImageFolderData("nowhere", 16, num_workers=3).num_workers == 3
    assert ShapesData(16).num_workers == 0


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ValueError, match="num_workers -1"):
        ImageFolderData("nowhere", 16, num_workers=-1)


def test_a_worker_whose_main_process_is_gone_leaves_without_a_traceback(
    capfd: pytest.CaptureFixture,
) -> None:
    child = os.fork()
    if child == 0:
        ignore_interruptions(0)
        for error in (ConnectionResetError(104, "x"), BrokenPipeError(), EOFError(), KeyError("y")):
            sys.excepthook(type(error), error, None)
        sys.stderr.flush()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert capfd.readouterr().err.splitlines() == ["KeyError: 'y'"]


def leave_with_a_loader_held() -> None:
    data = ShapesData(16, length=16, val_length=8, batch_size=8, num_workers=1)
    data.setup("fit")
    batches = iter(data.val_dataloader())
    next(batches)
    sys.last_value = batches  # type: ignore[assignment]


def test_a_process_that_still_holds_a_loader_ends(capfd: pytest.CaptureFixture) -> None:
    """`multiprocessing` would wait for the worker, which ignores the SIGTERM that it is sent."""
    process = multiprocessing.get_context("fork").Process(target=leave_with_a_loader_held)
    process.start()
    process.join(60)
    ended = not process.is_alive()
    process.kill()
    assert ended and process.exitcode == 0
    assert capfd.readouterr().err == ""
