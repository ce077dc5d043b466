"""Folders that scorers of text-to-image benchmarks read, and CLIPScore with a tiny CLIP."""

import glob
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tessellar.checkpoints.export import export_generator
from tessellar.cli import sample
from tessellar.cli.evaluate import main
from tessellar.errors import UserError
from tessellar.evaluation.text_to_image import (
    DPG,
    ClipModel,
    GenEval,
    Prompt,
    clip_summary,
    seeds_of,
)
from tessellar.pipeline import ImageGenerator
from tessellar.text.bpe import require
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ
from tests.tiny.image_generators import TEXTS, of_captions


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(export_generator(of_captions(), tmp_path_factory.mktemp("models") / "text"))


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A prompts file with what GenEval's has."""
    monkeypatch.chdir(tmp_path)
    rows = []
    for i, text in enumerate(TEXTS):
        row = {"tag": "single_object", "include": [{"class": "x", "count": i}], "prompt": text}
        rows.append(json.dumps(row))
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(rows) + "\n")
    return path


def files(folder: str) -> dict[str, bytes]:
    found = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_geneval_finds_its_prompts_and_four_images_each(model: str, lines: Path) -> None:
    words = ["t2i", model, "--prompts", str(lines), "--layout", "geneval", "--out"]
    main([*words, "one"])
    # As evaluate_images.py of GenEval looks for them.
    folders = [name for name in sorted(glob.glob("one/*")) if Path(name).name.isdigit()]
    assert len(folders) == 3
    for folder, line in zip(folders, lines.read_text().splitlines(), strict=True):
        assert Path(folder, "metadata.jsonl").read_text() == line + "\n"
        images = [p for p in Path(folder, "samples").iterdir() if p.stem.isdigit()]
        assert len(images) == 4
    whole = files("one")
    main([*words, "two", "--shard", "2/2"])
    assert len(list(Path("two").glob("0*"))) == 1
    (made,) = Path("two").glob("0*/samples/00002.png")
    before = made.stat().st_mtime_ns
    Path("two/00001/samples/00001.png").unlink()
    main([*words, "two"])
    assert files("two") == whole and made.stat().st_mtime_ns == before
    with pytest.raises(UserError, match="two holds another export .other seed."):
        main([*words, "two", "--seed", "1"])


def test_geneval2_names_the_image_of_each_prompt(model: str, lines: Path) -> None:
    main(["t2i", model, "--prompts", str(lines), "--layout", "geneval2", "--out", "out"])
    images = json.loads(Path("out/images.json").read_text())
    assert list(images) == TEXTS
    assert all(Image.open(path).size == (8, 8) for path in images.values())


def test_dpg_has_a_grid_a_prompt(model: str, lines: Path) -> None:
    Path("prompts").mkdir()
    for i, text in enumerate(TEXTS):
        Path("prompts", f"item{i}.txt").write_text(text)
    main(["t2i", model, "--prompts", "prompts", "--layout", "dpg", "--out", "out"])
    assert sorted(p.name for p in Path("out").glob("*.png")) == [f"item{i}.png" for i in range(3)]
    assert Image.open("out/item0.png").size == (16, 16)


def test_a_grid_cut_into_quarters_is_the_four_images(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (4, 3, 6, 6)).to(torch.uint8)
    DPG().write(tmp_path / "out", Prompt("x", "x"), images)
    grid = torch.from_numpy(np.array(Image.open(tmp_path / "out" / "x.png"))).permute(2, 0, 1)
    quarters = [grid[:, r : r + 6, c : c + 6] for r in (0, 6) for c in (0, 6)]
    assert all(torch.equal(a, b) for a, b in zip(quarters, images, strict=True))


