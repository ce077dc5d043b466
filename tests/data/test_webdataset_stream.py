import signal
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch

from tessellar.data.framing import Framing
from tessellar.data.tars.webdataset_stream import (
    WebDatasetStream,
    WebDatasetStreamData,
    stream_samples,
)
from tessellar.errors import UserError
from tessellar.images import to_uint8

CLASSES = ("cat", "dog", "owl")


def stream(*urls, **options) -> WebDatasetStream:
    return WebDatasetStream([str(url) for url in urls], CLASSES, Framing(12), **options)


def colours(samples) -> list[int]:
    return [int(to_uint8(sample["image"])[0, 0, 0]) for sample in samples]


def test_samples_hold_what_local_tars_hold(shards: Path):
    samples = list(stream(shards / "train-0000.tar", shards / "val.tar"))
    assert colours(samples) == [*range(20), *range(30, 36)]
    assert samples[4] | {"image": 0} == {"image": 0, "index": 4, "label": 1, "caption": "picture 4"}


def test_a_signal_to_the_whole_group_does_not_break_a_stream(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program that reads it is started by this process, and gets what a terminal or a scheduler sends to all."""
    program = tmp_path / "curl"
    program.write_text(
        f"#!{sys.executable} -SE\nimport os, sys\nos.kill(os.getpid(), {signal.SIGTERM:d})\n"
        f"sys.stdout.buffer.write(open('{shards / 'val.tar'}', 'rb').read())\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert colours(stream("http://nowhere.invalid/val.tar")) == list(range(30, 36))
    handlers = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert signal.SIGTERM not in handlers and signal.SIGINT not in handlers


def test_an_epoch_is_the_declared_number_of_samples_in_another_order_each_time(shards: Path):
    data = stream(
        shards / "train-0000.tar", shards / "train-0001.tar", length=48, batch_size=4, buffer=10
    )
    first, again = colours(data), colours(data)
    assert len(first) == 48 and first == again and set(first) <= set(range(30))
    data.epoch = 1
    assert colours(data) != first


def test_loaders_have_the_declared_length_over_ranks_and_workers(shards: Path):
    def batches(num_workers: int) -> list[torch.Tensor]:
        data = WebDatasetStreamData(
            f"{shards}/train-{{0000,0001}}.tar",
            f"{shards}/val.tar",
            size=12,
            epoch_length=22,
            num_classes=3,
            batch_size=4,
            num_workers=num_workers,
            buffer=8,
            flip=False,
        )
        loader = data.train_dataloader()
        one, two = [batch["image"] for batch in loader], [batch["image"] for batch in loader]
        assert len(one) == len(two) == 5 and {len(batch) for batch in one} == {4}
        assert not all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        val = [int(i) for batch in data.val_dataloader() for i in batch["index"]]
        assert sorted(val) == list(range(6))
        return one

    alone, shared = batches(0), batches(2)
    assert torch.equal(batches(0)[0], alone[0]) and torch.equal(batches(2)[0], shared[0])


def test_ranks_share_validation_exactly(shards: Path):
    parts = [
        colours(stream(shards / "train-0000.tar", rank=rank, world_size=3)) for rank in range(3)
    ]
    assert Counter(sum(parts, [])) == Counter(range(20))


def test_corrupt_samples_are_skipped_and_counted_and_too_many_stop(
    tmp_path: Path, make_tar, make_samples
):
    members = make_samples(0, 12)
    members["000003.png"], members["000005.json"] = b"", b"\xff"
    path = make_tar(tmp_path / "t.tar", members)
    data = stream(path, max_corrupt=0.5)
    assert colours(data) == [0, 1, 2, 4, 6, 7, 8, 9, 10, 11] and (data.corrupt, data.met) == (2, 12)
    with pytest.raises(UserError, match="1 of 4 samples .* 000003.png|000003"):
        list(stream(path, max_corrupt=0))


def test_a_class_out_of_range_is_a_mistake(tmp_path: Path, make_tar, make_png):
    path = make_tar(tmp_path / "t.tar", {"x.png": make_png(0), "x.cls": b"3"})
    with pytest.raises(UserError, match="t.tar:x has class 3; it must be below 3"):
        list(stream(path, max_corrupt=0.5))


@pytest.mark.parametrize("name, why", [("../x.png", "leads out"), ("x.pth", "is a pickle")])
def test_members_that_local_tars_refuse_are_refused(tmp_path: Path, make_tar, name: str, why: str):
    with pytest.raises(UserError, match=f"t.tar: member '{name}' {why}"):
        list(stream_samples(str(make_tar(tmp_path / "t.tar", {name: b"\x80\x04."}))))


def test_streams_that_break_off_are_named(tmp_path: Path, shards: Path):
    path = shards / "val.tar"
    path.write_bytes(path.read_bytes()[:1700])
    for url in (str(path), str(tmp_path / "nowhere.tar")):
        with pytest.raises(UserError, match="cannot be read"):
            list(stream_samples(url))


@pytest.mark.parametrize("scheme", ["pipe:", "PIPE:", " pipe:", "htgs://", "nothing://"])
def test_an_address_that_runs_a_command_is_refused(tmp_path: Path, scheme: str):
    with pytest.raises(
        UserError, match="is not opened: it must be a path or begin with file, http"
    ):
        list(stream_samples(f"{scheme}touch {tmp_path / 'ran'}"))
    assert not (tmp_path / "ran").exists()


def test_a_resumed_run_draws_other_samples(shards: Path):
    class Resumed(WebDatasetStreamData):
        step = 0

        @property
        def trainer(self):
            facts = {
                "global_rank": 0,
                "world_size": 1,
                "current_epoch": 1,
                "global_step": self.step,
            }
            return type("Trainer", (), facts)

        @trainer.setter
        def trainer(self, value) -> None: ...

    def images(step: int) -> torch.Tensor:
        data = Resumed(
            str(shards / "train-0000.tar"), "unused", 12, 16, 3, batch_size=4, buffer=8, flip=False
        )
        data.step = step
        return torch.cat([batch["image"] for batch in data.train_dataloader()])

    assert torch.equal(images(5), images(5)) and not torch.equal(images(5), images(7))


def test_a_compressed_stream_is_read(tmp_path: Path, shards: Path):
    with (
        tarfile.open(tmp_path / "t.tar.gz", "w:gz") as out,
        tarfile.open(shards / "val.tar") as tar,
    ):
        for member in tar:
            out.addfile(member, tar.extractfile(member))
    assert colours(stream(tmp_path / "t.tar.gz")) == list(range(30, 36))


def test_a_stream_has_no_images_by_index_and_says_so(shards: Path):
    data = WebDatasetStreamData(
        str(shards / "val.tar"), str(shards / "val.tar"), 12, 8, batch_size=4
    )
    with pytest.raises(UserError, match="is a stream, without images by index"):
        data.val_dataset()
    with pytest.raises(UserError, match="an epoch of 8 is too short for a batch of 9"):
        WebDatasetStreamData("a", "b", 12, 8, batch_size=9).train_dataloader()
    assert data.fingerprint() == data.fingerprint() and data.num_classes == 1
