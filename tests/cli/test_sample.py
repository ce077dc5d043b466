"""`sample.py`: files, the record beside them, and refusals before anything is written."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tessellar.checkpoints.export import export_generator, export_tokenizer
from tessellar.checkpoints.weights import fingerprint
from tessellar.cli.sample import main
from tessellar.errors import UserError
from tessellar.models.llamagen import LlamaGen
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.condition import ClassConditioner
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ImageGenerator]:
    torch.manual_seed(0)
    tokenizer = ViTVQ(VectorQuantizer(16, 4), 8, 4, 16, 1, 1, 2)
    generator = LlamaGen(tokenizer.layout, 16, 2, 2, num_classes=3, ffn_multiple_of=8)
    nn.init.normal_(generator.output.weight, std=0.5)
    whole = ImageGenerator(tokenizer, generator, ClassConditioner(3))
    return str(export_generator(whole, tmp_path_factory.mktemp("models") / "tiny")), whole


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_samples_are_written_with_their_record(
    model: tuple[str, ImageGenerator], tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "set"
    main(
        [
            model[0],
            "--out",
            str(out),
            "--classes",
            "0,2",
            "--per-class",
            "2",
            "--npz",
            "--guidance.scale",
            "1.5",
        ]
    )
    pngs = ["000000_0000.png", "000001_0002.png", "000002_0000.png", "000003_0002.png"]
    assert names(out) == [*pngs, "grid.png", "samples.json", "samples.npz"]
    assert np.load(out / "samples.npz")["arr_1"].tolist() == [0, 2, 0, 2]
    record = json.loads((out / "samples.json").read_text())
    assert record["count"] == 4 and record["classes"] == [0, 2] and record["seed"] == 0
    assert record["sampling"]["guidance"]["init_args"] == {"scale": 1.5} and record[
        "fingerprint"
    ] == fingerprint(model[1])
    assert names(out.parent) == ["set"]


def test_algorithms_have_options_and_are_reported(
    model: tuple[str, ImageGenerator], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        model[0],
        "--count",
        "3",
        "--algorithm",
        "SpeculativeJacobi",
        "--out",
        str(tmp_path / "set"),
    ]
    with pytest.raises(
        UserError,
        match="SpeculativeJacobi .algorithm. has no option 'windows'; did you mean 'window'",
    ):
        main([*words, "--algorithm.windows", "3"])
    main([*words, "--algorithm.window", "3", "--algorithm.coupling", "maximal"])
    record = json.loads((tmp_path / "set" / "samples.json").read_text())
    assert record["sampling"]["algorithm"] == {
        "class_path": "tessellar.sampling.speculative.SpeculativeJacobi",
        "init_args": {"window": 3, "init": "random", "coupling": "maximal"},
    }
    decoding = record["decoding"]
    assert (
        decoding["images"] == 3 and decoding["tokens"] == 12 and 6 <= decoding["evaluations"] <= 12
    )
    assert (
        f"{decoding['evaluations_per_image']:.1f} network evaluations an image"
        in capsys.readouterr().out
    )


def test_the_same_set_in_other_batches(model: tuple[str, ImageGenerator], tmp_path: Path) -> None:
    for size in ("1", "5"):
        main(
            [
                model[0],
                "--out",
                str(tmp_path / size),
                "--count",
                "5",
                "--batch-size",
                size,
                "--npz",
                "--no-png",
            ]
        )
    one, five = (
        np.load(tmp_path / size / "samples.npz")["arr_0"].astype(int) for size in ("1", "5")
    )
    assert one.shape == (5, 8, 8, 3) and abs(one - five).max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classes", "3"], "class id 3 does not exist; classes are 0 to 2"),
        (["--classes", "cat"], "--classes 'cat': 'cat' is not a class id"),
        (["--count", "4", "--per-class", "2"], "either --count or --per-class"),
        (["--count", "0"], "0 images were asked for"),
        (["--guidance", "Cosin"], "--guidance: there is no 'Cosin'; did you mean 'Cosine'"),
        (
            ["--guidance", "PowerCosine", "--guidance.powr", "3"],
            "no option 'powr'; did you mean 'power'",
        ),
        (["--guidance.power", "3"], "Constant .guidance. has no option 'power'; there are scale"),
        (["--guidance.scale", ".nan"], "guidance scale is nan; it must be a finite number"),
        (["--guidance.scale", ".inf"], "guidance scale is inf"),
        (["--choice.temperature", ".nan"], "temperature is nan"),
        (["--choice.top_p", "0"], "top_p is 0.0; it must be"),
        (["--algorithm", "magic"], "--algorithm: there is no 'magic'; there are Ancestral, "),
        (
            ["--algorithm", "GroupedJacobi", "--algorithm.window", "x"],
            "--algorithm.window: expected int, not 'x'",
        ),
        (["--algorithm", "GroupedJacobi", "--algorithm.window", "99"], "window is 99"),
        (["--flow", "Heun"], "--flow: there is no 'Heun'; there are Euler, EulerMaruyama"),
        (["--flow.steps", "1"], "flow steps is 1"),
        (["--device", "abacus"], "device 'abacus' is not available here"),
        (["--batch-size", "0"], "batch size is 0"),
        (["--sed", "3"], "did you mean 'seed'"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    model: tuple[str, ImageGenerator], tmp_path: Path, options: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        main([model[0], "--out", str(tmp_path / "set"), *options])
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == []


def test_the_published_guidance_of_rar(model: tuple[str, ImageGenerator], tmp_path: Path) -> None:
    """The flags that the header of its config gives."""
    header = Path("configs/imagenet256/rar_b.yaml").read_text().replace("\\\n#", "")
    (command,) = re.findall(r"# python sample.py \S+ (.*)", header)
    main([model[0], *command.split(), "--count", "2", "--out", str(tmp_path / "set")])
    record = json.loads((tmp_path / "set" / "samples.json").read_text())
    assert record["sampling"]["guidance"] == {
        "class_path": "tessellar.protocol.guidance.PowerCosine",
        "init_args": {"scale": 16.0, "power": 2.75, "reach_end": False},
    }


OLDER = [
    (
        ["--algorithm", "sjd", "--options", "{window: 3, coupling: maximal}"],
        "--algorithm SpeculativeJacobi --algorithm.window 3 --algorithm.coupling maximal",
    ),
    (
        [
            "--guidance.schedule",
            "power_cosine",
            "--guidance.options",
            "{power: 2.75, reach_end: false}",
        ],
        "--guidance PowerCosine --guidance.power 2.75 --guidance.reach_end false",
    ),
    (["--guidance.options.power=3"], "--guidance.power 3"),
    (["--options.steps", "8"], "--algorithm.steps 8"),
    (["--flow.solver", "ode"], "--flow Euler"),
]


@pytest.mark.parametrize(("words", "now"), OLDER)
def test_the_older_spelling_is_answered_by_the_new_one(
    model: tuple[str, ImageGenerator], tmp_path: Path, words: list[str], now: str
) -> None:
    with pytest.raises(UserError, match="is the older spelling; it is now") as caught:
        main([model[0], "--out", str(tmp_path / "set"), *words])
    assert str(caught.value).endswith(f"it is now {now}")


def test_an_older_yaml_is_answered_by_the_new_one(
    model: tuple[str, ImageGenerator], tmp_path: Path
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("algorithm: gsd\noptions: {group_size: 3}\n")
    with pytest.raises(
        UserError, match=r"algorithm: \{class_path: GroupedJacobi, init_args: \{group_size: 3\}\}"
    ):
        main(["--config", str(file), model[0], "--out", str(tmp_path / "set")])


def test_help_lists_algorithms_with_their_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--algorithm.help"])
    shown = capsys.readouterr().out
    assert "--algorithm GroupedJacobi" in shown and "--algorithm.group_size (default 14)" in shown


def test_a_tokenizer_cannot_be_sampled(model: tuple[str, ImageGenerator], tmp_path: Path) -> None:
    vq = export_tokenizer(model[1].tokenizer, tmp_path / "vq")
    with pytest.raises(UserError, match="vq is a tokenizer; a generator is needed to sample"):
        main([str(vq), "--out", str(tmp_path / "set")])


def test_only_an_older_set_is_replaced(model: tuple[str, ImageGenerator], tmp_path: Path) -> None:
    out = tmp_path / "set"
    main([model[0], "--out", str(out), "--count", "3"])
    with pytest.raises(UserError, match="--overwrite"):
        main([model[0], "--out", str(out), "--count", "1"])
    main([model[0], "--out", str(out), "--count", "1", "--no-grid", "--overwrite"])
    assert names(out) == ["000000_0000.png", "samples.json"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(
        UserError, match="is not empty and holds no samples.json, so it is never replaced"
    ):
        main([model[0], "--out", str(tmp_path / "mine"), "--overwrite"])


def test_two_processes_make_the_same_set(model: tuple[str, ImageGenerator], tmp_path: Path) -> None:
    words = ["--count", "5", "--npz", "--out"]
    main([model[0], *words, str(tmp_path / "one")])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(ROOT / "sample.py"), model[0], *words, str(tmp_path / "two")]
    ranks = [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(r)}, cwd=ROOT)
        for r in range(2)
    ]
    assert [process.wait(240) for process in ranks] == [0, 0]
    assert names(tmp_path / "one") == names(tmp_path / "two")
    one, two = (
        np.load(tmp_path / name / "samples.npz")["arr_0"].astype(int) for name in ("one", "two")
    )
    assert abs(one - two).max() <= 1
    grids = [
        np.asarray(Image.open(tmp_path / name / "grid.png")).astype(int) for name in ("one", "two")
    ]
    assert abs(grids[0] - grids[1]).max() <= 1
