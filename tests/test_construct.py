"""Configs of files: what they may build, and that nothing is made, opened or run before it is known to be wanted."""

import builtins
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import yaml
from PIL import Image
from safetensors.torch import save_file

import tessellar
from tessellar.checkpoints.export import export_tokenizer
from tessellar.cli import evaluate
from tessellar.errors import UserError
from tessellar.networks.facts import NetworkFacts
from tessellar.networks.timm_networks import OPTIONS
from tessellar.networks.vision import VisionModel
from tessellar.protocol.configured import build
from tessellar.text.conditioners import TEXT_CACHE, EncoderConditioner
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.scale_pyramid import ScalePyramid
from tessellar.tokenizers.vit_vq import ViTVQ

VIT_VQ, VISION = "tessellar.tokenizers.vit_vq.ViTVQ", "tessellar.networks.vision.VisionModel"


def config(path: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": path, "init_args": arguments}


class Code:
    """Unpickling this sets a variable."""

    def __reduce__(self):
        return exec, ("import builtins; builtins.MARK = 1",)


@pytest.fixture
def evil(tmp_path: Path) -> str:
    path = tmp_path / "README.md"
    path.write_bytes(pickle.dumps({"state_dict": Code()}))
    return str(path)


@pytest.fixture
def unopened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the networks that timm was asked to make: none, in these tests."""
    asked: list[str] = []
    monkeypatch.setattr(timm, "create_model", lambda name, **_: asked.append(name))
    yield asked
    assert asked == [] and not hasattr(builtins, "MARK")


def test_arguments_are_compared_before_any_is_made(evil: str, unopened: list[str]) -> None:
    inner = config(VISION, name="resnet18", options={"checkpoint_path": evil})
    with pytest.raises(UserError, match="no_such_argument"):
        build(config(VIT_VQ, quantizer=inner, image_size=16, no_such_argument=inner))
    for place in ("quantizer", "width"):  # takes another class, and no class at all
        with pytest.raises(UserError, match=rf"{place} of {VIT_VQ} must be a \w+, not {VISION}"):
            build(config(VIT_VQ, **{"quantizer": None, "image_size": 16, place: inner}))


@pytest.mark.parametrize(
    "option",
    [
        "checkpoint_path",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "pretrained",
        "cache_dir",
        "num_classes",
    ],
)
def test_options_of_a_network_describe_only_the_network(
    option: str, evil: str, unopened: list[str]
) -> None:
    assert option not in OPTIONS
    with pytest.raises(UserError, match=f"the options of resnet18 may not hold {option}"):
        build(config(VISION, name="resnet18", options={option: evil}))
    with pytest.raises(UserError, match=f"the options of resnet18 may not hold {option}"):
        VisionModel(
            "resnet18", options={option: evil}
        )  # a user's own config too: its export could not be read


def test_values_of_options_are_numbers_and_words(evil: str, unopened: list[str]) -> None:
    for value in (evil, [1], {"file": evil}, None):
        with pytest.raises(UserError, match="the option norm_layer of resnet18"):
            build(config(VISION, name="resnet18", options={"norm_layer": value}))


@pytest.mark.parametrize(
    "name", ["hf-hub:someone/else", "local-dir:/tmp", "timm/resnet18", "../resnet18", "hf_hub:a"]
)
def test_names_are_those_of_timm(name: str, unopened: list[str]) -> None:
    with pytest.raises(UserError, match="is not the name of a timm network"):
        build(config(VISION, name=name))


@pytest.mark.parametrize("weights", ["download", "/etc/hostname", "teacher.safetensors"])
def test_an_export_names_no_weights(weights: str, unopened: list[str]) -> None:
    with pytest.raises(UserError, match="only a run's own YAML may do that"):
        build(config(VISION, name="resnet18", weights=weights))


def test_an_export_names_no_tokenizer_by_path() -> None:
    with pytest.raises(
        UserError,
        match="names the tokenizer of ScalePyramid, someone/else; only a run's own YAML",
    ):
        build(config("tessellar.tokenizers.scale_pyramid.ScalePyramid", tokenizer="someone/else"))
    with pytest.raises(UserError, match="no local path|does not exist"):
        ScalePyramid("not-there.safetensors")  # the user's own config is followed


def test_an_export_chooses_no_folder_to_write_texts_to(tmp_path: Path) -> None:
    own = EncoderConditioner("google/flan-t5-xl", cache=str(tmp_path))
    assert own.features.folder == str(tmp_path)
    assert build(own.config).features.folder == TEXT_CACHE


def test_hostile_export_is_refused_in_one_line(
    evil: str, tmp_path: Path, unopened: list[str]
) -> None:
    folder = export_tokenizer(ViTVQ(VectorQuantizer(16, 4), 16, 4, 16, 1, 1, 2), tmp_path / "vq")
    content = yaml.safe_load((folder / "config.yaml").read_text())
    content["tokenizer"]["init_args"]["vision"] = config(
        VISION, name="resnet18", options={"checkpoint_path": evil}
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="vision") as error:
        tessellar.load(folder)
    assert "\n" not in str(error.value)


def test_a_network_that_measures_tells_no_path(
    evil: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unopened: list[str]
) -> None:
    """The options in the metadata of a file that is given as --extractor."""
    facts = NetworkFacts("n", "resnet10t", 3, (32, 32), options={"checkpoint_path": evil})
    save_file({}, tmp_path / "net.safetensors", metadata=facts.to_metadata())
    Image.new("RGB", (32, 32)).save(tmp_path / "x.png")
    monkeypatch.chdir(tmp_path)
    arguments = [
        "samples",
        str(tmp_path),
        "--reference",
        str(tmp_path),
        "--extractor",
        "net.safetensors",
    ]
    with pytest.raises(UserError, match="the options of resnet10t may not hold checkpoint_path"):
        evaluate.main([*arguments, "--metrics", "fd"])


def test_a_teacher_file_tells_no_path(evil: str, tmp_path: Path, unopened: list[str]) -> None:
    facts = NetworkFacts(
        "n", "resnet10t", 3, (32, 32), options={"pretrained_cfg": evil}, purpose="teacher"
    )
    save_file({}, tmp_path / "net.safetensors", metadata=facts.to_metadata())
    with pytest.raises(UserError, match="the options of resnet10t may not hold pretrained_cfg"):
        VisionModel(weights=str(tmp_path / "net.safetensors"))


def test_a_config_builds_only_what_its_place_takes() -> None:
    vq = VectorQuantizer(16, 4).config
    assert isinstance(build(vq), VectorQuantizer)
    with pytest.raises(
        UserError, match="must be a ViTVQ, not tessellar.tokenizers.quantizers.vq.VectorQuantizer"
    ):
        build(vq, ViTVQ)
    grouped = config("tessellar.tokenizers.quantizers.product_vq.ProductQuantizer", groups=[vq, vq])
    assert len(build(grouped).groups) == 2
    grouped["init_args"]["groups"][1] = config("tessellar.protocol.layout.Bits", n=3)
    with pytest.raises(
        UserError, match="groups of .* must be a Quantizer, not tessellar.protocol.layout.Bits"
    ):
        build(grouped)
