"""Published checkpoints by name: what each entry of the zoo says holds, and `tessellar.load` takes its file from a
mirror or the hub's cache.
"""

import functools
import importlib
import json
import runpy
import shlex
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from torch import Tensor, nn

import tessellar
from tessellar.checkpoints import zoo as facts
from tessellar.checkpoints.hub import HubFile
from tessellar.checkpoints.zoo import ITSELF, UNKNOWN, Published, published, zoo
from tessellar.cli import convert, evaluate, sample
from tessellar.cli.catalogue import CONFIGS
from tessellar.cli.importing import papers
from tessellar.errors import UserError
from tessellar.parity.recording import read_recording
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.layout import Layout
from tessellar.tokenizers.kl_vae import KLVAE
from tessellar.tokenizers.kl_vae.official import to_official as vae_keys
from tessellar.tokenizers.quantizers.gaussian import GaussianBottleneck

GOLDEN = Path(__file__).parents[1] / "golden"
STATED = Path(__file__).parents[2] / "docs" / "recipes" / "stated"
#: The file of a generator that holds its tokenizer too has that of another entry.
OWN = {"open_magvit2": "open_magvit2/256", "ibq": "ibq/16384"}
#: Built by `make test`; all of them by `make check`.
SMALL = ["llamagen/c2i-b-256", "maskgit/titok-b64", "xar/b", "hita/u-b-50e", "flextok/d12-d12"]


def made(path: str, *arguments: Any, **options: Any) -> Any:
    """The model of a class path, without memory."""
    module, _, name = path.rpartition(".")
    with torch.device("meta"):
        return getattr(importlib.import_module(module), name)(*arguments, **options)


@functools.cache
def layout(name: str, image_size: int | None) -> Layout:
    size = {} if image_size is None else {"image_size": image_size}
    entry = published(name)
    return made(entry.model, **{**entry.arguments, **entry.options, **size}).layout


def module_of(entry: Published) -> nn.Module:
    if entry.kind == "tokenizer":
        return made(entry.model, **{**entry.arguments, **entry.options})
    name = OWN[entry.system] if entry.tokenizer == ITSELF else entry.tokenizer
    return made(entry.model, layout(name, entry.options.get("image_size")), **entry.arguments)


def check_built(name: str) -> None:
    """An entry's model builds at its real size, with as many parameters as are stated."""
    entry = published(name)
    count = sum(parameter.numel() for parameter in module_of(entry).parameters())
    assert count == (entry.parameters or count)


@pytest.mark.parametrize("name", SMALL)
def test_a_published_size(name: str) -> None:
    check_built(name)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in zoo() if name not in SMALL])
def test_every_published_size(name: str) -> None:
    check_built(name)


def test_what_entries_name_exists() -> None:
    known = papers()
    for entry in zoo().values():
        paper = known[entry.system]
        assert paper.tokenizers if entry.kind == "tokenizer" else paper.generators, entry.name
        assert entry.tokenizer in ("", ITSELF) or entry.tokenizer in zoo(), entry.name
        for config in filter(None, (entry.config, entry.sampling)):
            assert (CONFIGS / f"{config}.yaml").is_file(), entry.name
        if entry.config:
            text = (CONFIGS / f"{entry.config}.yaml").read_text()
            assert entry.model.split(".")[-2] in text, entry.name  # it trains this system
        assert bool(entry.published) or entry.protocol == UNKNOWN, entry.name
        assert entry.license and entry.file and entry.repository, entry.name


def test_a_license_of_weights_names_the_file_that_states_it() -> None:
    """Either the card of the entry's own repository or a file of the code's repository that speaks of weights."""
    of_code = {
        "github:apple/ml-flextok/LICENSE_WEIGHTS (read in a fork)",
        "github:EPFL-VILAB/search-over-tokens/README.md",
    }
    for entry in zoo().values():
        allowed = {f"hub:{entry.repository}/README.md", *of_code}
        if entry.license == UNKNOWN:
            assert not entry.license_source, entry.name
        else:
            assert entry.license_source in allowed, entry.name


def test_the_numbers_are_those_of_our_recordings() -> None:
    """FID, IS and rFID are recorded beside the settings that give them."""
    numbers: set[tuple[str, float]] = set()
    for file in (*GOLDEN.glob("*/recipe.json"), *STATED.glob("*/recipe.json")):
        recipe = json.loads(file.read_text())
        for line in (*(recipe.get("sampling") or ()), *(recipe.get("reconstruction") or ())):
            numbers |= {(key, value) for key, value in line.items() if isinstance(value, float)}
    of_a_paper_alone = {"mar/kl16", "tokenbridge/kl16", "tokenflow/t2i-7b"}
    compared = 0
    for entry in zoo().values():
        if entry.system == "mingtok" or entry.name in of_a_paper_alone:
            continue
        for key, value in entry.published.items():
            assert (key, value) in numbers, entry.name
            compared += 1
    assert compared > 100


