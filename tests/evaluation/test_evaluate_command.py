"""`evaluate.py`: its commands from words to files, and its mistakes in one line."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tessellar.checkpoints.export import export_generator, export_tokenizer
from tessellar.checkpoints.reading import load_tokenizer
from tessellar.cli.evaluate import main
from tessellar.data import ShapesData
from tessellar.errors import UserError
from tessellar.evaluation.generation import reconstruct
from tessellar.images import from_uint8, to_uint8
from tessellar.models.llamagen import LlamaGen
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.condition import ClassConditioner
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ

SHAPES = ["--data", "tessellar.data.ShapesData", "--data.length", "60", "--data.val_length", "40"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports of a tokenizer and of a generator of four classes, inside a run whose config names its data."""
    torch.manual_seed(0)
    tokenizer = ViTVQ(VectorQuantizer(16, 4), 32, 8, 16, 1, 1, 2)
    generator = LlamaGen(tokenizer.layout, 16, 1, 2, num_classes=4, ffn_multiple_of=8)
    nn.init.normal_(generator.output.weight, std=0.5)
    run = tmp_path_factory.mktemp("runs") / "demo"
    export_tokenizer(tokenizer, run / "tokenizer")
    export_generator(ImageGenerator(tokenizer, generator, ClassConditioner(4)), run / "export")
    data = {
        "class_path": "tessellar.data.ShapesData",
        "init_args": {"length": 60, "val_length": 40},
    }
    (run / "config.yaml").write_text(json.dumps({"data": data}))
    return run


@pytest.fixture
def samples(
    random_images: Callable[..., Tensor], write_npz: Callable[..., Path], tmp_path: Path
) -> str:
    return str(write_npz(random_images(30), tmp_path / "samples.npz", torch.arange(30) % 4))


@pytest.fixture
def net(tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)  # caches and default outputs go below it
    return ["--extractor", str(tiny_file)]


def test_stats_then_samples_then_compare(
    samples: str, net: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["stats", "train", *SHAPES, *net, "--out", "ref.npz"])
    assert (
        np.load("ref.npz")["mu"].shape == (96,)
        and "60 images of shapes train" in capsys.readouterr().out
    )
    main(
        [
            "samples",
            samples,
            "--reference",
            "ref.npz",
            *net,
            "--metrics",
            "fd",
            "accuracy",
            "--out",
            "a.json",
        ]
    )
    printed = capsys.readouterr().out
    assert (
        "FD(tiny) " in printed
        and "(N=30, reference=shapes train 60)" in printed
        and "FID" not in printed
    )
    main(["samples", samples, "--reference", "train", *SHAPES, *net, "--out", "b.json"])
    a, b = (json.loads(Path(name).read_text()) for name in ("a.json", "b.json"))
    assert a["metrics"]["FD(tiny)"] == pytest.approx(b["metrics"]["FD(tiny)"], rel=1e-9)
    assert main(["compare", "a.json", "b.json"]) == 0
    main(["samples", samples, "--reference", "val", *SHAPES, *net, "--out", "c.json"])
    assert main(["compare", "a.json", "c.json"]) == 1
    assert "NOT comparable; these differ:\n  reference:" in capsys.readouterr().out


def test_stats_through_a_tokenizer_are_those_of_its_reconstructions(
    models: Path, net: list[str]
) -> None:
    for name in ("tokenizer", "export"):
        main(
            [
                "stats",
                "val",
                *SHAPES,
                *net,
                "--through",
                str(models / name),
                "--count",
                "40",
                "--out",
                f"{name}.npz",
            ]
        )
    a, b = np.load("tokenizer.npz"), np.load("export.npz")
    assert json.loads(str(a["meta"]))["count"] == 40 and "reconstructions of shapes val" in str(
        a["meta"]
    )
    np.testing.assert_allclose(a["mu"], b["mu"], atol=1e-6)
    main(["stats", "val", *SHAPES, *net, "--count", "10", "--out", "plain.npz"])
    assert np.abs(a["mu"] - np.load("plain.npz")["mu"]).max() > 1e-3
    tokenizer, images = (
        load_tokenizer(models / "tokenizer"),
        ShapesData(length=60, val_length=40).val_dataset(),
    )
    seen = to_uint8(reconstruct(tokenizer, from_uint8(to_uint8(images.batch(range(40))["image"]))))
    folder = Path("pictures")
    folder.mkdir()
    for number, image in enumerate(seen):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
    main(["stats", "pictures", *net, "--out", "pictures.npz"])
    np.testing.assert_allclose(np.load("pictures.npz")["mu"], a["mu"], atol=1e-6)


def test_a_generator_is_measured_live_on_its_runs_data(
    models: Path, net: list[str], tmp_path: Path
) -> None:
    words = ["--count", "24", "--seed", "5", "--guidance.scale", "1.5", "--out", "g.json"]
    main(["model", str(models / "export"), *net, *words])
    record = json.loads(Path("g.json").read_text())
    assert set(record["metrics"]) == {
        "FD(tiny)",
        "accuracy",
    }  # the network knows four classes, as the generator does
    made = record["samples"]
    assert (made["images"], made["labels"], made["seed"]) == (24, "balanced", 5)
    assert (
        made["sampling"]["guidance"]["init_args"] == {"scale": 1.5}
        and len(made["fingerprint"]) == 16
    )
    assert record["reference"]["name"] == "shapes train" and record["reference"]["images"] == 60