def test_the_benchmarks_at_their_size(tmp_path: Path) -> None:
    """553 prompts of four images, as GenEval's loader finds them; 1065 grids of DPG-Bench."""
    pixel = torch.zeros(4, 3, 1, 1, dtype=torch.uint8)
    for i in range(553):
        GenEval().write(tmp_path / "g", Prompt(f"{i:05d}", "x", "{}"), pixel)
    assert len(glob.glob(str(tmp_path / "g/[0-9]*/samples/[0-9]*.png"))) == 553 * 4
    for i in range(1065):
        DPG().write(tmp_path / "d", Prompt(f"i{i}", "x"), pixel)
    assert len(glob.glob(str(tmp_path / "d/*.png"))) == 1065
    seeds = [seed for p in range(553) for seed in seeds_of(0, p, 4)]
    assert len(set(seeds)) == 553 * 4 and seeds_of(0, 7, 4) == seeds[28:32]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("", "holds no prompts"),
        ('{"tag": "x"}', "line 1 has no 'prompt'"),
        ("{", "line 1"),
        ('{"prompt": "a"}\n[1]', "line 2 has no 'prompt'"),
    ],
)
def test_prompts_that_are_none_are_one_line(content: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(UserError, match=line):
        GenEval().prompts(tmp_path / "p.jsonl")
    with pytest.raises(UserError, match="folder of .txt"):
        DPG().prompts(tmp_path / "p.jsonl")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny CLIP with random weights, saved as those of the hub are."""
    transformers: Any = require("transformers")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = {**sizes, "vocab_size": 600, "max_position_embeddings": 16, "eos_token_id": 513}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    transformers.CLIPModel(config).save_pretrained(folder)
    alphabet = [chr(i) for i in range(33, 127)]
    vocabulary = {word: i for i, word in enumerate(alphabet)}
    vocabulary |= {f"{word}</w>": i + 100 for word, i in list(vocabulary.items())}
    vocabulary |= {"<|startoftext|>": 512, "<|endoftext|>": 513}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 16}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.mark.long  # transformers takes long to import
def test_clipscore_of_a_set_and_its_prompts(
    clip: str, model: str, lines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("p.txt").write_text("\n".join(TEXTS))
    sample.main([model, "--prompts", "p.txt", "--out", "set", "--per-class", "2"])
    capsys.readouterr()
    main(["clipscore", "set", "--clip", clip, "--out", "score.json"])
    record = json.loads(Path("score.json").read_text())
    printed = capsys.readouterr().out
    network = ClipModel(clip)
    found = []
    for path in sorted(Path("set").glob("0*.png")):
        pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
        found.append(network.cosines([pixels], [TEXTS[int(path.name.split("_")[1])]]))
    expected = clip_summary(torch.cat(found))
    assert len(found) == 6 and record["prompts"] == 3
    for name, value in expected.items():
        assert record["metrics"][f"{name} (tiny-clip)"] == pytest.approx(value, abs=1e-6)
    assert "CLIPScore x100 (tiny-clip)" in printed
    main(["clipscore", "set", "--clip", clip, "--prefix", "a photo depicts ", "--out", "b.json"])
    assert json.loads(Path("b.json").read_text())["metrics"] != record["metrics"]
    with pytest.raises(UserError, match="CLIP model nowhere cannot be loaded"):
        main(["clipscore", "set", "--clip", "nowhere"])
    Path("bare").mkdir()
    Image.new("RGB", (8, 8)).save("bare/0.png")
    with pytest.raises(UserError, match="does not say the prompts"):
        main(["clipscore", "bare", "--clip", clip])


def test_cosines_in_the_fields_ways() -> None:
    values = clip_summary(torch.tensor([0.4, -0.2]))
    assert values["cosine"] == pytest.approx(0.1)
    assert values["CLIPScore x100"] == pytest.approx(20)
    assert values["CLIPScore x2.5"] == pytest.approx(0.5)


def test_a_generator_of_classes_makes_no_benchmark(lines: Path, tmp_path: Path) -> None:
    from tessellar.models.llamagen import LlamaGen
    from tessellar.protocol.condition import ClassConditioner

    tokenizer = ViTVQ(VectorQuantizer(16, 4), 8, 4, 16, 1, 1, 2)
    generator = LlamaGen(tokenizer.layout, 16, 1, 2, num_classes=3, ffn_multiple_of=8)
    place = export_generator(
        ImageGenerator(tokenizer, generator, ClassConditioner(3)), tmp_path / "c"
    )
    with pytest.raises(UserError, match="reads no text; a text-to-image generator is needed"):
        main(["t2i", str(place), "--prompts", str(lines), "--out", "out"])
