"""The comparison of losses to the bit: a run again is equal, and what differs is said."""

import copy
from pathlib import Path

import pytest

from benchmarks.config_losses import compare, data_options, differences, measure


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
