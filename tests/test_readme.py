"""The README's commands run as written, only smaller."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tessellar.cli.main import dispatch

ROOT = Path(__file__).resolve().parents[1]
SMALLER = {
    "train": "--trainer.max_steps 3 --trainer.val_check_interval 3 --data.init_args.length 64 "
    "--data.init_args.val_length 16 --data.init_args.batch_size 8",
    "sample": "--per-class 2",
    "evaluate": "--count 20",
}


def commands() -> list[list[str]]:
    """The words of each command in the block that the README says is executed."""
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"<!-- executed.*?-->\s*```bash\n(.*?)```", readme, re.S)
    assert block is not None, "the README has no block to execute"
    return [
        shlex.split(line) for line in block[1].replace("\\\n", " ").splitlines() if line.strip()
    ]


def test_readme_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("configs", "demo"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for python, script, *words in commands():
        assert python == "python" and (ROOT / script).is_file()
        command = Path(script).stem
        assert not dispatch(command, [*words, *SMALLER[command].split()])
    assert len(list(Path("outputs/shapes").glob("*.png"))) == 3 * 2 + 1  # images and their grid
    metrics = json.loads(Path("outputs/shapes.json").read_text())["metrics"]
    assert set(metrics) == {"FD(shapes-test_resnet)", "accuracy"}
    assert "FD(shapes-test_resnet)" in capsys.readouterr().out


def test_readme_links_and_pictures_exist() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text())
    assert targets and not [
        t for t in targets if not t.startswith("http") and not (ROOT / t).exists()
    ]
