"""`convert.py import`, `export` and `info`, from the words typed to a model that loads."""

import argparse
import json
from pathlib import Path

import pytest
import torch
import yaml

import tessellar
from tessellar.checkpoints.export import export_tokenizer
from tessellar.checkpoints.weights import fingerprint
from tessellar.cli.convert import main
from tessellar.cli.importing import imagenet_names
from tessellar.errors import UserError
from tessellar.models.llamagen import LlamaGen
from tessellar.models.llamagen.official import to_official
from tessellar.pipeline import ImageGenerator
from tessellar.tensor_files import read_safetensors
from tessellar.text.conditioners import FeatureConditioner
from tessellar.tokenizers.llamagen import LlamaGenVQ
from tessellar.tokenizers.losses.discriminator import PatchGAN
from tessellar.tokenizers.losses.tokenizer_loss import TokenizerLoss
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ
from tessellar.training.tokenizer_module import TokenizerModule

GOLDEN = Path(__file__).parents[1] / "golden" / "llamagen"


def tokenizer(vocab: int = 96, size: int = 16) -> ViTVQ:
    torch.manual_seed(0)
    return ViTVQ(VectorQuantizer(vocab, 4), size, 4, 16, 1, 1, 2).eval()


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """A training checkpoint as the official code writes it."""
    state, _ = read_safetensors(GOLDEN / "weights_c2i.safetensors")
    ema = {name: tensor + 1 for name, tensor in state.items()}
    torch.save(
        {"model": state, "ema": ema, "args": argparse.Namespace(lr=1e-4), "steps": 3},
        tmp_path / "c2i_T.pt",
    )
    return tmp_path / "c2i_T.pt"


def test_an_official_generator_becomes_an_export(official: Path, tmp_path: Path) -> None:
    vq = export_tokenizer(tokenizer(), tmp_path / "vq")
    words = [
        "import",
        "llamagen",
        str(official),
        "--tokenizer",
        str(vq),
        "--num-heads",
        "3",
        "--out",
    ]
    main([*words, str(tmp_path / "plain"), "--license", "mit"])
    model = tessellar.load(tmp_path / "plain")
    assert isinstance(model, ImageGenerator) and isinstance(model.generator, LlamaGen)
    state, _ = read_safetensors(GOLDEN / "weights_c2i.safetensors")
    assert all(
        torch.equal(tensor, state[name]) for name, tensor in to_official(model.generator).items()
    )
    assert fingerprint(model.tokenizer) == fingerprint(tokenizer())
    assert model.conditioner.config["init_args"] == {"num_classes": 10}
    card = yaml.safe_load((tmp_path / "plain" / "README.md").read_text().split("---")[1])
    assert card["license"] == "mit"
    main([*words, str(tmp_path / "averaged"), "--key", "ema"])
    other = tessellar.load(tmp_path / "averaged")
    assert isinstance(other, ImageGenerator) and isinstance(other.generator, LlamaGen)
    assert torch.equal(to_official(other.generator)["norm.weight"], state["norm.weight"] + 1)


def test_an_official_tokenizer_becomes_an_export_or_part_of_one(tmp_path: Path) -> None:
    """vq file with 64 codes; a generator of 64 codes takes it directly."""
    file, vq = str(GOLDEN / "weights_vq.safetensors"), tmp_path / "vq"
    main(["import", "llamagen", file, "--image-size", "8", "--out", str(vq)])
    tokenizer = tessellar.load(vq)
    assert isinstance(tokenizer, LlamaGenVQ) and tokenizer.layout.grid == (4, 4)
    main(["import", "llamagen", file, "--image-size", "16", "--out", str(tmp_path / "large")])
    large = tessellar.load(tmp_path / "large")
    assert fingerprint(large) == fingerprint(tokenizer)
    torch.manual_seed(0)
    llama = LlamaGen(tokenizer.layout, 16, 1, 2, num_classes=3, ffn_multiple_of=8)
    torch.save(to_official(llama), tmp_path / "gpt.pt")
    words = [
        "import",
        "llamagen",
        str(tmp_path / "gpt.pt"),
        "--num-heads",
        "2",
        "--image-size",
        "16",
    ]
    for name, source in (("a", file), ("b", str(vq))):
        main([*words, "--tokenizer", source, "--out", str(tmp_path / name)])
        model = tessellar.load(tmp_path / name)
        assert isinstance(model, ImageGenerator) and model.generator.layout.grid == (8, 8)
        assert fingerprint(model.tokenizer) == fingerprint(tokenizer)


