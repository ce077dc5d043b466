"""`tessellar.load`: checkpoints, the hub, fine-tuning, and every hostile or broken file refused in one line."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

import tessellar
from tessellar.callbacks.ema import EMA
from tessellar.checkpoints import reading as loading
from tessellar.checkpoints.card import Record
from tessellar.checkpoints.description import HEADER_KEY
from tessellar.checkpoints.export import export_generator, export_tokenizer
from tessellar.checkpoints.reading import (
    init_generator,
    init_tokenizer,
    load_tokenizer,
    read_source,
)
from tessellar.checkpoints.weights import fingerprint
from tessellar.errors import UserError
from tessellar.pipeline import ImageGenerator, load_generator
from tessellar.tokenizers.losses.discriminator import PatchGAN
from tessellar.tokenizers.losses.tokenizer_loss import TokenizerLoss
from tessellar.tokenizers.vit_vq import ViTVQ
from tessellar.training.generator_module import GeneratorModule
from tessellar.training.tokenizer_module import TokenizerModule

MakeTokenizer = Callable[..., ViTVQ]
MakeGenerator = Callable[..., ImageGenerator]


def checkpoint(module: L.LightningModule, path: Path, ema: EMA | None = None) -> Path:
    """As Lightning saves one of our training modules."""
    content: dict = {"state_dict": module.state_dict(), "global_step": 7, "callbacks": {}}
    if ema is not None:
        content["callbacks"] = {ema.state_key: ema.state_dict()}
    module.on_save_checkpoint(content)
    torch.save(content, path)
    return path


def averaged(module: nn.Module) -> EMA:
    """A callback whose average is twice the weights."""
    ema = EMA()
    ema.average = {
        name: t * 2 if t.is_floating_point() else t for name, t in module.state_dict().items()
    }
    return ema


def test_checkpoint_of_a_generator(tmp_path: Path, generator: MakeGenerator) -> None:
    ours = generator()
    module = GeneratorModule(ours.tokenizer, lambda _: ours.generator, ours.conditioner)
    plain = checkpoint(module, tmp_path / "plain.ckpt")
    assert read_source(plain).weights == "raw" and read_source(plain).record.steps == 7
    assert fingerprint(tessellar.load(plain)) == fingerprint(ours)
    both = checkpoint(module, tmp_path / "both.ckpt", averaged(ours.generator))
    assert read_source(both).weights == "ema" and read_source(both, raw=True).weights == "raw"
    loaded, raw = load_generator(both), load_generator(both, raw=True)
    assert fingerprint(raw) == fingerprint(ours)
    assert fingerprint(loaded.tokenizer) == fingerprint(ours.tokenizer)
    assert torch.equal(
        loaded.generator.state_dict()["norm.weight"], 2 * ours.generator.state_dict()["norm.weight"]
    )


def test_checkpoint_of_a_tokenizer(tmp_path: Path, tokenizer: MakeTokenizer) -> None:
    ours, critic = tokenizer(), PatchGAN(4, 1)
    module = TokenizerModule(ours, TokenizerLoss(perceptual_weight=0, discriminator=critic))
    path = checkpoint(module, tmp_path / "last.ckpt", averaged(ours))
    assert fingerprint(tessellar.load(path, raw=True)) == fingerprint(ours)
    loaded = load_tokenizer(path)
    assert torch.equal(loaded.state_dict()["smooth.weight"], 2 * ours.state_dict()["smooth.weight"])
    fresh = PatchGAN(4, 1)
    init_tokenizer(path, tokenizer(1), fresh)
    assert fingerprint(fresh) == fingerprint(critic)


def test_checkpoint_with_a_discriminator_that_cannot_be_rebuilt(
    tmp_path: Path, tokenizer: MakeTokenizer
) -> None:
    module = TokenizerModule(
        tokenizer(), TokenizerLoss(perceptual_weight=0, discriminator=nn.Conv2d(3, 1, 4))
    )
    source = read_source(checkpoint(module, tmp_path / "last.ckpt"))
    assert "discriminator" not in source.description and source.state("discriminator") == {}
    assert fingerprint(tessellar.load(source.where)) == fingerprint(tokenizer())


class Hostile:
    """Unpickling this would make a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_hostile_or_damaged_checkpoints_are_refused(
    tmp_path: Path, generator: MakeGenerator
) -> None:
    ours = generator()
    module = GeneratorModule(ours.tokenizer, lambda _: ours.generator, ours.conditioner)
    good = checkpoint(module, tmp_path / "good.ckpt")
    (tmp_path / "cut.ckpt").write_bytes(good.read_bytes()[:5000])
    with pytest.raises(UserError, match="cut.ckpt is truncated or not a torch file"):
        tessellar.load(tmp_path / "cut.ckpt")
    content = torch.load(good, weights_only=True)
    torch.save({**content, "extra": Hostile(tmp_path / "ran")}, tmp_path / "hostile.ckpt")
    with pytest.raises(UserError, match=r"hostile.ckpt holds code \(\w+\.mkdir\)"):
        tessellar.load(tmp_path / "hostile.ckpt")
    assert not (tmp_path / "ran").exists()
    torch.save({**content, HEADER_KEY: "{not json"}, tmp_path / "header.ckpt")
    with pytest.raises(UserError, match="header.ckpt: its description is not JSON"):
        tessellar.load(tmp_path / "header.ckpt")
    del content["state_dict"]["model.generator.norm.weight"]
    torch.save(content, tmp_path / "hole.ckpt")
    with pytest.raises(
        UserError, match=r"hole.ckpt \(generator\) does not fit LlamaGen: 1 missing: norm.weight"
    ):
        tessellar.load(tmp_path / "hole.ckpt")


