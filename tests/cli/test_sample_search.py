"""`sample.py --search`: the record names what chose, evaluate.py does not let it judge, a search goes on."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from tessellar.checkpoints.export import export_generator
from tessellar.cli.evaluate import main as evaluate
from tessellar.cli.sample import main
from tessellar.errors import UserError
from tessellar.models.llamagen import LlamaGen
from tessellar.networks.facts import NetworkFacts
from tessellar.networks.timm_networks import create_network
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.condition import ClassConditioner
from tessellar.sampling.search.network_verifiers import Classifier
from tessellar.tensor_files import write_safetensors
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ

NAMES = ("cat", "dog", "owl")
SIDE = 32  # what timm's small networks read


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    tokenizer = ViTVQ(VectorQuantizer(16, 4), SIDE, 16, 16, 1, 1, 2)
    generator = LlamaGen(tokenizer.layout, 16, 2, 2, num_classes=3, ffn_multiple_of=8)
    nn.init.normal_(generator.output.weight, std=0.5)
    whole = ImageGenerator(tokenizer, generator, ClassConditioner(3), NAMES)
    return str(export_generator(whole, tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same weights as a teacher and as an evaluator, and another evaluator."""
    folder = tmp_path_factory.mktemp("networks")
    paths = {}
    for number, (name, purpose) in enumerate(
        (("teacher", "teacher"), ("same", "evaluator"), ("other", "evaluator"))
    ):
        torch.manual_seed(number // 2)
        network = create_network("test_resnet", {}, num_classes=3)
        facts = NetworkFacts(
            name=name,
            arch="test_resnet",
            num_classes=3,
            image_size=(SIDE, SIDE),
            purpose=purpose,  # type: ignore[arg-type]
            class_names=NAMES,
        )
        path = folder / f"{name}.safetensors"
        write_safetensors(network.state_dict(), path, facts.to_metadata())
        paths[name] = str(path)
    return paths


def record_of(folder: Path) -> dict:
    return json.loads((folder / "samples.json").read_text())


def test_a_search_is_recorded_and_its_network_may_not_judge(
    model: str, networks: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "beam"
    words = f"{model} --out {out} --count 6 --search Beam --search.width 2 --search.candidates 3"
    words += " --search.schedule Even --search.verifier Classifier"
    main([*words.split(), "--search.verifier.weights", networks["teacher"]])
    record = record_of(out)
    assert record["search"]["init_args"]["width"] == 2
    assert record["verifier_calls"] == 6 * (3 + 6 + 6 + 6) and len(record["scores"]) == 6
    assert [network["name"] for network in record["selected_by"]] == ["teacher"]
    assert not Path(f"{out}.search").exists()

    def judge(name: str) -> None:
        words = f"samples {out} --extractor {networks[name]} --metrics accuracy"
        evaluate([*words.split(), "--out", str(tmp_path / f"{name}.json"), "--device", "cpu"])

    judge("other")
    with pytest.raises(UserError, match="selected by teacher, whose weights same has"):
        judge("same")
    assert json.loads((tmp_path / "other.json").read_text())["samples"]["selected_by"]


def test_what_was_interrupted_goes_on(
    model: str, networks: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = f"{model} --count 3 --search BestOfN --search.count 4 --search.verifier Classifier"
    words = f"{words} --search.verifier.weights {networks['teacher']}"
    main([*words.split(), "--out", str(tmp_path / "whole")])
    measured: list[int] = []
    measure = Classifier.measure

    def counted(self: Classifier, candidates):
        measured.append(len(candidates.images))
        if len(measured) == 3:
            raise KeyboardInterrupt
        return measure(self, candidates)

    monkeypatch.setattr(Classifier, "measure", counted)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        main([*words.split(), "--out", str(out)])
    assert Path(f"{out}.search").is_dir() and not out.exists()
    with pytest.raises(UserError, match="other settings"):
        main([*words.split(), "--out", str(out), "--seed", "1"])
    main([*words.split(), "--out", str(out)])
    assert len(measured) == 4 and not Path(f"{out}.search").exists()
    whole = record_of(tmp_path / "whole")
    found = record_of(out)
    for key in ("search", "scores", "verifier_calls", "selected_by"):
        assert found[key] == whole[key]
    for path in sorted((tmp_path / "whole").glob("*.png")):
        assert path.read_bytes() == (out / path.name).read_bytes()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--search Beem", "Beam"),
        ("--search Beam --search.width 0", "width of Beam is 0"),
        ("--search Beam --algorithm SpeculativeJacobi", "is for BestOfN"),
        ("--search Beam --search.verifier Reconstruction", "--image FILE"),
        ("--search BestOfN --search.verifier Classifier", "needs a file"),
        (
            "--search BestOfN --search.verifier Classifier --search.verifier.weights EVALUATOR",
            "may not",
        ),
        ("--search ARFree", "another verifier"),
        ("--image PICTURE", "--search"),
        ("--search BestOfN --image MISSING", "cannot read"),
        (
            "--search BestOfN --search.verifier Clip --search.verifier.source FOLDER",
            "cannot be loaded",
        ),
    ],
)
def test_mistakes_take_one_line(
    model: str, networks: dict[str, str], tmp_path: Path, words: str, line: str
) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (SIDE, SIDE)).save(picture)
    words = words.replace("EVALUATOR", networks["same"]).replace("PICTURE", str(picture))
    words = words.replace("FOLDER", str(tmp_path))
    with pytest.raises(UserError) as caught:
        main([model, "--out", str(tmp_path / "out"), "--count", "1", *words.split()])
    assert line in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_searches_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--search.help"])
    listed = capsys.readouterr().out
    assert all(f"--search {name}:" in listed for name in ("BestOfN", "Beam", "Lookahead", "ARFree"))


def test_a_reference_is_approached(model: str, tmp_path: Path) -> None:
    """The best of many candidates is nearer to a sample of another seed than the plain sample is."""
    main(
        [
            model,
            "--out",
            str(tmp_path / "target"),
            "--count",
            "1",
            "--classes",
            "cat",
            "--seed",
            "7",
        ]
    )
    target = tmp_path / "target" / "000000_0000_cat.png"
    scores = []
    for count in (1, 12):
        out = tmp_path / str(count)
        words = (
            f"{model} --out {out} --count 1 --classes cat --search BestOfN --search.count {count}"
        )
        main([*words.split(), "--search.verifier", "Reconstruction", "--image", str(target)])
        scores += record_of(out)["scores"]
    assert scores[0] < scores[1] <= 0
