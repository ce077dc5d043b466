"""`tessellar list`, `tessellar show`, help in two screens, configs by name, `--version`: answers without an import."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tessellar.cli import catalogue, train
from tessellar.cli.catalogue import KINDS, config_file, entries
from tessellar.cli.errors import run
from tessellar.cli.main import SCRIPTS, dispatch, versions
from tessellar.errors import UserError

ROOT = Path(__file__).parents[2]
TWO_SCREENS = 48
JARGON = ("subcommand", "Namespace", "instantiate", "NestedArg", "jsonargparse", "subclass")
PAGES = [
    *((command, ["--help"]) for command in SCRIPTS),
    *(("evaluate", [name, "-h"]) for name in ("samples", "model", "stats", "extractor", "neighbours", "compare")),
    ("evaluate", ["sweep", "--help"]),
    *(("convert", [name, "--help"]) for name in ("import", "verify", "export", "info", "cache", "scale", "record")),
]  # fmt: skip


def said(capsys: pytest.CaptureFixture[str], command: str, *argv: str) -> str:
    assert dispatch(command, list(argv)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(("command", "argv"), PAGES, ids=lambda x: " ".join(x) if x else "")
def test_help_fits_two_screens_and_says_every_option(capsys, command: str, argv: list[str]) -> None:
    text = said(capsys, command, *argv)
    lines = text.splitlines()
    assert len(lines) <= TWO_SCREENS and max(map(len, lines)) <= 120
    assert text.startswith("usage: ") and not [word for word in JARGON if word in text]
    assert all(
        line.strip() != "" or after.strip() != ""
        for line, after in zip(lines, lines[1:], strict=False)
    )
    for line in lines:
        if re.match(r"  --[\w-]+ *$", line):
            raise AssertionError(f"{line} is not explained")


def test_help_lists_systems_data_sets_and_examples(capsys) -> None:
    for command in ("train", "evaluate", "convert"):
        text = said(capsys, command, "--help")
        names = [e.name for kind in ("tokenizers", "generators", "data") for e in entries(kind)]
        assert all(name in text for name in names) and "examples:" in text
    assert "SpeculativeJacobi" in said(capsys, "sample", "--help")
    text = said(capsys, "train", "--help")
    assert all(f"--{name} " in text for name in ("name", "resume", "runs_root", "wandb", "ema"))


def test_examples_of_help_are_configs_that_exist(capsys) -> None:
    for name in re.findall(r"--config ([\w/]+)", said(capsys, "train", "--help")):
        if name != "CONFIG":
            assert config_file(name).is_file()


def test_every_kind_is_listed_and_can_be_shown(capsys) -> None:
    for kind in KINDS:
        text = said(capsys, "list", kind)
        for entry in entries(kind):
            assert re.search(rf"^{re.escape(entry.name)}\b", text, re.M), entry.name
            assert entry.what and "\n" not in entry.what
    for name in (
        "titok",
        "titok_b64",
        "ShapesData",
        "GroupedJacobi",
        "demo/tokenizer",
        "MAR",
        "vq_16",
    ):
        assert name.rpartition("/")[2] in said(capsys, "show", name)
    assert "--config imagenet256/titok_l32" in said(capsys, "show", "titok")
    assert "drop" in said(capsys, "show", "LlamaGen")
    weights = said(capsys, "show", "llamagen/c2i-b-256")
    assert "MIT (weights), MIT (official code)" in weights
    assert "hub:FoundationVision/LlamaGen/README.md" in weights
    pictures = said(capsys, "show", "ImageFolderData")
    for option in ("root: str", "val_share: float = 0.05", "batch_size: int = 64", "balance: "):
        assert option in pictures
    stream = said(capsys, "show", "WebDatasetStreamData")
    assert "name: str = 'webdataset'" in stream and "balance: " not in stream
    options = said(capsys, "show", "GroupedJacobi")
    assert "window" in options and "group_size" in options and "ClassVar" not in options


def test_lists_are_complete() -> None:
    """Each paper's folder, each YAML, and each preset that a config builds is named."""
    for kind, folder in (("tokenizers", "tokenizers"), ("generators", "models")):
        papers = {p.parent.name for p in (ROOT / folder).glob("*/official.py")} - {"quantizers"}
        listed = {entry.name: entry.offers for entry in entries(kind)}
        assert papers <= set(listed) and all(listed.values())
    offered = {
        name for kind in ("tokenizers", "generators") for e in entries(kind) for name in e.offers
    }
    files = sorted((ROOT / "configs").rglob("*.yaml"))
    assert {e.name for e in entries("configs")} == {
        f.relative_to(ROOT / "configs").with_suffix("").as_posix() for f in files
    }
    for file in files:
        model = yaml.safe_load(file.read_text()).get("model", {}).get("init_args", {})
        for part in ("tokenizer", "generator"):
            path = model.get(part, {})
            path = path.get("class_path", "") if isinstance(path, dict) else ""
            assert not path or path.rpartition(".")[2] in offered, (file, path)