def test_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(
        UserError, match="other.ckpt is not a checkpoint of this project's training"
    ):
        tessellar.load(tmp_path / "other.ckpt")


def edit_config(folder: Path, change: Callable[[dict], None]) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    change(config)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def edit_tensors(folder: Path, change: Callable[[dict], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "foreign class path": (
        lambda f: edit_config(f, lambda c: c["tokenizer"].update(class_path="subprocess.Popen")),
        "class path 'subprocess.Popen' is not from this package",
    ),
    "function instead of a class": (
        lambda f: edit_config(
            f, lambda c: c["tokenizer"].update(class_path="tessellar.protocol.configured.build")
        ),
        "is not something that a config may build",
    ),
    "another kind of class": (
        lambda f: edit_config(
            f,
            lambda c: c.update(
                tokenizer={
                    "class_path": "tessellar.protocol.condition.ClassConditioner",
                    "init_args": {"num_classes": 3},
                }
            ),
        ),
        "the tokenizer must be a Tokenizer, not tessellar.protocol.condition.ClassConditioner",
    ),
    "unknown argument": (
        lambda f: edit_config(f, lambda c: c["tokenizer"]["init_args"].update(widht=3)),
        "config of .*ViTVQ.*widht",
    ),
    "arguments that contradict": (
        lambda f: edit_config(f, lambda c: c["tokenizer"]["init_args"].update(patch_size=3)),
        "patch_size 3 does not divide",
    ),
    "newer format": (
        lambda f: edit_config(f, lambda c: c.update(format=99)),
        "format 99; this version reads format 1",
    ),
    "no description": (
        lambda f: (f / "config.yaml").write_text("- a\n- b\n"),
        "config.yaml does not describe a tessellar model",
    ),
    "config that is no YAML": (
        lambda f: (f / "config.yaml").write_text("a: [b"),
        "config.yaml is not YAML",
    ),
    "YAML that builds objects": (
        lambda f: (f / "config.yaml").write_text("!!python/object/apply:os.system ['true']"),
        "config.yaml is not YAML",
    ),
    "missing part": (
        lambda f: edit_config(f, lambda c: c.pop("tokenizer")),
        "describes a tokenizer without its tokenizer",
    ),
    "truncated weights": (
        lambda f: (f / "model.safetensors").write_bytes(
            (f / "model.safetensors").read_bytes()[:-40]
        ),
        "model.safetensors is truncated or not a safetensors file",
    ),
    "pickle under the name of safetensors": (
        lambda f: torch.save({"a": torch.zeros(1)}, f / "model.safetensors"),
        "model.safetensors is truncated or not a safetensors file",
    ),
    "missing key": (
        lambda f: edit_tensors(f, lambda t: t.pop("tokenizer.to_code.bias")),
        "does not fit ViTVQ: 1 missing: to_code.bias",
    ),
    "unknown key": (
        lambda f: edit_tensors(f, lambda t: t.update({"tokenizer.extra": torch.zeros(1)})),
        "1 unknown: extra",
    ),
    "tensor of no part": (
        lambda f: edit_tensors(f, lambda t: t.update({"optimizer.step": torch.zeros(1)})),
        "tensors of no part: 1 unknown: optimizer.step",
    ),
    "another shape": (
        lambda f: edit_tensors(f, lambda t: t.update({"tokenizer.to_code.bias": torch.zeros(5)})),
        r"1 of another shape: to_code.bias \(5,\) for \(4,\)",
    ),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        "is not an export: it needs config.yaml and model",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused(case: str, tmp_path: Path, tokenizer: MakeTokenizer) -> None:
    spoil, message = REFUSALS[case]
    folder = export_tokenizer(tokenizer(), tmp_path / "vq")
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        tessellar.load(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_name_that_is_nothing(tmp_path: Path, tokenizer: MakeTokenizer) -> None:
    for path in (tmp_path / "absent", tmp_path / "absent.safetensors"):
        with pytest.raises(UserError, match="absent.* does not exist"):
            tessellar.load(path)
    torch.save({}, tmp_path / "official.pt")
    with pytest.raises(UserError, match="convert.py import"):
        tessellar.load(tmp_path / "official.pt")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(UserError, match=r"did you mean .*last\.ckpt"):
        tessellar.load(tmp_path / "run")
    export_tokenizer(tokenizer(), tmp_path / "run" / "export")
    with pytest.raises(UserError, match=r"did you mean .*run/export\?"):
        tessellar.load(tmp_path / "run")


def test_kinds_are_not_confused(
    tmp_path: Path, tokenizer: MakeTokenizer, generator: MakeGenerator
) -> None:
    vq, llama = (
        export_tokenizer(tokenizer(), tmp_path / "vq"),
        export_generator(generator(), tmp_path / "llama"),
    )
    with pytest.raises(UserError, match="llama is a generator; a tokenizer is needed here"):
        load_tokenizer(llama)
    with pytest.raises(UserError, match="vq is a tokenizer; a generator is needed here"):
        load_generator(vq)
    with pytest.raises(UserError, match="vq is a tokenizer; a generator is needed here"):
        init_generator(vq, generator().generator)


def test_parts_of_two_models_do_not_make_one(
    tmp_path: Path, tokenizer: MakeTokenizer, generator: MakeGenerator
) -> None:
    folder = export_generator(generator(), tmp_path / "llama")
    other = export_tokenizer(tokenizer(vocab=32), tmp_path / "vq")
    wide = yaml.safe_load((other / "config.yaml").read_text())["tokenizer"]
    edit_config(folder, lambda c: c.update(tokenizer=wide))
    tensors = load_file(other / "model.safetensors")
    edit_tensors(folder, lambda t: t.update(tensors))
    with pytest.raises(UserError, match="the generator was built for"):
        tessellar.load(folder)


def test_averaged_export_has_no_raw_weights(tmp_path: Path, tokenizer: MakeTokenizer) -> None:
    folder = export_tokenizer(tokenizer(), tmp_path / "vq", record=Record(weights="ema"))
    with pytest.raises(UserError, match="holds averaged weights only"):
        tessellar.load(folder, raw=True)


def test_fine_tuning_without_a_discriminator_starts_a_fresh_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tokenizer: MakeTokenizer
) -> None:
    folder = export_tokenizer(tokenizer(0), tmp_path / "vq")
    target, critic = tokenizer(1), nn.Linear(2, 2)
    before = fingerprint(critic)
    with caplog.at_level(logging.INFO, loading.__name__):
        init_tokenizer(folder, target, critic)
    assert fingerprint(target) == fingerprint(tokenizer(0)) and fingerprint(critic) == before
    assert [r.message for r in caplog.records] == [
        f"{folder} has no discriminator: training starts with a fresh one"
    ]


def test_fine_tuning_takes_the_discriminator_along(
    tmp_path: Path, tokenizer: MakeTokenizer
) -> None:
    critic, fresh = tokenizer(5), tokenizer(6)
    folder = export_tokenizer(tokenizer(0), tmp_path / "vq", discriminator=critic)
    assert fingerprint(tessellar.load(folder)) == fingerprint(tokenizer(0))
    init_tokenizer(folder, tokenizer(1), fresh)
    assert fingerprint(fresh) == fingerprint(critic)


def test_fine_tuning_a_model_of_other_size_is_refused(
    tmp_path: Path, tokenizer: MakeTokenizer
) -> None:
    folder = export_tokenizer(tokenizer(), tmp_path / "vq")
    with pytest.raises(UserError, match="of another shape: quantizer.codebook.weight"):
        init_tokenizer(folder, tokenizer(vocab=32))


def test_fine_tuning_a_generator(tmp_path: Path, generator: MakeGenerator) -> None:
    folder = export_generator(generator(0), tmp_path / "llama")
    target = generator(1)
    init_generator(folder, target.generator)
    assert fingerprint(target.generator) == fingerprint(generator(0).generator)


def test_hub_id_fetches_only_an_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: MakeTokenizer
) -> None:
    folder = export_tokenizer(tokenizer(), tmp_path / "vq")
    calls = []

    def snapshot(repo: str, **options: object) -> str:
        calls.append((repo, options))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    assert fingerprint(tessellar.load("someone/vq@v2")) == fingerprint(tokenizer())
    files = ["config.yaml", "model.safetensors", "README.md"]
    assert calls == [("someone/vq", {"revision": "v2", "allow_patterns": files})]


def test_hub_that_cannot_be_reached_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot(*_: object, **__: object) -> str:
        raise OSError("We couldn't connect\nand a long explanation")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"someone/vq is no local path, and the hub .* \(We couldn't connect\)$"
    ):
        tessellar.load("someone/vq")


def test_a_mistyped_path_is_not_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(*_: object, **__: object) -> str:
        raise AssertionError("asked the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in ("runs/absent", "exports/x.ckpt", "a/b/c"):
        with pytest.raises(UserError, match="does not exist"):
            tessellar.load(path)
