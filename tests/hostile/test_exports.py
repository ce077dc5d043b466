"""Exports, checkpoints and network files as an attacker or a bad disk would leave them: one line each; no code is run,
no file, socket or unpickler is reached, and no memory is taken for what a few bytes ask for."""

import copy
import io
import json
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from tessellar.checkpoints.description import HEADER_KEY, checkpoint_header
from tessellar.checkpoints.export import export_tokenizer
from tessellar.cli import convert
from tessellar.cli.errors import run
from tessellar.errors import UserError
from tessellar.evaluation.networks.loading import load_extractor
from tessellar.evaluation.networks.timm_network import network_of
from tessellar.networks.facts import KEY, NetworkFacts
from tessellar.pipeline import load
from tessellar.plain_data import check_plain, parse_json, parse_yaml
from tessellar.protocol.configured import build
from tessellar.tensor_files import read_pickle, read_safetensors, write_safetensors
from tessellar.text.conditioners import EncoderConditioner
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ
from tests.hostile.attacks import refused, watched


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = ViTVQ(VectorQuantizer(16, 4), 16, 4, 16, 1, 1, 2).eval()
    folder = export_tokenizer(tokenizer, tmp_path_factory.mktemp("whole") / "vq")
    header = checkpoint_header({"tokenizer": tokenizer})
    state = {f"tokenizer.{name}": tensor for name, tensor in tokenizer.state_dict().items()}
    torch.save({HEADER_KEY: header, "state_dict": state, "global_step": 3}, folder / "x.ckpt")
    return folder


class Code:
    """Sets a variable when it is unpickled."""

    def __reduce__(self) -> Any:
        return exec, ("import builtins; builtins.MARK = 1",)


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """A pickle that holds code, called as a hub would bring it."""
    path = tmp_path / "README.md"
    path.write_bytes(pickle.dumps({"state_dict": Code()}))
    return path