def test_the_page_is_made_of_the_zoo() -> None:
    path = Path(__file__).parents[2] / "tools" / "zoo_page.py"
    assert runpy.run_path(str(path))["main"]() == 0, "python tools/zoo_page.py --write"


def test_a_wrong_name_is_told_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'llamagen/c2i-b-256'"):
        published("llamagen/c2i-b-265")
    assert not facts.is_published("runs/export")


def parsed(monkeypatch: pytest.MonkeyPatch, module: Any, command: str, words: str) -> dict:
    """What a command's function would be called with."""
    seen: dict = {}

    @functools.wraps(module.COMMANDS[command])
    def noted(**arguments: Any) -> None:
        seen.update(arguments)

    monkeypatch.setitem(module.COMMANDS, command, noted)
    module.main(shlex.split(words)[2:])
    return seen


@pytest.mark.parametrize("name", ["llamagen/c2i-b-384", "titok/b64", "xar/l", "ibq/ar-b"])
def test_commands_of_an_entry_are_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = published(name)
    imported = parsed(monkeypatch, convert, "import", entry.importing())
    assert f"{imported['system']}/{imported['file']}" == name
    measured = entry.evaluation()
    if name == "ibq/ar-b":  # whose reference batch our notes do not state
        assert measured == ""
        return
    given = parsed(monkeypatch, evaluate, "model", measured)
    assert given["model"] == imported["out"]
    assert given["protocol"] == entry.protocol
    if entry.kind == "generator":
        settings = yaml.safe_load((CONFIGS / f"{entry.sampling}.yaml").read_text())
        scale = settings["guidance"]["init_args"]["scale"]
        assert given["guidance"].scale == scale and given["reference"] == [entry.reference]


def xar_file() -> dict[str, Tensor]:
    return dict(read_recording(GOLDEN / "xar").weights["model"])


def tiny_hub(root: Path, layout_of_cache: bool) -> None:
    """The files of xAR-B and of its VAE as the hub's folders hold them, with tiny weights of the official format."""
    torch.manual_seed(0)
    vae = KLVAE(GaussianBottleneck(16), 16, 32, (1,), 1)
    content = {"mar/kl16.ckpt": {"model": vae_keys(vae)}, "OliverRen/xAR/xAR-B.pth": xar_file()}
    for name, state in content.items():
        *owner, file = name.split("/")
        folder = root.joinpath(*owner)
        if layout_of_cache and len(owner) == 2:
            repository = root / f"models--{'--'.join(owner)}"
            folder = repository / "snapshots" / ("0" * 40)
            (repository / "refs").mkdir(parents=True)
            (repository / "refs" / "main").write_text("0" * 40)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(state, folder / file)


