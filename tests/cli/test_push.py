"""`tessellar push`: what it shows and uploads; the card loads in the hub's parser, its commands work."""

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from PIL import Image

from tessellar.checkpoints.card import Record, front_license
from tessellar.checkpoints.citations import bibtex, class_paths, papers_of
from tessellar.checkpoints.export import export_generator, export_tokenizer
from tessellar.cli import push as pushing
from tessellar.cli.catalogue import PACKAGE
from tessellar.cli.main import dispatch
from tessellar.errors import UserError
from tests.interop.conftest import make_generator, make_tokenizer

ENTRY = re.compile(r"@misc\{(\w+),\n((?:  \w+ = \{.*\},\n)+)\}")


class FakeHub:
    """Keeps what it is given in a folder of the hub's own cache."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.private: bool | None = None

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.private = private

    def create_commit(self, repo_id: str, operations: Sequence[Any], **options: Any) -> None:
        repository = self.cache / f"models--{repo_id.replace('/', '--')}"
        snapshot = repository / "snapshots" / ("1" * 40)
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("1" * 40)
        for operation in operations:
            with operation.as_file() as file:
                (snapshot / operation.path_in_repo).write_bytes(file.read())


@pytest.fixture
def export(tmp_path: Path) -> Path:
    record = Record(title="Small", weights="ema", license="CC-BY-4.0", data="shapes drawn here")
    return export_generator(make_generator(), tmp_path / "runs" / "small", record=record)


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    record = {
        "metrics": {"FD(net)": 1.25},
        "samples": {"images": 1000},
        "reference": {"name": "shapes train"},
        "comparable": {},
        "fingerprint": "abc123",
        "code": {"commit": "0123456789ab"},
    }
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record))
    return path


def test_a_dry_run_shows_and_uploads_nothing(
    export: Path,
    measured: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(pushing, "send", lambda *_: pytest.fail("uploaded"))
    words = ["me/small", "--data_license", "none needed", "--records", str(measured)]
    dispatch("push", [str(export), *words, "--columns", "2"])
    told = capsys.readouterr().out
    size = (export / "model.safetensors").stat().st_size
    assert f"{size:,} bytes" in told and "nothing was uploaded" in told
    assert "| FD(net) | 1.25 | 1000 | shapes train | abc123 | 0123456789ab |" in told
    assert "| weights | CC-BY-4.0 |" in told and "| data | none needed |" in told
    assert "Not chosen: seeds from 0 on, guidance 1.5" in told


def test_what_is_uploaded_loads_and_its_card_works(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub.cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    dispatch("push", [str(export), "me/small", "--yes", "--private", "true", "--columns", "2"])
    assert hub.private
    snapshot = hub.cache / "models--me--small" / "snapshots" / ("1" * 40)
    with Image.open(snapshot / "samples.png") as grid:
        assert grid.width > 16 and len(grid.getcolors(1 << 20) or ()) > 16

    loaded = huggingface_hub.ModelCard.load(snapshot / "README.md")
    data = loaded.data.to_dict()
    assert data["license"] == "cc-by-4.0" and data["library_name"] == "tessellar"
    assert data["pipeline_tag"] == "unconditional-image-generation"
    assert "datasets" not in data  # prose is no data set of the hub
    names = re.findall(r"!\[\w+\]\((.+?)\)", loaded.text)
    assert names == ["samples.png"]

    (block,) = re.findall(r"```python\n(.*?)```", loaded.text, re.S)
    ran: dict[str, Any] = {}
    exec(block, ran)
    assert len(ran["images"]) == 3
    (shell,) = re.findall(r"```bash\n(.*?)```", loaded.text, re.S)
    for line in shell.splitlines():
        words = line.split()
        assert words[0] == "tessellar"
        dispatch(words[1], words[2:])
    assert len(list(Path("outputs/samples").glob("*.png"))) >= 4


def test_a_license_is_asked_for(tmp_path: Path) -> None:
    folder = export_tokenizer(make_tokenizer(), tmp_path / "bare")
    picture = tmp_path / "mine.png"
    Image.new("RGB", (8, 8), (200, 0, 0)).save(picture)
    with pytest.raises(UserError, match="--license NAME"):
        dispatch("push", [str(folder), "me/bare", "--yes"])
    stated = {"license": "Some research license, v2"}
    drawn = pushing.Drawn(str(picture), 1, 1.0, 0)
    upload = pushing.prepared(str(folder), "me/bare", stated, "", [], drawn)
    front = yaml.safe_load(upload.card.split("---")[1])
    assert front["license"] == "other" and front["license_name"] == "some-research-license-v2"
    content = upload.files["samples.png"]
    assert isinstance(content, bytes)
    assert Image.open(io.BytesIO(content)).getpixel((0, 0)) == (200, 0, 0)


@pytest.mark.parametrize("name", ["alone", "a/b/c", "a/b@main"])
def test_what_is_no_name_of_the_hub(name: str, export: Path) -> None:
    with pytest.raises(UserError, match="OWNER/NAME"):
        dispatch("push", [str(export), name])


def test_an_upload_that_the_hub_refuses_is_one_line(export: Path) -> None:
    class Refusing(FakeHub):
        def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
            raise OSError("no token\nlog in first")

    upload = pushing.Upload("me/small", {"README.md": b"x"})
    with pytest.raises(UserError, match="did not take me/small") as told:
        pushing.send(upload, Refusing(export))
    assert "\n" not in str(told.value)


def test_upstream_of_an_import() -> None:
    text = pushing.licenses(Record(weights="official", source="hub:OliverRen/xAR/xAR-B.pth"), "")
    assert "not known to us (hub:OliverRen/xAR/xAR-B.pth, arXiv 2502.20388)" in text
    assert "| official code | none |" in text


def test_bibtex_of_what_an_export_is_made_of(export: Path) -> None:
    config = yaml.safe_load((export / "config.yaml").read_text())
    assert "tessellar.models.llamagen.LlamaGen" in list(class_paths(config))
    text = bibtex(papers_of(config))
    entries = dict(ENTRY.findall(text))
    assert len(entries) == text.count("@misc")  # all are well-formed
    # LlamaGen, ViT-VQGAN and VQ-VAE: the generator, the tokenizer and, inside of it, its quantizer
    assert {"arxiv2406_06525", "arxiv2110_04627", "arxiv1711_00937"} <= set(entries)
    assert "Autoregressive Model Beats Diffusion" in entries["arxiv2406_06525"]
    assert "year = {2017}" in entries["arxiv1711_00937"]
    assert text in (export / "README.md").read_text()


def test_every_system_can_be_cited() -> None:
    """Each package of a paper names one that BibTeX is made of, with its title or our words."""
    for room in ("models", "tokenizers"):
        for header in sorted((PACKAGE / room).glob("*/__init__.py")):
            path = f"tessellar.{room}.{header.parent.name}.Any"
            for paper, said in papers_of({"class_path": path}).items():
                entry = bibtex({paper: said})
                assert ENTRY.fullmatch(entry), entry
    assert papers_of({"class_path": "others.package.Class"}) == {}


def test_licenses_of_front_matter() -> None:
    assert front_license("Apache-2.0") == {"license": "apache-2.0"}
    assert front_license("Mine (v1)") == {"license": "other", "license_name": "mine-v1"}
