"""A cache under way: interrupted and continued, on several processes, of other settings: the same bytes come out."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tessellar import distributed
from tessellar.data.sets.shapes import Shapes
from tessellar.data.token_cache import blocks
from tessellar.data.token_cache.writing import encode_dataset
from tessellar.errors import UserError
from tessellar.protocol.layout import Categorical, grid_layout
from tessellar.protocol.tokenizer import Tokenizer, TokenizerOutput


class Means(Tokenizer):
    """Four tokens an image; after `budget` batches it is interrupted."""

    def __init__(self, budget: int = 1000) -> None:
        super().__init__()
        self.layout = grid_layout(2, 2, Categorical(16))
        self.image_size = (8, 8)
        self.gain = nn.Parameter(torch.ones(()))
        self.left = budget
        self.batches = 0

    @property
    def config(self) -> dict:
        return {"class_path": "Means", "init_args": {}}

    def encode(self, images: Tensor) -> Tensor:
        if self.batches == self.left:
            raise KeyboardInterrupt
        self.batches += 1
        means = nn.functional.adaptive_avg_pool2d((images + 1) / 2, 2).mean(1) * self.gain
        return (means.flatten(1) * 15).long()

    def decode(self, tokens: Tensor) -> Tensor:
        return tokens.float()

    def forward(self, images: Tensor) -> TokenizerOutput:
        return TokenizerOutput(images, self.encode(images), {})

    @property
    def last_layer(self) -> nn.Parameter:
        return self.gain


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "SIZE", 5)


def write(folder: Path, tokenizer: Tokenizer, length: int = 23) -> None:
    dataset = Shapes(8, length, seed=1)
    encode_dataset(tokenizer, dataset, folder, name="shapes", batch_size=2)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    write(tmp_path / "whole", Means())
    return files(tmp_path / "whole")


def test_an_interrupted_cache_goes_on_and_is_the_same(tmp_path: Path, whole, caplog) -> None:
    with caplog.at_level("INFO"):
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "cache", Means(budget=8))
        assert not (tmp_path / "cache").exists()
        rest = Means()
        write(tmp_path / "cache", rest)
    assert files(tmp_path / "cache") == whole
    assert "2 of 4 blocks are encoded" in caplog.text and "the same command goes on" in caplog.text
    assert rest.batches == 12 - 2 * 3  # blocks of 6 images, in batches of 2
    assert not list(tmp_path.glob(".*"))


def test_an_interruption_before_the_first_block_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cache", Means(budget=1))
    assert not list(tmp_path.iterdir())


def test_blocks_of_other_data_are_not_taken(tmp_path: Path, whole) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cache", Means(budget=8), length=22)
    fresh = Means()
    write(tmp_path / "cache", fresh)
    assert files(tmp_path / "cache") == whole and fresh.batches == 12


def test_a_damaged_block_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cache", Means(budget=8))
    (tmp_path / ".cache.unfinished" / "block_000001.npz").write_bytes(b"PK damaged")
    with pytest.raises(UserError, match="block_000001.npz is damaged"):
        write(tmp_path / "cache", Means())


def test_several_processes_write_the_same_bytes(tmp_path: Path, whole, monkeypatch) -> None:
    """Two ranks as threads that meet where processes would."""
    own = threading.local()
    meeting = threading.Barrier(2, timeout=60)
    said: list[object] = []

    def barrier() -> None:
        meeting.wait()

    def broadcast(value: object) -> object:
        if own.rank == 0:
            said.append(value)
        meeting.wait()
        return said[-1]

    monkeypatch.setattr(distributed, "rank", lambda: own.rank)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "barrier", barrier)
    monkeypatch.setattr(distributed, "broadcast", broadcast)
    made = [Means(), Means()]

    def rank(number: int) -> Callable[[], None]:
        def work() -> None:
            own.rank = number
            write(tmp_path / "cache", made[number])

        return work

    threads = [threading.Thread(target=rank(number)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert files(tmp_path / "cache") == whole
    assert [tokenizer.batches for tokenizer in made] == [6, 6]