def test_a_pattern_chooses(capsys) -> None:
    text = said(capsys, "list", "configs", "*titok*")
    assert "imagenet256/titok_l32" in text and "demo/tokenizer" not in text
    assert said(capsys, "list", "tokenizers", "b64").startswith("titok")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("list",), "say what to list: tessellar list tokenizers|generators"),
        (("list", "tokeniser"), "there is no list of 'tokeniser'; did you mean 'tokenizers'?"),
        (("list", "configs", "xyz"), "none of the configs fits 'xyz'"),
        (("list", "--all"), "there is no option '--all'"),
        (("show",), "say what to show"),
        (("show", "titok_b46"), "there is nothing called 'titok_b46'; did you mean 'titok_b64'?"),
        (("evaluate",), "say which command: samples, model, stats"),
        (("evaluate", "modle"), "'modle' is not a command; there are .*did you mean 'model'?"),
        (("convert",), "say which command: import, verify"),
        (("train",), "give a config: .* --config demo/tokenizer"),
        (("train", "configs/demo/tokenizer.yaml"), "is a config: .* --config configs/demo/tokenizer.yaml"),
        (("train", "demo/tokenizer"), "demo/tokenizer is a config"),
        (("train", "test"), "'test' is not an action; there are fit, validate$"),
        (("train", "--config", "demo/tokeniser"), "nor a config of that name; did you mean 'demo/tokenizer'?"),
        (("train", "--config", "../../secrets"), "there is no such file"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(monkeypatch, argv: tuple[str, ...], message: str) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=message) as caught:
        dispatch(argv[0], list(argv[1:]))
    text = str(caught.value)
    assert "\n" not in text and len(text) < 300 and not [word for word in JARGON if word in text]


def test_version_is_said_everywhere(capsys) -> None:
    for command in (None, "train", "sample"):
        assert dispatch(command, ["--version"]) == 0
        assert capsys.readouterr().out.strip() == versions()
    assert re.match(r"tessellar \d+\.\d+\.\d+ \(torch \d", versions())


def test_lists_and_help_import_nothing_heavy() -> None:
    code = """
import contextlib, io, sys, time
from tessellar.cli.main import dispatch
with contextlib.redirect_stdout(io.StringIO()):
    for kind in ("tokenizers", "generators", "data", "configs", "algorithms"):
        dispatch("list", [kind])
    dispatch("show", ["titok_b64"])
    for command in ("train", "sample", "evaluate", "convert"):
        dispatch(command, ["--help"])
    dispatch(None, ["--version"])
heavy = {"torch", "lightning", "torchmetrics", "wandb", "matplotlib", "transformers", "jsonargparse"}
print(heavy & set(sys.modules), time.process_time() < 4)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "set() True", done.stderr


def test_help_does_not_read_the_models_of_every_paper(monkeypatch, capsys) -> None:
    """Names of systems are in their folders; what each offers takes a second to read."""

    def read(*_: object) -> None:
        raise AssertionError("help reads the sources of models")

    monkeypatch.setattr(catalogue, "models_of", read)
    for command in ("train", "sample", "evaluate", "convert"):
        assert dispatch(command, ["--help"]) == 0
    for words in (["model", "--help"], ["extractor", "--help"]):
        assert dispatch("evaluate", words) == 0
    assert dispatch("convert", ["cache", "--help"]) == 0
    assert "titok" in capsys.readouterr().out


def test_help_all_is_the_whole_page(capsys) -> None:
    with pytest.raises(SystemExit):
        dispatch("sample", ["--help", "all"])
    assert "--choice.temperature" in capsys.readouterr().out.replace("-", "-")


def test_options_of_a_group_are_listed(capsys) -> None:
    with pytest.raises(SystemExit):
        dispatch("sample", ["runs/x", "--choice.help"])
    text = capsys.readouterr().out
    assert "--choice.temperature" in text and "default" in text


def test_a_config_by_its_name_trains_elsewhere(tmp_path, monkeypatch, capsys) -> None:
    """Away from the checkout, into the folder that an option or the environment names."""
    small = (
        "--trainer.max_steps 1 --trainer.val_check_interval 1 "
        "--data.length 16 --data.val_length 8 --data.batch_size 8"
    )
    monkeypatch.chdir(tmp_path)
    words = ["--config", "demo/tokenizer", *small.split(), "--model.tokenizer.width", "16"]
    assert run(lambda: train.main([*words, "--runs_root", "scratch"])) == 0
    assert (tmp_path / "scratch/demo-tokenizer/export").is_dir() and not Path("runs").exists()
    monkeypatch.setenv("TESSELLAR_RUNS", str(tmp_path / "scratch"))
    generator = ["--config", "demo/generator", *small.split(), "--model.generator.width", "48"]
    assert run(lambda: train.main(generator)) == 0, capsys.readouterr().err
    assert (tmp_path / "scratch/demo-generator/export").is_dir() and not Path("runs").exists()
    with pytest.raises(UserError, match="demo-tokenizer exists"):
        train.main(words)


def test_models_are_named_as_the_lists_name_them(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--model.tokenizer", "titok_b64", "--model.generator=RAR", "--name", "RAR"]
    assert train.with_models(words) == [
        "--model.tokenizer",
        "tessellar.tokenizers.titok.titok_b64",
        "--model.generator=tessellar.models.rar.RAR",
        "--name",
        "RAR",
    ]
    Path("titok_b64").mkdir()  # an export of this name
    kept = ["--model.tokenizer", "titok_b64", "--model.generator", "runs/x/export"]
    assert train.with_models(kept) == kept
    with pytest.raises(UserError, match="no model of that name; did you mean 'LlamaGen'"):
        train.with_models(["--model.generator", "LamaGen"])
    strangers = ["--package", "toypaper", "--model.generator", "ToyAR"]
    assert train.with_models(strangers) == strangers


@pytest.mark.parametrize("name", ["logger false", "enable_progress_bar true", "default_root_dir x",
    "enable_checkpointing false", "enable_model_summary true", "gradient_clip_val 1.0", "accumulate_grad_batches 2",
    "gradient_clip_algorithm norm", "use_distributed_sampler false", "log_every_n_steps 5"])  # fmt: skip
def test_options_that_the_run_decides_are_refused(monkeypatch, tmp_path, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    option, value = name.split()
    with pytest.raises(UserError, match=f"trainer.{option} is decided by the run: ") as caught:
        train.main(["--config", "demo/tokenizer", f"--trainer.{option}", value])
    assert "\n" not in str(caught.value) and not Path("runs").exists()