def test_a_tokenizer_is_measured_by_reconstructions(models: Path, net: list[str]) -> None:
    main(["model", str(models / "tokenizer"), *net, *SHAPES, "--count", "25"])
    (path,) = Path("outputs/evaluations").iterdir()
    record = json.loads(path.read_text())
    assert set(record["metrics"]) == {"rFD(tiny)", "PSNR", "SSIM"}
    assert record["reference"] == {
        **record["reference"],
        "name": "shapes val",
        "images": 25,
        "split": "val",
    }


def test_an_extractor_trained_here_measures(net: list[str]) -> None:
    words = [
        "--architecture.arch",
        "test_resnet",
        "--recipe.epochs",
        "1",
        "--data.batch_size",
        "30",
    ]
    main(["extractor", *SHAPES, *words, "--out", "net.safetensors"])
    main(["stats", "val", *SHAPES, "--extractor", "net.safetensors", "--out", "ref.npz"])
    assert json.loads(str(np.load("ref.npz")["meta"]))["extractor"]["name"] == "shapes-test_resnet"


def test_neighbours_are_drawn(
    samples: str, net: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["neighbours", samples, *SHAPES, *net, "--count", "3", "--nearest", "2", "--out", "n.png"])
    assert Image.open("n.png").size == (3 * 128 + 4 * 4, 3 * 128 + 4 * 4 + 22)  # names above
    assert "3 samples, 0 of them equal to a training image" in capsys.readouterr().out


def test_stats_of_a_folder_of_any_size_are_cropped(net: list[str], tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for i, size in enumerate([(50, 40), (64, 80), (33, 32)]):
        Image.fromarray(np.full((*size, 3), 60 * i, np.uint8)).save(
            tmp_path / "pictures" / f"{i}.png"
        )
    with pytest.raises(UserError, match="differ in size.*--size N"):
        main(["stats", "pictures", *net, "--out", "ref.npz"])
    main(["stats", "pictures", *net, "--size", "32", "--out", "ref.npz"])
    assert json.loads(str(np.load("ref.npz")["meta"]))["count"] == 3


@pytest.mark.parametrize("options", [["--data.size", "24"], ["--data.size", "24", "--count", "5"]])
def test_images_of_another_size_than_the_tokenizers_are_one_line(
    models: Path, net: list[str], options: list[str]
) -> None:
    command = ["stats", "train", "--through", str(models / "tokenizer"), *SHAPES, *options]
    with pytest.raises(UserError, match=r"shapes train are \(24, 24\), the tokenizer reads \(32, "):
        main([*command, *net, "--out", "ref.npz"])
    assert not Path("ref.npz").exists()


def test_neighbours_of_another_size_are_one_line(samples: str, net: list[str]) -> None:
    for extractor in ([], net):
        with pytest.raises(UserError, match=r"samples are \(32, 32\), images of shapes train are"):
            main(["neighbours", samples, *SHAPES, "--data.size", "24", *extractor])


def test_pixels_need_no_network(
    models: Path, net: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for extractor, out in ((net, "a.json"), (["--extractor", "none"], "b.json")):
        main(["model", str(models / "tokenizer"), *extractor, "--metrics", "paired", "--out", out])
    a, b = (json.loads(Path(name).read_text())["metrics"] for name in ("a.json", "b.json"))
    assert a == b and set(b) == {"PSNR", "SSIM"}
    main(["model", str(models / "tokenizer"), "--extractor", "none", "--out", "c.json"])
    assert json.loads(Path("c.json").read_text())["metrics"] == b
    for words in (
        ["model", str(models / "export"), "--count", "4"],
        ["model", str(models / "tokenizer"), "--metrics", "fd"],
    ):
        with pytest.raises(
            UserError, match="metric 'fd' needs a feature network, and --extractor none is none"
        ):
            main([*words, "--extractor", "none"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["samples", "nowhere", "--reference", "ref.npz"],
            "nowhere is neither a folder of images nor an npz",
        ),
        (["samples", "SAMPLES"], "metric 'fd' compares with a reference; give --reference"),
        (["samples", "SAMPLES", "--reference", "train"], "'train' is a split of a data set"),
        (
            ["samples", "SAMPLES", "--protocol", "adm50k"],
            "protocol 'adm50k' does not exist; there are adm-50k",
        ),
        (["samples", "SAMPLES", "--protocol", "adm-50k"], "needs samples: 50000; given is 30"),
        (["samples", "SAMPLES", "--metrics", "fid"], "fid"),
        (["samples", "SAMPLES", "--count", "50"], "holds 30 images, not the 50 of --count"),
        (["model", "MODELS/export"], "say how many samples: --count N"),
        (["stats", "train", *SHAPES], "say where to write: --out"),
        (["samplse", "x"], "did you mean 'samples'"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, samples: str, models: Path, net: list[str]
) -> None:
    words = [word.replace("SAMPLES", samples).replace("MODELS", str(models)) for word in words]
    with pytest.raises(UserError, match=message) as caught:
        main([*words, *(net if words[0] != "samplse" else [])])
    assert "\n" not in str(caught.value)
