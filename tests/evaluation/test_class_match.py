"""Classes of samples, of a classifier and of a reference meet by name."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from tessellar.checkpoints.export import export_generator
from tessellar.cli.evaluate import main
from tessellar.cli.sample import sample
from tessellar.data.sets.image_folder import ImageFolder
from tessellar.errors import UserError
from tessellar.models.llamagen import LlamaGen
from tessellar.networks.facts import KEY, NetworkFacts
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.condition import ClassConditioner
from tessellar.tensor_files import CHECKSUM, read_safetensors
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ

COLOURS = {"1": (250, 20, 20), "2": (20, 250, 20), "10": (20, 20, 250)}
WORDS = {"1": "red", "2": "green", "10": "blue"}


def paint(root: Path, names: dict[str, str], count: int = 12) -> Path:
    """A folder a class, called as `names` says, each of one colour."""
    for key, name in names.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (24, 24), COLOURS[key]).save(root / name / f"{i}.png")
    return root


def learn(root: Path, out: Path) -> Path:
    """A classifier of the colours of a folder, right on all of them."""
    data = [
        "--data",
        "tessellar.data.ImageFolderData",
        "--data.root",
        str(root),
        "--data.size",
        "24",
    ]
    recipe = ["--recipe.epochs", "12", "--recipe.ema", "0.5", "--architecture.arch", "test_resnet"]
    main(["extractor", *data, "--data.batch_size", "8", *recipe, "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paint(tmp_path_factory.mktemp("numbers") / "num", {name: name for name in COLOURS})


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paint(tmp_path_factory.mktemp("words") / "word", WORDS)


@pytest.fixture(scope="module")
def of_numbers(numbers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return learn(numbers, tmp_path_factory.mktemp("net") / "numbers.safetensors")


@pytest.fixture(scope="module")
def of_words(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return learn(words, tmp_path_factory.mktemp("net") / "words.safetensors")


@pytest.fixture
def measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Class accuracy of a folder or npz by `evaluate.py samples`, and the record's warnings."""
    monkeypatch.chdir(tmp_path)

    def run(samples: Path, net: Path, *options: str) -> tuple[float, list[str]]:
        main(
            [
                "samples",
                str(samples),
                "--extractor",
                str(net),
                "--metrics",
                "accuracy",
                "--out",
                "a.json",
                *options,
            ]
        )
        record = json.loads(Path("a.json").read_text())
        return record["metrics"]["accuracy"], [
            w for w in record["warnings"] if "class" in w or "label" in w
        ]

    return run


def nameless(net: Path, out: Path) -> Path:
    """The file as it was written before classes had names."""
    _, metadata = read_safetensors(net)
    facts = json.loads(metadata[KEY])
    del facts["class_names"]
    others = {key: value for key, value in metadata.items() if key not in (KEY, CHECKSUM)}
    save_file(load_file(net), out, metadata={**others, KEY: json.dumps(facts)})
    return out


def test_a_folder_is_numbered_as_the_training_of_the_classifier_numbered_it(
    numbers, of_numbers, measure
):
    assert measure(numbers, of_numbers) == (1.0, [])


def test_some_of_the_classes_are_found_by_their_names(of_words, measure, tmp_path: Path):
    some = paint(tmp_path / "some", {"2": "green", "1": "red"})
    assert measure(some, of_words) == (1.0, [])


def test_a_folder_that_is_no_class_is_refused(of_words, measure, tmp_path: Path):
    with pytest.raises(UserError, match="'azure' of other is no class of .*'blue', 'green', 'red'"):
        measure(paint(tmp_path / "other", WORDS | {"10": "azure"}), of_words)


def test_folders_of_numbers_against_a_classifier_of_names_are_said(
    words, of_words, measure, tmp_path: Path
):
    """They are the numbers that its classes have: blue 0, green 1, red 2."""
    ids = paint(tmp_path / "ids", {"10": "0", "2": "1", "1": "2"})
    accuracy, (said,) = measure(ids, of_words)
    assert accuracy == 1.0 and "named by numbers" in said and "0 is 'blue'" in said


def test_labels_of_an_npz_are_numbers_and_said(of_words, measure, tmp_path: Path):
    images = np.stack(
        [np.full((24, 24, 3), COLOURS[key], dtype=np.uint8) for key in ("10", "2", "1")]
    )
    np.savez(tmp_path / "a.npz", images, np.arange(3))
    accuracy, (said,) = measure(tmp_path / "a.npz", of_words)
    assert accuracy == 1.0 and "labels of a are numbers" in said
    np.savez(tmp_path / "b.npz", images, np.arange(1, 4))
    with pytest.raises(UserError, match="class 3; there are the classes 0 to 2"):
        measure(tmp_path / "b.npz", of_words)


def test_a_classifier_without_names_still_measures_and_says_what_it_assumes(
    words, of_words, measure, tmp_path: Path
):
    old = nameless(of_words, tmp_path / "old.safetensors")
    accuracy, (said,) = measure(words, old)
    assert (
        accuracy == 1.0
        and "does not say the names of its classes: 'blue' of word is taken as its class 0" in said
    )
    with pytest.raises(
        UserError, match="of which there are 3, and some has 2: .*--network.class_names"
    ):
        measure(paint(tmp_path / "some", {"2": "green", "1": "red"}), old)


def test_names_can_be_given_to_a_network_that_has_none(words, of_words, measure, tmp_path: Path):
    facts = NetworkFacts.from_metadata(read_safetensors(of_words)[1], of_words)
    told = {
        "name": facts.name,
        "arch": facts.arch,
        "num_classes": 3,
        "image_size": [24, 24],
        "options": facts.options,
    }
    old = nameless(of_words, tmp_path / "old.safetensors")
    options = ["--network", json.dumps({**told, "class_names": list(facts.class_names)})]
    assert measure(words, old, *options) == (1.0, [])
    with pytest.raises(UserError, match="3 classes, but 1 class_names"):
        measure(words, old, "--network", json.dumps({**told, "class_names": ["red"]}))


def test_samples_of_sample_py_have_the_ids_they_were_drawn_with(
    of_numbers, numbers, measure, tmp_path: Path
):
    """Class 2 of the data set is folder 10: a sample of it counts as that class."""
    torch.manual_seed(0)
    tokenizer = ViTVQ(VectorQuantizer(16, 4), 24, 8, 16, 1, 1, 2)
    generator = LlamaGen(tokenizer.layout, 16, 1, 2, num_classes=3, ffn_multiple_of=8)
    nn.init.normal_(generator.output.weight, std=0.5)
    export_generator(ImageGenerator(tokenizer, generator, ClassConditioner(3)), tmp_path / "export")
    sample(str(tmp_path / "export"), out=str(tmp_path / "drawn"), classes="2", count=4, npz=True)
    data = ImageFolder(numbers, 24)
    assert data.class_names[2] == "10"
    for file in (tmp_path / "drawn").glob(
        "*_*.png"
    ):  # as a perfect generator would have painted them
        Image.new("RGB", (24, 24), COLOURS["10"]).save(file)
    accuracy, (said,) = measure(tmp_path / "drawn", of_numbers)
    assert accuracy == 1.0 and "2 is '10'" in said


def test_classes_that_only_one_side_has_are_said(words, of_words, measure, tmp_path: Path):
    some = paint(tmp_path / "some", {"2": "green", "1": "red"})
    _, (said,) = measure(some, of_words, "--reference", str(words))
    assert said == "samples and reference differ in their classes: 'blue' only in word"
