"""What is held out for validation: the share of each class, never a class's only image; balanced epochs."""

import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tessellar.cli.train import parse
from tessellar.data import ImageFolderData, ShapesData
from tessellar.data.dataset import hold_out
from tessellar.data.sampler import ResumableSampler, balanced_order
from tessellar.errors import UserError


def pictures(root: Path, **counts: int) -> str:
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (10 * i % 255, 0, 0)).save(root / name / f"{i}.png")
    return str(root)


@pytest.mark.parametrize("share", [0.01, 0.05, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("sizes", [[20, 1], [1, 1, 5], [40, 30, 30], [7], [2, 2, 2, 2]])
def test_each_class_is_held_out_alike_and_keeps_one(sizes: list[int], share: float) -> None:
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    names = [f"{label}/{place}" for place, label in enumerate(labels)]
    train, val = hold_out(names, share, labels)
    assert sorted(train + val) == list(range(len(names))) and val
    kept = Counter(labels[place] for place in train)
    assert all(kept[label] >= 1 for label in range(len(sizes)))
    most = sum(size - 1 for size in sizes)
    assert len(val) == min(max(1, -(-round(share * 1e6) * len(names) // 10**6)), most)
    if share in (0.3, 0.5) and sizes == [40, 30, 30]:
        taken = Counter(labels[place] for place in val)
        assert taken == {0: 40 * share, 1: 30 * share, 2: 30 * share}
    assert hold_out(names, share, labels) == (train, val)


def test_where_every_class_has_one_image_one_class_goes_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = ImageFolderData(pictures(tmp_path / "d", a=1, b=1, c=1), 8, batch_size=1)
    with caplog.at_level(logging.WARNING, "tessellar"):
        data.check_files()
    assert len(data.val_dataset()) == 1
    assert "1 of 3 classes have no training image: " in caplog.text


def test_uneven_sets_are_said_and_may_be_balanced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = pictures(tmp_path / "d", a=57, b=4)
    with caplog.at_level(logging.WARNING, "tessellar"):
        ImageFolderData(root, 8, batch_size=4).check_files()
        assert (
            "is uneven: " in caplog.text and "data.balance draws all classes equally" in caplog.text
        )
        caplog.clear()
        balanced = ImageFolderData(root, 8, batch_size=4, balance=True)
        balanced.check_files()
        assert "uneven" not in caplog.text
    labels = [label for batch in balanced.train_dataloader() for label in batch["label"].tolist()]
    counts = Counter(labels)
    assert abs(counts[0] - counts[1]) <= 4 and len(labels) >= 52


def test_a_balanced_epoch_shows_every_rare_sample_before_any_twice() -> None:
    labels = np.array([0] * 9 + [1] * 2 + [3])
    order = balanced_order(labels, np.random.default_rng(0))
    assert len(order) == 12 and Counter(labels[order].tolist()) == {0: 4, 1: 4, 3: 4}
    assert Counter(order.tolist())[9] == Counter(order.tolist())[10] == 2
    first, second = (ResumableSampler(labels, seed=1, balance=labels) for _ in range(2))
    assert list(first) == list(second)
    whole = list(second)
    second.seek(0, 5)
    assert list(second) == whole[5:]


def test_a_share_of_nothing_says_the_way_out() -> None:
    with pytest.raises(UserError, match="name a validation set .*limit_val_batches 0"):
        hold_out(["a", "b", "c"], 0.0)


def test_the_order_follows_the_runs_seed_and_not_which_shapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    demo = Path(__file__).parents[2] / "configs/demo/tokenizer.yaml"

    def first_batch(*options: str) -> list[int]:
        small = ["--data.length", "64", "--data.val_length", "8", "--data.batch_size", "16"]
        words = ["--config", str(demo), "--name", "s", *small, *options]
        return next(iter(parse(words).datamodule.train_dataloader()))["index"].tolist()

    one = first_batch("--seed_everything", "1")
    assert one == first_batch("--seed_everything", "1") != first_batch("--seed_everything", "2")
    ours, theirs = ShapesData(16, 8, 8), ShapesData(16, 8, 8)
    theirs.follow(5)
    assert ours.train_dataset().fingerprint() == theirs.train_dataset().fingerprint()
    fixed = ImageFolderData("d", 8, seed=3)
    fixed.follow(7)
    free = ImageFolderData("d", 8)
    free.follow(7)
    assert (fixed.seed, free.seed) == (3, 7)
