"""What studies keep and print."""

from pathlib import Path

import pytest
import torch

from benchmarks.studies import steps
from benchmarks.studies.tokenizers import TRAININGS, curve, table
from tessellar.checkpoints.export import export_tokenizer
from tessellar.checkpoints.reading import load_tokenizer
from tessellar.errors import UserError
from tessellar.tokenizers.quantizers.vq import VectorQuantizer
from tessellar.tokenizers.vit_vq import ViTVQ

ROW = {
    "name": "x",
    "training": {"updates": 3000, "samples_seen": 96_000, "cpu_seconds": 1234.5},
    "metrics": {"rFD(a)": 1.5, "rFD(b)": 2.5, "PSNR": 24.0, "SSIM": 0.9, "usage": 0.98},
    "tokens": {"layout": "2 tokens", "prefixes": [{"tokens": 1, "PSNR": 20.0}]},
    "probes": {"linear(tokens)": 0.8, "linear(tokens:1)": 0.5},
}


def test_a_small_export_is_one_file_of_half_the_size_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "EXPORTS", tmp_path / "kept")
    tokenizer = ViTVQ(VectorQuantizer(16, 4, restart_every=5), 32, 8, 16, 1, 1, 2).eval()
    whole = export_tokenizer(tokenizer, tmp_path / "export")
    kept = steps.small_export(whole, "small")
    assert kept.stat().st_size < 0.7 * (whole / "model.safetensors").stat().st_size
    loaded = load_tokenizer(kept)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    tokens = tokenizer.encode(images)
    with torch.no_grad():
        assert torch.allclose(loaded.decode(tokens), tokenizer.decode(tokens), atol=0.01)
    monkeypatch.setattr(steps, "LARGEST_EXPORT", 100)
    with pytest.raises(UserError, match="bytes in float16; at most 100 are kept"):
        steps.small_export(whole, "another")
    with pytest.raises(UserError, match="x holds values that float16 does not"):
        steps.rounded("x", torch.tensor([1e6]))


def test_the_runs_of_the_study_have_names_of_their_own_and_configs_that_exist() -> None:
    names = [training.name for training in TRAININGS]
    assert len(set(names)) == len(names)
    for training in TRAININGS:
        assert (steps.ROOT / training.config).is_file()
    taught = next(training for training in TRAININGS if training.name == "retok")
    assert taught.folder(Path("runs")) == Path("runs/retok(teacher=fmnist-vit)")


def test_a_row_of_the_table_and_its_curves() -> None:
    line = table([ROW]).splitlines()[-1]
    assert line == (
        "| x | 2 tokens | 24.00 | 0.900 | 1.50 | 2.50 | 98% | 0.800 | 3,000 | 96,000 | 1,234 |"
    )
    assert curve(ROW, "PSNR") == ([1], [20.0]) and curve(ROW, "linear") == ([1], [0.5])