def export_with(whole: Path, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy whose description is changed, in both places, under sound checksums."""
    config = yaml.safe_load((whole / "config.yaml").read_text())
    config = change(config) or config
    tensors, _ = read_safetensors(whole / "model.safetensors")
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    write_safetensors(tensors, folder / "model.safetensors", {HEADER_KEY: json.dumps(config)})
    return folder


def arguments(config: dict[str, Any]) -> dict[str, Any]:
    return config["tokenizer"]["init_args"]


def setting(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    def change(config: dict[str, Any]) -> None:
        node = arguments(config)
        *above, last = name.split(".")
        for key in above:
            node = node[key]["init_args"]
        node[last] = value

    return change


def replacing(path: str, given: Any) -> Callable[[dict[str, Any]], Any]:
    """The tokenizer is another class."""

    def change(config: dict[str, Any]) -> None:
        config["tokenizer"] = {"class_path": path, "init_args": given}

    return change


VISION = "tessellar.networks.vision.VisionModel"
NETWORK = {"class_path": VISION, "init_args": {"name": "test_resnet", "options": {}}}
LIMITS = "cannot be (built|made)|does not fit ViTVQ|numbers lie within|positions; there may be"
CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    # classes that are no parts of a model
    "os.system": (replacing("os.system", {}), "not from this package but from 'os'"),
    "eval": (replacing("builtins.eval", {}), "not from this package but from 'builtins'"),
    "torch.load": (replacing("torch.load", {}), "not from this package but from 'torch'"),
    "a function of ours": (
        replacing("tessellar.cli.errors.run", {}),
        "not something that a config may build",
    ),
    "a foreign class in our module": (
        replacing("tessellar.checkpoints.reading.Path", {}),
        "not something that a config may build",
    ),
    "a module in our module": (
        replacing("tessellar.checkpoints.reading.torch.load", {}),
        "does not exist in this version",
    ),
    "a dataclass that opens files": (
        replacing("tessellar.cli.evaluation_run.Measurement", {}),
        "must be a Tokenizer, not tessellar.cli",
    ),
    "a network as tokenizer": (replacing(VISION, {"name": "resnet18"}), "must be a Tokenizer"),
    "a path with a slash": (replacing("tessellar/x", {}), "is not the path of a class"),
    "a path that is empty": (replacing("", {}), "is not the path of a class"),
    "a path that is a list": (replacing(["os.system"], {}), "is not the path of a class"),  # type: ignore[arg-type]
    "a path of dots": (replacing("tessellar...ViTVQ", {}), "is not the path of a class"),
    # children where none belong, or of another kind
    "a child at an unknown argument": (
        setting("no_such_argument", NETWORK),
        "unexpected keyword argument 'no_such_argument'",
    ),
    "a child for a number": (setting("width", NETWORK), "width .*must be a int, not"),
    "a child of another kind": (setting("quantizer", NETWORK), "must be a Quantizer, not"),
    "a child in a list": (setting("width", [NETWORK]), "must be a plain value, not"),
    "no child": (setting("quantizer", None), LIMITS),
    "a text for a child": (setting("quantizer", "/etc/passwd"), LIMITS),
    # values
    "a negative width": (setting("width", -16), LIMITS),
    "no heads": (setting("num_heads", 0), LIMITS),
    "no patch": (setting("patch_size", 0), LIMITS),
    "width of 10^7": (setting("width", 10**7), LIMITS),
    "width of 10^12": (setting("width", 10**12), LIMITS),
    "a width that is a text": (setting("width", "16"), LIMITS),
    "a width that is a list": (setting("width", [16]), LIMITS),
    "a width that is a fraction": (setting("width", 16.5), LIMITS),
    "a width that is no number": (setting("width", float("nan")), LIMITS),
    "an infinite width": (setting("width", float("inf")), LIMITS),
    "a billion layers": (setting("encoder_depth", 10**9), LIMITS),
    "an image of 10^9 pixels a side": (setting("image_size", 10**9), LIMITS),
    "an image of 10^5 pixels a side": (setting("image_size", 10**5), LIMITS),
    "a vocabulary of 10^12": (setting("quantizer.vocab_size", 10**12), LIMITS),
    "a vocabulary of 10^9": (setting("quantizer.vocab_size", 10**9), LIMITS),
    "a negative vocabulary": (setting("quantizer.vocab_size", -1), LIMITS),
    "codes of no dimension": (setting("quantizer.dim", 0), LIMITS),
    "arguments that are none": (
        lambda config: config["tokenizer"].update(init_args=None),
        "init_args is a NoneType, not a mapping",
    ),
    "arguments that are a list": (
        lambda config: config["tokenizer"].update(init_args=[1]),
        "init_args is a list, not a mapping",
    ),
    "a part that is a text": (lambda config: config.update(tokenizer="x"), "is not a tokenizer"),
    "a part that is a list": (lambda config: config.update(tokenizer=[]), "is not a tokenizer"),
    # the description
    "a list": (lambda config: [config], "does not describe a tessellar model"),
    "of a newer format": (lambda config: config.update(format=99), "has format 99"),
    "of an unknown kind": (lambda config: config.update(kind="video"), "unknown kind"),
    "whose kind is a list": (lambda config: config.update(kind=["tokenizer"]), "unknown kind"),
    "of a generator without one": (
        lambda config: config.update(kind="generator"),
        "describes a generator without its generator, conditioner",
    ),
    "without a tokenizer": (
        lambda config: config.pop("tokenizer") and None,
        "unknown part|without its",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_hostile_config_is_one_line(whole: Path, tmp_path: Path, name: str) -> None:
    change, line = CONFIGS[name]
    folder = export_with(whole, tmp_path / "e", change)
    for path in (folder, folder / "model.safetensors"):
        refused(lambda path=path: load(path), line)


REACHING: dict[str, tuple[dict[str, Any], str]] = {
    "checkpoint_path": ({"options": {"checkpoint_path": "EVIL"}}, "may not hold checkpoint_path"),
    "pretrained_cfg": ({"options": {"pretrained_cfg": "EVIL"}}, "may not hold pretrained_cfg"),
    "pretrained": ({"options": {"pretrained": True}}, "may not hold pretrained"),
    "cache_dir": ({"options": {"cache_dir": "EVIL"}}, "may not hold cache_dir"),
    "weights": ({"weights": "EVIL"}, "names weights of a vision model"),
    "download": ({"weights": "download"}, "names weights of a vision model"),
    "a hub's name": ({"name": "hf-hub:someone/else"}, "is not the name of a timm network"),
    "a folder's name": ({"name": "local-dir:EVIL"}, "is not the name of a timm network"),
    "a path as name": ({"name": "../EVIL"}, "is not the name of a timm network"),
    "a path as option": ({"options": {"norm_layer": "EVIL/x"}}, "a plain word is needed"),
    "an option that holds options": ({"options": {"img_size": {"a": 1}}}, "a plain word is needed"),
    "options that are a list": ({"options": ["checkpoint_path"]}, "not a mapping|cannot be built"),
    "a network of 10^7 channels": ({"options": {"stem_width": 10**7}}, "cannot|far more"),
}


@pytest.mark.parametrize("name", REACHING)
def test_no_option_of_a_vision_model_reaches_a_file(evil: Path, name: str) -> None:
    """Where a config may hold one, and where it may not."""
    text = json.dumps({"name": "test_resnet", **REACHING[name][0]})
    given = json.loads(text.replace("EVIL", str(evil)))
    config = {"class_path": VISION, "init_args": given}
    refused(lambda: build(config), REACHING[name][1], evil)
    assert not hasattr(sys.modules["builtins"], "MARK")


def test_a_pyramids_tokenizer_is_no_path(whole: Path) -> None:
    path = "tessellar.tokenizers.scale_pyramid.ScalePyramid"
    config = {"class_path": path, "init_args": {"tokenizer": str(whole)}}
    refused(lambda: build(config), "names the tokenizer of ScalePyramid", whole)


@pytest.mark.parametrize("source", ["someone/else", "/an/encoder", "../x", "http://a/b"])
def test_an_exports_text_encoder_is_a_known_one(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = "tessellar.text.conditioners.EncoderConditioner"
    config = {"class_path": path, "init_args": {"source": source}}
    refused(lambda: build(config), "text encoder .*TESSELLAR_TEXT_ENCODERS")
    assert isinstance(EncoderConditioner(source), EncoderConditioner)  # a run's own YAML
    monkeypatch.setenv("TESSELLAR_TEXT_ENCODERS", f"other/one,{source}")
    assert isinstance(build(config), EncoderConditioner)


def test_known_text_encoders_need_no_word() -> None:
    path = "tessellar.text.conditioners.EncoderConditioner"
    config = {"class_path": path, "init_args": {"source": "google/flan-t5-xl"}}
    assert isinstance(build(config), EncoderConditioner)


# ---- YAML and JSON

LEVELS = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10))
MERGES = "\n".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 10))
TEXTS: dict[str, tuple[str, str]] = {
    "aliases that unfold": (f"a0: &a0 [1, 1]\n{LEVELS}", "more than 2000000 values"),
    "merge keys that unfold": (f"a0: &a0 {{b: 1}}\n{MERGES}", "merge keys .* are not read"),
    "an alias that holds itself": ("a: &a [*a]", "nested more than 64 deep, or holds itself"),
    "brackets": ("[" * 5000, "nested more than 64 deep"),
    "many brackets": ("[" * 200_000, "nested more than 64 deep"),
    "braces": ("{a: " * 5000, "nested more than 64 deep"),
    "dashes": ("- " * 5000 + "x", "nested more than 64 deep|is not YAML"),
    "a date that is none": ("a: 2001-13-45", "is not YAML .*month"),
    "a tag of Python": ("a: !!python/object/apply:os.system ['id']", "is not YAML"),
    "a key that is a list": ("? [a]\n: b", "is not YAML"),
    "a tab": ("a:\n\t- b", "is not YAML"),
    "an unknown alias": ("a: *nowhere", "is not YAML"),
    "a zero byte": ("a: \0", "is not YAML"),
    "two documents": ("a: 1\n---\nb: 2", "is not YAML"),
    "a key twice": ("a: 1\nb:\n  c: 1\na: 2", "yaml gives 'a' in line 1 and again in line 4"),
    "a key twice in a line": ("b: {c: 1, c: 2}", "yaml gives 'c' in line 1 and again in line 1"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_hostile_yaml_is_one_line(name: str, whole: Path, tmp_path: Path) -> None:
    text, line = TEXTS[name]
    refused(lambda: parse_yaml(text, "x.yaml"), line)
    folder = export_with(whole, tmp_path / "e", lambda config: None)
    (folder / "config.yaml").write_text(text)
    refused(lambda: load(folder), line)


JSON_TEXTS = {
    "brackets": ("[" * 100_000, "nested more than 64 deep"),
    "65 deep": ("[" * 65 + "]" * 65, "nested more than 64 deep"),
    "half": ('{"a": ', "is not JSON"),
    "a number of 5,000 digits": ("1" * 5000, "is not JSON"),
    "nothing": ("", "is not JSON"),
}


@pytest.mark.parametrize("name", JSON_TEXTS)
def test_hostile_json_is_one_line(name: str, whole: Path, tmp_path: Path) -> None:
    text, line = JSON_TEXTS[name]
    refused(lambda: parse_json(text, "x.json"), line)
    tensors, _ = read_safetensors(whole / "model.safetensors")
    write_safetensors(tensors, tmp_path / "x.safetensors", {HEADER_KEY: text})
    refused(lambda: load(tmp_path / "x.safetensors"), line)
    torch.save({HEADER_KEY: text, "state_dict": {}}, tmp_path / "x.ckpt")
    refused(lambda: load(tmp_path / "x.ckpt"), line)
    metadata = {KEY: text, "purpose": "evaluator"}
    save_file({"w": torch.zeros(1)}, tmp_path / "net.safetensors", metadata=metadata)
    refused(lambda: load_extractor(tmp_path / "net.safetensors"), line)


@settings(max_examples=30)
@given(st.text(max_size=60))
def test_any_text_is_plain_data_or_one_line(text: str) -> None:
    for parse in (parse_json, parse_yaml):
        try:
            check_plain(parse(text, "x"), "x")
        except UserError as error:
            assert str(error).startswith("x ") and "\n" not in str(error)


def test_texts_without_end_are_refused_before_they_are_read(monkeypatch) -> None:
    monkeypatch.setattr("tessellar.plain_data.MAX_BYTES", 10)
    refused(lambda: parse_json("[1, 2, 3, 4]", "x"), "x has more than 0 MB")


# ---- tensors


def poisoned(value: Any) -> Callable[[dict[str, Tensor]], Any]:
    def change(tensors: dict[str, Tensor]) -> None:
        name = "tokenizer.patch_in.weight"
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[3] = value

    return change


def cast(dtype: torch.dtype) -> Callable[[dict[str, Tensor]], Any]:
    def change(tensors: dict[str, Tensor]) -> None:
        name = "tokenizer.patch_in.weight"
        tensors[name] = tensors[name].to(dtype)

    return change


WEIGHTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "nan": (poisoned(float("nan")), "NaN or infinite weights; 1 of them: patch_in.weight"),
    "inf": (poisoned(float("inf")), "NaN or infinite weights; 1 of them: patch_in.weight"),
    "integers": (cast(torch.int64), "kind of numbers: patch_in.weight integer for real"),
    "bytes": (cast(torch.uint8), "kind of numbers: patch_in.weight integer for real"),
    "truths": (cast(torch.bool), "kind of numbers: patch_in.weight true or false for real"),
    "complex": (cast(torch.complex64), "kind of numbers: patch_in.weight complex for real"),
    "lost": (lambda t: t.__delitem__("tokenizer.patch_in.weight"), "1 missing: patch_in.weight"),
    "more": (lambda t: t.update({"tokenizer.x": torch.zeros(1)}), "1 unknown: x"),
    "of no part": (lambda t: t.update(x=torch.zeros(1)), "tensors of no part: 1 unknown: x"),
    "of another shape": (
        lambda t: t.update({"tokenizer.patch_in.weight": torch.zeros(3, 3)}),
        "of another shape: patch_in.weight",
    ),
    "none": (lambda t: t.clear(), "missing"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_wrong_weights_are_named(whole: Path, tmp_path: Path, name: str) -> None:
    change, line = WEIGHTS[name]
    tensors, metadata = read_safetensors(whole / "model.safetensors")
    change(tensors)
    write_safetensors(tensors, tmp_path / "x.safetensors", metadata)
    refused(lambda: load(tmp_path / "x.safetensors"), line)
    if name in ("nan", "inf", "integers", "complex", "lost"):
        content = torch.load(whole / "x.ckpt", weights_only=True)
        torch.save({**content, "state_dict": tensors}, tmp_path / "x.ckpt")
        refused(lambda: load(tmp_path / "x.ckpt"), line)


def test_weights_of_half_precision_are_taken(whole: Path, tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        tensors, metadata = read_safetensors(whole / "model.safetensors")
        cast(dtype)(tensors)
        write_safetensors(tensors, tmp_path / "x.safetensors", metadata)
        assert load(tmp_path / "x.safetensors").image_size == (16, 16)  # type: ignore[union-attr]


def header(text: bytes, size: int | None = None, values: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text) if size is None else size) + text + values


HEADERS: dict[str, bytes] = {
    "empty": b"",
    "text": b"hello, this is no file of tensors",
    "a header longer than the file": header(b"{}", 2**62),
    "a header of 100 MB that is not there": header(b"{}", 100_000_000),
    "brackets": header(b"[" * 100_000),
    "no header": header(b""),
    "a list": header(b"[]"),
    "offsets behind the end": header(b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'),
    "10^12 values": header(
        b'{"w":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'
    ),
    "a shape that is too large": header(
        b'{"w":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4]}}', values=bytes(4)
    ),
    "a shape that overflows": header(
        b'{"w":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,4]}}',
        values=bytes(4),
    ),
    "a negative side": header(
        b'{"w":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', values=bytes(4)
    ),
    "a type that nobody knows": header(
        b'{"w":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}', values=bytes(4)
    ),
    "overlapping tensors": header(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        values=bytes(4),
    ),
    "metadata of numbers": header(b'{"__metadata__":{"a":1}}'),
    "a header that is no UTF-8": header(b'{"\xff":1}'),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_hostile_safetensors_header_is_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(HEADERS[name])
    refused(lambda: load(path), "x.safetensors (is truncated or not a safetensors file|was not)")
    refused(lambda: load_extractor(path), "x.safetensors (is truncated|does not say)")


@settings(max_examples=40)
@given(data=st.data())
def test_a_flipped_bit_anywhere_in_the_values_or_the_header_is_noticed(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray((whole / "model.safetensors").read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.mktemp("flipped") / "x.safetensors"
    path.write_bytes(content)
    refused(lambda: load(path), "x.safetensors")


# ---- checkpoints


def repeated() -> Tensor:
    """A few bytes that claim to be 32 GB."""
    return torch.zeros(1).expand(8_000_000_000)


def circle() -> list[Any]:
    content: list[Any] = []
    content.append(content)
    return content


CONTENTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a list": (lambda c: [c], "is not a checkpoint of this project's training"),
    "a number": (lambda c: 7, "is not a checkpoint of this project's training"),
    "a list that holds itself": (lambda c: circle(), "is not a checkpoint of this project"),
    "without a header": (lambda c: c.pop(HEADER_KEY) and None, "does not describe its model"),
    "whose header is a number": (lambda c: c.update({HEADER_KEY: 7}), "is a int, not a JSON text"),
    "without weights": (lambda c: c.pop("state_dict") and None, "holds no weights"),
    "whose weights are a list": (lambda c: c.update(state_dict=[1]), "holds no weights"),
    "whose weights are texts": (
        lambda c: c.update(state_dict={name: "x" for name in c["state_dict"]}),
        "no plain tensors",
    ),
    "whose names are numbers": (
        lambda c: c.update(state_dict={1: torch.zeros(1)}),
        "names of its weights are no texts",
    ),
    "whose averages are a number": (
        lambda c: c.update(callbacks={"EMA": {"average": 7}}),
        "averages are a int",
    ),
    "whose averages are of other names": (
        lambda c: c.update(callbacks={"EMA": {"average": {"x": torch.zeros(1)}}}),
        "1 unknown: x",
    ),
    "whose data facts are a list": (lambda c: c.update(training_data=[1]), "cannot be read"),
    "whose data facts are numbers": (
        lambda c: c.update(
            training_data={"name": 1, "class_names": 2, "image_size": 3, "train": 4, "val": 5}
        ),
        "cannot be read|is not text",
    ),
    "of values that repeat": (lambda c: c.update(x=repeated()), "but only 4 bytes of it"),
    "of sparse weights": (
        lambda c: c["state_dict"].update(
            {"tokenizer.patch_in.weight": torch.zeros(16, 48).to_sparse()}
        ),
        "no plain tensors: patch_in.weight",
    ),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_a_hostile_checkpoint_is_one_line(whole: Path, tmp_path: Path, name: str) -> None:
    change, line = CONTENTS[name]
    content = copy.copy(torch.load(whole / "x.ckpt", weights_only=True))
    changed = change(content)
    torch.save(content if changed is None else changed, tmp_path / "x.ckpt")
    refused(lambda: load(tmp_path / "x.ckpt"), line)


def zip_of(**parts: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return stream.getvalue()


PICKLES: dict[str, tuple[Callable[[], bytes], str]] = {
    "code": (lambda: pickle.dumps({"state_dict": Code()}, protocol=2), "holds code"),
    "code of an old protocol": (lambda: pickle.dumps(Code(), protocol=0), "holds code|not a torch"),
    "a zip that is no torch file": (lambda: zip_of(a=b"b"), "is truncated or not a torch file"),
    "an empty zip": (lambda: zip_of(), "is truncated or not a torch file"),
    "half a zip": (lambda: zip_of(a=b"b" * 99)[:60], "is truncated or not a torch file"),
    "nothing": (lambda: b"", "is truncated or not a torch file"),
    "a memo that is not there": (lambda: b"\x80\x02h\x05.", "is truncated or not a torch file"),
    "a stack that is empty": (lambda: b"\x80\x02.", "is truncated or not a torch file"),
    "a long text that is not there": (
        lambda: b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b".",
        "is truncated or not a torch file",
    ),
}


@pytest.mark.parametrize("name", PICKLES)
def test_a_hostile_pickle_is_one_line(tmp_path: Path, name: str) -> None:
    content, line = PICKLES[name]
    path = tmp_path / "x.ckpt"
    path.write_bytes(content())
    with watched(), pytest.raises(UserError, match=line):
        load(path)
    with pytest.raises(UserError, match=line):
        read_pickle(path)
    assert not hasattr(sys.modules["builtins"], "MARK")


def test_a_flipped_bit_of_a_checkpoint_is_noticed_by_every_command(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    content = bytearray((whole / "x.ckpt").read_bytes())
    weight = torch.load(whole / "x.ckpt", weights_only=True)["state_dict"][
        "tokenizer.patch_in.weight"
    ]
    content[content.index(weight.numpy().tobytes()) + 3] ^= 0x40
    path = tmp_path / "flipped.ckpt"
    path.write_bytes(content)
    refused(lambda: load(path), "flipped.ckpt is damaged: its part .* does not have its checksum")
    for words in (["export", str(path), "--out", str(tmp_path / "out")], ["info", str(path)]):
        assert run(lambda words=words: convert.main(words)) == 2
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr().err.count("is damaged") == 2


# ---- network files

FACTS: dict[str, tuple[dict[str, Any], str]] = {
    "a path to a pickle": (
        {"options": {"checkpoint_path": "EVIL"}},
        "may not hold checkpoint_path",
    ),
    "a hub's name": ({"arch": "hf-hub:a/b"}, "is not the name of a timm network"),
    "an unknown name": ({"arch": "resnet9999"}, "timm cannot make 'resnet9999'"),
    "options that do not go together": (
        {"options": {"output_stride": 7}},
        "timm cannot make 'test_resnet'",
    ),
    "10^12 classes": ({"num_classes": 10**12}, "num_classes is 1000000000000"),
    "classes that are a text": ({"num_classes": "4"}, "num_classes is '4'"),
    "no image size": ({"image_size": []}, "image_size is .*it has 2 numbers"),
    "an image size of a text": ({"image_size": "32"}, "image_size is '32'"),
    "an image of 10^9 pixels a side": ({"image_size": [10**9, 32]}, "image_size is 1000000000"),
    "a standard deviation of 0": ({"std": [0, 1, 1]}, "std is 0"),
    "a mean that is no number": ({"mean": [float("nan"), 0, 0]}, "mean is nan"),
    "another resize": ({"resize": "lanczos"}, "resize is 'lanczos'"),
    "another purpose": ({"purpose": "fun"}, "purpose is 'fun'"),
    "a name that is a number": ({"name": 7}, "must be texts"),
    "class names that are a number": ({"class_names": 7}, "must be texts"),
    "a stem of 10^7 channels": ({"options": {"stem_width": 10**7}}, "far more|does not fit|cannot"),
}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> tuple[NetworkFacts, dict[str, Tensor]]:
    facts = NetworkFacts("tiny", "test_resnet", 4, (32, 32))
    return facts, network_of(facts).state_dict()


@pytest.mark.parametrize("name", FACTS)
def test_a_hostile_network_file_is_one_line(
    network: tuple[NetworkFacts, dict[str, Tensor]], tmp_path: Path, evil: Path, name: str
) -> None:
    change, line = FACTS[name]
    facts = json.loads(network[0].to_metadata()[KEY]) | change
    text = json.dumps(facts).replace("EVIL", str(evil))
    path = tmp_path / "net.safetensors"
    write_safetensors(network[1], path, {KEY: text, "purpose": "evaluator"})
    refused(lambda: load_extractor(path), line, evil)
    assert not hasattr(sys.modules["builtins"], "MARK")


@pytest.mark.parametrize("text", ["7", "[]", "null", '"x"', "{}", '{"name": "x"}'])
def test_network_metadata_of_another_kind_is_one_line(tmp_path: Path, text: str) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "net.safetensors", metadata={KEY: text})
    refused(
        lambda: load_extractor(tmp_path / "net.safetensors"), "the metadata of .*net.safetensors"
    )


def test_files_of_others_load_with_one_line_that_says_unchecked(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    load(whole)
    assert "checksum" not in caplog.text
    tensors, metadata = read_safetensors(whole / "model.safetensors")
    older = {HEADER_KEY: metadata[HEADER_KEY]}
    save_file(tensors, tmp_path / "x.safetensors", metadata=older)
    load(tmp_path / "x.safetensors")
    assert caplog.text.count("carries no checksum") == 1
