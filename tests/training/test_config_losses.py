"""The comparison of losses to the bit: a run again is equal, and what differs is said."""

import copy
from pathlib import Path

import numpy as np
import pytest

from benchmarks.config_losses import compare, data_options, differences, measure
from tests.data.conftest import idx_bytes


def test_a_config_measured_again_is_equal_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = data_options("demo", tmp_path, tmp_path)
    first = measure("demo/tokenizer", options, weights=tmp_path, start=None)
    again = measure("demo/tokenizer", options, weights=None, start=tmp_path)
    assert len(first["losses"]) == 3 and len(set(first["losses"])) == 3
    assert differences(again, first) == []


def test_what_differs_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digests = {"named": "a", "values": "b"}
    config = {"losses": ["0x1.0p+0", "0x1.8p+0"], "initial": digests, "after": digests}
    before = copy.deepcopy(config)
    config["initial"] = {"named": "c", "values": "b"}
    config["losses"] = ["0x1.0p+0", "0x1.0p+1"]
    said = differences(config, before)
    assert said == ["equal weights under other names (initial)", "update 2: 2.0 for 1.5"]

    facts = {"torch": "2", "processor": "p"}
    file = tmp_path / "before.json"
    file.write_text(
        '{"torch": "1", "processor": "p", "configs": {"demo/x": '
        + str(before).replace("'", '"')
        + "}}"
    )
    assert not compare({**facts, "configs": {"demo/x": config}}, file)
    printed = capsys.readouterr().out
    assert (
        "other torch: 2 for 1" in printed
        and "demo/x: equal weights under other names (initial); update 2" in printed
    )


def test_a_tokenizer_over_another_reads_the_random_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TokenBridge's small run, whose tokenizer names an export in an argument, makes its first updates."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    for part, count in (("train", 30), ("t10k", 10)):
        images = idx_bytes(draw.integers(0, 256, (count, 28, 28)))
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(images)
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(np.arange(count) % 10))
    options = data_options("fashion_mnist", tmp_path, tmp_path)
    found = measure("fashion_mnist/tokenbridge", options, weights=None, start=None)
    losses = [float.fromhex(value) for value in found["losses"]]
    assert len(set(losses)) == 3 and 2 < min(losses) and max(losses) < 8
