"""Packages import in one order, without circles; links are followed and imports inside functions count."""

import importlib.util
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _tool():
    spec = importlib.util.spec_from_file_location(
        "import_order", ROOT / "tools" / "import_order.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = _tool()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The sources, to plant imports in."""
    for name in ("tessellar", "models", "tokenizers"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignored)
    return tmp_path


def test_every_file_is_seen():
    folders = (ROOT / "tessellar", ROOT / "models", ROOT / "tokenizers")
    files = sum(len(list(folder.rglob("*.py"))) for folder in folders)
    assert len(tool.modules(ROOT)) == files
    assert "tessellar.models.xar.model" in tool.modules(ROOT)


def test_packages_import_in_order_and_no_files_in_a_circle():
    graph = tool.graph_of(ROOT)
    assert tool.violations(graph) == []
    assert tool.circles(graph) == []


@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        (
            "models/xar/model.py",
            "import tessellar.sampling.decode",
            "(models) imports tessellar.sampling.decode",
        ),
        (
            "tessellar/data/crops.py",
            "from tessellar.sampling import run",
            "(data) imports tessellar.sampling.run",
        ),
        (
            "tessellar/layers/adaln.py",
            "def f():\n    from tessellar.protocol import noise",
            "(layers) imports",
        ),
        (
            "models/xar/official.py",
            "from tessellar.parity import recording",
            "(models) imports tessellar.parity",
        ),
        (
            "tessellar/errors.py",
            "import tessellar.images",
            "(errors) imports tessellar.images (images)",
        ),
    ],
)
def test_a_forbidden_import_is_seen(copy: Path, file: str, line: str, said: str):
    with (copy / file).open("a") as opened:
        opened.write(f"\n{line}\n")
    (found,) = tool.violations(tool.graph_of(copy))
    assert said in found


def test_circles_of_files_are_seen_wherever_the_import_stands(copy: Path):
    """Within a package and across papers of one level, at the top, inside a function, by dots."""
    ring = ("models/rar/model.py", "models/har/model.py", "models/xar/model.py")
    planted = {
        "tessellar/layers/attention.py": "from . import vit",
        ring[0]: "import tessellar.models.xar.model",
        ring[1]: "def f():\n    import tessellar.models.rar.model",
        ring[2]: "from ..har import model",
    }
    for file, line in planted.items():
        with (copy / file).open("a") as opened:
            opened.write(f"\n{line}\n")
    layers, papers = sorted(tool.circles(tool.graph_of(copy)))
    assert layers.startswith("a circle of 2 files") and "layers.vit -> " in layers
    har, rar, xar = (f"tessellar.models.{name}.model" for name in ("har", "rar", "xar"))
    assert papers == f"a circle of 3 files: {har} -> {rar} -> {xar} -> {har}"


def test_a_room_without_a_place_is_seen(copy: Path):
    (copy / "tessellar" / "misc").mkdir()
    (copy / "tessellar" / "misc" / "__init__.py").write_text("")
    assert tool.violations(tool.graph_of(copy)) == [
        "tessellar.misc lies in misc, which has no place in the order"
    ]
