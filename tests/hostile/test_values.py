"""Values that no command can take, for every command: one line, exit code 2, and nothing written."""

import contextlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from tessellar.checkpoints.export import export_generator, export_tokenizer
from tessellar.cli import convert, evaluate, sample, train
from tessellar.cli.errors import run
from tessellar.data.imagenet import DEVKIT_CLASSES, DEVKIT_TRUTH, read_labels
from tessellar.errors import UserError
from tessellar.evaluation.networks.timm_network import network_of
from tessellar.evaluation.text_to_image import read_lines
from tessellar.models.llamagen import LlamaGen
from tessellar.networks.facts import NetworkFacts
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.condition import ClassConditioner
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ

COMMANDS: dict[str, Callable[[Any], Any]] = {
    "train": train.main,
    "sample": sample.main,
    "evaluate": evaluate.main,
    "convert": convert.main,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, a generator of three classes, a network, samples and statistics."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = ViTVQ(VectorQuantizer(16, 4), 8, 4, 16, 1, 1, 2)
    generator = LlamaGen(tokenizer.layout, 16, 1, 2, num_classes=3, ffn_multiple_of=8)
    nn.init.normal_(generator.output.weight, std=0.5)
    export_tokenizer(tokenizer, folder / "tok")
    export_generator(ImageGenerator(tokenizer, generator, ClassConditioner(3)), folder / "gen")
    facts = NetworkFacts("tiny", "test_resnet", 4, (32, 32))
    network = network_of(facts)
    save_file(network.state_dict(), folder / "net.safetensors", metadata=facts.to_metadata())
    pixels = np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), dtype=np.uint8)
    np.savez(folder / "set.npz", pixels)
    np.savez(folder / "ref.npz", mu=np.zeros(96), sigma=np.eye(96))
    Image.fromarray(pixels[0, :8, :8]).save(folder / "img.png")
    (folder / "prompts.txt").write_text("a circle\n")
    (folder / "nan.json").write_text('{"metrics": {"FID": NaN}}')
    (folder / "recording").mkdir()
    for pipe in ("pipe", "pipe.tar", "recording/meta.json"):
        os.mkfifo(folder / pipe)
    torch.save([1], folder / "list.ckpt")
    torch.save({"state_dict": {}}, folder / "bare.ckpt")
    torch.save({"state_dict": {}, "global_step": "x"}, folder / "text.ckpt")
    torch.save({"state_dict": Path("x")}, folder / "code.ckpt")
    (folder / "zip.ckpt").write_bytes((folder / "ref.npz").read_bytes())
    return folder


def files(folder: Path) -> list[str]:
    """Names, with a mark on pipes: a file in the place of one is another thing."""
    found = []
    for path in sorted(folder.rglob("*")):
        mark = " (pipe)" if path.is_fifo() else ""
        found.append(f"{path.relative_to(folder)}{mark}")
    return found


