"""`evaluate.py sweep`: every combination once on one set of seeds, the best again on others."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tessellar.checkpoints.description import averages_of
from tessellar.checkpoints.export import export_generator
from tessellar.cli.evaluate import main
from tessellar.cli.evaluation_sweep import varied, with_axes
from tessellar.errors import UserError
from tessellar.evaluation.generation import GeneratedImages
from tessellar.evaluation.sweep import higher_is_better
from tessellar.models.llamagen import LlamaGen
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.condition import ClassConditioner
from tessellar.protocol.guidance import Constant
from tessellar.sampling.settings import Sampling
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ

SHAPES = ["--data", "tessellar.data.ShapesData", "--data.length", "40"]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    tokenizer = ViTVQ(VectorQuantizer(16, 4), 32, 16, 16, 1, 1, 2)
    generator = LlamaGen(tokenizer.layout, 16, 1, 2, num_classes=4, ffn_multiple_of=8)
    nn.init.normal_(generator.output.weight, std=0.5)
    place = tmp_path_factory.mktemp("sweep") / "export"
    export_generator(ImageGenerator(tokenizer, generator, ClassConditioner(4)), place)
    return str(place)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Any, int, int]]:
    """Guidance, first seed and number of each set of images that is made."""
    monkeypatch.chdir(tmp_path)
    seen = []
    batches = GeneratedImages.batches

    def watched(self: GeneratedImages, batch_size: int) -> Any:
        seen.append((self.sampling.guidance.scale, self.seed, self.count))
        return batches(self, batch_size)

    monkeypatch.setattr(GeneratedImages, "batches", watched)
    return seen


def test_all_combinations_are_tried_and_the_best_is_measured_on_other_seeds(
    export: str, tiny_file: Path, made: list, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SHAPES, "--extractor", str(tiny_file), "--count", "12", "--final-count", "20"]
    axes = ["--guidance.scale", "1", "2", "3", "--choice.temperature", "0.9", "1"]
    command = ["sweep", export, *words, *axes, "--seed", "100", "--out", "s"]
    main(command)
    assert [one[1:] for one in made] == [(100, 12)] * 6 + [(112, 20)]
    assert [one[0] for one in made[:6]] == [1, 1, 2, 2, 3, 3]
    result = json.loads(Path("s/sweep.json").read_text())
    assert result["tuning_seeds"] == [100, 111] and result["reporting_seeds"] == [112, 131]
    assert [point["values"] for point in result["points"]][:2] == [
        {"guidance.scale": 1, "choice.temperature": 0.9},
        {"guidance.scale": 1, "choice.temperature": 1},
    ]
    distances = [point["metrics"]["FD(tiny)"] for point in result["points"]]
    assert len(set(distances)) == 6
    best = result["points"][distances.index(min(distances))]
    assert result["chosen"] == best["values"] and made[-1][0] == best["values"]["guidance.scale"]
    final = json.loads(Path("s/final.json").read_text())
    assert final["samples"]["images"] == 20 and final["samples"]["seed"] == 112
    assert (
        final["samples"]["sampling"]["choice"]["temperature"]
        == best["values"]["choice.temperature"]
    )
    printed = capsys.readouterr().out
    assert printed.count("\n*") == 1 and "on other seeds: FD(tiny)" in printed
    assert "IS(tiny)" in printed and Path("s/sweep.png").stat().st_size > 1000
    made.clear()
    main([*command, "--choose", "IS(tiny)"])  # nothing is measured twice
    assert len(made) <= 1
    scores = [point["metrics"]["IS(tiny)"] for point in result["points"]]
    again = json.loads(Path("s/sweep.json").read_text())
    assert again["chosen"] == result["points"][scores.index(max(scores))]["values"]


def test_an_interrupted_sweep_goes_on(
    export: str, tiny_file: Path, made: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["sweep", "--guidance.scale", "1", "2", "3", export, *SHAPES, "--count", "8"]
    words += ["--extractor", str(tiny_file), "--metrics", "fd", "--out", "s"]
    with monkeypatch.context() as patch:
        patch.setattr("tessellar.cli.evaluation_sweep.report", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(words)
    assert len(made) == 4
    kept = sorted(Path("s/points").iterdir())
    kept[0].unlink()
    made.clear()
    main(words)
    assert len(made) == 1 and sorted(Path("s/points").iterdir()) == kept


def test_words_with_several_values_become_axes() -> None:
    words = with_axes(
        ["sweep", "m", "--guidance", "Linear", "--guidance.scale", "1", "2", "--seed", "3"]
    )
    assert words[:-1] == ["sweep", "m", "--guidance=Linear", "--guidance.scale=1", "--seed", "3"]
    assert words[-1] == '--axes={"guidance.scale": [1, 2]}'
    assert with_axes(["sweep", "--count", "5", "m"]) == ["sweep", "--count", "5", "m"]


def test_any_field_of_any_class_can_be_varied() -> None:
    base = Sampling(Constant(1.5))
    changed = varied(base, {"guidance": "PowerCosine", "guidance.power": 2.5, "choice.top_k": 7})
    assert type(changed.guidance).__name__ == "PowerCosine" and changed.guidance.scale == 1.5
    assert changed.guidance.power == 2.5 and changed.choice.top_k == 7  # type: ignore[attr-defined]
    jacobi = varied(base, {"algorithm": "SpeculativeJacobi", "algorithm.window": 4})
    assert jacobi.algorithm.window == 4 and jacobi.guidance == base.guidance  # type: ignore[attr-defined]
    assert varied(base, {}) == base
    for values, line in (
        ({"choice.temprature": 1}, "temprature"),
        ({"choice.temperature": "hot"}, "temperature"),
        ({"guidance": "Cosinus"}, "Cosinus"),
    ):
        with pytest.raises(UserError, match=line):
            varied(base, values)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--axes", '{"seed": [1]}'], "'seed' cannot be swept"),
        (["--guidance.scale", "1", "2", "--choose", "FID"], "'FID' was not measured; there are FD"),
        (["--ema", "0.9", "0.99"], "holds one set of weights; averages of several decays are in"),
        (["--ema", "2"], "--ema"),
    ],
)
def test_mistakes_of_a_sweep_are_one_line(
    words: list[str], line: str, export: str, tiny_file: Path, made: list
) -> None:
    with pytest.raises(UserError, match=line):
        main(["sweep", export, *SHAPES, "--extractor", str(tiny_file), "--count", "4", *words])


def test_averages_of_a_checkpoint_by_their_decay() -> None:
    state = {"decay": 0.999, "average": {"a": 1}, "further": {"0.9999": {"a": 2}}}
    content = {"callbacks": {"EMA": state}}
    assert averages_of(content, 0.999, "x") == {"a": 1}
    assert averages_of(content, 0.9999, "x") == {"a": 2}
    with pytest.raises(UserError, match="x keeps no averages of decay 0.5; it has 0.999, 0.9999"):
        averages_of(content, 0.5, "x")


def test_which_way_is_better() -> None:
    low = ("FD(tiny)", "FID-50k", "MIND(x)", "KD(x)", "rFD(x)", "LPIPS")
    assert not any(map(higher_is_better, low))
    assert all(
        map(higher_is_better, ("IS", "IS(x)", "recall(x)", "accuracy", "density(x)", "PSNR"))
    )
