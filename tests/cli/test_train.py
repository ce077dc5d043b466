"""`train.py`: one short line for a user's mistake, a folder a run, a run that continues, weights that are exported."""

import copy
import csv
import json
import os
import signal
from pathlib import Path
from typing import Any, get_args, get_type_hints

import lightning as L
import pytest
import timm
import torch
import yaml
from jsonargparse import ArgumentParser
from safetensors.torch import save_file

import tessellar
from tessellar.callbacks.throughput import Throughput
from tessellar.cli import train
from tessellar.cli.errors import run
from tessellar.networks.facts import NetworkFacts
from tessellar.pipeline import ImageGenerator
from tessellar.tokenizers.retok import ReToK
from tessellar.tokenizers.vit_vq import ViTVQ
from tests.tiny.configs import tokenizer_run

TOKENIZER = tokenizer_run(4, validate_every=2, save_every=3, schedule={"decay": "linear"})
GENERATOR: dict[str, Any] = {
    **{key: TOKENIZER[key] for key in ("trainer", "log_every", "save_every", "data")},
    "model": {
        "class_path": "tessellar.training.generator_module.GeneratorModule",
        "init_args": {
            "tokenizer": "runs/tok/export",
            "generator": {
                "class_path": "tessellar.models.llamagen.LlamaGen",
                "init_args": {
                    "width": 16,
                    "depth": 1,
                    "num_heads": 2,
                    "num_classes": 10,
                    "ffn_multiple_of": 8,
                },
            },
        },
    },
}