def said(command: str, words: list[str]) -> tuple[int, list[str]]:
    """Exit code and the lines on stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(lambda: COMMANDS[command](words))
    return code, err.getvalue().splitlines()


SAMPLE: dict[str, str] = {
    "--guidance.scale .nan": "guidance scale is nan",
    "--guidance.scale .inf": "guidance scale is inf",
    "--guidance.scale 1e308": "guidance scale is 1e.308; it must be a finite number in",
    "--guidance.scale x": "guidance",
    "--guidance Linear --guidance.start .nan": "guidance start is nan",
    "--guidance PowerCosine --guidance.power -1": "guidance power is -1",
    "--choice.temperature .nan": "temperature is nan",
    "--choice.temperature .inf": "temperature is inf",
    "--choice.temperature -1": "temperature is -1",
    "--choice.temperature 1e-300": "temperature is 1e-300; it must be 0, which is greedy, or at",
    "--choice.top_p 0": "top_p is 0",
    "--choice.top_p .nan": "top_p is nan",
    "--choice.top_k -1": "top_k is -1",
    "--choice.min_p 1": "min_p is 1",
    "--classes 0-1000000000": "class id 1000000000 does not exist; classes are 0 to 2",
    "--classes 1180591620717411303424": "class id 1180591620717411303424 does not exist",
    "--classes 3": "class id 3 does not exist; classes are 0 to 2",
    "--classes -1": "classes|class",
    "--classes 2-1": "2-1 of classes ends before it begins",
    "--classes 0,,1": "is not a class id",
    "--classes all,1": "is not a class id",
    "--classes x": "is not a class id",
    "--seed 18446744073709551615": "seed is 18446744073709551615",
    "--seed 9223372036854775807": "seed is 9223372036854775807",
    "--seed -1": "seed is -1",
    "--seed 0.5": "seed",
    "--count 0": "0 images were asked for",
    "--count -3": "-3 images were asked for",
    "--count 1000000000000": "1000000000000 images were asked for",
    "--per-class 100000000": "300000000 images were asked for",
    "--count 2 --per-class 2": "give either --count or --per-class",
    "--batch-size 0": "batch size is 0",
    "--batch-size -1": "batch size is -1",
    "--device meta": "device 'meta' holds no values",
    "--device cpu:x": "device 'cpu:x' is not available here",
    "--device cuda:99": "device 'cuda:99' is not available here",
    "--device x": "device 'x' is not available here",
    "--precision float16": "precision",
    "--algorithm SpeculativeJacobi --algorithm.window 0": "window",
    "--algorithm SpeculativeJacobi --algorithm.window 1000000000000": "window",
    "--algorithm Magic": "Magic",
    "--algorithm DraftModel --algorithm.model nowhere": "nowhere does not exist",
    "--flow.steps 0": "steps",
    "--flow.steps 1000000000000": "steps",
    "--diffusion.steps 0": "steps",
    "--diffusion.steps 1001": "steps",
    "--search Beam --search.width 0": "error: width of Beam is 0; it must be an integer in .*]$",
    "--search Beam --search.candidates 1000000000000": "error: candidates of Beam is 1000000000000",
    "--search BestOfN --search.count 1000000000000": "error: count of BestOfN is 1000000000000",
    "--search Beam --search.schedule.base .nan": "error: base of the schedule is nan",
    "--image {tiny}/img.png --edit Outpaint --edit.left .nan": "error: left of Outpaint is nan",
    "--image {tiny}/pipe --edit Continue": "pipe is a pipe or a device, not a file",
    "--image {tiny}/img.png --mask {tiny}/pipe": "pipe is a pipe or a device, not a file",
    "--image {tiny}/img.png --edit Interpolate": "error: Interpolate needs a second class",
    "--image {tiny}/img.png --edit Swap --other {tiny}/img.png --edit.keep 9": "keep is 9; a picture",
    "--count 2 --shard=": "--shard '': shards are 1/4",
    "--count 2 --shard 3/2": "--shard '3/2': shards are 1/4",
    "--prompts {tiny}/prompts.txt": "needs a generator that is conditioned on text",
    "--package os.path.join": "package",
    "--package ../x": "is not the name of a package",
    "--config {tiny}/pipe": "pipe is a pipe or a device, not a file",
    "--overwrite --out {tiny}": "holds no samples.json, so it is never replaced",
    "--out {tiny}/set.npz": "exists and is not a folder",
    "--out {tiny}/set.npz/x": "set.npz",
    "--out a\0b": "holds a zero byte",
    "--out a\udcffb": "is not UTF-8",
    "--no-such-option 1": "no.such.option",
}
IMAGES = "samples {tiny}/set.npz --reference {tiny}/ref.npz --extractor {tiny}/net.safetensors"
MODEL = "model {tiny}/gen --reference {tiny}/ref.npz --extractor {tiny}/net.safetensors"
EVALUATE: dict[str, str] = {
    f"{IMAGES} --batch-size 0": "batch_size is 0",
    f"{IMAGES} --batch-size 1000000000000": "batch_size is 1000000000000",
    f"{IMAGES} --metrics fad": "fad",
    f"{IMAGES} --metrics accuracy": "label|class",
    f"{IMAGES} --metrics paired": "original",
    f"{IMAGES} --metrics kid": "features",
    f"{IMAGES} --protocol x": "x",
    f"{IMAGES} --protocol adm-50k": "adm-50k",
    f"{IMAGES} --device meta": "holds no values",
    f"{IMAGES} --out {{tiny}}": "is a folder; name a file",
    f"{IMAGES} --out {{tiny}}/pipe": "pipe is a pipe or a device, not a file",
    "stats {tiny}/set.npz --extractor {tiny}/net.safetensors --out {tiny}/pipe": (
        "pipe is a pipe or a device, not a file"
    ),
    f"{IMAGES} --config {{tiny}}/pipe": "pipe is a pipe or a device, not a file",
    f"{IMAGES} --out {{tiny}}/set.npz/x.json": "is a file, not a folder",
    f"{IMAGES} --network.name x --network.arch resnet9999 --network.num_classes 4 "
    "--network.image_size [32,32]": "timm cannot make 'resnet9999'",
    f"{IMAGES} --network.name x --network.arch test_resnet --network.num_classes -4 "
    "--network.image_size [32,32]": "num_classes is -4",
    f"{IMAGES} --network.name x --network.arch test_resnet --network.num_classes 4 "
    "--network.image_size [0,32]": "image_size is 0",
    "samples {tiny}/nowhere": "nowhere",
    "samples {tiny}/prompts.txt": "neither a folder of images nor an npz file",
    "samples {tiny}/set.npz --extractor {tiny}/nowhere.safetensors": "nowhere.safetensors does not",
    "samples {tiny}/set.npz --extractor {tiny}/gen/model.safetensors": "does not say what network",
    "samples {tiny}/set.npz --extractor {tiny}": "is a folder, not a file",
    "samples a\0b": "holds a zero byte",
    f"{MODEL} --count 0": "count is 0",
    f"{MODEL} --count -1": "count is -1",
    f"{MODEL} --count 1000000000000": "count is 1000000000000",
    f"{MODEL} --count 4 --seed -1": "seed is -1",
    f"{MODEL} --count 4 --seed 9223372036854775807": "seed is 9223372036854775807",
    f"{MODEL} --count 4 --guidance.scale .nan": "guidance scale is nan",
    f"{MODEL} --count 4 --choice.temperature .inf": "temperature is inf",
    f"{MODEL}": "say how many samples",
    "model {tiny}/gen --count 4": "inception|Inception|name",
    "model {tiny}/nowhere --extractor {tiny}/net.safetensors": "nowhere",
    "stats {tiny}/set.npz --extractor {tiny}/net.safetensors": "say where to write",
    "stats {tiny}/set.npz --extractor {tiny}/net.safetensors --out {tiny}": "is a folder",
    "stats {tiny} --size 0 --extractor {tiny}/net.safetensors --out x.npz": "size is 0",
    "stats {tiny} --size 100000 --extractor {tiny}/net.safetensors --out x.npz": "size is 100000",
    "stats train --extractor {tiny}/net.safetensors --out x.npz": "is a split of a data set",
    "stats train --data tessellar.data.ShapesData --count 0 "
    "--extractor {tiny}/net.safetensors --out x.npz": "count is 0",
    "stats train --data tessellar.data.ShapesData --data.length -5 "
    "--extractor {tiny}/net.safetensors --out x.npz": "length",
    "stats train --data tessellar.data.ShapesData --data.seed -5 "
    "--extractor {tiny}/net.safetensors --out x.npz": "seed",
    "stats train --data os.path --extractor {tiny}/net.safetensors --out x.npz": "data|os",
    "neighbours {tiny}/set.npz --data tessellar.data.ShapesData --count 0": "count is 0",
    "neighbours {tiny}/set.npz --data tessellar.data.ShapesData --nearest 0": "nearest is 0",
    "neighbours {tiny}/set.npz": "is a split of a data set",
    "extractor --out x.safetensors": "say what to train on",
    "extractor --data tessellar.data.ShapesData --out x.pth": "say what to train on",
    "extractor --data tessellar.data.ShapesData --out x.safetensors --recipe.lr .nan": "lr is nan",
    "extractor --data tessellar.data.ShapesData --out x.safetensors --recipe.epochs 0": "epochs",
    "extractor --data tessellar.data.ShapesData --out x.safetensors --architecture.arch x/y": (
        "is not the name of a timm network"
    ),
    "extractor --data tessellar.data.ShapesData --out x.safetensors "
    '--architecture.options {{"checkpoint_path":"x"}}': "may not hold checkpoint_path",
    "sweep {tiny}/gen --reference {tiny}/ref.npz --extractor {tiny}/net.safetensors "
    "--count 4 --choice.top_k 1 -1": "top_k is -1",
    "compare {tiny}/pipe {tiny}/pipe": "pipe is a pipe or a device, not a file",
    "compare {tiny}/prompts.txt {tiny}/prompts.txt": "prompts.txt is not JSON",
    "compare {tiny} {tiny}": "cannot be read",
    "compare": "arguments are required|a",
    "": "subcommand|command|expected",
    "measure": "measure|invalid",
}
CONVERT: dict[str, str] = {
    "info {tiny}/nowhere": "does not exist",
    "info {tiny}/prompts.txt": "is none of: export folder",
    "info {tiny}": "is not an export",
    "info http://a/b": "is none of|does not exist|is no local path",
    "info a\0b": "holds a zero byte",
    "export {tiny}/gen": "say where to write",
    "export {tiny}/gen --out {tiny}/tok": "exists; choose another --out",
    "export {tiny}/gen --out {tiny} --overwrite": "so it is never replaced",
    "export {tiny}/gen --out x --discriminator": "has no discriminator",
    "export {tiny}/gen --out x --metrics {tiny}/prompts.txt": "is not",
    "export {tiny}/set.npz --out x": "is none of: export folder",
    "import llamagen {tiny}/set.npz --out x": "set.npz",
    "import nobody {tiny}/set.npz --out x": "nobody",
    "import llamagen {tiny}/gen/model.safetensors --out x --image-size -1": "image-size is -1",
    "import llamagen {tiny}/gen/model.safetensors --out x --num-heads 0": "num-heads is 0",
    "import llamagen {tiny}/gen/model.safetensors --out x --key y": "key|y",
    "import llamagen {tiny}/gen/model.safetensors --out x": "model.safetensors",
    "cache {tiny}/tok --out x": "say what to encode",
    "cache {tiny}/tok --data tessellar.data.ShapesData": "say where to write",
    "cache {tiny}/tok --data tessellar.data.ShapesData --out x --batch-size 0": "batch-size is 0",
    "cache {tiny}/tok --data tessellar.data.ShapesData --out x --device meta": "holds no values",
    "cache {tiny}/tok --data tessellar.data.ShapesData --out x --parts test": "test",
    "cache {tiny}/tok --data tessellar.data.ShapesData --data.size 0 --out x": "size",
    "cache {tiny}/tok --data tessellar.data.Nothing --out x": "Nothing",
    "scale {tiny}/tok --data tessellar.data.ShapesData --out x --count 0": "count is 0",
    "scale {tiny}/tok --data tessellar.data.ShapesData --out x --batch-size -1": "batch-size is -1",
    "scale {tiny}/tok --data tessellar.data.ShapesData --data.size 8 --out x": "continuous|scale",
    "scale {tiny}/gen --data tessellar.data.ShapesData --out x": "is a generator",
    "record {tiny}/tok --out x --count 0": "count is 0",
    "record {tiny}/tok --out x --seed -1": "seed is -1",
    "record {tiny}/tok --out x --seed 1180591620717411303424": "seed is 1180591620717411303424",
    "record os.system --out x": "is of the package 'os'",
    "record {tiny}/tok --out x --system ../x": "--system is '../x'",
    "scale {tiny}/tok --out x --data tessellar.data.ImageFolderData --data.root {tiny} "
    "--data.size 8 --data.val_share .nan": "error: val_share of ImageFolderData is nan",
    "export {tiny}/gen --out x --metrics {tiny}/pipe": "pipe is a pipe or a device, not a file",
    "export {tiny}/gen --out x --metrics {tiny}/nan.json": "FID of .*nan.json is nan",
    "verify {tiny}/recording": "meta.json is a pipe or a device, not a file",
    "cache {tiny}/tok --out x --data tessellar.data.WebDatasetData --data.size 8 "
    "--data.shards {tiny}/pipe.tar": "pipe.tar is a pipe or a device, not a file",
    "verify {tiny}": "is not a folder of recorded outputs",
    "verify {tiny}/nowhere": "is not a folder of recorded outputs",
}
RUN = "--config run.yaml --name x"
TRAIN: dict[str, str] = {
    "": "give a config",
    "run.yaml": "error: run.yaml is a config: tessellar train --config run.yaml",
    "--config nowhere.yaml": "nowhere.yaml",
    "--config {tiny}": "tiny|folder|file",
    f"{RUN} --log_every 0": "log_every",
    f"{RUN} --save_every -1": "save_every",
    f"{RUN} --ema 1.5": "ema|decay",
    f"{RUN} --ema .nan": "ema|decay",
    f"{RUN} --best_mode least": "best_mode",
    f"{RUN} --wandb a/b": "wandb",
    f"{RUN} --resume nowhere.ckpt": "nowhere.ckpt",
    f"{RUN} --resume {{tiny}}/list.ckpt": "list.ckpt holds a list, not a checkpoint",
    f"{RUN} --resume {{tiny}}/bare.ckpt": "its global_step is missing",
    f"{RUN} --resume {{tiny}}/text.ckpt": "its global_step is a str",
    f"{RUN} --resume {{tiny}}/code.ckpt": "holds more than tensors|holds code",
    f"{RUN} --resume {{tiny}}/zip.ckpt": "zip.ckpt",
    f"{RUN} --resume {{tiny}}": "tiny|folder",
    f"{RUN} --model.init_args.init_from {{tiny}}/list.ckpt": "list.ckpt is not a checkpoint",
    f"{RUN} --model.init_args.init_from {{tiny}}/code.ckpt": "holds code",
    f"{RUN} --trainer.max_steps -5": "max_steps",
    f"{RUN} --trainer.devices 77": "trainer.devices is 77: that many processes",
    f"{RUN} --trainer.devices -1": "devices|accelerator",
    f"{RUN} --trainer.devices 0": "devices|accelerator",
    f"{RUN} --trainer.precision 8": "precision",
    f"{RUN} --model.optimizer.lr .nan": "lr is nan",
    f"{RUN} --model.optimizer.lr .inf": "lr is inf",
    f"{RUN} --model.optimizer.lr -1": "lr is -1",
    f"{RUN} --model.optimizer.name adamx": "adamx",
    f"{RUN} --model.schedule.warmup -3": "warmup is -3",
    f"{RUN} --model.accumulate 0": "accumulate",
    f"{RUN} --model.tokenizer.init_args.width 0": "width",
    f"{RUN} --model.tokenizer.init_args.num_heads 0": "num_heads|heads",
    f"{RUN} --model.tokenizer.init_args.num_heads 3": "heads",
    f"{RUN} --model.tokenizer.init_args.patch_size 0": "patch_size",
    f"{RUN} --model.tokenizer.init_args.encoder_depth -1": "depth",
    f"{RUN} --model.tokenizer.init_args.quantizer.init_args.vocab_size 0": "vocab_size",
    f"{RUN} --model.tokenizer.init_args.quantizer.init_args.dim 0": "dim",
    f"{RUN} --data.init_args.length -5": "length is -5",
    f"{RUN} --data.init_args.length 0": "length is 0",
    f"{RUN} --data.init_args.val_length 0": "val_length is 0",
    f"{RUN} --data.init_args.size 0": "size",
    f"{RUN} --data.init_args.size -8": "size",
    f"{RUN} --data.init_args.batch_size 0": "batch_size is 0",
    f"{RUN} --data.init_args.batch_size 10000000": "batch",
    f"{RUN} --data.init_args.num_workers -1": "num_workers",
    f"{RUN} --data.init_args.seed -1": "seed",
    f"{RUN} --data.init_args.seed 1180591620717411303424": "seed",
    f"{RUN} --seed_everything -7": "seed",
    f"{RUN} --seed_everything 1180591620717411303424": "seed",
    f"{RUN} --sampling.choice.temperature .nan": "temperature is nan",
    f"{RUN} --sampling.guidance.scale .inf": "guidance scale is inf",
    "--config run.yaml --name a\0b": "holds a zero byte",
    "--config run.yaml --name a\udcffb": "is not UTF-8",
    "--config run.yaml --name ../x": "must be a plain folder name",
    "--config run.yaml --name .": "must be a plain folder name",
    "--config brackets.yaml --name x": "nested more than 64 deep",
    "--config zero.yaml --name x": "default_root_dir is .*which holds a zero byte",
    "--config list.yaml --name x": "a config is a mapping",
    "--config bytes.yaml --name x": "bytes.yaml",
    "--config none.yaml --name x": "model: class_path missing",
    "--config {tiny}/pipe --name x": "pipe: there is no such file",
    "--config twice.yaml --name x": "twice.yaml gives 'max_steps' in line 2 and again in line 3",
    f"{RUN} --data.class_path tessellar.data.ImageFolderData --data.init_args.root "
    "{tiny}/nowhere --data.init_args.size 16": "nowhere is not a folder",
    f"{RUN} --data.class_path tessellar.data.WebDatasetData --data.init_args.shards "
    "{tiny}/set.npz --data.init_args.size 16": "set.npz",
    f"{RUN} --data.class_path tessellar.data.CachedTokensData --data.init_args.root {{tiny}}": (
        "tokens|cache"
    ),
}
TABLES = {
    "sample": {f"{{tiny}}/gen {words}": line for words, line in SAMPLE.items()},
    "evaluate": EVALUATE,
    "convert": CONVERT,
    "train": TRAIN,
}
EVERY = {"sample": 1, "evaluate": 2, "convert": 1, "train": 4}
"""Of a table, every so manyth is quick enough for `make test`; `make check` tries all of them."""


def cases() -> list[Any]:
    found = []
    for command, table in TABLES.items():
        for number, (words, line) in enumerate(table.items()):
            marks = [pytest.mark.long] if number % EVERY[command] else []
            name = f"{command} {words}".replace("\0", "0")
            found.append(pytest.param(command, words, line, marks=marks, id=name))
    return found


@pytest.mark.parametrize("command, words, line", cases())
def test_a_value_that_cannot_be_is_one_line(
    config: dict[str, Any],
    folder: Path,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    words: str,
    line: str,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(folder / "hub"))
    if command == "train":
        (folder / "run.yaml").write_text(json.dumps(config))
        (folder / "brackets.yaml").write_text("[" * 5000)
        (folder / "zero.yaml").write_text('trainer: {default_root_dir: "a\\0b"}')
        (folder / "list.yaml").write_text("[1]")
        (folder / "none.yaml").write_text(json.dumps({**config, "model": {"class_path": None}}))
        (folder / "twice.yaml").write_text("trainer:\n  max_steps: 1\n  max_steps: 2\n")
        (folder / "bytes.yaml").write_bytes(b"\xff\xfe\0x")
    before, theirs = files(folder), files(tiny)
    code, lines = said(command, [word.format(tiny=tiny) for word in words.split(" ") if word])
    lines = [text for text in lines if not text.startswith(("usage:", "warning"))]
    assert code == 2 and len(lines) == 1, (code, lines)
    assert lines[0].startswith("error: ")
    assert re.search(line, lines[0]), lines[0]
    left = [name for name in files(folder) if name not in before and not name.startswith("hub")]
    assert left == [] and files(tiny) == theirs


NULLS = {
    "trainer.max_steps": "leave it out for its default, -1",
    "trainer.overfit_batches": "leave it out for its default, 0.0",
    "model.tokenizer.width": "leave it out for its default",
    "model.tokenizer.quantizer.entropy_weight": "leave it out for its default, 0.0",
    "model.loss.perceptual_weight": "leave it out for its default",
    "model.optimizer.lr": "leave it out for its default, 0.0001",
    "model.optimizer.betas": "leave it out for its default",
    "model.roll_out.sampling.guidance.scale": "leave it out for its default",
    "data.seed": "leave it out for its default, 0",
    "data.num_workers": "leave it out for its default",
    "log_every": "leave it out for its default",
    "save_every": "leave it out for its default",
    "sampling.choice.temperature": "leave it out for its default, 1.0",
}


@pytest.mark.parametrize("key", NULLS)
def test_null_is_no_value_of_what_has_no_none(
    config: dict[str, Any], folder: Path, key: str
) -> None:
    """The parser hands it on as None whatever the type: a weight of None switched its loss off."""
    place: Any = config
    *above, last = key.split(".")
    for name in above:
        place = place.setdefault(name, {})
        place = place.get("init_args", place)
    place[last] = None
    if "guidance" in key:
        guidance = {"class_path": "tessellar.protocol.guidance.Linear", "init_args": {last: None}}
        config["model"]["init_args"]["roll_out"]["sampling"]["guidance"] = guidance
    (folder / "run.yaml").write_text(json.dumps(config))
    code, lines = said("train", ["--config", "run.yaml", "--name", "x"])
    assert code == 2 and len(lines) == 1 and not (folder / "runs").exists()
    assert re.search(rf"^error: {re.escape(key)} is null; {NULLS[key]}", lines[0]), lines[0]


def test_null_is_a_value_of_what_has_none(config: dict[str, Any], folder: Path) -> None:
    """Types that say so, and defaults of None."""
    config["trainer"] |= {"max_epochs": None, "limit_train_batches": None}
    config["model"]["init_args"]["clip"] = None
    config["model"]["init_args"]["tokenizer"]["init_args"]["quantizer"]["init_args"] |= {
        "init_step": None,
        "restart_every": None,
    }
    config |= {"ema": None, "keep_every": None, "best_metric": None, "seed_everything": None}
    (folder / "run.yaml").write_text(json.dumps(config))
    train.parse(["--config", "run.yaml", "--name", "x"])


@pytest.mark.parametrize(
    "words",
    [
        ["--model.tokenizer.quantizer.restart_every", "null"],
        ["--model.init_args.tokenizer.init_args.quantizer.init_args.restart_every=null"],
        ["--model.tokenizer.quantizer", '{"init_args": {"restart_every": null}}'],
    ],
)
def test_null_is_a_value_of_an_option_of_a_class_within_a_class(
    config: dict[str, Any], folder: Path, words: list[str]
) -> None:
    quantizer = config["model"]["init_args"]["tokenizer"]["init_args"]["quantizer"]["init_args"]
    quantizer["restart_every"] = 5
    (folder / "run.yaml").write_text(json.dumps(config))
    cli = train.parse(["--config", "run.yaml", "--name", "x", *words])
    assert cli.model.tokenizer.quantizer.restart_every is None


LABELS: dict[str, tuple[bytes, str]] = {
    "empty.txt": (b"", "names no class"),
    "no class.txt": (b"cat\ndog\n", "'cat' is no class such as n01440764"),
    "no text.txt": (b"n01440764\xff\n", "is not UTF-8"),
    "zero.txt": (b"n01440764\0\n", "holds zero bytes"),
    "header.csv": (b"ImageId,PredictionString\n", "names no class"),
    "endless.csv": (b'a,b\n"' + b"x" * 200_000, "is no CSV"),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_that_are_none_are_one_line(tmp_path: Path, name: str) -> None:
    content, line = LABELS[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=line) as caught:
        read_labels(path)
    assert "\n" not in str(caught.value)


def test_texts_with_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    """Labels and prompts, as editors of Windows save them; and characters that only look like the end of a line."""
    for encoding in ("utf-8-sig", "utf-16"):
        labels = tmp_path / "labels.txt"
        labels.write_bytes("n01440764\r\nn01443537\r\n".encode(encoding))
        assert list(read_labels(labels).values()) == ["n01440764", "n01443537"]
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_bytes('{"prompt": "a\u2028b"}\r\n{"prompt": "c"}'.encode(encoding))
        found = read_lines(prompts, "prompt")
        assert [row["prompt"] for _, row in found] == ["a\u2028b", "c"]


def test_a_pipe_in_the_place_of_labels_or_prompts_is_not_waited_for(tmp_path: Path) -> None:
    for name in ("labels.txt", "kit.tar.gz"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match="is a pipe or a device, not a file"):
            read_labels(tmp_path / name)
    with pytest.raises(UserError, match="is a pipe or a device, not a file"):
        read_lines(tmp_path / "labels.txt", "prompt")


@pytest.mark.parametrize("table", (b"", b"junk", b"MATLAB 5.0 MAT-file".ljust(300, b"\xff")))
def test_a_damaged_development_kit_is_one_line(tmp_path: Path, table: bytes) -> None:
    kit = tmp_path / "kit.tar.gz"
    with tarfile.open(kit, "w:gz") as tar:
        for name, content in ((DEVKIT_TRUTH, b"1\n2\n"), (DEVKIT_CLASSES, table)):
            info = tarfile.TarInfo(f"kit/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(UserError, match="kit.tar.gz is damaged") as caught:
        read_labels(kit)
    assert "\n" not in str(caught.value)