def test_a_text_conditional_generator_reads_features(tmp_path: Path) -> None:
    vq = export_tokenizer(tokenizer(80), tmp_path / "vq")
    file = str(GOLDEN / "weights_t2i.safetensors")
    main(
        [
            "import",
            "llamagen",
            file,
            "--tokenizer",
            str(vq),
            "--num-heads",
            "2",
            "--out",
            str(tmp_path / "t2i"),
        ]
    )
    model = tessellar.load(tmp_path / "t2i")
    assert isinstance(model, ImageGenerator) and isinstance(model.conditioner, FeatureConditioner)


def test_the_image_size_decides_the_grid(official: Path, tmp_path: Path) -> None:
    vq = export_tokenizer(tokenizer(), tmp_path / "vq")
    words = ["import", "llamagen", str(official), "--tokenizer", str(vq), "--num-heads", "3"]
    with pytest.raises(
        UserError,
        match="at image size 24, does not fit ViTVQ: 2 of another shape: decoder.positions",
    ):
        main([*words, "--image-size", "24", "--out", str(tmp_path / "large")])
    assert not (tmp_path / "large").exists()


def test_import_says_what_is_missing(official: Path, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="c2i_T.pt is a generator: give its tokenizer"):
        main(["import", "llamagen", str(official), *out])
    vq = export_tokenizer(tokenizer(80), tmp_path / "vq")
    with pytest.raises(UserError, match="predicts 96 codes, but the tokenizer gives"):
        main(
            ["import", "llamagen", str(official), "--tokenizer", str(vq), "--num-heads", "3", *out]
        )
    with pytest.raises(UserError, match="--out FOLDER"):
        main(["import", "llamagen", str(official), "--tokenizer", str(vq)])
    with pytest.raises(
        UserError, match="there is no importer for 'dalle'; there are alitok, bar, bar_fsq, "
    ):
        main(["import", "dalle", str(official), *out])
    assert not (tmp_path / "out").exists()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    module = TokenizerModule(
        tokenizer(), TokenizerLoss(perceptual_weight=0, discriminator=PatchGAN(4, 1))
    )
    content: dict = {"state_dict": module.state_dict(), "global_step": 7}
    module.on_save_checkpoint(content)
    torch.save(content, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def test_a_checkpoint_becomes_an_export(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "eval.json").write_text(json.dumps({"metrics": {"rFD(x)": 1.5, "note": "text"}}))
    out = tmp_path / "vq"
    main(
        [
            "export",
            str(checkpoint),
            "--out",
            str(out),
            "--data",
            "shapes",
            "--metrics",
            str(tmp_path / "eval.json"),
        ]
    )
    assert fingerprint(tessellar.load(out)) == fingerprint(tokenizer())
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["record"] == {
        "weights": "raw",
        "steps": 7,
        "data": "shapes",
        "metrics": {"rFD(x)": 1.5},
    }
    assert "discriminator" not in config
    main(["export", str(checkpoint), "--out", str(out), "--overwrite", "--discriminator"])
    assert "discriminator" in yaml.safe_load((out / "config.yaml").read_text())


def test_export_refuses_what_it_cannot_do(checkpoint: Path, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="is not an evaluation record with metrics"):
        main(["export", str(checkpoint), *out, "--metrics", str(checkpoint)])
    bare = export_tokenizer(tokenizer(), tmp_path / "bare")
    with pytest.raises(UserError, match="bare has no discriminator"):
        main(["export", str(bare), *out, "--discriminator"])
    assert not (tmp_path / "out").exists()


def test_info_says_what_is_inside(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["info", str(checkpoint)])
    text = capsys.readouterr().out
    assert fingerprint(tokenizer()) in text and "ViTVQ" in text and "4x4 tokens" in text
    main(["info", str(checkpoint), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["kind"] == "tokenizer" and facts["weights"] == "raw"
    assert facts["description"]["tokenizer"]["init_args"]["image_size"] == 16


def test_the_names_of_imagenets_classes() -> None:
    names = imagenet_names()
    assert len(set(names)) == 1000 and names[207] == "golden retriever" and names[1] == "goldfish"
    assert [names[134], names[517]] == ["crane (134)", "crane (517)"]
