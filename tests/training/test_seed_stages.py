"""SEED's three stages, then a generator on its tokens, through the commands: each goes on from the one before."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tessellar.cli import sample, train
from tests.tiny.configs import tokenizer_run


def test_three_stages_and_a_generator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = tokenizer_run(2, validate_every=2, save_every=2)
    decoder = {"dim": 8, "image_size": 16, "patch_size": 8, "width": 16, "depth": 1, "num_heads": 2}
    vision = {"image_size": 16, "patch_size": 8, "width": 16, "depth": 1, "num_heads": 2}
    arguments: dict[str, Any] = {
        "vision": {
            "class_path": "tessellar.tokenizers.seed.EvaVision",
            "init_args": {**vision, "hidden": 16},
        },
        "image_size": 16,
        "num_tokens": 6,
        "vocab_size": 16,
        "code_dim": 4,
        "qformer_size": {"width": 16, "depth": 1, "num_heads": 2, "hidden": 16},
        "decoder_depth": 1,
        "decoder_heads": 2,
        "embedding_dim": 8,
        "detokenizer": {
            "class_path": "tessellar.tokenizers.seed.PixelDetokenizer",
            "init_args": decoder,
        },
    }
    model = run["model"]["init_args"]
    pixels = model["loss"]["init_args"]
    text = {"vocab_size": 300, "length": 8, "dim": 8}
    before: list[str] = []
    for stage in ("contrastive", "codebook", "detokenizer"):
        own = {"stage": stage, **({"text": text} if stage == "contrastive" else {})}
        model["tokenizer"] = {
            "class_path": "tessellar.tokenizers.seed.SEED",
            "init_args": {**arguments, **own},
        }
        silent = {"l1": 0.0, "l2": 0.0, "gradient": 0.0}
        no_pixels = {"reconstruction": silent}
        model["loss"]["init_args"] = pixels if stage == "detokenizer" else no_pixels
        Path("run.yaml").write_text(yaml.safe_dump(run))
        train.main(["fit", "--config", "run.yaml", "--name", stage, *before])
        before = ["--model.init_from", f"runs/{stage}/export"]
    sizes = {"width": 16, "depth": 1, "num_heads": 2, "num_classes": 10, "ffn_multiple_of": 8}
    run["model"] = {
        "class_path": "tessellar.training.generator_module.GeneratorModule",
        "init_args": {
            "tokenizer": "runs/detokenizer/export",
            "generator": {
                "class_path": "tessellar.models.llamagen.LlamaGen",
                "init_args": sizes,
            },
        },
    }
    Path("run.yaml").write_text(yaml.safe_dump(run))
    train.main(["fit", "--config", "run.yaml", "--name", "gen"])
    sample.main(["runs/gen/export", "--out", "images", "--count", "2", "--device", "cpu"])
    assert len(list(Path("images").glob("*.png"))) >= 2
