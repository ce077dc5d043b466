"""The root folders `tokenizers` and `models` must shadow nobody, and wheel and sdist must hold them as real files."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKS = ("tokenizers", "models")


def run(*arguments: str, cwd: Path = ROOT, path: Path | None = None) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | (
        {"PYTHONPATH": str(path)} if path else {}
    )
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def fake_site(tmp_path: Path) -> Path:
    """A folder of installed packages that holds a package of the same name as each of our root folders."""
    for name in LINKS:
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "__init__.py").write_text("origin = 'the installed one'")
    return tmp_path / "site"


@pytest.mark.parametrize("name", LINKS)
def test_an_installed_package_wins_over_our_root_folder(fake_site: Path, name: str):
    code = f"import {name}; import tessellar.tokenizers.titok as ours; print({name}.origin, ours.__name__)"
    assert run("-c", code, path=fake_site) == "the installed one tessellar.tokenizers.titok\n"
    script = fake_site.parent / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {name}; print({name}.origin)"
    )
    assert run(str(script), path=fake_site) == "the installed one\n"


@pytest.mark.parametrize("name", LINKS)
def test_the_links_are_relative_and_their_targets_are_namespace_packages(name: str):
    assert os.readlink(ROOT / "tessellar" / name) == f"../{name}"
    assert not (ROOT / name / "__init__.py").exists()


@pytest.mark.long
def test_entry_points_start_beside_transformers_and_hugging_faces_tokenizers():
    code = """
import runpy, sys
import tokenizers, transformers, lightning
assert "site-packages" in tokenizers.__file__ and tokenizers.Tokenizer
for script in ("train.py", "sample.py", "evaluate.py", "convert.py"):
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert not end.code, (script, end.code)
"""
    assert run("-c", code).count("usage:") == 4


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheel and sdist, built from a copy of the sources without network."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("tessellar", "configs", *LINKS):
        shutil.copytree(
            ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    run(
        "-c",
        "import setuptools.build_meta as b; b.build_wheel('out'); b.build_sdist('out')",
        cwd=copy,
    )
    return copy / "out"


def sources() -> set[str]:
    """Every Python file of the package, by the name under which it is imported."""
    files = (
        path.relative_to(ROOT)
        for folder in ("tessellar", *LINKS)
        for path in (ROOT / folder).rglob("*.py")
    )
    packaged = {
        (file if file.parts[0] == "tessellar" else "tessellar" / file).as_posix() for file in files
    }
    assert {
        "tessellar/errors.py",
        "tessellar/tokenizers/titok/tokenizer.py",
        "tessellar/models/xar/model.py",
    } <= packaged
    return packaged


def test_wheel_and_sdist_hold_every_module_as_a_real_file(built: Path):
    wheel, sdist = next(built.glob("*.whl")), next(built.glob("*.tar.gz"))
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"tessellar/{f.relative_to(ROOT)}" for f in (ROOT / "configs").rglob("*.yaml")}
    assert sources() | configs | {"tessellar/py.typed"} <= in_wheel
    assert {name.split("/")[0].split("-")[0] for name in in_wheel} == {"tessellar"}
    with tarfile.open(sdist) as archive:
        regular = {member.name.split("/", 1)[1] for member in archive if member.isfile()}
    assert sources() <= regular


def test_an_unpacked_wheel_works_away_from_the_checkout(built: Path, tmp_path: Path):
    zipfile.ZipFile(next(built.glob("*.whl"))).extractall(tmp_path / "site")
    code = """
import tessellar.protocol.tokenizer as ours
from tessellar.cli.catalogue import config_file, entries
print(ours.__file__, config_file("demo/tokenizer"), config_file("configs/demo/tokenizer.yaml"), len(entries("configs")))
"""
    printed = run("-c", code, cwd=tmp_path, path=tmp_path / "site").split()
    site = tmp_path / "site" / "tessellar"
    assert Path(printed[0]).is_relative_to(site) and int(printed[3]) > 60
    assert printed[1:3] == [str(site / "configs" / "demo" / "tokenizer.yaml")] * 2


FEW = (
    "--trainer.max_steps 2 --trainer.val_check_interval 2 --trainer.accelerator cpu "
    "--trainer.precision 32-true --data.length 32 --data.val_length 16 --data.batch_size 8"
).split()


@pytest.mark.long
def test_a_wheel_in_an_empty_environment_trains_and_samples_far_from_the_checkout(
    built: Path, tmp_path: Path
):
    """Installs all dependencies from the index (gigabytes); `built` is a wheel that is no link to here."""
    venv.create(tmp_path / "venv", with_pip=True)
    python, tessellar = (tmp_path / "venv" / "bin" / name for name in ("python", "tessellar"))
    wheel = next(built.glob("*.whl"))

    def do(*words: str | Path) -> str:
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        kept |= {key: value for key, value in os.environ.items() if key.startswith("PIP_")}
        done = subprocess.run(
            [str(word) for word in words],
            cwd=tmp_path,
            env=kept | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    do(python, "-m", "pip", "install", "--quiet", wheel, "-c", ROOT / "constraints.txt")
    do(python, "-m", "pip", "check")
    where = do(python, "-c", "import tessellar.models.xar as x; print(x.__file__)").strip()
    assert Path(where).is_relative_to(tmp_path / "venv")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] in do(tessellar, "--version")
    assert "imagenet256/xar_b" in do(tessellar, "list", "configs")
    do(tessellar, "train", "--config", "demo/tokenizer", "--name", "t", *FEW)
    tokens = ["--model.tokenizer", "runs/t/export"]
    do(tessellar, "train", "--config", "demo/generator", "--name", "g", *tokens, *FEW)
    do(tessellar, "sample", "runs/g/export", "--out", "pictures", "--count", "2")
    assert (tmp_path / "pictures" / "grid.png").is_file()
    code = "import tessellar; print(len(tessellar.load_generator('runs/g/export').sample(count=1)))"
    assert do(python, "-c", code) == "1\n"


def test_the_wheel_says_what_an_index_shows(built: Path):
    wheel = zipfile.ZipFile(next(built.glob("*.whl")))
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = Parser().parsestr(wheel.read(name).decode())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert metadata["Version"] == project["version"] and metadata["License-Expression"]
    assert metadata["Author"] == project["authors"][0]["name"]
    assert set(metadata.get_all("Provides-Extra")) == set(project["optional-dependencies"])
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().startswith("# tessellar")


def test_every_dependency_has_a_tested_version_and_pins_are_plain():
    pins = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", pin) for pin in pins)
    pinned = {re.sub("[-_.]+", "-", pin.split("==")[0]).lower() for pin in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + extras["dev"] + extras["docs"]
    names = {re.sub("[-_.]+", "-", re.split(r"[\[><=!;]", line)[0]).lower() for line in wanted}
    assert names - pinned == set()
