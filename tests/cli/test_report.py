"""`tessellar report`: one file of one run or several, with everything in it and nothing from outside."""

import json
import re
import shlex
from html import unescape
from pathlib import Path

import pytest
import torch

from tessellar.cli.main import dispatch
from tessellar.cli.report_page import ticks
from tessellar.errors import UserError
from tessellar.sampling.output import save_png


def run_folder(root: Path, name: str, width: int, pictures: int = 9) -> Path:
    """What training leaves, written by hand."""
    folder = root / name
    (folder / "pictures").mkdir(parents=True)
    (folder / "evaluations").mkdir()
    (folder / "config.yaml").write_text(
        f"name: {name}\nmodel:\n  init_args: {{width: {width}, depth: 2}}\n"
    )
    facts = {
        "updates": 900,
        "precision": "32-true",
        "data": {"name": "d", "class_names": ["circle", "<b>bold</b>"]},
        "parts": [
            {"command": f"python train.py --name {name}"},
            {"command": "python train.py --resume auto"},
        ],
    }
    (folder / "run.json").write_text(json.dumps(facts))
    rows = ["step,train/loss,val/loss,codebook/usage"]
    rows += [
        f"{100 * k},{3 / k:.4f},{2 / k if k % 3 == 0 else ''},{0.1 * k:.2f}" for k in range(1, 10)
    ]
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    (folder / "evaluations" / "00000900.json").write_text(
        json.dumps({"metrics": {"FD(net)": 1.25}})
    )
    for k in range(1, pictures + 1):
        save_png(
            torch.full((3, 8, 8), 20 * k, dtype=torch.uint8),
            folder / "pictures" / f"samples_{100 * k:07d}.png",
        )
    save_png(torch.zeros(3, 8, 8, dtype=torch.uint8), folder / "pictures" / "neighbours.png")
    return folder


def test_one_run_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = run_folder(tmp_path / "runs", "a", 16)
    assert not dispatch("report", ["runs/a"])
    html = (folder / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", html) and "<script" not in html
    assert html.count("<svg") == 3 and html.index("val/loss</text>") < html.index(
        "codebook/usage</text>"
    )
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", html)
    assert (
        captions[0] == "update 100"
        and captions[5] == "update 900"
        and captions[6:] == ["neighbours"]
    )
    assert "FD(net) at 900" in html and "1.25" in html
    assert "python train.py --name a\npython train.py --resume auto" in html and "width: 16" in html
    assert "<b>bold</b>" not in html and "&lt;b&gt;bold&lt;/b&gt;" in html


def test_several_runs_stand_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, width in (("a", 16), ("b", 32)):
        run_folder(tmp_path / "runs", name, width, pictures=2)
    assert not dispatch("report", ["runs/a", "runs/b"])
    html = Path("outputs/report.html").read_text()
    assert html.count("<svg") == 3 and html.count('class="key"') == 2
    differs = html[html.index("What differs") : html.index("Curves</h2>")]
    assert (
        "model.width" in differs and "<td>16</td><td>32</td>" in differs and "depth" not in differs
    )
    assert "samples of a" in html and "samples of b" in html


def test_options_of_a_class_that_one_run_lacks_are_no_differences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, data in (
        ("a", "{class_path: tessellar.data.ImageFolderData, init_args: {root: x, crop: adm}}"),
        ("b", "{class_path: tessellar.data.CachedTokensData, init_args: {root: y, images: null}}"),
    ):
        folder = run_folder(tmp_path / "runs", name, 16)
        with (folder / "config.yaml").open("a") as file:
            file.write(f"data: {data}\nema: {len(data)}\n")
    assert not dispatch("report", ["runs/a", "runs/b"])
    html = Path("outputs/report.html").read_text()
    differs = html[html.index("What differs") : html.index("Curves</h2>")]
    rows = re.findall(r"<tr><th>([\w.]+)</th>", differs)
    assert rows == ["data.class_path", "data.root", "ema"]


def test_a_long_command_is_cut_between_options(tmp_path: Path) -> None:
    """A browser would break lines inside of option names; what is shown can be pasted."""
    folder = run_folder(tmp_path, "a", 16)
    options = " ".join(f"--data.option_{k} 'a value'" for k in range(12))
    command = f"python train.py --name a {options}"
    (folder / "run.json").write_text(json.dumps({"command": command}))
    assert not dispatch("report", [str(folder)])
    shown = re.search(r"<pre>(python.*?)</pre>", (folder / "report.html").read_text(), re.S)
    assert shown is not None
    lines = unescape(shown[1]).splitlines()
    assert len(lines) > 3 and max(len(line) for line in lines) < 120
    assert all(line.startswith("    --") for line in lines[1:])
    assert shlex.split("\n".join(lines).replace("\\\n", "")) == shlex.split(command)


def test_a_run_that_has_hardly_begun_has_a_report(tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / "config.yaml").write_text("model: {}\n")
    (folder / "metrics.csv").write_text("not,a\nmetrics file\n")
    dispatch("report", [str(folder), "--out", str(tmp_path / "r.html")])
    assert "Configs" in (tmp_path / "r.html").read_text()
    with pytest.raises(UserError, match="is not the folder of a run: it has no config.yaml"):
        dispatch("report", [str(tmp_path)])


@pytest.mark.parametrize(("low", "high"), [(0, 1), (3, 3), (0, 0), (-2.5, 1000), (0.001, 0.0011)])
def test_ticks_are_round_and_hold_the_range(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low and found[-1] >= high and 3 <= len(found) <= 8


def test_its_help_names_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert not dispatch("report", ["--help"])
    printed = capsys.readouterr().out
    assert "--out" in printed and "runs/demo-generator" in printed