def changed(
    config: dict[str, Any], path: str, value: Any = None, delete: bool = False
) -> dict[str, Any]:
    """A copy of a config with one key (dots between its parts) set or taken away; `init_args` are left out of it."""
    new = copy.deepcopy(config)
    node, (*parts, last) = new, path.split(".")
    for part in parts:
        node = node[part]
        node = node.get("init_args", node)
    if delete:
        del node[last]
    else:
        node[last] = value
    return new


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Run train.py in an empty folder; gives exit code and stderr."""
    monkeypatch.chdir(tmp_path)

    def command(
        config: dict[str, Any] | str, *options: str, name: str | None = "tok", action: str = "fit"
    ):
        Path("run.yaml").write_text(config if isinstance(config, str) else yaml.safe_dump(config))
        named = [] if name is None else ["--name", name]
        code = run(lambda: train.main([action, "--config", "run.yaml", *named, *options]))
        return code, capsys.readouterr().err

    return command


def tokenizer(path: str, value: Any = None, delete: bool = False) -> dict[str, Any]:
    return changed(TOKENIZER, path, value, delete)


def generator(path: str, value: Any = None, delete: bool = False) -> dict[str, Any]:
    return changed(GENERATOR, path, value, delete)


MODEL = "model.tokenizer"
FID_OF_0_1 = {
    "class_path": "tessellar.callbacks.fid.FID",
    "init_args": {"sampling": {"algorithm": "sjd", "options": {"window": 3}}},
}
FOLDER = {
    "class_path": "tessellar.data.ImageFolderData",
    "init_args": {"root": "nowhere", "size": 16, "batchsize": 4},
}
MISTAKES = [
    (tokenizer("traner", 1), (), "run.yaml: there is no option 'traner'; did you mean 'trainer'?"),
    (tokenizer("trainer.max_step", 1), (), "run.yaml: trainer has no option 'max_step'; did you mean 'max_steps'?"),
    (tokenizer(f"{MODEL}.widht", 1), (), "ViTVQ (model.tokenizer) has no option 'widht'; did you mean 'width'?"),
    (tokenizer(f"{MODEL}.quantizer.vocab", 1), (), "VectorQuantizer (model.tokenizer.quantizer) has no option"),
    (tokenizer("model.schedule.decy", 1), (), "model.schedule has no option 'decy'; did you mean 'decay'?"),
    (tokenizer("data.batchsize", 1), (), "ShapesData (data) has no option 'batchsize'; did you mean 'batch_size'?"),
    (tokenizer("data", FOLDER), (), "ImageFolderData (data) has no option 'batchsize'; did you mean 'batch_size'?"),
    (tokenizer(f"{MODEL}.width", "wide"), (), "model.tokenizer.width: expected int, not 'wide'"),
    (tokenizer("model.schedule.decay", "cosin"), (), "not 'cosin'; did you mean 'cosine'?"),
    (tokenizer(f"{MODEL}.quantizer", delete=True), (), "model.tokenizer: quantizer missing"),
    (tokenizer("model", delete=True), (), "model missing"),
    (tokenizer(f"{MODEL}.patch_size", 5), (), "patch_size 5 does not divide image_size 16"),
    (tokenizer("data.size", 8), (), "the tokenizer takes images of (16, 16); the data set shapes gives (8, 8)"),
    (tokenizer("trainer.gradient_clip_val", 1.0), (), "set --model.clip"),
    (tokenizer("trainer.precision", "16-mixed"), (), "use bf16-mixed"),
    (tokenizer("trainer.accelerator", "cpuu"), (), "cpuu"),
    (GENERATOR, ("--model.generator", "RARS"), "did you mean"),
    ("model: [a\nb: }", (), "run.yaml: not valid YAML"),
    ("- a\n- b", (), "run.yaml: a config is a mapping of keys"),
    (tokenizer("model.accumulate", 0), (), "accumulate is 0"),
    (tokenizer("model.clip", 0.0), (), "clip above 0 or null"),
    (TOKENIZER, ("--trainer.max_stap", "1"), "error: there is no option 'trainer.max_stap'; did you mean 'max_steps'?"),
    (TOKENIZER, ("--model.clipp", "1"), "error: TokenizerModule (model) has no option 'clipp'; did you mean 'clip'?"),
    (TOKENIZER, ("--nam", "x"), "error: there is no option 'nam'; did you mean 'name'?"),
    (TOKENIZER, ("--resume", "nowhere.ckpt"), "nowhere.ckpt: there is no such checkpoint"),
    (TOKENIZER, ("--sampling.algorithm", "guess"), "sampling.algorithm: there is no 'guess'; there are Ancestral"),
    (TOKENIZER, ("--sampling.algorithm", "gsd"), "it is now --sampling.algorithm GroupedJacobi"),
    (TOKENIZER, ("--sampling.guidance.powr", "1"), "Constant (sampling.guidance) has no option 'powr'"),
    (
        tokenizer("sampling", {"guidance": {"scale": 3.0, "schedule": "half_linear"}}),
        (),
        "it is now sampling: {guidance: {class_path: HalfLinear, init_args: {scale: 3.0}}}",
    ),
    (
        tokenizer("trainer.callbacks", [FID_OF_0_1]),
        (),
        "it is now sampling: {algorithm: {class_path: SpeculativeJacobi, init_args: {window: 3}}}",
    ),
    (GENERATOR, (), "runs/tok/export does not exist"),
    (generator("model.generator.widht", 1), (), "LlamaGen (model.generator) has no option 'widht'"),
    (generator("model.generator.width", "a"), (), "model.generator.width: expected int, not 'a'"),
]  # fmt: skip
CLASSES = [
    (TOKENIZER, MODEL, "tessellar.tokenizers.vit_vq.VitVQ", "there is no 'VitVQ' in tessellar.tokenizers.vit_vq; did"),
    (TOKENIZER, MODEL, "tessellar.tokenizers.vitvq.ViTVQ", "there is no 'vitvq' in tessellar.tokenizers; did you mean"),
    (TOKENIZER, MODEL, "tessellar.models.llamagen.LlamaGen", "LlamaGen is not a Tokenizer; a Tokenizer"),
    (GENERATOR, "model.tokenizer", "tessellar.models.llamagen.LlamaGen", "LlamaGen is not a Tokenizer; a Tokenizer"),
    (GENERATOR, "model.generator", "tessellar.tokenizers.vit_vq.ViTVQ", "model.generator: ViTVQ is not a Generator"),
    (GENERATOR, "model.generator", "tessellar.models.llamagen.model.LamaGen", "did you mean 'LlamaGen'?"),
    (TOKENIZER, "data", "tessellar.data.ShapeData", "did you mean 'ShapesData'?"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "options", "message"), MISTAKES, ids=lambda x: x if isinstance(x, str) else ""
)
def test_a_mistake_is_one_line(call, config, options: tuple[str, ...], message: str) -> None:
    code, printed = call(config, *options)
    assert code == 2 and message in printed
    assert printed.startswith("error: ") and printed.count("\n") == 1 and len(printed) < 400
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("config", "key", "class_path", "message"), CLASSES, ids=lambda x: x if "." in x else ""
)
def test_a_wrong_class_is_one_line(call, config, key: str, class_path: str, message: str) -> None:
    code, printed = call(changed(config, key, {"class_path": class_path}))
    assert code == 2 and message in printed and printed.count("\n") == 1


def test_missing_config_and_missing_data(call) -> None:
    assert run(lambda: train.main(["--config", "nowhere.yaml"])) == 2
    data = {"class_path": "tessellar.data.FashionMNISTData", "init_args": {"root": "nowhere"}}
    config = changed(tokenizer("data", data), f"{MODEL}.image_size", 32)
    code, printed = call(config, "--data.root", "elsewhere")
    assert code == 2 and "elsewhere" in printed and not Path("runs").exists()
    assert call(TOKENIZER, action="fitt")[1].startswith(
        "error: 'fitt' is not an action; there are fit, validate; did you mean 'fit'?"
    )


def validate_psnr(capsys: pytest.CaptureFixture) -> float:
    """What `validate` prints of the run `tok`."""
    assert (
        run(
            lambda: train.main(
                ["validate", "--config", "run.yaml", "--name", "tok", "--resume", "auto"]
            )
        )
        == 0
    )
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    return float(printed["val/psnr"])


def test_a_run_from_tokenizer_to_generator(call, capsys) -> None:
    assert call(TOKENIZER, "--ema", "0.5")[0] == 0
    assert isinstance(tessellar.load("runs/tok/export"), ViTVQ)
    for path in (
        "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
        "config.yaml",
        "pictures",
        "tensorboard",
    ):
        assert (Path("runs/tok") / path).exists(), path
    facts = json.loads(Path("runs/tok/run.json").read_text())
    assert (facts["updates"], facts["samples_seen"], facts["tokens_seen"]) == (4, 32, 32 * 16)
    with open("runs/tok/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert (
        all(row["train/loss"] for row in rows)
        and [bool(row["val/psnr"]) for row in rows] == [False, True] * 2
    )
    averaged = tessellar.load("runs/tok/checkpoints/last.ckpt").state_dict()
    raw = tessellar.load("runs/tok/checkpoints/last.ckpt", raw=True).state_dict()
    exported = tessellar.load("runs/tok/export").state_dict()
    assert all(torch.equal(exported[key], averaged[key]) for key in averaged)
    assert any(not torch.equal(raw[key], averaged[key]) for key in raw)

    assert validate_psnr(capsys) == pytest.approx(
        float(rows[-1]["val/psnr"]), rel=1e-5
    )  # of averaged weights, both

    assert call(GENERATOR, "--trainer.max_steps", "2", name="gen")[0] == 0
    model = tessellar.load("runs/gen/export")
    assert isinstance(model, ImageGenerator)
    assert all(torch.equal(model.tokenizer.state_dict()[key], exported[key]) for key in exported)
    assert sorted(Path("runs/gen/pictures").iterdir()) == [
        Path("runs/gen/pictures/samples_0000002.png")
    ]
    code, printed = call(generator("model.generator.num_classes", 3), name="three")
    assert code == 2 and "the generator has 3 classes; the data set shapes has 10" in printed
    code, printed = call(GENERATOR, "--model.tokenizer", "runs/gen/export", name="three")
    assert (
        code == 2
        and printed == "error: runs/gen/export is a generator; a tokenizer is needed here\n"
    )
    code, printed = call(GENERATOR, "--resume", "runs/tok/checkpoints/last.ckpt", name="three")
    assert code == 2 and printed.startswith(
        "error: runs/tok/checkpoints/last.ckpt is of another model: Missing key"
    )
    assert printed.count("\n") == 1 and len(printed) < 300


def test_a_run_never_writes_into_another_and_continues_when_asked(call, capsys) -> None:
    assert call(TOKENIZER)[0] == 0
    before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    code, printed = call(TOKENIZER)
    assert code == 2 and "choose another --name, or continue that run with --resume auto" in printed
    assert before == {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}

    assert call(TOKENIZER, "--resume", "auto", "--trainer.max_steps", "6")[0] == 0
    with open("runs/tok/metrics.csv", newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3", "4", "5", "6"]
    assert json.loads(Path("runs/tok/run.json").read_text())["samples_seen"] == 48
    before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert validate_psnr(capsys) > 0
    assert before == {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    assert "--resume" in call(TOKENIZER, name="new", action="validate")[1]


def test_a_run_that_diverges_stops_and_names_its_last_checkpoint(call) -> None:
    diverging = tokenizer("model.optimizer", {"lr": 1.0e30})
    code, printed = call(
        diverging, "--model.max_skipped", "2", "--save_every", "1", "--trainer.max_steps", "50"
    )
    assert code == 2 and printed.splitlines()[-1].startswith(
        "error: 2 updates in a row of the tokenizer had no finite"
    )
    assert printed.endswith("Last checkpoint: runs/tok/checkpoints/last.ckpt\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_run_in_one_line_and_resume_auto_finishes_it(
    call, monkeypatch, number
) -> None:
    assert call(TOKENIZER, name="whole")[0] == 0
    start = Throughput.on_train_batch_start

    def during(self, trainer, module, *given):
        start(self, trainer, module, *given)
        if module.updates == 1 and run_before is None:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Throughput, "on_train_batch_start", during)
    run_before = None
    code, printed = call(TOKENIZER)
    assert code == 128 + number and not Path("runs/tok/export").exists()
    assert (
        printed.splitlines()[-1]
        == f"{number.name}: saved and stopped after update 2; continue with --resume auto"
    )
    run_before = "signalled"
    assert call(TOKENIZER, "--resume", "auto")[0] == 0
    whole, resumed = (
        tessellar.load(f"runs/{name}/export").state_dict() for name in ("whole", "tok")
    )
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    with open("runs/tok/metrics.csv") as ours, open("runs/whole/metrics.csv") as theirs:
        rows = [
            [(row["step"], row["train/loss"], row["val/psnr"]) for row in csv.DictReader(f)]
            for f in (ours, theirs)
        ]
    assert [row[:2] for row in rows[0]] == [row[:2] for row in rows[1]]


def test_a_hostile_checkpoint_is_not_opened(call) -> None:
    class Hostile:
        def __reduce__(self):
            return (open, ("opened", "w"))

    torch.save({"state_dict": {}, "more": Hostile()}, "evil.ckpt")
    code, printed = call(TOKENIZER, "--resume", "evil.ckpt")
    assert code == 2 and "evil.ckpt holds more than tensors" in printed and printed.count("\n") == 1
    assert not Path("opened").exists()


def test_fine_tuning_takes_weights_and_starts_a_fresh_discriminator(call, caplog) -> None:
    assert call(TOKENIZER)[0] == 0
    with_critic = tokenizer(
        "model.loss.discriminator",
        {
            "class_path": "tessellar.tokenizers.losses.discriminator.PatchGAN",
            "init_args": {"channels": 8, "depth": 1},
        },
    )
    options = ("--model.init_from", "runs/tok/export", "--model.optimizer.lr", "0")
    with caplog.at_level("INFO"):
        assert call(with_critic, *options, name="fine")[0] == 0
    assert (
        sum("no discriminator: training starts with a fresh one" in m for m in caplog.messages) == 1
    )
    before, after = (
        list(tessellar.load(f"runs/{name}/export").parameters()) for name in ("tok", "fine")
    )
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    code, printed = call(tokenizer(f"{MODEL}.width", 32), *options, name="wider")
    assert code == 2 and printed.count("\n") == 1 and "runs/tok/export (tokenizer)" in printed


def test_a_number_of_batches_is_no_share_of_them() -> None:
    """Whichever order of the two types another package made `typing` remember."""

    def made(batches: float | int | None = None, share: float | int = 1) -> None: ...

    train.try_integers_first(made)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(made, "of")
    parsed = parser.parse_object({"of": {"batches": 1, "share": 1}}).of
    assert type(parsed.batches) is int and type(parsed.share) is int
    assert parser.parse_object({"of": {"batches": 0.5}}).of.batches == 0.5
    kinds = get_type_hints(L.Trainer.__init__)
    for name in ("limit_train_batches", "limit_val_batches", "overfit_batches"):
        assert get_args(kinds[name])[:2] == (int, float), name


def test_the_default_name_is_the_configs(call, tmp_path: Path) -> None:
    assert call(TOKENIZER, "--trainer.max_steps", "1", name=None)[0] == 0
    assert (tmp_path / "runs" / "run" / "export").is_dir()


@pytest.mark.parametrize(
    ("name", "teachers", "expected"),
    [
        ("retok", [], "retok"),
        ("retok", ["b", "a", "b"], "retok(teacher=a+b)"),
        ("retok(teacher=a)", ["a"], "retok(teacher=a)"),
    ],
)
def test_the_name_says_which_network_of_our_own_teaches(
    name: str, teachers: list[str], expected: str
) -> None:
    assert train.with_teachers(name, teachers) == expected


def test_a_stand_in_teaches_and_is_not_needed_afterwards(call) -> None:
    options: Any = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    facts = NetworkFacts("shapes-vit", "test_vit", 3, (16, 16), options=options, purpose="teacher")
    network = timm.create_model("test_vit", num_classes=3, **options)
    save_file(network.state_dict(), "teacher.safetensors", metadata=facts.to_metadata())
    small = {"width": 16, "depth": 1, "num_heads": 2}
    retok = {
        "class_path": "tessellar.tokenizers.retok.ReToK",
        "init_args": {
            "quantizer": TOKENIZER["model"]["init_args"]["tokenizer"]["init_args"]["quantizer"],
            **{
                "image_size": 16,
                "num_tokens": 8,
                "always": 2,
                "channels": 32,
                "multipliers": [1, 1],
                "z_channels": 8,
            },
            **{
                "encoder_size": small,
                "decoder_size": small,
                "semantic_dim": 16,
                "semantic_layer": 1,
            },
            "teacher": {
                "class_path": "tessellar.networks.vision.teacher",
                "init_args": {"weights": "teacher.safetensors"},
            },
        },
    }
    config = tokenizer(MODEL, retok)
    assert call(config)[0] == 0
    run_folder = Path("runs/tok(teacher=shapes-vit)")
    with open(run_folder / "metrics.csv") as file:
        assert any(row.get("train/semantic") for row in csv.DictReader(file))
    assert call(config, "--trainer.max_steps", "5", "--resume", "auto")[0] == 0
    Path("teacher.safetensors").unlink()
    back = tessellar.load(run_folder / "export")
    assert isinstance(back, ReToK) and back.teacher is None
    assert isinstance(tessellar.load(run_folder / "checkpoints" / "last.ckpt"), ReToK)
    code, error = call(config, name="again")
    assert (
        code != 0
        and "there are no weights teacher.safetensors" in error
        and "Traceback" not in error
    )
