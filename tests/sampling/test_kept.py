"""Sets of samples that go on, and that several machines make together."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tessellar.checkpoints.export import export_generator
from tessellar.cli import evaluate
from tessellar.cli.sample import main
from tessellar.errors import UserError
from tessellar.models.llamagen import LlamaGen
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.condition import ClassConditioner
from tessellar.sampling.kept import KeptSet, own_part, shard_of
from tessellar.sampling.run import Drawing
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    tokenizer = ViTVQ(VectorQuantizer(16, 4), 32, 16, 16, 1, 1, 2)
    generator = LlamaGen(tokenizer.layout, 16, 1, 2, num_classes=4, ffn_multiple_of=8)
    nn.init.normal_(generator.output.weight, std=0.5)
    whole = ImageGenerator(tokenizer, generator, ClassConditioner(4))
    return str(export_generator(whole, tmp_path_factory.mktemp("models") / "tiny"))


@dataclass
class Drawn:
    """Images that were drawn, and whether an interruption comes at image 5."""

    seen: list[int]
    broken: bool = False


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    drawn = Drawn([])
    of_classes = Drawing.of_classes

    def watched(self: Drawing, model: Any, labels: Any, indices: Any = None) -> Any:
        for chosen, images in of_classes(self, model, labels, indices):
            if 5 in chosen and drawn.broken:
                raise KeyboardInterrupt
            drawn.seen.extend(chosen)
            yield chosen, images

    monkeypatch.setattr(Drawing, "of_classes", watched)
    return drawn


def pixels(folder: Path) -> dict[str, bytes]:
    files = folder.glob("0*.png")
    return {path.name: np.asarray(Image.open(path)).tobytes() for path in files}


def test_an_interrupted_set_goes_on(model: str, drawn: Drawn, tmp_path: Path) -> None:
    words = [model, "--count", "9", "--batch-size", "2", "--npz", "--seed", "7"]
    main([*words, "--out", str(tmp_path / "whole")])
    drawn.seen.clear()
    drawn.broken = True
    with pytest.raises(KeyboardInterrupt):
        main([*words, "--out", str(tmp_path / "set"), "--resume"])
    assert drawn.seen == [0, 1, 2, 3] and not (tmp_path / "set").exists()
    drawn.broken = False
    with pytest.raises(UserError, match="images of another set .other seed."):
        main([*words[:-1], "8", "--out", str(tmp_path / "set"), "--resume"])
    main([*words, "--out", str(tmp_path / "set"), "--resume"])
    assert drawn.seen == list(range(9))
    names = [sorted(p.name for p in (tmp_path / name).iterdir()) for name in ("whole", "set")]
    assert names[0] == names[1]
    assert pixels(tmp_path / "set") == pixels(tmp_path / "whole")
    arrays = [np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("whole", "set")]
    assert np.array_equal(*arrays)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set", "whole"]
    records = [json.loads((tmp_path / n / "samples.json").read_text()) for n in ("whole", "set")]
    assert records[0].keys() == records[1].keys()


@pytest.mark.parametrize("how", [["--resume"], ["--shard", "2/2"]])
def test_a_finished_set_is_left_as_it_is_and_another_is_refused(
    model: str, drawn: Drawn, how: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "set"
    words = [model, "--count", "3", "--out", str(place)]
    main(words)
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    drawn.seen.clear()
    main([*words, *how])
    assert capsys.readouterr().out.endswith(f"all 3 images are there: {place}\n")
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    for other in (["--seed", "1"], ["--npz"]):  # another set, and a file that it has not
        with pytest.raises(UserError, match="set exists; choose another --out"):
            main([*words, *how, *other])
    assert not drawn.seen and [path.name for path in tmp_path.iterdir()] == ["set"]


def test_shards_make_one_set_without_a_process_group(
    model: str, drawn: Drawn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [model, "--count", "7", "--out", str(tmp_path / "set"), "--shard"]
    main([*words, "2/3"])
    assert drawn.seen == [1, 4] and not (tmp_path / "set").exists()
    assert "2 of 7 images are in" in capsys.readouterr().out
    main([*words, "1/3"])
    main([*words, "3/3"])
    assert sorted(drawn.seen) == list(range(7)) and len(pixels(tmp_path / "set")) == 7
    assert (tmp_path / "set" / "grid.png").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_an_evaluation_goes_on_and_is_shared(
    model: str, drawn: Drawn, tiny_network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = ["--data", "tessellar.data.ShapesData", "--data.length", "30"]
    words = ["model", model, *data, "--count", "10", "--extractor", str(tiny_network)]
    evaluate.main([*words, "--out", "plain.json"])
    drawn.seen.clear()
    evaluate.main([*words, "--keep", "kept", "--shard", "2/2"])
    assert drawn.seen == [1, 3, 5, 7, 9]
    (Path("kept") / "00000003.png").unlink()
    evaluate.main([*words, "--keep", "kept", "--out", "kept.json"])
    assert drawn.seen == [1, 3, 5, 7, 9, 0, 2, 3, 4, 6, 8]
    plain, kept = (json.loads(Path(f"{n}.json").read_text()) for n in ("plain", "kept"))
    assert kept["metrics"] == plain["metrics"] and kept["samples"] == plain["samples"]
    assert kept["fingerprint"] == plain["fingerprint"]
    with pytest.raises(UserError, match="--keep FOLDER"):
        evaluate.main([*words, "--shard", "1/2"])


def test_shards_are_parts(tmp_path: Path) -> None:
    parts = [own_part(11, shard_of(f"{number}/4")) for number in (1, 2, 3, 4)]
    assert sorted(index for part in parts for index in part) == list(range(11))
    assert shard_of(None) == (0, 1)
    for text in ("", "0/4", "5/4", "1", "a/b", "1/0", "-1/2"):
        with pytest.raises(UserError, match="shards are 1/4, 2/4"):
            shard_of(text)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "own.png").write_bytes(b"x")
    with pytest.raises(UserError, match="is not empty and holds no plan.json"):
        KeptSet(tmp_path, {"seed": 1}, str)
    kept = KeptSet(tmp_path / "set", {"seed": 1}, lambda i: f"{i}.png")
    kept.write([3], torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    assert kept.missing(range(5)) == [0, 1, 2, 4] and kept.read(3).shape == (3, 4, 4)
    (tmp_path / "set" / "3.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="3.png cannot be read .*delete it: it is made again"):
        kept.read(3)


@pytest.fixture(scope="module")
def tiny_network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safetensors.torch import save_file

    from tessellar.evaluation.networks.timm_network import network_of
    from tessellar.networks.facts import NetworkFacts

    facts = NetworkFacts("tiny", "test_resnet", 4, (32, 32))
    path = tmp_path_factory.mktemp("network") / "tiny.safetensors"
    save_file(network_of(facts).state_dict(), path, metadata=facts.to_metadata())
    return path