@pytest.fixture
def small_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries of xAR-B and its VAE for images of 16 pixels, as the tiny weights are."""
    entries = {}
    for name in ("xar/b", "mar/kl16"):
        fields = {**vars(zoo()[name]), "options": {"image_size": 16}, "parameters": None}
        entries[name] = Published(**fields)
    monkeypatch.setattr(facts, "zoo", lambda: entries)


@pytest.mark.usefixtures("small_entries")
@pytest.mark.parametrize("cached", [False, True])
def test_load_by_name(cached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_hub(tmp_path, cached)
    monkeypatch.setenv("TESSELLAR_MIRROR", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model = tessellar.load("xar/b", dtype=torch.float64)
    assert isinstance(model, ImageGenerator)
    weight = model.generator.state_dict()["encoder.project.weight"]
    assert torch.equal(weight.float(), xar_file()["z_proj.weight"])
    assert weight.dtype == torch.float64
    assert isinstance(tessellar.load_tokenizer("mar/kl16", image_size=(16, 32)), KLVAE)
    with pytest.raises(UserError, match="mar/kl16 is a tokenizer; a generator is needed"):
        tessellar.load_generator("mar/kl16")


@pytest.mark.usefixtures("small_entries")
def test_convert_import_by_name_and_by_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_hub(tmp_path / "mirror", False)
    monkeypatch.setenv("TESSELLAR_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.chdir(tmp_path)
    convert.main(["import", "xar", "b", "--out", "named"])
    source = "hub:OliverRen/xAR/xAR-B.pth"
    vae = str(tmp_path / "mirror" / "mar" / "kl16.ckpt")
    words = ["import", "xar", source, "--tokenizer", vae, "--image_size", "16", "--out", "by_hub"]
    convert.main(words)
    named, by_hub = (tmp_path / folder / "config.yaml" for folder in ("named", "by_hub"))
    configs = [yaml.safe_load(file.read_text()) for file in (named, by_hub)]
    assert configs[0]["record"]["source"] == configs[1]["record"]["source"] == source
    assert configs[0]["generator"] == configs[1]["generator"]
    with pytest.raises(UserError, match="give --out alone"):
        convert.main(["import", "xar", "b", "--image_size", "16", "--out", "other"])
    with pytest.raises(UserError, match="make an export of it first, `python convert.py import"):
        sample.main(["xar/b", "--classes", "0"])


def test_offline_says_what_to_download_to_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("TESSELLAR_MIRROR", raising=False)
    with pytest.raises(UserError) as told:
        tessellar.load("llamagen/c2i-b-256")
    line = str(told.value)
    assert "c2i_B_256.pt of FoundationVision/LlamaGen" in line and "\n" not in line
    assert "$TESSELLAR_MIRROR/FoundationVision/LlamaGen/c2i_B_256.pt" in line
    monkeypatch.setenv("TESSELLAR_MIRROR", str(tmp_path))
    with pytest.raises(UserError, match=f"download it to {tmp_path}/alitok/AliTok.pth$"):
        tessellar.load("alitok/tokenizer")
    with pytest.raises(
        UserError, match="name of its file in .*restok_l_128.r256_in1k is not known"
    ):
        tessellar.load("restok/l-128")


def test_without_a_network_the_hub_is_asked_once_and_one_error_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's download would ask six times, and its client's errors are no OSErrors."""
    asked = []

    def unreachable(address: str) -> None:
        asked.append(address)
        raise huggingface_hub.errors.HTTPError("no address for that name")  # type: ignore[attr-defined]

    def downloads(*_: object, **__: object) -> str:
        raise AssertionError("the download was tried")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", downloads)
    monkeypatch.delenv("TESSELLAR_MIRROR", raising=False)
    with pytest.raises(UserError, match=r"\(no address for that name\): download it to") as told:
        tessellar.load("llamagen/c2i-b-256")
    assert len(asked) == 1 and asked[0].endswith("c2i_B_256.pt")
    assert told.value.__cause__ is None and told.value.__context__ is None


def test_a_mistyped_name_is_told_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot(*_: object, **__: object) -> str:
        raise OSError("no such repository")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with pytest.raises(
        UserError, match=r"\(no such repository\); did you mean 'llamagen/c2i-b-256'"
    ):
        tessellar.load("llamagen/c2i-b-25")
    with pytest.raises(UserError, match="did you mean 'llamagen/c2i-b-256'"):
        convert.main(["import", "llamagen", "c2i-b-25", "--out", str(tmp_path / "out")])
    with pytest.raises(UserError, match="absent.pt does not exist"):
        convert.main(["import", "llamagen", "absent.pt", "--out", str(tmp_path / "out")])


def test_a_file_of_the_mirror_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pickle that holds a function is refused, as everywhere."""
    file = tmp_path / "FoundationVision" / "LlamaGen" / "vq_ds16_c2i.pt"
    file.parent.mkdir(parents=True)
    torch.save({"model": print}, file)
    monkeypatch.setenv("TESSELLAR_MIRROR", str(tmp_path))
    with pytest.raises(UserError, match="vq_ds16_c2i.pt"):
        tessellar.load("llamagen/vq-16")


def test_another_file_than_the_entry_names_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    vae = KLVAE(GaussianBottleneck(16), 16, 32, (1,), 1)
    (tmp_path / "mar").mkdir()
    torch.save({"model": vae_keys(vae)}, tmp_path / "mar" / "kl16.ckpt")
    monkeypatch.setenv("TESSELLAR_MIRROR", str(tmp_path))
    tessellar.load("mar/kl16")
    assert "as published it has 66,456,019" in caplog.text


@pytest.mark.parametrize("text", ["hub:xAR/xAR-B.pth", "hub:a/b/../c.pt", "hub:a/b"])
def test_what_is_no_file_of_the_hub(text: str) -> None:
    with pytest.raises(UserError, match="hub:OWNER/REPO"):
        HubFile.read(text)
    assert HubFile.read("hub:a/b@main/c/d.pt") == HubFile("a/b", "c/d.pt", "main")
