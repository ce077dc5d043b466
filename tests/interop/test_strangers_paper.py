"""A stranger's paper in a package of its own: trained, sampled, imported, verified and recorded with no edit here."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import tessellar
from tessellar.cli import convert, evaluate, sample, train
from tessellar.errors import UserError
from tessellar.pipeline import ImageGenerator
from tessellar.protocol.tokenizer import Tokenizer

NAME = "toypaper"
FILES = {
    "__init__.py": """
        from toypaper.model import ToyAR
        from toypaper.tokenizer import ToyTokenizer, toy_s

        __all__ = ["ToyAR", "ToyTokenizer", "toy_s"]
    """,
    "tokenizer.py": """
        from einops import rearrange
        from torch import Tensor, nn

        from tessellar.protocol.layout import Categorical, grid_layout
        from tessellar.protocol.tokenizer import Tokenizer, TokenizerOutput
        from tessellar.tokenizers.quantizers.vq import VectorQuantizer


        class ToyTokenizer(Tokenizer):
            def __init__(self, image_size: int = 16, patch: int = 4, vocab_size: int = 16) -> None:
                super().__init__()
                self.image_size, self.patch, self.side = (image_size, image_size), patch, image_size // patch
                self.layout = grid_layout(self.side, self.side, Categorical(vocab_size))
                self.into = nn.Linear(3 * patch**2, 4)
                self.quantizer = VectorQuantizer(vocab_size, 4, l2_normalize=False)
                self.out = nn.Linear(4, 3 * patch**2)

            @property
            def last_layer(self) -> Tensor:
                return self.out.weight

            def latents(self, images: Tensor) -> Tensor:
                p = self.patch
                return self.into(rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p))

            def render(self, vectors: Tensor) -> Tensor:
                p = self.patch
                return rearrange(self.out(vectors), "b (h w) (c p q) -> b c (h p) (w q)", h=self.side, p=p, q=p)

            def encode(self, images: Tensor) -> Tensor:
                return self.quantizer.encode(self.latents(images))

            def decode(self, tokens: Tensor) -> Tensor:
                return self.render(self.quantizer.decode(tokens))

            def forward(self, images: Tensor) -> TokenizerOutput:
                quantized = self.quantizer(self.latents(images))
                return TokenizerOutput(self.render(quantized.quantized), quantized.tokens, quantized.losses)


        def toy_s() -> ToyTokenizer:
            return ToyTokenizer(vocab_size=8)
    """,
    "model.py": """
        from tessellar.models.llamagen import LlamaGen
        from tessellar.protocol.layout import Layout


        class ToyAR(LlamaGen):
            def __init__(self, layout: Layout, width: int = 16, num_classes: int = 10) -> None:
                super().__init__(layout, width, 1, 2, num_classes, ffn_multiple_of=8)
    """,
    "official.py": """
        from tessellar.interop.importer import GeneratorImporter, TokenizerImporter
        from tessellar.interop.keys import table
        from tessellar.models.llamagen.official import KEYS
        from toypaper.model import ToyAR
        from toypaper.tokenizer import ToyTokenizer


        def build_tokenizer(state, options):
            vocab_size = len(state["codes"])
            patch = round((state["enc.weight"].shape[1] / 3) ** 0.5)
            return TOKENIZER.fill(ToyTokenizer(options.image_size or 16, patch, vocab_size), state)


        def build_generator(state, layout, options):
            classes, width = state["cls_embedding.embedding_table.weight"].shape
            return GENERATOR.fill(ToyAR(layout, width, classes - 1), state)


        TOKENIZER = TokenizerImporter(
            what="a toy tokenizer",
            marks=("codes", "enc.weight"),
            entries=("ema", "model"),
            keys=table(
                {
                    "enc.{tensor}": "into.{tensor}",
                    "dec.{tensor}": "out.{tensor}",
                    "codes": "quantizer.codebook.weight",
                }
            ),
            own=("quantizer.step", "quantizer.counts"),
            build=build_tokenizer,
        )
        GENERATOR = GeneratorImporter(
            what="a toy generator",
            marks=("cls_embedding.embedding_table.weight",),
            entries=("model",),
            keys=KEYS,
            build=build_generator,
        )
        OFFICIAL = (TOKENIZER, GENERATOR)
    """,
    "parity.py": """
        from tessellar.interop.importer import ImportOptions
        from tessellar.parity.registration import replays
        from toypaper.official import TOKENIZER


        @replays("toypaper", "encode")
        def encode(recording):
            tokenizer = TOKENIZER.build(recording.weights["model"], ImportOptions(recording.config["size"]))
            return {"tokens": tokenizer.encode(recording.inputs["images"])}
    """,
    "recording.py": '''
        """The official code, in a few lines, and what is recorded of it."""

        import torch
        from torch.nn.functional import unfold

        from tessellar.parity.recorder import Recorder


        def record(recorder: Recorder) -> None:
            state = {"enc.weight": torch.randn(4, 48), "enc.bias": torch.randn(4), "codes": torch.randn(12, 4)}
            state |= {"dec.weight": torch.randn(48, 4), "dec.bias": torch.zeros(48)}
            recorder.config["size"] = 8
            recorder.weights("model", state)
            images = recorder.input("images", torch.rand(2, 3, 8, 8) * 2 - 1, "encode", "images in [-1, 1]")
            patches = unfold(images, 4, stride=4).mT
            latents = patches @ state["enc.weight"].T + state["enc.bias"]
            recorder.output("tokens", torch.cdist(latents, state["codes"]).argmin(-1), "encode")
    ''',
}
TRAINER: dict[str, Any] = {
    "max_steps": 2,
    "accelerator": "cpu",
    "check_val_every_n_epoch": None,
    "val_check_interval": 2,
    "limit_val_batches": 1,
    "num_sanity_val_steps": 0,
}
DATA = {
    "class_path": "tessellar.data.ShapesData",
    "init_args": {"size": 16, "length": 32, "val_length": 8, "batch_size": 8},
}
CONFIGS: dict[str, Any] = {
    "tok": {
        "class_path": "tessellar.training.tokenizer_module.TokenizerModule",
        "init_args": {
            "tokenizer": {"class_path": "toypaper.ToyTokenizer"},
            "loss": {"class_path": "tessellar.tokenizers.losses.tokenizer_loss.TokenizerLoss"},
        },
    },
    "ar": {
        "class_path": "tessellar.training.generator_module.GeneratorModule",
        "init_args": {
            "tokenizer": "runs/tok/export",
            "generator": {"class_path": "toypaper.ToyAR"},
        },
    },
}
PACKAGE = ["--package", NAME]
REFUSED = f"from '{NAME}': if you trust that, name it, --package {NAME}"


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder with the package in a folder beside it, on sys.path."""
    site, work = tmp_path / "site", tmp_path / "work"
    (site / NAME).mkdir(parents=True)
    work.mkdir()
    for name, text in FILES.items():
        lines = [line.removeprefix(" " * 8) for line in text.splitlines()]
        (site / NAME / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.chdir(work)
    yield work
    for module in [name for name in sys.modules if name.partition(".")[0] == NAME]:
        del sys.modules[module]


def fit(name: str, *options: str) -> None:
    config = {"trainer": TRAINER, "log_every": 1, "model": CONFIGS[name], "data": DATA}
    Path(f"{name}.yaml").write_text(yaml.safe_dump(config))
    train.main(["--config", f"{name}.yaml", "--name", name, *options])


def make() -> tuple[Any, Any]:
    """A tokenizer and a generator of the toy paper."""
    import toypaper  # type: ignore[import-not-found]

    torch.manual_seed(0)
    made = toypaper.ToyTokenizer().eval()
    return made, toypaper.ToyAR(made.layout).eval()


def test_trained_sampled_and_measured(stranger: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(UserError, match=REFUSED):
        fit("tok")
    assert not Path("runs").exists()
    fit("tok", *PACKAGE)
    described = yaml.safe_load(Path("runs/tok/export/config.yaml").read_text())
    assert described["tokenizer"]["class_path"] == "toypaper.ToyTokenizer"
    with pytest.raises(UserError, match=REFUSED):
        fit("ar")
    fit("ar", *PACKAGE)
    words = ["runs/ar/export", "--count", "4", "--out", "samples"]
    with pytest.raises(UserError, match=REFUSED):
        sample.main(words)
    sample.main([*words, *PACKAGE])
    assert len(list(Path("samples").glob("**/*.png"))) >= 4
    measured = [
        "model",
        "runs/tok/export",
        "--extractor",
        "none",
        "--metrics",
        "paired",
        "--count",
        "8",
    ]
    with pytest.raises(UserError, match=REFUSED):
        evaluate.main([*measured, "--out", "record.json"])
    evaluate.main([*measured, "--out", "record.json", *PACKAGE])
    assert "psnr" in Path("record.json").read_text().lower()


def test_loaded_only_by_those_who_name_its_package(stranger: Path) -> None:
    from tessellar.checkpoints.export import export_generator

    tokenizer, generator = make()
    export_generator(ImageGenerator(tokenizer, generator, generator.make_conditioner()), "export")
    with pytest.raises(UserError, match=REFUSED):
        tessellar.load("export")
    model = tessellar.load("export", trust=(NAME,))
    assert isinstance(model, ImageGenerator) and type(model.generator).__name__ == "ToyAR"
    with pytest.raises(UserError, match=REFUSED):  # trust ends with the load
        tessellar.load("export")
    with pytest.raises(UserError, match="package 'nowhere' cannot be imported"):
        tessellar.load("export", trust=("nowhere",))


def test_no_class_of_another_package_is_built(stranger: Path) -> None:
    """Not through a name that the trusted package happens to import, nor through one that begins like it."""
    from tessellar.checkpoints.export import export_tokenizer

    with open(stranger.parent / "site" / NAME / "__init__.py", "a") as file:
        file.write("\nfrom otherpaper import Other\n")
    other = "from dataclasses import dataclass\n\n\n@dataclass\nclass Other:\n    x: int = 0\n"
    (stranger.parent / "site" / "otherpaper.py").write_text(other)
    tokenizer, _ = make()
    export_tokenizer(tokenizer, "export")
    text = Path("export/config.yaml").read_text()
    for path, said in (
        ("toypaper.Other", "not something that a config may build"),
        ("toypapers.ToyTokenizer", "--package toypapers"),
        ("subprocess.Popen", "--package subprocess"),
    ):
        Path("export/config.yaml").write_text(text.replace("toypaper.ToyTokenizer", path))
        with pytest.raises(UserError, match=said):
            tessellar.load("export", trust=(NAME,))


def test_imported(stranger: Path) -> None:
    tokenizer, generator = make()
    from toypaper.official import GENERATOR, TOKENIZER  # type: ignore[import-not-found]

    state = TOKENIZER.to_official(tokenizer)
    torch.save({"model": {name: t + 1 for name, t in state.items()}, "ema": state}, "tok.pt")
    torch.save({"model": GENERATOR.to_official(generator)}, "ar.pt")
    with pytest.raises(UserError, match=f"no importer for '{NAME}'.*--package"):
        convert.main(["import", NAME, "tok.pt", "--out", "tok"])
    convert.main(["import", NAME, "tok.pt", "--out", "tok", *PACKAGE])
    loaded = tessellar.load("tok", trust=(NAME,))
    images = torch.rand(1, 3, 16, 16)
    assert isinstance(loaded, Tokenizer) and torch.equal(
        loaded.encode(images), tokenizer.encode(images)
    )
    convert.main(["import", NAME, "ar.pt", "--tokenizer", "tok.pt", "--out", "ar", *PACKAGE])
    model = tessellar.load("ar", trust=(NAME,))
    assert isinstance(model, ImageGenerator)
    assert torch.equal(model.generator.state_dict()["output.weight"], generator.output.weight)


def test_official_outputs_recorded_and_verified(
    stranger: Path, capsys: pytest.CaptureFixture
) -> None:
    convert.main(["record", f"{NAME}.recording", "--out", "recorded", *PACKAGE])
    meta = json.loads(Path("recorded/meta.json").read_text())
    assert meta["system"] == NAME and meta["files"] == {"model": "weights.safetensors"}
    assert meta["tensors"]["tokens"]["role"] == "output" and meta["tensors"]["tokens"]["atol"] == 0
    assert convert.main(["verify", "recorded"]) == 2
    assert f"system '{NAME}' is not known" in capsys.readouterr().out
    assert convert.main(["verify", "recorded", *PACKAGE]) == 0
    weights = load_file("recorded/weights.safetensors")
    save_file({**weights, "codes": weights["codes"].flip(0)}, "recorded/weights.safetensors")
    assert convert.main(["verify", "recorded", *PACKAGE]) == 1


def test_a_module_of_ones_own_is_recorded_and_verified_by_others(
    stranger: Path, capsys: pytest.CaptureFixture
) -> None:
    from tessellar.checkpoints.export import export_generator

    tokenizer, generator = make()
    export_generator(ImageGenerator(tokenizer, generator, generator.make_conditioner()), "export")
    for module, cases in (
        ("toypaper.toy_s", {"encode", "decode"}),
        ("export", {"encode", "decode", "sample", "loss"}),
    ):
        convert.main(["record", module, "--out", "recorded", "--overwrite", *PACKAGE])
        meta = json.loads(Path("recorded/meta.json").read_text())
        assert {tensor["case"] for tensor in meta["tensors"].values()} == cases
        capsys.readouterr()
        assert convert.main(["verify", "recorded", *PACKAGE]) == 0
        assert convert.main(["verify", "recorded"]) == 1
        assert f"--package {NAME}" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UserError, match=f"of the package '{NAME}': name it, --package {NAME}"):
        convert.main(["record", "toypaper.toy_s", "--out", "other"])
    with pytest.raises(UserError, match="toypaper.ToyAR needs layout"):
        convert.main(["record", "toypaper.ToyAR", "--out", "other", *PACKAGE])
    assert not Path("other").exists()
