"""`benchmarks/gpu.sh` at toy sizes on this machine: every part runs, and a part that fails leaves the others alone."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]
FILE = ROOT / "benchmarks" / "gpu.py"


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GPU = script()
QUICK = (
    "train llamagen_b",
    "sample llamagen_b, 1",
    "sample sjd, 1",
    "sample har_b, 64",
    "fid engine",
)
IN_A_PROCESS = (
    "nccl",
    "captured step",
)  # process groups, compilers: in the test of the whole script
PARTS = []
for part in GPU.PARTS:
    if part in QUICK:
        PARTS.append(part)
    elif not part.startswith(IN_A_PROCESS):
        PARTS.append(pytest.param(part, marks=pytest.mark.long))


@pytest.mark.parametrize("name", PARTS)
def test_every_part_runs(name: str) -> None:
    torch.manual_seed(0)
    found = GPU.PARTS[name](GPU.Size(tiny=True))
    assert found.get("agrees", True) is True
    rate = found.get("images_per_second", found.get("features_per_second", 1.0))
    assert rate > 0 and json.dumps(found)


def test_time_that_is_over_and_parts_that_fail_are_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    answers = iter(["FOUND " + json.dumps({"images_per_second": 2.0}), ""])

    def run(command: list[str], timeout: float, **_: object) -> subprocess.CompletedProcess:
        if command[command.index("--part") + 1].endswith("l"):
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, 1, next(answers), "Traceback\nRuntimeError: no")

    fake = SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(GPU, "subprocess", fake)
    parts = {"a": None, "b": None, "c l": None}
    monkeypatch.setattr(GPU, "PARTS", parts)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path), "--tiny"])
    assert GPU.main() == 0
    told = json.loads((tmp_path / "gpu.json").read_text())
    assert told["parts"]["a"] == {"images_per_second": 2.0}
    assert told["parts"]["b"] == {"failed": "RuntimeError: no"}
    assert "took longer than" in told["parts"]["c l"]["failed"]
    assert "| a | 2 |" in (tmp_path / "gpu.md").read_text()
    assert "failed: b: RuntimeError: no" in capsys.readouterr().out


@pytest.mark.long
def test_it_needs_none_of_the_packages_that_training_needs() -> None:
    """In a process that finds none of them."""
    lines = "; ".join(
        [
            "import sys, runpy",
            f"sys.argv = [{str(FILE)!r}, '--part', 'train var_d16', '--tiny', '--pretend']",
            "code = 0",
            "found = runpy.run_path(sys.argv[0], run_name='gpu')",
            "found['run_part']('train var_d16', True, True)",
            "loaded = [n for n in found['OPTIONAL'] if n in sys.modules and hasattr(sys.modules[n], '__file__') "
            "and sys.modules[n].__file__]",
            "print('LOADED', loaded)",
        ]
    )
    ended = subprocess.run(
        [sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert "FOUND {" in ended.stdout, ended.stderr[-500:]
    assert "LOADED []" in ended.stdout


@pytest.mark.long
def test_the_whole_script(tmp_path: Path) -> None:
    command = [str(ROOT / "benchmarks" / "gpu.sh"), "--tiny", "--minutes", "15"]
    ended = subprocess.run(
        [*command, "--out", str(tmp_path)],
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout[-2000:]
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert set(parts) == set(GPU.PARTS)
    assert not [name for name, found in parts.items() if "failed" in found]
