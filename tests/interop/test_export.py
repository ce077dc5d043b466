"""Exports: what goes in comes out, complete, readable, and never over somebody's files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

import tessellar
from tessellar.checkpoints.card import Record
from tessellar.checkpoints.description import HEADER_KEY
from tessellar.checkpoints.export import export_generator, export_tokenizer, flatten
from tessellar.checkpoints.reading import load_tokenizer
from tessellar.checkpoints.weights import fingerprint
from tessellar.errors import UserError
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.tokenizer import Quantizer
from tessellar.sampling.settings import Sampling
from tessellar.tensor_files import read_safetensors
from tessellar.tokenizers.vit_vq import ViTVQ

MakeTokenizer = Callable[..., ViTVQ]
MakeGenerator = Callable[..., ImageGenerator]


def images() -> torch.Tensor:
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_tokenizer_comes_back_equal(tmp_path: Path, tokenizer: MakeTokenizer) -> None:
    ours = tokenizer()
    folder = export_tokenizer(ours, tmp_path / "vq")
    for path in (folder, folder / "model.safetensors"):
        back = tessellar.load(path)
        assert isinstance(back, ViTVQ) and not back.training
        assert back.config == ours.config and fingerprint(back) == fingerprint(ours)
        assert torch.equal(back.decode(back.encode(images())), ours.decode(ours.encode(images())))


def test_generator_comes_back_complete(tmp_path: Path, generator: MakeGenerator) -> None:
    ours = generator()
    folder = export_generator(ours, tmp_path / "llama")
    (tmp_path / "alone").mkdir()
    single = (folder / "model.safetensors").rename(tmp_path / "alone" / "any_name.safetensors")
    back = tessellar.load(single)
    assert isinstance(back, ImageGenerator) and fingerprint(back) == fingerprint(ours)
    condition = ours.class_condition([0, 2])
    assert torch.equal(
        back.sample(condition, Sampling(), seeds=[4, 5]),
        ours.sample(condition, Sampling(), seeds=[4, 5]),
    )


def test_export_is_readable_by_people_and_hubs(tmp_path: Path, generator: MakeGenerator) -> None:
    record = Record(
        title="Small", weights="ema", license="cc-by-4.0", data="shapes", metrics={"rFD(x)": 1.25}
    )
    folder = export_generator(generator(), tmp_path / "small", record=record)
    text = (folder / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "tessellar" and front["license"] == "cc-by-4.0"
    assert front["pipeline_tag"] == "unconditional-image-generation" and front["metrics"] == [
        "rFD(x)"
    ]
    assert "# Small" in text and "| rFD(x) | 1.25 |" in text and "8 x 8" in text
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["kind"] == "generator" and config["record"]["data"] == "shapes"
    _, metadata = read_safetensors(folder / "model.safetensors")
    assert json.loads(metadata[HEADER_KEY]) == config
    assert {p.name for p in folder.iterdir()} == {"README.md", "config.yaml", "model.safetensors"}
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


def test_what_is_not_an_export_is_never_replaced(tmp_path: Path, tokenizer: MakeTokenizer) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="thesis is not empty and holds no model.safetensors"):
            export_tokenizer(tokenizer(), tmp_path / "thesis", overwrite=overwrite)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "precious"


def test_an_export_is_replaced_only_when_told(tmp_path: Path, tokenizer: MakeTokenizer) -> None:
    folder = export_tokenizer(tokenizer(0), tmp_path / "vq")
    with pytest.raises(UserError, match="--overwrite"):
        export_tokenizer(tokenizer(1), folder)
    assert fingerprint(load_tokenizer(folder)) == fingerprint(tokenizer(0))
    export_tokenizer(tokenizer(1), folder, overwrite=True)
    assert fingerprint(load_tokenizer(folder)) == fingerprint(tokenizer(1))
    assert [p.name for p in tmp_path.iterdir()] == ["vq"]


def test_an_export_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: MakeTokenizer
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("tessellar.checkpoints.export.write_safetensors", fail)
    with pytest.raises(OSError, match="disk full"):
        export_tokenizer(tokenizer(), tmp_path / "vq")
    assert list(tmp_path.iterdir()) == []


def test_a_discriminator_that_cannot_be_rebuilt_is_left_out(
    tmp_path: Path, tokenizer: MakeTokenizer
) -> None:
    folder = export_tokenizer(tokenizer(), tmp_path / "vq", discriminator=nn.Conv2d(3, 1, 4))
    assert fingerprint(tessellar.load(folder)) == fingerprint(tokenizer())


class Twins(Quantizer):
    """Only to give a module two names for one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.second = self.first
        self.register_buffer("view", torch.arange(12.0).view(3, 4)[:, :2])

    def forward(self, z):  # type: ignore[override]
        return z

    encode = decode = forward  # type: ignore[assignment]


def test_shared_and_strided_tensors_are_written(tmp_path: Path) -> None:
    flat = flatten({"x": Twins()})
    save_file(flat, tmp_path / "twins.safetensors")
    back = load_file(tmp_path / "twins.safetensors")
    assert torch.equal(back["x.view"], torch.tensor([[0.0, 1], [4, 5], [8, 9]]))
    assert torch.equal(back["x.first.weight"], back["x.second.weight"])
